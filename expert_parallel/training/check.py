"""Reports, without starting a run, what a config leads to: effective settings, numbers of parameters, memory per
rank."""

import math
import textwrap
from collections.abc import Callable, Sequence

import torch

from expert_parallel.data.describe import describe_data
from expert_parallel.model.activation_memory import Device
from expert_parallel.model.parallelize import split_into_stages
from expert_parallel.moe.capacity.policies import DroplessConfig, block_capacities
from expert_parallel.moe.config import preset_summary
from expert_parallel.parallel.degrees import (
    ParallelDegrees,
    ShardedConfig,
    crosses_nodes,
    format_rank_table,
    ranks_by_group,
    shard_counts,
)
from expert_parallel.parallel.placement import ExpertPlacement
from expert_parallel.training.comparison import WIDTH, format_comparison, format_count, format_operations
from expert_parallel.training.config import DTYPES, Config, dump_config
from expert_parallel.training.dead_settings import dead_settings
from expert_parallel.training.memory import GIB, GPU_BYTES, MemoryEstimate, estimate_memory, state_memory, total_memory
from expert_parallel.training.setup import check_degrees, data_requirements, format_degrees

LABEL = 21  # columns of the name at the beginning of a line
RANKS_PER_NODE = 8  # GPUs of a node, as most clusters have them
MAX_NODE_RANKS = 100_000  # of a larger world it would take seconds to find what crosses nodes
MAX_GRID_RANKS = 64  # the grid of a larger world is not printed
MAX_LISTED, MAX_PARTS = 3, 3  # ranks and parts of the memory in the summary
GPU_RATE = 300e12  # assumed floating-point operations a second of a rank: half of what a recent GPU reaches in 16 bits
MAX_LISTED_BLOCKS = 8  # longer lists of blocks are abbreviated


def min_world_size(config: Config) -> int:
    """Returns the smallest number of ranks that fits the configured degrees."""
    parallel = config.parallel
    return parallel.pp * math.lcm(parallel.cp * parallel.tp, parallel.ep * parallel.etp)


def format_config_report(
    config: Config, world_size: int | None, ranks_per_node: int | None = None, *, everything: bool = False
) -> str:
    """Returns the output of `expert-parallel check`: a summary of about ten lines, and warnings.

    world_size: the number of ranks; None takes the smallest that fits. ranks_per_node: of the launcher to come, if
    `parallel.ranks_per_node` does not set it; None takes RANKS_PER_NODE. everything: also the resolved config, the rank
    table, all parts of the memory, and the mixture beside its dense twins. Raises ValueError if the world size does not
    fit the degrees of parallelism, or data that is on this machine does not fit the run.
    """
    ranks_per_node = config.parallel.ranks_per_node or ranks_per_node
    degrees = check_degrees(config, world_size or min_world_size(config), ranks_per_node)
    data, warnings = describe_data(config.data, data_requirements(config))
    device = memory_device(config)
    estimate = estimate_memory(config, degrees, device)
    ranks = f"{degrees.world_size:,}{'' if world_size else ', the fewest that fit'}: {format_degrees(config, degrees)}"
    lines = [
        *format_model(config, degrees),
        *format_memory(config, degrees, estimate, device, all_parts=everything),
        *format_work(config, degrees),
        *_row("ranks", ranks),
    ]
    if degrees.world_size > 1:
        lines += _row("placement", format_placement(config, degrees, MAX_GRID_RANKS if everything else MAX_LISTED))
        lines += _row("nodes", format_nodes(config, degrees, ranks_per_node))
    for number, line in enumerate(data.splitlines()):
        lines += _row("" if number else "data", line)
    if everything:
        lines = [dump_config(config).rstrip(), "", *lines, *format_rest(config, degrees)]
    else:
        lines += _row("more with --all", "resolved config, rank table, capacity, all parts of the memory, dense twins")
    sentences = [*warnings, *dead_settings(config), *warn_of_memory(estimate, device)]
    return "\n".join([*lines, *(f"warning: {sentence}" for sentence in sentences)])


