"""Scope `global`: the same choices are kept, rerouted and dropped on 1, 2, 4 and 8 ranks, for every mix of ep and dp,
however the sequences lie on the ranks; scope `sequence`: however each sequence is divided over ranks. On real ranks in
float64, and as a property of the index maths with ties everywhere."""

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_parallel.moe.capacity import token_scope
from expert_parallel.moe.capacity.policies import FactorConfig, apply_capacity
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import RouterReplay, StepContext, TokenBatch
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.moe.types import Outcome, RoutingPlan
from tests.ranks import run_ranks

NUM_SEQUENCES, LENGTH, D_MODEL, NUM_EXPERTS = 11, 6, 8, 8  # 11: no number of ranks divides it
FACTOR = {"kind": "factor", "train": 0.9, "minimum": 0, "scope": "global"}
DECISIONS: dict[str, dict[str, Any]] = {
    "position": {"capacity": FACTOR},
    "probability": {"capacity": {**FACTOR, "priority": "probability"}},
    "batch_priority": {"capacity": {**FACTOR, "priority": "batch_priority"}},
    "random": {"capacity": {**FACTOR, "priority": "random"}},
    "token by token": {"capacity": {**FACTOR, "first_choices_first": False}},
    "reroute": {"capacity": {**FACTOR, "priority": "probability", "overflow": "reroute", "renormalise": True}},
    "padding": {"capacity": {**FACTOR, "pad": True}},
    "expert choice": {"router": {"kind": "expert_choice", "scope": "global"}},
    "sinkhorn": {"router": {"kind": "sinkhorn", "k": 2, "scope": "global"}},
    "noise": {"router": {"kind": "noisy_top_k", "k": 2}, "capacity": FACTOR},
}


def make_layer(decision: str, group: Any = None, data_group: Any = None, sequence_group: Any = None) -> MoELayer:
    tree = {"router": {"k": 2}, **DECISIONS[decision]}
    config = {"d_model": D_MODEL, "num_experts": NUM_EXPERTS, "experts": {"hidden": 4, "activation": "gelu"}, **tree}
    if tree["router"].get("kind") != "expert_choice":
        config["losses"] = [{"kind": "balance"}]
    layer = MoELayer(MoEConfig.model_validate(config), group, data_group, sequence_group=sequence_group).double()
    generator = torch.Generator().manual_seed(4)
    for logical in logical_parameters(layer):
        drawn = {}  # every expert's weights, in the order of their numbers, whatever this rank holds
        for expert in range(NUM_EXPERTS if logical.is_expert else 1):
            drawn[expert] = torch.randn(logical.shape, generator=generator, dtype=torch.float64)
        mine = layer.experts.expert_ids if logical.is_expert else (0,)
        logical.fill(logical.parameter, [drawn[expert] for expert in mine])
    return layer


def make_batch(decision: str) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    x_BSD = torch.randn(NUM_SEQUENCES, LENGTH, D_MODEL, generator=generator, dtype=torch.float64)
    x_BSD[:, :, 0] += 1.0  # experts are not equally liked
    mask_BS = torch.rand(NUM_SEQUENCES, LENGTH, generator=generator) < 0.8 if decision == "padding" else None
    return x_BSD, mask_BS


