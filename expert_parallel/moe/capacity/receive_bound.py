"""A bound on the rows that one rank computes, for dropless layers: one hot expert cannot exhaust its rank's memory."""

import math
from dataclasses import replace
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.moe.dispatch.permute import positions_in_queues
from expert_parallel.moe.types import Outcome, RoutingPlan
from expert_parallel.parallel.collectives import all_gather_rows, group_rank, group_size


def apply_receive_bound(
    bound: float, plan: RoutingPlan, rank_TK: Tensor, group: dist.ProcessGroup | None
) -> RoutingPlan:
    """Marks what is beyond DROPPED_RECEIVE_BOUND. No rank computes more than ceil(bound * N / P) of the group's N kept
    choices. rank_TK: int64, the rank of the group that holds each choice's expert.

    A rank that more want to reach lets each source send the share of what it wants to, rounded down, and one more to
    the first ranks until the bound is reached. A source sends its first choices first, then by position. Depends on
    the layout by nature. One small collective; every rank calls it.
    """
    num_ranks = group_size(group)
    kept_TK = plan.kept_TK
    rank_TK = rank_TK.masked_fill(~kept_TK, num_ranks)
    wanted_P = torch.bincount(rank_TK.flatten(), minlength=num_ranks + 1)[:num_ranks]
    wanted_SP = all_gather_rows(wanted_P[None], [1] * num_ranks, group)  # what each source wants to send to each rank
    allowed_P = send_quotas(wanted_SP, bound)[group_rank(group)]
    order_N = torch.arange(rank_TK.numel(), device=rank_TK.device).view(rank_TK.shape).T.flatten()
    place_TK = positions_in_queues(rank_TK.flatten(), num_ranks + 1, order_N).view_as(rank_TK)
    beyond_TK = kept_TK & (place_TK >= torch.cat([allowed_P, allowed_P.new_zeros(1)])[rank_TK])
    return replace(plan, outcome_TK=plan.outcome_TK.masked_fill(beyond_TK, Outcome.DROPPED_RECEIVE_BOUND))


def send_quotas(wanted_SP: Tensor, bound: float) -> Tensor:
    """Choices that each source may send to each rank, int64 (P, P): no column sums to more than the bound."""
    num_ranks = len(wanted_SP)
    factor = Fraction(str(bound)) / num_ranks
    most = math.ceil(factor * int(wanted_SP.sum()))
    total_P = wanted_SP.sum(0)
    share_SP = wanted_SP * most // total_P.clamp(min=1)
    rest_P = most - share_SP.sum(0)
    more_SP = share_SP < wanted_SP
    share_SP = share_SP + (more_SP & (more_SP.cumsum(0) <= rest_P))
    return torch.where(total_P > most, share_SP, wanted_SP)
