"""Draws training sequences, and evaluation sequences, from a stream of tokens.

Shape letters in this package: B sequences of one rank's micro-batch, S positions of a sequence.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from expert_parallel.data.documents import number_documents, starts_after_end_tokens

Tokens = Tensor | np.ndarray[Any, Any]  # 1-D integers, on the CPU or memory-mapped


@dataclass(frozen=True, eq=False)
class Sequences:
    """Holds n sequences, each of S + 1 token ids: S inputs and, shifted by one, their targets.

    tokens: int64, (n, S + 1). documents: the number of each token's document within its sequence, counted from 0,
    int64, (n, S + 1); None if documents are joined.
    """

    tokens: Tensor
    documents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, first: int, count: int) -> "Sequences":
        """Returns the sequences number first to first + count - 1, or those of them that there are."""
        documents = None if self.documents is None else self.documents[first : first + count]
        return Sequences(self.tokens[first : first + count], documents)

    def split(self, size: int) -> Iterator["Sequences"]:
        """Yields all sequences in order, `size` at a time; the last ones may be fewer."""
        return (self.select(first, size) for first in range(0, len(self), size))


def concatenate(parts: Sequence[Sequences]) -> Sequences:
    """Returns the sequences of all parts, of which there is at least one. Documents are joined in all parts or none."""
    documents = [part.documents for part in parts if part.documents is not None]
    assert len(documents) in (0, len(parts))
    return Sequences(torch.cat([part.tokens for part in parts]), torch.cat(documents) if documents else None)


class Sampler(Protocol):
    """Draws an endless series of training sequences. Sequence number i depends on (seed, i) and the data only."""

    def sequences(self, first: int, count: int) -> Sequences:
        """Returns the sequences number first to first + count - 1."""


@dataclass(frozen=True, eq=False)
class TokenSampler:
    """Draws sequences from one stream of tokens that fits into memory; implements Sampler.

    The stream is cut into windows of S + 1 tokens that overlap by one, so that each token but the first is a target
    once. A window is one sequence. Every epoch visits all windows, in an order of its own. end_id: the token that ends
    a document, or None if documents are joined.
    """

    tokens: Tokens
    sequence_length: int
    seed: int
    end_id: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise ValueError(
                too_short_message("data holds", "bytes for training", len(self.tokens), self.sequence_length)
            )

    @property
    def num_windows(self) -> int:
        return count_windows(self.tokens, self.sequence_length)

    def sequences(self, first: int, count: int) -> Sequences:
        order = [self.window_index(sample) for sample in range(first, first + count)]
        return number_by_end_tokens(read_windows(self.tokens, self.sequence_length, order), self.end_id)

    def window_index(self, sample: int) -> int:
        epoch, position = divmod(sample, self.num_windows)
        return int(epoch_order(self.seed, epoch, self.num_windows)[position])


@lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_order(seed: int, epoch: int, num_windows: int) -> Tensor:
    """Returns the order in which an epoch visits the windows of a stream: their indices, int64, (num_windows,)."""
    key = hashlib.sha256(f"epoch order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)  # the seed is a signed 64-bit
    return torch.randperm(num_windows, generator=generator)


def number_by_end_tokens(tokens: Tensor, end_id: int | None) -> Sequences:
    """Returns the sequences `tokens`, int64, (n, S + 1), with their documents, each of which ends with the token
    `end_id`; None: documents are joined."""
    return Sequences(tokens, None if end_id is None else number_documents(starts_after_end_tokens(tokens, end_id)))


def held_out_sequences(tokens: Tokens, sequence_length: int, limit: int | None, end_id: int | None = None) -> Sequences:
    """Returns at most `limit` evenly spaced windows of the held-out tokens; None: all windows. end_id: the token that
    ends a document, or None if documents are joined."""
    there = count_windows(tokens, sequence_length)
    if there < 1:
        raise ValueError(
            too_short_message("data.held_out leaves", "bytes for evaluation", len(tokens), sequence_length)
        )
    return number_by_end_tokens(read_windows(tokens, sequence_length, evenly_spaced(there, limit)), end_id)


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
