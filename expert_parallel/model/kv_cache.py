"""Keeps the keys and values of earlier tokens for generation."""

import torch
from torch import Tensor, nn


class KVCache:
    """Stores the keys and values of all earlier tokens for each block of this rank; latent attention stores its
    latents.

    length_B: int64, the number of tokens of each sequence that the cache holds. The caller advances it after all blocks
    have run; slots beyond it are overwritten. capacity: the largest number of tokens of a sequence. One additional slot
    receives padding beyond the capacity.
    """

    def __init__(self, num_sequences: int, capacity: int, device: torch.device | None = None) -> None:
        self.num_slots = capacity + 1
        self.length_B = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        self.rows: dict[nn.Module, list[Tensor]] = {}

    def extend(self, owner: nn.Module, *new: Tensor) -> list[Tensor]:
        """Writes rows (B, heads, S, h) at slots length_B, length_B + 1, ... of each sequence, and returns all slots,
        (B, heads, num_slots, h). owner: the attention module that the rows belong to."""
        if owner not in self.rows:
            self.rows[owner] = [rows.new_zeros(*rows.shape[:2], self.num_slots, rows.shape[3]) for rows in new]
        for cached, rows in zip(self.rows[owner], new, strict=True):
            slot_BS = self.length_B[:, None] + torch.arange(rows.shape[2], device=rows.device)
            slot_BS = slot_BS.clamp(max=self.num_slots - 1)
            cached.scatter_(2, slot_BS[:, None, :, None].expand_as(rows), rows)
        return self.rows[owner]
