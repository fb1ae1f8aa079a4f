"""The grouped experts: every backend and activation against one expert at a time, values and gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from expert_parallel.moe.experts import grouped as experts_module
from expert_parallel.moe.experts.grouped import ExpertsConfig, GroupedExperts, choose_backend
from expert_parallel.moe.experts.grouped_gemm import CALL_FLOPS, GROUPED_GEMMS, expert_spans, pad_group_sizes
from expert_parallel.moe.parameters import init_parameters, logical_parameters
from expert_parallel.moe.types import DispatchedTokens
from expert_parallel.nn.ffn import FFN, FFNConfig

D_MODEL, HIDDEN = 8, 16  # rows of 16 bytes and more in float32 and in bfloat16: what grouped_mm asks for
COUNTS = {
    "all": [3, 1, 2, 4],
    "none at the start": [0, 0, 5, 2],
    "none in the middle": [3, 0, 0, 1],
    "none at the end": [2, 4, 0, 0],
    "one expert": [0, 6, 0, 0],
    "no rows": [0, 0, 0, 0],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_experts(num_experts: int = 4, dtype: torch.dtype = torch.float64, **options: object) -> GroupedExperts:
    config = ExpertsConfig(**{"hidden": HIDDEN, "backend": "loop", **options})
    experts = GroupedExperts(config, D_MODEL, tuple(range(num_experts)))
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.5
    return experts


def make_rows(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(x_RD, counts_e, weights_R); weights in router dtype."""
    generator = torch.Generator().manual_seed(2)
    x_RD = torch.randn(sum(counts), D_MODEL, generator=generator, dtype=torch.float64).to(dtype)
    weights_R = torch.rand(sum(counts), generator=generator, dtype=torch.float64)
    return x_RD, torch.tensor(counts), weights_R.to(torch.promote_types(torch.float32, dtype))


def run(experts: GroupedExperts, x_RD: Tensor, counts_e: Tensor, weights_R: Tensor, seed: int = 0) -> Tensor:
    return experts(DispatchedTokens.from_grouped_rows(x_RD, counts_e, weights_R), dropout_seed=seed)


# Written from the papers: Nair and Hinton 2010; Hendrycks and Gimpel 2016 (with erf); Shazeer 2020.
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda h: h * (h > 0),
    "gelu": lambda h: h * (1 + torch.erf(h / math.sqrt(2))) / 2,
    "swiglu": lambda h: h[:HIDDEN] / (1 + torch.exp(-h[:HIDDEN])) * h[HIDDEN:],
    "geglu": lambda h: h[:HIDDEN] * (1 + torch.erf(h[:HIDDEN] / math.sqrt(2))) / 2 * h[HIDDEN:],
}


