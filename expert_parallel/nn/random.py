"""Random numbers as pure functions of named keys: the same on every layout, after a resume, and in recomputation.

No generator state is kept anywhere; a checkpoint holds a seed. The mixing function is the finaliser of
SplitMix64 (Steele, Lea and Flood 2014), on int64 tensors with wrap-around.
"""

from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio as a signed 64-bit number
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15
_MASK = (1 << 64) - 1


def mix(*keys: int) -> int:
    """Hashes integers to one of 63 bits: a seed for torch.Generator. `mix(1, 2)` differs from `mix(2, 1)`."""
    state = 0
    for key in keys:
        state = (state + key + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
        state ^= state >> 31
    return state >> 1


class Stream(IntEnum):
    """What a random number is for: two uses never share one."""

    JITTER = 0
    NOISE = 1
    SECOND_EXPERT = 2
    PRIORITY = 3
    DROPOUT = 4


def uniform(seed: int, row_index_T: Tensor, width: int) -> Tensor:
    """Uniform numbers in [0, 1), float64, shape (T, width), each a function of (seed, its row's index, its column).

    seed: from `mix`, since seed and row index are added. row_index_T: int64, on the device where the result is wanted.
    """
    column = torch.arange(width, device=row_index_T.device)
    row_key_T = _mix_tensor(row_index_T + seed)
    return (_mix_tensor(row_key_T[:, None] + column) >> 11 & ((1 << 53) - 1)).double() * 2.0**-53


def normal(seed: int, row_index_T: Tensor, width: int) -> Tensor:
    """Standard normal numbers, keyed as `uniform` is, by the inverse of the distribution function."""
    return _open(uniform(seed, row_index_T, width)).mul(2).sub(1).erfinv() * 2**0.5


def gumbel(seed: int, row_index_T: Tensor, width: int) -> Tensor:
    """Standard Gumbel numbers: argmax of log p + gumbel is a draw from p."""
    return -(-_open(uniform(seed, row_index_T, width)).log()).log()


def _open(u: Tensor) -> Tensor:
    """[0, 1) in steps of 2^-53 -> (0, 1)."""
    return u.clamp(min=2.0**-54)


def dropout(x: Tensor, probability: float, seed: int) -> Tensor:
    """Inverted dropout whose mask depends on (seed, shape of x) alone; the identity for probability 0."""
    if probability == 0.0:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32) >= probability
    return torch.where(keep, x / (1.0 - probability), torch.zeros((), dtype=x.dtype, device=x.device))


def _mix_tensor(state: Tensor) -> Tensor:
    state = state + _GOLDEN
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 copies the sign bit."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
