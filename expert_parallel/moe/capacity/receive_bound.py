"""Bounds the rows that one rank computes in a dropless layer, so that a hot expert cannot exhaust its rank's memory."""

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
    """Marks choices DROPPED_RECEIVE_BOUND so that no rank computes more than ceil(bound * N / P) of the group's N kept
    choices.

    rank_TK: int64, the rank of the group that holds the expert of each choice. If more choices than that want one rank,
    each source rank may send its proportional share, rounded down, and the first sources one more each until the bound
    is reached (see `send_quotas`). A source keeps first choices before second ones, each by position. What is dropped
    depends on the layout. One small all-gather; every rank of the group calls this.
    """
    num_ranks = group_size(group)
    kept_TK = plan.kept_TK
    rank_TK = rank_TK.masked_fill(~kept_TK, num_ranks)
    # On a GPU the host waits for bincount, and below in send_quotas for the total.
    wanted_P = torch.bincount(rank_TK.flatten(), minlength=num_ranks + 1)[:num_ranks]
    wanted_SP = all_gather_rows(wanted_P[None], [1] * num_ranks, group)  # choices of each source for each rank
    allowed_P = send_quotas(wanted_SP, bound)[group_rank(group)]
    order_N = torch.arange(rank_TK.numel(), device=rank_TK.device).view(rank_TK.shape).T.flatten()
    place_TK = positions_in_queues(rank_TK.flatten(), num_ranks + 1, order_N).view_as(rank_TK)
    excess_TK = kept_TK & (place_TK >= torch.cat([allowed_P, allowed_P.new_zeros(1)])[rank_TK])
    return replace(plan, outcome_TK=plan.outcome_TK.masked_fill(excess_TK, Outcome.DROPPED_RECEIVE_BOUND))


def send_quotas(wanted_SP: Tensor, bound: float) -> Tensor:
    """Returns the number of choices that each source may send to each rank, int64 (P, P).

    wanted_SP: int64, the number of choices that each source rank has for each destination rank. No column of the result
    sums to more than ceil(bound * N / P), with N the sum of wanted_SP.
    """
    num_ranks = len(wanted_SP)
    factor = Fraction(str(bound)) / num_ranks  # exact, as in policies.expert_capacity
    most = math.ceil(factor * int(wanted_SP.sum()))  # the host waits for the sum
    total_P = wanted_SP.sum(0)
    share_SP = wanted_SP * most // total_P.clamp(min=1)
    rest_P = most - share_SP.sum(0)
    more_SP = share_SP < wanted_SP
    share_SP = share_SP + (more_SP & (more_SP.cumsum(0) <= rest_P))
    return torch.where(total_P > most, share_SP, wanted_SP)
