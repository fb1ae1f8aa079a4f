"""Reports, without starting a run, what a config leads to: effective settings, numbers of parameters, memory per
rank."""

import math
from collections.abc import Sequence
from itertools import chain

import torch

from expert_parallel.data.config import TokensData
from expert_parallel.data.open import open_data
from expert_parallel.model.parallelize import split_into_stages
from expert_parallel.moe.capacity.policies import DroplessConfig, block_capacities
from expert_parallel.parallel.degrees import ParallelDegrees, ShardedConfig, format_rank_table, shard_counts
from expert_parallel.parallel.placement import ExpertPlacement
from expert_parallel.training.config import DTYPES, Config, dump_config
from expert_parallel.training.engines.config import DeepSpeedConfig
from expert_parallel.training.setup import check_degrees, data_requirements, format_degrees

GIB = 1024**3
MAX_GRID_RANKS = 64  # the grid of a larger world is not printed
NO_DATA = "none yet: data.corpora is empty"
MAX_LISTED_BLOCKS = 8  # longer lists of blocks are abbreviated


def state_bytes_per_rank(config: Config, degrees: ParallelDegrees) -> int:
    """Returns the bytes of weights, gradients and both Adam moments on the rank that holds the most.

    All are in float32 (float64 for float64 models). Those that DeepSpeed offloads to host memory are counted, too.
    Parameters that tensor parallelism replicates (norms, routers, biases: few) are counted as if sharded.
    """
    data, engine = config.parallel.data, config.training.engine
    shards, expert_shards = shard_counts(data, degrees) if isinstance(data, ShardedConfig) else (1, 1)
    largest_share = _max_expert_fraction(config, degrees, expert_shards)
    copies, expert_copies = 4 / shards, 4.0
    if isinstance(engine, DeepSpeedConfig):
        copies, expert_copies = (
            zero_values_per_weight(engine, ranks) for ranks in (degrees.dp * degrees.cp, degrees.edp)
        )
    stages = [
        config.model.parameter_counts(part.blocks, is_first=part.is_first, is_last=part.is_last)
        for part in split_into_stages(config.model, degrees.pp * config.parallel.stages_per_rank)
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


def _max_expert_fraction(config: Config, degrees: ParallelDegrees, expert_shards: int) -> float:
    """Returns the largest fraction of the experts on one rank.

    FSDP2 shards whole experts: of 2 experts over 4 ranks, two ranks hold one each.
    """
    moe = config.model.moe
    if moe is None:
        return 0.0
    return math.ceil(math.ceil(moe.num_experts / degrees.ep) / expert_shards) / moe.num_experts


def zero_values_per_weight(engine: DeepSpeedConfig, ranks: int) -> float:
    """Returns how many numbers a rank stores for each weight if `ranks` data-parallel ranks shard them by ZeRO.

    These are the weight, its gradient and two moments, and from stage 1 on the float32 copy that is updated. Stage 1
    shards the moments and the copy, stage 2 also the gradient, stage 3 all of them.
    """
    divided = {0: 0, 1: 3, 2: 4, 3: 5}[engine.zero_stage]
    kept = (4 if engine.zero_stage == 0 else 5) - divided
    return kept + divided / ranks


def gathered_bytes_per_rank(config: Config, degrees: ParallelDegrees) -> int:
    """Returns an estimate of the bytes of sharded weights that FSDP2 holds unsharded at the same time; 0 without FSDP2.

    They are the weights of one block and the embedding tables with their gradients, in the compute dtype and in the
    dtype of the reduction; without `reshard_after_forward` also the weights of all other blocks.
    """
    model, data = config.model, config.parallel.data
    if not isinstance(data, ShardedConfig):
        return 0
    share = _max_expert_fraction(config, degrees, 1)
    moe_layers, numbers = set(model.moe_layers), {}
    for is_moe, block in {
        block in moe_layers: block for block in range(model.num_layers)
    }.items():  # one block of each kind
        count = model.parameter_counts(range(block, block + 1), is_first=False, is_last=False)
        numbers[is_moe] = count.dense / degrees.tp + count.experts * share / degrees.etp
    num_tables = 1 if model.tied_embeddings or degrees.pp > 1 else 2
    whole = max(numbers.values()) + num_tables * model.vocab_size * model.d_model / degrees.tp
    computed = DTYPES[config.training.dtype]
    size = whole * (2 * computed.itemsize + torch.promote_types(torch.float32, computed).itemsize)
    if not data.reshard_after_forward:
        stages = split_into_stages(model, degrees.pp * config.parallel.stages_per_rank)
        of_ranks = [
            [block for stage in stages[rank :: degrees.pp] for block in stage.blocks] for rank in range(degrees.pp)
        ]
        most = max(sum(numbers[block in moe_layers] for block in blocks) for blocks in of_ranks)
        size += (most - max(numbers.values())) * computed.itemsize
    return round(size)


def activation_bytes_per_rank(config: Config, degrees: ParallelDegrees) -> int:
    """Returns an estimate of the bytes of activations on a rank with the first pipeline stage: those that blocks keep
    for the backward pass, those of recomputation, and logits, for all micro-steps that are in progress at the same
    time.

    Experts are assumed to be balanced. For recomputation, only the block with the most recomputed activations counts.
    """
    model, training = config.model, config.training
    tokens = training.global_batch // training.micro_steps * training.sequence_length / degrees.dp / degrees.cp
    stages = split_into_stages(model, degrees.pp * config.parallel.stages_per_rank)
    blocks = list(chain.from_iterable(stage.blocks for stage in stages[:: degrees.pp]))
    kept, again = zip(*(block_bytes_per_token(config, degrees, block) for block in blocks), strict=True)
    in_flight = min(degrees.pp, training.micro_steps)  # micro-steps whose activations the first stage holds at once
    logits = model.vocab_size / degrees.tp * (DTYPES[training.dtype].itemsize + 4)
    return round(tokens * (in_flight * sum(kept) + max(again) + logits))


def block_bytes_per_token(config: Config, degrees: ParallelDegrees, block: int) -> tuple[float, float]:
    """Returns (bytes per token that transformer block number `block` keeps for the backward pass, bytes per token that
    it recomputes).

    Attention keeps its input, queries, keys, values and output; a feed-forward network its input and hidden values
    (twice for gated ones); experts the rows of all etp ranks; a router four float32 values per expert.
    """
    model, moe = config.model, config.model.moe
    tp = degrees.tp
    width = DTYPES[config.training.dtype].itemsize
    attention = (3 * model.d_model / tp + model.d_model + model.attention.activations_per_token / tp) * width
    if moe is None or block not in model.moe_layers:
        assert model.ffn is not None
        feed_forward, is_moe = 3 * model.ffn.hidden / tp * width, False
    else:
        chosen = moe.router.experts_per_token(moe.num_experts)
        values = chosen * ((1 + degrees.etp) * model.d_model + 3 * moe.experts.hidden)
        values += 3 * moe.shared_experts.hidden if moe.shared_experts is not None else 0
        feed_forward, is_moe = (values * width + 4 * 4 * moe.num_experts) / tp, True
    if config.training.recompute == "block":
        return model.d_model / tp * width, attention + feed_forward
    if config.training.recompute == "moe" and is_moe:
        return attention, feed_forward
    return attention + feed_forward, 0.0


def min_world_size(config: Config) -> int:
    """Returns the smallest number of ranks that fits the configured degrees."""
    parallel = config.parallel
    return parallel.pp * math.lcm(parallel.cp * parallel.tp, parallel.ep * parallel.etp)


def format_config_report(config: Config, world_size: int | None) -> str:
    """Returns the output of `expert-parallel check`. world_size: the number of ranks; None takes the smallest that
    fits. Raises ValueError if it does not fit the degrees of parallelism."""
    degrees = check_degrees(config, world_size or min_world_size(config))
    counts, active = config.model.parameter_counts(), config.model.num_active_params()
    training, moe = config.training, config.model.moe
    tokens = training.global_batch * training.sequence_length
    lines = [
        dump_config(config).rstrip(),
        "",
        f"ranks                {degrees.world_size}: {format_degrees(config, degrees)}",
        f"parameters           {counts.total:,} in all, {active:,} active for a token "
        f"({counts.dense:,} dense, {counts.experts:,} in experts): "
        f"{_format_count(counts.total)} in all, {_format_count(active)} active",
        f"tokens               {tokens:,} a step, {tokens * training.steps:,} in {training.steps:,} steps",
    ]
    if isinstance(config.data, TokensData):  # opening other kinds reads all of the data
        described = open_data(config.data, data_requirements(config)).description if config.data.corpora else NO_DATA
        lines.append(f"data                 {described}")
    if moe is not None:
        lines.append(
            f"MoE blocks           {_format_blocks(config.model.moe_layers)}: {moe.num_experts:,} experts, "
            f"{-(-moe.num_experts // degrees.ep)} on the fullest rank, router "
            f"{moe.router.kind}, {moe.router.experts_per_token(moe.num_experts):g} a token"
        )
        lines.append(f"capacity             {format_capacity(config, degrees)}")
    lines.append(f"memory of a rank     {format_memory(config, degrees)}")
    if 1 < degrees.world_size <= MAX_GRID_RANKS:
        lines += ["", format_rank_table(degrees, lambda place: format_rank_contents(config, degrees, place))]
    return "\n".join(lines)


def format_memory(config: Config, degrees: ParallelDegrees) -> str:
    """Returns the memory estimate of the rank that needs the most, as text."""
    state, gathered = state_bytes_per_rank(config, degrees), gathered_bytes_per_rank(config, degrees)
    activations = activation_bytes_per_rank(config, degrees)
    text = f"{state / GIB:.2f} GiB weights, gradients and optimizer; about {activations / GIB:.2f} GiB activations"
    text += f" and {gathered / GIB:.2f} GiB of a sharded block while it computes" if gathered else ""
    return f"{text} (estimate); {(state + activations + gathered) / GIB:.1f} GiB together"


def _format_count(number: int) -> str:
    """Formats a count in billions or millions, such as 46.70 B or 3.15 M."""
    unit, name = (1e9, "B") if number >= 1e9 else (1e6, "M")
    return f"{number / unit:,.2f} {name}"


def _format_blocks(blocks: list[int]) -> str:
    if len(blocks) <= MAX_LISTED_BLOCKS:
        return ", ".join(map(str, blocks))
    return f"{blocks[0]}, {blocks[1]}, ..., {blocks[-1]} ({len(blocks)} of them)"


def format_rank_contents(config: Config, degrees: ParallelDegrees, place: dict[str, int]) -> str:
    """Returns, as text, the blocks and experts of the rank with the given coordinates (axis -> index)."""
    parts = split_into_stages(config.model, degrees.pp * config.parallel.stages_per_rank)[place["pp"] :: degrees.pp]
    text = "blocks " + ", ".join(_format_range(part.blocks) for part in parts)
    moe = config.model.moe
    if moe is not None:
        held = ExpertPlacement.contiguous(moe.num_experts, degrees.ep).experts_on(place["ep"])
        text += f"; experts {_format_range(held)}" + (
            f", part {place['etp'] + 1} of {degrees.etp}" if degrees.etp > 1 else ""
        )
    return text


def _format_range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def format_capacity(config: Config, degrees: ParallelDegrees) -> str:
    """Returns, as text, the capacity of one expert for the tokens of one scope, on the ranks with the most tokens."""
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
        block_capacities(capacity, [size], choices, moe.num_experts, training=is_training)[0]
        for is_training in (True, False)
    )
    return (
        f"{train:,} choices an expert takes of the {size:,} tokens of a scope ({capacity.scope}) in training, "
        f"{evaluation:,} in evaluation"
    )
