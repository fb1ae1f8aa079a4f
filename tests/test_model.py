"""The decoder: attention against transformers' Llama, each block against its formula, recomputation and dropout
against none, causality, and initial weights that depend on the seed alone."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from expert_parallel.model import transformer
from expert_parallel.model.attention import Attention, HeadsConfig
from expert_parallel.model.attention_mask import AttentionContext
from expert_parallel.model.outputs import ModelOutput
from expert_parallel.model.parallelize import build_model, init_weights
from expert_parallel.model.rotary import RopeConfig, apply_rope, rope_cos_sin
from expert_parallel.model.transformer import ModelConfig, Recompute, Transformer
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.experts import grouped as experts
from expert_parallel.moe.experts.grouped import GroupedExperts
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.nn.norms import LayerNorm, RMSNorm
from expert_parallel.parallel.placement import ExpertPlacement
from expert_parallel.parallel.sequence import SequenceShard
from tests.peers import peers_in_float64

VOCABULARY, D_MODEL, LENGTH = 17, 8, 6

MOE = {"num_experts": 4, "router": {"k": 2}, "experts": {"hidden": 12, "backend": "loop"}}
CONFIG = {
    "vocab_size": VOCABULARY,
    "num_layers": 2,
    "d_model": D_MODEL,
    "attention": {"num_heads": 2, "head_size": 6},
    "moe": MOE,
    "init_std": 0.3,
}


def make_config(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**CONFIG, **changes})


def make_model(recompute: Recompute = "none", dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    return build_model(make_config(**changes), dtype=dtype, recompute=recompute, seed=1)


def draw_tokens(batch: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def turned(x: Tensor, theta: float) -> Tensor:
    """At positions 0, 1, ..."""
    return apply_rope(x, *rope_cos_sin(RopeConfig(theta=theta), x.shape[-1], torch.arange(x.shape[2])[None], x.dtype))


def plain(length: int) -> AttentionContext:
    """One document a row, causal."""
    return AttentionContext.of(SequenceShard(), length, torch.device("cpu"))


def logical_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = {}
    for logical in logical_parameters(model):
        tensors.update(logical.whole(logical.parameter.detach()))
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions and attention


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_rotate_equals_llama(theta: float) -> None:
    query, key = draw(2, 3, 50, 8, seed=1), draw(2, 1, 50, 8, seed=2)
    with peers_in_float64():
        config = LlamaConfig(head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": theta})
        cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(query, torch.arange(50)[None])
        expected = modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)
    close((turned(query, theta), turned(key, theta)), expected)


def test_rotate_by_hand() -> None:
    """Two pairs, (x_0, x_2) and (x_1, x_3), at position 1 turned by 1 and by 1 / sqrt(100) = 0.1."""
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]] * 2, dtype=torch.float64)[None, None]
    rotated = turned(x, 100.0)[0, 0]
    assert rotated[0].tolist() == [1.0, 0.0, 0.0, 2.0]
    expected = [math.cos(1), -2 * math.sin(0.1), math.sin(1), 2 * math.cos(0.1)]
    assert rotated[1].tolist() == pytest.approx(expected, rel=1e-14)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    query, key = (turned(draw(1, 1, 1, 8, seed=s).expand(1, 1, 20, 8), 10000.0)[0, 0] for s in (1, 2))
    products = query @ key.T
    for distance in range(-10, 10):
        diagonal = products.diagonal(distance)
        close(diagonal, diagonal[:1].expand_as(diagonal))


def test_rotation_of_bfloat16_at_far_positions() -> None:
    """Positions beyond 256 have no exact bfloat16: angles are taken in float32."""
    x = torch.ones(1, 1, 1025, 2)
    assert float((turned(x.bfloat16(), 10000.0).float() - turned(x, 10000.0)).abs().max()) < 0.02


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_equals_llama(kv_heads: int, bias: bool) -> None:
    """Outputs and all gradients; 4 heads of size 6 in a model of width 12."""
    with peers_in_float64():
        config = LlamaConfig(
            hidden_size=12,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=6,
            attention_bias=bias,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="eager",
        )
        theirs = modeling_llama.LlamaAttention(config, layer_idx=0).double()
        rotary = modeling_llama.LlamaRotaryEmbedding(config)
    own_config = HeadsConfig(num_heads=4, num_kv_heads=kv_heads, head_size=6, bias=bias)
    ours = Attention(own_config, d_model=12, rope=RopeConfig(theta=500.0)).double()
    pairs = [
        (ours.query, theirs.q_proj),
        (ours.key, theirs.k_proj),
        (ours.value, theirs.v_proj),
        (ours.out, theirs.o_proj),
    ]
    for own, their in pairs:
        own.load_state_dict(their.state_dict())

    x, their_x = draw(2, 7, 12).requires_grad_(), draw(2, 7, 12).requires_grad_()
    mask = torch.full((7, 7), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    with peers_in_float64():
        expected, _ = theirs(their_x, rotary(their_x, torch.arange(7)[None]), mask)
    actual = ours(x, plain(7))
    close(actual, expected)
    upstream = draw(2, 7, 12, seed=3)
    actual.backward(upstream)
    expected.backward(upstream)
    close(x.grad, their_x.grad)
    for own, their in pairs:
        for parameter, other in zip(own.parameters(), their.parameters(), strict=True):
            close(parameter.grad, other.grad)


def test_grouped_heads_equal_repeated_heads() -> None:
    """Key/value head g serves query heads 2g and 2g + 1."""
    grouped = Attention(HeadsConfig(num_heads=4, num_kv_heads=2, head_size=6), 8, RopeConfig(theta=100.0)).double()
    full = Attention(HeadsConfig(num_heads=4, head_size=6), 8, RopeConfig(theta=100.0)).double()
    full.query, full.out = grouped.query, grouped.out
    for name in ("key", "value"):
        heads = getattr(grouped, name).weight.data.view(2, 6, 8)
        getattr(full, name).weight.data = heads.repeat_interleave(2, dim=0).view(24, 8)
    x = draw(2, 5, 8)
    close(grouped(x, plain(5)), full(x, plain(5)))


def test_attention_without_positions_sees_a_set() -> None:
    """Learned positions: the last token's output does not change with the order of the others."""
    attention = Attention(HeadsConfig(num_heads=2, head_size=4), 8, None).double()
    x = draw(1, 5, 8)
    close(attention(x, plain(5))[:, -1], attention(x[:, [2, 0, 3, 1, 4]], plain(5))[:, -1])
    rotary = Attention(HeadsConfig(num_heads=2, head_size=4), 8, RopeConfig(theta=100.0)).double()
    assert not torch.allclose(rotary(x, plain(5))[:, -1], rotary(x[:, [2, 0, 3, 1, 4]], plain(5))[:, -1])


