"""Index maths of dispatch and combine: hand-written numbers, naive loops, and rows that name their source."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from expert_parallel.moe.dispatch.permute import (
    NO_ROW,
    gather_rows,
    padded_positions,
    positions_in_queues,
    sort_by_expert,
    sum_rows,
)
from expert_parallel.moe.dispatch.row_index import (
    NO_EXPERT,
    ChoicesByRow,
    IndexTable,
    build_send_index,
    choices_by_row,
    column_of_choice,
    row_table,
    sort_choices_by_rank,
)

NAIVE = settings(max_examples=60, deadline=None, derandomize=True)


def sources_table(source_M: Tensor, num_sources: int, width: int) -> Tensor:
    """The inverse of `result[m] = x[source_M[m]]`: row s lists, ascending, every m whose source is s."""
    table = torch.full((num_sources, width), NO_ROW)
    for source in range(num_sources):
        found = [m for m, s in enumerate(source_M.tolist()) if s == source]
        table[source, : len(found)] = torch.tensor(found, dtype=torch.int64)
    return table


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


# ---------------------------------------------------------------------------------------------------------------------
# build_send_index: choices by row -> rows by destination, on which choices of one row share a place or not


@dataclass(frozen=True)
class Planned:
    """What travels, cut to what is real. rows: of each row of x, without NO_ROW; rows_L: the table itself."""

    token_U: list[int]
    rows: list[list[int]]
    flat_N: list[int]
    num_choices_U: list[int]
    rows_P: list[int]
    choices_P: list[int]
    rows_L: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)


def travel(
    expert_ids_TK: Tensor, kept_TK: Tensor | None, rank_of_expert_E: Tensor, num_ranks: int, merge: bool
) -> Planned:
    """How the kept choices of T tokens travel, each weighed by its flat index."""
    num_tokens, num_choices = expert_ids_TK.shape
    kept_TK = torch.ones_like(expert_ids_TK, dtype=torch.bool) if kept_TK is None else kept_TK
    weights_TK = torch.arange(num_tokens * num_choices).view(num_tokens, num_choices)
    choices = choices_by_row(expert_ids_TK, kept_TK, weights_TK)
    rank_of_expert_E1 = torch.cat([rank_of_expert_E, torch.tensor([num_ranks])])
    order = sort_choices_by_rank(choices, rank_of_expert_E1[choices.expert_N], num_ranks, merge)
    plan = build_send_index(choices, order, num_choices, merge)
    num_rows, num_sent = int(order.rows_P.sum()), int(order.choices_P.sum())
    assert plan.rows_L.shape[0] == num_tokens
    assert plan.rows_L.shape[1] <= max(num_choices, 1)
    assert torch.equal(order.choice_N[plan.place_N], torch.arange(num_tokens * num_choices))
    assert bool((choices.expert_N[order.choice_N[num_sent:]] == NO_EXPERT).all())
    row_N = order.first_N[:num_sent].cumsum(0) - 1
    return Planned(
        plan.token_U[:num_rows].tolist(),
        [[row for row in rows if row != NO_ROW] for rows in plan.rows_L.tolist()],
        choices.weight_N[order.choice_N[:num_sent]].tolist(),
        torch.bincount(row_N, minlength=num_rows).tolist(),
        order.rows_P.tolist(),
        order.choices_P.tolist(),
        plan.rows_L,
    )


def test_merged_choices_of_one_token_at_one_rank_share_a_row() -> None:
    """The two tokens of the docstring: experts 0-3 on rank 0, 4-7 on rank 1. Rows: (r0: t0), (r0: t1), (r1: t0)."""
    plan = travel(ids([5, 1], [0, 1]), None, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), num_ranks=2, merge=True)
    assert plan == Planned([0, 1, 0], [[0, 2], [1]], [1, 2, 3, 0], [1, 2, 1], [2, 1], [3, 1])


def test_unmerged_choices_have_a_row_each_and_come_back_in_the_order_of_choice() -> None:
    """The same two tokens. Rows: (r0: t0 e1), (r0: t1 e0), (r0: t1 e1), (r1: t0 e5); token 0 adds e5 up first."""
    plan = travel(ids([5, 1], [0, 1]), None, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), num_ranks=2, merge=False)
    assert plan == Planned([0, 1, 1, 0], [[3, 0], [1, 2]], [1, 2, 3, 0], [1, 1, 1, 1], [3, 1], [3, 1])


@pytest.mark.parametrize("merge", [True, False])
def test_dropped_choices_do_not_travel(merge: bool) -> None:
    """Experts 0, 1 on rank 1; 2, 3 on rank 0. Kept: token 0's expert 0, token 2's expert 0; token 1 goes nowhere."""
    kept_TK = torch.tensor([[True, False], [False, False], [False, True]])
    plan = travel(ids([0, 3], [3, 2], [1, 0]), kept_TK, torch.tensor([1, 1, 0, 0]), num_ranks=2, merge=merge)
    assert plan == Planned([0, 2], [[0], [], [1]], [0, 5], [1, 1], [0, 2], [0, 2])


def test_travel_of_an_uneven_placement() -> None:
    """Experts 0..4 lie on ranks 2, 0, 2, 1, 0: one token's e0, e1, e2 are two rows, (r0: e1) and (r2: e0 e2)."""
    plan = travel(ids([0, 1, 2]), None, torch.tensor([2, 0, 2, 1, 0]), num_ranks=3, merge=True)
    assert plan == Planned([0, 0], [[0, 1]], [1, 0, 2], [1, 2], [1, 0, 1], [1, 0, 2])


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_travel_of_nothing(num_tokens: int, merge: bool) -> None:
    """No tokens, or every choice dropped: no row for any rank."""
    expert_ids_TK = torch.zeros(num_tokens, 2, dtype=torch.int64)
    plan = travel(expert_ids_TK, torch.zeros(num_tokens, 2, dtype=torch.bool), torch.tensor([0, 1]), 2, merge)
    assert plan == Planned([], [[]] * num_tokens, [], [], [0, 0], [0, 0])


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """(expert_ids_TK, kept_TK, rank_of_expert_E): each token's experts are distinct, as routers choose them."""
    num_tokens, num_experts = draw(st.integers(0, 6)), draw(st.integers(1, 6))
    num_choices = draw(st.integers(1, num_experts))
    experts = [draw(st.permutations(range(num_experts)))[:num_choices] for _ in range(num_tokens)]
    kept = [[draw(st.booleans()) for _ in range(num_choices)] for _ in range(num_tokens)]
    ranks = [draw(st.integers(0, 3)) for _ in range(num_experts)]
    shape = (num_tokens, num_choices)
    return (
        torch.tensor(experts, dtype=torch.int64).view(shape),
        torch.tensor(kept, dtype=torch.bool).view(shape),
        torch.tensor(ranks),
    )


