"""What crosses between ranks: each token at most once, the bytes exactly, in which dtype, and only when all ranks
agree."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.dispatch.dispatcher import Dispatcher
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.dispatch.pass_fingerprint import PassFingerprint
from expert_parallel.moe.dispatch.permute import gather_rows
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.types import DispatchedTokens, Outcome, RoutingPlan
from expert_parallel.parallel.collectives import ExchangeKey, LinkClass, Phase, sum_traffic
from expert_parallel.parallel.placement import ExpertPlacement
from tests.ranks import run_ranks
from tests.test_dispatch import DISPATCHERS, nodes_of

NUM_EXPERTS, D_MODEL, TOP_K = 16, 8, 4
ACROSS = [name for name in DISPATCHERS if name != "local"]
OTHERS: tuple[LinkClass, ...] = ("node", "network")
RANKS_PER_NODE = {2: 1, 4: 2, 8: 4}


def make_dispatcher(name: str, rank: int, world_size: int, **settings: Any) -> tuple[Dispatcher, ExpertPlacement]:
    config = MoEConfig.model_validate(
        {"num_experts": 2, "experts": {"hidden": 1}, "dispatcher": {**DISPATCHERS[name], **settings}}
    )
    placement = ExpertPlacement.contiguous(NUM_EXPERTS, world_size)
    return Dispatcher(
        config.dispatcher, placement, dist.group.WORLD, nodes_of(world_size, RANKS_PER_NODE[world_size])
    ), placement


def make_plan(rank: int, num_tokens: int, weight: float = 1.0) -> RoutingPlan:
    """Random choices, of which a fifth are dropped."""
    generator = torch.Generator().manual_seed(rank)
    ids_TK = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(num_tokens)])
    dropped_TK = torch.rand(num_tokens, TOP_K, generator=generator) < 0.2
    outcome_TK = dropped_TK.to(torch.uint8) * Outcome.DROPPED_CAPACITY
    blank = torch.zeros(num_tokens, NUM_EXPERTS)
    return RoutingPlan(blank, blank, blank, ids_TK, torch.full((num_tokens, TOP_K), weight), outcome_TK, NUM_EXPERTS)


def carry(
    dispatcher: Dispatcher, x_TD: Tensor, plan: RoutingPlan, ledger: Ledger
) -> tuple[Tensor, list[tuple[Tensor, int]], Tensor]:
    """Through experts that give back what they get, times its weight: (what comes back; each row that they computed,
    and the slot of its expert; rows of each expert)."""
    arrived: list[tuple[Tensor, int]] = []

    def compute(tokens: DispatchedTokens) -> Tensor:
        x_RD = gather_rows(tokens.x_VD, tokens.row_R, tokens.computed_VK)
        slot_R = torch.arange(len(tokens.counts_e)).repeat_interleave(tokens.counts_e)
        arrived.extend(zip(x_RD.detach(), slot_R.tolist(), strict=True))
        y_RD = (x_RD * tokens.weights_R[:, None]).to(x_RD.dtype)
        return gather_rows(y_RD, tokens.computed_VK, tokens.row_R)

    pending = dispatcher.dispatch(x_TD, plan, ledger, StepContext())
    for chunk in pending.receive_chunks():
        chunk.start_combine(compute(chunk.tokens))
    return pending.combine(), arrived, pending.computed_E[list(dispatcher.expert_ids)]


def run_dispatch(rank: int, name: str, world_size: int) -> dict[str, Any]:
    """Row t of rank r is (r, t, r, t, ...). Returns what arrives, and what identity experts bring back."""
    dispatcher, placement = make_dispatcher(name, rank, world_size)
    num_tokens = 12 + rank
    plan, ledger = make_plan(rank, num_tokens), Ledger()
    x_TD = torch.tensor([[rank, token] * (D_MODEL // 2) for token in range(num_tokens)], dtype=torch.float32)
    x_TD.requires_grad_()
    returned_TD, arrived, counts_e = carry(dispatcher, x_TD, plan, ledger)
    returned_TD.backward(torch.ones_like(returned_TD))
    return {
        "chosen": [(rank, t, int(e)) for t in range(num_tokens) for e in plan.expert_ids_TK[t][plan.kept_TK[t]]],
        "arrived": [(*map(int, row[:2]), placement.experts_on(rank)[slot]) for row, slot in arrived],
        "counts": (counts_e.tolist(), [sum(slot == e for _, slot in arrived) for e in range(len(counts_e))]),
        "returned": returned_TD.detach(),
        "expected": x_TD.detach() * plan.kept_TK.sum(1)[:, None],
        "x_grad": x_TD.grad,
        "num_kept": plan.kept_TK.sum(1),
        "log": ledger.log,
        "owner": placement.rank_of_expert,
    }


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("name", ACROSS)
def test_no_row_is_lost_doubled_or_swapped(name: str, world_size: int) -> None:
    results = run_ranks(world_size, run_dispatch, name, world_size)
    chosen = [choice for result in results for choice in result["chosen"]]
    arrived = [choice for result in results for choice in result["arrived"]]
    assert sorted(chosen) == sorted(arrived)
    assert len(set(arrived)) == len(arrived) > 0
    for result in results:
        assert torch.equal(result["returned"], result["expected"])
        assert torch.equal(result["x_grad"], result["num_kept"].float()[:, None].expand(-1, D_MODEL))
        assert result["counts"][0] == result["counts"][1]


def to_others(result: dict[str, Any], rank: int) -> list[tuple[int, int]]:
    """(token, rank) of each kept choice that leaves this rank."""
    return [(token, result["owner"][e]) for _, token, e in result["chosen"] if result["owner"][e] != rank]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_token_crosses_to_a_rank_at_most_once(world_size: int) -> None:
    """The payload is the unique (token, other rank) pairs, in all four directions. Metadata is 8 bytes a choice
    on the way, 4 a choice (the weight's gradient) on the way back."""
    results = run_ranks(world_size, run_dispatch, "all_to_all", world_size)
    pairs = [set(to_others(result, rank)) for rank, result in enumerate(results)]
    for rank, result in enumerate(results):
        sent, choices = len(pairs[rank]), len(to_others(result, rank))
        received = sum(destination == rank for other in pairs for _, destination in other)
        log = result["log"]
        assert choices > sent > 0
        assert (
            log.bytes_to_others(Phase.DISPATCH)
            == log.bytes_to_others(Phase.COMBINE, is_backward=True)
            == sent * D_MODEL * 4
        )
        assert (
            log.bytes_to_others(Phase.COMBINE)
            == log.bytes_to_others(Phase.DISPATCH, is_backward=True)
            == received * D_MODEL * 4
        )
        assert log.bytes_to_others(Phase.METADATA) == choices * 8


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_one_row_a_choice_moves_a_row_for_each(world_size: int) -> None:
    for rank, result in enumerate(run_ranks(world_size, run_dispatch, "all_to_all, row a choice", world_size)):
        assert result["log"].bytes_to_others(Phase.DISPATCH) == len(to_others(result, rank)) * D_MODEL * 4


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_hierarchical_crosses_to_a_node_at_most_once(world_size: int) -> None:
    """Between nodes: the unique (token, other node) pairs, all of them over the network. Within the node: what is there
    goes once to each rank that needs it."""
    node_size = RANKS_PER_NODE[world_size]
    between, within = ExchangeKey(Phase.DISPATCH, "between nodes"), ExchangeKey(Phase.DISPATCH, "within the node")
    results = run_ranks(world_size, run_dispatch, "hierarchical", world_size)
    for rank, result in enumerate(results):
        nodes = {(token, owner // node_size) for token, owner in to_others(result, rank)}
        log, row_bytes = result["log"], D_MODEL * 4
        expected = len({(token, node) for token, node in nodes if node != rank // node_size}) * row_bytes
        assert log.bytes_sent[between, "network"] == expected > 0
        assert log.bytes_sent[between, "node"] == 0
        assert log.bytes_sent[within, "network"] == 0
        rail = [r for r in range(world_size) if r % node_size == rank % node_size]
        arrived = {
            (source, token, owner)
            for source in rail
            for token, owner in [(t, results[source]["owner"][e]) for _, t, e in results[source]["chosen"]]
            if owner // node_size == rank // node_size and owner != rank
        }
        assert log.bytes_sent[within, "node"] == len(arrived) * row_bytes


@pytest.mark.parametrize("world_size", [4, 8])
def test_all_gather_sends_every_token_and_returns_what_was_chosen(world_size: int) -> None:
    results = run_ranks(world_size, run_dispatch, "all_gather", world_size)
    for rank, result in enumerate(results):
        combine = {
            (source, t) for source, other in enumerate(results) for t, d in to_others(other, source) if d == rank
        }
        assert result["log"].bytes_to_others(Phase.DISPATCH) == (12 + rank) * (world_size - 1) * D_MODEL * 4
        assert result["log"].bytes_to_others(Phase.COMBINE) == len(combine) * D_MODEL * 4


def run_wide(rank: int, name: str) -> dict[str, Any]:
    dispatcher, _ = make_dispatcher(name, rank, 4)
    ledger, x_TD = Ledger(), torch.zeros(128, 2048, dtype=torch.bfloat16, requires_grad=True)
    carry(dispatcher, x_TD, make_plan(rank, 128), ledger)[0].sum().backward()
    return {"log": ledger.log}


@pytest.mark.parametrize("name", [name for name in ACROSS if "choice" not in name])
def test_metadata_is_under_two_percent_of_wide_rows(name: str) -> None:
    """At d = 2048 in bfloat16, top-4, forward and backward. A rank pair says 16 bytes each way: no more than 4 E
    here."""
    for result in run_ranks(4, run_wide, name):
        log = result["log"]
        beside = sum(sum_traffic(log.bytes_sent, OTHERS, phase) for phase in (Phase.METADATA, Phase.COUNTS))
        payload = sum(sum_traffic(log.bytes_sent, OTHERS, phase) for phase in (Phase.DISPATCH, Phase.COMBINE))
        assert 0 < beside < 0.02 * payload
        assert log.bytes_to_others(Phase.COUNTS) <= 4 * NUM_EXPERTS * 3


# ------------------------------------------------------------------------------------------------------ dtype of travel


def run_narrow(rank: int, name: str, world_size: int) -> dict[str, Any]:
    dispatcher, _ = make_dispatcher(name, rank, world_size, exchange_dtype="bfloat16")
    plan, ledger = make_plan(rank, 10), Ledger()
    x_TD = torch.randn(10, D_MODEL, generator=torch.Generator().manual_seed(rank))
    returned_TD, arrived, _ = carry(dispatcher, x_TD, plan, ledger)
    x_RD = torch.stack([row for row, _ in arrived])
    return {"dtypes": (x_RD.dtype, returned_TD.dtype), "log": ledger.log, "x": x_RD, "back": returned_TD,
            "expected": x_TD.bfloat16().float() * plan.kept_TK.sum(1)[:, None]}  # fmt: skip


@pytest.mark.parametrize("name", ACROSS)
def test_rows_travel_as_bfloat16_between_float32_experts(name: str) -> None:
    """Half the bytes; values are bfloat16's; the experts get float32. Sums are rounded once a hop: 2^-8 of them."""
    for rank, result in enumerate(run_ranks(4, run_narrow, name, 4)):
        assert result["dtypes"] == (torch.float32, torch.float32)
        assert torch.equal(result["x"], result["x"].bfloat16().float())
        torch.testing.assert_close(result["back"], result["expected"], rtol=2**-7, atol=1e-6)
        log = result["log"]
        for phase in (Phase.COMBINE,) if name.startswith("all_gather") else (Phase.DISPATCH, Phase.COMBINE):
            sent = sum_traffic(log.rows_sent, OTHERS, phase)
            assert log.bytes_to_others(phase) == sent * D_MODEL * 2 > 0, (rank, phase)


# -------------------------------------------------------------------------------------------- the same bits for every
# ep


def layer_outputs(rank: int, world_size: int, name: str, dtype: torch.dtype) -> Tensor:
    """This rank's part of 64 tokens in 8 sequences, through a layer over all ranks."""
    settings = {"local": {"kind": "local"}}.get(name, DISPATCHERS[name])
    config = MoEConfig.model_validate(
        {
            "d_model": 32,
            "num_experts": 16,
            "router": {"k": 4},
            "capacity": {"kind": "factor", "train": 1.0, "scope": "global", "minimum": 0},
            "experts": {"hidden": 24},
            "dispatcher": settings,
        }
    )
    group = dist.group.WORLD if world_size > 1 else None
    nodes = nodes_of(world_size, RANKS_PER_NODE[world_size]) if world_size > 1 else None
    layer = MoELayer(config, group, nodes=nodes)
    x_BSD = torch.randn(8, 8, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    context = StepContext(sequence_index_B=torch.arange(8)[mine])
    return layer(x_BSD[mine], context).y.detach().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["all_to_all, row a choice", "hierarchical, row a choice"])
def test_one_row_a_choice_gives_the_same_bits_for_every_ep(name: str, dtype: torch.dtype) -> None:
    expected = run_ranks(1, layer_outputs, 1, "local", dtype)[0]
    for world_size in (2, 4, 8):
        parts = run_ranks(world_size, layer_outputs, world_size, name, dtype)
        assert torch.equal(torch.cat(parts), expected), f"{world_size} ranks"


def test_one_row_a_rank_rounds_otherwise() -> None:
    """Why the option is there: merged rows are summed within a rank first. In bfloat16 that shows."""
    expected = run_ranks(1, layer_outputs, 1, "local", torch.bfloat16)[0]
    merged = torch.cat(run_ranks(2, layer_outputs, 2, "all_to_all", torch.bfloat16))
    assert not torch.equal(merged, expected)
    torch.testing.assert_close(merged, expected, rtol=2e-2, atol=1e-4)


# ------------------------------------------------------------------------------------------------- ranks that disagree


def run_disagreement(rank: int, name: str, what: str) -> str:
    """Rank 1 comes to the exchange with something else. What each rank says."""
    width = D_MODEL * 2 if what == "width" and rank == 1 else D_MODEL
    dtype = torch.bfloat16 if what == "dtype" and rank == 1 else torch.float32
    context = StepContext(step=7, layer=3)
    if rank == 1 and what in ("layer", "step", "micro_step"):
        context = replace(context, **{what: 5})
    dispatcher, _ = make_dispatcher(name, rank, 4)
    try:
        x_TD = torch.zeros(6, width, dtype=dtype, requires_grad=what == "gradient" and rank == 1)
        dispatcher.dispatch(x_TD, make_plan(rank, 6), Ledger(), context)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("width", "rows of 16 float32 without gradient, 4 choices a token, layer 3, micro-step 0, step 7"),
        ("dtype", "rows of 8 bfloat16 without gradient, 4 choices a token, layer 3, micro-step 0, step 7"),
        ("gradient", "rows of 8 float32 with gradient, 4 choices a token, layer 3, micro-step 0, step 7"),
        ("layer", "rows of 8 float32 without gradient, 4 choices a token, layer 5, micro-step 0, step 7"),
        ("step", "rows of 8 float32 without gradient, 4 choices a token, layer 3, micro-step 0, step 5"),
        ("micro_step", "rows of 8 float32 without gradient, 4 choices a token, layer 3, micro-step 5, step 7"),
    ],
)
@pytest.mark.parametrize("name", ["all_to_all", "all_gather", "hierarchical"])
def test_ranks_that_disagree_say_so_instead_of_hanging(name: str, what: str, said: str) -> None:
    usual = "rows of 8 float32 without gradient, 4 choices a token, layer 3, micro-step 0, step 7"
    for rank, text in enumerate(run_ranks(4, run_disagreement, name, what)):
        mine, other, first = (said, usual, 0) if rank == 1 else (usual, said, 1)
        assert text == (
            f"the ranks are not in the same pass: rank {rank} has {mine}; rank {first} has {other} (steps modulo 16384)"
        )


def test_the_key_of_a_pass_survives_the_wire() -> None:
    key = PassFingerprint(7168, torch.bfloat16, 8, True, StepContext(step=16383, micro_step=127, layer=1023))
    assert all(0 <= word < 2**31 for word in key.encoded)
    assert PassFingerprint.decode(key.encoded) == (
        "rows of 7168 bfloat16 with gradient, 8 choices a token, layer 1023, micro-step 127, step 16383"
    )


# ------------------------------------------------------------------------------------------------------ between nodes


def rows_between_nodes(rank: int, name: str) -> int:
    """Of this rank's 200 tokens, top-8 of 64 experts on 2 x 2 ranks."""
    config = MoEConfig.model_validate(
        {"d_model": 8, "num_experts": 64, "router": {"k": 8}, "experts": {"hidden": 1}, "dispatcher": DISPATCHERS[name]}
    )
    layer = MoELayer(config, dist.group.WORLD, nodes=nodes_of(4, 2))
    x_TD = torch.randn(200, 8, generator=torch.Generator().manual_seed(rank))
    return sum_traffic(layer(x_TD).stats.log.bytes_sent, ("network",), Phase.DISPATCH)


def test_hierarchical_sends_a_quarter_of_a_row_a_choice_between_nodes() -> None:
    """Half of 8 choices are on the other node, so that nearly every token goes there once: 1 row for 4. Of one row a
    rank: 1 for 2 (1 - (48 choose 8) / (64 choose 8)) = 1.83."""
    found = {
        name: sum(run_ranks(4, rows_between_nodes, name))
        for name in ("hierarchical", "all_to_all, row a choice", "all_to_all")
    }
    assert 0.2 < found["hierarchical"] / found["all_to_all, row a choice"] <= 0.27
    assert 0.5 < found["hierarchical"] / found["all_to_all"] <= 0.58