# ---------------------------------------------------------------------------------------------------------------------
# Norms


def test_rms_norm_by_formula_and_as_llama() -> None:
    norm, x = RMSNorm(8, eps=1e-3).double(), draw(2, 3, 8) * 4
    norm.weight.data = draw(8, seed=1)
    close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight)
    with peers_in_float64():
        llama = modeling_llama.LlamaRMSNorm(8, eps=1e-3).double()
        llama.load_state_dict(norm.state_dict())
        close(norm(x), llama(x))


def test_layer_norm_by_formula() -> None:
    norm, x = LayerNorm(8, eps=1e-3).double(), draw(2, 3, 8) * 4 + 5
    norm.weight.data, norm.bias.data = draw(8, seed=1), draw(8, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    close(norm(x), centred / (variance + 1e-3).sqrt() * norm.weight + norm.bias)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms_of_bfloat16_are_taken_in_float32(kind: type[RMSNorm]) -> None:
    norm, x = kind(64, eps=1e-5), (draw(10, 64) * 30).bfloat16()
    norm.weight.data = draw(64, seed=1).float()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), norm(x.float()).bfloat16())  # rounded once, at the end


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and the whole


def feed_forward(block: Any, x: Tensor, layer: int) -> Tensor:
    output: Tensor = block.ffn(x) if block.moe is None else block.moe(x, StepContext(layer=layer)).y
    return output