def sequences_of(rank: int, world_size: int, way: str) -> list[int]:
    """`strided`: rank r has r, r + W, ...; `reversed`: consecutive ones from the end; `lopsided`: rank 0 has all but
    one of each other rank's, and the last rank none."""
    everything = list(range(NUM_SEQUENCES))
    if way == "strided":
        return everything[rank::world_size]
    if way == "reversed":
        bounds = [NUM_SEQUENCES * r // world_size for r in range(world_size + 1)]
        return everything[::-1][bounds[rank] : bounds[rank + 1]]
    others = max(world_size - 2, 0)
    if rank == 0:
        return everything[: NUM_SEQUENCES - others]
    return [NUM_SEQUENCES - rank] if rank <= others else []


@cache
def ep_group(world_size: int, ep: int) -> Any:
    if ep == 1:
        return None
    group, _ = dist.new_subgroups_by_enumeration([list(range(i, i + ep)) for i in range(0, world_size, ep)])
    return group


def run_layer(rank: int, world_size: int, ep: int, way: str, decision: str) -> dict[int, list[Any]]:
    """By sequence: what became of each choice, and the output."""
    data_group = dist.group.WORLD if world_size > 1 else None
    layer = make_layer(decision, ep_group(world_size, ep), data_group)
    x_BSD, mask_BS = make_batch(decision)
    mine = sequences_of(rank, world_size, way)
    replay = RouterReplay()
    index_B = torch.tensor(mine, dtype=torch.int64)
    context = StepContext(
        seed=9, sequence_index_B=index_B, mask_BS=None if mask_BS is None else mask_BS[mine], replay=replay
    )
    output = layer(x_BSD[mine], context)
    choices = replay.recorded[0, 0, 0]
    shape = (len(mine), LENGTH, -1) if mine else (0, LENGTH, choices.ids_TK.shape[1])
    fate = zip(choices.ids_TK.view(shape).tolist(), choices.outcome_TK.view(shape).tolist(), strict=True)
    return {
        sequence: [ids, reasons, y.detach()] for sequence, (ids, reasons), y in zip(mine, fate, output.y, strict=True)
    }


def over_ranks(world_size: int, ep: int, way: str, decision: str) -> dict[int, list[Any]]:
    merged: dict[int, list[Any]] = {}
    for result in run_ranks(world_size, run_layer, world_size, ep, way, decision):
        assert not merged.keys() & result.keys()
        merged |= result
    assert sorted(merged) == list(range(NUM_SEQUENCES))
    return merged


LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2), (8, 4), (8, 8)]


@pytest.mark.parametrize("decision", DECISIONS)
def test_the_same_choices_fall_on_every_layout(decision: str) -> None:
    alone = over_ranks(1, 1, "strided", decision)
    fates = [reason for _, reasons, _ in alone.values() for row in reasons for reason in row]
    if "capacity" in DECISIONS[decision]:
        assert (
            0.05 <= sum(reason in (Outcome.REROUTED, Outcome.DROPPED_CAPACITY) for reason in fates) / len(fates) <= 0.3
        )
    for number, (world_size, ep) in enumerate(LAYOUTS):
        way = ("strided", "reversed", "lopsided")[number % 3]
        on_ranks = over_ranks(world_size, ep, way, decision)
        for sequence, (ids, reasons, y) in alone.items():
            where = f"{world_size} ranks, ep {ep}, {way}, sequence {sequence}"
            assert on_ranks[sequence][:2] == [ids, reasons], where
            torch.testing.assert_close(on_ranks[sequence][2], y, rtol=1e-10, atol=1e-12, msg=where)


def run_rank_scope(rank: int, world_size: int) -> list[Any]:
    """The same with a capacity of each rank's own."""
    layer = make_layer("position", dist.group.WORLD if world_size > 1 else None)
    capacity = layer.config.capacity.model_copy(update={"scope": "rank"})
    layer.config = layer.config.model_copy(update={"capacity": capacity})
    mine, replay = sequences_of(rank, world_size, "strided"), RouterReplay()
    layer(make_batch("position")[0][mine], StepContext(sequence_index_B=torch.tensor(mine), replay=replay))
    reasons = replay.recorded[0, 0, 0].outcome_TK.view(len(mine), LENGTH, -1).tolist()
    return list(zip(mine, reasons, strict=True))


def test_scope_rank_depends_on_the_layout() -> None:
    """Why `global` is there; and so the test above is one that can fail."""
    alone = run_ranks(1, run_rank_scope, 1)[0]
    spread = sorted(entry for result in run_ranks(4, run_rank_scope, 4) for entry in result)
    assert [sequence for sequence, _ in spread] == [sequence for sequence, _ in alone]
    assert spread != alone


def run_gather(rank: int, decision: str) -> int:
    layer = make_layer(decision, dist.group.WORLD)
    mine = sequences_of(rank, 4, "strided")  # 3, 3, 3 and 2 of the 11
    output = layer(make_batch(decision)[0][mine], StepContext(sequence_index_B=torch.tensor(mine)))
    return output.stats.gathered_bytes


