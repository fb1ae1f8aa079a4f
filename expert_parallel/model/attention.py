"""Implements causal self-attention with grouped heads; optionally with norms of queries and keys, sinks, and a window.

Single-device code. Shape letters: B sequences, T tokens of this rank, S tokens that this rank's heads have queries of,
L keys of a sequence, H query heads, G key and value heads, h columns of a query or key head, v of a value head, D the
model's.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import AliasChoices, Field, model_validator
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from expert_parallel.model.attention_mask import AttentionContext
from expert_parallel.model.length_scaling import LengthScalingConfig
from expert_parallel.model.rotary import RopeConfig, apply_rope
from expert_parallel.nn.ffn import Linear, identity
from expert_parallel.nn.norms import QK_NORMS, QKNormConfig
from expert_parallel.settings import Settings


class HeadsConfig(Settings):
    """Uses multi-head attention, or grouped-query attention with fewer key than query heads (Ainslie et al. 2023)."""

    kind: Literal["heads"] = "heads"
    num_heads: int = Field(ge=1)
    """Sets the number of query heads; `num_heads` times `head_size` may differ from `d_model`."""
    num_kv_heads: Annotated[int, Field(ge=1)] | None = None
    """Sets the number of key and value heads, which must divide `num_heads`; null is as many as query heads."""
    head_size: int = Field(ge=1, validation_alias=AliasChoices("head_size", "head_dim"))
    """Sets the number of columns of each head's query and key."""
    rope_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, validation_alias=AliasChoices("rope_size", "rotary_dim")
    )
    """Sets how many columns of each query and key head, the first ones, have rotary positions; null rotates all."""
    value_size: Annotated[int, Field(ge=1)] | None = None
    """Sets the number of columns of each head's value; null is `head_size`."""
    value_scale: float = Field(default=1.0, gt=0)
    """Multiplies the values (MiMo-V2)."""
    bias: bool = False
    """Adds a bias to the query, key and value projections, and to the output projection unless `out_bias` is set."""
    out_bias: bool | None = None
    """Adds a bias to the output projection; null does as `bias` says."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """Multiplies the products of queries and keys; null is 1 / sqrt(head_size)."""
    qk_norm: QKNormConfig | None = None
    """Normalizes queries and keys; null leaves them as they are."""
    length_scaling: LengthScalingConfig | None = None
    """Multiplies queries by a factor that grows with the position; null leaves them as they are."""
    sinks: bool = False
    """Adds a learned logit of each head to every softmax, as a key without a value (Xiao et al. 2023; GPT-OSS)."""
    window: Annotated[int, Field(ge=1)] | None = None
    """Limits each query to this many tokens, itself and those before it (sliding window); null sets no limit."""
    chunk: Annotated[int, Field(ge=1)] | None = None
    """Limits each query to the tokens of its own chunk; every so many tokens of a document are a chunk (Llama 4); null
    sets no limit. The blocks are those of `window_blocks`, and `window` must be null."""

    @model_validator(mode="after")
    def _check_heads(self) -> "HeadsConfig":
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) is not a multiple of num_kv_heads ({self.kv_heads})")
        if self.rope_size is not None and self.rope_size > self.head_size:
            raise ValueError(f"rope_size ({self.rope_size}) must be at most head_size ({self.head_size})")
        if self.window is not None and self.chunk is not None:
            raise ValueError(f"window is {self.window} and chunk is {self.chunk}: a block has one of the two at most")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def value_columns(self) -> int:
        """Returns the number of columns of a head's value."""
        return self.value_size or self.head_size

    @property
    def has_out_bias(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    @property
    def rope_columns(self) -> tuple[str, int]:
        """Returns the name of the setting for the number of columns of a head that have rotary positions, and this
        number."""
        return ("head_size", self.head_size) if self.rope_size is None else ("rope_size", self.rope_size)

    @property
    def multiplications_per_key(self) -> int:
        """Returns how many multiplications a token takes for each token that it attends to (query times key, and weight
        times value), over all heads."""
        return self.num_heads * (self.head_size + self.value_columns)

    def num_params(self, d_model: int) -> int:
        """Counts the parameters: four matrices, their biases, the norms of queries and keys, and the sinks."""
        heads, kv_heads, norm = self.num_heads, self.kv_heads, self.qk_norm
        columns = (heads + kv_heads) * self.head_size + kv_heads * self.value_columns
        count = d_model * columns + heads * self.value_columns * d_model
        count += columns if self.bias else 0
        count += d_model if self.has_out_bias else 0
        count += heads if self.sinks else 0
        if norm is not None:
            count += norm.num_params(heads, self.head_size) + norm.num_params(kv_heads, self.head_size)
        return count


class AttentionFn(Protocol):
    """Computes attention of (B, H, S, h) queries over (B, G, L, h) keys and (B, G, L, v) values -> (B, H, S, v).

    mask: as returned by AttentionContext.mask; None: attention is causal, and the S queries are those of the last S of
    the L tokens. sinks_H: see `attend_with_sinks`. scale: multiplies the products of queries and keys; None: h^-0.5.
    """

    def __call__(
        self,
        query_BHSh: Tensor,
        key_BGLh: Tensor,
        value_BGLv: Tensor,
        mask: Tensor | None = None,
        sinks_H: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor: ...


def causal_attention(
    query_BHSh: Tensor,
    key_BGLh: Tensor,
    value_BGLv: Tensor,
    mask: Tensor | None = None,
    sinks_H: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Computes softmax(scale query key^T) value. Shapes and arguments are those of `AttentionFn`."""
    if sinks_H is not None:
        return attend_with_sinks(query_BHSh, key_BGLh, value_BGLv, mask, sinks_H, scale)
    grouped = query_BHSh.shape[1] != key_BGLh.shape[1]
    if mask is None and query_BHSh.shape[2] < key_BGLh.shape[2]:
        mask = causal_lower_right(query_BHSh.shape[2], key_BGLh.shape[2])
    return F.scaled_dot_product_attention(
        query_BHSh, key_BGLh, value_BGLv, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def attend_with_sinks(
    query_BHSh: Tensor,
    key_BGLh: Tensor,
    value_BGLv: Tensor,
    mask: Tensor | None,
    sinks_H: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Computes `causal_attention` with one more logit, the head's sink, in every softmax: a key without a value.

    So a head can attend to no token at all (Xiao et al. 2023; gpt-oss). Shapes are those of `AttentionFn`; sinks_H:
    (H).
    """
    # Softmax in float32 or wider: bfloat16 logits would lose the small weights.
    softmax_dtype = torch.promote_types(torch.float32, query_BHSh.dtype)
    num_kv_heads, num_keys = key_BGLh.shape[1:3]
    num_queries, head_size = query_BHSh.shape[2:]
    divisor = math.sqrt(head_size) if scale is None else 1 / scale
    query_BGgSh = query_BHSh.unflatten(1, (num_kv_heads, -1))  # g: the query heads that share a key head
    logits_BHSL = (query_BGgSh @ key_BGLh[:, :, None].transpose(-1, -2)).flatten(1, 2)
    logits_BHSL = logits_BHSL.to(softmax_dtype) / divisor
    if mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BHSh.device)
        mask = mask.tril(num_keys - num_queries)
    logits_BHSL = logits_BHSL.masked_fill(~mask, -math.inf)
    # Rounded to the compute dtype first, as every other weight is.
    sinks_BHS1 = sinks_H.to(query_BHSh.dtype).to(softmax_dtype)[:, None, None].expand(*logits_BHSL.shape[:-1], 1)
    weights_BHSL = torch.cat([logits_BHSL, sinks_BHS1], -1).softmax(-1)[..., :-1].to(value_BGLv.dtype)
    return (weights_BHSL.unflatten(1, (num_kv_heads, -1)) @ value_BGLv[:, :, None]).flatten(1, 2)


class Attention(nn.Module):
    """Computes softmax(scale q k^T) v with q, k, v and the output projected linearly. (B, T, D) -> (B, T, D).

    rope: None if positions are not rotary. gather_sequence: with tensor parallelism, gathers the T tokens of each rank
    into the S tokens of all ranks, since each rank has only some heads. `attention_fn`: the function that attends;
    context parallelism replaces it.
    """

    def __init__(self, config: HeadsConfig, d_model: int, rope: RopeConfig | None) -> None:
        super().__init__()
        self.head_size, self.rope_size = config.head_size, config.rope_columns[1]
        self.value_size, self.value_scale = config.value_columns, config.value_scale
        self.scale = config.scale
        self.window, self.chunk = config.window, config.chunk
        self.rope = rope
        self.query = Linear(d_model, config.num_heads * self.head_size, bias=config.bias)
        self.key = Linear(d_model, config.kv_heads * self.head_size, bias=config.bias)
        self.value = Linear(d_model, config.kv_heads * self.value_size, bias=config.bias)
        self.out = Linear(config.num_heads * self.value_size, d_model, bias=config.has_out_bias)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        self.norm_after_rope = config.qk_norm is not None and config.qk_norm.after_rope
        if config.qk_norm is not None:
            norm, eps = QK_NORMS[config.qk_norm.kind], config.qk_norm.eps
            self.query_norm = norm(config.num_heads, self.head_size, eps)
            self.key_norm = norm(config.kv_heads, self.head_size, eps)
        self.length_scaling = config.length_scaling
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.sinks else None
        self.gather_sequence: Callable[[Tensor], Tensor] = identity
        self.attention_fn: AttentionFn = causal_attention

    def forward(self, x_BTD: Tensor, attention_context: AttentionContext) -> Tensor:
        """Computes attention; the attention context tells which keys each query attends to."""
        x_BSD = self.gather_sequence(x_BTD)
        query, key, value = self.query(x_BSD), self.key(x_BSD), self.value(x_BSD)  # (B, S, heads * h or v) each
        if not self.norm_after_rope:
            query, key = self._normalize(query, key)
        query_BHSh, key_BGLh = _split_heads(query, self.head_size), _split_heads(key, self.head_size)
        value_BGLv = _split_heads(value if self.value_scale == 1 else value * self.value_scale, self.value_size)
        if self.rope is not None:
            cos, sin = attention_context.rope_cos_sin(self.rope, self.rope_size, query.dtype)
            query_BHSh, key_BGLh = apply_rope(query_BHSh, cos, sin), apply_rope(key_BGLh, cos, sin)
        if self.norm_after_rope:
            query_BHSh, key_BGLh = self._normalize(query_BHSh, key_BGLh)
        if self.length_scaling is not None:
            query_BHSh = query_BHSh * attention_context.length_scale(self.length_scaling, query.dtype)
        if attention_context.cache is not None:  # until here L = S; the cache adds the keys before
            key_BGLh, value_BGLv = attention_context.cache.extend(self, key_BGLh, value_BGLv)
        mask = attention_context.mask(self.window, self.chunk)
        y_BHSv = self.attention_fn(query_BHSh, key_BGLh, value_BGLv, mask, self.sinks, self.scale)
        return self.out(y_BHSv.transpose(1, 2).flatten(2))

    def _normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Normalizes queries and keys, if there are norms: (B, S, heads * h), or (B, heads, S, h) of split heads."""
        if self.query_norm is None or self.key_norm is None:
            return query, key
        return self.query_norm(query), self.key_norm(key)


def _split_heads(rows: Tensor, size: int) -> Tensor:
    """Reshapes (B, S, heads * size) to (B, heads, S, size)."""
    return rows.unflatten(-1, (-1, size)).transpose(1, 2)
