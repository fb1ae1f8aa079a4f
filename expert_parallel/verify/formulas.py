"""The bytes of one training step by parallel axis, from sizes alone: tokens between ranks, weights and gradients. The
MoE layers' own are in formulas_moe.py. Each function is a table of model/README.md, written apart from the code that
communicates, so that the two can be compared (traffic.py).
"""

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
from expert_parallel.parallel.degrees import ParallelConfig, ParallelDegrees, ShardedConfig, place_of, shard_counts
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.parallel.placement import ExpertPlacement
from expert_parallel.training.config import DTYPES, TrainingConfig

Terms = Counter[tuple[str, str]]  # (axis, what it carries) -> bytes of all ranks together


@dataclass(frozen=True)
class Step:
    """The sizes of a step."""

    model: ModelConfig
    training: TrainingConfig
    parallel: ParallelConfig
    mesh: ParallelMesh

    @property
    def degrees(self) -> ParallelDegrees:
        return self.mesh.degrees

    @property
    def moe(self) -> MoEConfig:
        assert self.model.moe is not None
        return self.model.moe

    @property
    def sequences(self) -> int:
        """Of a micro-step, all data ranks together."""
        return self.training.global_batch // self.training.micro_steps

    @property
    def tokens(self) -> int:
        """M * N: of the whole step."""
        return self.training.global_batch * self.training.sequence_length

    @property
    def compute_width(self) -> int:
        return DTYPES[self.training.dtype].itemsize

    @property
    def kept_width(self) -> int:
        """Of weights and gradients; of the router's numbers too."""
        return torch.promote_types(torch.float32, DTYPES[self.training.dtype]).itemsize

    @property
    def stage_ranks(self) -> int:
        return self.degrees.dp * self.degrees.cp * self.degrees.tp

    @property
    def router(self) -> RouterSettings:
        return router_settings(self.moe.router)

    @property
    def chunks(self) -> int:
        """In which the tokens of a pass travel."""
        return self.moe.dispatcher.overlap if self.degrees.ep > 1 else 1

    @property
    def recomputes_moe(self) -> bool:
        return self.training.recompute != "none"

    @property
    def moe_passes(self) -> int:
        """Forward passes of a MoE layer, recomputed ones too."""
        return self.training.micro_steps * (2 if self.recomputes_moe else 1)

    @cached_property
    def tokens_of_ranks(self) -> list[int]:
        """Of a micro-step, by rank, in front of a MoE layer. Data ranks may have unequal numbers of sequences."""
        degrees, found = self.degrees, []
        for rank in range(degrees.world_size):
            _, count = shard_bounds(self.sequences, degrees.dp, place_of(degrees, rank)["dp"])
            found.append(count * self.training.sequence_length // (degrees.cp * degrees.tp))
        return found


def balance_losses(step: Step) -> list[BalanceLossConfig]:
    losses = [] if step.model.moe is None else step.moe.losses
    return [loss for loss in losses if isinstance(loss, BalanceLossConfig)]


def tokens_between_ranks(step: Step) -> Terms:
    """tp: tokens (of latent attention: latents) are gathered before attention and dense feed-forwards, partial sums
    scattered behind them. cp: keys and values (or latents) are gathered. Backward each the other way round."""
    model, training, degrees = step.model, step.training, step.degrees
    dense = model.num_layers - len(model.moe_layers)
    shared = len(model.moe_layers) if model.moe is not None and model.moe.shared_experts is not None else 0
    # Recomputing stops where all that is kept is back: before the scattering that ends a block, if nothing behind it
    # keeps a value. Shared experts do not end it: they compute while tokens travel to the others.
    block, moe = training.recompute == "block", training.recompute == "moe"
    again = 2 if model.norm_placement == "post" or model.dropout > 0 else 1
    exchanges = 4  # embedding: scattered; logits: gathered
    exchanges += (2 + block) * model.num_layers  # behind attention
    exchanges += (4 + again * block) * dense + (4 + 2 * block + 2 * moe) * shared
    numbers = exchanges * model.d_model + (2 + block) * model.num_layers * _gathered_columns(model)

    keys_and_values = (degrees.cp - 1) * step.tokens * _key_columns(step) * step.compute_width
    # Of queries and of keys, each token's sum of squares, where they are normed over all heads.
    squares = 2 * 2 * (degrees.tp - 1) * step.tokens * step.kept_width if has_whole_norms(model) else 0
    return Counter(
        {
            ("tp", "tokens"): (degrees.tp - 1) * step.tokens * numbers * step.compute_width,
            ("tp", "norms of queries and keys"): (2 + block) * model.num_layers * squares,
            ("tp", "cross entropy"): 2 * (degrees.tp - 1) * step.tokens * 3 * step.kept_width,
            ("cp", "keys and values"): (2 + block) * model.num_layers * keys_and_values,
        }
    )


def has_whole_norms(model: ModelConfig) -> bool:
    norm = model.attention.qk_norm
    return norm is not None and norm.kind == "whole"


def _gathered_columns(model: ModelConfig) -> int:
    """Numbers of a token that are gathered in front of attention: the token's, or its latents (and x, if queries have
    none)."""
    attention = model.attention
    if isinstance(attention, HeadsConfig):
        return model.d_model
    return (attention.query_rank or model.d_model) + attention.kv_rank + attention.rope_size


def _key_columns(step: Step) -> int:
    """Numbers of a token that context ranks send each other, all ranks of tp together."""
    attention = step.model.attention
    if not isinstance(attention, HeadsConfig):
        return step.degrees.tp * (attention.kv_rank + attention.rope_size)
    return 2 * max(attention.kv_heads, step.degrees.tp) * attention.head_size  # fewer heads than ranks: each has one


def pipeline(step: Step) -> Terms:
    """Tokens go from stage to stage, and the vector in which balance losses add up; their gradients back. For the
    report, f of the losses that are pooled over layers is summed over the stages."""
    degrees, M = step.degrees, step.training.micro_steps
    hops = 2 * (degrees.pp * step.parallel.stages_per_rank - 1)
    pooled = 0  # numbers of f, or of P, on all ranks of a stage
    for loss in balance_losses(step):
        if loss.layers == "pooled":
            blocks = degrees.cp * degrees.tp * step.sequences if loss.scope == "sequence" else step.stage_ranks
            pooled += blocks * step.moe.num_experts
    return Counter(
        {
            ("pp", "tokens"): hops * step.tokens * step.model.d_model * step.compute_width,
            ("pp", "balance"): hops * M * (step.stage_ranks + 2 * pooled) * step.kept_width,
            ("pp", "pooled losses"): 2 * (degrees.pp - 1) * M * pooled * 8,
        }
    )


# ----------------------------------------------------------------------------------------------- weights and gradients

# Ends of the names of what tp divides, by rows or by columns. All else it leaves whole. Of experts, etp leaves b_out.
BY_ROWS = tuple(f"{name}.{leaf}" for name in ("query", "key", "value", "w_in") for leaf in ("weight", "bias"))
BY_ROWS += ("attention.sinks", "attention.query_up.weight", "attention.kv_up.weight")
WHOLE_NORMS = ("attention.query_norm.weight", "attention.key_norm.weight")
BY_COLUMNS = ("attention.out.weight", "w_out.weight")
VOCABULARY = ("embedding.weight", "unembedding.weight")


@dataclass(frozen=True)
class Held:
    """A parameter as one replica's ranks hold it. shapes: on each rank of tp; of experts, on each of ep x etp.
    is_whole: tp (etp) does not divide it. copies: neighbours in tp with the same part."""

    name: str
    shapes: list[tuple[int, ...]]
    is_expert: bool = False
    is_whole: bool = False
    copies: int = 1

    @property
    def numbers(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def padded(self, shards: int) -> int:
        """FSDP2 divides the first dimension, padded to a multiple of the shards."""
        return sum(-(-rows // shards) * shards * math.prod(rest) for rows, *rest in self.shapes)


def held_parameters(step: Step) -> Iterator[Held]:
    tp = step.degrees.tp
    kv_copies = max(1, tp // step.model.attention.kv_heads)
    for name, parameter in build_model(step.model, device=torch.device("meta")).named_parameters():
        rows, *rest = parameter.shape
        if ".experts." in name:
            yield _held_experts(step, name, tuple(parameter.shape))
        elif name in VOCABULARY:
            yield Held(name, [(len(part), *rest) for part in torch.arange(rows).tensor_split(tp)])
        elif name.endswith(BY_ROWS) or (name.endswith(WHOLE_NORMS) and has_whole_norms(step.model)):
            copies = kv_copies if re.search(r"\.(key|value|key_norm)\.", name) else 1
            yield Held(name, [(rows * copies // tp, *rest)] * tp, copies=copies)
        elif name.endswith(BY_COLUMNS):
            yield Held(name, [(rows, rest[0] // tp)] * tp)
        else:
            yield Held(name, [(rows, *rest)] * tp, is_whole=True)


def _held_experts(step: Step, name: str, shape: tuple[int, ...]) -> Held:
    """shape: (E, D, F) of w_in, (E, F, D) of w_out, (E, F) of b_in, (E, D) of b_out; F is divided."""
    ep, etp = step.degrees.ep, step.degrees.etp
    placement = ExpertPlacement.contiguous(shape[0], ep)
    part, is_whole = list(shape), name.endswith("b_out")
    if not is_whole:
        part[1 if name.endswith("w_out") else -1] //= etp
    shapes = [(len(placement.experts_on(rank)), *part[1:]) for rank in range(ep) for _ in range(etp)]
    return Held(name, shapes, is_expert=True, is_whole=is_whole)


def weights(step: Step) -> Terms:
    """Gradients are summed once a step over the ranks that hold the same part of a parameter, whatever the micro-steps;
    sharded weights are gathered for the passes. A table that first and last stage share is on both."""
    degrees, data, W = step.degrees, step.parallel.data, step.kept_width
    terms: Terms = Counter()
    for held in held_parameters(step):
        axis, holders = ("edp", degrees.edp) if held.is_expert else ("dense", degrees.dp * degrees.cp)
        divided, degree = ("etp", degrees.etp) if held.is_expert else ("tp", degrees.tp)
        is_tied = step.model.tied_embeddings and degrees.pp > 1 and held.name == "embedding.weight"
        stages = 2 if is_tied else 1
        if isinstance(data, ShardedConfig):
            shards = shard_counts(data, degrees)[1 if held.is_expert else 0]
            holders //= shards
            terms.update(_sharded(step, data, held, axis, shards, stages * holders, holders))
        else:
            terms[axis, "gradients"] += 2 * (holders - 1) * stages * held.numbers * W
        # What is left is done by each replica for itself, by its shards together.
        gradients = holders * held.numbers * W
        if held.is_whole:
            terms[divided, "gradients of what it leaves whole"] += 2 * (degree - 1) * gradients // degree
        if held.copies > 1:
            terms["key", "gradients"] += 2 * (held.copies - 1) * gradients // held.copies
        if is_tied:
            terms["tied", "gradients"] += 2 * gradients
    return terms


def _sharded(step: Step, data: ShardedConfig, held: Held, axis: str, shards: int, groups: int, replicas: int) -> Terms:
    """FSDP2. groups: of `shards` ranks each, over which a copy of the parameter is divided."""
    numbers, W = held.padded(shards), step.kept_width
    over_shards, over_replicas = (f"{axis} shards", f"{axis} replicas") if replicas > 1 else (axis, axis)
    # Norms and routers compute in float32 or wider, and travel so.
    width = W if "norm." in held.name or ".router." in held.name else step.compute_width
    gathered = groups * (shards - 1) * numbers * width * gathers(step, data, held.name)
    return Counter(
        {
            (over_shards, "weights"): gathered,
            (over_shards, "gradients"): groups * (shards - 1) * numbers * W,
            (over_replicas, "gradients of shards"): groups // replicas * 2 * (replicas - 1) * numbers * W,
        }
    )


def gathers(step: Step, data: ShardedConfig, name: str) -> int:
    """How often a weight is gathered in a step: for every forward pass, and again for the backward pass where it was
    given up in between. A pipeline keeps it from a backward pass to whatever comes next. Experts that compute tokens in
    chunks are gathered for each chunk."""
    is_outside_blocks = name in (*VOCABULARY, "position.weight")
    given_up = data.reshard_after_forward and not is_outside_blocks
    M = step.training.micro_steps
    if step.degrees.pp > 1:
        return 1 + M if given_up else 1
    chunks = step.moe.dispatcher.overlap if ".experts." in name and step.degrees.ep > 1 else 1
    return 2 * M * chunks if given_up else M
