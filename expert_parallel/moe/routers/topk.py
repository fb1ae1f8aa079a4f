"""Selects the k largest scores of each token, with a defined order among equal ones."""

import numpy as np
import torch
from torch import Tensor


def stable_topk(ranking_TE: Tensor, k: int) -> Tensor:
    """Returns the indices of the k largest values of each row, in descending order; int64 (T, K).

    Equal values are ordered by index (torch.topk leaves that open), and NaN counts as larger than any number.
    """
    num_experts = ranking_TE.shape[1]
    assert k <= num_experts, (k, num_experts)
    has_numpy = ranking_TE.is_cpu and ranking_TE.dtype in (torch.float32, torch.float64)
    return stable_topk_numpy(ranking_TE, k) if has_numpy and 4 * k <= num_experts else stable_topk_int64(ranking_TE, k)


def stable_topk_numpy(ranking_TE: Tensor, k: int) -> Tensor:
    """Computes `stable_topk` on the CPU by k calls of numpy's argmax, the fastest way if k is much smaller than E
    (moe/MEASUREMENTS.md)."""
    num_tokens, num_experts = ranking_TE.shape
    lowest = torch.finfo(ranking_TE.dtype).min  # so that only values that have been selected are -inf
    remaining_TE = ranking_TE.detach().clamp(min=lowest).contiguous().numpy()
    index_TK = np.empty((num_tokens, k), np.int64)
    start_T = np.arange(num_tokens) * num_experts
    for number in range(k):
        index_T = index_TK[:, number] = remaining_TE.argmax(1)
        remaining_TE.ravel()[start_T + index_T] = -np.inf
    return torch.from_numpy(index_TK)


def stable_topk_int64(ranking_TE: Tensor, k: int) -> Tensor:
    """Computes `stable_topk` on any device.

    Each float32 is mapped to an int64 of the same order, whose lower half holds the expert's index. Since no two of
    these are equal, topk is deterministic, and no sort of all experts is needed. Other dtypes are sorted.
    """
    if ranking_TE.dtype != torch.float32 or ranking_TE.numel() == 0:
        return ranking_TE.sort(dim=1, descending=True, stable=True).indices[:, :k]
    num_experts = ranking_TE.shape[1]
    bits_TE = (ranking_TE + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, which equals it
    bits_TE = bits_TE.masked_fill(ranking_TE.isnan(), 0x7FC00000)  # NaN of either sign comes first, as in a sort
    # The bits of a positive float are in its order as an integer; those of a negative one are in the opposite order.
    order_TE = (bits_TE ^ (bits_TE >> 31 & 0x7FFFFFFF)).long() << 32
    reversed_E = torch.arange(num_experts - 1, -1, -1, device=ranking_TE.device)  # so that the smaller index is larger
    return num_experts - 1 - (order_TE.bitwise_or_(reversed_E).topk(k, dim=1).values & 0xFFFFFFFF)
