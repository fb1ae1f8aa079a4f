"""Computes a mixture-of-experts layer in one function: route, apply capacity, dispatch, compute, combine, on one rank.

It shows what MoELayer computes; that adds ranks, other routers and capacity policies, and speed.
Sources: Shazeer et al. 2017 (sparsely gated mixture of experts); Lepikhin et al. 2021 (GShard: expert capacity).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_layer(
    x_TD: Tensor, router_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor, k: int, capacity: int | None = None
) -> Tensor:
    """Sends each token to its k best experts, and returns the weighted sum of their outputs, (T, D).

    T tokens of width D; E experts with hidden width F and a GELU. capacity: the largest number of tokens of an expert;
    all first choices come before all second ones, earlier tokens first, and choices beyond capacity add nothing. None:
    no limit.
    """
    # route: softmax over all experts, the k best, renormalised
    scores_TE = (x_TD @ router_ED.T).softmax(dim=1)  # (T, E)
    weights_TK, experts_TK = scores_TE.topk(k, dim=1)  # (T, K), (T, K)
    weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)  # (T, K)

    y_TD = torch.zeros_like(x_TD)  # (T, D)
    for expert, (w_in_DF, w_out_FD) in enumerate(zip(w_in_EDF, w_out_EFD, strict=True)):
        # apply capacity: the choices of this expert, first choices before second ones, then by position
        choice_C, token_C = (experts_TK == expert).T.nonzero(as_tuple=True)  # (C), (C)
        choice_C, token_C = choice_C[:capacity], token_C[:capacity]  # (C), C <= capacity
        # dispatch and compute
        x_CD = x_TD.index_select(0, token_C)  # (C, D)
        y_CD = F.gelu(x_CD @ w_in_DF) @ w_out_FD  # (C, D)
        # combine
        weights_C1 = weights_TK[token_C, choice_C, None]  # (C, 1)
        y_TD = y_TD.index_add(0, token_C, weights_C1 * y_CD)  # (T, D)
    return y_TD
