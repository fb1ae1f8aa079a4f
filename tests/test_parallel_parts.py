"""The parts of tensor, context and pipeline parallelism, each against one rank: values and gradients in float64. Whole
models on whole layouts are in test_training.py."""

import math
from datetime import timedelta
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from expert_parallel.model.attention import Attention, HeadsConfig, causal_attention
from expert_parallel.model.attention_mask import AttentionContext
from expert_parallel.model.context_parallel import ContextParallelAttention
from expert_parallel.model.parallelize import split_into_stages
from expert_parallel.model.pipeline import Pipeline, PipelineStep, Stage, balance_size, build_pipeline
from expert_parallel.model.rotary import RopeConfig
from expert_parallel.model.tensor_parallel import (
    GatherTokens,
    ReduceScatterTokens,
    VocabularyParallelEmbedding,
    apply_tp_to_attention,
    apply_tp_to_ffn,
    cross_entropy_sum,
    gather_logits,
    vocab_start_index,
)
from expert_parallel.model.transformer import ModelConfig
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.dispatch.ledger import LedgerBreach
from expert_parallel.moe.parameters import init_parameters, logical_parameters
from expert_parallel.nn.ffn import FFN, FFNConfig
from expert_parallel.parallel.degrees import InterleavedConfig, ParallelDegrees
from expert_parallel.parallel.mesh import ParallelMesh, build_mesh
from expert_parallel.parallel.sequence import SequenceShard, sequence_length_multiple
from expert_parallel.parallel.sharding import TensorShard, shard_parameter
from tests.layouts import build_on
from tests.ranks import run_ranks


