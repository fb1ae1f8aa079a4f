"""Implements norms of the residual stream, and of queries and keys.

All compute in float32 or wider, since the mean of squares loses accuracy in bfloat16, and return the input's dtype.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from expert_parallel.settings import Settings


class NormConfig(Settings):
    """Describes a norm over the residual stream's columns, with learned weights."""

    kind: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """Sets the norm: RMSNorm (Zhang and Sennrich 2019), or LayerNorm with biases (Ba et al. 2016)."""
    eps: float = Field(default=1e-5, gt=0)
    """Adds this epsilon under the square root."""

    def num_params(self, width: int) -> int:
        """Counts the weights and, of a layer norm, the biases."""
        return 2 * width if self.kind == "layer_norm" else width


class RMSNorm(nn.Module):
    """Computes x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        return F.rms_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype), self.eps).to(x.dtype)


class LayerNorm(RMSNorm):
    """Computes (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, wide.shape[-1:], weight, bias, self.eps).to(x.dtype)


NORMS: dict[str, type[RMSNorm]] = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}


class QKNormConfig(Settings):
    """Applies RMSNorm to queries and keys."""

    kind: Literal["per_head", "whole", "l2"]
    """Normalizes each head by itself, with one weight for all heads (`per_head`, Qwen3), or all heads together before
    they are split (`whole`, OLMoE), or each head without weights, in blocks with rotary positions alone (`l2`, Llama
    4)."""
    eps: float = Field(default=1e-6, gt=0)
    """Adds this epsilon under the square root."""
    after_rope: bool = False
    """Normalizes after rotary positions are applied instead of before (Hunyuan, Llama 4); not with `kind: whole`."""

    @model_validator(mode="after")
    def _check_order(self) -> "QKNormConfig":
        if self.kind == "whole" and self.after_rope:
            raise ValueError("after_rope is true, but kind 'whole' normalizes before heads are split and rotated")
        return self

    def num_params(self, heads: int, head_size: int) -> int:
        """Counts the weights of one norm, of queries or of keys. heads: the number of query or key heads."""
        return {"per_head": head_size, "whole": heads * head_size, "l2": 0}[self.kind]


class HeadNorm(RMSNorm):
    """Normalizes each head separately. x: (..., heads * head_size), or (..., head_size) of split heads. weight:
    (head_size,), shared by all heads."""

    def __init__(self, heads: int, head_size: int, eps: float) -> None:
        super().__init__(head_size, eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(-1, (-1, len(self.weight)))).flatten(-2)


class WholeNorm(RMSNorm):
    """Normalizes all heads together. x: (..., heads * head_size). weight: (heads * head_size,)."""

    def __init__(self, heads: int, head_size: int, eps: float) -> None:
        super().__init__(heads * head_size, eps)


class L2Norm(nn.Module):
    """Divides each head by its root mean square, without weights. x: as `HeadNorm`'s."""

    def __init__(self, heads: int, head_size: int, eps: float) -> None:
        super().__init__()
        self.head_size, self.eps = head_size, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(torch.float32, x.dtype)).unflatten(-1, (-1, self.head_size))
        return F.rms_norm(wide, wide.shape[-1:], None, self.eps).flatten(-2).to(x.dtype)


QK_NORMS: dict[str, type[HeadNorm] | type[WholeNorm] | type[L2Norm]] = {
    "per_head": HeadNorm,
    "whole": WholeNorm,
    "l2": L2Norm,
}
