"""Estimates the memory of a training step on the rank that needs the most, from the config alone.

A step is a sequence of moments: the loss, the backward pass of each half of a block from the last to the first, and the
update. At each moment the estimate adds up what exists; its highest moment is the result.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from expert_parallel.model.activation_memory import (
    Device,
    PartMemory,
    PassSizes,
    block_memory,
    experts_of_fullest_rank,
    head_memory,
)
from expert_parallel.model.config import ModelConfig, ParameterCounts
from expert_parallel.model.parallelize import split_into_stages
from expert_parallel.model.transformer import StageSpec
from expert_parallel.parallel.degrees import ParallelDegrees, ShardedConfig, shard_counts
from expert_parallel.training.config import DTYPES, Config
from expert_parallel.training.engines.config import DeepSpeedConfig
from expert_parallel.training.grads import BUCKET_BYTES

GIB = 1024**3
GPU_BYTES = 80e9  # of the GPU that is assumed where there is none


@dataclass(frozen=True)
class MemoryEstimate:
    """Holds the bytes on a rank at one moment of a training step; `total` is their sum.

    moment: its name. weights, optimizer: stored through the whole run. gradients: those that exist at this moment.
    gathered: weights that FSDP2 holds whole, and their gradients. activations: kept for the backward pass. exchanged:
    rows that other ranks sent to the part that computes, kept too. logits: those of the model and of the loss.
    temporary: tensors of the operations of this moment.
    """

    moment: str
    weights: float
    gradients: float
    optimizer: float
    gathered: float = 0
    activations: float = 0
    exchanged: float = 0
    logits: float = 0
    temporary: float = 0

    @property
    def state(self) -> float:
        """Returns the bytes of weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Returns the bytes of all parts."""
        return self.state + self.gathered + self.activations + self.exchanged + self.logits + self.temporary


@dataclass(frozen=True)
class Stretch:
    """Holds consecutive parts of a model that are recomputed together, or one part that is not.

    stored: bytes from the forward pass of these parts to their backward pass. parts: in order. extra: bytes of `stored`
    that exist beside what the parts keep once they are recomputed; 0 without recomputation.
    """

    stored: float
    parts: list[PartMemory]
    extra: float = 0


def estimate_memory(config: Config, degrees: ParallelDegrees, device: Device = "cuda") -> MemoryEstimate:
    """Returns the memory of the rank that needs the most, at the highest moment of a training step.

    Tensors are counted as torch's allocator hands them out: without its fragmentation, the device's context, the
    buffers of NCCL, and the code of libraries. Choices of experts are taken to be balanced. What DeepSpeed offloads to
    the host counts too, and its own buffers do not.
    """
    return max(
        (moment for rank in range(degrees.pp) for moment in _step_moments(config, degrees, device, rank)),
        key=lambda moment: moment.total,
    )


def total_memory(device: torch.device) -> int:
    """Returns the bytes that a GPU has, or this machine if the device is its CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def state_memory(config: Config, degrees: ParallelDegrees) -> MemoryEstimate:
    """Returns the weights, gradients and optimizer state of the rank that holds the most, when its gradients are
    complete."""
    return max((_state(config, degrees, rank) for rank in range(degrees.pp)), key=lambda state: state.state)


def zero_values_per_weight(engine: DeepSpeedConfig, ranks: int) -> tuple[float, float, float]:
    """Returns how many weights, gradients and values of the optimizer a rank stores for each weight if `ranks`
    data-parallel ranks shard them by ZeRO.

    From stage 1 on the optimizer has a float32 copy that it updates. Stage 1 shards the moments and the copy, stage 2
    also the gradient, stage 3 all of them.
    """
    stage = engine.zero_stage
    optimizer = 3 / ranks if stage else 2
    return 1 / (ranks if stage == 3 else 1), 1 / (ranks if stage >= 2 else 1), optimizer


def rank_stages(config: Config, degrees: ParallelDegrees, pp_rank: int) -> list[StageSpec]:
    """Returns the pipeline stages of a rank."""
    return split_into_stages(config.model, degrees.pp * config.parallel.stages_per_rank)[pp_rank :: degrees.pp]


