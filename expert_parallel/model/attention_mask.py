"""What the tokens of a pass see of each other: causal, within their own document, after what a cache holds.

Built once a pass, from what every rank is given whole, and the same for all blocks; attention asks it for positions
and for masks.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from expert_parallel.model.kv_cache import KeyValueCache
from expert_parallel.model.rotary import RopeConfig, rotation
from expert_parallel.parallel.sequence import SequencePlace


@dataclass(eq=False)
class Sight:
    """Answers the attention of all blocks in one pass, and keeps the masks and rotations that it has made.

    index_BS: int64, where the tokens of this context rank stand in their rows, (B, S), or (1, S) where all rows are
    alike. position_BS: where they stand in their documents, likewise: what rotary and learned positions count.
    document_BS, key_document_BL: the documents of queries and keys; None: one a row. L: keys of a row, in the order of
    their rows. cache: what stands before them."""

    index_BS: Tensor
    position_BS: Tensor
    num_keys: int
    document_BS: Tensor | None = None
    key_document_BL: Tensor | None = None
    cache: KeyValueCache | None = None
    # Made when first asked for, for all blocks: masks by window, cos and sin by what they are made of.
    masks: dict[int | None, Tensor] = field(default_factory=dict, init=False)
    rotations: dict[tuple[RopeConfig, int, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False
    )

    @classmethod
    def of(
        cls,
        place: SequencePlace,
        length: int,
        device: torch.device,
        document_BL: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Self:
        """length: of the whole rows. document_BL: int64, the whole rows' documents, never decreasing in a row."""
        index_1S = place.context(length).to(device)[None]
        if cache is not None:
            assert document_BL is None, "documents are for training"
            assert place.cp == 1, "a cache holds whole sequences"
            index_BS = cache.length_B[:, None] + index_1S
            return cls(index_BS, index_BS, cache.num_places, cache=cache)
        if document_BL is None:
            return cls(index_1S, index_1S, length)
        index_L = torch.arange(length, device=device)
        begins_BL = torch.cat([torch.ones_like(document_BL[:, :1]), document_BL.diff(dim=1)], 1) != 0
        start_BL = torch.where(begins_BL, index_L, 0).cummax(1).values
        own_S = index_1S[0]
        return cls(index_1S, (index_L - start_BL)[:, own_S], length, document_BL[:, own_S], document_BL)

    @property
    def is_causal(self) -> bool:
        """Whether a query sees all keys up to its own: then no mask is needed."""
        return self.document_BS is None and self.cache is None

    def mask(self, window: int | None = None) -> Tensor | None:
        """True where a query sees a key, bool (B or 1, 1, S, L), or None where `is_causal` says it all. window: of the
        keys that a query sees, only so many, the last, its own among them."""
        if self.is_causal and (window is None or window >= self.num_keys):
            return None
        if window not in self.masks:
            back_BSL = self.index_BS[:, :, None] - torch.arange(self.num_keys, device=self.index_BS.device)
            sees_BSL = back_BSL >= 0
            if window is not None:
                sees_BSL = sees_BSL & (back_BSL < window)
            if self.document_BS is not None and self.key_document_BL is not None:
                sees_BSL = sees_BSL & (self.document_BS[:, :, None] == self.key_document_BL[:, None, :])
            self.masks[window] = sees_BSL[:, None]
        return self.masks[window]

    def rotation(self, rope: RopeConfig, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of these tokens' angles, (B or 1, 1, S, size / 2) each; see rotary.rotation."""
        key = (rope, size, dtype)
        if key not in self.rotations:
            self.rotations[key] = rotation(rope, size, self.position_BS, dtype)
        return self.rotations[key]
