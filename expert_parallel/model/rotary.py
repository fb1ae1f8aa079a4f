"""Implements rotary positions, with their extensions to longer contexts, and the settings of learned positions."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from expert_parallel.settings import Settings


class LinearScaling(Settings):
    """Divides all rotary frequencies by `factor`: position interpolation (Chen et al. 2023)."""

    kind: Literal["linear"]
    factor: float = Field(ge=1)
    """Divides the frequencies; it is the new context length over the original one."""


class Llama3Scaling(Settings):
    """Divides low rotary frequencies by `factor`, keeps high ones, and interpolates between them (Llama 3.1)."""

    kind: Literal["llama3"]
    factor: float = Field(ge=1)
    """Divides the low frequencies; it is the new context length over the original one."""
    low_frequency_factor: float = Field(gt=0)
    """Divides frequencies that make fewer turns than this in `original_length` tokens."""
    high_frequency_factor: float = Field(gt=0)
    """Keeps frequencies that make more turns than this in `original_length` tokens."""
    original_length: int = Field(ge=1)
    """Sets the context length, in tokens, that the model was trained with before scaling."""

    @model_validator(mode="after")
    def _check_band(self) -> "Llama3Scaling":
        if self.high_frequency_factor < self.low_frequency_factor:
            raise ValueError(
                f"high_frequency_factor ({self.high_frequency_factor:g}) must be at least low_frequency_factor "
                f"({self.low_frequency_factor:g})"
            )
        return self


class YarnScaling(Settings):
    """Divides slow rotary pairs by `factor`, keeps fast ones, and ramps between them: YaRN (Peng et al. 2023)."""

    kind: Literal["yarn"]
    factor: float = Field(ge=1)
    """Divides the frequencies of slow pairs; it is the new context length over the original one."""
    original_length: int = Field(ge=1)
    """Sets the context length, in tokens, that the model was trained with before scaling."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Keeps pairs that make more turns than this in `original_length` tokens."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Divides pairs that make fewer turns than this in `original_length` tokens."""
    attention_factor: Annotated[float, Field(gt=0)] | None = None
    """Multiplies cos and sin; null is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1) if both are
    given, and else 0.1 ln(factor) + 1."""
    mscale: Annotated[float, Field(ge=0)] | None = None
    """Sets the numerator's coefficient in the default of `attention_factor` (DeepSeek-V2)."""
    mscale_all_dim: Annotated[float, Field(ge=0)] | None = None
    """Sets the denominator's coefficient in the default of `attention_factor`; with `kind: latent` it also scales the
    attention logits (DeepSeek-V2)."""
    truncate: bool = True
    """Rounds the ramp's ends to whole pairs."""

    @model_validator(mode="after")
    def _check_ramp(self) -> "YarnScaling":
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast ({self.beta_fast:g}) must be at least beta_slow ({self.beta_slow:g}): both count turns "
                "in original_length tokens"
            )
        return self


# A tuple, since tables of angles are kept by their RopeConfig, and made of a list, which YAML has (hence not strict).
Factors = Annotated[tuple[Annotated[float, Field(gt=0, strict=True)], ...], Field(min_length=1, strict=False)]


class LongRopeScaling(Settings):
    """Divides each rotary frequency by a factor of its own, others in texts longer than `original_length`: LongRoPE
    (Ding et al. 2024, Phi-3.5-MoE). A text is a sequence or, where several are packed, a document."""

    kind: Literal["longrope"]
    short_factors: Factors
    """Divides the frequencies in texts of up to `original_length` tokens; one number for each pair of columns."""
    long_factors: Factors
    """Divides the frequencies in longer texts; one number for each pair of columns."""
    original_length: int = Field(ge=1)
    """Sets the longest text, in tokens, that has the short factors. One that generation makes longer is computed again
    from its beginning, once."""
    short_attention_factor: float = Field(default=1.0, gt=0)
    """Multiplies cos and sin in texts of up to `original_length` tokens."""
    long_attention_factor: float = Field(default=1.0, gt=0)
    """Multiplies cos and sin in longer texts."""
    uses_long_factors: bool = True
    """Uses `long_factors` in longer texts; false uses `short_factors` in all, as transformers' Phi-3.5-MoE does,
    but not its authors' code."""

    @model_validator(mode="after")
    def _check_factors(self) -> "LongRopeScaling":
        short, long = len(self.short_factors), len(self.long_factors)
        if short != long:
            raise ValueError(
                f"short_factors has {short} numbers and long_factors has {long}: both need one for each pair of columns"
            )
        return self


Scaling = Annotated[YarnScaling | Llama3Scaling | LinearScaling | LongRopeScaling, Field(discriminator="kind")]


class RopeConfig(Settings):
    """Uses rotary positions (Su et al. 2021), in the half-split form of GPT-NeoX and Llama."""

    kind: Literal["rope"] = "rope"
    theta: float = Field(default=10000.0, gt=1)
    """Sets the base of the rotary frequencies."""
    scaling: Scaling | None = None
    """Scales the rotary frequencies for contexts longer than the original one; null leaves them as they are."""

    def refuse(self, path: str, name: str, size: int) -> None:
        """Raises a ValueError if LongRoPE has not as many factors as there are pairs of rotary columns. path: of these
        settings. name, size: the setting for the number of rotary columns of a head, and this number."""
        if isinstance(self.scaling, LongRopeScaling) and len(self.scaling.short_factors) != size // 2:
            raise ValueError(
                f"{path}.scaling.short_factors has {len(self.scaling.short_factors)} numbers, but attention.{name} "
                f"({size}) makes {size // 2} pairs of columns"
            )


