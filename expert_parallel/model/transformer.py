"""Implements the decoder: embedding, blocks of attention and feed-forward (dense or mixture of experts), output logits.

Single-device code: it uses the mesh only to look up which positions of each sequence this rank holds, and passes it to
the MoE layers. `parallelize.py` applies all other parallelism from outside.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expert_parallel.model.attention_kinds import ATTENTION
from expert_parallel.model.attention_mask import AttentionContext
from expert_parallel.model.config import ModelConfig, Recompute
from expert_parallel.model.kv_cache import KVCache
from expert_parallel.model.multi_token import MTPProjection, has_target, shift
from expert_parallel.model.outputs import BlockOutput, ModelOutput, collect_losses
from expert_parallel.model.rotary import LearnedPositionConfig
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import RouterReplay, StepContext
from expert_parallel.moe.layer import MoELayer
from expert_parallel.nn.ffn import FFN, identity
from expert_parallel.nn.norms import NORMS
from expert_parallel.nn.random import dropout, mix
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.parallel.sequence import SequenceShard


@dataclass(frozen=True)
class StageSpec:
    """Describes one pipeline stage: the numbers of its blocks, and its own number. The first stage embeds the tokens,
    the last one computes the logits."""

    blocks: range
    number: int = 0
    num_stages: int = 1

    @property
    def is_first(self) -> bool:
        """Returns True if the stage embeds tokens."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Returns True if the stage computes logits."""
        return self.number == self.num_stages - 1


