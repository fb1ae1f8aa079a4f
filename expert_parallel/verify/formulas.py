"""Computes the bytes that one training step sends, by parallel axis, from sizes alone: activations, weights and
gradients. Those of the MoE layers are in formulas_moe.py.

Each function implements a table of model/README.md, independently of the code that communicates, so that traffic.py can
compare these bytes with measured ones."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from expert_parallel.data.batch import shard_bounds
from expert_parallel.model.attention import HeadsConfig
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.routers.base import RouterSettings
from expert_parallel.moe.routers.losses import BalanceLossConfig
from expert_parallel.moe.routers.registry import router_settings
from expert_parallel.parallel.degrees import (
    ParallelConfig,
    ParallelDegrees,
    ShardedConfig,
    rank_coordinates,
    shard_counts,
)
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.parallel.placement import ExpertPlacement
from expert_parallel.training.config import DTYPES, TrainingConfig

ByteCounts = Counter[tuple[str, str]]  # (axis, content) -> bytes of all ranks together


@dataclass(frozen=True)
class StepSizes:
    """Holds the sizes of a training step that its traffic depends on. has_documents: True if documents are separate."""

    model: ModelConfig
    training: TrainingConfig
    parallel: ParallelConfig
    mesh: ParallelMesh
    has_documents: bool = False

    @property
    def degrees(self) -> ParallelDegrees:
        return self.mesh.degrees

    @property
    def moe(self) -> MoEConfig:
        assert self.model.moe is not None
        return self.model.moe

    @property
    def sequences(self) -> int:
        """Returns the number of sequences in a micro-step, over all data ranks."""
        return self.training.global_batch // self.training.micro_steps

    @property
    def tokens(self) -> int:
        """Returns the number of tokens in the whole step, over all micro-steps and ranks."""
        return self.training.global_batch * self.training.sequence_length

    @property
    def compute_bytes(self) -> int:
        """Returns the bytes of one element of an activation."""
        return DTYPES[self.training.dtype].itemsize

    @property
    def param_bytes(self) -> int:
        """Returns the bytes of one element of a stored weight, a gradient or the router's scores: float32 or wider."""
        return torch.promote_types(torch.float32, DTYPES[self.training.dtype]).itemsize

    @property
    def ranks_per_stage(self) -> int:
        """Returns the number of ranks of one pipeline stage."""
        return self.degrees.dp * self.degrees.cp * self.degrees.tp

    @property
    def router(self) -> RouterSettings:
        return router_settings(self.moe.router)

    @property
    def chunks(self) -> int:
        """Returns the number of chunks in which a forward pass exchanges its tokens."""
        return self.moe.dispatcher.overlap if self.degrees.ep > 1 else 1

    @property
    def recomputes_moe(self) -> bool:
        return self.training.recompute != "none"

    @property
    def moe_forward_passes(self) -> int:
        """Returns the number of forward passes of each MoE layer in a step, including recomputed ones."""
        return self.training.micro_steps * (2 if self.recomputes_moe else 1)

    @cached_property
    def tokens_per_rank(self) -> list[int]:
        """Returns, by rank, the number of tokens that enter a MoE layer in a micro-step. Data ranks may have unequal
        numbers of sequences."""
        degrees, found = self.degrees, []
        for rank in range(degrees.world_size):
            _, count = shard_bounds(self.sequences, degrees.dp, rank_coordinates(degrees, rank)["dp"])
            found.append(count * self.training.sequence_length // (degrees.cp * degrees.tp))
        return found


def balance_losses(step: StepSizes) -> list[BalanceLossConfig]:
    losses = [] if step.model.moe is None else step.moe.losses
    return [loss for loss in losses if isinstance(loss, BalanceLossConfig)]


def activation_bytes(step: StepSizes) -> ByteCounts:
    """Returns the bytes of activations that attention and dense feed-forward networks send in a step, over all ranks.

    tp: tokens (latents, for latent attention) are gathered before attention and dense feed-forward networks, and
    partial sums are reduce-scattered after them. cp: keys and values (or latents) are gathered. The backward pass
    reverses each: it reduce-scatters what was gathered, and gathers what was reduce-scattered."""
    model, training = step.model, step.training
    degrees = step.degrees
    heads = 1 + len(model.mtp_layers)  # the logits of the next token and of each further one
    dense = model.num_blocks - len(model.moe_layers)
    shared = len(model.moe_layers) if model.moe is not None and model.moe.shared_experts is not None else 0
    # Recomputation stops once all saved tensors are restored: before the reduce-scatter at a block's end, if nothing
    # after it saves a tensor. Shared experts do not stop it: they overlap the exchange of the routed tokens.
    block, moe = training.recompute == "block", training.recompute == "moe"
    again = 1 if model.norm_placement == "pre" and model.dropout == 0 else 2
    normed = len(set(model.mtp_layers) - set(model.moe_layers)) if again == 1 else 0  # a norm follows these blocks
    exchanges = 4 * heads  # scatter of the embedding, gather for the logits, and their backward passes
    exchanges += (2 + block) * model.num_blocks  # around attention
    exchanges += (4 + again * block) * dense + normed * block + (4 + 2 * block + 2 * moe) * shared
    numbers = exchanges * model.d_model + (2 + block) * model.num_blocks * _gathered_width(model)

    keys_and_values = (degrees.cp - 1) * step.tokens * _key_value_widths(step) * step.compute_bytes
    # A norm over all heads reduces one sum of squares per token, for queries and for keys.
    squares = 2 * 2 * (degrees.tp - 1) * step.tokens * step.param_bytes if has_whole_norms(model) else 0
    return Counter(
        {
            ("tp", "tokens"): (degrees.tp - 1) * step.tokens * numbers * step.compute_bytes,
            ("tp", "norms of queries and keys"): (2 + block) * model.num_blocks * squares,
            ("tp", "cross entropy"): 2 * heads * (degrees.tp - 1) * step.tokens * 3 * step.param_bytes,
            ("cp", "keys and values"): (2 + block) * keys_and_values,
        }
    )


def has_whole_norms(model: ModelConfig) -> bool:
    norm = model.attention.qk_norm
    return norm is not None and norm.kind == "whole"


def _gathered_width(model: ModelConfig) -> int:
    """Returns the numbers per token that tp gathers before attention: d_model, or the latents (and x, if queries have
    none)."""
    attention = model.attention
    if isinstance(attention, HeadsConfig):
        return model.d_model
    return (attention.query_rank or model.d_model) + attention.kv_rank + attention.rope_size


def _key_value_widths(step: StepSizes) -> int:
    """Returns the numbers per token that context ranks exchange, summed over the blocks and the ranks of tp."""
    numbers, tp = 0, step.degrees.tp
    for attention, count in step.model.attention_counts():
        if isinstance(attention, HeadsConfig):  # with fewer heads than ranks, each rank holds one
            numbers += count * max(attention.kv_heads, tp) * (attention.head_size + attention.value_columns)
        else:
            numbers += count * tp * (attention.kv_rank + attention.rope_size)
    return numbers


def pipeline_bytes(step: StepSizes) -> ByteCounts:
    """Returns the bytes that pipeline stages send in a step, over all ranks: tokens, the accumulated balance losses,
    and the gradients of both.

    For the step's report, each expert's share of the choices (f in balance losses) is also summed over the stages, if a
    loss is pooled over layers."""
    degrees, M = step.degrees, step.training.micro_steps
    hops = 2 * (degrees.pp * step.parallel.stages_per_rank - 1)
    pooled = 0  # elements of f (and of P) on all ranks of a stage
    for loss in balance_losses(step):
        if loss.layers == "pooled":
            blocks = degrees.cp * degrees.tp * step.sequences if loss.scope == "sequence" else step.ranks_per_stage
            pooled += blocks * step.moe.num_experts
    return Counter(
        {
            ("pp", "tokens"): hops * step.tokens * step.model.d_model * step.compute_bytes,
            ("pp", "balance"): hops * M * (step.ranks_per_stage + 2 * pooled) * step.param_bytes,
            ("pp", "pooled losses"): 2 * (degrees.pp - 1) * M * pooled * 8,
        }
    )


# ----------------------------------------------------------------------------------------------- weights and gradients

# Name suffixes of the parameters that tp shards on dim 0 or on dim 1; all others are replicated, and b_out over etp.
SHARDED_ON_DIM_0 = tuple(f"{name}.{leaf}" for name in ("query", "key", "value", "w_in") for leaf in ("weight", "bias"))
SHARDED_ON_DIM_0 += ("attention.sinks", "attention.query_up.weight", "attention.kv_up.weight")
WHOLE_NORMS = ("attention.query_norm.weight", "attention.key_norm.weight")
SHARDED_ON_DIM_1 = ("attention.out.weight", "w_out.weight")
VOCABULARY = ("embedding.weight", "unembedding.weight", "unembedding_bias")


@dataclass(frozen=True)
class ShardedParameter:
    """Holds how one parameter is divided among the ranks that together hold one copy of the model.

    shapes: of the shard on each rank of tp; for experts, on each of ep x etp. is_replicated: every rank of tp (for
    experts, of etp) holds it whole. num_copies: number of tp ranks that hold the same shard."""

    name: str
    shapes: list[tuple[int, ...]]
    is_expert: bool = False
    is_replicated: bool = False
    num_copies: int = 1

    @property
    def numel(self) -> int:
        """Returns the number of elements, summed over `shapes`."""
        return sum(math.prod(shape) for shape in self.shapes)

    def padded_numel(self, shards: int) -> int:
        """Returns the number of elements if the first dimension of each shape is padded to a multiple of `shards`, as
        FSDP2 does."""
        return sum(-(-rows // shards) * shards * math.prod(rest) for rows, *rest in self.shapes)


def sharded_parameters(step: StepSizes) -> Iterator[ShardedParameter]:
    """Yields every parameter of the model with its shard shapes."""
    tp = step.degrees.tp
    for name, parameter in build_model(step.model, device=torch.device("meta")).named_parameters():
        rows, *rest = parameter.shape
        if ".experts." in name:
            yield _sharded_experts(step, name, tuple(parameter.shape))
        elif name in VOCABULARY:
            yield ShardedParameter(name, [(len(part), *rest) for part in torch.arange(rows).tensor_split(tp)])
        elif name.endswith(SHARDED_ON_DIM_0) or (name.endswith(WHOLE_NORMS) and has_whole_norms(step.model)):
            of_keys = re.search(r"^blocks\.(\d+)\.attention\.(key|value|key_norm)\.", name)
            num_copies = max(1, tp // step.model.attention_of(int(of_keys[1])).kv_heads) if of_keys else 1
            yield ShardedParameter(name, [(rows * num_copies // tp, *rest)] * tp, num_copies=num_copies)
        elif name.endswith(SHARDED_ON_DIM_1):
            yield ShardedParameter(name, [(rows, rest[0] // tp)] * tp)
        else:
            yield ShardedParameter(name, [(rows, *rest)] * tp, is_replicated=True)


def _sharded_experts(step: StepSizes, name: str, shape: tuple[int, ...]) -> ShardedParameter:
    """Returns the shards of an expert parameter, of shape (E, D, F) for w_in, (E, F, D) for w_out, (E, F) for b_in, (E,
    D) for b_out; etp divides F."""
    ep, etp = step.degrees.ep, step.degrees.etp
    placement = ExpertPlacement.contiguous(shape[0], ep)
    part, is_replicated = list(shape), name.endswith("b_out")
    if not is_replicated:
        part[1 if name.endswith("w_out") else -1] //= etp
    shapes = [(len(placement.experts_on(rank)), *part[1:]) for rank in range(ep) for _ in range(etp)]
    return ShardedParameter(name, shapes, is_expert=True, is_replicated=is_replicated)


def weight_bytes(step: StepSizes) -> ByteCounts:
    """Returns the bytes of weights and gradients that are sent in a step, over all ranks.

    Gradients are summed once a step over the ranks that hold the same shard, whatever the number of micro-steps;
    weights that FSDP2 shards are gathered for forward and backward passes. Tied embeddings, and those of models with
    multi-token prediction, exist on the first and the last stage, which sum their gradients."""
    degrees, data = step.degrees, step.parallel.data
    W = step.param_bytes
    terms: ByteCounts = Counter()
    for parameter in sharded_parameters(step):
        axis, holders = ("edp", degrees.edp) if parameter.is_expert else ("dense", degrees.dp * degrees.cp)
        divided, degree = ("etp", degrees.etp) if parameter.is_expert else ("tp", degrees.tp)
        is_tied = step.model.embeds_on_last_stage and degrees.pp > 1 and parameter.name == "embedding.weight"
        stages = 2 if is_tied else 1
        if isinstance(data, ShardedConfig):
            shards = shard_counts(data, degrees)[1 if parameter.is_expert else 0]
            holders //= shards
            terms.update(_sharded(step, data, parameter, axis, shards, stages * holders, holders))
        else:
            terms[axis, "gradients"] += 2 * (holders - 1) * stages * parameter.numel * W
        # The remaining reductions run once in each replica, over its shards together.
        gradients = holders * parameter.numel * W
        if parameter.is_replicated:
            terms[divided, "gradients of what it leaves whole"] += 2 * (degree - 1) * gradients // degree
        if parameter.num_copies > 1:
            terms["key", "gradients"] += 2 * (parameter.num_copies - 1) * gradients // parameter.num_copies
        if is_tied:
            terms["tied", "gradients"] += 2 * gradients
    return terms


def _sharded(
    step: StepSizes,
    data: ShardedConfig,
    parameter: ShardedParameter,
    axis: str,
    shards: int,
    groups: int,
    replicas: int,
) -> ByteCounts:
    """Returns the traffic of FSDP2 for one parameter. groups: number of groups of `shards` ranks that divide one copy
    each."""
    numbers, W = parameter.padded_numel(shards), step.param_bytes
    over_shards, over_replicas = (f"{axis} shards", f"{axis} replicas") if replicas > 1 else (axis, axis)
    # Norms and routers compute in float32 or wider, so FSDP2 gathers them in that dtype.
    width = W if "norm." in parameter.name or ".router." in parameter.name else step.compute_bytes
    gathered = groups * (shards - 1) * numbers * width * count_gathers(step, data, parameter.name)
    return Counter(
        {
            (over_shards, "weights"): gathered,
            (over_shards, "gradients"): groups * (shards - 1) * numbers * W,
            (over_replicas, "gradients of shards"): groups // replicas * 2 * (replicas - 1) * numbers * W,
        }
    )


def count_gathers(step: StepSizes, data: ShardedConfig, name: str) -> int:
    """Returns how often FSDP2 gathers a weight in a step: once for every forward pass, and again for the backward pass
    if it was resharded in between.

    In a pipeline a weight stays gathered from one backward pass to the next pass. Experts that compute their tokens in
    chunks are gathered for each chunk."""
    is_outside_blocks = name in (*VOCABULARY, "position.weight")
    given_up = data.reshard_after_forward and not is_outside_blocks
    M = step.training.micro_steps
    if step.degrees.pp > 1:
        return 1 + M if given_up else 1
    chunks = step.moe.dispatcher.overlap if ".experts." in name and step.degrees.ep > 1 else 1
    return 2 * M * chunks if given_up else M