@pytest.mark.parametrize(
    ("decision", "of_a_token"),
    [("position", 9 + 2 * 5), ("probability", 9 + 2 * (5 + 8)), ("reroute", 9 + 2 * (5 + 8) + 8 * NUM_EXPERTS)],
)
def test_what_scope_global_gathers_is_counted(decision: str, of_a_token: int) -> None:
    """Index and mask are 9 bytes a token, expert and reason 5 a choice, scores 8 in float64; to each of 3 others,
    padded to the 18 tokens of the fullest rank, and 8 bytes that say how many there are."""
    assert run_ranks(4, run_gather, decision) == [3 * (18 * of_a_token + 8)] * 4


def run_without_index(rank: int, lacking: list[int]) -> str:
    index_B = None if rank in lacking else torch.tensor([3, 4])
    x_BSD = torch.zeros(2, LENGTH, D_MODEL, dtype=torch.float64)
    try:
        make_layer("position", dist.group.WORLD)(x_BSD, StepContext(sequence_index_B=index_B))
    except ValueError as error:
        return str(error)
    return "nothing"


def run_with_one_index_twice(rank: int) -> str:
    layer = make_layer("position", dist.group.WORLD)
    try:
        layer(
            torch.zeros(2, LENGTH, D_MODEL, dtype=torch.float64), StepContext(sequence_index_B=torch.tensor([rank, 7]))
        )
    except ValueError as error:
        return str(error)
    return "nothing"


def test_global_order_is_the_callers() -> None:
    """Never that of the ranks: without it the layer refuses, and two sequences of one index are found."""
    for text in [*run_ranks(2, run_without_index, [0, 1]), *run_ranks(2, run_without_index, [1])]:
        assert "needs each sequence's index" in text
        assert "StepContext.sequence_index_B" in text
    twice = "StepContext.sequence_index_B: two sequences of this micro-step have the index 7"
    assert run_ranks(2, run_with_one_index_twice) == [twice, twice]


# --------------------------------------------------------------------------------------- sequences divided over ranks

POSITIONS = {
    "contiguous": lambda rank, sharers: torch.arange(LENGTH).tensor_split(sharers)[rank],
    "zigzag": lambda rank, sharers: torch.cat(
        [torch.arange(LENGTH).tensor_split(2 * sharers)[part] for part in (rank, 2 * sharers - 1 - rank)]
    ),
    "descending": lambda rank, sharers: torch.arange(LENGTH)[rank::sharers].flip(0),
}


@cache
def sequence_group(world_size: int, sharers: int) -> Any:
    if sharers == 1:
        return None
    group, _ = dist.new_subgroups_by_enumeration([list(range(i, i + sharers)) for i in range(0, world_size, sharers)])
    return group


def with_scope(decision: str, scope: str) -> dict[str, Any]:
    return {
        part: {**block, "scope": scope} if "scope" in block else block for part, block in DECISIONS[decision].items()
    }


