"""Index maths of dispatch and combine: pure functions of tensors, no communication.

One primitive moves rows in both directions: `gather_rows` reads, for each row of its result, the rows that an index
table names, and adds them in the table's order. Its gradient is the same operation with the inverse table. So
there are no scatter-adds and no atomics: every sum has a fixed order and a rerun gives the same bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NO_ROW = -1


@dataclass(frozen=True)
class ChoiceOrder:
    """The kept choices of this rank's tokens, grouped by destination rank, then token, then choice.

    token_U, rank_U: token and destination of each row that travels (int64; sorted by rank, then token).
    row_N, expert_N, choice_N: for each kept choice its row, its global expert, its flat index t * K + k (int64).
    """

    token_U: Tensor
    rank_U: Tensor
    row_N: Tensor
    expert_N: Tensor
    choice_N: Tensor


def group_by_rank(expert_ids_TK: Tensor, kept_TK: Tensor, rank_of_expert_E: Tensor) -> ChoiceOrder:
    """Merges a token's choices on one rank into one row.

    token-major (t0: e5 e1)(t1: e0 e1)  ->  rank-major (r0: t0 e1)(r0: t1 e0 e1)(r1: t0 e5)
    """
    num_tokens, num_choices = expert_ids_TK.shape
    choice_N = kept_TK.flatten().nonzero().squeeze(1)
    expert_N = expert_ids_TK.flatten()[choice_N]
    pair_N = rank_of_expert_E[expert_N] * num_tokens + choice_N // num_choices  # (rank, token) as one number
    pair_N, order_N = pair_N.sort(stable=True)  # stable: choices of a pair stay in choice order
    pair_U, row_N = torch.unique_consecutive(pair_N, return_inverse=True)
    num_tokens = max(num_tokens, 1)
    return ChoiceOrder(pair_U % num_tokens, pair_U // num_tokens, row_N, expert_N[order_N], choice_N[order_N])


def sort_by_expert(slot_R: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor]:
    """(order_R, counts_e): order_R[i] is the choice that becomes row i when choices are grouped by local expert.

    Stable: within an expert the order of arrival stays. counts_e: int64, on slot_R's device.
    """
    order_R = slot_R.argsort(stable=True)
    return order_R, torch.bincount(slot_R, minlength=num_local_experts)


def sources_table(source_M: Tensor, num_sources: int, width: int) -> Tensor:
    """The inverse of `result[m] = x[source_M[m]]`: row s lists, ascending, every m whose source is s.

    source_M: int64 (M). Returns int64 (num_sources, width), filled up with NO_ROW. No source may be used more
    than `width` times.
    """
    order_M = source_M.argsort(stable=True)
    counts = torch.bincount(source_M, minlength=num_sources)
    start = counts.cumsum(0) - counts
    sorted_source_M = source_M[order_M]
    place_M = torch.arange(len(source_M), device=source_M.device) - start[sorted_source_M]
    table = source_M.new_full((num_sources, width), NO_ROW)
    table[sorted_source_M, place_M] = order_M
    return table


def gather_rows(x: Tensor, table: Tensor, inverse_table: Tensor) -> Tensor:
    """result[m] = sum over j of x[table[m, j]], added in the order of j; NO_ROW adds nothing.

    x: (L, ...). table: int64 (M, width), or (M) where each result has exactly one source. inverse_table: the same the
    other way round: row l lists the results that use x[l]. Sums are taken in promote_types(float32, x.dtype) and
    rounded once. Returns (M, ...) in x's dtype.
    """
    return _GatherRows.apply(x, table, inverse_table)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, inverse_table: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_table)
        return _sum_rows(x, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_table,) = ctx.saved_tensors
        return _sum_rows(grad, inverse_table), None, None


def _sum_rows(x: Tensor, table: Tensor) -> Tensor:
    if table.dim() == 1:
        return x[table]
    num_rows, width = table.shape
    if x.shape[0] == 0 or width == 0:
        return x.new_zeros((num_rows, *x.shape[1:]))
    total = None
    for column in table.unbind(1):
        absent = (column == NO_ROW).view(-1, *[1] * (x.dim() - 1))
        rows = x[column.clamp(min=0)].masked_fill_(absent, 0)
        if width == 1:
            return rows
        rows = rows.to(torch.promote_types(torch.float32, x.dtype))
        total = rows if total is None else total.add_(rows)
    assert total is not None
    return total.to(x.dtype)
