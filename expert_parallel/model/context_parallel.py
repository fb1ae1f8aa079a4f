"""Context parallel attention: each rank has the queries of its chunks of the sequence, keys and values are gathered.

Exact and causal. A rank's two chunks attend each to the keys up to their own end, so no rank computes more than
another. Keys and values of grouped heads are few: gathering them moves less than a ring of them would wait for.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from expert_parallel.model.attention import causal_attention
from expert_parallel.model.sequence import SequencePlace
from expert_parallel.model.tensor_parallel import GatherTokens


class ContextParallelAttention:
    """In place of `causal_attention`. query, key, value: (B, heads, S / cp, h) at the positions of `place`."""

    def __init__(self, place: SequencePlace, group: dist.ProcessGroup) -> None:
        self.place, self.group = place, group

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: of this rank's queries and the keys of whole rows, see Sight.mask."""
        cp, rank = self.place.cp, self.place.cp_rank
        both = GatherTokens.apply(torch.stack([key, value]), self.group)
        if query.numel() == 0:  # no sequences here; not every kernel takes none
            return query
        order = self.place.all_contexts(both.shape[-2]).argsort().to(both.device)
        key, value = both.index_select(-2, order).unbind(0)
        chunk = key.shape[-2] // (2 * cp)
        outputs = []
        for half, end in enumerate(((rank + 1) * chunk, (2 * cp - rank) * chunk)):
            part = query.chunk(2, -2)[half]
            sees = causal_lower_right(chunk, end) if mask is None else mask.chunk(2, -2)[half][..., :end]
            outputs.append(causal_attention(part, key[..., :end, :], value[..., :end, :], sees))
        return torch.cat(outputs, -2)
