"""The row kernels: torch's against loops and autograd, Triton's in its interpreter against torch's, all of them in one
small layer against moe/reference/reference_layer.py, and Triton's compiled for GPUs that need not be here.

Triton decides when it is imported whether it interprets, so each way has a process of its own.
"""

import inspect
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.dispatch.permute import NO_ROW
from expert_parallel.moe.experts.kernels import cpu_ops, ops_for, torch_ops
from expert_parallel.moe.reference.reference_layer import reference_layer
from expert_parallel.nn.ffn import ACTIVATIONS, GATED, w_in_columns

NAMES = ("gather", "weigh_", "row_dots", "activate", "activate_backward", "combine")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CASES = settings(max_examples=20, deadline=None, derandomize=True)


# ---------------------------------------------------------------------------------------------------------------------
# processes: one that interprets, one that compiles


def worker(interpret: str) -> Iterator[Callable[..., Any]]:
    """A function that calls another one in a fresh process, where TRITON_INTERPRET is `interpret`."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", interpret)
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="module")
def in_interpreter() -> Iterator[Callable[..., Any]]:
    for call in worker("1"):
        call(round_as_gpus_do)
        yield call


@pytest.fixture(scope="module")
def interpreted(in_interpreter: Callable[..., Any]) -> SimpleNamespace:
    """The functions of triton_ops, run by Triton's interpreter."""
    return SimpleNamespace(**{name: partial(in_interpreter, run_triton, name) for name in NAMES})


@pytest.fixture(params=["torch", "triton"])
def ops(request: pytest.FixtureRequest) -> Any:
    return torch_ops if request.param == "torch" else request.getfixturevalue("interpreted")


@pytest.fixture(params=["torch", "cpu", "triton"])
def all_ops(request: pytest.FixtureRequest) -> Any:
    """Those that a layer needs, which the CPU has its own of."""
    return (
        cpu_ops
        if request.param == "cpu"
        else {"torch": torch_ops}.get(request.param) or request.getfixturevalue("interpreted")
    )


def run_triton(name: str, *args: Any) -> Any:
    ops = ops_for(args[0], interpreted=True)
    assert ops.__name__ == "expert_parallel.moe.experts.kernels.triton_ops"
    return getattr(ops, name)(*args)


def run_triton_without_kernels(name: str, *args: Any) -> Any:
    from expert_parallel.moe.experts.kernels import triton_ops

    with mock.patch.object(triton_ops, "kernels", None):
        return run_triton(name, *args)


def round_as_gpus_do() -> None:
    """The interpreter cuts off what bfloat16 has no bits for; a GPU rounds to the nearest, like torch."""
    from triton.runtime import interpreter

    floats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    bits = {16: torch.uint16, 32: torch.uint32}

    def convert(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        values = torch.from_numpy(np.ascontiguousarray(x)).view(floats[source.name]).to(floats[target.name])
        return values.view(bits[target.primitive_bitwidth]).numpy().reshape(x.shape)

    interpreter._convert_float = convert


# ---------------------------------------------------------------------------------------------------------------------
# both against loops, hand-written numbers and autograd, in float64


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


X_LD = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)


