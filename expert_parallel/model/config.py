"""Settings of the decoder: its sizes, and which of its blocks are mixtures of experts."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from expert_parallel.model.attention import HeadsConfig
from expert_parallel.model.attentions import AttentionConfig
from expert_parallel.model.norms import NormConfig
from expert_parallel.model.rotary import PositionConfig, RopeConfig
from expert_parallel.moe.ffn import FFNConfig
from expert_parallel.moe.layer import MoEConfig
from expert_parallel.moe.routers import router_settings
from expert_parallel.moe.routing_across import ExpertChoiceConfig
from expert_parallel.settings import Settings

Recompute = Literal["none", "moe", "block"]


class AllBlocks(Settings):
    kind: Literal["all"] = "all"

    def blocks(self, num_layers: int) -> list[int]:
        return list(range(num_layers))


class EveryNth(Settings):
    """Blocks n - 1, 2n - 1, ...: with n = 2 every other block, the second first (Switch, GLaM)."""

    kind: Literal["every_nth"]
    n: int = Field(ge=1)

    def blocks(self, num_layers: int) -> list[int]:
        return list(range(self.n - 1, num_layers, self.n))


class AllButFirst(Settings):
    """The first k blocks stay dense (DeepSeek-V3)."""

    kind: Literal["all_but_first"]
    k: int = Field(ge=0)

    def blocks(self, num_layers: int) -> list[int]:
        return list(range(self.k, num_layers))


class ListedBlocks(Settings):
    kind: Literal["list"]
    indices: list[int]

    def blocks(self, num_layers: int) -> list[int]:
        return sorted(self.indices)


Blocks = Annotated[AllBlocks | EveryNth | AllButFirst | ListedBlocks, Field(discriminator="kind")]


def _check_blocks(name: str, pattern: Blocks, num_layers: int, what: str) -> None:
    """ValueError unless the pattern selects blocks that there are, each once. what: the setting that is for them."""
    blocks = pattern.blocks(num_layers)
    if len(set(blocks)) < len(blocks):
        raise ValueError(f"{name}.indices names a block twice: {blocks}")
    outside = [block for block in blocks if not 0 <= block < num_layers]
    if outside:
        raise ValueError(f"{name} names block {outside[0]}, but num_layers is {num_layers}")
    if not blocks:
        raise ValueError(f"{what} is given, but {name} selects none of the {num_layers} blocks")


class ModelConfig(Settings):
    """`moe` absent: a dense model. `ffn` is the dense blocks' own; it may be absent where every block is MoE."""

    vocab_size: int = Field(default=256, ge=1)
    num_layers: int = Field(ge=1, le=100_000)
    d_model: int = Field(ge=1)
    attention: AttentionConfig
    ffn: FFNConfig | None = None
    moe: MoEConfig | None = None
    moe_blocks: Blocks = AllBlocks()
    window_blocks: Blocks = Field(default=AllBlocks(), description="where attention.window holds; elsewhere none does")
    norm: NormConfig = NormConfig()
    norm_placement: Literal["pre", "post"] = "pre"
    position: PositionConfig = RopeConfig()
    tied_embeddings: bool = True
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of each block's two branches, and of the embedding")
    init_std: float = Field(default=0.02, gt=0)

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the blocks whose feed-forward is a MoE layer."""
        return self.moe_blocks.blocks(self.num_layers) if self.moe is not None else []

    def attention_of(self, layer: int) -> AttentionConfig:
        """A block's own settings: without the window, where window_blocks leaves the block out."""
        attention = self.attention
        if isinstance(attention, HeadsConfig) and layer not in self.window_blocks.blocks(self.num_layers):
            return attention.model_copy(update={"window": None})
        return attention

    @model_validator(mode="after")
    def _check_attention(self) -> "ModelConfig":
        attention, position = self.attention, self.position
        if isinstance(position, RopeConfig):
            name, size = attention.rope_columns
            if size % 2:
                raise ValueError(f"attention.{name} ({size}) must be even for position.kind rope")
        elif not isinstance(attention, HeadsConfig):
            raise ValueError(
                f"position.kind is {position.kind!r}, but attention.kind 'latent' has rotary positions alone"
            )
        if isinstance(self.window_blocks, AllBlocks):
            return self
        if not isinstance(attention, HeadsConfig) or attention.window is None:
            raise ValueError("window_blocks is given without attention.window: there is no window for these blocks")
        _check_blocks("window_blocks", self.window_blocks, self.num_layers, "attention.window")
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> "ModelConfig":
        if self.moe is not None and self.moe.d_model not in (None, self.d_model):
            raise ValueError(f"moe.d_model ({self.moe.d_model}) differs from d_model ({self.d_model})")
        if self.moe is None and not isinstance(self.moe_blocks, AllBlocks):
            raise ValueError("moe_blocks is given without moe: there are no experts to put into these blocks")
        if self.moe is not None:
            _check_blocks("moe_blocks", self.moe_blocks, self.num_layers, "moe")
        dense = self.num_layers - len(self.moe_layers)
        if dense and self.ffn is None:
            raise ValueError(f"ffn is missing: {dense} of the {self.num_layers} blocks are dense")
        if not dense and self.ffn is not None:
            raise ValueError(f"ffn is given, but all {self.num_layers} blocks are MoE: it would do nothing")
        router = None if self.moe is None else router_settings(self.moe.router)
        if isinstance(router, ExpertChoiceConfig) and not router.accept_future_tokens:
            raise ValueError(
                "moe.router.kind is 'expert_choice' in a causal model: whether an expert takes a token depends on the "
                "tokens after it, so training sees the future and generation differs; set "
                "moe.router.accept_future_tokens to true to have it all the same"
            )
        return self
