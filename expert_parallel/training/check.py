"""Reports, without starting a run, what a config leads to: effective settings, numbers of parameters, memory per
rank."""

import math
from collections.abc import Sequence

import torch

from expert_parallel.data.config import TokensData
from expert_parallel.data.open import open_data
from expert_parallel.model.activation_memory import Device
from expert_parallel.model.dense_twin import DenseTwins, dense_twins, exchanged_bytes_per_token
from expert_parallel.model.parallelize import split_into_stages
from expert_parallel.moe.capacity.policies import DroplessConfig, block_capacities
from expert_parallel.parallel.degrees import ParallelDegrees, format_rank_table
from expert_parallel.parallel.placement import ExpertPlacement
from expert_parallel.training.config import DTYPES, Config, dump_config
from expert_parallel.training.dead_settings import dead_settings
from expert_parallel.training.memory import GIB, estimate_memory, state_memory
from expert_parallel.training.setup import check_degrees, data_requirements, format_degrees

MAX_GRID_RANKS = 64  # the grid of a larger world is not printed
LARGE_MODEL, SMALL_MODEL = 10e9, 1e9  # parameters above and below which a mixture pays, and does not
NO_DATA = "none yet: data.corpora is empty"
MAX_LISTED_BLOCKS = 8  # longer lists of blocks are abbreviated


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
    if moe is not None:
        lines += ["", *format_comparison(config, degrees)]
    lines += [f"warning: {sentence}" for sentence in dead_settings(config)]
    return "\n".join(lines)


def format_memory(config: Config, degrees: ParallelDegrees) -> str:
    """Returns the memory of the rank that needs the most, as text: its state, and all that exists at the highest moment
    of a step."""
    estimate = estimate_memory(config, degrees, memory_device(config))
    names = ("weights", "gradients", "optimizer", "gathered", "activations", "exchanged", "logits", "temporary")
    parts = ", ".join(f"{name} {getattr(estimate, name) / GIB:.2f}" for name in names if getattr(estimate, name))
    state = state_memory(config, degrees).state
    return (
        f"{state / GIB:.2f} GiB weights, gradients and optimizer; {estimate.total / GIB:.2f} GiB in all (estimate, "
        f"{memory_device(config)}) at the highest moment of a step, the {estimate.moment}: {parts}"
    )


def format_comparison(config: Config, degrees: ParallelDegrees) -> list[str]:
    """Returns the mixture beside its dense twins, as a table, and what speaks for and against a mixture here."""
    twins = dense_twins(config.model, config.training.sequence_length)
    rows = {
        "this mixture": twins.mixture,
        "dense, equal operations": twins.equal_operations,
        "dense, equal parameters": twins.equal_parameters,
    }
    lines = [f"{'':<24}{'parameters':>12}{'active':>12}{'a token takes':>16}{'hidden, used':>14}{'hidden, all':>13}"]
    for name, size in rows.items():
        counts = f"{_format_count(size.parameters):>12}{_format_count(size.active):>12}"
        counts += f"{_format_operations(size.operations):>16}{size.used:>14,.10g}"
        lines.append(f"{name:<24}{counts}{size.hidden:>13,}")
    lines += [
        f"A token uses {twins.active_share:.1%} of the parameters. The mixture has {twins.memory_ratio:.2f} times the "
        "weights of the dense model",
        f"of equal operations; the dense model of equal parameters takes {twins.operations_ratio:.2f} times the "
        "operations.",
    ]
    return [*lines, *mixture_advice(config, degrees, twins)]


def mixture_advice(config: Config, degrees: ParallelDegrees, twins: DenseTwins) -> list[str]:
    """Returns one line for each of size, data, memory, GPUs and links: whether it speaks for a mixture of experts or
    against it, with the config's numbers."""
    training, size = config.training, twins.mixture.parameters
    by_size = "open, between 1 B and 10 B"
    if size >= LARGE_MODEL:
        by_size = "for: above 10 B, operations are what costs"
    elif size < SMALL_MODEL:
        by_size = "against: below 1 B, a dense model is simpler and costs little"
    tokens = training.steps * training.global_batch * training.sequence_length
    corpora = len(config.data.corpora) if isinstance(config.data, TokensData) else 1
    by_data = {0: "open: data.corpora is empty", 1: "against, unless the one corpus is diverse"}
    more = 16 * (size - twins.equal_operations.parameters) / GIB  # weight, gradient and two moments in float32
    lines = [
        "Does a mixture of experts pay here?",
        f"  size    {by_size} ({_format_count(size)} parameters)",
        f"  data    {by_data.get(corpora, f'for: experts can specialize in {corpora} corpora')} "
        f"({tokens / twins.mixture.active:,.1f} tokens for each active parameter)",
        f"  memory  against: weights, gradients and moments take {more:,.2f} GiB more than dense with equal operations",
    ]
    if degrees.world_size == 1:
        return [*lines, "  GPUs    against: one rank holds all experts; a wider dense model could use its memory"]
    lines.append(f"  GPUs    for: {degrees.world_size:,} ranks; {degrees.ep} divide the experts of a copy")
    if degrees.ep == 1:
        return lines
    sent = exchanged_bytes_per_token(config.model, degrees.ep, DTYPES[training.dtype].itemsize)
    rate = sent / twins.mixture.operations * 1e14 / 1e9
    return [
        *lines,
        f"  links   a token's rows are {sent / 1e3:,.0f} kB to other ranks and back: a rank that computes 100 TFLOP/s "
        f"sends {rate:,.1f} GB/s. Faster links than that speak for it, slower ones against",
    ]


def memory_device(config: Config) -> Device:
    """Returns the device for which memory is estimated: `runtime.device`, or the one that `auto` would take here."""
    kind = config.runtime.device
    return kind if kind != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _format_count(number: int) -> str:
    """Formats a count in billions or millions, such as 46.70 B or 3.15 M."""
    unit, name = (1e9, "B") if number >= 1e9 else (1e6, "M")
    return f"{number / unit:,.2f} {name}"


def _format_operations(number: int) -> str:
    """Formats a number of floating-point operations, such as 102.26 GFLOP or 18.93 MFLOP."""
    unit, name = (1e9, "GFLOP") if number >= 1e9 else (1e6, "MFLOP")
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
