"""The ledger finds what goes wrong between ranks. Faults are put on the wire, into the messages that a rank hands to
its collectives: into tokens and outputs, into their metadata, and into the gradients of all three."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from expert_parallel.moe.dispatch.checksums import CHECKED, Checksums, RowBlocks, RowSides, as_words, hash_rows
from expert_parallel.moe.dispatch.ledger import Ledger, LedgerBreach, LedgerConfig
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.types import LoadStats
from expert_parallel.parallel import collectives
from expert_parallel.parallel.collectives import ExchangeKey, Peers, Phase, Wait, as_bytes, from_bytes
from tests.ranks import run_ranks
from tests.test_dispatch import DISPATCHERS, nodes_of

WORLD, SOURCE = 4, 1  # faults are in what this rank sends
LAYER, STEP = 3, 7
KINDS: dict[str, dict[str, Any]] = {
    "all_to_all": DISPATCHERS["all_to_all"],
    "all_gather": DISPATCHERS["all_gather"],
    "hierarchical": {**DISPATCHERS["hierarchical"], "overlap": 2},
}

# ------------------------------------------------------------------------------------------------- faults on the wire
# A fault takes the bytes of the rows of all destinations, the first row of each destination, the number of bytes of a
# row without its tag, and the bytes of the same message in another layer and step. It changes the first in place.

Fault = Callable[[Tensor, list[int], int, Tensor], None]


def exchange_between_ranks(rows: Tensor, starts: list[int], width: int, stale: Tensor) -> None:
    """The first rows with the same index whose content differs: one token may go to both ranks. If all tokens go to
    both, the first row and the last."""
    end = [*starts[2:], len(rows)][0]
    pairs = [*zip(range(starts[0], starts[1]), range(starts[1], end), strict=False), (starts[0], end - 1)]
    pair = next(list(pair) for pair in pairs if not torch.equal(*rows[list(pair), :width]))
    rows[pair] = rows[pair[::-1]]


def exchange_within_rank(rows: Tensor, starts: list[int], width: int, stale: Tensor) -> None:
    rows[[starts[1], starts[1] + 1]] = rows[[starts[1] + 1, starts[1]]]


def lose(rows: Tensor, starts: list[int], width: int, stale: Tensor) -> None:
    rows[starts[1]] = 0


def double(rows: Tensor, starts: list[int], width: int, stale: Tensor) -> None:
    rows[starts[1] + 1] = rows[starts[1]]


def permute(rows: Tensor, starts: list[int], width: int, stale: Tensor) -> None:
    rows[starts[1], :width] = rows[starts[1], :width].view(-1, 8).flip(0).flatten()


def deliver_stale(rows: Tensor, starts: list[int], width: int, stale: Tensor) -> None:
    rows[starts[1]] = stale[0]


def alter_all_bits(rows: Tensor, starts: list[int], width: int, stale: Tensor) -> None:
    rows[starts[1], :width] ^= 1


def alter_last(rows: Tensor, starts: list[int], width: int, stale: Tensor) -> None:
    """One bit of the last element, which is a weight or its gradient in metadata."""
    rows[starts[1], width - 8] ^= 1


def alter_expert(rows: Tensor, starts: list[int], width: int, stale: Tensor) -> None:
    """Expert e becomes e + 1 or e - 1, on the same rank. In an all-to-all its id starts at the second bit of a tag."""
    rows[starts[1], 0] ^= 2 if width == 12 else 1


OF_ROWS: dict[str, tuple[Fault, str]] = {  # and what `rows` says
    "exchanged between ranks": (exchange_between_ranks, "was not for rank"),
    "exchanged within a rank": (exchange_within_rank, "is out of order"),
    "lost": (lose, "was lost"),
    "doubled": (double, "came twice"),
    "permuted": (permute, "was altered"),
    "stale": (deliver_stale, f"is of layer {LAYER - 1}, step {STEP - 1}, micro-step 0, "),
    "altered": (alter_all_bits, "was altered"),
}
OF_METADATA: dict[str, tuple[Fault, str]] = {  # others would break the index arithmetic before anything is compared
    "exchanged between ranks": OF_ROWS["exchanged between ranks"],
    "stale": OF_ROWS["stale"],
    "expert": (alter_expert, "was altered"),
    "weight": (alter_last, "was altered"),
}
ROWS = ("dispatch", "combine", "combine backward", "dispatch backward")
CASES = [(purpose, fault) for purpose in ROWS for fault in OF_ROWS]
CASES += [("metadata", fault) for fault in OF_METADATA]
CASES += [("metadata backward", fault) for fault in OF_ROWS if fault != "permuted"]  # a single number each


def fault_of(purpose: str, name: str) -> tuple[Fault, str]:
    return (OF_METADATA if purpose == "metadata" else OF_ROWS)[name]


class Wire:
    """Stands for the collectives of this rank: keeps the messages of each exchange, and puts a fault into one."""

    def __init__(self, tag_bytes: int) -> None:
        self.tag_bytes = tag_bytes
        self.messages: dict[str, Tensor] = {}
        self.purpose = ""
        self.fault: Fault | None = None

    def carry(self, x: Tensor, counts: list[int], key: str) -> Tensor:
        """Returns the message as it is sent. counts: the rows for each destination."""
        rows = as_bytes(x).clone()
        if self.fault is None:
            self.messages.setdefault(key, rows)
            return x
        if key != self.purpose:
            return x
        self.purpose = ""  # only the first chunk
        starts = [sum(counts[:rank]) for rank in range(len(counts))]
        self.fault(rows, starts, rows.shape[1] - self.tag_bytes, self.messages[key])
        return from_bytes(rows, x)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Lets the collectives that the ledger has counted pass through `carry`."""
        keys: list[str] = []
        count = Ledger.count_bytes
        exchange, gather = collectives.start_all_to_all_rows, collectives.start_all_gather_rows

        def counted(ledger: Ledger, rows: Tensor, send: Any, peers: Peers, key: ExchangeKey) -> None:
            keys[:] = [str(key)]
            count(ledger, rows, send, peers, key)

        def exchanged(x: Tensor, send_counts: Any, receive_counts: Any, group: Any) -> Wait:
            return exchange(self.carry(x, list(send_counts), keys.pop()), send_counts, receive_counts, group)

        def gathered(x: Tensor, counts: Any, group: Any) -> Wait:
            return gather(self.carry(x, [0, len(x)], keys.pop()) if keys else x, counts, group)

        with (
            mock.patch.object(Ledger, "count_bytes", counted),
            mock.patch.object(collectives, "start_all_to_all_rows", exchanged),
            mock.patch.object(collectives, "start_all_gather_rows", gathered),
        ):
            yield


