"""`bench equal-capacity`: a dense layer is the sum of its slices, counts are right, parts are what
the layers are made of. No test looks at how long anything takes."""

import json
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

from expert_parallel.bench import equal_capacity, timing
from expert_parallel.bench.equal_capacity import (
    SLOW_BFLOAT16,
    EqualCapacityResult,
    EqualCapacityRow,
    LayerMeasurement,
    bench_equal_capacity,
    choose_shapes,
    compare,
    dense_flops,
    equivalent_dense,
)
from expert_parallel.bench.equal_capacity_parts import (
    TimedWorkload,
    capture_expert_input,
    dense_parts,
    dense_workload,
    expert_parts,
)
from expert_parallel.bench.layer import OutputMismatch
from expert_parallel.bench.overlap import layer_workload, make_layer
from expert_parallel.bench.shapes import LayerShape, layer_flops
from expert_parallel.bench.timing import Times, Workload
from expert_parallel.cli.app import app
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.experts.grouped_gemm import GROUPED_GEMMS, GroupedGemm
from expert_parallel.moe.experts.kernels import cpu_ops
from expert_parallel.moe.layer import MoELayer
from expert_parallel.runtime.process import Launch, Runtime
from tests.launches import ROOT, assert_refused

ONE = Runtime(Launch("test"), torch.device("cpu"), "gloo", timedelta(seconds=60))
SMALL = LayerShape(tokens=24, d_model=16, hidden=8, num_experts=4, k=2)
ROW_KERNELS = [
    function.__name__
    for function in (
        cpu_ops.gather,
        cpu_ops.combine,
        cpu_ops.activate,
        cpu_ops.activate_backward,
        cpu_ops.activation_grad,
        cpu_ops.row_dots,
        cpu_ops.weigh_,
    )
]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", "equal-capacity", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small_layer(shape: LayerShape = SMALL) -> tuple[MoELayer, Tensor]:
    layer = make_layer(shape, {"kind": "all_to_all"}, ONE)
    return layer, torch.randn(shape.tokens, shape.d_model, generator=torch.Generator().manual_seed(1)).requires_grad_()


# ---------------------------------------------------------------------------------------------------------------------
# The same parameters


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_dense_layer_is_the_sum_of_its_slices(activation: str) -> None:
    """All 4 experts chosen, each with weight 1: a router of zeros scores 1/4 each, times 4. Outputs, and the gradients
    of tokens and weights: an expert's are those of its slice of the dense layer, found here by hand."""
    router = {"k": 4, "normalise": False, "scale": 4.0}
    experts = {"hidden": 8, "activation": activation}
    tree = {"d_model": 16, "num_experts": 4, "router": router, "experts": experts}
    layer = MoELayer(MoEConfig.model_validate(tree)).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        layer.get_parameter("router.weight").zero_()
        for weight in (layer.experts.w_in, layer.experts.w_out):
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    dense = equivalent_dense(layer.experts)
    x_TD = torch.randn(24, 16, generator=generator, dtype=torch.float64).requires_grad_()
    dy_TD = torch.randn(24, 16, generator=generator, dtype=torch.float64)

    y_TD = dense(x_TD)
    y_TD.backward(dy_TD)
    expected_TD, x_TD.grad = x_TD.grad, None
    output = layer(x_TD)
    output.y.backward(dy_TD)
    assert y_TD.abs().max() > 1
    torch.testing.assert_close(output.y, y_TD)
    torch.testing.assert_close(x_TD.grad, expected_TD)

    dw_in, dw_out = dense.w_in.weight.grad, dense.w_out.weight.grad  # (H, D) or [gate | up] (2H, D); (D, H)
    assert dw_in is not None
    assert dw_out is not None
    assert layer.experts.w_in.grad is not None
    assert layer.experts.w_out.grad is not None
    for expert in range(4):
        own = slice(8 * expert, 8 * expert + 8)
        columns = torch.cat([half[own] for half in dw_in.split(32)]).T
        torch.testing.assert_close(layer.experts.w_in.grad[expert], columns)
        torch.testing.assert_close(layer.experts.w_out.grad[expert], dw_out[:, own].T)


def test_other_parameters_are_found() -> None:
    """A hundredth more in one expert's second matrix."""
    layer, x_TD = small_layer()
    dense = equivalent_dense(layer.experts)
    assert compare(dense, layer, x_TD, 1e-5) < 1e-6
    with torch.no_grad():
        layer.experts.w_out[3] *= 1.01
    with pytest.raises(
        OutputMismatch, match=r"^the dense layer and all experts with weight 1 differ by .*: nothing was"
    ):
        compare(dense, layer, x_TD, 1e-5)


