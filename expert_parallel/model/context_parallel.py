"""Implements context parallel attention: each rank keeps the queries of its two chunks and gathers all keys and values.

It is exact and causal: each chunk attends to the keys up to its own end, so that all ranks compute equally much. Keys
and values are all-gathered rather than sent around a ring, as Llama 3 does: with grouped heads they are small.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.model.attention import Attention, causal_attention
from expert_parallel.model.latent_attention import LatentAttention
from expert_parallel.model.tensor_parallel import GatherTokens
from expert_parallel.parallel.sequence import SequenceShard


class ContextParallelAttention:
    """Computes causal attention when sequences are divided over the ranks of `group`; replaces `causal_attention`.

    Queries, keys and values are those of the S = L / cp tokens at this rank's positions, which `place` tells; otherwise
    shapes are those of `AttentionFn`. mask: over the keys of whole sequences, (B or 1, 1, S, L).
    """

    def __init__(self, place: SequenceShard, group: dist.ProcessGroup) -> None:
        self.place, self.group = place, group

    def __call__(
        self,
        query_BHSh: Tensor,
        key_BGLh: Tensor,
        value_BGLv: Tensor,
        mask: Tensor | None = None,
        sinks_H: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Gathers the keys and values of whole sequences in one all-gather, then attends to them."""
        sizes = [key_BGLh.shape[-1], value_BGLv.shape[-1]]
        key_BGLh, value_BGLv = self.gather(torch.cat([key_BGLh, value_BGLv], -1)).split(sizes, -1)
        return self.attend_to_gathered(query_BHSh, key_BGLh, value_BGLv, mask, sinks_H, scale)

    def gather(self, x: Tensor) -> Tensor:
        """Gathers (..., L / cp, h), the rows at this rank's positions, into (..., L, h) of whole sequences, in sequence
        order.

        In the backward pass each rank gets the sum of all ranks' gradients for its own positions.
        """
        order_L = self.place.all_contexts(self.place.cp * x.shape[-2]).argsort()  # before the ranks wait for each other
        return GatherTokens.apply(x, self.group).index_select(-2, order_L.to(x.device))

    def attend_to_gathered(
        self,
        query_BHSh: Tensor,
        key_BGLh: Tensor,
        value_BGLv: Tensor,
        mask: Tensor | None = None,
        sinks_H: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attends from this rank's queries over keys and values of whole sequences."""
        cp, rank = self.place.cp, self.place.cp_rank
        if query_BHSh.numel() == 0:  # no sequences on this rank: some attention kernels reject empty inputs
            return query_BHSh[..., :1].expand(*query_BHSh.shape[:-1], value_BGLv.shape[-1])
        chunk = key_BGLh.shape[-2] // (2 * cp)
        ends = ((rank + 1) * chunk, (2 * cp - rank) * chunk)  # where this rank's two chunks end in the sequence
        outputs = []
        for half, end in enumerate(ends):
            query = query_BHSh.chunk(2, -2)[half]
            chunk_mask = None if mask is None else mask.chunk(2, -2)[half][..., :end]
            key, value = key_BGLh[..., :end, :], value_BGLv[..., :end, :]
            outputs.append(causal_attention(query, key, value, chunk_mask, sinks_H, scale))
        return torch.cat(outputs, -2)


def apply_cp_to_attention(
    attention: Attention | LatentAttention, place: SequenceShard, group: dist.ProcessGroup
) -> None:
    """Applies context parallelism to an attention module over `group`.

    Heads attention gathers keys and values. Latent attention gathers its latents, which are smaller, and every rank
    projects them to the keys and values of whole sequences.
    """
    parallel = ContextParallelAttention(place, group)
    if isinstance(attention, LatentAttention):
        attention.gather_keys, attention.attention_fn = parallel.gather, parallel.attend_to_gathered
    else:
        attention.attention_fn = parallel