@NAIVE
@given(routings(), st.booleans())
def test_plan_travel_equals_loops(routing: tuple[Tensor, Tensor, Tensor], merge: bool) -> None:
    """rows: (rank, token) of each travelling row; flat: t * K + k of each choice, in the order of travel."""
    expert_ids_TK, kept_TK, rank_of_expert_E = routing
    num_tokens, num_choices = expert_ids_TK.shape
    rows, flat, num_choices_of_row, row_of_choice = [], [], [], {}
    for rank in range(4):
        for t in range(num_tokens):
            here = [k for k in range(num_choices) if kept_TK[t, k] and rank_of_expert_E[expert_ids_TK[t, k]] == rank]
            for shared in ([here] if here else []) if merge else [[k] for k in here]:
                row_of_choice |= {(t, k): len(rows) for k in shared}
                flat += [t * num_choices + k for k in shared]
                rows.append((rank, t))
                num_choices_of_row.append(len(shared))

    plan = travel(expert_ids_TK, kept_TK, rank_of_expert_E, num_ranks=4, merge=merge)
    ranks = [rank for rank, count in enumerate(plan.rows_P) for _ in range(count)]
    assert list(zip(ranks, plan.token_U, strict=True)) == rows
    assert plan.flat_N == flat
    assert plan.num_choices_U == num_choices_of_row
    wanted_P = [sum(n for (r, _), n in zip(rows, num_choices_of_row, strict=True) if r == rank) for rank in range(4)]
    assert plan.choices_P == wanted_P
    for t, found in enumerate(plan.rows):
        wanted = [row_of_choice[t, k] for k in range(num_choices) if kept_TK[t, k]]
        assert found == (sorted(set(wanted)) if merge else wanted)