def _state(config: Config, degrees: ParallelDegrees, pp_rank: int) -> MemoryEstimate:
    """Returns the bytes of weights, complete gradients and optimizer state on a rank. All are float32 (float64 for
    float64 models). Parameters that tensor parallelism replicates (norms, routers, biases: few) count as if sharded."""
    data, engine = config.parallel.data, config.training.engine
    shards, expert_shards = shard_counts(data, degrees) if isinstance(data, ShardedConfig) else (1, 1)
    dense = (1 / shards, 1 / shards, 2 / shards)
    experts: tuple[float, float, float] = (1, 1, 2)
    if isinstance(engine, DeepSpeedConfig):
        dense = zero_values_per_weight(engine, degrees.dp * degrees.cp)
        experts = zero_values_per_weight(engine, degrees.edp)
    share = max_expert_fraction(config, degrees, expert_shards)
    counts = _counts(config.model, rank_stages(config, degrees, pp_rank))
    own_dense, own_experts = counts.dense / degrees.tp, counts.experts * share / degrees.etp
    wide = torch.promote_types(torch.float32, DTYPES[config.training.dtype]).itemsize
    sizes = [wide * (own_dense * a + own_experts * b) for a, b in zip(dense, experts, strict=True)]
    return MemoryEstimate("update", *sizes)


def max_expert_fraction(config: Config, degrees: ParallelDegrees, expert_shards: int) -> float:
    """Returns the largest fraction of the experts on one rank.

    FSDP2 shards whole experts: of 2 experts over 4 ranks, two ranks hold one each.
    """
    moe = config.model.moe
    return 0.0 if moe is None else math.ceil(experts_of_fullest_rank(moe, degrees.ep) / expert_shards) / moe.num_experts


def _counts(model: ModelConfig, stages: list[StageSpec]) -> ParameterCounts:
    counts = [model.parameter_counts(s.blocks, is_first=s.is_first, is_last=s.is_last) for s in stages]
    return ParameterCounts(sum(count.dense for count in counts), sum(count.experts for count in counts))