def test_outputs_that_are_not_finite_are_found() -> None:
    layer, x_TD = small_layer()
    with torch.no_grad():
        layer.get_parameter("router.weight").fill_(torch.nan)
    with pytest.raises(OutputMismatch, match=r"^the MoE layer's output is not finite"):
        compare(equivalent_dense(layer.experts), layer, x_TD, 1e-5)


def test_what_disagrees_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(equal_capacity.TOLERANCES, "float32", 0.0)
    result = invoke("--hidden", "32", "--rounds", "1", "tokens=16", "d_model=16")
    assert result.exit_code == 1
    assert not result.stdout
    assert "error: the dense layer and all experts with weight 1 differ by " in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# What is counted


def test_counts_by_hand() -> None:
    """d 16, hidden 32 or 4 x 8, 24 tokens, top-2. Each of two matrices is in three products, of 2 operations a number;
    the router's 16 x 4 matrix, too."""
    row = bench_equal_capacity(SMALL, "float32", 2, ONE)
    assert row.hidden == 32
    assert row.dense.parameters == 2 * 16 * 32
    assert row.moe.parameters == 2 * 16 * 32 + 16 * 4
    assert row.dense.operations == 24 * 6 * 1024
    assert row.moe.operations == 24 * 6 * (2 * 256 + 64)
    assert row.operations == 1024 / 576
    assert row.dense.rate == row.dense.operations / row.dense.parts["products"].median * 1000
    assert row.moe.rate == 24 * 6 * 512 / row.moe.parts["products"].median * 1000
    assert list(row.dense.parts) == ["products", "activation"]
    assert list(row.moe.parts) == ["products", "activation", "router", "sorting", "gathers"]
    for measurement in (row.dense, row.moe):
        assert sum(measurement.medians().values()) == pytest.approx(measurement.times.median)
    assert sum(row.shortfall().values()) == pytest.approx(
        row.moe.times.median - row.dense.times.median / row.operations
    )
    low, high = row.faster_range
    assert low <= row.faster <= high
    assert 1 <= row.fullest <= 2, "24 of 48 rows at most over a mean of 12"


def test_the_shapes_of_the_claim() -> None:
    """8 experts of an eighth each, of which a token passes 2. A size that is given twice is measured once."""
    first, second = choose_shapes([8192, 1024, 8192], ["tokens=512"])
    assert first == LayerShape(tokens=512, d_model=256, hidden=1024, num_experts=8, k=2)
    assert second == first.model_copy(update={"hidden": 128})
    assert dense_flops(first) == 4 * layer_flops(first, "gelu") == 12 * 512 * 256 * 8192


