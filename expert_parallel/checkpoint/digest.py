"""Computes a digest of a logical tensor that does not depend on how ranks shard it.

The digest of a tensor is the sum of the digests of its shards:

    digest = sum over elements of H(flat index in the logical tensor, bits of the value), modulo 2**128

H is two rounds of multiply and xor-shift over 64 bits (as the finaliser of SplitMix64, Steele et al. 2014), and a
third round for the upper half. It detects mistakes (a swapped expert, a missing or duplicated shard, a wrong row), not
tampering; for the bytes of a file there is its SHA-256.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MODULUS = 1 << 128
CHUNK = 1 << 15  # elements at a time: they stay in the processor's cache
_SPREAD = 0x9E3779B97F4A7C15  # odd: different indices have different keys
_MIX = tuple(np.uint64(number) for number in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93))
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}

Keys = NDArray[np.uint64]


def digest(part: Tensor, start: Sequence[int], shape: Sequence[int]) -> int:
    """Returns the digest of `part`, a rectangular part that begins at the indices `start` of a logical tensor of
    `shape`.

    part: on the CPU, of any dtype of 1 to 8 bytes; an 8-byte value counts as two words of 4 bytes. The digests of all
    shards of a tensor add up, modulo MODULUS, to the digest of the tensor.
    """
    assert all(s >= 0 and s + n <= size for s, n, size in zip(start, part.shape, shape, strict=True)), (start, shape)
    if part.numel() == 0:
        return 0
    size = part.element_size()
    rows_R, first, length = _contiguous_words(start, part.shape, shape, words=2 if size == 8 else 1)
    bits = part.detach().contiguous().flatten().view(torch.uint8).numpy().view(_BITS[size])
    bits_RC = bits.reshape(len(rows_R), length)
    height, width = max(1, CHUNK // length), min(CHUNK, length)
    total = 0
    for left in range(0, length, width):
        run_C = np.arange(first + left, first + min(left + width, length), dtype=np.uint64) * _modulo(_SPREAD)
        for top in range(0, len(rows_R), height):
            keys = rows_R[top : top + height, None] + run_C
            keys += bits_RC[top : top + height, left : left + width]
            total += _sum_of_hashes(keys)
    return total % MODULUS


def format_digest(total: int) -> str:
    """Formats a digest as 32 hex digits."""
    return f"{total % MODULUS:032x}"


def _contiguous_words(
    start: Sequence[int], part: Sequence[int], shape: Sequence[int], words: int
) -> tuple[Keys, int, int]:
    """Splits a rectangle into runs of consecutive words; returns (keys of the runs, first word, length of a run).

    The key of a word is its flat index * _SPREAD modulo 2**64. It is the sum of the key of its run (returned, (R,)) and
    of the key of its position in the run, which counts from `first`, `length` times.
    """
    dim = len(shape) - 1
    while dim > 0 and part[dim] == shape[dim]:  # whole rows: they follow one another
        dim -= 1
    stride = math.prod(shape[dim + 1 :])
    first = (start[dim] if shape else 0) * stride * words
    length = math.prod(part[dim:]) * words
    rows_R = np.zeros(1, dtype=np.uint64)
    for outer in reversed(range(dim)):
        stride *= shape[outer + 1]
        places = np.arange(start[outer], start[outer] + part[outer], dtype=np.uint64)
        rows_R = np.add.outer(places * _modulo(stride * words * _SPREAD), rows_R).flatten()
    return rows_R, first, length


def _sum_of_hashes(keys: Keys) -> int:
    """Returns the exact sum of the hashes, below 2**128 times their number. Overwrites `keys`."""
    scratch = np.empty_like(keys)

    def xor_shift(shift: int) -> None:
        np.right_shift(keys, np.uint64(shift), out=scratch)
        np.bitwise_xor(keys, scratch, out=keys)

    xor_shift(32)
    np.multiply(keys, _MIX[0], out=keys)
    xor_shift(29)
    np.multiply(keys, _MIX[1], out=keys)
    xor_shift(32)
    # A sum of 64-bit numbers wraps; that of their upper halves does not, and tells how often.
    np.right_shift(keys, np.uint64(32), out=scratch)
    upper = int(scratch.sum()) << 32
    low = upper + (int(keys.sum()) - upper) % (1 << 64)
    np.multiply(keys, _MIX[2], out=keys)
    xor_shift(31)
    return low + (int(keys.sum()) << 64)


def _modulo(number: int) -> np.uint64:
    return np.uint64(number % (1 << 64))
