"""The decoder: embedding, blocks of attention and feed-forward (dense or mixture of experts), output logits.

Single-device code: process groups are only handed through to the MoE layers; `parallelize.py` does the rest from
outside.
"""

from dataclasses import replace
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expert_parallel.mesh import Nodes
from expert_parallel.model.attention import (
    NORMS,
    Attention,
    AttentionConfig,
    LearnedPositionConfig,
    NormConfig,
    PositionConfig,
    RopeConfig,
)
from expert_parallel.moe.balance import loss_name, pool_layers
from expert_parallel.moe.ffn import FFN, FFNConfig
from expert_parallel.moe.layer import MoEConfig, MoELayer
from expert_parallel.moe.plan import LoadStats, RouterReplay, StepContext
from expert_parallel.moe.random import dropout, mix
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


MoEBlocks = Annotated[AllBlocks | EveryNth | AllButFirst | ListedBlocks, Field(discriminator="kind")]


class ModelConfig(Settings):
    """`moe` absent: a dense model. `ffn` is the dense blocks' own; it may be absent where every block is MoE."""

    vocab_size: int = Field(default=256, ge=1)
    num_layers: int = Field(ge=1)
    d_model: int = Field(ge=1)
    attention: AttentionConfig
    ffn: FFNConfig | None = None
    moe: MoEConfig | None = None
    moe_blocks: MoEBlocks = AllBlocks()
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

    @model_validator(mode="after")
    def _fit_together(self) -> "ModelConfig":
        if self.moe is not None and self.moe.d_model not in (None, self.d_model):
            raise ValueError(f"moe.d_model ({self.moe.d_model}) differs from d_model ({self.d_model})")
        if len(set(self.moe_layers)) < len(self.moe_layers):
            raise ValueError(f"moe_blocks.indices names a block twice: {self.moe_layers}")
        if self.moe is None and not isinstance(self.moe_blocks, AllBlocks):
            raise ValueError("moe_blocks is given without moe: there are no experts to put into these blocks")
        outside = [block for block in self.moe_layers if not 0 <= block < self.num_layers]
        if outside:
            raise ValueError(f"moe_blocks names block {outside[0]}, but num_layers is {self.num_layers}")
        if self.moe is not None and not self.moe_layers:
            raise ValueError(f"moe is given, but moe_blocks selects none of the {self.num_layers} blocks")
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
        if isinstance(self.position, RopeConfig) and self.attention.head_size % 2:
            raise ValueError(f"attention.head_size ({self.attention.head_size}) must be even for position.kind rope")
        return self


class BlockOutput(NamedTuple):
    """x: (B, S, D). The others: MoEOutput's; None and empty for a dense block. A tuple, so that FSDP2 sees the
    tensors."""

    x: Tensor
    losses: dict[str, Tensor]
    stats: LoadStats | None
    pooled: dict[str, tuple[Tensor, Tensor]]


