"""The ledger finds what goes wrong between ranks. Faults are put into the carrier of each exchange, forward and
backward: a row that does not arrive, one that arrives twice, two that change places, one that is altered."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.conservation import LayerTotals, check_conservation, pack, unpack
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.dispatch import row_index
from expert_parallel.moe.dispatch.ledger import Ledger, LedgerBreach, LedgerConfig
from expert_parallel.moe.layer import MoELayer
from tests.ranks import run_ranks
from tests.test_dispatch import DISPATCHERS, nodes_of

WORLD, VICTIM = 4, 1  # faults happen on their way to this rank
LAYER, STEP = 3, 7

FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "lost": lambda rows: torch.cat([rows[:2], rows[3:]]),
    "doubled": lambda rows: torch.cat([rows[:3], rows[2:]]),
    "swapped": lambda rows: rows[[*range(2), 3, 2, *range(4, len(rows))]],
    "overwritten": lambda rows: rows[[*range(2), 3, 3, *range(4, len(rows))]],  # one lost and one doubled: counts agree
    "altered": lambda rows: torch.cat([rows[:2], rows[2:3] ^ 1, rows[3:]]),
}
PURPOSES = ("dispatch", "combine", "combine backward", "dispatch backward")
PREFIX = {"all_to_all": "", "all_gather": "", "hierarchical": "between nodes: "}


def run_with_fault(
    rank: int, dispatcher: str, purpose: str, fault: str | None, ledger: dict[str, str]
) -> tuple[list[str], list[str]]:
    """What the ledger said on this rank during the pass, and when the counts of all ranks were compared."""
    config = MoEConfig.model_validate(
        {
            "d_model": 8,
            "num_experts": 8,
            "router": {"k": 3},
            "experts": {"hidden": 4},
            "dispatcher": DISPATCHERS[dispatcher],
            "ledger": ledger,
        }
    )
    layer = MoELayer(config, dist.group.WORLD, nodes=nodes_of(WORLD, 2)).double()
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(12, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    check_rows = Ledger._check_rows

    def faulty(self: Ledger, arrived: Tensor, like: Tensor, tags: bool, receive: Any, peers: Any, name: Any) -> Tensor:
        hit = fault is not None and rank == VICTIM and str(name) == PREFIX[dispatcher] + purpose
        rows = FAULTS[fault](arrived) if hit and fault is not None else arrived
        return check_rows(self, rows, like, tags, receive, peers, name)

    with mock.patch.object(Ledger, "_check_rows", faulty), warnings.catch_warnings(record=True) as during:
        warnings.simplefilter("always")
        output = layer(x_TD, StepContext(layer=LAYER, step=STEP))
        output.y.sum().backward()
    with warnings.catch_warnings(record=True) as after:
        warnings.simplefilter("always")
        check_conservation(output.stats, dist.group.WORLD, config.ledger, LAYER, STEP)
    return [str(w.message) for w in during], [str(w.message) for w in after]


WARN_ROWS, WARN_COUNTS = {"kind": "rows", "breach": "warn"}, {"kind": "counts", "breach": "warn"}


@pytest.mark.parametrize("dispatcher", PREFIX)
@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("lost", "was lost"),
        ("doubled", "came twice"),
        ("swapped", "is out of order"),
        ("overwritten", "was lost"),
        ("altered", "was altered"),
    ],
)
def test_rows_finds_and_names_every_fault(dispatcher: str, purpose: str, fault: str, what: str) -> None:
    """The layer, the source and the destination rank, and the row; on the rank that received it, nowhere else."""
    results = run_ranks(WORLD, run_with_fault, dispatcher, purpose, fault, WARN_ROWS)
    for rank, (during, _) in enumerate(results):
        assert len(during) == (rank == VICTIM), during
    (text,) = results[VICTIM][0]
    assert text.startswith(f"ledger: layer {LAYER}, step {STEP}, {PREFIX[dispatcher]}{purpose}: rank ")
    assert f"-> rank {VICTIM}, row " in text
    assert what in text


@pytest.mark.parametrize("dispatcher", ["all_to_all", "hierarchical"])
@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("fault", ["lost", "doubled"])
def test_counts_finds_what_is_lost_or_doubled(dispatcher: str, purpose: str, fault: str) -> None:
    """At once on the rank that received it; and on every rank when the step's counts are compared."""
    results = run_ranks(WORLD, run_with_fault, dispatcher, purpose, fault, WARN_COUNTS)
    (text,) = results[VICTIM][0]
    assert text.startswith(
        f"ledger: layer {LAYER}, step {STEP}, {PREFIX[dispatcher]}{purpose}: rank {VICTIM} was to receive "
    )
    for _, after in results:
        (text,) = after
        assert f"{purpose}: " in text
        assert " rows were sent, " in text


@pytest.mark.parametrize("dispatcher", PREFIX)
@pytest.mark.parametrize("kind", ["counts", "rows"])
def test_nothing_is_said_where_nothing_is_wrong(dispatcher: str, kind: str) -> None:
    ledger = {"kind": kind, "breach": "warn"}
    assert run_ranks(WORLD, run_with_fault, dispatcher, "dispatch", None, ledger) == [([], [])] * WORLD


