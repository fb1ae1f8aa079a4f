"""Measures one MoE layer, forward and backward, against its peers and its floor, in one interleaved run.

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
from expert_parallel.bench.peers.contender import Case, Contender, NotMeasured, attempt, build_case, first_that_fits
from expert_parallel.bench.peers.ours import build_ours
from expert_parallel.bench.peers.peers import DEFAULT, PEERS, Adapter
from expert_parallel.bench.shapes import Shape, layer_flops
from expert_parallel.bench.timing import Facts, Peak, Times, Work, measure, peak_memory, slowest, state_facts
from expert_parallel.parallel.collectives import all_reduce_sum, group_rank
from expert_parallel.runtime.process import Runtime
from expert_parallel.settings import Settings
from expert_parallel.training.config import DTYPES

# Largest relative difference of outputs and input gradients that passes. In bfloat16, peers whose router
# computes in that dtype choose other experts for some tokens.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}
OURS = "ours"
Say = Callable[[str], None]


class LayerTask(Settings):
    """Times one MoE layer against its peers. threads: for each rank, on the CPU. peers: names; None: the shape's, or
    all."""

    shape: Shape
    dtype: Literal["float32", "bfloat16"] = "float32"
    rounds: int = 7
    threads: int = 1
    peers: tuple[str, ...] | None = None


class Row(BaseModel):
    """Holds the measurement of one implementation.

    why: the reason if it was not measured; nothing else is set then. over_*: ratios of medians. rate: FLOP/s of a rank,
    counting the experts' products alone. of_product: `rate` over that of the large product. peak: the largest of the
    ranks. bytes_sent: over all ranks."""

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
    peak: Peak | None = None
    dropped_share: float | None = None
    bytes_sent: int | None = None
    over_minimum: float | None = None


class Agreement(BaseModel):
    """Names the implementations whose outputs equal ours. largest: the largest difference, relative to the norm."""

    activation: str
    names: list[str]
    largest: float


class LayerResult(BaseModel):
    """Holds the result of the benchmark.

    product: times of one large product, N x N x N; product_rate in FLOP/s. fullest: rows of the fullest expert over the
    mean. minimum_bytes: one row for each token and other rank that has an expert of it, four times (out and back,
    forward and backward), over all ranks."""

    kind: Literal["layer"] = "layer"
    shape: Shape
    dtype: str
    rounds: int
    facts: Facts
    product_size: int
    product: Times
    product_rate: float
    fullest: float
    minimum_bytes: int
    floors: dict[str, Times]
    agreements: list[Agreement]
    rows: list[Row]


class Disagreement(ValueError):
    """Says that implementations that should compute the same do not. Raised on all ranks."""


def layer_task(tree: dict[str, Any], runtime: Runtime, say: Say) -> dict[str, Any]:
    """Runs the benchmark on every rank. Returns the result as JSON, or the mismatch of outputs that ended it."""
    try:
        return bench_layer(LayerTask.model_validate(tree, strict=False), runtime, say).model_dump(mode="json")
    except Disagreement as error:
        return {"disagreement": str(error)}


def bench_layer(task: LayerTask, runtime: Runtime, say: Say = lambda text: None) -> LayerResult:
    """Builds and compares all implementations, and then times them. A collective."""
    facts = state_facts(runtime, task.threads)
    group = dist.group.WORLD if runtime.world_size > 1 else None
    cases: dict[str, Case] = {
        activation: build_case(task.shape, activation, DTYPES[task.dtype], runtime, group)
        for activation in dict.fromkeys([task.shape.activation, "swiglu"])
    }
    contenders, rows = build_contenders(task, cases)
    say(f"comparing outputs of {len(contenders)} implementations")
    agreements = compare(contenders, cases, TOLERANCES[task.dtype])

    used = [activation for activation in cases if any(row.activation == activation for row in rows)]
    floors = {activation: Floor(cases[activation]) for activation in used}
    size = 8192 if runtime.device.type == "cuda" else 1024
    a, b, out = (torch.ones(size, size, dtype=DTYPES[task.dtype], device=runtime.device) for _ in range(3))
    works = {"product": Work(partial(torch.mm, a, b, out=out))}
    works |= {f"floor, {activation}": Work(floor.run) for activation, floor in floors.items()}
    works |= {name: layer_work(contender, case) for name, (contender, case) in contenders.items()}
    say(f"timing {task.rounds} rounds of {len(works)}")
    times = measure(works, runtime.device, task.rounds, group)

    rate = 2 * size**3 / times["product"].median * 1000
    minimum, fullest = routed(cases[task.shape.activation])
    for row in rows:
        if row.name in contenders:
            contender, case = contenders[row.name]
            fill(row, contender, case, times, rate, minimum)
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


def build_contenders(task: LayerTask, cases: dict[str, Case]) -> tuple[dict[str, tuple[Contender, Case]], list[Row]]:
    """Builds the implementations that can be measured, ours first, each with the case that it computes: the shape's
    activation, or SwiGLU if it has no other. Adds ours in SwiGLU where a peer needs it. Returns a row for each
    implementation asked for."""
    names = task.peers or task.shape.peers or DEFAULT
    contenders: dict[str, tuple[Contender, Case]] = {}
    rows: list[Row] = []
    main = cases[task.shape.activation]

    def add(name: str, build: Adapter, tried: list[Case]) -> Row:
        try:
            contender, case = first_that_fits(build, tried)
        except NotMeasured as reason:
            return Row(name=name, why=str(reason))
        contenders[name] = (contender, case)
        return Row(name=name, activation=case.activation, version=contender.version, computes=contender.computes)

    rows.append(add(OURS, build_ours, [main]))
    rows += [add(name, partial(try_layer, PEERS[name]), list(cases.values())) for name in names]
    others = {row.activation for row in rows if row.activation} - {main.activation}
    rows[1:1] = [add(f"{OURS}, {other}", build_ours, [cases[other]]) for other in sorted(others)]
    return {row.name: contenders[row.name] for row in rows if row.name in contenders}, rows


def try_layer(build: Adapter, case: Case) -> Contender:
    """Builds a layer and runs it once, so that one that fails is not measured."""

    def trial() -> Contender:
        contender = build(case)
        run(contender, case)
        clear(contender, case)
        return contender

    return attempt(trial)


def run(contender: Contender, case: Case) -> None:
    """Runs one step from no gradients: forward, then the gradients of the input and of all weights."""
    with contender.surroundings():
        contender.forward(case.x_TD).backward(case.dy_TD)


def clear(contender: Contender, case: Case) -> None:
    """Removes all gradients."""
    case.x_TD.grad = None
    for parameter in contender.parameters():
        parameter.grad = None


def layer_work(contender: Contender, case: Case) -> Work:
    return Work(partial(run, contender, case), partial(clear, contender, case))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison of outputs


def compare(contenders: dict[str, tuple[Contender, Case]], cases: dict[str, Case], tolerance: float) -> list[Agreement]:
    """Compares outputs and input gradients with ours. Raises `OutputMismatch`, on all ranks, where one is too far
    away."""
    expected: dict[str, list[Tensor]] = {}
    agreements = {activation: Agreement(activation=activation, names=[], largest=0.0) for activation in cases}
    for name, (contender, case) in contenders.items():
        if is_measure(name, case):
            expected[case.activation] = outputs(contender, case)
    for name, (contender, case) in contenders.items():
        agreement = agreements[case.activation]
        if not contender.is_compared:
            continue
        if not is_measure(name, case):
            pairs = zip(outputs(contender, case), expected[case.activation], strict=True)
            distance, whole = torch.tensor([[_square(one - other), _square(other)] for one, other in pairs]).unbind(1)
            sums = all_reduce_sum(torch.stack([distance, whole]).double(), case.group and dist.group.WORLD)
            relative = float((sums[0] / sums[1].clamp(min=1e-30)).sqrt().max())
            if not relative <= tolerance:
                raise Disagreement(
                    f"{name} ({contender.computes}) and ours differ by {relative:.1e} in outputs or input "
                    f"gradients, at most {tolerance:g} is rounding: nothing was timed"
                )
            agreement.largest = max(agreement.largest, relative)
        agreement.names.append(name)
    return [agreement for agreement in agreements.values() if len(agreement.names) > 1]


def is_measure(name: str, case: Case) -> bool:
    """Returns True for ours, which others of the same activation are compared with."""
    return name in (OURS, f"{OURS}, {case.activation}")


def outputs(contender: Contender, case: Case) -> list[Tensor]:
    """Returns y and the gradient of the input, of a layer that drops nothing."""
    with contender.surroundings():
        y_TD = contender.forward_all(case.x_TD)
        y_TD.backward(case.dy_TD)
    assert case.x_TD.grad is not None
    dx_TD = case.x_TD.grad
    clear(contender, case)
    return [y_TD.detach(), dx_TD]


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())  # waits for the device; float64, as float32 would lose small terms


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def fill(row: Row, contender: Contender, case: Case, times: dict[str, Times], rate: float, minimum: int) -> None:
    """Computes the figures of a row, and takes one more step to measure its memory. A collective."""
    own = times[row.name]
    ours = times[OURS if case.activation == case.shape.activation or row.name == OURS else f"{OURS}, {case.activation}"]
    row.times = own
    row.over_floor = own.median / times[f"floor, {case.activation}"].median
    row.over_ours = own.median / ours.median
    if contender.is_compared:  # the dense layer has other products
        row.rate = layer_flops(case.shape, case.activation) / case.ranks / own.median * 1000
        row.of_product = row.rate / rate
    peak = peak_memory(partial(run, contender, case), lambda: _gradients(contender), case.device)
    total, activations = slowest([peak.total, peak.activations], case.group)
    row.peak = Peak(total=round(total), activations=round(activations))
    sent, counted = contender.bytes_sent(), contender.dropped_share() if contender.is_compared else 0.0
    clear(contender, case)
    sums = torch.tensor([float(sent or 0), counted], dtype=torch.float64)
    sums = all_reduce_sum(sums, case.group and dist.group.WORLD)
    row.dropped_share = float(sums[1]) / case.ranks if contender.is_compared else None
    if case.ranks > 1 and sent is not None:
        row.bytes_sent = round(float(sums[0]))
        row.over_minimum = row.bytes_sent / minimum if minimum else None


def _gradients(contender: Contender) -> list[Tensor]:
    return [parameter.grad for parameter in contender.parameters() if parameter.grad is not None]


def routed(case: Case) -> tuple[int, float]:
    """Returns the fewest bytes that must cross between ranks, over all ranks, and the load of the fullest expert over
    the mean."""
    ids_TK, ranks_TK = case.routing()
    reached = sum(int((ranks_TK == rank).any(1).sum()) for rank in range(case.ranks) if rank != group_rank(case.group))
    counts_E = torch.bincount(ids_TK.flatten(), minlength=case.shape.num_experts)
    sums = all_reduce_sum(torch.cat([torch.tensor([reached]), counts_E]).double(), case.group and dist.group.WORLD)
    fullest = float(sums[1:].max() / sums[1:].mean())
    return 4 * int(sums[0]) * case.shape.d_model * case.dtype.itemsize, fullest
