"""Measures how the time of a layer grows with the number of ranks (1, 2, 4, 8), with a constant number of tokens per
rank (weak scaling) or in total (strong scaling); and how routing, dispatch and combine grow with the number of experts.

All ranks are started together. Groups of fewer ranks are timed while the others wait, so that each round times every
group.

    expert-parallel bench scaling --ranks 8
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, Field
from torch import Tensor

from expert_parallel.bench.overlap import exchange_workload, layer_workload
from expert_parallel.bench.shapes import LayerShape
from expert_parallel.bench.timing import Environment, Times, Workload, measure, set_up_environment
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import StepContext, token_batch
from expert_parallel.moe.layer import MoELayer
from expert_parallel.runtime.process import Runtime
from expert_parallel.settings import Settings

ProgressFn = Callable[[str], None]


class ScalingTask(Settings):
    """Times a layer on growing numbers of ranks and experts. shape: its tokens are those of one rank in weak scaling,
    and of all ranks in strong scaling. ranks: group sizes to time. experts: numbers of experts to time, on
    `expert_ranks` ranks. threads: CPU threads of each rank."""

    shape: LayerShape
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    experts: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    expert_ranks: int = 2
    rounds: int = 5
    threads: int = 1


class ScalingRow(BaseModel):
    """Holds the measurement of a layer on `ranks` ranks, forward and backward. tokens: over all ranks. work: core time
    per token, time * min(ranks, cores) / tokens, divided by that of the first row."""

    ranks: int
    tokens: int
    times: Times
    work: float


class ExpertsRow(BaseModel):
    """Holds the times of a layer's parts with `num_experts` experts, forward and backward.

    product: the matrix products of tokens and router weights alone. routing: the whole router, including these
    products. dispatch: dispatch and combine, with experts that return their input. growth: `routing` + `dispatch`,
    divided by that of the first row. growth_without_product: the same after `product` was subtracted from each."""

    num_experts: int
    product: Times
    routing: Times
    dispatch: Times
    growth: float
    growth_without_product: float


class ScalingResult(BaseModel):
    """Holds the result of `bench scaling`. cores: of this machine. weak, strong: a row for each number of ranks.
    experts: a row for each number of experts, on `expert_ranks` ranks."""

    kind: str = "scaling"
    facts: Environment
    cores: int = Field(ge=1)
    shape: LayerShape
    rounds: int
    expert_ranks: int
    weak: list[ScalingRow]
    strong: list[ScalingRow]
    experts: list[ExpertsRow]


def scaling_task(tree: dict[str, Any], runtime: Runtime, print_progress: ProgressFn) -> dict[str, Any]:
    """Runs the benchmark on as many ranks as the largest group has. tree: a `ScalingTask`. Returns the result as a tree
    for JSON."""
    task = ScalingTask.model_validate(tree, strict=False)
    facts = set_up_environment(runtime, task.threads)
    counts = sorted({*task.ranks, task.expert_ranks})
    made = {count: dist.new_group(list(range(count)), timeout=runtime.timeout) for count in counts}
    groups = {count: group if runtime.rank < count else None for count, group in made.items()}
    cores = os.cpu_count() or 1
    print_progress(f"layers over {', '.join(map(str, task.ranks))} ranks")
    weak, strong = (measure_ranks(task, groups, runtime, cores, is_weak) for is_weak in (True, False))
    print_progress(f"among {', '.join(map(str, task.experts))} experts")
    experts = measure_experts(task, groups[task.expert_ranks], runtime)
    return ScalingResult(
        facts=facts,
        cores=cores,
        shape=task.shape,
        rounds=task.rounds,
        expert_ranks=task.expert_ranks,
        weak=weak,
        strong=strong,
        experts=experts,
    ).model_dump(mode="json")


def measure_ranks(
    task: ScalingTask, groups: dict[int, dist.ProcessGroup | None], runtime: Runtime, cores: int, is_weak: bool
) -> list[ScalingRow]:
    """Times a layer over groups of 1, 2, ... ranks. A collective of all ranks. is_weak: the shape's tokens are those of
    each rank, and else those of the whole group."""
    tokens = {count: task.shape.tokens * (count if is_weak else 1) for count in task.ranks}
    workloads = {}
    for count in task.ranks:
        idle = Workload(lambda: None)
        workloads[str(count)] = idle
        if runtime.rank < count:
            layer = build_layer(task.shape, task.shape.num_experts, groups[count] if count > 1 else None)
            workloads[str(count)] = layer_workload(
                layer, draw(tokens[count] // count, task.shape.d_model, runtime.rank)
            )
    times = measure(workloads, runtime.device, task.rounds, dist.group.WORLD)

    def work_of_token(count: int) -> float:
        return times[str(count)].median * min(count, cores) / tokens[count]

    first = work_of_token(task.ranks[0])
    return [
        ScalingRow(ranks=n, tokens=tokens[n], times=times[str(n)], work=work_of_token(n) / first) for n in task.ranks
    ]


def measure_experts(task: ScalingTask, group: dist.ProcessGroup | None, runtime: Runtime) -> list[ExpertsRow]:
    """Times routing, dispatch and combine of the shape's tokens over the ranks of the group, for each number of
    experts. A collective of all ranks, also those outside the group. The experts are as small as possible, and are not
    run."""
    workloads: dict[str, Workload] = {}
    for num_experts in task.experts:
        names = [f"{part} {num_experts}" for part in ("product", "routing", "dispatch")]
        workloads |= dict.fromkeys(names, Workload(lambda: None))
        if runtime.rank < task.expert_ranks:
            layer = build_layer(
                task.shape.model_copy(update={"hidden": 1}), num_experts, group if task.expert_ranks > 1 else None
            )
            x_TD = draw(task.shape.tokens // task.expert_ranks, task.shape.d_model, runtime.rank)
            parts = (router_matmul_workload(layer, x_TD), routing_workload(layer, x_TD), exchange_workload(layer, x_TD))
            workloads |= dict(zip(names, parts, strict=True))
    times = measure(workloads, runtime.device, task.rounds, dist.group.WORLD)
    rows = []
    for num_experts in task.experts:
        product, routing, dispatch = (times[f"{part} {num_experts}"] for part in ("product", "routing", "dispatch"))
        rows.append((num_experts, product, routing, dispatch))

    def whole(row: tuple[int, Times, Times, Times]) -> float:
        return row[2].median + row[3].median

    def without(row: tuple[int, Times, Times, Times]) -> float:
        return whole(row) - row[1].median

    return [
        ExpertsRow(
            num_experts=row[0],
            product=row[1],
            routing=row[2],
            dispatch=row[3],
            growth=whole(row) / whole(rows[0]),
            growth_without_product=without(row) / without(rows[0]),
        )
        for row in rows
    ]


def format_scaling_result(result: ScalingResult) -> str:
    """Formats the result as tables."""
    head = f"{result.facts}; {result.cores} cores; medians of {result.rounds} interleaved rounds, of the slowest rank"
    lines = [str(result.shape), head]
    for name, rows in (("weak: tokens a rank", result.weak), ("strong: tokens in all", result.strong)):
        lines.append(f"{name:24}{'tokens':>10}{'ms, forward + backward':>34}{'core time a token':>20}")
        lines += [f"{f'{r.ranks} ranks':24}{r.tokens:10,}{r.times!s:>34}{r.work:20.2f}" for r in rows]
    lines += [
        f"{result.shape.tokens} tokens, top-{result.shape.k}, {result.expert_ranks} ranks, forward and backward, ms",
        f"{'experts':>8}{'router product':>26}{'routing with it':>26}{'dispatch, combine':>26}"
        f"{'/ first':>9}{'without product':>17}",
    ]
    for row in result.experts:
        shown = "".join(f"{part!s:>26}" for part in (row.product, row.routing, row.dispatch))
        lines.append(f"{row.num_experts:8}{shown}{row.growth:9.2f}{row.growth_without_product:17.2f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Workloads


def build_layer(shape: LayerShape, num_experts: int, group: dist.ProcessGroup | None) -> MoELayer:
    """Builds a layer with `num_experts` experts, which the ranks of the group divide."""
    config = {
        "d_model": shape.d_model,
        "num_experts": num_experts,
        "router": {"k": shape.k, "normalise": shape.k > 1},
        "experts": {"hidden": shape.hidden, "activation": shape.activation},
    }
    return MoELayer(MoEConfig.model_validate(config), group)


def draw(num_tokens: int, d_model: int, seed: int) -> Tensor:
    """Draws random tokens, (num_tokens, d_model), that require a gradient."""
    return torch.randn(num_tokens, d_model, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def routing_workload(layer: MoELayer, x_TD: Tensor) -> Workload:
    """Returns a workload that runs the router's forward and backward pass."""

    def run() -> None:
        plan = layer.router(x_TD, token_batch(x_TD[None], StepContext(), layer.data_group))
        plan.weights_TK.backward(torch.ones_like(plan.weights_TK))

    return Workload(run, partial(_clear, layer, x_TD))


def router_matmul_workload(layer: MoELayer, x_TD: Tensor) -> Workload:
    """Returns a workload of the router's matrix products alone: tokens x weights, and the two of its backward pass."""
    weight_ED, x_TD = layer.get_parameter("router.weight").detach(), x_TD.detach()
    logits_TE = x_TD @ weight_ED.T
    dx_TD, dweight_ED = torch.empty_like(x_TD), torch.empty_like(weight_ED)

    def run() -> None:
        torch.mm(x_TD, weight_ED.T, out=logits_TE)
        torch.mm(logits_TE, weight_ED, out=dx_TD)
        torch.mm(logits_TE.T, x_TD, out=dweight_ED)

    return Workload(run)


def _clear(layer: MoELayer, x_TD: Tensor) -> None:
    layer.zero_grad()
    x_TD.grad = None
