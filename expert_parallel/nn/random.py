"""Computes random numbers as pure functions of keys: the same in every layout, after a resume, and in recomputation.

There is no generator state, so a checkpoint needs only the seed. The hash is the finalizer of SplitMix64 (Steele, Lea
and Flood 2014), on int64 tensors that wrap around on overflow.
"""

from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio as a signed 64-bit number
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15
_MASK = (1 << 64) - 1


def mix(*keys: int) -> int:
    """Hashes integers to a non-negative 63-bit integer, a valid seed of torch.Generator. The order of keys matters."""
    state = 0
    for key in keys:
        state = (state + key + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
        state ^= state >> 31
    return state >> 1


class Stream(IntEnum):
    """Separates the uses of random numbers: part of the key, so that no two uses share a number."""

    JITTER = 0
    NOISE = 1
    SECOND_EXPERT = 2
    PRIORITY = 3
    DROPOUT = 4
    MIXER_CHOICE = 5
    MIXER_STEP = 6


def uniform(seed: int, row_index_T: Tensor, width: int) -> Tensor:
    """Returns uniform numbers in [0, 1), (T, width), float64, each a function of (seed, row index, column).

    seed: from `mix`; as seed and row index are added, nearby seeds would repeat rows. row_index_T: int64, on the
    device of the result.
    """
    column = torch.arange(width, device=row_index_T.device)
    row_key_T = mix_tensor(row_index_T + seed)
    return (mix_tensor(row_key_T[:, None] + column) >> 11 & ((1 << 53) - 1)).double() * 2.0**-53


def normal(seed: int, row_index_T: Tensor, width: int) -> Tensor:
    """Returns standard normal numbers by inverting the distribution function. Arguments and result: see `uniform`."""
    return _open(uniform(seed, row_index_T, width)).mul(2).sub(1).erfinv() * 2**0.5


def gumbel(seed: int, row_index_T: Tensor, width: int) -> Tensor:
    """Returns standard Gumbel numbers: argmax(log p + gumbel) is a draw from p. Arguments: see `uniform`."""
    return -(-_open(uniform(seed, row_index_T, width)).log()).log()


def _open(u: Tensor) -> Tensor:
    """Maps [0, 1) in steps of 2^-53 to (0, 1), where logarithm and erfinv are finite."""
    return u.clamp(min=2.0**-54)


def dropout(x: Tensor, probability: float, seed: int) -> Tensor:
    """Applies inverted dropout: zeroes numbers with the probability, and divides the others by 1 - probability.

    The mask depends only on the seed, and on the shape and device type of x. Probability 0 returns x itself.
    """
    if probability == 0.0:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32) >= probability
    return torch.where(keep, x / (1.0 - probability), torch.zeros((), dtype=x.dtype, device=x.device))


def mix_tensor(state: Tensor) -> Tensor:
    """Hashes each int64 to an int64, of which `mix` with one key returns the upper 63 bits."""
    state = state + _GOLDEN
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Shifts logically: torch's `>>` on int64 copies the sign bit."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
