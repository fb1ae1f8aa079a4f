"""Computes the checksums with which the ledger compares the rows that were sent with the rows that arrived.

`counts` reads one word of each row: the sum over all ranks of what was sent minus what arrived must be 0 (`Checksums`).
`rows` hashes whole rows (`hash_rows`). All sums are int64 and wrap around on overflow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from expert_parallel.nn.random import mix_tensor
from expert_parallel.parallel.collectives import ExchangeKey, Peers, Phase

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes
ALL_RANKS = (1 << 20) - 1  # stands for every rank of a group, to which gathered rows are sent
_ROWS = (ExchangeKey(Phase.DISPATCH), ExchangeKey(Phase.COMBINE), ExchangeKey(Phase.METADATA))
CHECKED = (*_ROWS, *(key.backward_key for key in _ROWS))  # the exchanges that have a checksum, each over all its hops
_MIX_1 = -0x61C8864680B583EB  # odd 64-bit constants of SplitMix64, as signed numbers
_MIX_2 = -0x40A7B892E31B1A47


class RowBlocks(NamedTuple):
    """Describes rows that are sorted into blocks, one for each pair of ranks.

    counts: the number of rows of each block. token_ranks, expert_ranks: its two ranks. So the exchanges to the experts
    and back, and those of their gradients, have the same blocks.
    """

    counts: tuple[int, ...]
    token_ranks: tuple[int, ...]
    expert_ranks: tuple[int, ...]

    @staticmethod
    def of(counts: Sequence[int], peers: Peers, has_tokens: bool) -> "RowBlocks":
        """Builds the blocks of an all-to-all, one for each rank of `peers`, paired with this rank. has_tokens: True if
        the tokens of the rows are this rank's, False if the experts are."""
        mine = (peers.ranks[peers.me],) * peers.size
        return RowBlocks(tuple(counts), *((mine, peers.ranks) if has_tokens else (peers.ranks, mine)))

    @staticmethod
    def gathered(counts: Sequence[int], ranks: Sequence[int]) -> "RowBlocks":
        """Builds the blocks of an all-gather, one for each source rank of `ranks`."""
        return RowBlocks(tuple(counts), tuple(ranks), (ALL_RANKS,) * len(ranks))

    def number_rows(self, device: torch.device, offset: int = 0) -> Tensor:
        """Returns (V,) int64, which identifies each row: the token's rank in the upper 20 bits, the expert's in the
        next 20, the index of the row in its block in the lower 24; plus `offset`. The host does not wait."""
        starts, num_rows = [], 0
        for count, token_rank, expert_rank in zip(*self, strict=True):
            starts.append(_signed((token_rank << 44) + (expert_rank << 24) - num_rows + offset))
            num_rows += count
        start_P, count_P = _to_device([starts, self.counts], device)
        # Without output_size the host would wait for the sum of the counts.
        return start_P.repeat_interleave(count_P, output_size=num_rows).add_(torch.arange(num_rows, device=device))


class RowSides(NamedTuple):
    """Describes the rows of an exchange as this rank sends or receives them: on the side of their tokens, and on the
    side of their experts. num_copies: how many ranks receive each row that is sent."""

    tokens: RowBlocks
    experts: RowBlocks
    num_copies: int = 1


def unpack_number(number: int) -> tuple[int, int, int]:
    """Returns the token's rank, the expert's rank, and the index of the row that `number_rows` packed."""
    return number >> 44 & ALL_RANKS, number >> 24 & ALL_RANKS, number & (1 << 24) - 1


