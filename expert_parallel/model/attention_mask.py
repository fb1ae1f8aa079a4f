"""Determines which keys each query of a pass may attend to: causal, within its document, after the cached tokens.

`AttentionContext` is built once per forward pass, from the whole sequences, and shared by all blocks.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from expert_parallel.model.kv_cache import KVCache
from expert_parallel.model.length_scaling import LengthScalingConfig, length_scale
from expert_parallel.model.rotary import LongRopeScaling, RopeConfig, rope_cos_sin
from expert_parallel.parallel.sequence import SequenceShard


@dataclass(eq=False)
class AttentionContext:
    """Provides attention masks and rotary tables to all blocks of one forward pass, and memoises them.

    index_BS: int64, the index in its sequence of each token that this context parallel rank holds, (B, S), or (1, S) if
    all sequences have the same. position_BS: int64, the same shape, the position of each token in its document, for
    rotary and learned positions. num_keys: L, the number of keys of a sequence, which are in sequence order.
    document_BS, key_document_BL: int64, the number of each query's and each key's document; None: a sequence is one
    document. cache: the keys and values of earlier tokens, in generation. real_BL: bool, False for padding at the end
    of whole sequences (of the tokens after those in the cache); None: no padding.
    """

    index_BS: Tensor
    position_BS: Tensor
    num_keys: int
    document_BS: Tensor | None = None
    key_document_BL: Tensor | None = None
    cache: KVCache | None = None
    real_BL: Tensor | None = None
    # Computed on first use and shared by all blocks: masks by window and chunk, the others by their arguments.
    masks: dict[tuple[int | None, int | None], Tensor] = field(default_factory=dict, init=False)
    rope_tables: dict[tuple[RopeConfig, int, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False
    )
    length_scales: dict[tuple[LengthScalingConfig, torch.dtype], Tensor] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls,
        place: SequenceShard,
        length: int,
        device: torch.device,
        document_BL: Tensor | None = None,
        cache: KVCache | None = None,
        real_BL: Tensor | None = None,
    ) -> Self:
        """Builds the context of one pass.

        length: the number of tokens of a whole sequence. document_BL: int64, the number of the document of each token
        of the whole sequences, non-decreasing within a sequence; None with a cache. cache: only if every rank has whole
        sequences (cp 1). real_BL: bool, False for padding.
        """
        index_1S = place.context(length).to(device)[None]
        if cache is not None:
            assert document_BL is None, "documents are for training"
            assert place.cp == 1, "a cache holds whole sequences"
            index_BS = cache.length_B[:, None] + index_1S
            return cls(index_BS, index_BS, cache.num_slots, cache=cache, real_BL=real_BL)
        if document_BL is None:
            return cls(index_1S, index_1S, length, real_BL=real_BL)
        index_L = torch.arange(length, device=device)
        begins_BL = torch.cat([torch.ones_like(document_BL[:, :1]), document_BL.diff(dim=1)], 1) != 0
        start_BL = torch.where(begins_BL, index_L, 0).cummax(1).values
        own_S = index_1S[0]
        position_BS = (index_L - start_BL)[:, own_S]
        return cls(index_1S, position_BS, length, document_BL[:, own_S], document_BL, real_BL=real_BL)

    @property
    def is_causal(self) -> bool:
        """Returns True if every query sees all keys up to its own position, which needs no mask."""
        return self.document_BS is None and self.cache is None

    def mask(self, window: int | None = None, chunk: int | None = None) -> Tensor | None:
        """Returns a mask, bool (B or 1, 1, S, L), True where a query sees a key; None if plain causal masking suffices.

        window: the size of a sliding window: a query sees the last `window` keys, including the one at its own
        position; None: all keys before it. chunk: the size of a chunk: a query sees the keys of its own chunk alone.
        Chunks count from the beginning of a document, as positions do: so a document computes the same wherever it lies
        in a sequence, and in generation, which begins with it.
        """
        if self.is_causal and all(limit is None or limit >= self.num_keys for limit in (window, chunk)):
            return None
        if (window, chunk) not in self.masks:
            back_BSL = self.index_BS[:, :, None] - torch.arange(self.num_keys, device=self.index_BS.device)
            visible_BSL = back_BSL >= 0
            if window is not None:
                visible_BSL = visible_BSL & (back_BSL < window)
            if chunk is not None:
                visible_BSL = visible_BSL & (back_BSL <= (self.position_BS % chunk)[:, :, None])
            if self.document_BS is not None and self.key_document_BL is not None:
                visible_BSL = visible_BSL & (self.document_BS[:, :, None] == self.key_document_BL[:, None, :])
            self.masks[window, chunk] = visible_BSL[:, None]
        return self.masks[window, chunk]

    @property
    def length_BS(self) -> Tensor:
        """Returns the number of tokens of each token's document or else of its sequence, cached ones included: int64,
        (B or 1, S or 1)."""
        if self.key_document_BL is not None:
            number_BL = F.pad((self.key_document_BL.diff(dim=1) != 0).cumsum(1), (1, 0))
            count_BL = torch.zeros_like(number_BL).scatter_add(1, number_BL, torch.ones_like(number_BL))
            return count_BL.gather(1, number_BL)[:, self.index_BS[0]]
        if self.real_BL is None:
            return self.index_BS.new_full((1, 1), self.num_keys) if self.cache is None else self.index_BS[:, -1:] + 1
        count_B1 = self.real_BL.sum(1, keepdim=True)
        return count_B1 if self.cache is None else self.cache.length_B[:, None] + count_B1

    def rope_cos_sin(self, rope: RopeConfig, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns cos and sin of the rotary angles of these tokens, (B or 1, 1, S, size / 2) each, in `dtype`."""
        key = (rope, size, dtype)
        if key not in self.rope_tables:
            length_BS = self.length_BS if isinstance(rope.scaling, LongRopeScaling) else None
            self.rope_tables[key] = rope_cos_sin(rope, size, self.position_BS, dtype, length_BS)
        return self.rope_tables[key]

    def length_scale(self, config: LengthScalingConfig, dtype: torch.dtype) -> Tensor:
        """Returns the factors of these tokens' queries, (B or 1, 1, S, 1), in `dtype`."""
        key = (config, dtype)
        if key not in self.length_scales:
            self.length_scales[key] = length_scale(config, self.position_BS, dtype)
        return self.length_scales[key]
