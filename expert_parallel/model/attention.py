"""Causal self-attention with heads, grouped or not; optionally with norms of queries and keys, sinks, and a window.
Single-device code."""

import math
from collections.abc import Callable
from typing import Annotated, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from expert_parallel.model.attention_mask import Sight
from expert_parallel.model.rotary import RopeConfig, rotate
from expert_parallel.nn.ffn import Linear, identity
from expert_parallel.nn.norms import QK_NORMS, QKNormConfig
from expert_parallel.settings import Settings


class HeadsConfig(Settings):
    """heads * head_size need not be d_model. `num_kv_heads` (default: all heads) must divide `num_heads`. out_bias: of
    the last matrix; null: as `bias`. sinks: see `attend_with_sinks`. window: keys that a query sees, its own and those
    before it."""

    kind: Literal["heads"] = "heads"
    num_heads: int = Field(ge=1)
    num_kv_heads: Annotated[int, Field(ge=1)] | None = None
    head_size: int = Field(ge=1)
    bias: bool = False
    out_bias: bool | None = None
    qk_norm: QKNormConfig | None = None
    sinks: bool = False
    window: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_heads(self) -> "HeadsConfig":
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) is not a multiple of num_kv_heads ({self.kv_heads})")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def has_out_bias(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    @property
    def rope_columns(self) -> tuple[str, int]:
        """What rotary positions turn: the setting, and how many columns of a head."""
        return "head_size", self.head_size

    @property
    def values_kept(self) -> int:
        """Numbers a token that the backward pass needs: queries, keys, values, and what comes of them."""
        return (2 * self.num_heads + 2 * self.kv_heads) * self.head_size

    @property
    def products_per_key(self) -> int:
        """Multiplications of a token with each key that it sees, and with its value, in all heads."""
        return 2 * self.num_heads * self.head_size

    def num_params(self, d_model: int) -> int:
        """Counts the four matrices, their biases, the norms of queries and keys, and the sinks."""
        heads, kv_heads, norm = self.num_heads, self.kv_heads, self.qk_norm
        columns = (heads + 2 * kv_heads) * self.head_size
        count = d_model * columns + heads * self.head_size * d_model
        count += columns if self.bias else 0
        count += d_model if self.has_out_bias else 0
        count += heads if self.sinks else 0
        if norm is not None:
            count += norm.num_params(heads, self.head_size) + norm.num_params(kv_heads, self.head_size)
        return count


class Attend(Protocol):
    """(B, heads, S, h), (B, kv heads, L, h), (B, kv heads, L, v) -> (B, heads, S, v). mask: see Sight.mask; None: the
    queries are the last of the L tokens, and see the keys up to their own. sinks_H: see `attend_with_sinks`."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, sinks_H: Tensor | None = None
    ) -> Tensor: ...


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, sinks_H: Tensor | None = None
) -> Tensor:
    """softmax(query key^T / sqrt(h)) value; see Attend."""
    if sinks_H is not None:
        return attend_with_sinks(query, key, value, mask, sinks_H)
    grouped = query.shape[1] != key.shape[1]
    if mask is None and query.shape[2] < key.shape[2]:
        mask = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def attend_with_sinks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks_H: Tensor) -> Tensor:
    """As `causal_attention`, but each head's sink is one more logit in every softmax, of a key that has no value (Xiao
    et al. 2023; gpt-oss): heads may attend to nothing. Softmax in float32 or wider."""
    wide = torch.promote_types(torch.float32, query.dtype)
    num_kv_heads, num_queries, num_keys = key.shape[1], query.shape[2], key.shape[2]
    grouped = query.unflatten(1, (num_kv_heads, -1))  # (B, kv heads, heads of each, S, h)
    logits = (grouped @ key[:, :, None].transpose(-1, -2)).flatten(1, 2).to(wide) / math.sqrt(query.shape[-1])
    if mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    logits = logits.masked_fill(~mask, -math.inf)
    sinks = sinks_H.to(query.dtype).to(wide)[:, None, None].expand(*logits.shape[:-1], 1)
    weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1].to(value.dtype)
    return (weights.unflatten(1, (num_kv_heads, -1)) @ value[:, :, None]).flatten(1, 2)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(head_size)) v over the keys that `sight` lets a query see. (B, T, D) of this rank's tokens
    -> (B, T, D).

    rope: None where positions are not rotary. gather_sequence: where tp divides heads and tokens, the tokens T -> those
    S that this rank's heads attend from. attend: where ranks divide the tokens, another than the default.
    """

    def __init__(self, config: HeadsConfig, d_model: int, rope: RopeConfig | None) -> None:
        super().__init__()
        self.head_size, self.window, self.rope = config.head_size, config.window, rope
        self.query = Linear(d_model, config.num_heads * self.head_size, bias=config.bias)
        self.key = Linear(d_model, config.kv_heads * self.head_size, bias=config.bias)
        self.value = Linear(d_model, config.kv_heads * self.head_size, bias=config.bias)
        self.out = Linear(config.num_heads * self.head_size, d_model, bias=config.has_out_bias)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if config.qk_norm is not None:
            norm, eps = QK_NORMS[config.qk_norm.kind], config.qk_norm.eps
            self.query_norm = norm(config.num_heads, self.head_size, eps)
            self.key_norm = norm(config.kv_heads, self.head_size, eps)
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.sinks else None
        self.gather_sequence: Callable[[Tensor], Tensor] = identity
        self.attend: Attend = causal_attention

    def forward(self, x_BTD: Tensor, sight: Sight) -> Tensor:
        x_BSD = self.gather_sequence(x_BTD)
        query, key, value = self.query(x_BSD), self.key(x_BSD), self.value(x_BSD)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (rows.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for rows in (query, key, value))
        if self.rope is not None:
            cos, sin = sight.rotation(self.rope, self.head_size, query.dtype)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if sight.cache is not None:
            key, value = sight.cache.extend(self, key, value)
        mixed = self.attend(query, key, value, sight.mask(self.window), self.sinks)
        return self.out(mixed.transpose(1, 2).flatten(2))
