"""Compares a dense feed-forward network with an MoE layer whose experts together have as many hidden columns: equal
capacity, but fewer FLOPs, since each token uses k experts. Times both whole layers, and separately their parts: matrix
products, activation, router, sorting and gathers.

    expert-parallel bench equal-capacity --hidden 2048 --hidden 8192
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from expert_parallel.bench.equal_capacity_parts import (
    TimedWorkload,
    capture_expert_input,
    dense_parts,
    dense_workload,
    moe_parts,
)
from expert_parallel.bench.layer import TOLERANCES, OutputMismatch
from expert_parallel.bench.overlap import layer_workload, make_layer, random_tokens
from expert_parallel.bench.shapes import LayerShape, choose_shape, layer_flops
from expert_parallel.bench.timing import WARM_UP_ROUNDS, Environment, Times, measure, set_up_environment
from expert_parallel.moe.experts.grouped import GroupedExperts
from expert_parallel.moe.experts.grouped_gemm import has_bfloat16_gemm
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.types import DispatchedTokens
from expert_parallel.nn.ffn import FFN, FFNConfig
from expert_parallel.runtime.process import Runtime
from expert_parallel.settings import Settings
from expert_parallel.training.config import DTYPES

Dtype = Literal["float32", "bfloat16"]
ProgressFn = Callable[[str], None]
HIDDEN = (1024, 2048, 4096, 8192, 16384)
SLOW_BFLOAT16 = (
    "this CPU has no instructions for products of bfloat16: torch multiplies the dense layer's many times slower than "
    "float32's, and the experts' are made in float32 instead, so the ratio does not measure sparsity"
)
PARTS = ("products", "activation", "router", "sorting", "gathers")  # of the MoE layer; the dense one has the first two


class EqualCapacityTask(Settings):
    """Sets what `bench equal-capacity` measures. shapes: the MoE layers; each is compared with a dense layer of
    num_experts times the hidden size of an expert. threads: CPU threads."""

    shapes: tuple[LayerShape, ...]
    dtypes: tuple[Dtype, ...] = ("float32",)
    rounds: int = 7
    threads: int = 1


class LayerMeasurement(BaseModel):
    """Holds the measurement of the dense or the MoE layer, forward and backward.

    parameters: their number. operations: FLOPs of all matrix products, the router's included. times: of the whole
    layer. rate: FLOP/s of the feed-forward network's products, timed alone. parts: times of each part, by name,
    measured separately. unexplained: milliseconds, the whole layer's median minus the medians of its parts."""

    parameters: int
    operations: int
    times: Times
    rate: float
    parts: dict[str, Times]
    unexplained: float

    def medians(self) -> dict[str, float]:
        """Returns the median milliseconds of each part, by name, and `unexplained`; together they add up to the whole
        layer's median."""
        return {name: times.median for name, times in self.parts.items()} | {"unexplained": self.unexplained}


class EqualCapacityRow(BaseModel):
    """Compares the dense and the MoE layer of one size in one dtype.

    hidden: hidden size of the dense layer. operations: the dense layer's FLOPs divided by the MoE layer's. faster,
    faster_range: the dense layer's time divided by the MoE layer's: median over the rounds, and (smallest, largest).
    fullest: rows of the expert that receives the most, divided by the mean over experts. difference: relative error
    between the dense layer and the sum of all experts with weight 1. note: says why the ratio does not measure
    sparsity; else empty."""

    dtype: Dtype
    shape: LayerShape
    hidden: int
    dense: LayerMeasurement
    moe: LayerMeasurement
    operations: float
    faster: float
    faster_range: tuple[float, float]
    fullest: float
    difference: float
    note: str = ""

    def shortfall(self) -> dict[str, float]:
        """Returns, by part, the milliseconds that the MoE layer takes beyond the dense layer's time divided by
        `operations`, which it would take at the dense layer's FLOP/s. Over all parts they add up to the excess of the
        whole layer."""
        dense = self.dense.medians()
        return {name: own - dense.get(name, 0.0) / self.operations for name, own in self.moe.medians().items()}


class EqualCapacityResult(BaseModel):
    """Holds the result of `bench equal-capacity`: one row for each dtype and shape."""

    kind: Literal["equal-capacity"] = "equal-capacity"
    facts: Environment
    rounds: int
    rows: list[EqualCapacityRow]


