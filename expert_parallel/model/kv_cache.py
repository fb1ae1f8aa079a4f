"""The cache of keys and values that generation keeps for the tokens so far."""

import torch
from torch import Tensor, nn


class KeyValueCache:
    """Keys and values (or what a kind of attention makes them of) of the tokens so far, of the blocks of this rank.

    length_B: int64, tokens of each sequence that are in it. Its owner moves it on, once all blocks have run; what
    stands beyond is overwritten. capacity: tokens of a sequence that there is room for; behind it is one place more,
    for the padding of a pass that goes beyond.
    """

    def __init__(self, num_sequences: int, capacity: int, device: torch.device | None = None) -> None:
        self.num_places = capacity + 1
        self.length_B = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        self.rows: dict[nn.Module, list[Tensor]] = {}

    def extend(self, owner: nn.Module, *new: Tensor) -> list[Tensor]:
        """Puts rows (B, heads, S, h) after the first length_B of each sequence, and returns all, (B, heads, num_places,
        h). owner: the module whose rows they are."""
        if owner not in self.rows:
            self.rows[owner] = [rows.new_zeros(*rows.shape[:2], self.num_places, rows.shape[3]) for rows in new]
        for held, rows in zip(self.rows[owner], new, strict=True):
            place_BS = self.length_B[:, None] + torch.arange(rows.shape[2], device=rows.device)
            place_BS = place_BS.clamp(max=self.num_places - 1)
            held.scatter_(2, place_BS[:, None, :, None].expand_as(rows), rows)
        return self.rows[owner]
