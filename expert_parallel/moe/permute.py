"""Index maths of dispatch and combine: pure functions of tensors, no communication.

One primitive moves rows in both directions: `gather_rows` reads, for each row of its result, the rows that an index
table names, and adds them in the table's order. Its gradient is the same operation with the inverse table. So
there are no scatter-adds and no atomics: every sum has a fixed order and a rerun gives the same bits.
"""

from typing import Any

import torch
from torch import Tensor

NO_ROW = -1


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


def padded_tables(counts_e: Tensor, padded_rows: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """(row_P, place_R): each expert's rows, in a block of `padded_rows`. row_P: (e * padded_rows, 1), the row at each
    place, NO_ROW behind an expert's last one. place_R: the place of each row. counts_e: none is above padded_rows."""
    num_local = len(counts_e)
    expert_R = torch.arange(num_local, device=counts_e.device).repeat_interleave(counts_e, output_size=num_rows)
    start_e = counts_e.cumsum(0) - counts_e
    within_R = torch.arange(num_rows, device=counts_e.device) - start_e[expert_R]
    assert num_rows == 0 or int(within_R.max()) < padded_rows, (counts_e, padded_rows)
    place_R = expert_R * padded_rows + within_R
    return sources_table(place_R, num_local * padded_rows, 1), place_R


def places_in_queues(queue_N: Tensor, num_queues: int, order_N: Tensor) -> Tensor:
    """The place, 0 first, of each item in its queue, where the items step up in the order `order_N`. int64 (N).

    Counted with stable sorts: a top-k over a 0/1 mask would keep arbitrary items.
    """
    order_N = order_N[queue_N[order_N].argsort(stable=True)]
    counts_Q = torch.bincount(queue_N, minlength=num_queues)
    start_Q = counts_Q.cumsum(0) - counts_Q
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device) - start_Q[queue_N[order_N]]
    return place_N


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
        return sum_rows(x, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_table,) = ctx.saved_tensors
        return sum_rows(grad, inverse_table), None, None


def sum_rows(x: Tensor, table: Tensor) -> Tensor:
    """gather_rows without a gradient."""
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
