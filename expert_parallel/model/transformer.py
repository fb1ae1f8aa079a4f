"""The decoder: embedding, blocks of attention and feed-forward (dense or mixture of experts), output logits.

Single-device code: of the mesh it takes which positions of each sequence are here, and hands it to the MoE layers;
`parallelize.py` does the rest from outside.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expert_parallel.model.attention_mask import Sight
from expert_parallel.model.config import ATTENTION, ModelConfig, Recompute
from expert_parallel.model.kv_cache import KeyValueCache
from expert_parallel.model.rotary import LearnedPositionConfig, RopeConfig
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import RouterReplay, StepContext
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.routers.losses import BalanceLossConfig, loss_name, pool_layers
from expert_parallel.moe.types import LoadStats
from expert_parallel.nn.ffn import FFN, identity
from expert_parallel.nn.norms import NORMS
from expert_parallel.nn.random import dropout, mix
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.parallel.sequence import SequencePlace

Pooled = dict[str, tuple[Tensor, Tensor]]  # by loss: f and P, see losses.fractions_and_probabilities


class BlockOutput(NamedTuple):
    """x: (B, S, D). The others: MoEOutput's; None and empty for a dense block. A tuple, so that FSDP2 sees the
    tensors."""

    x: Tensor
    losses: dict[str, Tensor]
    stats: LoadStats | None
    pooled: Pooled


class ModelOutput(NamedTuple):
    """logits: (B, S, vocab) in the compute dtype; of a pipeline stage that is not the last, x (B, S, D) instead.
    losses, stats: by number of the MoE block. pooled: of a stage alone, the terms of losses that are pooled over the
    layers of all stages; a whole model has them in `losses`."""

    logits: Tensor
    losses: dict[int, dict[str, Tensor]]
    stats: dict[int, LoadStats]
    pooled: dict[int, Pooled]


@dataclass(frozen=True)
class Part:
    """The blocks of one pipeline stage. The first stage has the embedding, the last the logits."""

    blocks: range
    number: int = 0
    num_stages: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.num_stages - 1


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + ffn(norm(x)). Post-norm: the norms after the sums."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        mesh: ParallelMesh | None,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.norm_placement, self.dropout, self.recompute = config.norm_placement, config.dropout, recompute
        norm = partial(NORMS[config.norm.kind], config.d_model, config.norm.eps)
        rope = config.position if isinstance(config.position, RopeConfig) else None
        self.attention_norm, self.ffn_norm = norm(), norm()
        attention = config.attention_of(layer)
        self.attention = ATTENTION[attention.kind](attention, config.d_model, rope)  # type: ignore[arg-type]
        self.moe: MoELayer | None = None
        self.ffn: FFN | None = None
        if layer in config.moe_layers:
            assert config.moe is not None
            moe_config = config.moe.model_copy(update={"d_model": config.d_model})
            self.moe = build_moe_layer(moe_config, mesh)
        else:
            assert config.ffn is not None
            self.ffn = FFN(config.ffn, config.d_model)

    def forward(self, x: Tensor, context: StepContext, sight: Sight) -> BlockOutput:
        # All randomness is a function of the context, so recomputation needs no saved generator state. The choices of
        # the first pass are played back in the second.
        if self.recompute != "none" and torch.is_grad_enabled():
            context = replace(context, replay=context.replay or RouterReplay())
        if self.recompute == "block" and torch.is_grad_enabled():
            return checkpoint(self._run, x, context, sight, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, context, sight)

    def _run(self, x: Tensor, context: StepContext, sight: Sight) -> BlockOutput:
        if self.norm_placement == "pre":
            x = x + self._drop(self.attention(self.attention_norm(x), sight), context, branch=0)
            branch = self._feed_forward(self.ffn_norm(x), context)
            return branch._replace(x=x + self._drop(branch.x, context, branch=1))
        x = self.attention_norm(x + self._drop(self.attention(x, sight), context, branch=0))
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


def build_moe_layer(config: MoEConfig, mesh: ParallelMesh | None) -> MoELayer:
    if mesh is None:
        return MoELayer(config)
    return MoELayer(
        config,
        mesh.ep_group,
        mesh.stage_group,
        nodes=mesh.nodes,
        sequence_group=mesh.sequence_group,
        etp_group=mesh.etp_group,
    )


class LanguageModel(nn.Module):
    """A decoder as training, checkpoints and generation see it: all of it, or this rank's stages of a pipeline.

    Called with tokens (B, S), int64, a StepContext and, in generation, a KeyValueCache; returns a ModelOutput. A class
    rather than a Protocol, since its callers also treat it as the nn.Module that it is.
    """

    config: ModelConfig
    place: SequencePlace

    @property
    def has_logits(self) -> bool:
        """Whether the logits come out on this rank; else the output goes on to another rank's stage."""
        raise NotImplementedError

    def local_blocks(self) -> Iterator[tuple[int, Block]]:
        """Yields the blocks that are on this rank, with their numbers."""
        raise NotImplementedError