def pass_sizes(config: Config, degrees: ParallelDegrees, device: Device) -> PassSizes:
    """Returns the sizes of a micro-step on the rank with the most sequences."""
    training, dtype = config.training, DTYPES[config.training.dtype]
    micro_batch = training.global_batch // training.micro_steps
    wide = torch.promote_types(torch.float32, dtype).itemsize
    return PassSizes(
        sequences=-(-micro_batch // degrees.dp),
        length=training.sequence_length,
        micro_batch=micro_batch,
        width=dtype.itemsize,
        wide=wide,
        casts_weights=dtype.itemsize < wide and not isinstance(config.parallel.data, ShardedConfig),
        device=device,
        degrees=degrees,
    )


def _step_moments(config: Config, degrees: ParallelDegrees, device: Device, pp_rank: int) -> Iterator[MemoryEstimate]:
    """Yields the moments of a step on one rank of the pipeline."""
    model = config.model
    sizes, stages = pass_sizes(config, degrees, device), rank_stages(config, degrees, pp_rank)
    complete = _state(config, degrees, pp_rank)
    stretches = [stretch for stage in stages for block in stage.blocks for stretch in _stretches(config, block, sizes)]
    weights = sum(part.weights for stretch in stretches for part in stretch.parts)
    stored = sum(stretch.stored for stretch in stretches)
    table = model.vocab_size * model.d_model / degrees.tp
    is_both = degrees.pp == 1 or (stages[-1].is_last and model.embeds_on_last_stage)  # has both tables, if untied
    gathered = Gathered.of(config, sizes, weights, table * (2 if is_both and not model.tied_embeddings else 1))
    accumulates = config.training.micro_steps > 1  # then all gradients exist from the second micro-step on
    before = _passes_in_progress(config, degrees, pp_rank) * stored + _receive_buffers(config, stages, sizes)

    now, logits = replace(complete, gradients=complete.gradients if accumulates else 0), 0.0
    if stages[-1].is_last:
        head, logits = head_memory(model, sizes)
        yield replace(now, moment="loss", gathered=gathered.always, activations=before, logits=head.forward)
        if not accumulates:
            now = replace(now, gradients=complete.gradients * table / (weights + table))
    for stretch in reversed(stretches):
        before -= stretch.stored
        recomputed = stretch.extra + sum(part.kept for part in stretch.parts)
        for part in reversed(stretch.parts):
            recomputed -= part.kept
            activations = before + recomputed + part.kept - part.exchanged
            at_part = replace(now, exchanged=part.exchanged, logits=logits, activations=activations)
            at_part = replace(at_part, gathered=gathered.beside(part.weights))
            yield replace(at_part, moment="backward pass", temporary=part.backward - part.kept)
            yield replace(at_part, moment="forward pass", temporary=part.forward - part.kept)
            if not accumulates:
                now = replace(now, gradients=now.gradients + complete.gradients * part.weights / (weights + table))
    # A table that has a gradient already, of the logits, of further tokens or of earlier micro-steps, gets another one
    # to add to it.
    second = table * sizes.wide if model.embeds_on_last_stage or accumulates else 0
    yield replace(complete, gathered=gathered.beside(table), logits=logits, temporary=second)
    yield replace(complete, temporary=_bucket_bytes(config, degrees, complete.gradients))


@dataclass(frozen=True)
class Gathered:
    """Counts what FSDP2 holds whole. always: bytes that it holds from the forward pass to the end of the backward pass.
    per_weight: bytes for each weight of the part that computes."""

    always: float
    per_weight: float

    @classmethod
    def of(cls, config: Config, sizes: PassSizes, weights: float, tables: float) -> "Gathered":
        """Counts the tables, which stay whole, without `reshard_after_forward` all weights, and with several
        micro-steps the sums of all whole gradients.

        A part that computes has its weights and the buffer in which they were gathered, in the compute dtype, unless
        they stay whole, and the gradients to be reduced, in float32 or wider.
        """
        data = config.parallel.data
        if not isinstance(data, ShardedConfig):
            return cls(0, 0)
        always = (tables + (0 if data.reshard_after_forward else weights)) * sizes.width
        always += (tables + weights) * sizes.wide if config.training.micro_steps > 1 else 0
        return cls(always, (2 * sizes.width if data.reshard_after_forward else 0) + sizes.wide)

    def beside(self, weights: float) -> float:
        """Returns the bytes while a part with this many weights computes."""
        return self.always + self.per_weight * weights


def _stretches(config: Config, block: int, sizes: PassSizes) -> list[Stretch]:
    """Returns the parts of a block as `training.recompute` divides them."""
    model, recompute = config.model, config.training.recompute
    attention, feed_forward = block_memory(model, block, sizes)
    row = sizes.tokens * model.d_model * sizes.width
    extra = 0 if sizes.wide == sizes.width else row  # the input is what a norm keeps, unless it is cast first
    if recompute == "block":
        inputs = 2 if block in model.mtp_layers else 1
        return [Stretch(inputs * row, [attention, feed_forward], extra)]
    first = Stretch(attention.kept, [attention])
    if recompute == "none" or model.moe is None or block not in model.moe_layers:
        return [first, Stretch(feed_forward.kept, [feed_forward])]
    norm = row * (sizes.wide // sizes.width) * (2 if sizes.device == "cpu" and model.norm.kind == "rms_norm" else 1)
    norms = norm * (model.has_input_norms + model.has_ffn_output_norm(block))
    return [first, Stretch(norms + row, [feed_forward])]


def _passes_in_progress(config: Config, degrees: ParallelDegrees, pp_rank: int) -> float:
    """Returns how many micro-steps' activations a rank of the pipeline holds at the same time, as its schedule has
    it."""
    if degrees.pp == 1:
        return 1
    behind, stages = degrees.pp - pp_rank - 1, config.parallel.stages_per_rank
    chunks = behind + 1 if stages == 1 else 2 * behind + (stages - 1) * degrees.pp + 1
    return min(chunks / stages, config.training.micro_steps)


def _receive_buffers(config: Config, stages: list[StageSpec], sizes: PassSizes) -> float:
    """Returns the bytes of the buffers into which torch's pipeline schedules receive activations and gradients: each
    stage has one of each for every micro-step."""
    buffers = sum((not stage.is_first) + (not stage.is_last) for stage in stages)
    return buffers * config.training.micro_steps * sizes.tokens * config.model.d_model * sizes.width


def _bucket_bytes(config: Config, degrees: ParallelDegrees, gradients: float) -> float:
    """Returns the bytes of the bucket in which replicated gradients are summed."""
    replicates = not isinstance(config.parallel.data, ShardedConfig) and degrees.dp * degrees.cp > 1
    return min(BUCKET_BYTES, gradients) if replicates else 0
