"""Implements the index arithmetic of dispatch and combine: pure functions of tensors, without communication.

One primitive moves rows in both directions: `gather_rows` reads, for each row of its result, the rows that an index
table names, and sums them in the table's order. Its gradient is the same operation with the inverse table. So no row is
added by scatter or atomics: every sum has a fixed order, and a rerun gives the same bits.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NO_ROW = -1  # in a table of rows: no row. As an index it reads the last entry.


def count_keys(keys_N: Tensor, num_keys: int) -> Tensor:
    """Returns how often each key in [0, num_keys) occurs, int64 (num_keys)."""
    if keys_N.device.type == "cpu":  # on a GPU bincount would make the host wait for the largest key
        return torch.bincount(keys_N, minlength=num_keys)
    return keys_N.new_zeros(num_keys).scatter_add_(0, keys_N, torch.ones_like(keys_N))


def stable_argsort(keys_N: Tensor, num_keys: int) -> Tensor:
    """Returns the permutation that sorts keys in [0, num_keys), equal keys in their order; int64.

    On the CPU by numpy's radix sort of 16-bit integers: ten times as fast as torch's sort (moe/MEASUREMENTS.md).
    """
    if keys_N.device.type == "cpu" and num_keys <= 2**15:
        return torch.from_numpy(np.argsort(keys_N.to(torch.int16).numpy(), kind="stable"))
    return keys_N.argsort(stable=True)


def inverse_permutation(order_N: Tensor) -> Tensor:
    """Returns the inverse of a permutation, int64: for each item i, the position at which order_N lists it."""
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))


def sort_by_expert(slot_R: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor]:
    """Returns (order_R, counts_e): order_R[i] is the choice that becomes row i when choices are grouped by local
    expert.

    slot_R: int64, the local expert of each choice. The sort is stable: choices of one expert keep their order.
    counts_e: int64, the number of choices of each local expert, on slot_R's device.
    """
    order_R = stable_argsort(slot_R, num_local_experts)
    return order_R, count_keys(slot_R, num_local_experts)


def padded_positions(slot_N: Tensor, num_slots: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """Groups items by slot, each slot having `block_rows` consecutive places. Returns (place_N, item_P).

    slot_N: int64, the slot of each item; num_slots for an item without slot. place_N: the place of each item, NO_ROW
    for an item without slot. item_P: the item at each place, (num_slots * block_rows), NO_ROW for padding. No slot may
    have more than `block_rows` items. Shapes do not depend on the values of slot_N, so the host does not wait for a
    GPU.
    """
    order_N = stable_argsort(slot_N, num_slots + 1)
    counts = count_keys(slot_N, num_slots + 1)
    assert not slot_N.is_cpu or bool((counts[:num_slots] <= block_rows).all()), (counts, block_rows)
    sorted_N = slot_N.index_select(0, order_N)
    start = counts.cumsum(0) - counts
    no_place = num_slots * block_rows  # one place beyond the last, cut off below
    within_N = torch.arange(len(slot_N), device=slot_N.device) - start.index_select(0, sorted_N)
    place_N = torch.where(sorted_N < num_slots, sorted_N * block_rows + within_N, no_place)
    place_N = torch.empty_like(place_N).scatter_(0, order_N, place_N)
    item_P = place_N.new_full((no_place + 1,), NO_ROW)
    item_P.scatter_(0, place_N, torch.arange(len(place_N), device=place_N.device))
    return place_N.masked_fill(place_N == no_place, NO_ROW), item_P[:no_place]


def positions_in_queues(queue_N: Tensor, num_queues: int, order_N: Tensor) -> Tensor:
    """Returns the position of each item in its queue, from 0, if the items queue up in the order `order_N`; int64 (N).

    queue_N: int64, the queue of each item. Computed by stable sorts: a top-k over a 0/1 mask would keep arbitrary
    items.
    """
    order_N = order_N[stable_argsort(queue_N[order_N], num_queues)]
    counts_Q = count_keys(queue_N, num_queues)
    start_Q = counts_Q.cumsum(0) - counts_Q
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device) - start_Q[queue_N[order_N]]
    return place_N


def gather_rows(x: Tensor, table: Tensor, inverse_table: Tensor) -> Tensor:
    """Computes result[m] = sum over j of x[table[m, j]], in the order of j; NO_ROW adds nothing.

    x: (L, ...). table: int64 (M, width), or (M) if each result has exactly one source. inverse_table: row l lists the
    results that use x[l]; the table of the gradient. Sums are taken in promote_types(float32, x.dtype) and rounded
    once. Returns (M, ...) in x's dtype.
    """
    return _GatherRows.apply(x, table, inverse_table)


class _GatherRows(torch.autograd.Function):
    """Gathers rows by a table, and their gradients by the inverse table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, inverse_table: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_table)
        return sum_rows(x, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_table,) = ctx.saved_tensors
        return sum_rows(grad, inverse_table), None, None


def sum_rows(x: Tensor, table: Tensor) -> Tensor:
    """Computes the sums of `gather_rows`, without a gradient."""
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
    """Sums rows on the CPU in one pass over memory, as an embedding bag for each row of the table. It sums 16-bit
    floats in float32 and rounds once."""
    present = table != NO_ROW
    counts = present.sum(1)
    return F.embedding_bag(table[present], x, counts.cumsum(0) - counts, mode="sum")