class Transformer(LanguageModel):
    """Tokens (B, S), int64 -> ModelOutput. Computes in `compute_dtype`, whatever dtype the weights are kept in.

    mesh: handed to the MoE layers; None: this rank alone. part: what of the model is here; default: all. Where ranks
    divide sequences, each is given them whole; the logits are those of its own positions (`place.context`).

    Weights are not initialised here: see `init_weights`.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype = torch.float32,
        mesh: ParallelMesh | None = None,
        recompute: Recompute = "none",
        part: Part | None = None,
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.part = part or Part(range(config.num_layers))
        self.place = SequencePlace.of(mesh)
        self.before_logits: Callable[[Tensor], Tensor] = identity  # another one where ranks divide the vocabulary
        is_first, is_last = self.part.is_first, self.part.is_last
        table = partial(nn.Embedding, embedding_dim=config.d_model)
        learned = config.position if isinstance(config.position, LearnedPositionConfig) else None
        pre = config.norm_placement == "pre"
        self.embedding = table(config.vocab_size) if is_first or (is_last and config.tied_embeddings) else None
        self.position = table(learned.max_length) if learned is not None and is_first else None
        # A block's place in the list is its number; those of other stages are None.
        self.blocks = nn.ModuleList(
            Block(config, layer, mesh, recompute) if layer in self.part.blocks else None  # type: ignore[misc]
            for layer in range(config.num_layers)
        )
        self.final_norm = NORMS[config.norm.kind](config.d_model, config.norm.eps) if pre and is_last else None
        self.unembedding = table(config.vocab_size) if is_last and not config.tied_embeddings else None

    @property
    def has_logits(self) -> bool:
        return self.part.is_last

    def local_blocks(self) -> Iterator[tuple[int, Block]]:
        for layer in self.part.blocks:
            block = self.blocks[layer]
            assert isinstance(block, Block)
            yield layer, block

    def forward(
        self, tokens_BS: Tensor, context: StepContext, x: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> ModelOutput:
        """context.coordinate is this rank's, document_BS and mask_BS are of whole rows; the block number and what the
        tokens are is filled in here. x: (B, S, D), what the stage before put out; the first stage embeds the tokens.
        cache: the tokens come after those that it holds; its length is left to the caller."""
        length = tokens_BS.shape[1]
        sight = Sight.of(self.place, length, tokens_BS.device, context.document_BS, cache)
        if self.part.is_first:
            x = self._embed(tokens_BS, context, sight)
        assert x is not None
        context = self._own_tokens(tokens_BS, context)
        outputs: dict[int, BlockOutput] = {}
        for layer, block in self.local_blocks():
            output: BlockOutput = block(x, replace(context, layer=layer), sight)
            x = output.x
            if output.stats is not None:
                outputs[layer] = output
        losses, stats, pooled = self._losses(outputs)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return ModelOutput(self._logits(x) if self.part.is_last else x, losses, stats, pooled)

    def _own_tokens(self, tokens_BS: Tensor, context: StepContext) -> StepContext:
        """What the context says of whole rows, of this rank's own positions."""
        if self.place.is_whole:
            return replace(context, token_ids_BS=tokens_BS)
        own_S = self.place.own(tokens_BS.shape[1]).to(tokens_BS.device)
        mask_BS, document_BS = (
            None if rows is None else rows[:, own_S] for rows in (context.mask_BS, context.document_BS)
        )
        return replace(
            context, token_ids_BS=tokens_BS[:, own_S], mask_BS=mask_BS, document_BS=document_BS, positions_S=own_S
        )

    def _embed(self, tokens_BS: Tensor, context: StepContext, sight: Sight) -> Tensor:
        """(B, S) -> (B, S, D), of this rank's own positions."""
        assert self.embedding is not None
        length, device = tokens_BS.shape[1], tokens_BS.device
        x = self.embedding(tokens_BS[:, self.place.context(length).to(device)]).to(self.compute_dtype)
        if self.position is not None:
            if length > len(self.position.weight):
                raise ValueError(
                    f"{length} tokens in a sequence are more than the {len(self.position.weight)} of "
                    "model.position.max_length"
                )
            own_BS = sight.position_BS.chunk(self.place.tp, 1)[self.place.tp_rank]
            x = x + self.position(own_BS.clamp(max=len(self.position.weight) - 1)).to(self.compute_dtype)
        if self.training and self.config.dropout > 0:
            where = (context.seed, context.step, context.micro_step, self.config.num_layers, context.coordinate)
            x = dropout(x, self.config.dropout, mix(*where))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        table = self.embedding if self.unembedding is None else self.unembedding
        assert table is not None
        return F.linear(self.before_logits(x), table.weight.to(x.dtype))

    def _losses(
        self, outputs: dict[int, BlockOutput]
    ) -> tuple[dict[int, dict[str, Tensor]], dict[int, LoadStats], dict[int, Pooled]]:
        """By MoE block; those that are pooled over layers, from all of them, if they are all here."""
        losses = {layer: dict(output.losses) for layer, output in outputs.items()}
        stats = {layer: output.stats for layer, output in outputs.items() if output.stats is not None}
        pooled = {layer: output.pooled for layer, output in outputs.items()}
        if self.part.num_stages > 1:
            return losses, stats, pooled
        for layer, terms in pool_layers(pooled).items():
            settings = pooled_losses(self.config)
            losses[layer] |= {name: settings[name].coefficient * term for name, term in terms.items()}
            detached = {name: term.detach() for name, term in terms.items()}
            stats[layer] = replace(stats[layer], losses={**stats[layer].losses, **detached})
        return losses, stats, {}


def pooled_losses(config: ModelConfig) -> dict[str, BalanceLossConfig]:
    """Those that are pooled over layers, by name, in the order of the config."""
    losses = [] if config.moe is None else config.moe.losses
    return {loss_name(loss): loss for loss in losses if isinstance(loss, BalanceLossConfig) and loss.layers == "pooled"}