Said = tuple[list[str], list[str]]


def run_with_faults(rank: int, dispatcher: str, kind: str, cases: list[tuple[str, str]]) -> dict[tuple[str, str], Said]:
    """What the ledger said on this rank during each pass, and when the totals of all ranks were compared. The last case
    has no fault."""
    config = MoEConfig.model_validate(
        {
            "d_model": 8,
            "num_experts": 8,
            "router": {"k": 2},
            "experts": {"hidden": 4},
            "dispatcher": KINDS[dispatcher],
            "ledger": {"kind": kind, "breach": "warn"},
        }
    )
    layer, group = MoELayer(config, dist.group.WORLD, nodes=nodes_of(WORLD, 2)).double(), dist.group.WORLD
    generator = torch.Generator().manual_seed(rank)
    stale_TD, x_TD = (
        torch.randn(12, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    # The same places hold different gradients.
    weight_TD = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    wire = Wire(tag_bytes=16 if kind == "rows" else 0)
    with wire.connected():
        layer(stale_TD, StepContext(layer=LAYER - 1, step=STEP - 1)).y.square().sum().backward()
        said: dict[tuple[str, str], Said] = {}
        for purpose, name in [*cases, ("", "")]:
            wire.purpose = ("between nodes: " if dispatcher == "hierarchical" else "") + purpose
            nothing = lambda *_: None  # noqa: E731
            wire.fault = fault_of(purpose, name)[0] if name and rank == SOURCE else nothing
            with warnings.catch_warnings(record=True) as during:
                warnings.simplefilter("always")
                output = layer(x_TD, StepContext(layer=LAYER, step=STEP))
                (output.y * weight_TD).sum().backward()
            with warnings.catch_warnings(record=True) as after:
                warnings.simplefilter("always")
                check_conservation(output.stats, group, config.ledger, LAYER, STEP)
            said[purpose, name] = ([str(w.message) for w in during], [str(w.message) for w in after])
    return said


def cases_of(dispatcher: str) -> list[tuple[str, str]]:
    """All-gather sends one message to all ranks, with a table of choices as metadata."""
    if dispatcher != "all_gather":
        return CASES
    left_out = [("dispatch", "exchanged between ranks"), *(("metadata", name) for name in OF_METADATA)]
    return [case for case in CASES if case not in left_out] + [("metadata", "expert"), ("metadata", "weight")]


@pytest.mark.parametrize("dispatcher", KINDS)
def test_rows_names_every_fault_at_once(dispatcher: str) -> None:
    """The layer, the exchange, both ranks and the row; on ranks that received it, nowhere else."""
    cases = cases_of(dispatcher)
    results = run_ranks(WORLD, run_with_faults, dispatcher, "rows", cases)
    for purpose, name in cases:
        heard = [text for result in results for text in result[purpose, name][0]]
        prefix = "between nodes: " if dispatcher == "hierarchical" else ""
        assert heard, (purpose, name)
        for text in heard:
            assert text.startswith(f"ledger: layer {LAYER}, step {STEP}, {prefix}{purpose}: rank "), (name, text)
        assert any(f"rank {SOURCE} -> rank " in text for text in heard), (purpose, name, heard)
        assert any(fault_of(purpose, name)[1] in text for text in heard), (purpose, name, heard)
        if name == "stale":
            assert any(f"micro-step 0, {prefix}{purpose}, chunk 0" in text for text in heard), heard
    assert [result["", ""] for result in results] == [([], [])] * WORLD


@pytest.mark.parametrize("dispatcher", KINDS)
def test_counts_finds_every_fault_at_the_end_of_the_step(dispatcher: str) -> None:
    """On every rank, with the exchange; nothing is said before."""
    cases = cases_of(dispatcher)
    results = run_ranks(WORLD, run_with_faults, dispatcher, "counts", cases)
    for purpose, name in cases:
        for during, after in (result[purpose, name] for result in results):
            assert (during, len(after)) == ([], 1), (purpose, name)
            assert after[0].startswith(f"ledger: layer {LAYER}, step {STEP}, "), after
            assert after[0].endswith(
                f"{purpose}: what arrived is not what was sent, as their checksums differ (model.moe.ledger.kind "
                "'rows' names the ranks and rows)"
            ), (purpose, name, after)
    assert [result["", ""] for result in results] == [([], [])] * WORLD


# --------------------------------------------------------------------------------------- faults in the index maths


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


# ------------------------------------------------------------------------------- what checksums see, on a single rank

ALONE, DISPATCH = Peers.of(None), ExchangeKey(Phase.DISPATCH)


def checksum(sent: Tensor, arrived: Tensor, key: ExchangeKey = DISPATCH, **place: int) -> list[int]:
    """The checksums of one exchange in which `sent` became `arrived`."""
    ledger = Ledger(**place)
    with mock.patch.object(collectives, "start_all_to_all_rows", return_value=lambda: arrived):
        ledger.all_to_all(sent, [len(sent)], [len(sent)], ALONE, key)()
    return ledger.checksums.sum(sent.device).tolist()


@pytest.mark.parametrize(
    ("dtype", "width", "words"), [(torch.float64, 5, 5), (torch.float32, 8, 4), (torch.bfloat16, 9, 9)]
)
def test_counts_reads_one_word_of_each_row(dtype: torch.dtype, width: int, words: int) -> None:
    """A changed word is found with probability 1 / words, as the README says: in each row it is another word, and in
    each step."""
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert as_words(x).shape == (40, words)
    read = torch.zeros(3, 40, words, dtype=torch.bool)
    for step in range(3):
        for row in range(40):
            for word in range(words):
                arrived = x.clone()
                as_words(arrived)[row, word] ^= 1
                read[step, row, word] = any(checksum(x, arrived, step=step))
    assert bool((read.sum(2) == 1).all())
    assert bool((read.sum((0, 1)) > 120 / words / 4).all())  # each word is read of some rows
    assert len({str(column) for column in read.int().argmax(2).tolist()}) == 3


CONTENTS = {
    "whole numbers": torch.arange(1.0, 7.0),
    "powers of two": 2.0 ** torch.arange(6.0),
    "signs": torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]),
    "tiny differences": 1 + torch.arange(6.0) * 2**-20,
}


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_counts_sees_rows_that_change_places_whatever_they_hold(contents: str, dtype: torch.dtype) -> None:
    x = CONTENTS[contents].to(dtype)[:, None].expand(6, 4).contiguous()
    for first in range(6):
        for second in range(first):
            order = list(range(6))
            order[first], order[second] = second, first
            assert any(checksum(x, x[order])) == (not torch.equal(x[first], x[second])), (first, second)
    for row in range(6):
        lost = x.clone()
        lost[row] = 0
        assert any(checksum(x, lost))