@cache
def mesh_of(world: int, **degrees: int) -> ParallelMesh:
    copies = max(1, degrees.get("tp", 1) // 2)
    return build_mesh(ParallelDegrees(world, **degrees), "cpu", timedelta(seconds=120), kv_copies=copies)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------- places in a sequence


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_ranks_have_each_position_once(cp: int, tp: int, units: int) -> None:
    length = units * sequence_length_multiple(cp, tp)
    places = [[SequenceShard(cp, c, tp, t) for t in range(tp)] for c in range(cp)]
    for row in places:
        assert torch.equal(torch.cat([place.own(length) for place in row]), row[0].context(length))
        assert len({len(place.own(length)) for place in row}) == 1
    every = torch.cat([row[0].context(length) for row in places])
    assert torch.equal(places[0][0].all_contexts(length), every)
    assert sorted(every.tolist()) == list(range(length))


@given(st.integers(1, 6), st.integers(1, 4))
def test_context_ranks_see_equally_many_keys(cp: int, units: int) -> None:
    """Position p attends to p + 1 keys: the same sum on every rank."""
    length = units * 2 * cp
    work = {int((SequenceShard(cp, rank).context(length) + 1).sum()) for rank in range(cp)}
    assert len(work) == 1


def test_zigzag_by_hand() -> None:
    assert SequenceShard(2, 0, 2, 1).context(8).tolist() == [0, 1, 6, 7]
    assert SequenceShard(2, 0, 2, 1).own(8).tolist() == [6, 7]
    assert SequenceShard(2, 1).context(8).tolist() == [2, 3, 4, 5]
    assert (
        sequence_length_multiple(1, 3),
        sequence_length_multiple(2, 1),
        sequence_length_multiple(2, 4),
        sequence_length_multiple(3, 4),
    ) == (3, 4, 8, 12)


# ------------------------------------------------------------------------------------------------------------- slices


def slices(rank: int) -> None:
    """The whole comes back from the parts, for every dimension, with blocks, copies and uneven parts."""
    for dim, size, blocks, copies in ((-1, 8, 1, 1), (-2, 8, 2, 1), (-1, 4, 1, 2), (-2, 7, 1, 1), (-3, 6, 2, 1)):
        shape = [5, 3, 4]
        shape[dim] = size
        full = random(*shape)
        part = TensorShard(dim, size, dist.group.WORLD, blocks, copies)
        local = part.narrow_to_shard(full)
        assert part.full_shape(local.shape) == full.shape
        assert torch.equal(part.gather_full(local), full)


def test_slices_of_real_ranks() -> None:
    run_ranks(4, slices)


def gated_columns(rank: int) -> Tensor:
    return TensorShard(-1, 8, dist.group.WORLD, blocks=2).narrow_to_shard(torch.arange(8.0)[None])


def test_gated_columns_are_divided_each_for_itself() -> None:
    """[gate | up] of 4 each: rank 1 has gates 2, 3 and ups 2, 3, not the second half of the row."""
    assert [part.tolist() for part in run_ranks(2, gated_columns)] == [[[0, 1, 4, 5]], [[2, 3, 6, 7]]]


# --------------------------------------------------------------------------------------------- gather, reduce-scatter


def transposes(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    group = dist.group.WORLD
    x = random(2, 3, 4, seed=rank).requires_grad_()
    gathered = GatherTokens.apply(x, group)
    (gathered * random(2, 3 * dist.get_world_size(), 4, seed=10 + rank)).sum().backward()
    y = random(2, 3 * dist.get_world_size(), 4, seed=20 + rank).requires_grad_()
    own = ReduceScatterTokens.apply(y, group)
    (own * random(2, 3, 4, seed=30 + rank)).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    return gathered.detach(), x.grad, own.detach(), y.grad


@pytest.mark.parametrize("world", [2, 4])
def test_gather_and_reduce_scatter_are_transposes(world: int) -> None:
    results = run_ranks(world, transposes)
    inputs = torch.cat([random(2, 3, 4, seed=rank) for rank in range(world)], 1)
    upstream = sum(random(2, 3 * world, 4, seed=10 + rank) for rank in range(world))
    total = sum(random(2, 3 * world, 4, seed=20 + rank) for rank in range(world))
    for rank, (gathered, x_grad, own, y_grad) in enumerate(results):
        close(gathered, inputs)
        close(x_grad, upstream[:, 3 * rank : 3 * rank + 3])
        close(own, total[:, 3 * rank : 3 * rank + 3])
        close(y_grad, torch.cat([random(2, 3, 4, seed=30 + r) for r in range(world)], 1))


# ------------------------------------------------------------------------------------------------------ divided layers

D, LENGTH = 8, 8
ATTENTION = HeadsConfig(num_heads=4, num_kv_heads=2, head_size=6, bias=True)


def make_attention(group: Any, copies: int) -> Attention:
    with torch.device("meta"):
        attention = Attention(ATTENTION, D, RopeConfig(theta=100.0))
        if group is not None:
            apply_tp_to_attention(attention, group, copies)
    return fill(attention)


def make_ffn(group: Any, activation: str) -> FFN:
    with torch.device("meta"):
        ffn = FFN(FFNConfig(hidden=12, activation=activation, bias=True), D)  # type: ignore[arg-type]
        if group is not None:
            apply_tp_to_ffn(ffn, group)
    return fill(ffn)


def fill(module: Any) -> Any:
    """Weights, biases too, that depend on logical names alone."""
    module = module.double().to_empty(device="cpu")
    init_parameters(module, 1, lambda name: 0.4)
    for logical in logical_parameters(module):
        if len(logical.shape) == 1:
            logical.fill(logical.parameter, [random(*logical.shape, seed=len(logical.names[0]))])
    return module


def sight_for(kind: str) -> list[AttentionContext]:
    """What the module is called with beside x."""
    return [AttentionContext.of(SequenceShard(), LENGTH, torch.device("cpu"))] if kind == "attention" else []


def divided(rank: int, kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output and input gradient of this rank's tokens, and each whole gradient, summed as training sums them."""
    mesh = mesh_of(dist.get_world_size(), tp=dist.get_world_size())
    assert mesh.tp_group is not None
    copies = max(1, mesh.degrees.tp // ATTENTION.kv_heads)
    module = make_attention(mesh.tp_group, copies) if kind == "attention" else make_ffn(mesh.tp_group, kind)
    x = random(2, LENGTH, D).chunk(mesh.degrees.tp, 1)[rank].clone().requires_grad_()
    y = module(x, *sight_for(kind))
    (y * random(2, LENGTH, D, seed=1).chunk(mesh.degrees.tp, 1)[rank]).sum().backward()
    grads = {}
    for logical in logical_parameters(module):
        grad = logical.parameter.grad
        assert grad is not None
        if logical.tensor_shard is None:
            dist.all_reduce(grad, group=mesh.tp_group)
        elif logical.tensor_shard.copies > 1:
            dist.all_reduce(grad, group=mesh.kv_replica_group)
        grads |= logical.whole(grad)
    assert x.grad is not None
    return y.detach(), x.grad, grads


@pytest.mark.parametrize("kind", ["attention", "swiglu", "relu"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_divided_layer_computes_the_whole(kind: str, world: int) -> None:
    """4 query heads and 2 key heads: on 4 ranks two share each key head. Biases are added once (trap 4)."""
    whole = make_attention(None, 1) if kind == "attention" else make_ffn(None, kind)
    x = random(2, LENGTH, D).requires_grad_()
    y = whole(x, *sight_for(kind))
    (y * random(2, LENGTH, D, seed=1)).sum().backward()
    assert x.grad is not None
    results = run_ranks(world, divided, kind)
    close(torch.cat([result[0] for result in results], 1), y.detach())
    close(torch.cat([result[1] for result in results], 1), x.grad)
    for result in results:
        assert result[2].keys() == dict(whole.named_parameters()).keys()
        for name, parameter in whole.named_parameters():
            assert parameter.grad is not None
            close(result[2][name], parameter.grad)


def vocabulary(rank: int, vocab_size: int) -> dict[str, Tensor]:
    group = dist.group.WORLD
    num_ranks = dist.get_world_size()
    with torch.device("meta"):
        table = VocabularyParallelEmbedding(nn.Embedding(vocab_size, D), group, torch.float64)
    fill(table)
    tokens = torch.randint(0, vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    x = table(tokens)
    logits = F.linear(GatherTokens.apply(x * x, group), table.weight)
    loss = cross_entropy_sum(logits, tokens.roll(1), group, vocab_size)
    loss.backward()
    whole = next(iter(logical_parameters(table)))
    assert whole.parameter.grad is not None
    assert len(whole.parameter) < vocab_size
    assert vocab_start_index(vocab_size, group) == sum(
        len(p) for p in torch.arange(vocab_size).tensor_split(num_ranks)[:rank]
    )
    return {
        "x": x.detach(),
        "logits": gather_logits(logits, group, vocab_size),
        "loss": loss.detach(),
        **whole.whole(whole.parameter.grad),
    }


@pytest.mark.parametrize(("world", "vocab_size"), [(2, 12), (4, 10), (4, 4)])
def test_a_divided_vocabulary_computes_the_whole(world: int, vocab_size: int) -> None:
    """Embedding, tied logits and cross entropy; 10 words on 4 ranks are 3, 3, 2 and 2."""
    with torch.device("meta"):
        table = nn.Embedding(vocab_size, D)
    fill(table)
    tokens = torch.randint(0, vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    x = table(tokens)
    logits = F.linear(x * x, table.weight)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.roll(1).flatten(), reduction="sum")
    loss.backward()
    results = run_ranks(world, vocabulary, vocab_size)
    close(torch.cat([result["x"] for result in results], 1), x.detach())
    for result in results:
        close(result["logits"], logits.detach())
        close(result["loss"], loss.detach())
        assert table.weight.grad is not None
        close(result["weight"], table.weight.grad)


def large_logits(rank: int) -> float:
    logits = torch.tensor([[[[1e4, -1e4]]], [[[9e3, 2e4]]]][rank], dtype=torch.float64)
    return float(cross_entropy_sum(logits, torch.tensor([[0]]), dist.group.WORLD, 4))


def test_cross_entropy_of_large_logits() -> None:
    assert run_ranks(2, large_logits) == [1e4, 1e4]


# ------------------------------------------------------------------------------------------ context parallel attention


def context(rank: int) -> tuple[Tensor, list[Tensor]]:
    mesh = mesh_of(dist.get_world_size(), cp=dist.get_world_size())
    assert mesh.cp_group is not None
    place = SequenceShard.of(mesh)
    mine = place.context(16)
    leaves = [random(2, heads, 16, 6, seed=heads + i)[:, :, mine].requires_grad_() for i, heads in enumerate((4, 2, 2))]
    y = ContextParallelAttention(place, mesh.cp_group)(*leaves)
    (y * random(2, 4, 16, 6, seed=9)[:, :, mine]).sum().backward()
    return y.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("world", [2, 4])
def test_context_parallel_attention_is_exact(world: int) -> None:
    leaves = [random(2, heads, 16, 6, seed=heads + i).requires_grad_() for i, heads in enumerate((4, 2, 2))]
    y = causal_attention(*leaves)
    (y * random(2, 4, 16, 6, seed=9)).sum().backward()
    for rank, (own, grads) in enumerate(run_ranks(world, context)):
        mine = SequenceShard(world, rank).context(16)
        close(own, y.detach()[:, :, mine])
        for actual, leaf in zip(grads, leaves, strict=True):
            assert leaf.grad is not None
            close(actual, leaf.grad[:, :, mine])


# ------------------------------------------------------------------------------------------------------------ pipeline


def model_config(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 12,
        "num_layers": 5,
        "d_model": D,
        "attention": {"num_heads": 2, "head_size": 4},
        "ffn": {"hidden": 8},
        "moe_blocks": {"kind": "list", "indices": [1, 4]},
        "moe": {"num_experts": 4, "experts": {"hidden": 8}, **changes},
        "init_std": 0.3,
    }


def test_blocks_are_dealt_out_in_order() -> None:
    config = ModelConfig.model_validate(model_config())
    parts = split_into_stages(config, 3)
    assert [list(part.blocks) for part in parts] == [[0, 1], [2, 3], [4]]
    assert [(part.is_first, part.is_last) for part in parts] == [(True, False), (False, False), (False, True)]


def test_the_balance_vector_holds_f_and_p_of_pooled_losses() -> None:
    """1 for the sum of single losses; 2 * 4 for a pooled loss over all tokens, 3 * 2 * 4 for one of each sequence."""
    losses = [
        {"kind": "balance", "layers": "pooled"},
        {"kind": "z_loss"},
        {"kind": "balance", "layers": "pooled", "scope": "sequence"},
    ]
    config = ModelConfig.model_validate(model_config(losses=losses))
    assert balance_size(config, num_blocks=3) == 1 + 2 * 4 + 3 * 2 * 4


def names_on(rank: int) -> list[list[str]]:
    mesh = build_mesh(ParallelDegrees(2, pp=2), "cpu", timedelta(seconds=120), tied_embeddings=True)
    config = ModelConfig.model_validate(model_config())
    pipeline = build_pipeline(config, mesh, pipeline=InterleavedConfig(kind="interleaved"), seed=1)
    assert all(isinstance(stage, Stage) for stage in pipeline)
    assert [layer for layer, _ in pipeline.local_blocks()] == [[0, 1, 3], [2, 4]][rank]
    return [[name for p in logical_parameters(stage) for name in p.names] for stage in pipeline]


def test_stages_hold_their_own_blocks_alone() -> None:
    """5 blocks in 4 stages: 2, 1, 1, 1. The embedding stands on the first and, tied, on the last."""
    first, second = run_ranks(2, names_on)
    held = [first[0], second[0], first[1], second[1]]
    assert [sorted({name.split(".")[1] for name in stage if name.startswith("blocks")}) for stage in held] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4"],
    ]
    assert ["embedding.weight" in stage for stage in held] == [True, False, False, True]
    assert ["final_norm.weight" in stage for stage in held] == [False, False, False, True]


class FailingSchedule:
    """Raises as pipelining does: wrapped."""

    def step(self, **_: Any) -> None:
        raise RuntimeError("[Stage 0] failed to run forward") from LedgerBreach("a row was lost")


def breach(rank: int) -> None:
    _, pipeline = build_on({"world": 2, "pp": 2}, model_config(), seed=1)
    assert isinstance(pipeline, Pipeline)
    pipeline.schedules[2, 1, 4, balance_size(pipeline.config, num_blocks=1)] = FailingSchedule()
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(LedgerBreach, match="a row was lost"):
        pipeline.forward_backward(PipelineStep([tokens] * 2, [StepContext()] * 2))


def test_an_error_in_a_stage_keeps_its_type() -> None:
    run_ranks(2, breach)


def uneven(rank: int) -> list[str]:
    """The errors of whole models, and of attention alone on 3 of 6 positions."""
    sentences = []
    for degrees in ({"cp": 2}, {"tp": 2}, {"cp": 2, "pp": 2}):
        if dist.get_world_size() == math.prod(degrees.values()):
            _, model = build_on({"world": dist.get_world_size(), **degrees}, model_config(), seed=1)
            tokens = torch.zeros(2, 7, dtype=torch.int64)
            run: Any = partial(model, tokens, StepContext())
            if isinstance(model, Pipeline):
                run = partial(model.forward_backward, PipelineStep([tokens] * 2, [StepContext()] * 2))
            with pytest.raises(ValueError, match="sequence length") as error:
                run()
            sentences.append(str(error.value))
    if dist.get_world_size() == 2:
        mesh = mesh_of(2, cp=2)
        assert mesh.cp_group is not None
        with pytest.raises(ValueError, match="sequence length") as error:
            ContextParallelAttention(SequenceShard.of(mesh), mesh.cp_group)(*[random(1, 2, 3, 4)] * 3)
        sentences.append(str(error.value))
    return sentences


def test_a_length_that_ranks_cannot_divide_is_refused_on_all() -> None:
    text = "the sequence length ({}) is not a multiple of {}: sequences are divided evenly over parallel.cp ({}, two "
    text += "chunks a rank) and parallel.tp ({})"
    cases = [(7, 4, 2, 1), (7, 2, 1, 2), (6, 4, 2, 1)]
    assert run_ranks(2, uneven) == [[text.format(*case) for case in cases]] * 2
    assert run_ranks(4, uneven) == [[text.format(7, 4, 2, 1)]] * 4


def test_divide_wants_no_values() -> None:
    with pytest.raises(AssertionError):
        shard_parameter(nn.Linear(2, 2), "weight", -1, None)  # type: ignore[arg-type]
