"""Blends corpora: a run's sequences are drawn from several corpora by their weights, and from each in a shuffled order.

A sequence depends on (seed, its number) only, at the same small cost for any number, and no table grows with the
corpora: an epoch's order is a permutation that is computed for one window at a time. (A table would take 8 bytes per
window on every rank, and a new one each epoch: 200 MB for 100 billion tokens in sequences of 4,096. The table of a
blend takes 8 MB, whatever it blends.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from expert_parallel.data.documents import DocumentBoundaries
from expert_parallel.data.sampler import (
    Sequences,
    Tokens,
    concatenate,
    count_windows,
    evenly_spaced,
    read_windows,
    too_short_message,
)
from expert_parallel.nn.random import mix

PERIOD = 1 << 20  # samples after which the order of corpora repeats: weights are exact to one in a million
ROUNDS = 6


class BlendPattern(NamedTuple):
    """Holds, for PERIOD successive sequences, from which corpus each is drawn; this order repeats.

    corpus: the index of the corpus of each sequence. before: how many earlier sequences of the period come from the
    same corpus. counts: the number of sequences of each corpus in a period.
    """

    corpus: np.ndarray[Any, Any]
    before: np.ndarray[Any, Any]
    counts: list[int]


@dataclass(frozen=True, eq=False)
class CorpusSplit:
    """Holds the training part or the held-out part of a corpus.

    setting: the path of the setting that names the corpus, for error messages. tokens: the part's token ids, which
    begin at token number `begin` of `file`. weight: the corpus's share of the sequences, relative to the sum of all
    weights. boundaries: of the documents in `file`; None if documents are joined.
    """

    setting: str
    file: Path
    begin: int
    tokens: Tokens
    weight: float
    boundaries: DocumentBoundaries | None = None

    def num_windows(self, sequence_length: int, purpose: str) -> int:
        """Returns the number of windows of sequence_length + 1 tokens in this part. Raises ValueError if there is none.
        purpose: of these tokens, for the error message."""
        number = count_windows(self.tokens, sequence_length)
        if number < 1:
            what = f"{self.setting}: {self.file} holds"
            raise ValueError(too_short_message(what, f"tokens for {purpose}", len(self.tokens), sequence_length))
        return number

    def read_windows(self, sequence_length: int, order: Sequence[int], vocab_size: int) -> Sequences:
        """Returns the windows whose indices are in `order`. Raises ValueError if a token id is not below vocab_size."""
        tokens = read_windows(self.tokens, sequence_length, order)
        wrong = (tokens < 0) | (tokens >= vocab_size)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()  # on the CPU, as all tensors in this package
            place = self.begin + order[row] * sequence_length + column
            raise ValueError(
                f"{self.setting}: {self.file} holds {int(tokens[row, column])} as token {place}, model.vocab_size is "
                f"{vocab_size}"
            )
        if self.boundaries is None:
            return Sequences(tokens)
        begins = [self.begin + window * sequence_length for window in order]
        return Sequences(tokens, self.boundaries.number(tokens, begins))


@dataclass(frozen=True, eq=False)
class BlendSampler:
    """Draws an endless series of sequences from several corpora, each with epochs of its own; implements Sampler."""

    splits: Sequence[CorpusSplit]
    sequence_length: int
    seed: int
    vocab_size: int

    def __post_init__(self) -> None:
        assert all(self.num_windows)
        for part, count in zip(self.splits, self.pattern.counts, strict=True):
            if not count:
                total = sum(part.weight for part in self.splits)
                raise ValueError(
                    f"{part.setting}: its weight is {part.weight:g} of a sum of {total:g}, it must be at least "
                    f"1/{PERIOD} of the sum"
                )

    @property
    def pattern(self) -> BlendPattern:
        return blend_pattern(tuple(part.weight for part in self.splits))

    @cached_property
    def num_windows(self) -> list[int]:
        return [part.num_windows(self.sequence_length, "training") for part in self.splits]

    def locate(self, sample: int) -> tuple[int, int, int]:
        """Returns (index of the corpus, epoch of this corpus, index of the window) from which sequence number `sample`
        is read."""
        period, place = divmod(sample, PERIOD)
        corpus_p, before_p, counts = self.pattern
        corpus = int(corpus_p[place])
        epoch, position = divmod(period * counts[corpus] + int(before_p[place]), self.num_windows[corpus])
        return corpus, epoch, permute_index(position, self.num_windows[corpus], mix(self.seed, corpus, epoch))

    def sequences(self, first: int, count: int) -> Sequences:
        places = [self.locate(sample) for sample in range(first, first + count)]
        length = self.sequence_length
        none = self.splits[0].read_windows(length, [], self.vocab_size)
        rows = [self.splits[corpus].read_windows(length, [window], self.vocab_size) for corpus, _, window in places]
        return concatenate([none, *rows])

    def epochs(self, num_samples: int) -> list[float]:
        """Returns how many epochs of each corpus the first `num_samples` sequences make up."""
        periods = num_samples / PERIOD
        return [periods * count / n for count, n in zip(self.pattern.counts, self.num_windows, strict=True)]


def blended_held_out(splits: Sequence[CorpusSplit], sequence_length: int, limit: int, vocab_size: int) -> Sequences:
    """Returns held-out sequences: from each corpus as many as it has among the first `limit` training sequences, or all
    that it has if these are fewer."""
    corpus_p = blend_pattern(tuple(part.weight for part in splits)).corpus
    found = []
    for number, part in enumerate(splits):
        if wanted := int((corpus_p[:limit] == number).sum()):
            order = evenly_spaced(part.num_windows(sequence_length, "evaluation (data.held_out)"), wanted)
            found.append(part.read_windows(sequence_length, order, vocab_size))
    return concatenate(found)


@lru_cache(maxsize=8)
def blend_pattern(weights: tuple[float, ...]) -> BlendPattern:
    """Returns the order of corpora in a period: each corpus occurs in proportion to its weight, at equal distances.

    The j-th of a corpus's n sequences is placed at (j + 1/2) / n of the period. So every stretch of sequences is in
    proportion, too, up to about one sequence per corpus.
    """
    shares = np.array(weights) / sum(weights) * PERIOD
    counts = np.floor(shares).astype(np.int64)
    largest_rests = np.argsort(counts - shares, kind="stable")
    counts[largest_rests[: PERIOD - counts.sum()]] += 1
    places = np.concatenate([(2 * np.arange(count) + 1) / (2 * count) for count in counts])
    corpus = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    before = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    order = np.lexsort((corpus, places))
    return BlendPattern(corpus[order], before[order], counts.tolist())


def permute_index(position: int, size: int, key: int) -> int:
    """Returns the number to which a pseudo-random permutation of range(size) maps `position`. key: selects the
    permutation.

    It is a Feistel network (Luby and Rackoff 1988) over the next power of four, applied again while the result is
    outside the range (cycle walking, Black and Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (mix(key, number, right) & mask)
        position = left << half | right
        if position < size:
            return position