def run_divided(
    rank: int, world_size: int, ep: int, sharers: int, way: str, decision: str, scope: str
) -> tuple[dict[tuple[int, int], list[Any]], int | None, int]:
    """(by sequence and position, what became of each choice, and the output; padded rows; bytes gathered)."""
    data_group = dist.group.WORLD if world_size > 1 else None
    with mock.patch.dict(DECISIONS, {decision: with_scope(decision, scope)}):
        layer = make_layer(decision, ep_group(world_size, ep), data_group, sequence_group(world_size, sharers))
    x_BSD, mask_BS = make_batch(decision)
    mine, here = (
        sequences_of(rank // sharers, world_size // sharers, "strided"),
        POSITIONS[way](rank % sharers, sharers),
    )
    replay = RouterReplay()
    context = StepContext(
        seed=9,
        sequence_index_B=torch.tensor(mine, dtype=torch.int64),
        positions_S=here,
        mask_BS=None if mask_BS is None else mask_BS[mine][:, here],
        replay=replay,
    )
    output = layer(x_BSD[mine][:, here], context)
    choices = replay.recorded[0, 0, 0]
    places = [(sequence, position) for sequence in mine for position in here.tolist()]
    fates = zip(choices.ids_TK.tolist(), choices.outcome_TK.tolist(), output.y.detach().flatten(0, 1), strict=True)
    found = {place: list(fate) for place, fate in zip(places, fates, strict=True)}
    return found, choices.rows_per_expert, output.stats.gathered_bytes


DIVIDED = [(1, 1, 1), (2, 1, 2), (2, 2, 2), (4, 2, 2), (4, 4, 2), (4, 2, 4), (8, 4, 4), (8, 8, 8)]


@pytest.mark.parametrize("scope", ["sequence", "global"])
@pytest.mark.parametrize("decision", DECISIONS)
def test_the_same_choices_fall_however_sequences_are_divided(decision: str, scope: str) -> None:
    """LENGTH is 6: among 4 and 8 ranks some have more tokens than others, or none."""
    alone, rows_per_expert, _ = run_ranks(1, run_divided, 1, 1, 1, "contiguous", decision, scope)[0]
    assert len(alone) == NUM_SEQUENCES * LENGTH
    for number, (world_size, ep, sharers) in enumerate(DIVIDED):
        way = ("descending", "zigzag", "contiguous")[number % 3]
        where = f"{world_size} ranks, ep {ep}, sequences over {sharers}, {way}"
        found: dict[tuple[int, int], list[Any]] = {}
        for places, rows, _ in run_ranks(world_size, run_divided, world_size, ep, sharers, way, decision, scope):
            assert not found.keys() & places.keys()
            found |= places
            assert rows == rows_per_expert or ep < world_size, where  # each sequence's capacity counts once
        assert found.keys() == alone.keys()
        for place, (ids, reasons, y) in alone.items():
            assert found[place][:2] == [ids, reasons], f"{where}, {place}"
            torch.testing.assert_close(found[place][2], y, rtol=1e-10, atol=1e-12, msg=f"{where}, {place}")


@pytest.mark.parametrize("sharers", [1, 2, 4])
def test_what_scope_sequence_gathers_is_counted(sharers: int) -> None:
    """Nothing where a rank has its sequences whole; else as scope `global`, to the ranks that share them. The most
    tokens that one of these has: 3 sequences of 3, or 11 of 2."""
    for rank, (_, _, gathered) in enumerate(
        run_ranks(4, run_divided, 4, 1, sharers, "contiguous", "position", "sequence")
    ):
        of_group = {1: 0, 2: 18 if rank < 2 else 15, 4: 22}[sharers]
        assert gathered == (sharers - 1) * (of_group * (9 + 2 * 5) + 8)


def run_wrongly_divided(rank: int, fault: str) -> str:
    positions_S = {"lacking": None, "twice": torch.arange(3) + 2 * rank}.get(fault, torch.arange(3) + 3 * rank)
    index_B = torch.tensor([3, 4 + rank * (fault == "others")])
    with mock.patch.dict(DECISIONS, {"position": with_scope("position", "sequence")}):
        layer = make_layer("position", None, dist.group.WORLD, dist.group.WORLD)
    try:
        layer(
            torch.zeros(2, 3, D_MODEL, dtype=torch.float64),
            StepContext(sequence_index_B=index_B, positions_S=positions_S),
        )
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", "nothing"),
        (
            "lacking",
            "StepContext.positions_S is not set: each sequence is divided over 2 ranks, so the positions of this "
            "rank's 3 tokens in it are needed",
        ),
        ("twice", "StepContext.positions_S: two tokens of sequence 3 have position 2"),
        (
            "others",
            "StepContext.sequence_index_B: ranks that share sequences must have the same ones, of equal length: this "
            "rank has 2, the ranks together 3, of 3 to 6 tokens",
        ),
    ],
)
def test_sequences_divided_wrongly_are_refused_on_every_rank(fault: str, said: str) -> None:
    assert run_ranks(2, run_wrongly_divided, fault) == [said, said]