def test_a_table_of_rows_with_unequal_numbers_of_choices() -> None:
    """Row 1 has none."""
    row_N = torch.tensor([0, 0, 2, 3, 3, 3])
    choices = ChoicesByRow(row_N, torch.zeros(6, dtype=torch.int64), torch.zeros(6), num_rows=4)
    assert column_of_choice(choices).tolist() == [0, 1, 0, 0, 1, 2]
    table = row_table(choices, torch.arange(10, 16), width=3)
    assert table.tolist() == [[10, 11, NO_ROW], [NO_ROW] * 3, [12, NO_ROW, NO_ROW], [13, 14, 15]]


# ---------------------------------------------------------------------------------------------------------------------
# sort_by_expert, sources_table: orders and their inverses


def test_sort_by_expert_keeps_the_order_of_arrival() -> None:
    order_R, counts_e = sort_by_expert(torch.tensor([2, 0, 2, 0, 3]), num_local_experts=5)
    assert order_R.tolist() == [1, 3, 0, 2, 4]
    assert counts_e.tolist() == [2, 0, 2, 1, 0]


def test_sort_by_expert_of_nothing_and_of_one() -> None:
    order_R, counts_e = sort_by_expert(torch.zeros(0, dtype=torch.int64), num_local_experts=3)
    assert order_R.shape == (0,)
    assert counts_e.tolist() == [0, 0, 0]
    order_R, counts_e = sort_by_expert(torch.tensor([1]), num_local_experts=2)
    assert order_R.tolist() == [0]
    assert counts_e.tolist() == [0, 1]


def test_sort_by_expert_takes_the_slots_as_they_travel() -> None:
    """Slots cross the link as int32; counts are int64 all the same."""
    order_R, counts_e = sort_by_expert(torch.tensor([1, 0], dtype=torch.int32), num_local_experts=2)
    assert order_R.dtype == counts_e.dtype == torch.int64
    assert order_R.tolist() == [1, 0]


@NAIVE
@given(st.lists(st.integers(0, 4), max_size=20))
def test_sort_by_expert_equals_loops(slots: list[int]) -> None:
    order_R, counts_e = sort_by_expert(torch.tensor(slots, dtype=torch.int64), num_local_experts=5)
    assert order_R.tolist() == [row for expert in range(5) for row, slot in enumerate(slots) if slot == expert]
    assert counts_e.tolist() == [slots.count(expert) for expert in range(5)]


def test_sources_table() -> None:
    table = sources_table(torch.tensor([2, 0, 2, 2, 4]), num_sources=5, width=3)
    assert table.tolist() == [
        [1, NO_ROW, NO_ROW],
        [NO_ROW, NO_ROW, NO_ROW],
        [0, 2, 3],
        [NO_ROW, NO_ROW, NO_ROW],
        [4, NO_ROW, NO_ROW],
    ]


def test_sources_table_of_nothing() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert sources_table(nothing, num_sources=2, width=1).tolist() == [[NO_ROW], [NO_ROW]]
    assert sources_table(nothing, num_sources=0, width=2).shape == (0, 2)


@NAIVE
@given(st.lists(st.integers(0, 5), max_size=15))
def test_sources_table_equals_loops(sources: list[int]) -> None:
    width = max([sources.count(s) for s in sources], default=1)
    table = sources_table(torch.tensor(sources, dtype=torch.int64), num_sources=6, width=width)
    for source, row in enumerate(table.tolist()):
        users = [m for m, s in enumerate(sources) if s == source]
        assert row == users + [NO_ROW] * (width - len(users))


# ---------------------------------------------------------------------------------------------------------------------
# positions_in_queues: who stands where


def test_places_in_queues_by_hand() -> None:
    """Items 4, 3, 2, 1, 0 step up, to queues 1, 0, 1, 1, 0: queue 1 is 4, 2, 1 and queue 0 is 3, 0."""
    place_N = positions_in_queues(torch.tensor([0, 1, 1, 0, 1]), num_queues=3, order_N=torch.tensor([4, 3, 2, 1, 0]))
    assert place_N.tolist() == [1, 2, 1, 0, 0]
    assert place_N.dtype == torch.int64


