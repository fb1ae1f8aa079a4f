"""Compares the mixture of experts of a config with dense models, and says what speaks for and against it there."""

import textwrap

from expert_parallel.data.config import TokensData
from expert_parallel.model.dense_twin import DenseTwins, dense_twins, exchanged_bytes_per_token
from expert_parallel.parallel.degrees import ParallelDegrees
from expert_parallel.training.config import DTYPES, Config
from expert_parallel.training.memory import GIB

WIDTH = 120  # columns of a line
LARGE_MODEL, SMALL_MODEL = 10e9, 1e9  # parameters above and below which a mixture pays, and does not


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
        counts = f"{format_count(size.parameters):>12}{format_count(size.active):>12}"
        counts += f"{format_operations(size.operations):>16}{size.used:>14,.10g}"
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
        f"  size    {by_size} ({format_count(size)} parameters)",
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
    by_links = (
        f"  links   a token's rows are {sent / 1e3:,.0f} kB to other ranks and back: a rank that computes 100 TFLOP/s "
        f"sends {rate:,.1f} GB/s. Faster links than that speak for it, slower ones against"
    )
    return [*lines, *textwrap.wrap(by_links, WIDTH, subsequent_indent=" " * 10)]


def format_count(number: int) -> str:
    """Formats a count in billions or millions, such as 46.70 B or 3.15 M, or exactly if it is smaller."""
    if number < 1e6:
        return f"{number:,}"
    unit, name = (1e9, "B") if number >= 1e9 else (1e6, "M")
    return f"{number / unit:,.2f} {name}"


def format_operations(number: float) -> str:
    """Formats a number of floating-point operations, such as 102.26 GFLOP or 18.93 MFLOP."""
    prefixes = {"Y": 1e24, "Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
    prefix = next((prefix for prefix, unit in prefixes.items() if number >= unit), "k")
    return f"{number / prefixes[prefix]:,.2f} {prefix}FLOP"