def format_model(config: Config, degrees: ParallelDegrees) -> list[str]:
    """Returns the rows on the model: its parameters, its MoE blocks, and the preset of these."""
    counts, active, moe = config.model.parameter_counts(), config.model.num_active_params(), config.model.moe
    lines = _row(
        "parameters",
        f"{counts.total:,} in all, {active:,} active for a token ({active / counts.total:.1%}): "
        f"{format_count(counts.dense)} dense, {format_count(counts.experts)} in experts",
    )
    if (mtp := config.model.mtp) is not None:
        further = config.model.parameter_counts(config.model.mtp_layers, is_first=False, is_last=False)
        active_further = config.model.count_active(further)
        lines += _row(
            "further tokens",
            f"{mtp.depth:,}, predicted by {format_count(further.total)} of these parameters, "
            f"{format_count(active_further)} of the active ones, which generation does not use (model.mtp)",
        )
    if moe is None:
        return lines
    lines += _row(
        "MoE blocks",
        f"{_format_blocks(config.model.moe_layers)}: {moe.num_experts:,} experts, "
        f"{-(-moe.num_experts // degrees.ep)} on the fullest rank, router "
        f"{moe.router.kind}, {moe.router.experts_per_token(moe.num_experts):g} a token",
    )
    preset = preset_summary(moe)
    return lines if preset is None else lines + _row("preset", preset)


def format_memory(
    config: Config, degrees: ParallelDegrees, estimate: MemoryEstimate, device: Device, *, all_parts: bool = True
) -> list[str]:
    """Returns the rows on the memory of the rank that needs the most: its state, and the highest moment of a step
    (`estimate`) with its largest parts, and whether it fits the device. all_parts: lists the others too."""
    names = ("weights", "gradients", "optimizer", "gathered", "activations", "exchanged", "logits", "temporary")
    parts = {name: size for name in names if (size := getattr(estimate, name))}
    largest = sorted(parts, key=lambda name: -parts[name])[: len(names) if all_parts else MAX_PARTS]
    listed = ", ".join(f"{name} {parts[name] / GIB:.2f}" for name in largest)
    return _row(
        "memory of a rank",
        f"{state_memory(config, degrees).state / GIB:.2f} GiB weights, gradients and optimizer; "
        f"peak {estimate.total / GIB:.2f} GiB in the {estimate.moment} (estimate, {device})",
    ) + _row("", f"of it {listed}; {format_device(config, estimate, device)}")


def format_device(config: Config, estimate: MemoryEstimate, device: Device) -> str:
    """Returns, as text, the memory of the device that the estimate is for, whether the estimate is larger, and how to
    estimate for GPUs."""
    name, available = available_memory(device)
    verdict = ": does not fit" if estimate.total > available else ""
    how = "; for GPUs runtime.device=cuda" if config.runtime.device == "auto" and device == "cpu" else ""
    return f"{name} has {available / GIB:.1f} GiB{verdict}{how}"


