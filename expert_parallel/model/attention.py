"""Causal self-attention with grouped key/value heads, rotary positions, and the norms. Single-device code."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from expert_parallel.model.sight import Sight
from expert_parallel.moe.ffn import Linear
from expert_parallel.settings import Settings


class AttentionConfig(Settings):
    """heads * head_size need not be d_model. `num_kv_heads` (default: all heads) must divide `num_heads`."""

    num_heads: int = Field(ge=1)
    num_kv_heads: Annotated[int, Field(ge=1)] | None = None
    head_size: int = Field(ge=1)
    bias: bool = False

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @model_validator(mode="after")
    def _check_heads(self) -> "AttentionConfig":
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) is not a multiple of num_kv_heads ({self.kv_heads})")
        return self


class RopeConfig(Settings):
    """Rotary positions: Su et al. 2021, in the half-split form of GPT-NeoX and Llama."""

    kind: Literal["rope"] = "rope"
    theta: float = Field(default=10000.0, gt=0)


class LearnedPositionConfig(Settings):
    """One learned vector a position, added to the embedding."""

    kind: Literal["learned"]
    max_length: int = Field(ge=1)


PositionConfig = Annotated[RopeConfig | LearnedPositionConfig, Field(discriminator="kind")]


class NormConfig(Settings):
    kind: Literal["rms_norm", "layer_norm"] = "rms_norm"
    eps: float = Field(default=1e-5, gt=0)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 or wider. Zhang and Sennrich 2019."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        return F.rms_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype), self.eps).to(x.dtype)


class LayerNorm(RMSNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias. Ba et al. 2016."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__(d_model, eps)
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, wide.shape[-1:], weight, bias, self.eps).to(x.dtype)


NORMS: dict[str, type[RMSNorm]] = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, heads, S, h) each; keys and values may have fewer heads, and be more than the queries. mask: see
    Sight.mask."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(head_size)) v over the positions so far. (B, S, D) -> (B, S, D).

    attend: what queries, keys, values and the mask become; where tokens are spread over ranks, another than
    `causal_attention`.
    """

    def __init__(self, config: AttentionConfig, d_model: int, theta: float | None) -> None:
        super().__init__()
        self.head_size, self.theta = config.head_size, theta
        self.query = Linear(d_model, config.num_heads * self.head_size, bias=config.bias)
        self.key = Linear(d_model, config.kv_heads * self.head_size, bias=config.bias)
        self.value = Linear(d_model, config.kv_heads * self.head_size, bias=config.bias)
        self.out = Linear(config.num_heads * self.head_size, d_model, bias=config.bias)
        self.attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = causal_attention

    def forward(self, x_BSD: Tensor, sight: Sight) -> Tensor:
        query, key, value = (
            matrix(x_BSD).unflatten(-1, (matrix.weight.shape[0] // self.head_size, self.head_size)).transpose(1, 2)
            for matrix in (self.query, self.key, self.value)
        )
        if self.theta is not None:
            query, key = (rotate(rows, self.theta, sight.position_BS) for rows in (query, key))
        if sight.cache is not None:
            key, value = sight.cache.extend(self, key, value)
        return self.out(self.attend(query, key, value, sight.mask()).transpose(1, 2).flatten(2))


def rotate(x: Tensor, theta: float, position_BS: Tensor) -> Tensor:
    """Turns the pair (x_i, x_{i + h/2}) of each position p by the angle p * theta^(-2i/h). x: (B, heads, S, h).
    position_BS: int64, (B, S) or (1, S).

    Angles in float32, or float64 for float64 inputs: positions beyond 256 have no exact bfloat16.
    """
    wide = torch.promote_types(torch.float32, x.dtype)
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = position_BS.to(wide)[:, None, :, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