class Block(nn.Module):
    """Computes one transformer block, (B, S, D) -> (B, S, D).

    Each half adds a branch f, attention or feed-forward, to the residual stream, by the norm placement: x + f(norm(x))
    (`pre`), norm(x + f(x)) (`post`), x + norm(f(x)) (`branch`) or x + norm'(f(norm(x))) (`sandwich`). The residual
    multiplier is a factor of each branch. recompute: the part (`moe`, `block` or `none`) whose activations are
    discarded and recomputed in the backward pass. A block of multi-token prediction takes [embedding | hidden], (B, S,
    2 D); see MTPProjection.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        mesh: ParallelMesh | None,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.norm_placement = config.norm_placement
        self.residual_multiplier = config.residual_multiplier
        self.dropout = config.dropout
        self.recompute = recompute
        norm = partial(NORMS[config.norm.kind], config.d_model, config.norm.eps)
        self.attention_norm = norm() if config.has_input_norms else nn.Identity()
        self.ffn_norm = norm() if config.has_input_norms else nn.Identity()
        self.attention_output_norm = norm() if config.has_output_norms else nn.Identity()
        self.ffn_output_norm = norm() if config.has_ffn_output_norm(layer) else nn.Identity()
        is_mtp = layer in config.mtp_layers
        self.mtp = MTPProjection(norm, config.d_model, config.has_final_norm) if is_mtp else None
        attention = config.attention_of(layer)
        rope = config.rope_of(layer)
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

    def forward(self, x: Tensor, context: StepContext, attention_context: AttentionContext) -> BlockOutput:
        """Runs the block on x (B, S, D), with activation checkpointing of the part that `recompute` names."""
        # All randomness is a function of the context, so recomputation need not save generator states. The second
        # forward pass replays the routing of the first: rounding could otherwise choose other experts.
        if self.recompute != "none" and torch.is_grad_enabled():
            context = replace(context, replay=context.replay or RouterReplay())
        if self.recompute == "block" and torch.is_grad_enabled():
            return checkpoint(self._run, x, context, attention_context, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, context, attention_context)

    def _run(self, x: Tensor, context: StepContext, attention_context: AttentionContext) -> BlockOutput:
        if self.mtp is None:
            return self._run_branches(x, context, attention_context)
        output = self._run_branches(self.mtp.merge(x), context, attention_context)
        return output._replace(x=self.mtp.normalize(output.x))

    def _run_branches(self, x: Tensor, context: StepContext, attention_context: AttentionContext) -> BlockOutput:
        if self.norm_placement == "post":
            x = self.attention_norm(self._add_branch(x, self.attention(x, attention_context), context, number=0))
            output = self._feed_forward(x, context)
            return output._replace(x=self.ffn_norm(self._add_branch(x, output.x, context, number=1)))
        y = self.attention(self.attention_norm(x), attention_context)
        x = self._add_branch(x, self.attention_output_norm(y), context, number=0)
        output = self._feed_forward(self.ffn_norm(x), context)
        return output._replace(x=self._add_branch(x, self.ffn_output_norm(output.x), context, number=1))

    def _feed_forward(self, x: Tensor, context: StepContext) -> BlockOutput:
        if self.moe is None:
            assert self.ffn is not None
            return BlockOutput(self.ffn(x), {}, None, {})
        if self.recompute == "moe" and torch.is_grad_enabled():
            output = checkpoint(self.moe, x, context, use_reentrant=False, preserve_rng_state=False)
        else:
            output = self.moe(x, context)
        return BlockOutput(output.y, output.losses, output.stats, output.pooled)

    def _add_branch(self, x: Tensor, y: Tensor, context: StepContext, number: int) -> Tensor:
        """Adds y, the output of branch `number`, with dropout and the residual multiplier to the residual stream x."""
        if self.training and self.dropout > 0:
            where = (context.seed, context.step, context.micro_step, context.layer, context.coordinate, number)
            y = dropout(y, self.dropout, mix(*where))
        return torch.add(x, y, alpha=self.residual_multiplier)  # one operation, which is x + y if it is 1


def build_moe_layer(config: MoEConfig, mesh: ParallelMesh | None) -> MoELayer:
    """Builds an MoE layer on the process groups of the mesh, or on a single rank if mesh is None."""
    if mesh is None:
        return MoELayer(config)
    layer = MoELayer(
        config,
        mesh.ep_group,
        mesh.stage_group,
        nodes=mesh.nodes,
        sequence_group=mesh.sequence_group,
        etp_group=mesh.etp_group,
    )
    layer.experts.compares_ranks = False  # the experts of an upcycled model may be equal
    return layer


class LanguageModel(nn.Module):
    """Defines the interface of a decoder for training, checkpoints and generation: a whole model, or this rank's stages
    of it.

    It is called with tokens (B, S), int64, a StepContext and, in generation, a KVCache, and returns a
    ModelOutput. It is a class rather than a Protocol because callers also use it as an nn.Module.
    """

    config: ModelConfig
    place: SequenceShard

    @property
    def has_logits(self) -> bool:
        """Returns True if this rank computes the logits, False if a later pipeline stage on another rank does."""
        raise NotImplementedError

    def local_blocks(self) -> Iterator[tuple[int, Block]]:
        """Yields (number, block) for each transformer block that this rank holds."""
        raise NotImplementedError


class Transformer(LanguageModel):
    """Implements the decoder or one pipeline stage of it. Tokens (B, S), int64 -> ModelOutput.

    compute_dtype: the dtype of all activations, whatever dtype the weights have. mesh: passed to the MoE layers; None
    runs the whole model on one rank. `stage_spec`: the pipeline stage to build; None builds the whole model. With
    context or sequence parallelism each rank is given whole sequences and returns the logits of the positions
    `place.context` only. Weights are left uninitialised: see `init_weights`.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype = torch.float32,
        mesh: ParallelMesh | None = None,
        recompute: Recompute = "none",
        stage_spec: StageSpec | None = None,
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.stage_spec = stage_spec or StageSpec(range(config.num_blocks))
        self.place = SequenceShard.of(mesh)
        self.gather_for_logits: Callable[[Tensor], Tensor] = identity  # replaced if the vocabulary is split
        is_first, is_last = self.stage_spec.is_first, self.stage_spec.is_last
        table = partial(nn.Embedding, embedding_dim=config.d_model)
        learned = config.position if isinstance(config.position, LearnedPositionConfig) else None
        has_norm = is_last and config.has_final_norm
        self.embedding = table(config.vocab_size) if is_first or (is_last and config.embeds_on_last_stage) else None
        self.position = table(learned.max_length) if learned is not None and is_first else None
        # Indexed by the number of the block, so that parameter names do not depend on the stage; None: other stages.
        self.blocks = nn.ModuleList(
            Block(config, layer, mesh, recompute) if layer in self.stage_spec.blocks else None  # type: ignore[misc]
            for layer in range(config.num_blocks)
        )
        self.final_norm = NORMS[config.norm.kind](config.d_model, config.norm.eps) if has_norm else None
        self.unembedding = table(config.vocab_size) if is_last and not config.tied_embeddings else None
        # Beside the table rather than in it, since with tied embeddings the bias belongs to the logits alone.
        has_bias = is_last and config.unembedding_bias
        self.unembedding_bias = nn.Parameter(torch.zeros(config.vocab_size)) if has_bias else None

    @property
    def has_logits(self) -> bool:
        return self.stage_spec.is_last

    def local_blocks(self) -> Iterator[tuple[int, Block]]:
        for layer in self.stage_spec.blocks:
            block = self.blocks[layer]
            assert isinstance(block, Block)
            yield layer, block

    def forward(
        self, tokens_BS: Tensor, context: StepContext, x: Tensor | None = None, cache: KVCache | None = None
    ) -> ModelOutput:
        """Runs the blocks of this rank.

        tokens_BS: whole sequences, int64. context: its `document_BS` and `mask_BS` have the shape of tokens_BS; the
        block number and the tokens are filled in here. x: (B, S, D), the output of the previous stage; None on the
        first stage, which embeds the tokens. cache: holds the keys and values of earlier tokens; the caller advances
        its length. With a cache or `context.dropless`, as in generation, further tokens are not predicted
        (`mtp_logits`). Raises ValueError for more tokens than there are learned positions.
        """
        length = tokens_BS.shape[1]
        device, mask_BS = tokens_BS.device, context.mask_BS
        attention_context = AttentionContext.of(self.place, length, device, context.document_BS, cache, mask_BS)
        if self.stage_spec.is_first:
            x = self._embed(tokens_BS, context, attention_context)
        assert x is not None
        outputs: dict[int, BlockOutput] = {}  # of the MoE blocks
        own = self._own_tokens(tokens_BS, context)
        for layer in self.stage_spec.blocks:
            if layer < self.config.num_layers:
                x = self._run_block(layer, x, own, attention_context, outputs)
        if self.final_norm is not None:
            x = self.final_norm(x)
        logits, mtp_logits = x, tuple[Tensor, ...]()
        if self.stage_spec.is_last:
            logits = self._logits(x)
            if cache is None and not context.dropless:
                mtp_logits = self._predict_ahead(x, tokens_BS, context, attention_context, outputs)
        losses = collect_losses(self.config, outputs, is_whole=self.stage_spec.num_stages == 1)
        return ModelOutput(logits, *losses, mtp_logits)

    def _run_block(
        self,
        layer: int,
        x: Tensor,
        context: StepContext,
        attention_context: AttentionContext,
        outputs: dict[int, BlockOutput],
    ) -> Tensor:
        """Runs a block, and adds its output to `outputs` if it is an MoE block."""
        output: BlockOutput = self.blocks[layer](x, replace(context, layer=layer), attention_context)
        if output.stats is not None:
            outputs[layer] = output
        return output.x

    def _predict_ahead(
        self,
        x: Tensor,
        tokens_BS: Tensor,
        context: StepContext,
        attention_context: AttentionContext,
        outputs: dict[int, BlockOutput],
    ) -> tuple[Tensor, ...]:
        """Returns the logits of each depth of multi-token prediction, computed from the block of the depth before it.

        x: (B, S, D), the output of the final norm at the positions of this rank. Positions without a target are padding
        for the MoE layers; no position that has a target attends to one of them.
        """
        logits = []
        for depth, layer in enumerate(self.config.mtp_layers, start=1):
            ahead_BS = shift(tokens_BS, depth, fill=0)
            mask_BS = has_target(tokens_BS, depth, context.document_BS, context.mask_BS)
            own = self._own_tokens(ahead_BS, replace(context, mask_BS=mask_BS))
            x = torch.cat([self._look_up(ahead_BS), x], -1)
            x = self._run_block(layer, x, own, attention_context, outputs)
            logits.append(self._logits(x))
        return tuple(logits)

    def _own_tokens(self, tokens_BS: Tensor, context: StepContext) -> StepContext:
        """Returns the context with its per-token tensors restricted to the positions of this rank."""
        if self.place.is_whole:
            return replace(context, token_ids_BS=tokens_BS)
        own_S = self.place.own(tokens_BS.shape[1]).to(tokens_BS.device)
        mask_BS, document_BS = (
            None if rows is None else rows[:, own_S] for rows in (context.mask_BS, context.document_BS)
        )
        return replace(
            context, token_ids_BS=tokens_BS[:, own_S], mask_BS=mask_BS, document_BS=document_BS, positions_S=own_S
        )

    def _embed(self, tokens_BS: Tensor, context: StepContext, attention_context: AttentionContext) -> Tensor:
        """Embeds tokens (B, S) to (B, S, D) at the positions of this rank, with learned positions and dropout."""
        length, x = tokens_BS.shape[1], self._look_up(tokens_BS)
        if self.position is not None:
            if length > len(self.position.weight):
                raise ValueError(
                    f"{length} tokens in a sequence are more than the {len(self.position.weight)} of "
                    "model.position.max_length"
                )
            own_BS = attention_context.position_BS.chunk(self.place.tp, 1)[self.place.tp_rank]
            x = x + self.position(own_BS.clamp(max=len(self.position.weight) - 1)).to(self.compute_dtype)
        if self.training and self.config.dropout > 0:
            where = (context.seed, context.step, context.micro_step, self.config.num_layers, context.coordinate)
            x = dropout(x, self.config.dropout, mix(*where))
        return x

    def _look_up(self, tokens_BS: Tensor) -> Tensor:
        """Returns the rows of the embedding, (B, S, D), of the tokens at the positions of this rank, multiplied by
        `embedding_multiplier`."""
        assert self.embedding is not None
        positions_S = self.place.context(tokens_BS.shape[1]).to(tokens_BS.device)
        x: Tensor = self.embedding(tokens_BS[:, positions_S]).to(self.compute_dtype)
        return x if self.config.embedding_multiplier == 1 else x * self.config.embedding_multiplier

    def _logits(self, x: Tensor) -> Tensor:
        table = self.embedding if self.unembedding is None else self.unembedding
        assert table is not None
        bias = None if self.unembedding_bias is None else self.unembedding_bias.to(x.dtype)
        if self.config.logits_divisor != 1:  # of x and the bias, which have fewer numbers than the logits
            x = x / self.config.logits_divisor
            bias = None if bias is None else bias / self.config.logits_divisor
        return F.linear(self.gather_for_logits(x), table.weight.to(x.dtype), bias)