def hand_written(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """The formulas of the norm placements over the model's own parts."""
    config, attention_context = model.config, plain(tokens_BS.shape[1])
    x, factor = config.embedding_multiplier * model.embedding.weight[tokens_BS], config.residual_multiplier
    if model.position is not None:
        x = x + model.position.weight[: tokens_BS.shape[1]]
    for layer, block in enumerate(model.blocks):
        if config.norm_placement == "post":
            x = block.attention_norm(x + factor * block.attention(x, attention_context))
            x = block.ffn_norm(x + factor * feed_forward(block, x, layer))
            continue
        inputs, outputs = config.norm_placement != "branch", config.norm_placement in ("branch", "sandwich")
        y = block.attention(block.attention_norm(x) if inputs else x, attention_context)
        x = x + factor * (block.attention_output_norm(y) if outputs else y)
        y = feed_forward(block, block.ffn_norm(x) if inputs else x, layer)
        normed = outputs or (config.moe_output_norm and layer == 1)
        x = x + factor * (block.ffn_output_norm(y) if normed else y)
    if model.final_norm is not None:
        x = model.final_norm(x)
    table = model.embedding.weight if model.unembedding is None else model.unembedding.weight
    logits = x @ table.T
    logits = logits if model.unembedding_bias is None else logits + model.unembedding_bias
    return logits / config.logits_divisor


@pytest.mark.parametrize("placement", ["pre", "post", "branch", "sandwich"])
@pytest.mark.parametrize("position", [{"kind": "rope"}, {"kind": "learned", "max_length": 9}])
@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_its_formula(placement: str, position: dict[str, Any], tied: bool) -> None:
    """Three blocks, the second a MoE; in post-norm the last norm of the last block stands before the logits."""
    model = make_model(
        norm_placement=placement,
        moe_output_norm=tied and placement == "pre",
        embedding_multiplier=1.5,
        residual_multiplier=0.7,
        logits_divisor=3.0,
        norm={"kind": "layer_norm"},
        position=position,
        tied_embeddings=tied,
        unembedding_bias=tied,
        num_layers=3,
        moe_blocks={"kind": "every_nth", "n": 2},
        ffn={"hidden": 10, "activation": "relu", "bias": True},
    )
    for parameter in model.parameters():  # norms that do something
        parameter.data += draw(*parameter.shape, seed=5) * 0.1
    tokens_BS = draw_tokens()
    output = model(tokens_BS, StepContext())
    close(output.logits, hand_written(model, tokens_BS))
    assert list(output.stats) == list(output.losses) == [1]
    assert (model.final_norm is None) is (placement == "post")


def test_positions_matter() -> None:
    same = torch.full((1, LENGTH), 3)
    for position in ({"kind": "rope"}, {"kind": "learned", "max_length": LENGTH}):
        tokens_BS = torch.cat([draw_tokens(1, 3), draw_tokens(1, 3)], dim=1)
        logits = make_model(position=position)(tokens_BS, StepContext()).logits
        assert not torch.allclose(logits[0, 2], logits[0, 5]), position
    logits = make_model(position={"kind": "learned", "max_length": LENGTH})(same, StepContext()).logits
    assert not torch.allclose(logits[0, 0], logits[0, 1])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_parameter(tied: bool) -> None:
    model = make_model(tied_embeddings=tied)
    names = {name for name, _ in model.named_parameters()}
    assert ("unembedding.weight" in names) is not tied
    model(torch.tensor([[1, 2]]), StepContext()).logits.sum().backward()
    assert model.embedding.weight.grad is not None
    unread = model.embedding.weight.grad[5].abs().sum()  # token 5 is not read; as an output it has a gradient if tied
    assert bool(unread > 0) is tied


@pytest.mark.parametrize(
    ("blocks", "layers"),
    [
        ({"kind": "all"}, [0, 1, 2, 3, 4, 5]),
        ({"kind": "every_nth", "n": 2}, [1, 3, 5]),
        ({"kind": "every_nth", "n": 4}, [3]),
        ({"kind": "all_but_first", "k": 0}, [0, 1, 2, 3, 4, 5]),
        ({"kind": "all_but_first", "k": 4}, [4, 5]),
        ({"kind": "list", "indices": [4, 0]}, [0, 4]),
    ],
)
def test_moe_blocks(blocks: dict[str, Any], layers: list[int]) -> None:
    ffn = {"hidden": 10} if len(layers) < 6 else None
    model = make_model(num_layers=6, moe_blocks=blocks, ffn=ffn)
    assert model.config.moe_layers == layers
    assert [layer for layer, block in enumerate(model.blocks) if block.moe is not None] == layers
    assert [layer for layer, block in enumerate(model.blocks) if block.ffn is not None] == [
        layer for layer in range(6) if layer not in layers
    ]
    assert list(model(draw_tokens(), StepContext()).stats) == layers


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"moe_blocks": {"kind": "list", "indices": [2]}}, "block 2"),
        ({"moe_blocks": {"kind": "list", "indices": [-1]}}, "block -1"),
        ({"moe_blocks": {"kind": "list", "indices": [1, 0, 1]}}, "names a block twice"),
        ({"moe_blocks": {"kind": "all_but_first", "k": 2}, "ffn": {"hidden": 4}}, "none of the 2 blocks"),
        ({"moe_blocks": {"kind": "every_nth", "n": 2}}, "ffn is missing: 1 of the 2"),
        ({"ffn": {"hidden": 4}}, "all 2 blocks are MoE"),
        ({"moe": None}, "ffn is missing"),
        ({"moe": {**MOE, "d_model": 9}}, r"moe.d_model \(9\) differs from d_model \(8\)"),
        ({"attention": {"num_heads": 2, "head_size": 5}}, r"head_size \(5\) must be even"),
        ({"attention": {"num_heads": 3, "num_kv_heads": 2, "head_size": 4}}, r"num_heads \(3\)"),
        ({"moe": {**MOE, "router": {"k": 5}}}, r"moe\.router\.k \(5\) is larger than moe\.num_experts \(4\)"),
        ({"dropout": 1.0}, "dropout"),
        ({"layers": 2}, "layers"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**wrong)


