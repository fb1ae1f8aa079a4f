"""Exchanges rows for expert tensor parallelism (ETP), which shards the hidden columns of each expert over a group.

Each rank of the group has rows of its own, which all of them must multiply:

    all-gather      the rows of all ranks, grouped by expert:   (r0: e0 e1)(r1: e0 e1)  ->  (e0: r0 r1)(e1: r0 r1)
    reduce-scatter  the partial outputs of all ranks, summed in the order of the ranks on the rank that owns the row

Each is the gradient of the other (Korthikanti et al. 2022, section 4.2.2: g and its conjugate, for rows).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from expert_parallel.moe.dispatch.permute import sort_by_expert
from expert_parallel.parallel.collectives import all_gather_rows, all_to_all_rows, group_rank, group_size


@dataclass(frozen=True)
class GatheredRows:
    """Describes the order of gathered rows.

    rows_P: the number of rows of each rank. order_G: int64, the permutation that groups rows by expert, from the order
    of the ranks. place_G: its inverse.
    """

    group: dist.ProcessGroup | None
    rows_P: list[int]
    order_G: Tensor
    place_G: Tensor


def all_gather_by_expert(
    x_RD: Tensor, counts_e: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, GatheredRows | None]:
    """Gathers the rows of all ranks of the group, grouped by expert and, for each expert, ordered by rank.

    x_RD: this rank's rows, grouped by expert; their number may differ between ranks and may be 0. Returns x_GD, its
    number of rows for each expert, and the argument of `reduce_scatter_by_expert`. Takes two collectives: one for the
    numbers and one for the rows, padded to the largest rank's number. A group of one rank returns its input.
    """
    num_ranks, num_local = group_size(group), len(counts_e)
    if num_ranks == 1:
        return x_RD, counts_e, None
    counts_Pe = all_gather_rows(counts_e[None], [1] * num_ranks, group)
    rows_P = counts_Pe.sum(1).tolist()  # the host waits: numbers of rows become shapes
    slot_G = torch.arange(num_local, device=x_RD.device).repeat(num_ranks)
    slot_G = slot_G.repeat_interleave(counts_Pe.flatten(), output_size=sum(rows_P))
    order_G, total_e = sort_by_expert(slot_G, num_local)
    place_G = torch.empty_like(order_G)
    place_G[order_G] = torch.arange(len(order_G), device=order_G.device)
    rows = GatheredRows(group, rows_P, order_G, place_G)
    return _AllGather.apply(x_RD, rows), total_e, rows


def reduce_scatter_by_expert(y_GD: Tensor, rows: GatheredRows | None) -> Tensor:
    """Returns y_RD: for each row of this rank, the sum over the ranks of their partial outputs.

    y_GD: this rank's partial outputs of the gathered rows. Summed in promote_types(float32, y's dtype), in the order of
    the ranks, and rounded once, so that a rerun gives the same bits.
    """
    return y_GD if rows is None else _ReduceScatter.apply(y_GD, rows)


def _gather(x_RD: Tensor, rows: GatheredRows) -> Tensor:
    return all_gather_rows(x_RD, rows.rows_P, rows.group)[rows.order_G]


def _add_up(y_GD: Tensor, rows: GatheredRows) -> Tensor:
    """Sums the partial outputs of this rank's rows. Uses an all-to-all, since a reduce-scatter leaves the order of the
    sum and its dtype to the backend."""
    mine, num_ranks = rows.rows_P[group_rank(rows.group)], len(rows.rows_P)
    received = all_to_all_rows(y_GD[rows.place_G], rows.rows_P, [mine] * num_ranks, rows.group)
    first, *others = received.view(num_ranks, mine, *y_GD.shape[1:]).unbind(0)
    total = first.to(torch.promote_types(torch.float32, y_GD.dtype))
    for part in others:
        total = total + part
    return total.to(y_GD.dtype)


class _AllGather(torch.autograd.Function):
    """Gathers rows; in the backward pass, sums their gradients over the ranks."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, rows: GatheredRows) -> Tensor:
        ctx.rows = rows
        return _gather(x_RD, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GD: Tensor) -> tuple[Tensor | None, ...]:
        return _add_up(grad_GD, ctx.rows), None


class _ReduceScatter(torch.autograd.Function):
    """Sums partial outputs over the ranks; in the backward pass, gathers their gradients."""

    @staticmethod
    def forward(ctx: Any, y_GD: Tensor, rows: GatheredRows) -> Tensor:
        ctx.rows = rows
        return _add_up(y_GD, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grad_RD, ctx.rows), None
