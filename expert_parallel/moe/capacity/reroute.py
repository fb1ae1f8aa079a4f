"""Rerouting of overflow: a choice beyond its expert's capacity takes its token's next best expert that still has room.

Served in the order of the queue, as one would by hand: choice after choice, each goes to the best expert (by the
router's ranking, the smaller number on ties) that its token has not taken and that has room. Here all choices propose
at once, and an expert keeps the foremost of the queue: deferred acceptance (Gale and Shapley 1962), whose outcome is
the same, because all experts prefer by the same order.
"""

import torch
from torch import Tensor

from expert_parallel.moe.dispatch.permute import positions_in_queues


def reroute(
    ids_GK: Tensor,
    routed_GK: Tensor,
    overflows_GK: Tensor,
    ranking_GE: Tensor,
    block_G: Tensor,
    room_Q: Tensor,
    order_N: Tensor,
) -> tuple[Tensor, Tensor]:
    """(ids_GK, rerouted_GK): the choices' experts, renamed where one was found, and where that is.

    ranking_GE: largest first; -inf: not to be chosen. room_Q: int64, free places of each (block, expert).
    order_N: the queue, flat indices of choices. What a token was routed to at first it does not take again.
    """
    num_tokens, num_choices = ids_GK.shape
    num_experts = ranking_GE.shape[1]
    open_GE = ranking_GE.masked_fill(
        torch.zeros_like(ranking_GE, dtype=torch.bool).scatter(1, ids_GK, routed_GK), -torch.inf
    )
    candidates_GE = open_GE.sort(dim=1, descending=True, stable=True).indices
    num_candidates_G = open_GE.isfinite().sum(1)
    choice_M = order_N[overflows_GK.flatten()[order_N]]  # those that overflow, foremost first
    token_M = choice_M // num_choices
    rank_M = torch.arange(len(choice_M), device=choice_M.device)  # place in the queue: foremost first
    tried_M = torch.zeros_like(choice_M)  # how many of its token's candidates have refused it
    while True:
        # Each proposes to the candidate it stands at. Who has none left stands in a queue without room.
        has_more_M = tried_M < num_candidates_G[token_M]
        if not bool(has_more_M.any()):
            break
        target_M = candidates_GE[token_M, tried_M.clamp(max=num_experts - 1)]
        queue_M = torch.where(has_more_M, block_G[token_M] * num_experts + target_M, len(room_Q))
        # Of one token's choices at one expert only the foremost may stay.
        pair_M = torch.where(has_more_M, token_M * num_experts + target_M, num_tokens * num_experts)
        is_second_M = positions_in_queues(pair_M, num_tokens * num_experts + 1, rank_M) > 0
        queue_M = torch.where(is_second_M, len(room_Q), queue_M)
        place_M = positions_in_queues(queue_M, len(room_Q) + 1, rank_M)
        stays_M = (queue_M < len(room_Q)) & (place_M < torch.cat([room_Q, room_Q.new_zeros(1)])[queue_M])
        refused_M = has_more_M & ~stays_M
        if not bool(refused_M.any()):
            break
        tried_M = tried_M + refused_M
    has_more_M = tried_M < num_candidates_G[token_M]
    found_N = torch.zeros_like(overflows_GK.flatten())
    found_N[choice_M] = has_more_M
    ids_N = ids_GK.flatten().clone()
    ids_N[choice_M[has_more_M]] = candidates_GE[token_M[has_more_M], tried_M[has_more_M]]
    return ids_N.view_as(ids_GK), found_N.view_as(overflows_GK)
