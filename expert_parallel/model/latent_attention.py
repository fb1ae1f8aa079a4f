"""Implements multi-head latent attention: keys and values of all heads are projected from one short latent per token.

Only the latents are cached and exchanged between ranks. Single-device code. Shape letters are those of attention.py,
with r columns of a latent. Source: DeepSeek-V2 (2405.04434) section 2.1, DeepSeek-V3 (2412.19437).
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor, nn

from expert_parallel.model.attention import AttentionFn, causal_attention
from expert_parallel.model.attention_mask import AttentionContext
from expert_parallel.model.length_scaling import LengthScalingConfig
from expert_parallel.model.rotary import RopeConfig, YarnScaling, apply_rope, yarn_mscale
from expert_parallel.nn.ffn import Linear, identity
from expert_parallel.nn.norms import RMSNorm
from expert_parallel.settings import Settings


class LatentAttentionConfig(Settings):
    """Uses multi-head latent attention: keys and values of all heads come from one latent of each token (DeepSeek-V2,
    2024, section 2.1)."""

    kind: Literal["latent"]
    num_heads: int = Field(ge=1)
    """Sets the number of heads."""
    query_rank: Annotated[int, Field(ge=1)] | None = Field(
        default=None, validation_alias=AliasChoices("query_rank", "q_lora_rank")
    )
    """Sets the number of columns of the queries' latent; null projects queries from the input without a latent."""
    kv_rank: int = Field(ge=1, validation_alias=AliasChoices("kv_rank", "kv_lora_rank"))
    """Sets the number of columns of the latent that keys and values are projected from."""
    nope_size: int = Field(ge=1, validation_alias=AliasChoices("nope_size", "qk_nope_head_dim"))
    """Sets the number of columns of each head's query and key without rotary positions."""
    rope_size: int = Field(ge=1, validation_alias=AliasChoices("rope_size", "qk_rope_head_dim"))
    """Sets the number of columns of each head's query with rotary positions; all heads share those of the key."""
    value_size: int = Field(ge=1, validation_alias=AliasChoices("value_size", "v_head_dim"))
    """Sets the number of columns of each head's value."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Sets the epsilon of the latents' norms."""
    length_scaling: LengthScalingConfig | None = None
    """Multiplies queries by a factor that grows with the position (Mistral 4); null leaves them as they are."""
    qk_norm: ClassVar[None] = None  # not a setting: the latents are normed instead

    @property
    def key_size(self) -> int:
        """Returns the number of columns of a head's query and key."""
        return self.nope_size + self.rope_size

    @property
    def kv_heads(self) -> int:
        return self.num_heads

    @property
    def rope_columns(self) -> tuple[str, int]:
        """Returns the name of the setting for the number of columns of a head that have rotary positions, and this
        number."""
        return "rope_size", self.rope_size

    @property
    def multiplications_per_key(self) -> int:
        """Returns how many multiplications a token takes for each token that it attends to (query times key, and weight
        times value), over all heads."""
        return self.num_heads * (self.key_size + self.value_size)

    def num_params(self, d_model: int) -> int:
        """Counts the parameters: the projections down to the latents and up from them, the norms of the latents, and
        the output projection."""
        heads, query_rank, kv_rank = self.num_heads, self.query_rank, self.kv_rank
        if query_rank is None:
            query = d_model * heads * self.key_size
        else:
            query = d_model * query_rank + query_rank + query_rank * heads * self.key_size
        down = d_model * (kv_rank + self.rope_size)
        up = kv_rank * heads * (self.nope_size + self.value_size)
        return query + down + kv_rank + up + heads * self.value_size * d_model


