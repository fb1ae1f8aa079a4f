"""Context parallel attention: each rank has the queries of its chunks of the sequence, keys and values are gathered.

Exact and causal. A rank's two chunks attend each to the keys up to their own end, so no rank computes more than
another. Keys and values of grouped heads are few: gathering them moves less than a ring of them would wait for.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.model.attention import Attention, causal_attention
from expert_parallel.model.latent_attention import LatentAttention
from expert_parallel.model.tensor_parallel import GatherTokens
from expert_parallel.parallel.sequence import SequencePlace


class ContextParallelAttention:
    """In place of `causal_attention`. query, key, value: (B, heads, S / cp, ...) at the positions of `place`."""

    def __init__(self, place: SequencePlace, group: dist.ProcessGroup) -> None:
        self.place, self.group = place, group

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, sinks_H: Tensor | None = None
    ) -> Tensor:
        both = self.gather(torch.cat([key, value], -1))
        key, value = both.split([key.shape[-1], value.shape[-1]], -1)
        return self.over_rows(query, key, value, mask, sinks_H)

    def gather(self, x: Tensor) -> Tensor:
        """(..., S / cp, h) of the positions of `place` -> (..., S, h) of whole rows, in their order."""
        gathered = GatherTokens.apply(x, self.group)
        return gathered.index_select(-2, self.place.all_contexts(gathered.shape[-2]).argsort().to(x.device))

    def over_rows(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, sinks_H: Tensor | None = None
    ) -> Tensor:
        """key, value: of whole rows. mask: of this rank's queries and these, see Sight.mask."""
        cp, rank = self.place.cp, self.place.cp_rank
        if query.numel() == 0:  # no sequences here; not every kernel takes none
            return query[..., :1].expand(*query.shape[:-1], value.shape[-1])
        chunk = key.shape[-2] // (2 * cp)
        outputs = []
        for half, end in enumerate(((rank + 1) * chunk, (2 * cp - rank) * chunk)):
            part = query.chunk(2, -2)[half]
            sees = None if mask is None else mask.chunk(2, -2)[half][..., :end]
            outputs.append(causal_attention(part, key[..., :end, :], value[..., :end, :], sees, sinks_H))
        return torch.cat(outputs, -2)


def spread_attention(attention: Attention | LatentAttention, place: SequencePlace, group: dist.ProcessGroup) -> None:
    """Positions over the ranks. Keys and values are gathered; where latents stand for those of all heads, these are,
    and each rank makes the keys and values of whole rows of them."""
    parallel = ContextParallelAttention(place, group)
    if isinstance(attention, LatentAttention):
        attention.gather_keys, attention.attend = parallel.gather, parallel.over_rows
    else:
        attention.attend = parallel