def one_at_a_time(experts: GroupedExperts, x_RD: Tensor, counts: list[int], weights_R: Tensor) -> Tensor:
    """weight * (activation(x W_in + b_in) W_out + b_out), row by row."""
    experts_R = [expert for expert, count in enumerate(counts) for _ in range(count)]
    outputs = []
    for x, expert, weight in zip(x_RD, experts_R, weights_R, strict=True):
        h = x @ experts.w_in[expert]
        h = h if experts.b_in is None else h + experts.b_in[expert]
        y = FORMULAS[experts.config.activation](h) @ experts.w_out[expert]
        y = y if experts.b_out is None else y + experts.b_out[expert]
        outputs.append(weight * y)
    return torch.stack(outputs) if outputs else x_RD


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu", "geglu"])
def test_every_activation_is_its_formula(activation: str, bias: bool) -> None:
    """Outputs, and gradients of rows, weights and every parameter."""
    counts = [3, 0, 2, 1]
    x_RD, counts_e, weights_R = make_rows(counts)
    inputs = (x_RD.requires_grad_(), weights_R.requires_grad_())
    experts = make_experts(activation=activation, bias=bias)
    parameters = list(experts.parameters())
    y_RD = run(experts, x_RD, counts_e, weights_R)
    expected_RD = one_at_a_time(experts, x_RD, counts, weights_R)
    torch.testing.assert_close(y_RD, expected_RD, rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(-1, 1, y_RD.numel(), dtype=torch.float64).view(y_RD.shape)
    actual = torch.autograd.grad(y_RD, [*inputs, *parameters], upstream)
    expected = torch.autograd.grad(expected_RD, [*inputs, *parameters], upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu", "geglu"])
def test_one_expert_is_the_dense_network(activation: str, bias: bool) -> None:
    """FFN and GroupedExperts keep their matrices differently, and compute the same."""
    config = FFNConfig(hidden=HIDDEN, activation=activation, bias=bias)
    dense, experts = FFN(config, D_MODEL).double(), make_experts(1, activation=activation, bias=bias)
    dense.w_in.weight.data, dense.w_out.weight.data = experts.w_in.data[0].T, experts.w_out.data[0].T
    if experts.b_in is not None and experts.b_out is not None:
        dense.w_in.bias.data, dense.w_out.bias.data = experts.b_in.data[0], experts.b_out.data[0]
    x_RD, counts_e, weights_R = make_rows([5])
    torch.testing.assert_close(
        run(experts, x_RD, counts_e, torch.ones_like(weights_R)), dense(x_RD), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_products_equal_the_loop_in_float64(counts: list[int], dtype: torch.dtype) -> None:
    """The loop in float32 and bfloat16, too. Trap 20: zero-size groups have broken such products."""
    results = {}
    for backend, compute_dtype in [("loop", torch.float64), *((backend, dtype) for backend in GROUPED_GEMMS)]:
        experts = make_experts(dtype=dtype, bias=True, backend=backend).to(compute_dtype)
        x_RD, counts_e, weights_R = make_rows(counts, dtype)
        x_RD = x_RD.to(compute_dtype).requires_grad_()
        y_RD = run(experts, x_RD, counts_e, weights_R.to(torch.promote_types(torch.float32, compute_dtype)))
        assert y_RD.shape == x_RD.shape
        assert y_RD.dtype == compute_dtype
        y_RD.float().square().sum().backward()
        assert all(parameter.grad is not None for parameter in experts.parameters())
        gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
        results[backend, compute_dtype] = {"y": y_RD.detach(), "x": x_RD.grad, **gradients}
    exact = results["loop", torch.float64]
    for backend in GROUPED_GEMMS:
        for name, value in results[backend, dtype].items():
            wanted = exact[name]
            assert value is not None
            assert wanted is not None
            scale = float(wanted.abs().max()) if wanted.numel() else 0.0
            error = (value.double() - wanted).abs()
            assert bool((error <= TOLERANCE[dtype] * scale).all()), (backend, name, float(error.max()), scale)


@pytest.mark.parametrize("backend", GROUPED_GEMMS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_an_expert_without_tokens_has_a_zero_gradient(backend: str, counts: list[int]) -> None:
    """Trap 6: never None, or weight decay would skip it; and never what an unwritten buffer holds (trap 20)."""
    experts = make_experts(dtype=torch.float32, bias=True, backend=backend)
    run(experts, *make_rows(counts, torch.float32)).sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        for expert, count in enumerate(counts):
            assert bool((parameter.grad[expert] == 0).all()) is (count == 0), (name, expert)


@pytest.mark.parametrize("backend", GROUPED_GEMMS)
def test_rows_of_one_expert_do_not_depend_on_the_others(backend: str) -> None:
    """Each row carries its expert's number through an expert that scales by its own: a shifted offset is seen."""
    experts = make_experts(num_experts=4, dtype=torch.float32, activation="relu", backend=backend)
    for expert in range(4):
        experts.w_in.data[expert] = torch.eye(D_MODEL, HIDDEN)
        experts.w_out.data[expert] = torch.eye(HIDDEN, D_MODEL) * 10**expert
    counts = [2, 0, 3, 1]
    y_RD = run(experts, torch.ones(6, D_MODEL), torch.tensor(counts), torch.ones(6))
    assert y_RD[:, 0].tolist() == [1.0, 1.0, 100.0, 100.0, 100.0, 1000.0]


def test_weights_are_applied_in_their_own_dtype_and_rounded_once() -> None:
    """A bfloat16 output times a float32 weight: not first rounded to a bfloat16 weight."""
    experts = make_experts(num_experts=1, dtype=torch.bfloat16, activation="relu")
    x_RD, counts_e, weights_R = make_rows([200], torch.bfloat16)
    plain = run(experts, x_RD, counts_e, torch.ones(200))
    weighted = run(experts, x_RD, counts_e, weights_R)
    assert torch.equal(weighted, (plain.float() * weights_R[:, None]).bfloat16())
    assert not torch.equal(weighted, plain * weights_R.bfloat16()[:, None])


def test_float32_weights_serve_a_bfloat16_input() -> None:
    experts = make_experts(dtype=torch.float32)
    x_RD, counts_e, weights_R = make_rows([2, 3, 0, 1], torch.bfloat16)
    y_RD = run(experts, x_RD, counts_e, weights_R)
    assert y_RD.dtype == torch.bfloat16
    y_RD.float().sum().backward()
    assert experts.w_in.grad is not None
    assert experts.w_in.grad.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# The rule of `auto`


@pytest.mark.parametrize(
    ("dtype", "device", "sizes", "backend"),
    [
        (torch.float32, "cpu", (8, 32, 16), "grouped_mm"),
        (torch.bfloat16, "cpu", (8, 32, 16), "bmm"),
        (torch.float64, "cpu", (8, 32, 16), "loop"),
        (torch.float16, "cpu", (8, 32, 16), "loop"),
        (torch.float32, "cpu", (8, 32, 6), "loop"),  # 24 bytes
        (torch.bfloat16, "cpu", (4, 32, 16), "bmm"),  # 8 bytes
        (torch.bfloat16, "cuda", (8, 32, 16), "grouped_mm"),
        (torch.float32, "cuda", (8, 32, 16), "loop"),
    ],
)
def test_choose_backend(
    dtype: torch.dtype, device: str, sizes: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_module, "has_bfloat16_gemm", lambda: True)
    assert choose_backend(ExpertsConfig(hidden=HIDDEN), dtype, torch.device(device), sizes) == backend


@pytest.mark.parametrize(("sizes", "backend"), [((8, 32, 16), "grouped_mm"), ((4, 32, 16), "loop")])
def test_where_bfloat16_is_multiplied_in_float32(
    sizes: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_module, "has_bfloat16_gemm", lambda: False)
    assert choose_backend(ExpertsConfig(hidden=HIDDEN), torch.bfloat16, torch.device("cpu"), sizes) == backend


# ---------------------------------------------------------------------------------------------------------------------
# Runs of experts with equally many rows


def test_neighbours_run_where_the_zeros_cost_less_than_a_product() -> None:
    """A product costs as much as 10 rows here. 5 joins 8 for 3 zeros, 9 costs 1 + 1 more; 30 would cost 63, and is
    alone; 27 joins it for 3. Who has no rows gets none, though 2 would be cheap; 8 beside 2 would be, too, but
    6 of 16 rows are too many zeros."""
    counts_e, size = torch.tensor([8, 5, 9, 30, 27, 0, 0, 2, 8]), int(CALL_FLOPS / 2 / 10)
    assert pad_group_sizes(counts_e, size).tolist() == [9, 9, 9, 30, 30, 0, 0, 2, 8]
    assert expert_spans(pad_group_sizes(counts_e, size)) == [(3, 9), (2, 30), (2, 0), (1, 2), (1, 8)]
    assert pad_group_sizes(counts_e, 10**9).tolist() == counts_e.tolist()
    assert expert_spans(counts_e) == [(1, 8), (1, 5), (1, 9), (1, 30), (1, 27), (2, 0), (1, 2), (1, 8)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=12), st.integers(0, 60))
def test_zeros_are_bounded(counts: list[int], affordable: int) -> None:
    """By half of the rows, and by what each join may cost. Nobody loses a row."""
    evened = pad_group_sizes(
        torch.tensor(counts, dtype=torch.int64), int(CALL_FLOPS / 2 / max(affordable, 0.01))
    ).tolist()
    assert len(evened) == len(counts)
    assert all(more >= count and bool(more) == bool(count) for more, count in zip(evened, counts, strict=True))
    joins, zeros = len(counts) - len(expert_spans(torch.tensor(evened))), sum(evened) - sum(counts)
    assert 2 * zeros <= sum(counts)
    assert zeros <= affordable * joins + 1e-3 * len(counts)


def test_neighbours_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six products, forward and backward, for each run of experts: here all four are one."""
    experts, (x_RD, counts_e, weights_R) = make_experts(backend="bmm"), make_rows([5, 4, 5, 5])
    bmm, calls = torch.bmm, list[tuple[int, ...]]()

    def noted(x: Tensor, y: Tensor, **options: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return bmm(x, y, **options)

    monkeypatch.setattr(torch, "bmm", noted)
    run(experts, x_RD.requires_grad_(), counts_e, weights_R).sum().backward()
    assert [shape[0] for shape in calls] == 6 * [4]
    assert {shape[1:] for shape in calls} == {(5, D_MODEL), (5, HIDDEN), (5, 2 * HIDDEN), (D_MODEL, 5), (HIDDEN, 5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_takes_the_smallest_sizes_that_the_rule_allows(dtype: torch.dtype) -> None:
    smallest = 16 // dtype.itemsize
    x_RK, weight_eKN = torch.ones(3, smallest, dtype=dtype), torch.ones(2, smallest, smallest, dtype=dtype)
    product = F.grouped_mm(x_RK, weight_eKN, offs=torch.tensor([1, 3], dtype=torch.int32))
    assert product.tolist() == [[smallest] * smallest] * 3


@pytest.mark.parametrize(("hidden", "dtype"), [(HIDDEN, torch.float64), (6, torch.float32), (6, torch.bfloat16)])
def test_auto_computes_what_grouped_mm_cannot(hidden: int, dtype: torch.dtype) -> None:
    auto, loop = (make_experts(dtype=dtype, hidden=hidden, backend=backend) for backend in ("auto", "loop"))
    rows = make_rows([2, 0, 1, 3], dtype)
    assert torch.equal(run(auto, *rows), run(loop, *rows))


@pytest.mark.parametrize(("hidden", "dtype"), [(HIDDEN, torch.float64), (6, torch.float32), (4, torch.bfloat16)])
def test_grouped_mm_by_name_fails_where_it_cannot_work(hidden: int, dtype: torch.dtype) -> None:
    """Never a wrong number. The run's config refuses it at start, by name; a layer alone has torch's own words."""
    grouped = make_experts(dtype=dtype, hidden=hidden, backend="grouped_mm")
    with pytest.raises((ValueError, RuntimeError)):
        run(grouped, *make_rows([2, 0, 1, 3], dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Dropout


def test_hidden_dropout_is_after_the_activation_and_output_dropout_at_the_end() -> None:
    """With ReLU and unit matrices a row is its input: a dropped entry is 0, a kept one is doubled."""
    for name in ("hidden_dropout", "output_dropout"):
        experts = make_experts(num_experts=1, activation="relu", **{"hidden": D_MODEL, name: 0.5})
        experts.w_in.data[0] = experts.w_out.data[0] = torch.eye(D_MODEL, dtype=torch.float64)
        y_RD = run(experts, torch.ones(300, D_MODEL, dtype=torch.float64), torch.tensor([300]), torch.ones(300), 7)
        assert set(y_RD.flatten().tolist()) == {0.0, 2.0}
        assert abs(float(y_RD.detach().mean()) - 1.0) < 0.1


def test_the_two_dropouts_have_masks_of_their_own() -> None:
    both = make_experts(num_experts=1, activation="relu", hidden=D_MODEL, hidden_dropout=0.5, output_dropout=0.5)
    both.w_in.data[0] = both.w_out.data[0] = torch.eye(D_MODEL, dtype=torch.float64)
    y_RD = run(both, torch.ones(300, D_MODEL, dtype=torch.float64), torch.tensor([300]), torch.ones(300), 7)
    assert abs(float((y_RD != 0).double().mean()) - 0.25) < 0.05  # 0.5 if the masks were one


def test_dropout_is_a_function_of_its_seed_and_off_in_evaluation() -> None:
    rows = make_rows([2, 3, 0, 1])
    experts, plain = make_experts(hidden_dropout=0.3, output_dropout=0.3), make_experts()
    assert torch.equal(run(experts, *rows, 5), run(experts, *rows, 5))
    assert not torch.equal(run(experts, *rows, 5), run(experts, *rows, 6))
    assert torch.equal(run(experts.eval(), *rows, 5), run(plain, *rows))


# ---------------------------------------------------------------------------------------------------------------------
# Names and initial weights


def test_initial_weights_do_not_depend_on_which_experts_are_local() -> None:
    """Six experts in one place, and spread unevenly over three."""

    def initial(expert_ids: tuple[int, ...]) -> dict[str, Tensor]:
        experts = GroupedExperts(ExpertsConfig(hidden=HIDDEN, bias=True), D_MODEL, expert_ids)
        init_parameters(experts, seed=3, std=lambda name: 0.02, prefix="experts.")
        logical = {}
        for parameter in logical_parameters(experts, prefix="experts."):
            logical.update(parameter.whole(parameter.parameter.data))
        return logical

    whole = initial((0, 1, 2, 3, 4, 5))
    assert len(whole) == 6 * 4
    parts = initial((4,)) | initial((0, 3, 5)) | initial((1, 2))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert not torch.equal(whole["experts.0.w_in"], whole["experts.1.w_in"])
    assert float(whole["experts.0.w_in"].std()) == pytest.approx(0.02, rel=0.15)
    assert not whole["experts.0.b_in"].any()


@pytest.mark.parametrize(
    "wrong", [{"hidden": 0}, {"activation": "silu"}, {"hidden_dropout": 1.0}, {"backend": "triton"}]
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ExpertsConfig(**{"hidden": HIDDEN, **wrong})