def available_memory(device: Device) -> tuple[str, float]:
    """Returns the name and the bytes of the device that an estimate is for: a GPU of GPU_BYTES if there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        return f"a GPU of {GPU_BYTES / 1e9:.0f} GB", GPU_BYTES
    return f"this {'GPU' if device == 'cuda' else 'machine'}", total_memory(torch.device(device))


def warn_of_memory(estimate: MemoryEstimate, device: Device) -> list[str]:
    """Returns a sentence if a step needs more memory than the device has."""
    name, available = available_memory(device)
    if estimate.total <= available:
        return []
    return [
        f"a step does not fit: a rank needs about {estimate.total / GIB:,.2f} GiB, {name} has {available / GIB:.1f} "
        "GiB; more ranks with parallel.ep or parallel.data.kind 'sharded', training.recompute and a smaller "
        "training.global_batch / training.micro_steps take less"
    ]


def format_work(config: Config, degrees: ParallelDegrees) -> list[str]:
    """Returns the rows on the operations and tokens of a step and of the run, and on the time if it is a run of GPUs in
    16 bits; operations are those that `ModelConfig.flops_per_token` counts, and apart what is recomputed."""
    training = config.training
    of_token = config.model.flops_per_token(training.sequence_length)
    tokens = training.global_batch * training.sequence_length
    of_step, again = of_token * tokens, recomputed_per_token(config)
    recomputed = f" + {format_operations(again)} recomputed" if again else ""
    lines = _row(
        "FLOPs",
        f"{format_operations(of_step)} a step, {format_operations(of_step / degrees.world_size)} of it on a rank; "
        f"{format_operations(of_token)} a token{recomputed}; {format_operations(of_step * training.steps)} in all",
    ) + _row(
        "tokens",
        f"{tokens:,} a step ({training.global_batch:,} sequences of {training.sequence_length:,}), "
        f"{tokens * training.steps:,} in {training.steps:,} steps",
    )
    if memory_device(config) == "cuda" and DTYPES[training.dtype].itemsize == 2:
        seconds = (of_token + again) * tokens * training.steps / degrees.world_size / GPU_RATE
        about = "less than a second" if seconds < 1 else f"about {format_duration(seconds)}"
        lines += _row("time", f"{about} if every rank reached {GPU_RATE / 1e12:.0f} TFLOP/s (assumed)")
    return lines


def recomputed_per_token(config: Config) -> int:
    """Returns the operations a token that `training.recompute` adds: the forward pass of the MoE layers or of all
    blocks, counted as `ModelConfig.flops_per_token` does."""
    model, training = config.model, config.training
    moe, blocks = model.moe, model.parameter_counts(is_first=False, is_last=False)
    routed = (
        0 if moe is None else round(blocks.experts * moe.router.experts_per_token(moe.num_experts) / moe.num_experts)
    )
    if training.recompute == "block":
        attention = model.num_blocks * training.sequence_length * model.attention.multiplications_per_key
        return 2 * (blocks.dense + routed) + attention
    if training.recompute == "moe" and moe is not None:
        return 2 * (len(model.moe_layers) * moe.num_dense_params(model.d_model) + routed)
    return 0


def format_duration(seconds: float) -> str:
    """Formats a duration in the largest of days, hours, minutes and seconds of which there is one, such as 2.8 days."""
    units = {"days": 86400, "hours": 3600, "minutes": 60}
    name, unit = next(((name, unit) for name, unit in units.items() if seconds >= unit), ("seconds", 1))
    return f"{seconds / unit:,.1f} {name}"


def format_placement(config: Config, degrees: ParallelDegrees, limit: int) -> str:
    """Returns, as text, the blocks of each pipeline rank and the experts of each expert-parallel rank. limit: the
    longest list that is not abbreviated."""
    stages = split_into_stages(config.model, degrees.pp * config.parallel.stages_per_rank)

    def blocks_on(rank: int) -> str:
        return f"{' and '.join(_format_range(stage.blocks) for stage in stages[rank :: degrees.pp])} on pp {rank}"

    parts = ["all blocks" if degrees.pp == 1 else f"blocks {_format_list(degrees.pp, blocks_on, limit)}"]
    if config.model.moe is not None:
        held = ExpertPlacement.contiguous(config.model.moe.num_experts, degrees.ep)

        def experts_on(rank: int) -> str:
            return f"{_format_range(held.experts_on(rank))} on ep {rank}"

        parts += ["all experts" if degrees.ep == 1 else f"experts {_format_list(degrees.ep, experts_on, limit)}"]
        parts += [f"each expert in {degrees.etp} parts (etp)"] if degrees.etp > 1 else []
    return "; ".join(parts) + (" on every rank" if degrees.pp == degrees.ep == 1 else "")


def format_nodes(config: Config, degrees: ParallelDegrees, ranks_per_node: int | None) -> str:
    """Returns, as text, which groups of ranks cross nodes and which do not. ranks_per_node: None assumes
    RANKS_PER_NODE."""
    size = ranks_per_node or RANKS_PER_NODE
    if degrees.world_size > MAX_NODE_RANKS:
        return f"what crosses nodes is found for at most {MAX_NODE_RANKS:,} ranks"
    groups = communicating_ranks(config, degrees)
    crossing = [name for name, ranks in groups.items() if crosses_nodes(ranks, size)]
    inside = [name for name in groups if name not in crossing]
    parts = []
    if crossing:
        others = f", as {'do' if len(crossing) > 2 else 'does'} {', '.join(crossing[1:])}" if crossing[1:] else ""
        parts.append(f"{crossing[0]} crosses nodes of {size:,}{others}")
    if inside:
        parts.append(f"{', '.join(inside)} {'stay' if len(inside) > 1 else 'stays'} within a node")
    moe = config.model.moe
    if moe is not None and f"ep {degrees.ep}" in crossing:
        parts.append(f"ep's dispatcher is {moe.dispatcher.kind}")
    count = -(-degrees.world_size // size)
    most = "up to " if degrees.world_size % size else ""
    ranks_each = f"{size:,} rank{'s' if size > 1 else ''}{'' if ranks_per_node else ' (assumed)'}"
    return f"{count:,} of {most}{ranks_each}: {'; '.join(parts)}"


def communicating_ranks(config: Config, degrees: ParallelDegrees) -> dict[str, list[list[int]]]:
    """Returns the ranks of all groups of each axis above 1 (`ep 16`), and those over which FSDP2 shards (`shards 8`).
    ep comes first: most of what a mixture of experts sends, it sends there."""
    ranks = ranks_by_group(degrees)
    absent = ("ep", "etp", "edp", "expert_shards") if config.model.moe is None else ()
    groups = {f"{axis} {getattr(degrees, axis)}": ranks[axis] for axis in ("ep", "etp", "tp", "cp", "pp", "dp", "edp")}
    if isinstance(config.parallel.data, ShardedConfig):
        shards, expert_shards = shard_counts(config.parallel.data, degrees)
        for name, sharded, count in (("shards", "dense", shards), ("expert_shards", "edp", expert_shards)):
            groups[f"{name} {count}"] = [g[i : i + count] for g in ranks[sharded] for i in range(0, len(g), count)]
    return {name: members for name, members in groups.items() if len(members[0]) > 1 and name.split()[0] not in absent}


def format_rest(config: Config, degrees: ParallelDegrees) -> list[str]:
    """Returns the lines that `--all` adds to the summary: the capacity, the rank table, the mixture beside its dense
    twins."""
    lines, moe = [], config.model.moe
    if moe is not None:
        lines += _row("capacity", format_capacity(config, degrees))
    if degrees.world_size > MAX_GRID_RANKS:
        lines += _row("rank table", f"printed for at most {MAX_GRID_RANKS} ranks")
    elif degrees.world_size > 1:
        lines += ["", format_rank_table(degrees, lambda place: format_rank_contents(config, degrees, place))]
    return lines + (["", *format_comparison(config, degrees)] if moe is not None else [])


def memory_device(config: Config) -> Device:
    """Returns the device for which memory is estimated: `runtime.device`, or the one that `auto` would take here."""
    kind = config.runtime.device
    return kind if kind != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


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


def _format_list(count: int, text_of: Callable[[int], str], limit: int) -> str:
    """Joins text_of(0) to text_of(count - 1); of more than `limit` it leaves out the middle."""
    if count <= limit:
        return ", ".join(map(text_of, range(count)))
    return f"{text_of(0)}, {text_of(1)}, ..., {text_of(count - 1)}"


def _row(name: str, text: str) -> list[str]:
    """Returns a row of the summary, broken into lines of at most WIDTH columns; paths stay whole."""
    row = textwrap.TextWrapper(WIDTH, f"{name:<{LABEL}}", " " * LABEL, break_long_words=False, break_on_hyphens=False)
    return row.wrap(text)


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