# ------------------------------------------------------------------------------------------------- a property, with
# ties


def make_plan(ids_TK: Tensor, scores_TE: Tensor, routed_TK: Tensor) -> RoutingPlan:
    outcome_TK = torch.where(routed_TK, Outcome.KEPT, Outcome.NOT_ROUTED).to(torch.uint8)
    weights_TK = torch.ones(ids_TK.shape, dtype=torch.float64)
    return RoutingPlan(
        scores_TE, scores_TE, scores_TE, ids_TK, weights_TK, outcome_TK, scores_TE.shape[1], scores_TE, scores_TE
    )


def make_tokens(sequences: list[int], length: int) -> TokenBatch:
    index_B = torch.tensor(sequences, dtype=torch.int64)
    index_T = ((index_B[:, None] << 32) + torch.arange(length)).flatten()
    numbers_T = torch.arange(len(sequences)).repeat_interleave(length)
    return TokenBatch(index_T, numbers_T, len(sequences), StepContext(seed=1), group="the ranks", is_global=True)  # type: ignore[arg-type]


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_split_of_any_sequences_gives_the_same_fates(data: st.DataObject) -> None:
    """Ranks are imitated: what all_gather_columns would bring is put together here. Scores are of three values."""
    num_sequences, length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    num_experts, k = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 2))
    num_ranks = data.draw(st.sampled_from([1, 2, 4, 8]))
    shape = (num_sequences, length, num_experts)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scores_BSE = torch.randint(0, 3, shape, generator=generator).double()
    ids_BSK = torch.rand(shape, generator=generator).argsort(-1)[:, :, :k]
    routed_BSK = torch.rand(*shape[:2], k, generator=generator) < 0.9
    config = FactorConfig(
        kind="factor",
        train=data.draw(st.sampled_from([0.5, 0.8, 1.0])),
        minimum=0,
        scope="global",
        priority=data.draw(st.sampled_from(["position", "probability", "batch_priority", "random"])),
        first_choices_first=data.draw(st.booleans()),
        overflow="drop" if k >= num_experts else data.draw(st.sampled_from(["drop", "reroute"])),
    )
    holder = data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=num_sequences, max_size=num_sequences))
    order = data.draw(st.permutations(range(num_sequences)))

    def fates(sequences_by_rank: list[list[int]]) -> dict[int, Any]:
        batches = [make_tokens(sequences, length) for sequences in sequences_by_rank]
        plans = [
            make_plan(ids_BSK[s].flatten(0, 1), scores_BSE[s].flatten(0, 1), routed_BSK[s].flatten(0, 1))
            for s in sequences_by_rank
        ]
        columns: list[Any] = []

        def gather(mine: list[Tensor], group: Any) -> Any:
            columns.append(mine)
            raise StopIteration  # the first round only collects what each rank brings

        found = {}
        with mock.patch.object(token_scope, "group_size", return_value=len(plans) + 1):
            with mock.patch.object(token_scope, "all_gather_columns", gather):
                for plan, batch in zip(plans, batches, strict=True):
                    with pytest.raises(StopIteration):
                        apply_capacity(config, plan, batch, training=True)
            lengths = [len(mine[0]) for mine in columns]
            gathered = [torch.cat(parts) for parts in zip(*columns, strict=True)]
            for rank, (plan, batch) in enumerate(zip(plans, batches, strict=True)):
                with (
                    mock.patch.object(token_scope, "all_gather_columns", return_value=(gathered, lengths, 0)),
                    mock.patch.object(token_scope, "group_rank", return_value=rank),
                ):
                    limited, _ = apply_capacity(config, plan, batch, training=True)
                for number, sequence in enumerate(sequences_by_rank[rank]):
                    rows = slice(number * length, (number + 1) * length)
                    found[sequence] = (limited.expert_ids_TK[rows].tolist(), limited.outcome_TK[rows].tolist())
        return found

    alone = fates([list(range(num_sequences))])
    assert fates([[s for s in order if holder[s] == rank] for rank in range(num_ranks)]) == alone