class ModelOutput(NamedTuple):
    """logits: (B, S, vocab) in the compute dtype. losses, stats: by number of the MoE block."""

    logits: Tensor
    losses: dict[int, dict[str, Tensor]]
    stats: dict[int, LoadStats]


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + ffn(norm(x)). Post-norm: the norms after the sums."""

    def __init__(
        self,
        config: ModelConfig,
        is_moe: bool,
        ep_group: dist.ProcessGroup | None,
        data_group: dist.ProcessGroup | None,
        recompute: Recompute,
        nodes: Nodes | None,
    ) -> None:
        super().__init__()
        self.norm_placement, self.dropout, self.recompute = config.norm_placement, config.dropout, recompute
        norm = partial(NORMS[config.norm.kind], config.d_model, config.norm.eps)
        theta = config.position.theta if isinstance(config.position, RopeConfig) else None
        self.attention_norm, self.ffn_norm = norm(), norm()
        self.attention = Attention(config.attention, config.d_model, theta)
        self.moe: MoELayer | None = None
        self.ffn: FFN | None = None
        if is_moe:
            assert config.moe is not None
            moe_config = config.moe.model_copy(update={"d_model": config.d_model})
            self.moe = MoELayer(moe_config, ep_group, data_group, nodes=nodes)
        else:
            assert config.ffn is not None
            self.ffn = FFN(config.ffn, config.d_model)

    def forward(self, x: Tensor, context: StepContext) -> BlockOutput:
        # All randomness is a function of the context, so recomputation needs no saved generator state. The choices of
        # the first pass are played back in the second.
        if self.recompute != "none" and torch.is_grad_enabled():
            context = replace(context, replay=context.replay or RouterReplay())
        if self.recompute == "block" and torch.is_grad_enabled():
            return checkpoint(self._run, x, context, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, context)

    def _run(self, x: Tensor, context: StepContext) -> BlockOutput:
        if self.norm_placement == "pre":
            x = x + self._drop(self.attention(self.attention_norm(x)), context, branch=0)
            branch = self._feed_forward(self.ffn_norm(x), context)
            return branch._replace(x=x + self._drop(branch.x, context, branch=1))
        x = self.attention_norm(x + self._drop(self.attention(x), context, branch=0))
        branch = self._feed_forward(x, context)
        return branch._replace(x=self.ffn_norm(x + self._drop(branch.x, context, branch=1)))

    def _feed_forward(self, x: Tensor, context: StepContext) -> BlockOutput:
        if self.moe is None:
            assert self.ffn is not None
            return BlockOutput(self.ffn(x), {}, None, {})
        if self.recompute == "moe" and torch.is_grad_enabled():
            output = checkpoint(self.moe, x, context, use_reentrant=False, preserve_rng_state=False)
        else:
            output = self.moe(x, context)
        return BlockOutput(output.y, output.losses, output.stats, output.pooled)

    def _drop(self, x: Tensor, context: StepContext, branch: int) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        where = (context.seed, context.step, context.micro_step, context.layer, context.coordinate, branch)
        return dropout(x, self.dropout, mix(*where))


class Transformer(nn.Module):
    """Tokens (B, S), int64 -> ModelOutput. Computes in `compute_dtype`, whatever dtype the weights are kept in.

    ep_group, data_group, nodes: see MoELayer. Weights are not initialised here: see `init_weights`.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype = torch.float32,
        ep_group: dist.ProcessGroup | None = None,
        data_group: dist.ProcessGroup | None = None,
        recompute: Recompute = "none",
        nodes: Nodes | None = None,
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        learned = isinstance(config.position, LearnedPositionConfig)
        self.position = nn.Embedding(config.position.max_length, config.d_model) if learned else None  # type: ignore[union-attr]
        self.blocks = nn.ModuleList(
            Block(config, layer in config.moe_layers, ep_group, data_group, recompute, nodes)
            for layer in range(config.num_layers)
        )
        pre = config.norm_placement == "pre"
        self.final_norm = NORMS[config.norm.kind](config.d_model, config.norm.eps) if pre else None
        self.unembedding = None if config.tied_embeddings else nn.Embedding(config.vocab_size, config.d_model)

    def forward(self, tokens_BS: Tensor, context: StepContext) -> ModelOutput:
        """context.coordinate is this rank's; the block number and the token ids are filled in here."""
        context = replace(context, token_ids_BS=tokens_BS)
        x = self.embedding(tokens_BS).to(self.compute_dtype)
        if self.position is not None:
            if tokens_BS.shape[1] > len(self.position.weight):
                raise ValueError(
                    f"{tokens_BS.shape[1]} tokens in a sequence are more than the {len(self.position.weight)} of "
                    "model.position.max_length"
                )
            x = x + self.position.weight[: tokens_BS.shape[1]].to(self.compute_dtype)
        if self.training and self.config.dropout > 0:
            where = (context.seed, context.step, context.micro_step, self.config.num_layers, context.coordinate)
            x = dropout(x, self.config.dropout, mix(*where))
        outputs: dict[int, BlockOutput] = {}
        for layer, block in enumerate(self.blocks):
            output: BlockOutput = block(x, replace(context, layer=layer))
            x = output.x
            if output.stats is not None:
                outputs[layer] = output
        losses, stats = self._losses(outputs)
        if self.final_norm is not None:
            x = self.final_norm(x)
        table = self.embedding if self.unembedding is None else self.unembedding
        return ModelOutput(F.linear(x, table.weight.to(x.dtype)), losses, stats)

    def _losses(self, outputs: dict[int, BlockOutput]) -> tuple[dict[int, dict[str, Tensor]], dict[int, LoadStats]]:
        """By MoE block; those that are pooled over layers, from all of them."""
        losses = {layer: dict(output.losses) for layer, output in outputs.items()}
        stats = {layer: output.stats for layer, output in outputs.items() if output.stats is not None}
        for layer, parts in pool_layers({layer: output.pooled for layer, output in outputs.items()}).items():
            assert self.config.moe is not None
            weights = {loss_name(loss): loss.coefficient for loss in self.config.moe.losses}
            losses[layer] |= {name: weights[name] * part for name, part in parts.items()}
            detached = {name: part.detach() for name, part in parts.items()}
            stats[layer] = replace(stats[layer], losses={**stats[layer].losses, **detached})
        return losses, stats
