"""Draws training sequences, and evaluation sequences, from a stream of tokens.

Shape letters in this package: B sequences of one rank's micro-batch, S positions of a sequence.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Tokens = Tensor | np.ndarray[Any, Any]  # 1-D integers, on the CPU or memory-mapped


class Sampler(Protocol):
    """Draws an endless series of training sequences, each of S + 1 token ids: S inputs and, shifted by one, their
    targets.

    Sequence number i depends on (seed, i) and the data only.
    """

    @property
    def separator(self) -> int | None:
        """Returns the token that ends a document, or None if documents are joined."""

    def sequences(self, first: int, count: int) -> Tensor:
        """Returns the sequences number first to first + count - 1: token ids, int64, (count, S + 1)."""


@dataclass(frozen=True, eq=False)
class TokenSampler:
    """Draws sequences from one stream of tokens that fits into memory; implements Sampler.

    The stream is cut into windows of S + 1 tokens that overlap by one, so that each token but the first is a target
    once. A window is one sequence. Every epoch visits all windows, in an order of its own.
    """

    tokens: Tokens
    sequence_length: int
    seed: int
    separator: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise ValueError(
                too_short_message("data holds", "bytes for training", len(self.tokens), self.sequence_length)
            )

    @property
    def num_windows(self) -> int:
        return count_windows(self.tokens, self.sequence_length)

    def sequences(self, first: int, count: int) -> Tensor:
        order = [self.window_index(sample) for sample in range(first, first + count)]
        return read_windows(self.tokens, self.sequence_length, order)

    def window_index(self, sample: int) -> int:
        epoch, position = divmod(sample, self.num_windows)
        return int(epoch_order(self.seed, epoch, self.num_windows)[position])


@lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_order(seed: int, epoch: int, num_windows: int) -> Tensor:
    """Returns the order in which an epoch visits the windows of a stream: their indices, int64, (num_windows,)."""
    key = hashlib.sha256(f"epoch order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)  # the seed is a signed 64-bit
    return torch.randperm(num_windows, generator=generator)


def held_out_sequences(tokens: Tokens, sequence_length: int, limit: int | None) -> Tensor:
    """Returns at most `limit` evenly spaced windows of the held-out tokens, int64, (n, S + 1); None: all windows."""
    there = count_windows(tokens, sequence_length)
    if there < 1:
        raise ValueError(
            too_short_message("data.held_out leaves", "bytes for evaluation", len(tokens), sequence_length)
        )
    return read_windows(tokens, sequence_length, evenly_spaced(there, limit))


def evenly_spaced(there: int, limit: int | None) -> list[int]:
    """Returns the indices of at most `limit` of `there` windows, evenly spaced; None: all of them."""
    assert limit is None or limit >= 1, f"limit {limit}"
    count = there if limit is None else min(limit, there)
    return [number * there // count for number in range(count)]


def count_windows(tokens: Tokens, sequence_length: int) -> int:
    return (len(tokens) - 1) // sequence_length


def read_windows(tokens: Tokens, sequence_length: int, order: Sequence[int]) -> Tensor:
    """Returns the windows whose indices are in `order`, int64, (len(order), S + 1); window w begins at token w * S.
    Only these tokens are read."""
    begins = np.array(order, dtype=np.int64)[:, None] * sequence_length
    return torch.from_numpy(np.asarray(tokens)[begins + np.arange(sequence_length + 1)].astype(np.int64))


def too_short_message(what: str, unit_and_purpose: str, found: int, sequence_length: int) -> str:
    needed = f"a sequence needs sequence_length + 1 = {sequence_length + 1} (training.sequence_length)"
    return f"{what} {found} {unit_and_purpose}, {needed}"