def test_errors_of_two_passes_do_not_cancel() -> None:
    """The rows of two micro-steps, layers, steps or exchanges change places: each sum is the other's opposite, but for
    the factor of the pass."""
    x, y = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places: list[dict[str, Any]] = [
        {},
        {"micro_step": 1},
        {"layer": 1},
        {"step": 1},
        {"key": DISPATCH._replace(hop="between nodes")},
    ]
    for place in places[1:]:
        there, here = checksum(x, y), checksum(y, x, **place)
        assert any(there)
        assert any(a + b for a, b in zip(there, here, strict=True)), place
    assert not any(a + b for a, b in zip(checksum(x, y), checksum(y, x), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_hash_of_a_row_sees_any_two_flipped_bits_and_exchanged_elements(dtype: torch.dtype) -> None:
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    flips = as_words(row).repeat(64 * 8 * row.itemsize, 1)
    bit = torch.arange(len(flips))
    size = 8 * flips.itemsize
    flips[bit, bit // size] ^= torch.ones_like(flips[:, 0]) << bit % size
    changes = hash_rows(flips) - hash_rows(row)
    assert len(torch.cat([changes, -changes]).unique()) == 2 * len(flips)  # no two of them cancel, and none is 0
    pairs = torch.combinations(torch.arange(64))
    exchanged = row.repeat(len(pairs), 1)
    exchanged[torch.arange(len(pairs))[:, None], pairs] = row[0, pairs.flip(1)]
    differ = row[0, pairs[:, 0]] != row[0, pairs[:, 1]]
    assert torch.equal(hash_rows(exchanged) != hash_rows(row), differ)


def test_rows_of_every_size_and_place_have_a_sum() -> None:
    """No rows, rows of odd size, rows that begin in the middle of a word, rows that are not contiguous."""
    for x in (
        torch.randn(0, 4),
        torch.randn(3, 5).bfloat16(),
        torch.randn(15).bfloat16()[1:13].view(4, 3),
        torch.randn(4, 3).T,
    ):
        assert not any(checksum(x, x.clone()))
        assert hash_rows(x).tolist() == hash_rows(x.clone(memory_format=torch.contiguous_format)).tolist()
    sides = RowSides(RowBlocks((2, 0), (0, 0), (0, 1)), RowBlocks((2, 3), (0, 1), (0, 0)))
    assert [len(words) for words in sides.tokens.number_rows(torch.device("cpu")).split(2)] == [2]
    assert len(set(sides.experts.number_rows(torch.device("cpu")).tolist())) == 5


def test_a_total_of_checksums_survives_the_sum_of_statistics() -> None:
    """64-bit numbers pass through a sum of float64 exactly, whatever their sign."""
    stats = layer_stats()
    largest, packed = 2**63 - 1, []
    for number in (largest, -largest, -1, 1):
        total = torch.full((len(CHECKED),), number)
        packed.append(pack(replace(stats, checksums=Checksums(total=total))))
    assert not any(unpack(sum(packed[:2], torch.zeros(1)), 4, []).checksums.values())
    assert not any(unpack(sum(packed, torch.zeros(1)), 4, []).checksums.values())
    left = unpack(sum(packed[:3], torch.zeros(1)), 4, []).checksums
    assert left == {str(key): 2**64 - 1 for key in CHECKED}


# ------------------------------------------------------------------------------------------------- breach and totals


def test_a_breach_is_an_error_unless_set_otherwise() -> None:
    x = torch.arange(8.0).view(4, 2)
    flipped = mock.patch.object(collectives, "start_all_to_all_rows", lambda x, **_: lambda: x.flip(0))
    with flipped, pytest.raises(LedgerBreach) as breach:
        Ledger(LedgerConfig(kind="rows"), layer=LAYER, step=STEP).all_to_all(x, [4], [4], ALONE, DISPATCH)()
    assert str(breach.value) == "ledger: layer 3, step 7, dispatch: " + "; ".join(
        f"rank 0 -> rank 0, row {row} is out of order" for row in range(4)
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [("counts", "dispatch: rank 0 was to receive 4 rows and received 3"), ("rows", "rank 0 -> rank 0, row 3 was lost")],
)
def test_missing_rows_are_found_at_once_and_in_the_totals(kind: str, words: str) -> None:
    ledger, x = Ledger(LedgerConfig.model_validate({"kind": kind, "breach": "warn"})), torch.ones(4, 2)
    short = mock.patch.object(collectives, "start_all_to_all_rows", lambda x, **_: lambda: x[:-1])
    with short, pytest.warns(RuntimeWarning, match=words):
        arrived = ledger.all_to_all(x, [4], [4], ALONE, DISPATCH)()
    assert arrived.shape == (4, 2)  # the pass continues
    assert sum(ledger.log.rows_sent.values()) - sum(ledger.log.rows_received.values()) == 1


def layer_stats() -> LoadStats:
    config = MoEConfig.model_validate({"d_model": 8, "num_experts": 4, "router": {"k": 2}, "experts": {"hidden": 4}})
    return MoELayer(config)(torch.randn(10, 8, generator=torch.Generator().manual_seed(0))).stats


def totals_of_a_layer() -> LayerTotals:
    return unpack(pack(layer_stats()), 4, [])


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
