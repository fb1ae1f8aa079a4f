"""Index maths of dispatch and combine: pure functions of tensors, no communication.

One primitive moves rows in both directions: `gather_rows` reads, for each row of its result, the rows that an index
table names, and adds them in the table's order. Its gradient is the same operation with the inverse table. So
no row is added by scatter or atomics: every sum has a fixed order and a rerun gives the same bits.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NO_ROW = -1


def count_keys(keys_N: Tensor, num_keys: int) -> Tensor:
    """How often each key of 0 to num_keys - 1 occurs, int64. On a GPU bincount would make the host wait."""
    if keys_N.device.type == "cpu":
        return torch.bincount(keys_N, minlength=num_keys)
    return keys_N.new_zeros(num_keys).scatter_add_(0, keys_N, torch.ones_like(keys_N))


def stable_argsort(keys_N: Tensor, num_keys: int) -> Tensor:
    """The order that sorts keys of 0 to num_keys - 1, equal ones as they stood; int64. On the CPU, numpy's radix sort
    of 16-bit numbers: ten times as fast as torch's sort (moe/MEASUREMENTS.md, log)."""
    if keys_N.device.type == "cpu" and num_keys <= 2**15:
        return torch.from_numpy(np.argsort(keys_N.to(torch.int16).numpy(), kind="stable"))
    return keys_N.argsort(stable=True)


def inverse(order_N: Tensor) -> Tensor:
    """The place of each item of a permutation, int64."""
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))


def sort_by_expert(slot_R: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor]:
    """(order_R, counts_e): order_R[i] is the choice that becomes row i when choices are grouped by local expert.

    Stable: within an expert the order of arrival stays. counts_e: int64, on slot_R's device.
    """
    order_R = stable_argsort(slot_R, num_local_experts)
    return order_R, count_keys(slot_R, num_local_experts)


def padded_places(slot_N: Tensor, num_slots: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """(place_N, item_P): items grouped by slot, each slot in a block of `block_rows` places, in their order.

    slot_N: int64; num_slots for an item that has none. place_N: of each item, NO_ROW of one without a slot. item_P: the
    item at each place, (num_slots * block_rows), NO_ROW behind a slot's last. No slot may have more than `block_rows`.
    Shapes do not depend on what is in slot_N: no GPU need be waited for.
    """
    order_N, counts = stable_argsort(slot_N, num_slots + 1), count_keys(slot_N, num_slots + 1)
    assert not slot_N.is_cpu or bool((counts[:num_slots] <= block_rows).all()), (counts, block_rows)
    sorted_N, start, nowhere = slot_N.index_select(0, order_N), counts.cumsum(0) - counts, num_slots * block_rows
    within_N = torch.arange(len(slot_N), device=slot_N.device) - start.index_select(0, sorted_N)
    place_N = torch.where(sorted_N < num_slots, sorted_N * block_rows + within_N, nowhere)
    place_N = torch.empty_like(place_N).scatter_(0, order_N, place_N)
    item_P = place_N.new_full((nowhere + 1,), NO_ROW)
    item_P.scatter_(0, place_N, torch.arange(len(place_N), device=place_N.device))
    return place_N.masked_fill(place_N == nowhere, NO_ROW), item_P[:nowhere]


def places_in_queues(queue_N: Tensor, num_queues: int, order_N: Tensor) -> Tensor:
    """The place, 0 first, of each item in its queue, where the items step up in the order `order_N`. int64 (N).

    Counted with stable sorts: a top-k over a 0/1 mask would keep arbitrary items.
    """
    order_N = order_N[stable_argsort(queue_N[order_N], num_queues)]
    counts_Q = count_keys(queue_N, num_queues)
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
        return x.index_select(0, table)
    num_rows, width = table.shape
    if x.shape[0] == 0 or width == 0:
        return x.new_zeros((num_rows, *x.shape[1:]))
    if x.device.type == "cpu" and x.dim() == 2 and width > 1 and x.is_floating_point():
        return _sum_bags(x, table)
    total = None
    for column in table.unbind(1):
        absent = (column == NO_ROW).view(-1, *[1] * (x.dim() - 1))
        rows = x.index_select(0, column.clamp(min=0)).masked_fill_(absent, 0)
        if width == 1:
            return rows
        rows = rows.to(torch.promote_types(torch.float32, x.dtype))
        total = rows if total is None else total.add_(rows)
    assert total is not None
    return total.to(x.dtype)


def _sum_bags(x: Tensor, table: Tensor) -> Tensor:
    """On the CPU one pass over memory instead of one for each column: an embedding whose bags are the table's rows. It
    adds 16-bit numbers in float32, too, and rounds once."""
    present = table != NO_ROW
    counts = present.sum(1)
    return F.embedding_bag(table[present], x, counts.cumsum(0) - counts, mode="sum")