def flops(work: Workload) -> int:
    with FlopCounterMode(display=False) as counter:
        work.run()
    work.clear()
    return counter.get_total_flops()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_dense_products_are_those_of_the_layer(activation: str) -> None:
    """As torch counts them, product by product."""
    shape = SMALL.model_copy(update={"activation": activation})
    layer, x_TD = small_layer(shape)
    dense = equivalent_dense(layer.experts)
    parts = dense_parts(dense, x_TD)
    assert flops(dense_workload(dense, x_TD)) == flops(parts["products"]) == dense_flops(shape)
    assert flops(parts["activation"]) == 0
    assert x_TD.grad is None


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("hidden", [8, 24], ids=["activations made again", "activations kept"])
def test_the_experts_parts_are_what_a_layer_calls(
    activation: str, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same products and kernels on the same shapes, each as often, in a step of the layer and in its parts."""
    layer, x_TD = small_layer(SMALL.model_copy(update={"activation": activation, "hidden": hidden}))
    calls: Counter[str] = Counter()

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in arguments]
            calls[f"{name} {shapes}"] += 1
            return function(*arguments, **named)

        return call

    for name in ROW_KERNELS:
        monkeypatch.setattr(cpu_ops, name, noted(name, getattr(cpu_ops, name)))
    for kind, products in GROUPED_GEMMS.items():
        noted_products = GroupedGemm(*(noted(name, getattr(products, name)) for name in ("groups", "rows", "sums")))
        monkeypatch.setitem(GROUPED_GEMMS, kind, noted_products)
    layer_workload(layer, x_TD).run()
    in_layer = calls.copy()
    calls.clear()
    parts = expert_parts(layer.experts, capture_expert_input(layer, x_TD))  # whose products are noted
    calls.clear()
    for part in parts.values():
        part.run()
    assert calls == in_layer
    assert sum(count for call, count in calls.items() if call.startswith(("rows", "sums"))) == 6


def test_repeated_runs_compute_the_same() -> None:
    """What a part overwrites is renewed after each run."""
    layer, x_TD = small_layer()
    seen: list[Tensor] = []
    parts = expert_parts(layer.experts, capture_expert_input(layer, x_TD))
    backward = cpu_ops.activate_backward

    def keep(h: Tensor, g_RF: Tensor, *rest: Any) -> Any:
        seen.append(g_RF.clone())
        return backward(h, g_RF, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_ops, "activate_backward", keep)
        for _ in range(2):
            parts["activation"].run()
            parts["activation"].clear()
    assert torch.equal(*seen)


def test_laps_are_the_seconds_of_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def work() -> None:
        clock[0] += 1 + len(laps.seconds)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    laps = TimedWorkload(Workload(work), torch.device("cpu"))
    timing.measure({"work": laps.work}, torch.device("cpu"), 3)
    assert laps.seconds == [1, 2, 3, 4, 5]


def test_what_falls_short_by_hand() -> None:
    """Of 100 ms a half would be 50; the MoE takes 70."""

    def measurement(whole: float, unexplained: float, **parts: float) -> LayerMeasurement:
        times = {name: Times(median=ms, smallest=ms, largest=ms) for name, ms in {"whole": whole, **parts}.items()}
        own = {name: times[name] for name in parts}
        return LayerMeasurement(
            parameters=1, operations=1, times=times["whole"], rate=1.0, parts=own, unexplained=unexplained
        )

    row = EqualCapacityRow(
        dtype="float32",
        shape=SMALL,
        hidden=32,
        dense=measurement(100, 2, products=90, activation=8),
        moe=measurement(70, -1, products=51, activation=6, router=14),
        operations=2,
        faster=10 / 7,
        faster_range=(1.4, 1.5),
        fullest=1.1,
        difference=0.0,
    )
    assert row.shortfall() == {"products": 6, "activation": 2, "router": 14, "unexplained": -2}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_prints_and_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_capacity, "has_bfloat16_gemm", lambda: False)
    path = tmp_path / "equal.json"
    sizes = ["tokens=64", "d_model=32", "num_experts=4"]
    options = ["--hidden", "64", "--hidden", "128", "--dtype", "bfloat16", "--dtype", "float32", "--rounds", "2"]
    result = invoke(*options, "--json", path, *sizes)
    assert result.exit_code == 0, result.stderr
    written = EqualCapacityResult.model_validate(json.loads(path.read_text()), strict=False)
    assert [(row.dtype, row.hidden) for row in written.rows] == [
        ("bfloat16", 64),
        ("bfloat16", 128),
        ("float32", 64),
        ("float32", 128),
    ]
    assert [row.note for row in written.rows] == [SLOW_BFLOAT16, SLOW_BFLOAT16, "", ""]
    assert result.stdout.count(f"bfloat16: {SLOW_BFLOAT16}") == 1
    assert "64 tokens, d 32, 4 experts, top-2, gelu, no biases; forward and backward" in result.stdout
    for row in written.rows:
        found = [line for line in result.stdout.splitlines() if line.split()[:2] == [row.dtype, str(row.hidden)]]
        assert len(found) == 4, "of the layers, and where the time of either goes, and what falls short"
        assert f"{row.faster:.2f} [{row.faster_range[0]:.2f} - {row.faster_range[1]:.2f}]" in found[0]
        assert f"{row.moe.unexplained:.2f} (" in found[2]


def test_on_a_cpu_with_instructions_for_bfloat16_nothing_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_capacity, "has_bfloat16_gemm", lambda: True)
    assert not bench_equal_capacity(SMALL, "bfloat16", 1, ONE).note


REFUSED = {
    "hidden that does not divide": (["--hidden", "1001"], "--hidden (1001) is not a multiple of num_experts (8): "),
    "not by these experts": (
        ["--hidden", "64", "--hidden", "1000", "num_experts=16"],
        "--hidden (1000) is not a multiple of num_experts (16): ",
    ),
    "the size of an expert": (["hidden=128"], "hidden=.. is the size of an expert: give the dense layer's, with "),
    "a dtype that is none": (["--dtype", "float16"], "--dtype is 'float16', it must be one of float32, bfloat16"),
    "more choices than experts": (["k=9"], "the shape is invalid: k (9) is larger than num_experts (8)"),
    "another name": (["peers=dense"], "'peers=dense' is not a change of a shape: "),
    "no folder": (["--json", "/no/such/folder/x.json"], "--json: there is no folder /no/such/folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused(case: str) -> None:
    arguments, what = REFUSED[case]
    assert_refused(invoke(*arguments), what)


def test_the_readme_names_every_field() -> None:
    page = (ROOT / "expert_parallel/bench/README.md").read_text()
    for kind in (EqualCapacityResult, EqualCapacityRow, LayerMeasurement):
        for field in kind.model_fields:
            assert f"`{field}`" in page, f"{kind.__name__}.{field}"