def select_words(sides: RowSides, row_words: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Selects one word of each row, by a hash of the row's number and the seed. Returns its index among the words of
    all rows, int64 (V,), for the rows of `sides.tokens` and for those of `sides.experts`.

    row_words: the number of words of a row.
    """
    # Both sides at once, since the number of operations costs more than their size.
    hash_V = _join([sides.tokens, sides.experts]).number_rows(device, seed) * _MIX_1
    word_V = torch.arange(0, row_words * len(hash_V), row_words, device=device) + (hash_V >> 40) % row_words
    tokens_V, experts_V = word_V.split([sum(sides.tokens.counts), sum(sides.experts.counts)])
    return tokens_V, experts_V - row_words * len(tokens_V)


class SampledRows(NamedTuple):
    """Holds words that were read of the rows of one exchange and chunk, as this rank sent or received them.

    word_V: integers. blocks: whose rows they are. coefficient: their factor in the checksum, which depends on the pass,
    the exchange and the chunk: positive for rows that were sent, negative for rows that were received.
    """

    key: ExchangeKey
    word_V: Tensor
    blocks: RowBlocks
    coefficient: int


@dataclass
class Checksums:
    """Sums the words that were read in one pass of one layer; the backward pass adds its own.

    samples: words that are not summed yet. total: the sum of all others, int64 (len(CHECKED),); None: there are none.
    """

    samples: list[SampledRows] = field(default_factory=list)
    total: Tensor | None = None

    def sum(self, device: torch.device) -> Tensor:
        """Returns int64 (len(CHECKED),): for each exchange, the sum over rows of coefficient times factor times word.

        The factor is a hash of the row's number. Summed over all ranks, the result is 0 modulo 2^64 if the rows that
        arrived are those that were sent. The host does not wait.
        """
        if self.samples:
            total = _sum_samples(self.samples, device)
            self.total = total if self.total is None else self.total + total
            self.samples.clear()
        return torch.zeros(len(CHECKED), dtype=torch.int64, device=device) if self.total is None else self.total


def _sum_samples(samples: Sequence[SampledRows], device: torch.device) -> Tensor:
    """Returns `Checksums.sum` of these samples. Those with equal blocks share their factors."""
    groups: dict[RowBlocks, list[SampledRows]] = {}
    for sample in samples:
        groups.setdefault(sample.blocks, []).append(sample)
    hash_V = _join(list(groups)).number_rows(device, offset=_MIX_2).mul_(_MIX_1)  # offset: no number is 0
    factors = hash_V.bitwise_xor_(hash_V >> 32).mul_(_MIX_2).split([sum(blocks.counts) for blocks in groups])
    sums = [_sum_words(group, factor_V) for group, factor_V in zip(groups.values(), factors, strict=True)]
    ordered = list(chain.from_iterable(groups.values()))
    places = [CHECKED.index(sample.key._replace(hop="")) for sample in ordered]
    place, coefficient = _to_device([places, [sample.coefficient for sample in ordered]], device)
    return hash_V.new_zeros(len(CHECKED)).index_add_(0, place, torch.cat(sums) * coefficient)


def _sum_words(group: Sequence[SampledRows], factor_V: Tensor) -> Tensor:
    """Returns for each sample the sum over rows of factor times word, int64."""
    word_V = torch.cat([factor_V[:0], *(sample.word_V for sample in group)])  # the first makes it int64
    # The upper bits are added to the lower, since a difference in the highest alone (a sign, small whole numbers in
    # float64) would be shifted out by a product with an even difference of two factors. By 29 bits and not 32, so that
    # the signs of two float32 in one word do not cancel.
    return word_V.add_(word_V >> 29).view(len(group), len(factor_V)).mul_(factor_V).sum(1)


def as_words(rows: Tensor) -> Tensor:
    """Reinterprets rows (V, ...) as integers (V, W), of the largest size up to 8 bytes that divides a row."""
    return _view_words(rows, 8)


def hash_rows(rows: Tensor) -> Tensor:
    """Returns (V,) int64: for each row, the sum of its words, at most 4 bytes each, times odd factors that are hashes
    of the word's index.

    So a changed word, two flipped bits and two exchanged words all change the hash. Words have half the width of the
    hash, since the product of a 64-bit word's highest bit keeps nothing of the factor.
    """
    words_VW = _view_words(rows, 4)
    factor_W = mix_tensor(torch.arange(words_VW.shape[1], device=rows.device)) | 1
    return (words_VW * factor_W).sum(1)


def _view_words(rows: Tensor, max_size: int) -> Tensor:
    """Reinterprets rows as integers of the largest size up to max_size bytes that divides a row."""
    row_size = math.prod(rows.shape[1:])
    size = math.gcd(row_size * rows.itemsize, max_size)
    if not rows.is_contiguous() or rows.storage_offset() * rows.itemsize % size:
        rows = rows.clone(memory_format=torch.contiguous_format)  # aligned, for a view as another dtype
    return rows.view(len(rows), row_size).view(INTEGERS[size])


def _join(blocks: Sequence[RowBlocks]) -> RowBlocks:
    """Returns the blocks of several tensors as those of their concatenation."""
    return RowBlocks(*(tuple(chain.from_iterable(parts)) for parts in zip(*blocks, strict=True)))


def _to_device(table: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Returns the table as int64. Pinned memory is copied to a GPU without a wait of the host."""
    return torch.tensor(table, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _signed(number: int) -> int:
    """Returns the number modulo 2^64 as a signed 64-bit number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