def choose_shapes(hidden: Sequence[int], changes: Sequence[str]) -> tuple[LayerShape, ...]:
    """Returns an MoE shape for each dense hidden size: the base shape with changes such as `tokens=512` applied, and
    experts of hidden / num_experts columns.

    Raises ValueError for a hidden size that is not a multiple of num_experts, and for a change of `hidden` itself."""
    if any(change.partition("=")[0] == "hidden" for change in changes):
        raise ValueError("hidden=.. is the size of an expert: give the dense layer's, with --hidden")
    base = choose_shape("base", changes)
    for size in hidden:
        if size % base.num_experts:
            raise ValueError(
                f"--hidden ({size}) is not a multiple of num_experts ({base.num_experts}): the experts divide the "
                "dense layer's hidden columns evenly"
            )
    return tuple(base.model_copy(update={"hidden": size // base.num_experts}) for size in dict.fromkeys(hidden))


def choose_dtypes(names: Sequence[str]) -> tuple[Dtype, ...]:
    """Returns the named dtypes without repetitions. Raises ValueError for a dtype that the benchmark does not
    measure."""
    known: dict[str, Dtype] = {dtype: dtype for dtype in get_args(Dtype)}
    for name in names:
        if name not in known:
            raise ValueError(f"--dtype is {name!r}, it must be one of {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def equal_capacity_task(tree: dict[str, Any], runtime: Runtime, print_progress: ProgressFn) -> dict[str, Any]:
    """Runs the benchmark on one rank. tree: an `EqualCapacityTask`. Returns the result as a tree for JSON, or only the
    message `disagreement` if the outputs of the two layers differ."""
    task = EqualCapacityTask.model_validate(tree, strict=False)
    facts, rows = set_up_environment(runtime, task.threads), []
    try:
        for dtype in task.dtypes:
            for shape in task.shapes:
                print_progress(f"{dtype}, hidden {shape.num_experts * shape.hidden}: {task.rounds} rounds")
                rows.append(bench_equal_capacity(shape, dtype, task.rounds, runtime))
    except OutputMismatch as error:
        return {"disagreement": str(error)}
    return EqualCapacityResult(facts=facts, rounds=task.rounds, rows=rows).model_dump(mode="json")


def bench_equal_capacity(shape: LayerShape, dtype: Dtype, rounds: int, runtime: Runtime) -> EqualCapacityRow:
    """Checks that the dense and the MoE layer of one shape agree, then times both and their parts. Raises
    `OutputMismatch` if they do not agree."""
    layer = make_layer(shape, {"kind": "all_to_all"}, runtime).to(DTYPES[dtype])
    x_TD = random_tokens(shape, runtime).detach().to(DTYPES[dtype]).requires_grad_()
    dense = equivalent_dense(layer.experts)
    difference = compare(dense, layer, x_TD, TOLERANCES[dtype])
    tokens = capture_expert_input(layer, x_TD)

    slow, fast = (
        TimedWorkload(dense_workload(dense, x_TD), runtime.device),
        TimedWorkload(layer_workload(layer, x_TD), runtime.device),
    )
    workloads = {"dense": slow.work, "moe": fast.work}
    workloads |= {f"dense {part}": work for part, work in dense_parts(dense, x_TD).items()}
    workloads |= {f"moe {part}": work for part, work in moe_parts(layer, tokens, x_TD).items()}
    times = measure(workloads, runtime.device, rounds)
    ratios = [d / m for d, m in zip(slow.seconds[WARM_UP_ROUNDS:], fast.seconds[WARM_UP_ROUNDS:], strict=True)]

    router_flops = 3 * 2 * shape.tokens * shape.d_model * shape.num_experts
    dense_side = measurement("dense", dense, dense_flops(shape), 0, times)
    moe_side = measurement("moe", layer, layer_flops(shape, shape.activation), router_flops, times)
    is_slow = dtype == "bfloat16" and runtime.device.type == "cpu" and not has_bfloat16_gemm()
    return EqualCapacityRow(
        dtype=dtype,
        shape=shape,
        hidden=shape.num_experts * shape.hidden,
        dense=dense_side,
        moe=moe_side,
        operations=dense_side.operations / moe_side.operations,
        faster=statistics.median(ratios),
        faster_range=(min(ratios), max(ratios)),
        fullest=float(tokens.counts_e.max() / tokens.counts_e.double().mean()),
        difference=difference,
        note=SLOW_BFLOAT16 if is_slow else "",
    )


def measurement(name: str, module: nn.Module, products: int, router: int, times: dict[str, Times]) -> LayerMeasurement:
    """Builds the measurement of the layer called `name` in `times`, `dense` or `moe`. products, router: FLOPs of the
    matrix products of the feed-forward network and of the router."""
    parts = {part: times[f"{name} {part}"] for part in PARTS if f"{name} {part}" in times}
    return LayerMeasurement(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        operations=products + router,
        times=times[name],
        rate=products / parts["products"].median * 1000,
        parts=parts,
        unexplained=times[name].median - sum(part.median for part in parts.values()),
    )


def dense_flops(shape: LayerShape) -> int:
    """Returns the FLOPs of the dense layer: one expert with all hidden columns, which every token uses."""
    whole = shape.model_copy(update={"hidden": shape.num_experts * shape.hidden, "num_experts": 1, "k": 1})
    return layer_flops(whole, shape.activation)


# ---------------------------------------------------------------------------------------------------------------------
# Equality of the two layers


def equivalent_dense(experts: GroupedExperts) -> FFN:
    """Returns the dense network, (..., D) -> (..., D), whose hidden columns are those of all experts, concatenated."""
    config, (num_experts, hidden, d_model) = experts.config, experts.w_out.shape
    dense = FFN(FFNConfig(hidden=num_experts * hidden, activation=config.activation), d_model).to(experts.w_in)
    with torch.no_grad():
        w_in_eDgF = experts.w_in.unflatten(2, (-1, hidden))  # g: 2 for gate and up, else 1
        dense.w_in.weight.copy_(w_in_eDgF.permute(2, 0, 3, 1).reshape(-1, d_model))
        dense.w_out.weight.copy_(experts.w_out.flatten(0, 1).T)
    return dense


def compare(dense: FFN, layer: MoELayer, x_TD: Tensor, tolerance: float) -> float:
    """Returns the relative error between the dense layer's output and the sum of all experts with weight 1, which are
    equal but for rounding, since each expert has a slice of the dense layer's hidden columns.

    Raises `OutputMismatch` if the error is above `tolerance`, or if the MoE layer's own output is not finite."""
    tokens, experts = len(x_TD), layer.config.num_experts
    choice_TE = torch.arange(tokens * experts, device=x_TD.device).view(experts, tokens).T.contiguous()
    everyone = DispatchedTokens(
        x_VD=x_TD,
        row_R=torch.arange(tokens, device=x_TD.device).repeat(experts),
        computed_VK=choice_TE,
        counts_e=torch.full((experts,), tokens, device=x_TD.device),
        weights_R=torch.ones(
            tokens * experts, dtype=torch.promote_types(torch.float32, x_TD.dtype), device=x_TD.device
        ),
    )
    with torch.no_grad():
        y_TD = dense(x_TD)
        slices_TD = layer.experts(everyone)
        moe_TD = layer(x_TD).y
    # Waits for the device. float64, so that the sums of squares add no rounding of their own.
    difference = float((y_TD.double() - slices_TD.double()).norm() / y_TD.double().norm())
    if not difference <= tolerance:
        raise OutputMismatch(
            f"the dense layer and all experts with weight 1 differ by {difference:.1e}, at most {tolerance:g} is "
            "rounding: nothing was timed"
        )
    if not bool(moe_TD.isfinite().all()):
        raise OutputMismatch("the MoE layer's output is not finite: nothing was timed")
    return difference


# ---------------------------------------------------------------------------------------------------------------------
# Printed text


def format_equal_capacity_result(result: EqualCapacityResult) -> str:
    """Formats the result as tables."""
    shape = result.rows[0].shape
    experts = shape.num_experts
    lines = [
        f"{shape.tokens} tokens, d {shape.d_model}, {experts} experts, top-{shape.k}, {shape.activation}, no biases; "
        "forward and backward",
        str(result.facts),
        f"medians of {result.rounds} interleaved rounds, [smallest - largest]; a dense layer of `hidden` beside "
        f"{experts} experts of hidden / {experts} with the same weights",
        f"{'':9}{'hidden':>7}{'parameters: dense':>19}{'MoE':>12}{'operations':>12}{'dense, ms':>28}{'MoE, ms':>28}"
        f"{'MoE faster':>22}{'products, GFLOP/s: dense':>26}{'MoE':>7}{'fullest':>9}{'same to':>9}",
    ]
    for row in result.rows:
        faster = f"{row.faster:.2f} [{row.faster_range[0]:.2f} - {row.faster_range[1]:.2f}]"
        lines.append(
            f"{row.dtype:9}{row.hidden:7}{row.dense.parameters:19,}{row.moe.parameters:12,}{row.operations:12.3f}"
            f"{row.dense.times!s:>28}{row.moe.times!s:>28}{faster:>22}{row.dense.rate / 1e9:26.1f}"
            f"{row.moe.rate / 1e9:7.1f}{row.fullest:9.2f}{row.difference:9.0e}"
        )
    lines += [
        "where the time goes: ms and share of the layer, each part by itself in the same rounds, which is not how it "
        "runs within the layer: unexplained, the rest, may be negative",
        "short: the MoE's less the dense layer's / operations, and its share of the MoE; its sum is what the MoE falls "
        "short by",
        f"{'':9}{'hidden':>7}  {'':7}{'whole':>9}" + "".join(f"{name:>17}" for name in (*PARTS, "unexplained")),
    ]
    for row in result.rows:
        lines += [f"{row.dtype:9}{row.hidden:7}  {line}" for line in part_lines(row)]
    lines += [f"{dtype}: {note}" for dtype, note in {row.dtype: row.note for row in result.rows}.items() if note]
    return "\n".join(line.rstrip() for line in lines)


def part_lines(row: EqualCapacityRow) -> list[str]:
    """Formats the milliseconds and shares of the parts of both layers, and the shortfall."""
    whole = row.moe.times.median
    shortfall = row.shortfall()
    lines = [("dense", row.dense.medians(), row.dense.times.median), ("MoE", row.moe.medians(), whole)]
    lines.append(("short", shortfall, whole))
    return [
        f"{name:7}{sum(parts.values()):9.2f}"
        + "".join(
            f"{f'{parts[part]:.2f} ({parts[part] / of:.0%})' if part in parts else '-':>17}"
            for part in (*PARTS, "unexplained")
        )
        for name, parts, of in lines
    ]