def test_gathers_by_hand(ops: Any) -> None:
    assert ops.gather(X_LD, rows(1, NO_ROW, 0, 1)).tolist() == [[4, 5, 6], [0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert ops.weigh_(X_LD.clone(), torch.tensor([2.0, 0.5])).tolist() == [[2, 4, 6], [2, 2.5, 3]]


def test_combine_by_hand(all_ops: Any) -> None:
    rows_VK = torch.tensor([[0, 1], [NO_ROW, 1], [NO_ROW, NO_ROW]])
    weights_R = torch.tensor([2.0, 0.5])
    assert all_ops.combine(X_LD.clone(), rows_VK, weights_R).tolist() == [[4, 6.5, 9], [2, 2.5, 3], [0, 0, 0]]
    assert all_ops.combine(X_LD, rows_VK, None).tolist() == [[5, 7, 9], [4, 5, 6], [0, 0, 0]]


def test_combine_adds_in_the_order_of_choice_and_rounds_once(ops: Any) -> None:
    """In float32, 1e8 + 1 - 1e8 is 0 and 1e8 - 1e8 + 1 is 1. In bfloat16, 256 + 1 + 1 is 258: 256 + 1 alone is 256."""
    y_RD = torch.tensor([[1e8], [1.0], [-1e8]])
    assert ops.combine(y_RD, torch.tensor([[0, 1, 2], [0, 2, 1]]), None).tolist() == [[0], [1]]
    y_RD = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    assert ops.combine(y_RD, torch.tensor([[0, 1, 1]]), None).tolist() == [[258]]


def test_what_no_row_stands_for_is_never_added(all_ops: Any) -> None:
    y_RD = torch.full((3, 5), math.nan)
    rows_VK = torch.full((4, 8), NO_ROW)
    assert all_ops.combine(y_RD, rows_VK, torch.full((3,), math.nan)).tolist() == [[0] * 5] * 4
    assert all_ops.gather(y_RD, rows_VK[0]).tolist() == [[0] * 5] * 8


SPECIAL = (0.0, 7.0, -7.0, 7.5, -7.5, 30.0, -30.0, 1e-3, -0.7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_equal_autograd(all_ops: Any, activation: str) -> None:
    """At every pair of values where something bends or saturates. The oracle is autograd through ffn.ACTIVATIONS."""
    pairs = torch.tensor([(gate, up) for gate in SPECIAL for up in SPECIAL], dtype=torch.float64)
    h_RF2 = pairs.T.reshape(2, 9, 9).transpose(0, 1).reshape(9, 18) if activation in GATED else pairs
    h_RF2 = h_RF2.clone().requires_grad_()
    a_RF = ACTIVATIONS[activation](h_RF2)
    g_RF = torch.linspace(-1, 2, a_RF.numel(), dtype=torch.float64).view_as(a_RF)
    (dh_RF2,) = torch.autograd.grad(a_RF, h_RF2, g_RF)
    h_RF2, a_RF = h_RF2.detach(), a_RF.detach()
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(all_ops.activate(h_RF2, activation), a_RF)
    dot_of_ones_R, weights_R = (g_RF * a_RF).sum(1), torch.linspace(-1, 1, len(g_RF), dtype=torch.float64)
    again_RF, gradient_RF2, dot_R = all_ops.activate_backward(h_RF2, g_RF.clone(), weights_R, activation)
    close(again_RF, a_RF * weights_R[:, None])
    close(all_ops.activate(h_RF2, activation, weights_R), a_RF * weights_R[:, None])
    close(gradient_RF2, dh_RF2 * weights_R[:, None])
    close(dot_R, dot_of_ones_R)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_one(all_ops: Any, activation: str) -> None:
    h_RF2 = torch.full((1, w_in_columns(activation, 1)), math.nan)
    assert all_ops.activate(h_RF2, activation).isnan().all()


def empty_calls() -> dict[str, tuple[Any, ...]]:
    """Calls without rows, and without columns."""
    x, none, no_columns = torch.zeros(3, 4), rows(), torch.zeros(3, 0)
    return {
        "gather": (x, none),
        "gather ": (no_columns, rows(0, 1)),
        "row_dots": (torch.zeros(0, 4), torch.zeros(0, 4), torch.float32),
        "row_dots ": (no_columns, no_columns, torch.float32),
        "activate": (torch.zeros(0, 4), "swiglu"),
        "activate_backward": (torch.zeros(0, 4), torch.zeros(0, 2), torch.zeros(0), "swiglu"),
        "activate_backward ": (no_columns, no_columns, torch.zeros(3), "swiglu"),
        "combine": (x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(3)),
    }


@pytest.mark.parametrize("call", empty_calls())
def test_empty_results_launch_nothing(in_interpreter: Callable[..., Any], call: str) -> None:
    args = empty_calls()[call]
    found = in_interpreter(run_triton_without_kernels, call.strip(), *args)
    assert_same(found, getattr(torch_ops, call.strip())(*args), exact=True)


def test_nothing_to_read_from(all_ops: Any) -> None:
    """No rows at all, or no choices: zeros."""
    assert all_ops.gather(torch.zeros(0, 3), rows(NO_ROW, NO_ROW)).tolist() == [[0] * 3] * 2
    assert all_ops.combine(torch.zeros(0, 3), torch.full((2, 2), NO_ROW), torch.ones(0)).tolist() == [[0] * 3] * 2
    assert all_ops.combine(torch.ones(2, 3), torch.zeros(2, 0, dtype=torch.int64), None).tolist() == [[0] * 3] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Triton against torch: any shape, any dtype


def assert_same(found: Any, expected: Any, exact: bool) -> None:
    """exact: bit for bit. Else within some roundings, of sums too, whose terms may cancel."""
    tolerances = {torch.bfloat16: (2**-7, 1e-5), torch.float32: (1e-5, 1e-4), torch.float64: (1e-12, 1e-12)}
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert one.dtype == other.dtype
        rtol, atol = (0.0, 0.0) if exact else tolerances.get(one.dtype, (0.0, 0.0))
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)


def calls_of(
    shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int
) -> list[tuple[str, tuple[Any, ...], bool]]:
    """(function, arguments, whether results are equal bit for bit) of all functions. shape: L, R, D, K."""
    num_sources, num_rows, width, num_choices = shape
    generator = torch.Generator().manual_seed(seed)
    x_LD = torch.randn(num_sources, width, generator=generator, dtype=torch.float64).to(dtype)
    row_R = torch.randint(NO_ROW, num_sources, (num_rows,), generator=generator)
    rows_VK = torch.randint(NO_ROW, num_sources, (num_rows, num_choices), generator=generator)
    wide = torch_ops.wide_dtype(dtype)
    weights_R = torch.rand(num_rows, generator=generator, dtype=wide)
    weights_L = torch.rand(num_sources, generator=generator, dtype=wide)
    calls = [
        ("gather", (x_LD, row_R), True),
        ("weigh_", (x_LD.clone(), weights_L), True),
        ("row_dots", (x_LD, x_LD.flip(0), wide), False),
        ("combine", (x_LD, rows_VK, weights_L), True),
        ("combine", (x_LD, rows_VK, None), True),
    ]
    for activation in ACTIVATIONS:
        h_RF2 = 4 * torch.randn(num_rows, w_in_columns(activation, width), generator=generator, dtype=torch.float64)
        g_RF = torch.randn(num_rows, width, generator=generator, dtype=torch.float64).to(dtype)
        calls.append(("activate", (h_RF2.to(dtype), activation), False))
        calls.append(("activate", (h_RF2.to(dtype), activation, weights_R), False))
        calls.append(("activate_backward", (h_RF2.to(dtype), g_RF, weights_R, activation), False))
    return calls


def copies(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Some functions write over what they are given."""
    return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)


@CASES
@given(
    shape=st.tuples(
        st.integers(0, 5), st.integers(0, 6), st.sampled_from([1, 3, 16, 33, 130, 257]), st.sampled_from([1, 2, 3, 8])
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_triton_equals_torch(
    interpreted: SimpleNamespace, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int
) -> None:
    for name, args, exact in calls_of(shape, dtype, seed):
        assert_same(getattr(interpreted, name)(*copies(args)), getattr(torch_ops, name)(*args), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 13, 1500, 5), (300, 270, 20, 2)], ids=["wide", "long"])
def test_triton_equals_torch_over_many_programs(
    interpreted: SimpleNamespace, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """More columns than a tile has, and more rows, neither a multiple of a tile's."""
    for name, args, exact in calls_of(shape, dtype, 0):
        assert_same(getattr(interpreted, name)(*copies(args)), getattr(torch_ops, name)(*args), exact)


def test_inputs_need_not_be_contiguous(interpreted: SimpleNamespace) -> None:
    x_LD, rows_VK = torch.randn(6, 5).T, torch.tensor([[0, 4, 1], [2, NO_ROW, 3]]).T
    weights_L = torch.rand(5, 2)[:, 0]
    assert_same(interpreted.gather(x_LD, rows_VK[:, 0]), torch_ops.gather(x_LD, rows_VK[:, 0]), exact=True)
    found = interpreted.combine(x_LD, rows_VK, weights_L)
    assert_same(found, torch_ops.combine(x_LD, rows_VK, weights_L), exact=True)
    h_RF2 = torch.randn(4, 6).T
    assert_same(interpreted.activate(h_RF2, "swiglu"), torch_ops.activate(h_RF2, "swiglu"), exact=False)


def test_offsets_beyond_int32(in_interpreter: Callable[..., Any]) -> None:
    """Row 2^21 of 1024 columns begins at 2^31. Memory that nobody writes takes no space. Row numbers of int32 too."""
    assert in_interpreter(read_far_row) == [[7.0] * 1024, [0.0] * 1024]


def read_far_row() -> list[list[float]]:
    x_LD = torch.empty(2**21 + 1, 1024, dtype=torch.bfloat16)
    x_LD[2**21] = 7
    near, far = run_triton("gather", x_LD, torch.tensor([2**21, NO_ROW], dtype=torch.int32)).tolist()
    combined = run_triton("combine", x_LD, torch.tensor([[2**21], [NO_ROW]]), None)
    assert combined.tolist() == [near, far]
    return [near, far]


# ---------------------------------------------------------------------------------------------------------------------
# a whole layer, forward and backward by the formulas


def experts_of_layer(
    ops: Any,
    x_TD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    activation: str,
    g_TD: Tensor,
) -> tuple[Tensor, ...]:
    """(y, and the gradients of x, w_in, w_out, weights) from g, y's gradient."""
    order_R = ids_TK.flatten().argsort(stable=True)
    row_R, rows_TK = order_R // ids_TK.shape[1], order_R.argsort().view_as(ids_TK)
    weights_R = weights_TK.flatten()[order_R]
    counts = torch.bincount(ids_TK.flatten(), minlength=len(w_in)).tolist()

    def multiply(rows: Tensor, matrices: Tensor) -> Tensor:
        return torch.cat([block @ matrix for block, matrix in zip(rows.split(counts), matrices, strict=True)])

    def outer(left: Tensor, right: Tensor) -> Tensor:
        return torch.stack([a.T @ b for a, b in zip(left.split(counts), right.split(counts), strict=True)])

    h_RF2 = multiply(ops.gather(x_TD, row_R), w_in)
    y_TD = ops.combine(multiply(ops.activate(h_RF2, activation), w_out), rows_TK, weights_R)

    g_RD = ops.gather(g_TD, row_R)
    a_RF, dh_RF2, dot_R = ops.activate_backward(h_RF2, multiply(g_RD, w_out.mT), weights_R, activation)
    dx_TD = ops.combine(multiply(dh_RF2, w_in.mT), rows_TK, None)
    return y_TD, dx_TD, outer(ops.gather(x_TD, row_R), dh_RF2), outer(a_RF, g_RD), dot_R[rows_TK]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_equals_the_reference(all_ops: Any, activation: str) -> None:
    """9 tokens, 4 experts of which one gets no token, top-2 with weights from a softmax; values and all gradients."""
    config = MoEConfig.model_validate(
        {
            "d_model": 5,
            "num_experts": 4,
            "router": {"k": 2, "normalise": False},
            "losses": [],
            "experts": {"hidden": 3, "activation": activation},
            "dispatcher": {"kind": "local"},
        }
    )
    torch.manual_seed(0)
    shapes = {"w_in": (5, w_in_columns(activation, 3)), "w_out": (3, 5)}
    shapes = {"router.weight": (4, 5)} | {
        f"experts.{e}.{name}": shape for e in range(4) for name, shape in shapes.items()
    }
    parameters = {name: torch.randn(shape, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}
    x_TD = torch.randn(9, 5, dtype=torch.float64)
    x_TD[:, 0] = 3.0
    with torch.no_grad():
        parameters["router.weight"][3, 0] = -50.0  # nobody chooses expert 3
    x_TD.requires_grad_()
    g_TD = torch.randn(9, 5, dtype=torch.float64)
    reference = reference_layer(config, parameters, [x_TD[None]])
    assert reference.kept_E[3] == 0
    leaves = [x_TD, *parameters.values()]
    expected = torch.autograd.grad(reference.y[0][0], leaves, g_TD, allow_unused=True)

    weights_TK = (x_TD @ parameters["router.weight"].T).softmax(-1).gather(1, reference.expert_ids[0])
    w_in, w_out = (torch.stack([parameters[f"experts.{e}.{name}"] for e in range(4)]) for name in ("w_in", "w_out"))
    values = (x_TD, w_in, w_out, reference.expert_ids[0], weights_TK)
    y_TD, dx_TD, *grads = experts_of_layer(all_ops, *(value.detach() for value in values), activation, g_TD)
    found = torch.autograd.grad((w_in, w_out, weights_TK), leaves, grads, allow_unused=True)

    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)
    close(y_TD, reference.y[0][0].detach())
    for leaf, one, other in zip(leaves, found, expected, strict=True):
        one = torch.zeros_like(leaf) if one is None else one
        close(one + dx_TD if leaf is x_TD else one, torch.zeros_like(leaf) if other is None else other)


# ---------------------------------------------------------------------------------------------------------------------
# the import point


def test_each_device_gets_its_own() -> None:
    assert ops_for(torch.zeros(1)) is cpu_ops
    assert ops_for(torch.zeros(1, device="meta")) is torch_ops


def test_without_triton_everybody_gets_torch_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A None in sys.modules is an import that fails. A tensor on a GPU is played by something that says so."""
    monkeypatch.setitem(sys.modules, "triton", None)
    assert ops_for(SimpleNamespace(is_cuda=True)) is torch_ops  # type: ignore[arg-type]
    assert ops_for(torch.zeros(1), interpreted=True) is torch_ops


def test_the_kernels_are_not_imported_for_the_cpu() -> None:
    for call in worker("0"):
        assert not call(imports_kernels)


def imports_kernels() -> bool:
    import expert_parallel.moe.layer  # noqa: F401

    ops_for(torch.zeros(1))
    return "expert_parallel.moe.experts.kernels.triton_kernels" in sys.modules


def test_both_have_the_same_functions(in_interpreter: Callable[..., Any]) -> None:
    assert in_interpreter(signatures_of_triton_ops) == {name: signature(torch_ops, name) for name in NAMES}


def signature(ops: Any, name: str) -> str:
    return str(inspect.signature(getattr(ops, name)))


def signatures_of_triton_ops() -> dict[str, str]:
    ops = ops_for(torch.zeros(1), interpreted=True)
    return {name: signature(ops, name) for name in NAMES}


# ---------------------------------------------------------------------------------------------------------------------
# for GPUs: compiled without one, and run where one is


def test_kernels_compile_for_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code with 16-byte reads and writes, in bfloat16. No GPU is needed for this."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for call in worker("0"):
        compiled = call(compile_kernels, 90)
    assert len(compiled) == 3 * len(ACTIVATIONS) + 4
    for name, ptx in compiled:
        assert "ld.global.v4" in ptx, name
        assert "st.global.v4" in ptx or name == "row_dots", name  # it writes one number a row


def compile_kernels(capability: int) -> list[tuple[str, str]]:
    """(name, PTX) of every kernel, launched with the arguments that triton_ops gives it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, tuple[Any, ...]]] = []
    with mock.patch.object(JITFunction, "run", lambda kernel, *args, **options: launches.append((kernel, args))):
        for name, args, _ in calls_of((16, 16, 256, 2), torch.bfloat16, 0):
            run_triton(name, *args)
    pointers = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
    compiled = []
    for kernel, args in launches:
        named = dict(zip(kernel.arg_names, args, strict=True))
        constants = {p.name: named[p.name] for p in kernel.params if p.is_constexpr}
        types = {n: pointers[a.dtype] if isinstance(a, Tensor) else "i32" for n, a in named.items()}
        types |= dict.fromkeys(constants, "constexpr")
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, (n, a) in enumerate(named.items())
            if n not in constants and (isinstance(a, Tensor) or a % 16 == 0)
        }
        source = ASTSource(kernel, types, constants, aligned)
        compiled.append((kernel.__name__, triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]))
    return compiled


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 0, 8, 2), (5, 1, 1, 1), (7, 13, 1500, 5), (300, 270, 20, 2), (512, 999, 256, 8)])
def test_triton_equals_torch_on_a_gpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Not bit for bit: a GPU may fuse a product and a sum, and torch divides by a scalar in its own way."""
    for name, args, _ in calls_of(shape, dtype, 0):
        args = tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)
        ops = ops_for(args[0])
        assert ops.__name__ == "expert_parallel.moe.experts.kernels.triton_ops"
        found, expected = getattr(ops, name)(*copies(args)), getattr(torch_ops, name)(*args)
        assert_same(found, expected, exact=False)


@pytest.mark.cuda
def test_rows_beyond_int32_on_a_gpu() -> None:
    x_LD = torch.zeros(2**21 + 1, 1024, dtype=torch.bfloat16, device="cuda")
    x_LD[-1] = 7
    row_R = torch.arange(2**21, -1, -1, device="cuda")
    gathered = ops_for(x_LD).gather(x_LD, row_R)
    assert (gathered[0] == 7).all()
    assert not gathered[1:].any()
    assert (ops_for(x_LD).combine(gathered, row_R[:, None], None)[-1] == 7).all()


@pytest.mark.cuda
def test_a_cuda_graph_holds_all_of_them() -> None:
    """Captured once, replayed on other values: nothing asks the GPU for a number."""
    calls = [
        (n, [a.cuda() if isinstance(a, Tensor) else a for a in args])
        for n, args, _ in calls_of((64, 96, 128, 2), torch.bfloat16, 0)
    ]
    for name, args in calls:  # compiles
        getattr(ops_for(args[0]), name)(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [getattr(ops_for(args[0]), name)(*args) for name, args in calls]
    for _, args in calls:
        if args[0].is_floating_point():
            args[0].mul_(0.5)
    expected = [getattr(ops_for(args[0]), name)(*copies(tuple(args))) for name, args in calls]
    graph.replay()
    for found, wanted in zip(results, expected, strict=True):
        assert_same(found, wanted, exact=True)
