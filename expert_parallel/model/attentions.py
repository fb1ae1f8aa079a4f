"""All kinds of attention, by `kind:`, and the settings that choose one."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from expert_parallel.model.attention import Attention, HeadsConfig
from expert_parallel.model.latent_attention import LatentAttention, LatentAttentionConfig

# kind -> module, made of (its settings, d_model, rotary positions or None), called with (x (B, S, D), Sight).
ATTENTION: dict[str, type[Attention] | type[LatentAttention]] = {"heads": Attention, "latent": LatentAttention}


def _tag(value: Any) -> str:
    kind = value.get("kind", "heads") if isinstance(value, dict) else getattr(value, "kind", "heads")
    return str(kind)


AttentionConfig = Annotated[
    Annotated[HeadsConfig, Tag("heads")] | Annotated[LatentAttentionConfig, Tag("latent")], Discriminator(_tag)
]