@NAIVE
@given(st.data())
def test_places_in_queues_equal_loops(data: st.DataObject) -> None:
    queues = data.draw(st.lists(st.integers(0, 4), max_size=20))
    order = data.draw(st.permutations(range(len(queues))))
    as_tensor = [torch.tensor(numbers, dtype=torch.int64) for numbers in (queues, order)]
    lengths, expected = [0] * 5, [0] * len(queues)
    for item in order:
        expected[item] = lengths[queues[item]]
        lengths[queues[item]] += 1
    assert positions_in_queues(as_tensor[0], num_queues=5, order_N=as_tensor[1]).tolist() == expected


def test_a_long_queue_keeps_its_order() -> None:
    """A size at which an unstable sort no longer keeps the order of equals."""
    place_N = positions_in_queues(torch.zeros(5000, dtype=torch.int64), 1, torch.arange(5000))
    assert torch.equal(place_N, torch.arange(5000))


# ---------------------------------------------------------------------------------------------------------------------
# padded_positions: a block of equal length for each expert


def test_padded_places_by_hand() -> None:
    """Items of experts 2, 0, none, 0 in blocks of 3: places 6, 0, none, 1."""
    place_N, item_P = padded_positions(torch.tensor([2, 0, 3, 0]), num_slots=3, block_rows=3)
    assert place_N.tolist() == [6, 0, NO_ROW, 1]
    assert item_P.tolist() == [1, 3, NO_ROW, NO_ROW, NO_ROW, NO_ROW, 0, NO_ROW, NO_ROW]


@NAIVE
@given(st.data(), st.integers(1, 5), st.integers(0, 3))
def test_padded_places_equal_loops(data: st.DataObject, num_slots: int, spare: int) -> None:
    slots = data.draw(st.lists(st.integers(0, num_slots), max_size=9))
    block_rows = max([slots.count(slot) for slot in range(num_slots)]) + spare
    place_N, item_P = padded_positions(torch.tensor(slots, dtype=torch.int64), num_slots, block_rows)
    blocks = [[n for n, s in enumerate(slots) if s == slot] for slot in range(num_slots)]
    expected = [n for block in blocks for n in block + [NO_ROW] * (block_rows - len(block))]
    assert item_P.tolist() == expected
    assert place_N.tolist() == [expected.index(n) if n in expected else NO_ROW for n in range(len(slots))]


def test_padding_that_is_too_small_is_refused() -> None:
    with pytest.raises(AssertionError):
        padded_positions(torch.tensor([1, 1, 1, 0]), num_slots=2, block_rows=2)


# ---------------------------------------------------------------------------------------------------------------------
# gather_rows: the one primitive that moves rows


def test_gather_rows_adds_what_the_table_names() -> None:
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]], dtype=torch.float64)
    table = ids([0, 2], [NO_ROW, NO_ROW], [1, NO_ROW], [NO_ROW, 2])
    inverse_table = ids([0, NO_ROW], [2, NO_ROW], [0, 3])
    result = gather_rows(x, table, inverse_table)
    assert result.tolist() == [[5.0, 50.0], [0.0, 0.0], [2.0, 20.0], [4.0, 40.0]]


def test_gather_rows_of_duplicates() -> None:
    """One row read by three results has the sum of their gradients; a row that a result names twice counts twice."""
    x = torch.tensor([[3.0], [5.0]], dtype=torch.float64, requires_grad=True)
    result = gather_rows(x, ids([0], [0], [0]), ids([0, 1, 2], [NO_ROW, NO_ROW, NO_ROW]))
    assert result.tolist() == [[3.0], [3.0], [3.0]]
    result.backward(torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.float64))
    assert x.grad is not None
    assert x.grad.tolist() == [[111.0], [0.0]]
    assert gather_rows(x, ids([1, 1]), ids([NO_ROW, NO_ROW], [0, 0])).tolist() == [[10.0]]


