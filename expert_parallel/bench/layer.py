"""Times one MoE layer, forward and backward, against layers of other libraries (peers) and a lower bound (floor.py).
Every round times each of them once.

expert-parallel bench layer --shape base --ranks 2
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor

from expert_parallel.bench.floor import Floor
from expert_parallel.bench.peers.implementation import (
    Case,
    Implementation,
    NotMeasured,
    build_case,
    first_supported,
    try_build,
)
from expert_parallel.bench.peers.ours import build_ours
from expert_parallel.bench.peers.registry import DEFAULT_PEERS, PEERS, LayerBuilder
from expert_parallel.bench.shapes import LayerShape, layer_flops
from expert_parallel.bench.timing import (
    Environment,
    PeakMemory,
    Times,
    Workload,
    max_over_ranks,
    measure,
    peak_memory,
    set_up_environment,
)
from expert_parallel.parallel.collectives import all_reduce_sum, group_rank
from expert_parallel.runtime.process import Runtime
from expert_parallel.settings import Settings
from expert_parallel.training.config import DTYPES

# Largest relative difference of outputs and input gradients that passes. In bfloat16, peers whose router
# computes in that dtype choose other experts for some tokens.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}
OURS = "ours"
ProgressFn = Callable[[str], None]


class LayerTask(Settings):
    """Sets what `bench layer` measures. threads: CPU threads of each rank. peers: names of the implementations to
    compare with; None: those of the shape, or else `DEFAULT_PEERS`."""

    shape: LayerShape
    dtype: Literal["float32", "bfloat16"] = "float32"
    rounds: int = 7
    threads: int = 1
    peers: tuple[str, ...] | None = None


class LayerRow(BaseModel):
    """Holds the measurement of one implementation, forward and backward.

    why: the reason if it was not measured; then only `name` is set besides. computes: a description. over_floor,
    over_ours: its median time divided by the floor's, and by that of our layer. rate: FLOP/s of a rank, where only the
    experts' matrix products count. of_product: `rate` divided by the FLOP/s of one large product. peak: peak memory of
    a step, the largest over ranks. dropped_share: share of the (token, expert) choices that were dropped. bytes_sent:
    between ranks in a step, over all ranks. over_minimum: `bytes_sent` divided by `LayerResult.minimum_bytes`."""

    name: str
    activation: str = ""
    version: str = ""
    computes: str = ""
    why: str = ""
    times: Times | None = None
    over_floor: float | None = None
    over_ours: float | None = None
    rate: float | None = None
    of_product: float | None = None
    peak: PeakMemory | None = None
    dropped_share: float | None = None
    bytes_sent: int | None = None
    over_minimum: float | None = None


class OutputMatch(BaseModel):
    """Names the implementations of one activation whose outputs and input gradients equal ours. largest: the largest
    difference, as norm of the difference divided by the norm of ours."""

    activation: str
    names: list[str]
    largest: float


class LayerResult(BaseModel):
    """Holds the result of `bench layer`.

    product, product_rate: times and FLOP/s of one large matrix product, whose dimensions are all product_size. fullest:
    rows of the expert that receives the most, divided by the mean over experts. minimum_bytes: the fewest bytes that
    must cross between ranks in a step, over all ranks: one row for each pair of a token and another rank that holds one
    of its experts, four times (dispatch and combine, forward and backward). floors: times of the experts' matrix
    products alone, by activation."""

    kind: Literal["layer"] = "layer"
    shape: LayerShape
    dtype: str
    rounds: int
    facts: Environment
    product_size: int
    product: Times
    product_rate: float
    fullest: float
    minimum_bytes: int
    floors: dict[str, Times]
    agreements: list[OutputMatch]
    rows: list[LayerRow]


class OutputMismatch(ValueError):
    """Says that outputs differ that should be equal. Raised on all ranks."""


def layer_task(tree: dict[str, Any], runtime: Runtime, print_progress: ProgressFn) -> dict[str, Any]:
    """Runs the benchmark on every rank. tree: a `LayerTask`. Returns the result as a tree for JSON, or only the message
    `disagreement` if outputs differ."""
    try:
        return bench_layer(LayerTask.model_validate(tree, strict=False), runtime, print_progress).model_dump(
            mode="json"
        )
    except OutputMismatch as error:
        return {"disagreement": str(error)}


def bench_layer(task: LayerTask, runtime: Runtime, print_progress: ProgressFn = lambda text: None) -> LayerResult:
    """Builds all implementations, checks that their outputs equal ours, and then times them. A collective. Raises
    `OutputMismatch`."""
    facts = set_up_environment(runtime, task.threads)
    group = dist.group.WORLD if runtime.world_size > 1 else None
    cases: dict[str, Case] = {
        activation: build_case(task.shape, activation, DTYPES[task.dtype], runtime, group)
        for activation in dict.fromkeys([task.shape.activation, "swiglu"])
    }
    implementations, rows = build_implementations(task, cases)
    print_progress(f"comparing outputs of {len(implementations)} implementations")
    agreements = compare(implementations, cases, TOLERANCES[task.dtype])

    used = [activation for activation in cases if any(row.activation == activation for row in rows)]
    floors = {activation: Floor(cases[activation]) for activation in used}
    size = 8192 if runtime.device.type == "cuda" else 1024
    a, b, out = (torch.ones(size, size, dtype=DTYPES[task.dtype], device=runtime.device) for _ in range(3))
    workloads = {"product": Workload(partial(torch.mm, a, b, out=out))}
    workloads |= {f"floor, {activation}": Workload(floor.run) for activation, floor in floors.items()}
    workloads |= {
        name: layer_workload(implementation, case) for name, (implementation, case) in implementations.items()
    }
    print_progress(f"timing {task.rounds} rounds of {len(workloads)}")
    times = measure(workloads, runtime.device, task.rounds, group)

    rate = 2 * size**3 / times["product"].median * 1000
    minimum, fullest = routing_statistics(cases[task.shape.activation])
    for row in rows:
        if row.name in implementations:
            implementation, case = implementations[row.name]
            fill_row(row, implementation, case, times, rate, minimum)
    return LayerResult(
        shape=task.shape,
        dtype=task.dtype,
        rounds=task.rounds,
        facts=facts,
        product_size=size,
        product=times["product"],
        product_rate=rate,
        fullest=fullest,
        minimum_bytes=minimum,
        floors={activation: times[f"floor, {activation}"] for activation in floors},
        agreements=agreements,
        rows=rows,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Building


def build_implementations(
    task: LayerTask, cases: dict[str, Case]
) -> tuple[dict[str, tuple[Implementation, Case]], list[LayerRow]]:
    """Builds our layer and the peers. Returns those that can be measured, ours first, each with the case (activation,
    weights and tokens) that it computes, and a row for each implementation asked for.

    A peer computes the shape's activation, or SwiGLU if it does not support that; then our layer is built with SwiGLU
    too."""
    names = task.peers or task.shape.peers or DEFAULT_PEERS
    implementations: dict[str, tuple[Implementation, Case]] = {}
    rows: list[LayerRow] = []
    main = cases[task.shape.activation]

    def add(name: str, build: LayerBuilder, tried: list[Case]) -> LayerRow:
        try:
            implementation, case = first_supported(build, tried)
        except NotMeasured as reason:
            return LayerRow(name=name, why=str(reason))
        implementations[name] = (implementation, case)
        return LayerRow(
            name=name, activation=case.activation, version=implementation.version, computes=implementation.computes
        )

    rows.append(add(OURS, build_ours, [main]))
    rows += [add(name, partial(try_layer, PEERS[name]), list(cases.values())) for name in names]
    others = {row.activation for row in rows if row.activation} - {main.activation}
    rows[1:1] = [add(f"{OURS}, {other}", build_ours, [cases[other]]) for other in sorted(others)]
    return {row.name: implementations[row.name] for row in rows if row.name in implementations}, rows


def try_layer(build: LayerBuilder, case: Case) -> Implementation:
    """Builds a layer and runs it once. Raises `NotMeasured` on all ranks if either fails, so that the benchmark goes on
    without this layer."""

    def trial() -> Implementation:
        implementation = build(case)
        run(implementation, case)
        clear(implementation, case)
        return implementation

    return try_build(trial)


def run(implementation: Implementation, case: Case) -> None:
    """Runs forward, then backward for the gradients of the input and of all weights."""
    with implementation.execution_context():
        implementation.forward(case.x_TD).backward(case.dy_TD)


def clear(implementation: Implementation, case: Case) -> None:
    """Removes all gradients."""
    case.x_TD.grad = None
    for parameter in implementation.parameters():
        parameter.grad = None


def layer_workload(implementation: Implementation, case: Case) -> Workload:
    """Returns a workload that runs forward and backward and then removes the gradients."""

    return Workload(partial(run, implementation, case), partial(clear, implementation, case))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison of outputs


def compare(
    implementations: dict[str, tuple[Implementation, Case]], cases: dict[str, Case], tolerance: float
) -> list[OutputMatch]:
    """Compares outputs and input gradients with ours, and returns the implementations that agree, by activation. A
    collective. Raises `OutputMismatch`, on all ranks, if one differs by more than `tolerance`."""
    expected: dict[str, list[Tensor]] = {}
    agreements = {activation: OutputMatch(activation=activation, names=[], largest=0.0) for activation in cases}
    for name, (implementation, case) in implementations.items():
        if is_reference(name, case):
            expected[case.activation] = outputs(implementation, case)
    for name, (implementation, case) in implementations.items():
        agreement = agreements[case.activation]
        if not implementation.is_compared:
            continue
        if not is_reference(name, case):
            pairs = zip(outputs(implementation, case), expected[case.activation], strict=True)
            distance, whole = torch.tensor([[_square(one - other), _square(other)] for one, other in pairs]).unbind(1)
            sums = all_reduce_sum(torch.stack([distance, whole]).double(), case.group and dist.group.WORLD)
            relative = float((sums[0] / sums[1].clamp(min=1e-30)).sqrt().max())
            if not relative <= tolerance:
                raise OutputMismatch(
                    f"{name} ({implementation.computes}) and ours differ by {relative:.1e} in outputs or input "
                    f"gradients, at most {tolerance:g} is rounding: nothing was timed"
                )
            agreement.largest = max(agreement.largest, relative)
        agreement.names.append(name)
    return [agreement for agreement in agreements.values() if len(agreement.names) > 1]


def is_reference(name: str, case: Case) -> bool:
    """Returns True if `name` is our layer, which other implementations of the case's activation are compared with."""
    return name in (OURS, f"{OURS}, {case.activation}")


