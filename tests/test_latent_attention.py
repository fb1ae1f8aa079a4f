"""Multi-head latent attention against transformers' DeepSeek-V3 and against itself on one rank: values and gradients in
float64; what a cache holds of it; and how it is laid over ranks."""

from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from expert_parallel.model.attention_mask import AttentionContext
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.context_parallel import apply_cp_to_attention
from expert_parallel.model.kv_cache import KVCache
from expert_parallel.model.latent_attention import LatentAttention, LatentAttentionConfig
from expert_parallel.model.parallelize import build_model, validate_degrees
from expert_parallel.model.rotary import RopeConfig
from expert_parallel.model.tensor_parallel import apply_tp_to_latent_attention
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.parameters import init_parameters, logical_parameters
from expert_parallel.parallel.degrees import ParallelDegrees
from expert_parallel.parallel.mesh import ParallelMesh, build_mesh
from expert_parallel.parallel.sequence import SequenceShard
from expert_parallel.training.grads import reduce_gradients
from expert_parallel.verify.reference_attention import attention as reference_attention
from tests.peers import peers_in_float64
from tests.ranks import run_ranks

D, BATCH, LENGTH, HEADS, NOPE, ROPE, VALUE, QUERY_RANK, KV_RANK = 10, 2, 8, 4, 6, 4, 3, 7, 5
CPU = torch.device("cpu")
SIZES = {
    "kind": "latent",
    "num_heads": HEADS,
    "query_rank": QUERY_RANK,
    "kv_rank": KV_RANK,
    "nope_size": NOPE,
    "rope_size": ROPE,
    "value_size": VALUE,
    "norm_eps": 1e-3,
}
YARN = {"kind": "yarn", "factor": 8.0, "original_length": 16, "mscale": 0.7, "mscale_all_dim": 0.9}
DOCUMENTS_BS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1]])


def model_config(query_rank: int | None = QUERY_RANK, scaling: Any = None, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "vocab_size": 17,
            "num_layers": 2,
            "d_model": D,
            "attention": {**SIZES, "query_rank": query_rank},
            "ffn": {"hidden": 12},
            "position": {"kind": "rope", "theta": 50.0, "scaling": scaling},
            "init_std": 0.3,
            **changes,
        }
    )


def make(config: ModelConfig) -> LatentAttention:
    """With shapes alone."""
    assert isinstance(config.attention, LatentAttentionConfig)
    assert isinstance(config.position, RopeConfig)
    with torch.device("meta"):
        return LatentAttention(config.attention, D, config.position)


def fill(attention: LatentAttention) -> LatentAttention:
    """Weights, norms' too, that depend on logical names alone."""
    attention = attention.double().to_empty(device="cpu")
    init_parameters(attention, 1, lambda name: 0.6)
    for logical in logical_parameters(attention):
        if len(logical.shape) == 1:
            logical.fill(logical.parameter, [1 + 0.3 * draw(*logical.shape, seed=len(logical.names[0]))])
    return attention


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def run_whole(config: ModelConfig, documents_BS: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """On one rank: output, gradient of x, gradients of the weights."""
    attention, x = fill(make(config)), draw(BATCH, LENGTH, D).requires_grad_()
    y = attention(x, AttentionContext.of(SequenceShard(), LENGTH, CPU, documents_BS))
    y.backward(draw(BATCH, LENGTH, D, seed=1))
    return y.detach(), gradient(x), {name: gradient(p) for name, p in attention.named_parameters()}


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


# ----------------------------------------------------------------------------------------------- against transformers


def theirs(config: ModelConfig, interleave: bool) -> Any:
    """DeepseekV3Attention with our weights, and its rotary positions. interleave: as DeepSeek's checkpoints lie."""
    rope = {"rope_type": "default", "rope_theta": 50.0}
    if config.position.scaling is not None:  # type: ignore[union-attr]
        rope = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 8.0, "original_max_position_embeddings": 16}
        rope |= {"mscale": 0.7, "mscale_all_dim": 0.9}
    peer = DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=config.attention.query_rank,  # type: ignore[union-attr]
        kv_lora_rank=KV_RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        rope_parameters=rope,
        rope_interleave=interleave,
        attn_implementation="eager",
    )
    attention = modeling_deepseek_v3.DeepseekV3Attention(peer, layer_idx=0).double()
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if getattr(attention, name) is not None:
            getattr(attention, name).variance_epsilon = 1e-3
    return attention, modeling_deepseek_v3.DeepseekV3RotaryEmbedding(peer)