@pytest.mark.parametrize(("num_rows", "num_results", "width"), [(0, 0, 1), (0, 3, 2), (3, 0, 2), (2, 3, 0), (1, 1, 1)])
def test_gather_rows_of_empty_shapes(num_rows: int, num_results: int, width: int) -> None:
    """Rows that name nothing are zero, and so are their gradients: shapes and the graph stay whole."""
    x = torch.ones(num_rows, 4, dtype=torch.float64, requires_grad=True)
    table = torch.full((num_results, width), NO_ROW)
    result = gather_rows(x, table, torch.full((num_rows, 2), NO_ROW))
    assert result.shape == (num_results, 4)
    assert not result.any()
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert not x.grad.any()


def test_a_table_without_a_width_names_one_source_each() -> None:
    """As the same table with width 1, forward and backward; sum_rows is the forward alone."""
    source_M, join = torch.tensor([2, 0, 2, 1]), sources_table(torch.tensor([2, 0, 2, 1]), num_sources=3, width=2)
    upstream = torch.tensor([[1.0], [10.0], [100.0], [1000.0]], dtype=torch.float64)
    gradients = []
    for table in (source_M, source_M[:, None]):
        x = torch.tensor([[3.0], [5.0], [7.0]], dtype=torch.float64, requires_grad=True)
        result = gather_rows(x, table, join)
        assert result.tolist() == sum_rows(x.detach(), table).tolist() == [[7.0], [3.0], [7.0], [5.0]]
        result.backward(upstream)
        assert x.grad is not None
        gradients.append(x.grad.tolist())
    assert gradients == [[[10.0], [1000.0], [101.0]]] * 2


def test_gather_rows_of_vectors() -> None:
    """Rows may have any further shape, also none."""
    assert gather_rows(torch.tensor([7, 8]), ids([1], [0]), ids([1], [0])).tolist() == [8, 7]
    assert gather_rows(torch.ones(2, 3, 4), ids([1]), ids([NO_ROW], [0])).shape == (1, 3, 4)


