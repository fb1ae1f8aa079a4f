"""The experts as one operation with a backward pass of its own, against one row at a time."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_parallel.moe.dispatch.permute import NO_ROW, gather_rows, inverse_permutation
from expert_parallel.moe.experts import grouped_gemm
from expert_parallel.moe.experts.fused import fused_experts
from expert_parallel.moe.experts.grouped import ExpertsConfig, GroupedExperts
from expert_parallel.moe.experts.grouped_gemm import GROUPED_GEMMS
from expert_parallel.moe.types import DispatchedTokens
from expert_parallel.nn.ffn import ACTIVATIONS

D_MODEL, HIDDEN, NUM_EXPERTS = 16, 24, 4


def make_tokens(choices: list[list[int]], dtype: torch.dtype = torch.float64) -> DispatchedTokens:
    """Row v is needed by the experts choices[v], in that order. Sorted here with Python's own sort."""
    flat = [(expert, row) for row, experts in enumerate(choices) for expert in experts]
    order = sorted(range(len(flat)), key=lambda n: flat[n][0])
    place = {n: r for r, n in enumerate(order)}
    width = max(map(len, choices), default=0)
    table, number = [], 0
    for experts in choices:
        places = [place[number + j] for j in range(len(experts))]
        table.append(places + [NO_ROW] * (width - len(places)))
        number += len(experts)
    generator = torch.Generator().manual_seed(len(flat))
    return DispatchedTokens(
        x_VD=torch.randn(len(choices), D_MODEL, generator=generator, dtype=torch.float64).to(dtype),
        row_R=torch.tensor([flat[n][1] for n in order], dtype=torch.int64),
        computed_VK=torch.tensor(table, dtype=torch.int64).view(len(choices), width),
        counts_e=torch.tensor([sum(flat[n][0] == e for n in order) for e in range(NUM_EXPERTS)]),
        weights_R=torch.rand(len(flat), generator=generator, dtype=torch.float64).to(
            torch.promote_types(torch.float32, dtype)
        ),
    )


def make_experts(
    activation: str,
    dtype: torch.dtype = torch.float64,
    backend: str = "loop",
    hidden: int = HIDDEN,
    weight_input: bool = False,
) -> GroupedExperts:
    config = ExpertsConfig(hidden=hidden, activation=activation, backend=backend, weight_input=weight_input)  # type: ignore[arg-type]
    experts = GroupedExperts(config, D_MODEL, tuple(range(NUM_EXPERTS)))
    for number, parameter in enumerate(experts.parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) / 2
    return experts


def plainly(experts: GroupedExperts, tokens: DispatchedTokens) -> Tensor:
    """One row at a time: nothing here is grouped, fused or weighted in another place than the formula's."""
    experts_R = [e for e, count in enumerate(tokens.counts_e.tolist()) for _ in range(count)]

    def expert(e: int, x_D: Tensor) -> Tensor:
        return ACTIVATIONS[experts.config.activation](x_D @ experts.w_in[e]) @ experts.w_out[e]

    weighs_input = experts.config.weight_input
    outputs = [
        expert(e, weight * tokens.x_VD[row]) if weighs_input else weight * expert(e, tokens.x_VD[row])
        for row, e, weight in zip(tokens.row_R.tolist(), experts_R, tokens.weights_R, strict=True)
    ]
    rows = [
        sum((outputs[r] for r in places if r != NO_ROW), 0 * tokens.x_VD[v])
        for v, places in enumerate(tokens.computed_VK.tolist())
    ]
    return torch.stack(rows) if rows else tokens.x_VD


def with_gradients(y_VD: Tensor, tokens: DispatchedTokens, experts: GroupedExperts) -> list[Tensor]:
    upstream = torch.linspace(-1, 1, y_VD.numel(), dtype=torch.float64).view(y_VD.shape).to(y_VD.dtype)
    inputs = [tokens.x_VD, tokens.weights_R, *experts.parameters()]
    return [y_VD.detach(), *torch.autograd.grad(y_VD, inputs, upstream)]


def learning(tokens: DispatchedTokens) -> DispatchedTokens:
    tokens.x_VD.requires_grad_()
    tokens.weights_R.requires_grad_()
    return tokens


CHOICES = {
    "several a row": [[0, 2], [1, 0], [3, 1], [2, 3], [0, 3]],
    "some rows fewer": [[2], [0, 1, 3], [], [1, 2]],
    "an expert without rows": [[0, 1], [1, 0], [3, 0]],
    "one expert": [[2], [2], [2]],
    "all experts": [[3, 1, 0, 2]],
    "no choices": [[], []],
    "no rows": [],
}