def pairs(ours: LatentAttention, peer: Any, interleave: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Our parameter, theirs, and for each of our rows the number of theirs: of each pair that is turned, we have the
    first rows side by side, then the second ones."""
    turned = torch.arange(ROPE).view(-1, 2).T.flatten() if interleave else torch.arange(ROPE)
    head = torch.cat([torch.arange(NOPE), NOPE + turned])
    query_rows = torch.cat([h * (NOPE + ROPE) + head for h in range(HEADS)])
    down_rows = torch.cat([torch.arange(KV_RANK), KV_RANK + turned])
    found = [(ours.kv_down, peer.kv_a_proj_with_mqa, down_rows)]
    found += [(own, other, None) for own, other in ((ours.kv_norm, peer.kv_a_layernorm), (ours.kv_up, peer.kv_b_proj))]
    found += [(ours.out, peer.o_proj, None)]
    if peer.q_proj is not None:
        found += [(ours.query, peer.q_proj, query_rows)]
    else:
        found += [(ours.query_down, peer.q_a_proj, None), (ours.query_norm, peer.q_a_layernorm, None)]
        found += [(ours.query_up, peer.q_b_proj, query_rows)]
    return [
        (own.weight, other.weight, torch.arange(len(own.weight)) if rows is None else rows)  # type: ignore[misc]
        for own, other, rows in found
    ]


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("query_rank", [None, QUERY_RANK])
def test_equals_deepseek_v3(query_rank: int | None, scaling: Any, interleave: bool) -> None:
    """Outputs and all gradients; positions beyond YaRN's original length."""
    config, length = model_config(query_rank, scaling), 20
    ours = fill(make(config))
    x, their_x = draw(2, length, D).requires_grad_(), draw(2, length, D).requires_grad_()
    with peers_in_float64():
        peer, rotary = theirs(config, interleave)
        for own, other, rows in pairs(ours, peer, interleave):
            other.data[rows] = own.data
        mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)[None, None]
        expected, _ = peer(their_x, rotary(their_x, torch.arange(length)[None]), mask)
    actual = ours(x, AttentionContext.of(SequenceShard(), length, CPU))
    close(actual, expected)
    upstream = draw(2, length, D, seed=3)
    actual.backward(upstream)
    expected.backward(upstream)
    close(x.grad, their_x.grad)
    assert len(pairs(ours, peer, interleave)) == len(list(ours.parameters())) == len(list(peer.parameters()))
    for own, other, rows in pairs(ours, peer, interleave):
        close(gradient(own), gradient(other)[rows])


