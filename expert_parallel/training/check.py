"""What a config comes to, without starting anything: effective values, parameters, memory per rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from expert_parallel.config import Config, dump_config
from expert_parallel.data.config import TokensData
from expert_parallel.data.open import open_data
from expert_parallel.degrees import ParallelDegrees, ShardedConfig, describe_grid, shard_counts
from expert_parallel.model.parallelize import build_model, split_model
from expert_parallel.model.transformer import Part
from expert_parallel.moe.capacity import DroplessConfig, capacity_of_blocks
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.placement import ExpertPlacement
from expert_parallel.training.engines.config import DeepSpeedConfig
from expert_parallel.training.setup import check_degrees, demand_of, describe_degrees
from expert_parallel.training.step import DTYPES

GIB = 1024**3
GRID_RANKS = 64  # of larger worlds the grid is not printed


@dataclass(frozen=True)
class ParameterCounts:
    """dense: everything that is not a routed expert. active: what one token uses: dense, and k experts a MoE layer."""

    dense: int
    experts: int
    active: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


def count_parameters(config: Config, part: Part | None = None) -> ParameterCounts:
    """Of the whole model, or a stage of it. Exact, from the model itself on torch's meta device: no weights are
    made."""
    model = build_model(config.model, device=torch.device("meta"), part=part)
    dense = experts = 0
    for logical in logical_parameters(model):
        if logical.is_expert:
            experts += logical.parameter.numel()
        else:
            dense += logical.parameter.numel()
    moe = config.model.moe
    used = round(experts * moe.router.experts_per_token(moe.num_experts) / moe.num_experts) if moe is not None else 0
    return ParameterCounts(dense, experts, dense + used)


def state_bytes_of_rank(config: Config, degrees: ParallelDegrees) -> int:
    """Weights, gradients and both Adam moments of the rank that holds most, in float32 (float64 for float64); what an
    engine offloads counts, too. What tensor parallelism leaves whole (norms, routers, biases: little) counts as
    divided."""
    moe, data, engine = config.model.moe, config.parallel.data, config.training.engine
    largest_share = -(-moe.num_experts // degrees.ep) / moe.num_experts if moe is not None else 0.0
    shards, expert_shards = shard_counts(data, degrees) if isinstance(data, ShardedConfig) else (1, 1)
    copies, expert_copies = 4 / shards, 4 / expert_shards
    if isinstance(engine, DeepSpeedConfig):
        copies, expert_copies = (zero_copies(engine, ranks) for ranks in (degrees.dp * degrees.cp, degrees.edp))
    stages = [
        count_parameters(config, part)
        for part in split_model(config.model, degrees.pp * config.parallel.stages_per_rank)
    ]
    numbers = [
        sum(
            stage.dense * copies / degrees.tp + stage.experts * largest_share * expert_copies / degrees.etp
            for stage in stages[pp_rank :: degrees.pp]
        )
        for pp_rank in range(degrees.pp)
    ]
    width = torch.promote_types(torch.float32, DTYPES[config.training.dtype]).itemsize
    return round(max(numbers) * width)


def zero_copies(engine: DeepSpeedConfig, ranks: int) -> float:
    """How many numbers a rank keeps for each weight that `ranks` ranks share: weight, gradient and two moments, and
    from ZeRO 1 on another weight, the one that is updated. ZeRO divides the last three; from 2 on the gradient; in 3
    all."""
    divided = {0: 0, 1: 3, 2: 4, 3: 5}[engine.zero_stage]
    kept = (4 if engine.zero_stage == 0 else 5) - divided
    return kept + divided / ranks


def activation_bytes_of_rank(config: Config, degrees: ParallelDegrees) -> int:
    """An estimate for one micro-step: what each block keeps for its backward pass, with balanced experts, plus logits.

    Attention keeps inputs, q, k, v and its output; a feed-forward its input and hidden values (twice for gated ones).
    With `recompute: block` a block keeps its input alone.
    """
    model, training = config.model, config.training
    tokens = training.global_batch // training.micro_steps * training.sequence_length / degrees.dp / degrees.cp
    width = DTYPES[training.dtype].itemsize
    heads = model.attention.values_kept
    values = 0.0
    tp, stages = degrees.tp, split_model(model, degrees.pp * config.parallel.stages_per_rank)
    for block in chain.from_iterable(stage.blocks for stage in stages[:: degrees.pp]):
        if training.recompute == "block":
            values += model.d_model / tp
            continue
        values += 3 * model.d_model / tp + model.d_model + heads / tp
        moe, ffn = model.moe, model.ffn
        if moe is None or block not in model.moe_layers:
            assert ffn is not None
            values += 3 * ffn.hidden / tp
        elif training.recompute != "moe":
            chosen = moe.router.experts_per_token(moe.num_experts)
            values += chosen * (2 * model.d_model + 3 * moe.experts.hidden) / tp
    in_flight = min(degrees.pp, training.micro_steps)  # micro-steps that the first stage keeps
    return round(tokens * (in_flight * values * width + model.vocab_size / tp * (width + 4)))


def smallest_world(config: Config) -> int:
    """Ranks that the degrees need."""
    parallel = config.parallel
    return parallel.pp * math.lcm(parallel.cp * parallel.tp, parallel.ep * parallel.etp)


def describe(config: Config, world_size: int | None) -> str:
    """The text of `expert-parallel check`. Raises ValueError where the world size does not fit."""
    degrees = check_degrees(config, world_size or smallest_world(config))
    counts = count_parameters(config)
    training, moe = config.training, config.model.moe
    tokens = training.global_batch * training.sequence_length
    lines = [
        dump_config(config).rstrip(),
        "",
        f"ranks                {degrees.world_size}: {describe_degrees(config, degrees)}",
        f"parameters           {counts.total:,} in all, {counts.active:,} active for a token "
        f"({counts.dense:,} dense, {counts.experts:,} in experts)",
        f"tokens               {tokens:,} a step, {tokens * training.steps:,} in {training.steps:,} steps",
    ]
    if isinstance(config.data, TokensData):  # other kinds would be read whole
        lines.append(f"data                 {open_data(config.data, demand_of(config)).description}")
    if moe is not None:
        lines.append(
            f"MoE blocks           {', '.join(map(str, config.model.moe_layers))}: {moe.num_experts} experts, "
            f"{-(-moe.num_experts // degrees.ep)} on the fullest rank, router "
            f"{moe.router.kind}, {moe.router.experts_per_token(moe.num_experts):g} a token"
        )
        lines.append(f"capacity             {describe_capacity(config, degrees)}")
    state, activations = state_bytes_of_rank(config, degrees), activation_bytes_of_rank(config, degrees)
    lines.append(
        f"memory of a rank     {state / GIB:.2f} GiB weights, gradients and optimizer; "
        f"about {activations / GIB:.2f} GiB activations (estimate)"
    )
    if 1 < degrees.world_size <= GRID_RANKS:
        lines += ["", describe_grid(degrees, lambda place: describe_holding(config, degrees, place))]
    return "\n".join(lines)


def describe_holding(config: Config, degrees: ParallelDegrees, place: dict[str, int]) -> str:
    """The blocks and experts of the rank at this place."""
    parts = split_model(config.model, degrees.pp * config.parallel.stages_per_rank)[place["pp"] :: degrees.pp]
    text = "blocks " + ", ".join(_span(part.blocks) for part in parts)
    moe = config.model.moe
    if moe is not None:
        held = ExpertPlacement.contiguous(moe.num_experts, degrees.ep).experts_on(place["ep"])
        text += f"; experts {_span(held)}" + (f", part {place['etp'] + 1} of {degrees.etp}" if degrees.etp > 1 else "")
    return text


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def describe_capacity(config: Config, degrees: ParallelDegrees) -> str:
    """What one expert takes of the tokens of one scope; the ranks with most tokens."""
    moe, training = config.model.moe, config.training
    assert moe is not None
    capacity = moe.capacity
    if isinstance(capacity, DroplessConfig):
        bound = "" if capacity.receive_bound is None else f", {capacity.receive_bound:g} times its share a rank at most"
        return f"dropless{bound}"
    sequences = {
        "rank": -(-training.global_batch // training.micro_steps // degrees.dp),
        "sequence": 1,
        "global": training.global_batch // training.micro_steps,
    }[capacity.scope]
    share = degrees.cp * degrees.tp if capacity.scope == "rank" else 1
    size = sequences * training.sequence_length // share
    choices = moe.router.num_choices(moe.num_experts)
    train, evaluation = (
        capacity_of_blocks(capacity, [size], choices, moe.num_experts, training=is_training)[0]
        for is_training in (True, False)
    )
    return (
        f"{train:,} choices an expert takes of the {size:,} tokens of a scope ({capacity.scope}) in training, "
        f"{evaluation:,} in evaluation"
    )