class LearnedPositionConfig(Settings):
    """Adds a learned vector of each position to the embedding."""

    kind: Literal["learned"]
    max_length: int = Field(ge=1)
    """Sets the number of positions, at least `training.sequence_length`."""


PositionConfig = Annotated[RopeConfig | LearnedPositionConfig, Field(discriminator="kind")]


def rotary_frequencies(
    config: RopeConfig,
    size: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
    length_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor | float]:
    """Returns the rotary frequencies, (size / 2), in radians per position, and a factor for cos and sin.

    size: the number of rotated columns of a head, two per frequency. length_BS: int64, (B or 1, S or 1), the number of
    tokens of each token's text, which LongRoPE needs: it returns frequencies (B or 1, S or 1, size / 2) and factors
    (B or 1, S or 1). The factor is 1 without YaRN and LongRoPE.
    """
    half = size // 2
    frequency_h = config.theta ** (-torch.arange(half, device=device, dtype=dtype) / half)
    if isinstance(config.scaling, LongRopeScaling):
        assert length_BS is not None, "the factors of LongRoPE depend on the length of the text"
        return _longrope(config.scaling, frequency_h, length_BS)
    if config.scaling is None:
        return frequency_h, 1.0
    return SCALINGS[config.scaling.kind](config.scaling, config.theta, frequency_h)


def _longrope(scaling: LongRopeScaling, frequency_h: Tensor, length_BS: Tensor) -> tuple[Tensor, Tensor]:
    is_long_BS = length_BS > scaling.original_length
    long_factors = scaling.long_factors if scaling.uses_long_factors else scaling.short_factors
    short_h, long_h = (frequency_h.new_tensor(factors) for factors in (scaling.short_factors, long_factors))
    short_factor, long_factor = (
        frequency_h.new_tensor(factor) for factor in (scaling.short_attention_factor, scaling.long_attention_factor)
    )
    frequency_BSh = frequency_h / torch.where(is_long_BS[..., None], long_h, short_h)
    return frequency_BSh, torch.where(is_long_BS, long_factor, short_factor)


def _linear(scaling: LinearScaling, theta: float, frequency_h: Tensor) -> tuple[Tensor, float]:
    return frequency_h / scaling.factor, 1.0


def _llama3(scaling: Llama3Scaling, theta: float, frequency_h: Tensor) -> tuple[Tensor, float]:
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns_h = scaling.original_length * frequency_h / (2 * math.pi)
    # Equal factors leave no band between them (Llama 4 Scout).
    kept_h = ((turns_h - low) / (high - low)).clamp(0, 1) if low < high else (turns_h >= high).to(frequency_h.dtype)
    return frequency_h * (kept_h + (1 - kept_h) / scaling.factor), 1.0


def _yarn(scaling: YarnScaling, theta: float, frequency_h: Tensor) -> tuple[Tensor, float]:
    half = len(frequency_h)

    def pair_that_turns(times: float) -> float:
        """Returns the (fractional) index of the pair that makes `times` turns in original_length tokens."""
        return half * math.log(scaling.original_length / (times * 2 * math.pi)) / math.log(theta)

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    width = last - first or 0.001
    pair_h = torch.arange(half, device=frequency_h.device, dtype=frequency_h.dtype)
    stretched_h = ((pair_h - first) / width).clamp(0, 1)
    frequency_h = frequency_h * ((1 - stretched_h) + stretched_h / scaling.factor)
    return frequency_h, _attention_factor(scaling)


def _attention_factor(scaling: YarnScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor)


def yarn_mscale(factor: float, multiplier: float = 1.0) -> float:
    """Returns YaRN's factor for a context that is `factor` times as long: 0.1 multiplier ln(factor) + 1 (eq. 22)."""
    return 0.1 * multiplier * math.log(factor) + 1.0


# Maps a scaling kind to a function of (settings, theta, unscaled frequencies (h / 2)), which returns the scaled
# frequencies and the factor for cos and sin. LongRoPE, which needs the length of the sequence, is not among them.
SCALINGS: dict[str, Callable[[Any, float, Tensor], tuple[Tensor, float]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def rope_cos_sin(
    config: RopeConfig, size: int, position_BS: Tensor, dtype: torch.dtype, length_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of the rotary angles of each position, (B or 1, 1, S, size / 2) each, times the attention
    factor of YaRN or LongRoPE.

    size: the number of rotated columns of a head. position_BS: int64, (B or 1, S). dtype: the dtype of the results.
    length_BS: see `rotary_frequencies`.
    """
    # Angles in float32 or wider: bfloat16 cannot represent integers above 256 exactly.
    angle_dtype = torch.promote_types(torch.float32, dtype)
    frequency, factor = rotary_frequencies(config, size, angle_dtype, position_BS.device, length_BS)
    angle_B1Sh = (position_BS.to(angle_dtype)[..., None] * frequency)[:, None]
    if isinstance(factor, Tensor):
        factor = factor[:, None, :, None]
    return (angle_B1Sh.cos() * factor).to(dtype), (angle_B1Sh.sin() * factor).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pair (x_i, x_{i + r/2}) of each position by its i-th angle. x: (B, heads, S, h).

    cos, sin: as returned by `rope_cos_sin` for r columns; the columns of x from r on are returned as they are. Source:
    Su et al. 2021, in the half-split form of GPT-NeoX and Llama.
    """
    size = 2 * cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([apply_rope(x[..., :size], cos, sin), x[..., size:]], -1)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