@pytest.mark.parametrize("hidden", [HIDDEN, 4], ids=["wide", "narrow"])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_equals_one_row_at_a_time(activation: str, choices: list[list[int]], hidden: int) -> None:
    """Outputs, and the gradients of rows, weights and both matrices, in float64. On the CPU, wide experts keep what
    narrow ones compute again."""
    tokens, experts = learning(make_tokens(choices)), make_experts(activation, hidden=hidden)
    actual = with_gradients(experts(tokens), tokens, experts)
    if not any(choices):
        assert all(not bool(value.any()) for value in actual), "nothing is computed, and every gradient is a zero"
        return
    torch.testing.assert_close(
        actual, with_gradients(plainly(experts, tokens), tokens, experts), rtol=1e-12, atol=1e-12
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_choices(data: st.DataObject) -> None:
    choice = st.lists(st.integers(0, NUM_EXPERTS - 1), max_size=NUM_EXPERTS, unique=True)
    tokens = learning(make_tokens(data.draw(st.lists(choice, min_size=1, max_size=9).filter(any))))
    activation, hidden = data.draw(st.sampled_from(sorted(ACTIVATIONS))), data.draw(st.integers(1, 2 * D_MODEL))
    experts = make_experts(activation, hidden=hidden)
    actual = with_gradients(experts(tokens), tokens, experts)
    torch.testing.assert_close(
        actual, with_gradients(plainly(experts, tokens), tokens, experts), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("backend", ["loop", "bmm"])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_weights_on_the_input_equal_one_row_at_a_time(activation: str, choices: list[list[int]], backend: str) -> None:
    """Of `bmm` with rows of zeros; the gradient of a weight is that of the row before W_in."""
    tokens = learning(make_tokens(choices))
    experts = make_experts(activation, backend=backend, weight_input=True)
    actual = with_gradients(experts(tokens), tokens, experts)
    if not any(choices):
        assert all(not bool(value.any()) for value in actual)
        return
    torch.testing.assert_close(
        actual, with_gradients(plainly(experts, tokens), tokens, experts), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("hidden", [HIDDEN, 4], ids=["wide", "narrow"])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_of_zeros_change_nothing(activation: str, choices: list[list[int]], hidden: int) -> None:
    """Experts that are evened out, in float64, where the first arrived row is not finite and nobody's choice."""
    tokens = make_tokens([[], *choices])
    tokens.x_VD[0] = torch.nan
    learning(tokens)
    results = []
    for backend in ("bmm", "loop"):
        experts = make_experts(activation, backend=backend, hidden=hidden)
        padded = experts.pad_for_backend(tokens, GROUPED_GEMMS[backend])
        if backend == "bmm" and choices is CHOICES["some rows fewer"]:
            assert padded.counts_e.tolist() == [2, 2, 2, 2], "so that there are some"
        results.append(with_gradients(experts(tokens), tokens, experts))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hidden", [HIDDEN, 8])
@pytest.mark.parametrize("backend", GROUPED_GEMMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_in_short_numbers(dtype: torch.dtype, backend: str, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 of the same rounded numbers, on processors that multiply bfloat16 and on those that do not."""
    for multiplies in (True, False):
        monkeypatch.setattr(grouped_gemm, "has_bfloat16_gemm", lambda multiplies=multiplies: multiplies)
        results = []
        for compute in (dtype, torch.float64):
            tokens = make_tokens(CHOICES["several a row"], dtype)
            experts = make_experts("swiglu", dtype, backend, hidden)
            tokens = learning(
                DispatchedTokens(
                    tokens.x_VD.to(compute),
                    tokens.row_R,
                    tokens.computed_VK,
                    tokens.counts_e,
                    tokens.weights_R.to(torch.promote_types(torch.float32, compute)),
                )
            )
            exact = compute == torch.float64
            y_VD = plainly(experts.double(), tokens) if exact else experts(tokens)
            assert y_VD.dtype == compute
            results.append([value.double() for value in with_gradients(y_VD, tokens, experts)])
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        for actual, wanted in zip(*results, strict=True):
            assert float((actual - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def test_a_weight_of_zero_has_its_gradient() -> None:
    """It comes from the products, not by dividing the output by the weight."""
    tokens, experts = make_tokens([[0, 1]]), make_experts("gelu")
    tokens.weights_R[0] = 0.0
    learning(tokens)
    actual = with_gradients(experts(tokens), tokens, experts)[2]
    torch.testing.assert_close(actual, with_gradients(plainly(experts, tokens), tokens, experts)[2])
    assert float(actual[0].abs()) > 0.01


def test_narrow_experts_keep_rows_and_the_first_product_alone() -> None:
    """What the backward pass finds, by shape: no gathered rows (R, D), no activations, no outputs."""
    hidden = D_MODEL // 2
    tokens, experts = learning(make_tokens(CHOICES["several a row"])), make_experts("swiglu", hidden=hidden)
    kept: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        kept.append((*x.shape, x.is_floating_point()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        experts(tokens)
    rows, choices = tokens.x_VD.shape[0], len(tokens.row_R)
    matrices = [shape[:2] for shape in kept if len(shape) == 3 and shape[-1]]
    assert sorted(matrices) == sorted([(rows, D_MODEL), (choices, 2 * hidden)])


def test_a_second_backward_pass_finds_what_the_first_found() -> None:
    """No buffer that is kept is written to."""
    for activation, hidden in product(ACTIVATIONS, (HIDDEN, 4)):
        tokens = learning(make_tokens(CHOICES["several a row"]))
        experts = make_experts(activation, hidden=hidden)
        y_VD = experts(tokens)
        inputs: list[Any] = [tokens.x_VD, tokens.weights_R, *experts.parameters()]
        first, second = (torch.autograd.grad(y_VD.sum(), inputs, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), activation


@pytest.mark.parametrize("frozen", ["w_in", "w_out", "x", "weights"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    tokens, experts = learning(make_tokens(CHOICES["several a row"])), make_experts("gelu")
    leaves = {"x": tokens.x_VD, "weights": tokens.weights_R, "w_in": experts.w_in, "w_out": experts.w_out}
    leaves[frozen].requires_grad_(False)
    experts(tokens).sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is None] == [frozen]


def test_wider_matrices_are_rounded_to_the_rows_dtype() -> None:
    """float32 master weights serve bfloat16 rows, and get float32 gradients."""
    tokens, experts = learning(make_tokens([[0, 1], [2, 3]], torch.bfloat16)), make_experts("gelu", torch.float32)
    y_VD = fused_experts(tokens, experts.w_in, experts.w_out, "gelu", GROUPED_GEMMS["loop"])
    y_VD.sum().backward()
    assert y_VD.dtype == torch.bfloat16
    assert experts.w_in.grad is not None
    assert experts.w_in.grad.dtype == torch.float32


@given(st.permutations(range(7)))
def test_inverse(order: list[int]) -> None:
    assert [order[place] for place in inverse_permutation(torch.tensor(order)).tolist()] == list(range(7))


@settings(deadline=None)
@given(st.data())
def test_bags_equal_columns(data: st.DataObject) -> None:
    """The sum over a table's columns by an embedding's bags is that by columns: 3 columns take the one, vectors the
    other."""
    num_rows, num_results = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 6))
    row = st.lists(st.integers(NO_ROW, num_rows - 1), min_size=3, max_size=3)
    table = torch.tensor(data.draw(st.lists(row, min_size=num_results, max_size=num_results)), dtype=torch.int64).view(
        num_results, 3
    )
    x = torch.arange(1.0, num_rows + 1, dtype=torch.float64)[:, None].repeat(1, 2)
    unused = torch.zeros(num_rows, 1, dtype=torch.int64)
    by_bags, by_columns = gather_rows(x, table, unused), gather_rows(x[:, 0], table, unused)
    assert by_bags[:, 0].tolist() == by_columns.tolist()


@pytest.mark.parametrize("hidden", [HIDDEN, 4], ids=["wide", "narrow"])
@pytest.mark.parametrize("needed", ["x", "w_in", "w_out", "weights"])
def test_gradients_that_nobody_needs_are_not_computed(needed: str, hidden: int) -> None:
    """Products of the backward pass, by which of four leaves wants a gradient."""
    tokens, experts = make_tokens(CHOICES["several a row"]), make_experts("gelu", hidden=hidden)
    leaves = {"x": tokens.x_VD, "weights": tokens.weights_R, "w_in": experts.w_in, "w_out": experts.w_out}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == needed)
    y_VD = experts(tokens)
    loop, calls = GROUPED_GEMMS["loop"], list[str]()

    def counted(name: str) -> Any:
        def call(*args: Any) -> Tensor:
            calls.append(name)
            result: Tensor = getattr(loop, name)(*args)
            return result

        return call

    assert y_VD.grad_fn is not None
    y_VD.grad_fn.gemm = grouped_gemm.GroupedGemm(loop.groups, counted("rows"), counted("sums"))
    (found,) = torch.autograd.grad(y_VD.sum(), leaves[needed])
    (expected,) = torch.autograd.grad(plainly(experts, tokens).sum(), leaves[needed])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    keeps = hidden >= D_MODEL
    wanted = {"x": (2, 0), "w_in": (1, 1), "w_out": (0 if keeps else 1, 1), "weights": (0 if keeps else 1, 0)}[needed]
    assert (calls.count("rows"), calls.count("sums")) == wanted


@pytest.mark.parametrize("backend", GROUPED_GEMMS)
def test_autocast_has_no_say(backend: str) -> None:
    tokens, experts = (
        make_tokens(CHOICES["several a row"], torch.float32),
        make_experts("swiglu", torch.float32, backend),
    )
    learning(tokens)
    expected = with_gradients(experts(tokens), tokens, experts)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(experts(tokens), tokens, experts)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_copy_of_the_matrices_is_kept_in_the_rows_dtype() -> None:
    """Of float32 matrices that serve bfloat16 rows: what is kept is the matrices themselves."""
    tokens, experts = learning(make_tokens([[0, 1], [2, 3]], torch.bfloat16)), make_experts("gelu", torch.float32)
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        experts(tokens)
    matrices = [x for x in kept if x.dim() == 3]
    assert [x.data_ptr() for x in matrices] == [experts.w_in.data_ptr(), experts.w_out.data_ptr()]