def test_a_dropped_row_hides_what_it_does_not_name() -> None:
    """NO_ROW reads row 0 and throws it away: not even NaN may shine through."""
    x = torch.tensor([[float("nan")], [1.0]], dtype=torch.float64)
    assert gather_rows(x, ids([NO_ROW, 1]), ids([NO_ROW], [0])).tolist() == [[1.0]]


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A combine table (each row of x used at most once), and its inverse."""
    num_rows, num_results, width = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    cells = draw(st.permutations(range(num_results * width)))[:num_rows]
    table = torch.full((num_results * width,), NO_ROW)
    inverse_table = torch.full((num_rows, 1), NO_ROW)
    for row, cell in enumerate(cells):
        table[cell], inverse_table[row] = row, cell // width
    return table.view(num_results, width), inverse_table


@NAIVE
@given(tables())
def test_gather_rows_equals_loops(pair: tuple[Tensor, Tensor]) -> None:
    """Both directions: results of the table, and of its inverse as the gradient."""
    table, inverse_table = pair
    numbers = [float(row + 1) ** 2 for row in range(len(inverse_table))]
    x = torch.tensor(numbers, dtype=torch.float64)[:, None].requires_grad_()
    result = gather_rows(x, table, inverse_table)
    assert result.tolist() == [[sum(numbers[row] for row in rows if row != NO_ROW)] for rows in table.tolist()]
    upstream = 10.0 ** torch.arange(len(table), dtype=torch.float64)[:, None]
    result.backward(upstream)
    assert x.grad is not None
    for row, users in enumerate(inverse_table.tolist()):
        assert float(x.grad[row]) == sum(float(upstream[m]) for m in users if m != NO_ROW)


def test_gradient_of_gather_rows() -> None:
    """Spreading tokens over rows (dispatch) and adding rows up (combine), to second order."""
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    source_M = torch.tensor([2, 0, 2, 1])
    spread, join = source_M[:, None], sources_table(source_M, num_sources=3, width=2)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, spread, join), x)
    assert torch.autograd.gradcheck(lambda x: gather_rows(gather_rows(x, spread, join), join, spread).sin(), x)
    assert torch.autograd.gradgradcheck(lambda x: gather_rows(x, spread, join).sin(), x)


@NAIVE
@given(routings(), st.booleans())
def test_every_token_is_carried_and_none_twice(routing: tuple[Tensor, Tensor, Tensor], merge: bool) -> None:
    """Rows that carry their token's number go out to the ranks and come back: each as often as it was sent."""
    expert_ids_TK, kept_TK, rank_of_expert_E = routing
    token_names_TD = torch.arange(len(expert_ids_TK), dtype=torch.float64)[:, None] + 1000.0
    plan = travel(expert_ids_TK, kept_TK, rank_of_expert_E, num_ranks=4, merge=merge)
    token_U = torch.tensor(plan.token_U, dtype=torch.int64)
    x_UD = gather_rows(token_names_TD, token_U, plan.rows_L)
    assert x_UD.flatten().tolist() == [1000.0 + t for t in plan.token_U]
    y_TD = gather_rows(x_UD, plan.rows_L, token_U)
    for t in range(len(expert_ids_TK)):
        ranks = [int(rank_of_expert_E[e]) for e, kept in zip(expert_ids_TK[t], kept_TK[t], strict=True) if kept]
        assert float(y_TD[t]) == len(set(ranks) if merge else ranks) * (1000.0 + t)


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=["embedding bag", "column by column, as on a GPU"])
def test_bfloat16_sums_are_taken_in_float32_and_rounded_once(shape: tuple[int, ...]) -> None:
    """1 + 2^-9 + 2^-9 + 2^-9: a bfloat16 sum, rounded at each step, would stay 1."""
    tiny = 2.0**-9
    x = torch.tensor([1.0, tiny, tiny, tiny], dtype=torch.bfloat16).view(4, *shape)
    result = gather_rows(x, ids([0, 1, 2, 3]), ids([0], [0], [0], [0]))
    assert result.dtype == torch.bfloat16
    assert float(result) == float(torch.tensor(1.0 + 3 * tiny).bfloat16()) > 1.0
    stepwise = x[0] + x[1] + x[2] + x[3]
    assert float(stepwise) == 1.0

    y = torch.zeros(1, *shape, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(y, ids([0], [0], [0], [0]), ids([0, 1, 2, 3])).backward(x)
    assert y.grad is not None
    assert float(y.grad) == float(result)


def test_sums_are_added_in_the_order_of_the_table() -> None:
    """(big + -big) + small is small; (big + small) + -big is 0. So the order is seen in the result, bit for bit."""
    x = torch.tensor([[1e20], [-1e20], [1.0]], dtype=torch.float64)
    no_inverse = torch.full((3, 1), NO_ROW)
    assert float(gather_rows(x, ids([0, 1, 2]), no_inverse)) == 1.0
    assert float(gather_rows(x, ids([0, 2, 1]), no_inverse)) == 0.0


def test_gather_rows_repeats_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    source_M = torch.randint(0, 50, (400,), generator=generator)
    spread = source_M[:, None]
    join = sources_table(source_M, 50, int(source_M.bincount().max()))
    y = torch.randn(400, 8, generator=generator)

    def run() -> tuple[Tensor, Tensor]:
        x = y.clone().requires_grad_()
        joined = gather_rows(x, join, spread)
        joined.backward(y[:50])
        assert x.grad is not None
        return joined.detach(), x.grad

    first, second = run(), run()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# ---------------------------------------------------------------------------------------------------------------------
# IndexTable: on the device of the weights, whatever happens to them


class WithTable(nn.Module):
    """A module with a weight and a table, as a layer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.empty(2)), IndexTable([5, 7, 6])


def test_an_index_table_keeps_its_values_where_weights_have_none() -> None:
    """A model that is built on the meta device and then given memory has lost all buffers; DistributedDataParallel
    would overwrite them with rank 0's."""
    with torch.device("meta"):
        module = WithTable()
    assert module.weight.is_meta
    for moved in (module.to_empty(device="cpu"), module.double(), copy.deepcopy(module)):
        assert moved.table(torch.tensor([2, 0])).tolist() == [6, 5]
        assert moved.table.values.dtype == torch.int64
    assert not list(module.buffers())
    assert list(module.state_dict()) == ["weight"]


def test_an_index_table_follows_keys_that_are_elsewhere() -> None:
    """`fully_shard` moves weights to its mesh's device, and tells no module. The meta device stands for a GPU."""
    assert IndexTable([5, 7, 6])(torch.tensor([2, 0], device="meta")).device.type == "meta"
