"""Reroutes choices that overflow their expert's capacity to their token's next best expert that still has room.

The result is that of a loop over these choices in queue order, in which each choice goes to the best expert (by the
router's ranking; the smaller id on ties) that its token does not use yet and that has room. It is computed in rounds:
all choices propose to an expert at once, and each expert keeps the foremost in the queue. This is deferred acceptance
(Gale and Shapley 1962), whose result is that of the loop because all experts prefer choices by the same order.
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
    """Returns (ids_GK, rerouted_GK): the experts of all choices after rerouting, and which choices were rerouted
    (bool).

    ids_GK: int64, the experts as routed. routed_GK, overflows_GK: bool. ranking_GE: a token prefers larger values; -inf
    excludes an expert. block_G: int64, the block of each token: each block has its own capacity. room_Q: int64, the
    number of free places of each (block, expert). order_N: int64, all choices in queue order, as flat indices g * K +
    k. A choice is never rerouted to an expert to which its token was routed. The host waits twice a round; there are at
    most M * E rounds, and usually few.
    """
    num_tokens, num_choices = ids_GK.shape
    num_experts = ranking_GE.shape[1]
    open_GE = ranking_GE.masked_fill(
        torch.zeros_like(ranking_GE, dtype=torch.bool).scatter(1, ids_GK, routed_GK), -torch.inf
    )
    candidates_GE = open_GE.sort(dim=1, descending=True, stable=True).indices
    num_candidates_G = open_GE.isfinite().sum(1)
    choice_M = order_N[overflows_GK.flatten()[order_N]]  # in queue order; the host waits for their number
    token_M = choice_M // num_choices
    order_M = torch.arange(len(choice_M), device=choice_M.device)  # they are in queue order already
    refusals_M = torch.zeros_like(choice_M)  # the number of its token's candidates that have refused the choice
    while True:
        # Each choice proposes to its best candidate that has not refused it. One without candidates joins a last
        # queue, which has no room.
        has_more_M = refusals_M < num_candidates_G[token_M]
        if not bool(has_more_M.any()):  # the host waits: the number of rounds depends on the values
            break
        target_M = candidates_GE[token_M, refusals_M.clamp(max=num_experts - 1)]
        queue_M = torch.where(has_more_M, block_G[token_M] * num_experts + target_M, len(room_Q))
        # If several choices of a token propose to one expert, it may keep only the foremost of them.
        pair_M = torch.where(has_more_M, token_M * num_experts + target_M, num_tokens * num_experts)
        is_second_M = positions_in_queues(pair_M, num_tokens * num_experts + 1, order_M) > 0
        queue_M = torch.where(is_second_M, len(room_Q), queue_M)
        place_M = positions_in_queues(queue_M, len(room_Q) + 1, order_M)
        stays_M = (queue_M < len(room_Q)) & (place_M < torch.cat([room_Q, room_Q.new_zeros(1)])[queue_M])
        refused_M = has_more_M & ~stays_M
        if not bool(refused_M.any()):  # the host waits, as above
            break
        refusals_M = refusals_M + refused_M
    has_more_M = refusals_M < num_candidates_G[token_M]
    found_N = torch.zeros_like(overflows_GK.flatten())
    found_N[choice_M] = has_more_M
    ids_N = ids_GK.flatten().clone()
    ids_N[choice_M[has_more_M]] = candidates_GE[token_M[has_more_M], refusals_M[has_more_M]]
    return ids_N.view_as(ids_GK), found_N.view_as(overflows_GK)