def test_scale_with_yarn_by_hand() -> None:
    """DeepSeek-V3: factor 40, mscale_all_dim 1: (0.1 ln 40 + 1)^2 times 192^-0.5; without mscale_all_dim no more."""
    deepseek = {"kind": "yarn", "factor": 40.0, "original_length": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert make(model_config(scaling=deepseek)).query_scale == pytest.approx(1.8738542363)
    assert make(model_config(scaling={**deepseek, "mscale_all_dim": None})).query_scale == 1.0
    assert make(model_config(scaling={**deepseek, "mscale_all_dim": 0.0})).query_scale == 1.0
    assert make(model_config()).query_scale == 1.0


@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("query_rank", [None, QUERY_RANK])
def test_equals_the_reference_of_verify(query_rank: int | None, scaling: Any) -> None:
    """With documents; values and gradients."""
    config = model_config(query_rank, scaling)
    y, x_grad, grads = run_whole(config, DOCUMENTS_BS)
    weights = {name: p.detach().clone().requires_grad_() for name, p in fill(make(config)).named_parameters()}
    x = draw(BATCH, LENGTH, D).requires_grad_()
    expected = reference_attention(config, 0, weights, x, DOCUMENTS_BS)
    close(y, expected.detach())
    expected.backward(draw(BATCH, LENGTH, D, seed=1))
    close(x_grad, x.grad)
    close(grads, {name: gradient(weight) for name, weight in weights.items()})


# -------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("query_rank", [None, QUERY_RANK])
def test_pieces_through_the_cache_equal_one_pass(query_rank: int | None) -> None:
    """Pieces of 3, 1 and 4 tokens; of each the cache holds a latent and the key's turned columns, of no head."""
    model = build_model(model_config(query_rank, YARN), dtype=torch.float64, seed=1)
    tokens = torch.randint(0, 17, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    cache = KVCache(BATCH, capacity=LENGTH + 2)
    pieces = []
    with torch.no_grad():
        for piece in tokens.split([3, 1, 4], 1):
            pieces.append(model(piece, StepContext(0, 0, 0), cache=cache).logits)
            cache.length_B += piece.shape[1]
        close(torch.cat(pieces, 1), model(tokens, StepContext(0, 0, 0)).logits)
    assert len(cache.rows) == 2
    for rows in cache.rows.values():
        assert [(held.shape[1], held.shape[3]) for held in rows] == [(1, KV_RANK), (1, ROPE)]


# ------------------------------------------------------------------------------------------------------------ layouts


@cache
def mesh_of(world: int, tp: int, cp: int) -> ParallelMesh:
    return build_mesh(ParallelDegrees(world, tp=tp, cp=cp), "cpu", timedelta(seconds=120))


def divided(
    rank: int, tp: int, cp: int, query_rank: int | None, documents_BS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], list[str]]:
    """Which positions this rank has, output and input gradient of these, each whole gradient, summed as training sums
    them, and the names of what tp divides."""
    mesh, config = mesh_of(dist.get_world_size(), tp, cp), model_config(query_rank, YARN)
    place, attention = SequenceShard.of(mesh), make(config)
    if mesh.cp_group is not None:
        apply_cp_to_attention(attention, place, mesh.cp_group)
    if mesh.tp_group is not None:
        apply_tp_to_latent_attention(attention, mesh.tp_group)
    fill(attention)
    own_T = place.own(LENGTH)
    x = draw(BATCH, LENGTH, D)[:, own_T].requires_grad_()
    y = attention(x, AttentionContext.of(place, LENGTH, CPU, documents_BS))
    y.backward(draw(BATCH, LENGTH, D, seed=1)[:, own_T])
    reduce_gradients(attention, mesh, sharded=False)
    grads, sliced = {}, []
    for logical in logical_parameters(attention):
        grads |= logical.whole(gradient(logical.parameter))
        sliced += logical.names if logical.tensor_shard is not None else ()
    return own_T, y.detach(), gradient(x), grads, sliced


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("query_rank", [None, QUERY_RANK])
@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_each_layout_computes_the_whole(tp: int, cp: int, query_rank: int | None, has_documents: bool) -> None:
    documents_BS = DOCUMENTS_BS if has_documents else None
    y, x_grad, grads = run_whole(model_config(query_rank, YARN), documents_BS)
    results = run_ranks(tp * cp, divided, tp, cp, query_rank, documents_BS)
    assert torch.cat([result[0] for result in results]).sort().values.tolist() == list(range(LENGTH))
    up = "query.weight" if query_rank is None else "query_up.weight"
    for own_T, own_y, own_x_grad, own_grads, sliced in results:
        close(own_y, y[:, own_T])
        close(own_x_grad, x_grad[:, own_T])
        close(own_grads, grads)
        assert sorted(sliced) == (sorted([up, "kv_up.weight", "out.weight"]) if tp > 1 else [])


def without_sequences(rank: int) -> None:
    """As a data rank may, in evaluation."""
    mesh = mesh_of(4, 2, 2)
    place, attention = SequenceShard.of(mesh), make(model_config())
    assert mesh.cp_group is not None
    assert mesh.tp_group is not None
    apply_cp_to_attention(attention, place, mesh.cp_group)
    apply_tp_to_latent_attention(attention, mesh.tp_group)
    fill(attention)
    assert attention(draw(0, 2, D), AttentionContext.of(place, LENGTH, CPU)).shape == (0, 2, D)


def test_ranks_without_sequences() -> None:
    run_ranks(4, without_sequences)


# ----------------------------------------------------------------------------------------------------------- settings


def test_refusals_name_the_setting() -> None:
    with pytest.raises(ValueError, match=r"attention\.rope_size \(3\) must be even"):
        model_config(attention={**SIZES, "rope_size": 3})
    with pytest.raises(ValueError, match="'learned'"):
        model_config(position={"kind": "learned", "max_length": 8})
    for name, value in (("window", 4), ("sinks", True), ("num_kv_heads", 2)):
        with pytest.raises(ValueError, match=name):
            model_config(attention={**SIZES, name: value})
    with pytest.raises(ValueError, match="window_blocks"):
        model_config(window_blocks={"kind": "every_nth", "n": 2})
    with pytest.raises(ValueError, match=r"model\.attention\.num_heads \(4\) is not a multiple of parallel\.tp \(3\)"):
        validate_degrees(model_config(), ParallelDegrees(3, tp=3), 1)