def outputs(implementation: Implementation, case: Case) -> list[Tensor]:
    """Runs forward and backward without dropping any choice. Returns [y_TD, gradient of the input]."""
    with implementation.execution_context():
        y_TD = implementation.forward_dropless(case.x_TD)
        y_TD.backward(case.dy_TD)
    assert case.x_TD.grad is not None
    dx_TD = case.x_TD.grad
    clear(implementation, case)
    return [y_TD.detach(), dx_TD]


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())  # waits for the device; float64, as float32 would lose small terms


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def fill_row(
    row: LayerRow, implementation: Implementation, case: Case, times: dict[str, Times], rate: float, minimum: int
) -> None:
    """Fills in a row's figures from the times, and takes one more step to measure its memory. A collective. rate:
    FLOP/s of one large product. minimum: `LayerResult.minimum_bytes`."""
    own = times[row.name]
    ours = times[OURS if case.activation == case.shape.activation or row.name == OURS else f"{OURS}, {case.activation}"]
    row.times = own
    row.over_floor = own.median / times[f"floor, {case.activation}"].median
    row.over_ours = own.median / ours.median
    if implementation.is_compared:  # the dense layer has other products
        row.rate = layer_flops(case.shape, case.activation) / case.ranks / own.median * 1000
        row.of_product = row.rate / rate
    peak = peak_memory(partial(run, implementation, case), lambda: _gradients(implementation), case.device)
    total, activations = max_over_ranks([peak.total, peak.activations], case.group)
    row.peak = PeakMemory(total=round(total), activations=round(activations))
    sent, counted = implementation.bytes_sent(), implementation.dropped_share() if implementation.is_compared else 0.0
    clear(implementation, case)
    sums = torch.tensor([float(sent or 0), counted], dtype=torch.float64)
    sums = all_reduce_sum(sums, case.group and dist.group.WORLD)
    row.dropped_share = float(sums[1]) / case.ranks if implementation.is_compared else None
    if case.ranks > 1 and sent is not None:
        row.bytes_sent = round(float(sums[0]))
        row.over_minimum = row.bytes_sent / minimum if minimum else None


def _gradients(implementation: Implementation) -> list[Tensor]:
    return [parameter.grad for parameter in implementation.parameters() if parameter.grad is not None]


def routing_statistics(case: Case) -> tuple[int, float]:
    """Returns the fewest bytes that must cross between ranks in a step, over all ranks, and the rows of the expert that
    receives the most, divided by the mean over experts. A collective."""
    ids_TK, ranks_TK = case.routing()
    reached = sum(int((ranks_TK == rank).any(1).sum()) for rank in range(case.ranks) if rank != group_rank(case.group))
    counts_E = torch.bincount(ids_TK.flatten(), minlength=case.shape.num_experts)
    sums = all_reduce_sum(torch.cat([torch.tensor([reached]), counts_E]).double(), case.group and dist.group.WORLD)
    fullest = float(sums[1:].max() / sums[1:].mean())
    return 4 * int(sums[0]) * case.shape.d_model * case.dtype.itemsize, fullest
