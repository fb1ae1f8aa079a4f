"""Measures what the ledger, which checks that no row is lost between ranks, costs: times one MoE layer, forward and
backward, with its kinds `counts` and `rows`, with `counts` but without its checksums, and its counting alone.

Every round times each of them once, and medians are compared, since the speed of a shared machine drifts. Runs on any
number of ranks:

    torchrun --nproc-per-node 2 -m expert_parallel bench ledger
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.conservation import check_conservation, count_choices
from expert_parallel.moe.context import StepContext, token_batch
from expert_parallel.moe.dispatch.checksums import Checksums
from expert_parallel.moe.dispatch.ledger import Ledger, LedgerConfig
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.types import MoEOutput, RowCounts
from expert_parallel.parallel.collectives import all_reduce_sum
from expert_parallel.runtime.process import Runtime


@dataclass(frozen=True)
class LedgerShape:
    """Holds the sizes of an MoE layer whose GELU experts have two matrices each. tokens: over all ranks."""

    tokens: int
    d_model: int
    hidden: int
    num_experts: int
    k: int


SHAPES = {
    "base": LedgerShape(4096, 256, 1024, 8, 2),
    "fine": LedgerShape(1024, 256, 128, 64, 8),
    "wide": LedgerShape(1024, 1024, 4096, 8, 2),
}


def bench_ledger(runtime: Runtime, shape_name: str, rounds: int) -> dict[str, Any]:
    """Times the layer with both kinds of ledger and without checksums, the counting alone and one all-reduce alone.
    Returns the median milliseconds of each on this rank, and their ratios. A collective."""
    shape, group = SHAPES[shape_name], dist.group.WORLD if runtime.world_size > 1 else None
    x_TD = torch.randn(shape.tokens // runtime.world_size, shape.d_model, device=runtime.device, requires_grad=True)
    layers = {kind: _layer(shape, kind, group).to(runtime.device) for kind in ("counts", "rows")}

    def step(kind: str) -> MoEOutput:
        output: MoEOutput = layers[kind](x_TD)
        output.y.backward(torch.ones_like(output.y))
        output.stats.checksums.sum(runtime.device)
        return output

    def step_without_checksums() -> None:
        """Runs the step of `counts` without what no setting turns off."""
        with (
            mock.patch.object(Ledger, "_select_words", return_value=(None, None)),
            mock.patch.object(Ledger, "_sample", return_value=None),
            mock.patch.object(Checksums, "sum", return_value=None),
        ):
            step("counts")

    output = step("counts")
    plan = layers["counts"].router(x_TD.detach(), token_batch(x_TD[None], StepContext(), None))

    def counting() -> None:
        """Does all that `counts` adds to the layer's own work, including the reduction that a step makes once for all
        layers."""
        count_choices(plan, plan, None)
        RowCounts.of(output.stats.log)
        check_conservation(output.stats, group, LedgerConfig())

    def reduction() -> None:
        all_reduce_sum(torch.zeros(100, dtype=torch.float64, device=runtime.device), group)

    parts = {
        "counts": lambda: step("counts"),
        "without_checksums": step_without_checksums,
        "rows": lambda: step("rows"),
        "counting": counting,
        "reduction": reduction,
    }
    medians = _medians(parts, runtime, rounds)
    return {
        "shape": shape_name,
        "ranks": runtime.world_size,
        "device": runtime.device.type,
        "torch": torch.__version__,
        "rounds": rounds,
        "milliseconds": medians,
        "counting_share": medians["counting"] / medians["counts"],
        "counting_share_without_reduction": (medians["counting"] - medians["reduction"]) / medians["counts"],
        "checksums_share": medians["counts"] / medians["without_checksums"] - 1,
        "rows_over_counts": medians["rows"] / medians["counts"],
    }


def format_result(result: dict[str, Any]) -> str:
    """Formats the result as a table."""
    shape, ms = SHAPES[result["shape"]], result["milliseconds"]
    return "\n".join(
        [
            f"shape {result['shape']}: {shape.tokens} tokens, d {shape.d_model}, hidden {shape.hidden}, "
            f"{shape.num_experts} experts, top-{shape.k}; {result['ranks']} ranks, {result['device']}, "
            f"torch {result['torch']}; medians of {result['rounds']} rounds",
            f"layer, ledger: counts   {ms['counts']:9.3f} ms  forward and backward",
            f"layer, ledger: rows     {ms['rows']:9.3f} ms  {result['rows_over_counts']:.2f} times counts",
            f"without checksums       {ms['without_checksums']:9.3f} ms  they add {result['checksums_share']:.2%}",
            f"counting alone          {ms['counting']:9.3f} ms  {result['counting_share']:.2%} of the layer, with a "
            "reduction of its own",
            f"one reduction           {ms['reduction']:9.3f} ms  a step makes one for all its layers; without it "
            f"{result['counting_share_without_reduction']:.2%}",
        ]
    )


def _layer(shape: LedgerShape, kind: str, group: dist.ProcessGroup | None) -> MoELayer:
    config = {
        "d_model": shape.d_model,
        "num_experts": shape.num_experts,
        "router": {"k": shape.k},
        "experts": {"hidden": shape.hidden, "activation": "gelu"},
        "ledger": {"kind": kind},
    }
    return MoELayer(MoEConfig.model_validate(config), group)


def _medians(parts: dict[str, Callable[[], Any]], runtime: Runtime, rounds: int) -> dict[str, float]:
    """Returns the median milliseconds of each part, after two rounds of warming up."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 2):
        for name, part in parts.items():
            if runtime.world_size > 1:
                dist.barrier()
            _wait(runtime)
            start = time.perf_counter()
            part()
            _wait(runtime)
            if number >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
