"""Index maths of dispatch and combine: hand-written numbers, naive loops, and rows that name their source."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_parallel.moe.permute import NO_ROW, gather_rows, group_by_rank, sort_by_expert, sources_table

NAIVE = settings(max_examples=60, deadline=None, derandomize=True)


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


# ---------------------------------------------------------------------------------------------------------------------
# group_by_rank: token-major choices -> rank-major rows


def test_group_by_rank_merges_choices_on_one_rank() -> None:
    expert_ids_TK = ids([5, 1], [0, 1])  # the two tokens of the docstring: experts 0-3 on rank 0, 4-7 on rank 1
    order = group_by_rank(expert_ids_TK, torch.ones(2, 2, dtype=torch.bool), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    assert order.rank_U.tolist() == [0, 0, 1]
    assert order.token_U.tolist() == [0, 1, 0]
    assert order.row_N.tolist() == [0, 1, 1, 2]
    assert order.expert_N.tolist() == [1, 0, 1, 5]
    assert order.choice_N.tolist() == [1, 2, 3, 0]


def test_group_by_rank_leaves_dropped_choices_out() -> None:
    expert_ids_TK = ids([0, 3], [3, 2], [1, 0])
    kept_TK = torch.tensor([[True, False], [False, False], [False, True]])
    order = group_by_rank(expert_ids_TK, kept_TK, torch.tensor([1, 1, 0, 0]))
    assert order.rank_U.tolist() == [1, 1]
    assert order.token_U.tolist() == [0, 2]  # token 1 travels nowhere
    assert order.row_N.tolist() == [0, 1]
    assert order.expert_N.tolist() == [0, 0]
    assert order.choice_N.tolist() == [0, 5]


def test_group_by_rank_of_an_uneven_placement() -> None:
    # Experts 0..4 lie on ranks 2, 0, 2, 1, 0.
    order = group_by_rank(ids([0, 1, 2]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([2, 0, 2, 1, 0]))
    assert order.rank_U.tolist() == [0, 2]
    assert order.token_U.tolist() == [0, 0]
    assert order.row_N.tolist() == [0, 1, 1]
    assert order.expert_N.tolist() == [1, 0, 2]
    assert order.choice_N.tolist() == [1, 0, 2]


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_group_by_rank_of_nothing(num_tokens: int) -> None:
    """No tokens, or every choice dropped: five empty int64 tensors."""
    expert_ids_TK = torch.zeros(num_tokens, 2, dtype=torch.int64)
    order = group_by_rank(expert_ids_TK, torch.zeros(num_tokens, 2, dtype=torch.bool), torch.tensor([0, 1]))
    for tensor in (order.token_U, order.rank_U, order.row_N, order.expert_N, order.choice_N):
        assert tensor.shape == (0,)
        assert tensor.dtype == torch.int64


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
@given(routings())
def test_group_by_rank_equals_loops(routing: tuple[Tensor, Tensor, Tensor]) -> None:
    expert_ids_TK, kept_TK, rank_of_expert_E = routing
    num_tokens, num_choices = expert_ids_TK.shape
    rows, choices = [], []
    for rank in range(4):
        for t in range(num_tokens):
            here = [
                (len(rows), int(expert_ids_TK[t, k]), t * num_choices + k)
                for k in range(num_choices)
                if kept_TK[t, k] and rank_of_expert_E[expert_ids_TK[t, k]] == rank
            ]
            choices += here
            rows += [(rank, t)] if here else []

    order = group_by_rank(expert_ids_TK, kept_TK, rank_of_expert_E)
    assert list(zip(order.rank_U.tolist(), order.token_U.tolist(), strict=True)) == rows
    found = zip(order.row_N.tolist(), order.expert_N.tolist(), order.choice_N.tolist(), strict=True)
    assert list(found) == choices


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
@given(routings())
def test_every_token_is_carried_and_none_twice(routing: tuple[Tensor, Tensor, Tensor]) -> None:
    """Rows that carry their token's number go out to the ranks and come back: each as often as it was sent."""
    expert_ids_TK, kept_TK, rank_of_expert_E = routing
    num_tokens, num_choices = expert_ids_TK.shape
    token_names_TD = torch.arange(num_tokens, dtype=torch.float64)[:, None] + 1000.0
    order = group_by_rank(expert_ids_TK, kept_TK, rank_of_expert_E)
    row_TP = sources_table(order.token_U, num_tokens, min(num_choices, 4))
    x_UD = gather_rows(token_names_TD, order.token_U[:, None], row_TP)
    assert x_UD.flatten().tolist() == [1000.0 + t for t in order.token_U.tolist()]
    y_TD = gather_rows(x_UD, row_TP, order.token_U[:, None])
    for t in range(num_tokens):
        ranks = {int(rank_of_expert_E[e]) for e, kept in zip(expert_ids_TK[t], kept_TK[t], strict=True) if kept}
        assert float(y_TD[t]) == len(ranks) * (1000.0 + t)


def test_bfloat16_sums_are_taken_in_float32_and_rounded_once() -> None:
    """1 + 2^-9 + 2^-9 + 2^-9: a bfloat16 sum, rounded at each step, would stay 1."""
    tiny = 2.0**-9
    x = torch.tensor([[1.0], [tiny], [tiny], [tiny]], dtype=torch.bfloat16)
    result = gather_rows(x, ids([0, 1, 2, 3]), ids([0], [0], [0], [0]))
    assert result.dtype == torch.bfloat16
    assert float(result) == float(torch.tensor(1.0 + 3 * tiny).bfloat16()) > 1.0
    stepwise = x[0] + x[1] + x[2] + x[3]
    assert float(stepwise) == 1.0

    y = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
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
