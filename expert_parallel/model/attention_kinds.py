"""Maps each `kind:` of attention to its module, and refuses positions that it cannot have."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from expert_parallel.model.attention import Attention, HeadsConfig
from expert_parallel.model.latent_attention import LatentAttention, LatentAttentionConfig
from expert_parallel.model.rotary import PositionConfig, RopeConfig

# kind -> module, made of (its settings, d_model, rotary positions or None), called with (x (B, S, D),
# AttentionContext).
ATTENTION: dict[str, type[Attention] | type[LatentAttention]] = {"heads": Attention, "latent": LatentAttention}


def _tag(value: Any) -> str:
    kind = value.get("kind", "heads") if isinstance(value, dict) else getattr(value, "kind", "heads")
    return str(kind)


AttentionConfig = Annotated[
    Annotated[HeadsConfig, Tag("heads")] | Annotated[LatentAttentionConfig, Tag("latent")], Discriminator(_tag)
]


def refuse_positions(
    attention: AttentionConfig, position: PositionConfig, *, with_rope: int, without_rope: int
) -> None:
    """Raises a ValueError if an attention cannot have these positions, or one of its settings would do nothing with
    them. with_rope, without_rope: how many blocks have rotary positions, and how many have none."""
    if isinstance(position, RopeConfig):
        name, size = attention.rope_columns
        if size % 2:
            raise ValueError(f"attention.{name} ({size}) must be even for position.kind rope")
        position.refuse("position", name, size)
    elif not isinstance(attention, HeadsConfig):
        raise ValueError(
            f"position.kind is {position.kind!r}, but attention.kind 'latent' supports only rotary positions"
        )
    elif attention.rope_size is not None:
        raise ValueError(
            f"attention.rope_size is {attention.rope_size}, but position.kind is {position.kind!r}: no column of a "
            "head is rotary"
        )
    norm, scaling = attention.qk_norm, attention.length_scaling
    if norm is not None and with_rope == 0 and (norm.kind == "l2" or norm.after_rope):
        part = "kind is 'l2'" if norm.kind == "l2" else "after_rope is true"
        raise ValueError(
            f"attention.qk_norm.{part}, but position.kind is {position.kind!r}: no block has rotary positions"
        )
    if scaling is not None and scaling.blocks == "without_rope" and without_rope == 0:
        raise ValueError(
            f"attention.length_scaling.blocks is 'without_rope', but all {with_rope} blocks have rotary positions: it "
            "would do nothing"
        )