class LatentAttention(nn.Module):
    """Computes multi-head latent attention. (B, T, D) -> (B, T, D).

        c_q = norm(W_query_down x)          [q | q_rope] = W_query_up c_q     each head; without query_rank: W_query x
        [c' | k_rope] = W_kv_down x, c = norm(c')         [k | v] = W_kv_up c     each head; k_rope: shared by all heads
        y = W_out softmax(scale [q | R q_rope] [k | R k_rope]^T) v

    R rotates in the half-split form. scale is key_size^-0.5, with YaRN times yarn_mscale(factor, mscale_all_dim)^2.

    gather_sequence: with tensor parallelism, gathers the latents of T tokens to those of S. gather_keys: with context
    parallelism, gathers the latents of S tokens to those of whole sequences, L. `attention_fn`: see `AttentionFn`.
    """

    def __init__(self, config: LatentAttentionConfig, d_model: int, rope: RopeConfig | None) -> None:
        super().__init__()
        assert rope is not None, "ModelConfig refuses other positions"
        self.config, self.rope = config, rope
        self.query_scale = 1.0  # multiplies queries, as scaled_dot_product_attention scales by key_size^-0.5 alone
        if isinstance(rope.scaling, YarnScaling):
            self.query_scale = yarn_mscale(rope.scaling.factor, rope.scaling.mscale_all_dim or 0.0) ** 2
        query_columns = config.num_heads * config.key_size
        if config.query_rank is None:
            self.query = Linear(d_model, query_columns, bias=False)
        else:
            self.query_down = Linear(d_model, config.query_rank, bias=False)
            self.query_norm = RMSNorm(config.query_rank, config.norm_eps)
            self.query_up = Linear(config.query_rank, query_columns, bias=False)
        self.kv_down = Linear(d_model, config.kv_rank + config.rope_size, bias=False)
        self.kv_norm = RMSNorm(config.kv_rank, config.norm_eps)
        self.kv_up = Linear(config.kv_rank, config.num_heads * (config.nope_size + config.value_size), bias=False)
        self.out = Linear(config.num_heads * config.value_size, d_model, bias=False)
        self.gather_sequence: Callable[[Tensor], Tensor] = identity
        self.gather_keys: Callable[[Tensor], Tensor] = identity
        self.attention_fn: AttentionFn = causal_attention

    def forward(self, x_BTD: Tensor, attention_context: AttentionContext) -> Tensor:
        """Computes attention; the attention context tells which keys each query attends to."""
        config = self.config
        has_query_latent = config.query_rank is not None
        query_BTq = self.query_norm(self.query_down(x_BTD)) if has_query_latent else x_BTD
        latent_BTr, rope_BTh = self.kv_down(x_BTD).split([config.kv_rank, config.rope_size], -1)
        rows = [query_BTq, self.kv_norm(latent_BTr), rope_BTh]
        sizes = [x.shape[-1] for x in rows]
        query_BSq, latent_BSr, rope_BSh = self.gather_sequence(torch.cat(rows, -1)).split(sizes, -1)  # one all-gather

        cos, sin = attention_context.rope_cos_sin(self.rope, config.rope_size, x_BTD.dtype)
        query_BSq = query_BSq * self.query_scale
        if config.length_scaling is not None:  # of the latents, which have fewer columns than the heads together
            query_BSq = query_BSq * attention_context.length_scale(config.length_scaling, x_BTD.dtype)[:, 0]
        query_up = self.query_up if has_query_latent else self.query
        query, query_rope = _heads(query_up(query_BSq), config.nope_size, config.rope_size)
        query_BHSh = torch.cat([query, apply_rope(query_rope, cos, sin)], -1)

        latent_B1Sr, rope_B1Sh = latent_BSr[:, None], apply_rope(rope_BSh[:, None], cos, sin)
        if attention_context.cache is not None:
            latent_B1Sr, rope_B1Sh = attention_context.cache.extend(self, latent_B1Sr, rope_B1Sh)
        keys_B1L = self.gather_keys(torch.cat([latent_B1Sr, rope_B1Sh], -1))
        latent_B1Lr, rope_B1Lh = keys_B1L.split([config.kv_rank, config.rope_size], -1)
        key, value_BHLv = _heads(self.kv_up(latent_B1Lr[:, 0]), config.nope_size, config.value_size)
        key_BHLh = torch.cat([key, rope_B1Lh.expand(-1, key.shape[1], -1, -1)], -1)
        y_BHSv = self.attention_fn(query_BHSh, key_BHLh, value_BHLv, attention_context.mask())
        return self.out(y_BHSv.transpose(1, 2).flatten(2))


def _heads(rows: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """Splits (B, S, heads * (first + second)) into (B, heads, S, first) and (B, heads, S, second)."""
    one, two = rows.unflatten(-1, (-1, first + second)).transpose(1, 2).split([first, second], -1)
    return one, two