def test_counts_cannot_see_rows_that_change_places() -> None:
    """What `rows` is for."""
    assert run_ranks(WORLD, run_with_fault, "all_to_all", "dispatch", "swapped", WARN_COUNTS) == [([], [])] * WORLD


# --------------------------------------------------------------------------------------------- faults in the index
# maths


def run_with_lost_choice(rank: int, doubled: bool) -> tuple[str, list[int]]:
    """One rank's dispatcher forgets a choice, or sends one twice, before anything is counted."""
    config = MoEConfig.model_validate({"d_model": 8, "num_experts": 8, "router": {"k": 3}, "experts": {"hidden": 4}})
    layer = MoELayer(config, dist.group.WORLD)
    choices_by_row = row_index.choices_by_row

    def forgetful(*plan: Tensor) -> row_index.ChoicesByRow:
        choices = choices_by_row(*plan)
        if not doubled:
            choices.expert_N[-1] = row_index.NO_EXPERT
            return choices
        kept = [*range(len(choices.row_N)), -1]
        parts = (choices.row_N[kept], choices.expert_N[kept], choices.weight_N[kept])
        return row_index.ChoicesByRow(*parts, choices.num_rows)

    with mock.patch(
        "expert_parallel.moe.dispatch.dispatcher.choices_by_row", forgetful if rank == 0 else choices_by_row
    ):
        x_TD = torch.randn(12, 8, generator=torch.Generator().manual_seed(rank))
        stats = layer(x_TD, StepContext(layer=LAYER, step=STEP)).stats
    try:
        check_conservation(stats, dist.group.WORLD, config.ledger, LAYER, STEP)
    except LedgerBreach as breach:
        return str(breach), stats.kept_E.tolist()
    return "nothing", stats.kept_E.tolist()


@pytest.mark.parametrize("doubled", [False, True])
def test_a_choice_that_the_dispatcher_forgets_or_doubles_is_found(doubled: bool) -> None:
    results = run_ranks(2, run_with_lost_choice, doubled)
    kept = [sum(counts) for counts in zip(*(kept_E for _, kept_E in results), strict=True)]
    assert results[0][0] == results[1][0]
    text = results[0][0]
    expert = int(text.split("expert ")[1].split()[0])
    assert text == (
        f"ledger: layer {LAYER}, step {STEP}, expert {expert} was to compute {kept[expert]} choices and computed "
        f"{kept[expert] + (1 if doubled else -1)}"
    )


# ------------------------------------------------------------------------------------------------------ breach and
# totals


def run_error(rank: int) -> str:
    """A breach in the last exchange, so that no other rank waits for this one."""
    ledger = Ledger(LedgerConfig(kind="rows"), layer=LAYER, step=STEP)
    from expert_parallel.parallel.collectives import ExchangeKey, Peers, Phase, Wait, start_all_to_all_rows

    def swap(x: Tensor, send: Any, receive: Any, group: Any) -> Wait:
        wait = start_all_to_all_rows(x, send, receive, group)
        return lambda: wait().flip(0) if rank == VICTIM else wait()

    with mock.patch("expert_parallel.parallel.collectives.start_all_to_all_rows", swap):
        try:
            key, peers = ExchangeKey(Phase.COMBINE), Peers.of(dist.group.WORLD)
            ledger.all_to_all(torch.ones(4, 2), [2, 2], [2, 2], peers, key)()
        except LedgerBreach as breach:
            return str(breach)
    return "nothing"


def test_a_breach_is_an_error_unless_set_otherwise() -> None:
    said = run_ranks(2, run_error)
    assert said[0] == "nothing"
    assert said[1] == (
        "ledger: layer 3, step 7, combine: rank 0 -> rank 1, row 0 is out of order; rank 0 -> rank 1, row 1 is out of "
        "order; rank 1 -> rank 1, row 0 is out of order; rank 1 -> rank 1, row 1 is out of order"
    )


def totals_of_a_layer() -> LayerTotals:
    config = MoEConfig.model_validate({"d_model": 8, "num_experts": 4, "router": {"k": 2}, "experts": {"hidden": 4}})
    output = MoELayer(config)(torch.randn(10, 8, generator=torch.Generator().manual_seed(0)))
    return unpack(pack(output.stats), 4, [])


def test_totals_that_do_not_add_up_are_put_in_words() -> None:
    totals = totals_of_a_layer()
    assert totals.breaches() == []
    one = torch.tensor([0, 1, 0, 0])
    (choices,) = replace(totals, routed_E=totals.routed_E + one).breaches()
    assert choices == "21 choices were routed, 20 kept, rerouted or dropped"
    rows = {**totals.rows_sent, "dispatch": 5}
    found = replace(totals, rows_sent=rows).breaches()
    assert found == ["dispatch: 5 rows were sent, 10 received", "combine: 10 rows were sent, but 5 with tokens"]


def test_totals_are_what_the_pass_was() -> None:
    totals = totals_of_a_layer()
    assert totals.num_tokens == 10
    assert totals.num_tokens_without_expert == 0
    assert int(totals.routed_E.sum()) == int(totals.computed_E.sum()) == 20
    assert 0 < totals.entropy / totals.num_tokens <= torch.log(torch.tensor(4.0)).item()
