"""Context parallel attention: each rank has the queries of its chunks of the sequence, keys and values are gathered.

Exact and causal. A rank's two chunks attend each to the keys up to their own end, so no rank computes more than
another. Keys and values of grouped heads are few: gathering them moves less than a ring of them would wait for.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from expert_parallel.model.sequence import SequencePlace
from expert_parallel.model.tensor_parallel import GatherTokens


class ContextParallelAttention:
    """In place of `causal_attention`. query, key, value: (B, heads, S / cp, h) at the positions of `place`."""

    def __init__(self, place: SequencePlace, group: dist.ProcessGroup) -> None:
        self.place, self.group = place, group

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cp, rank = self.place.cp, self.place.cp_rank
        both = GatherTokens.apply(torch.stack([key, value]), self.group)
        if query.numel() == 0:  # no sequences here; not every kernel takes none
            return query
        order = self.place.all_contexts(both.shape[-2]).argsort().to(both.device)
        key, value = both.index_select(-2, order).unbind(0)
        chunk = key.shape[-2] // (2 * cp)
        outputs = []
        for part, end in zip(query.chunk(2, -2), ((rank + 1) * chunk, (2 * cp - rank) * chunk), strict=True):
            mask = causal_lower_right(chunk, end)
            grouped = query.shape[1] != key.shape[1]
            outputs.append(
                F.scaled_dot_product_attention(part, key[..., :end, :], value[..., :end, :], mask, enable_gqa=grouped)
            )
        return torch.cat(outputs, -2)
