"""Scales queries by the logarithm of their position, so that attention stays as sharp over long contexts."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from expert_parallel.settings import Settings


class LengthScalingConfig(Settings):
    """Multiplies the query at position p by 1 + beta ln(1 + floor((p + offset) / length)) (Llama 4, after Nakanishi
    2025)."""

    beta: float = Field(gt=0)
    """Sets how much the factor grows with the logarithm of the position."""
    length: int = Field(ge=1)
    """Sets the number of positions after which the factor grows; before, it is 1."""
    offset: int = Field(default=0, ge=0)
    """Shifts the positions, which count from 0."""
    blocks: Literal["all", "without_rope"] = "all"
    """Scales queries in all blocks, or in those without rotary positions (`model.rope_blocks`)."""


def length_scale(config: LengthScalingConfig, position_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the factor of each token's query, (B or 1, 1, S, 1) in `dtype`. position_BS: int64, (B or 1, S)."""
    # Steps are counted in integers, and the logarithm is taken in float32 or wider: bfloat16 has no integers above 256.
    steps_BS = (position_BS + config.offset) // config.length
    wide_BS = 1 + config.beta * steps_BS.to(torch.promote_types(torch.float32, dtype)).log1p()
    return wide_BS.to(dtype)[:, None, :, None]