def test_a_layer_used_alone_needs_its_width() -> None:
    config = make_config().moe
    assert config is not None
    with pytest.raises(ValueError, match="d_model is not set"):
        MoELayer(config)


@pytest.mark.parametrize(("dtype", "kept_in"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_compute_dtype_and_the_dtype_of_weights(dtype: torch.dtype, kept_in: torch.dtype) -> None:
    model = make_model(dtype=dtype, moe={**MOE, "losses": [{"kind": "balance"}]})
    output = model(draw_tokens(), StepContext())
    output.logits.float().sum().backward()
    assert output.logits.dtype == dtype
    assert output.losses[0]["balance_global"].dtype == kept_in
    for name, parameter in model.named_parameters():
        assert parameter.dtype == kept_in, name
        assert parameter.grad is not None, name


# ---------------------------------------------------------------------------------------------------------------------
# Who may influence whom


@pytest.mark.parametrize("moe", [MOE, None])
@pytest.mark.parametrize("position", [{"kind": "rope"}, {"kind": "learned", "max_length": LENGTH}])
def test_a_later_token_never_changes_earlier_logits(moe: dict[str, Any] | None, position: dict[str, Any]) -> None:
    model = make_model(moe=moe, position=position, ffn=None if moe else {"hidden": 10})
    tokens_BS = draw_tokens()
    before = model(tokens_BS, StepContext()).logits
    for place in range(LENGTH):
        changed = tokens_BS.clone()
        changed[1, place] = (changed[1, place] + 1) % VOCABULARY
        after = model(changed, StepContext()).logits
        close(after[1, :place], before[1, :place])
        close(after[[0, 2]], before[[0, 2]])  # nor any other sequence's
        assert bool((after[1, place:] != before[1, place:]).any(-1).all())  # and it does change the later ones


# ---------------------------------------------------------------------------------------------------------------------
# Recomputation and dropout

RANDOM = {
    "dropout": 0.2,
    "moe": {
        **MOE,
        "router": {"k": 2, "jitter": 0.1},
        "capacity": {"kind": "factor", "train": 0.8, "minimum": 0, "priority": "probability"},
        "losses": [{"kind": "balance", "coefficient": 0.1}, {"kind": "z_loss", "coefficient": 0.1}],
        "experts": {"hidden": 12, "backend": "loop", "hidden_dropout": 0.2, "output_dropout": 0.1},
        "shared_experts": {"hidden": 4},
    },
    "moe_blocks": {"kind": "list", "indices": [0, 2]},
    "ffn": {"hidden": 10},
    "num_layers": 3,
}
CONTEXT = StepContext(seed=1, step=2, micro_step=3, coordinate=4)


def train_step(model: Transformer, context: StepContext) -> tuple[ModelOutput, Tensor]:
    output = model(draw_tokens(), context)
    losses = [loss for layer in output.losses.values() for loss in layer.values()]
    objective = output.logits.square().mean() + torch.stack(losses).sum()
    objective.backward()
    return output, objective.detach()


@pytest.mark.parametrize("recompute", ["moe", "block"])
def test_recomputation_changes_no_bit(recompute: Recompute) -> None:
    """With dropout, jitter and drops: loss, gradients, and counters, which do not double (trap 10)."""
    plain, again = make_model(**RANDOM), make_model(recompute, **RANDOM)
    calls = []
    assert again.blocks[2].moe is not None
    again.blocks[2].moe.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, expected_objective = train_step(plain, CONTEXT)
    actual, objective = train_step(again, CONTEXT)

    assert len(calls) == 2  # forward, and once more in backward
    assert torch.equal(objective, expected_objective)
    assert torch.equal(actual.logits, expected.logits)
    for (name, parameter), other in zip(again.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert torch.equal(parameter.grad, other.grad), name
    for layer, stats in expected.stats.items():
        assert int(stats.dropped_capacity_E.sum()) > 0
        assert int(stats.routed_E.sum()) == 2 * 3 * LENGTH
        for field in ("routed_E", "kept_E", "dropped_capacity_E"):
            assert torch.equal(getattr(actual.stats[layer], field), getattr(stats, field))
        for name, loss in stats.losses.items():
            assert torch.equal(actual.stats[layer].losses[name], loss)


@pytest.mark.parametrize("recompute", ["moe", "block"])
def test_nothing_is_recomputed_without_gradients(recompute: Recompute) -> None:
    model = make_model(recompute).eval()
    with torch.no_grad():
        assert torch.equal(model(draw_tokens(), CONTEXT).logits, make_model().eval()(draw_tokens(), CONTEXT).logits)


def test_dropout_is_a_function_of_the_context() -> None:
    model = make_model(dropout=0.2)

    def logits(context: StepContext) -> Tensor:
        output: ModelOutput = model(draw_tokens(), context)
        return output.logits

    expected = logits(CONTEXT)
    assert torch.equal(logits(CONTEXT), expected)
    for name in ("seed", "step", "micro_step", "coordinate"):
        assert not torch.equal(logits(replace(CONTEXT, **{name: 9})), expected), name
    model.eval()
    assert torch.equal(logits(CONTEXT), make_model().eval()(draw_tokens(), StepContext()).logits)


def test_every_dropout_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding, two branches of each of two blocks, and two places in each block's experts."""
    seeds = []

    def record(x: Tensor, probability: float, seed: int) -> Tensor:
        seeds.append(seed)
        return x

    for module in (transformer, experts):
        monkeypatch.setattr(module, "dropout", record)
    with_dropout = {**MOE["experts"], "hidden_dropout": 0.5, "output_dropout": 0.5}
    model = make_model(dropout=0.5, moe={**MOE, "experts": with_dropout})
    for changed in ({}, {"seed": 9}, {"step": 9}, {"micro_step": 9}, {"coordinate": 9}):
        model(draw_tokens(), replace(CONTEXT, **changed))
    assert len(seeds) == 5 * (1 + 2 * 2 + 2 * 2)
    assert len(set(seeds)) == len(seeds)


def test_jitter_reaches_each_layer_under_its_own_number() -> None:
    """Two MoE layers with one router weight and one input: their jitter differs."""
    model = make_model(moe={**MOE, "router": {"k": 2, "jitter": 0.1}})
    first, second = model.blocks[0].moe, model.blocks[1].moe
    assert first is not None
    assert second is not None
    second.load_state_dict(first.state_dict())
    x = draw(2, 5, D_MODEL)
    assert not torch.equal(first(x, replace(CONTEXT, layer=0)).y, second(x, replace(CONTEXT, layer=1)).y)
    assert torch.equal(first(x, replace(CONTEXT, layer=1)).y, second(x, replace(CONTEXT, layer=1)).y)


# ---------------------------------------------------------------------------------------------------------------------
# Initial weights


def test_initial_weights_do_not_depend_on_the_dtype() -> None:
    narrow, plain, wide = (logical_tensors(make_model(dtype=d)) for d in (torch.bfloat16, torch.float32, torch.float64))
    for name, tensor in plain.items():
        assert torch.equal(narrow[name], tensor), name
        assert torch.equal(wide[name], tensor.double()), name


def test_initial_weights_do_not_depend_on_which_experts_are_local() -> None:
    """The model of one rank, and of three ranks among which its experts are placed unevenly."""
    whole = logical_tensors(make_model(dtype=torch.float32))
    found = {}
    for rank in range(3):
        model = make_model(dtype=torch.float32)
        for block in model.blocks:
            assert block.moe is not None
            local = ExpertPlacement((2, 0, 1, 0), num_ranks=3).experts_on(rank)
            block.moe.experts = GroupedExperts(block.moe.config.experts, D_MODEL, local)
        init_weights(model, seed=1)
        for name, tensor in logical_tensors(model).items():
            assert torch.equal(tensor, whole[name]), name
            found[name] = tensor
    assert found.keys() == whole.keys()


def test_initial_weights_by_name() -> None:
    """init_std, and init_std / sqrt(2 * num_layers) for what writes to the residual stream; norms 1, biases 0."""
    model = make_model(
        dtype=torch.float32,
        d_model=64,
        vocab_size=300,
        attention={"num_heads": 8, "head_size": 16, "bias": True},
        moe={**MOE, "experts": {"hidden": 100, "bias": True}, "shared_experts": {"hidden": 50}},
        norm={"kind": "layer_norm"},
        init_std=0.02,
    )
    for name, tensor in logical_tensors(model).items():
        if tensor.dim() == 1:
            assert bool((tensor == (1.0 if name.endswith("norm.weight") else 0.0)).all()), name
            continue
        writes = "attention.out" in name or "w_out" in name
        std = 0.02 / math.sqrt(2 * 2) if writes else 0.02
        assert float(tensor.std()) == pytest.approx(std, rel=0.15), name
        assert abs(float(tensor.mean())) < 5 * std / math.sqrt(tensor.numel()), name


def test_initial_weights_depend_on_the_seed_and_the_name() -> None:
    first, again, other = (logical_tensors(build_model(make_config(), seed=seed)) for seed in (1, 1, 2))
    assert first["blocks.0.moe.experts.0.w_in"].shape == (D_MODEL, 24)
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor), name
        assert tensor.dim() == 1 or not torch.equal(other[name], tensor), name
    matrices = [tensor.flatten()[:8].tolist() for tensor in first.values() if tensor.dim() > 1]
    assert len({tuple(numbers) for numbers in matrices}) == len(matrices)
