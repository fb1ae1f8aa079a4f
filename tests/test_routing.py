"""The router: the numbers of the lessons by hand, ties, dtypes, balance bias, jitter, and what is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import StepContext, TokenBatch, token_batch
from expert_parallel.moe.routers import topk
from expert_parallel.moe.routers.base import TopKRouter, TopKRouterConfig
from expert_parallel.moe.routers.topk import stable_topk, stable_topk_int64, stable_topk_numpy
from expert_parallel.moe.types import Outcome, RoutingPlan

LESSON_LOGITS = [2.1, 0.5, 1.8, 0.2, 0.9, 1.5, 0.3, 0.4]


def logits_router(num_experts: int, **options: object) -> TopKRouter:
    """A float64 router whose logits are its input: the weight is the identity."""
    router = TopKRouter(TopKRouterConfig(**options), num_experts, num_experts).double()
    torch.nn.init.eye_(router.weight)
    return router


def random_router(d_model: int, num_experts: int, **options: object) -> TopKRouter:
    router = TopKRouter(TopKRouterConfig(**options), d_model, num_experts).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return router


def route(router: TopKRouter, x_TD: Tensor, context: StepContext | None = None) -> RoutingPlan:
    return router(x_TD, token_batch(x_TD[None], context or StepContext(), None))


def batch_of(index_T: Tensor, context: StepContext) -> TokenBatch:
    """Tokens with these places in the global order."""
    return TokenBatch(index_T, sequence_T=torch.zeros_like(index_T), num_sequences=1, context=context)


def rows(*values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def tokens(num_tokens: int, d_model: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Choices and weights


def test_the_logits_of_the_lesson() -> None:
    plan = route(logits_router(8, k=2), rows(LESSON_LOGITS))
    assert plan.expert_ids_TK.tolist() == [[0, 2]]
    assert [round(weight, 3) for weight in plan.weights_TK[0].tolist()] == [0.574, 0.426]


def test_the_gates_of_the_lesson() -> None:
    """Gate weights 0.28 and 0.27 renormalise to 0.509 and 0.491."""
    gates = rows([0.05, 0.28, 0.10, 0.27, 0.15, 0.15])
    raw = route(logits_router(6, k=2, normalise=False), gates.log())
    normalised = route(logits_router(6, k=2), gates.log())
    assert raw.expert_ids_TK.tolist() == normalised.expert_ids_TK.tolist() == [[1, 3]]
    assert [round(weight, 3) for weight in raw.weights_TK[0].tolist()] == [0.28, 0.27]
    assert [round(weight, 3) for weight in normalised.weights_TK[0].tolist()] == [0.509, 0.491]


def test_normalised_softmax_is_the_softmax_of_the_chosen_logits() -> None:
    """Mixtral's order (softmax, choose, renormalise) and GShard's (choose, softmax) are one and the same."""
    logits_TE = tokens(20, 6)
    plan = route(logits_router(6, k=3), logits_TE)
    chosen = logits_TE.gather(1, plan.expert_ids_TK)
    torch.testing.assert_close(plan.weights_TK, chosen.softmax(-1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [True, False])
def test_weights_are_the_scores_of_the_chosen(score: str, normalise: bool) -> None:
    logits_TE = tokens(20, 6)
    plan = route(logits_router(6, k=3, score=score, normalise=normalise, scale=2.5), logits_TE)
    scores_TE = logits_TE.softmax(-1) if score == "softmax" else 1 / (1 + (-logits_TE).exp())
    for t, experts in enumerate(plan.expert_ids_TK.tolist()):
        assert experts == sorted(range(6), key=lambda e: -float(scores_TE[t, e]))[:3]
        weights = [float(scores_TE[t, e]) for e in experts]
        total = sum(weights) if normalise else 1.0
        assert plan.weights_TK[t].tolist() == pytest.approx([2.5 * w / total for w in weights], rel=1e-12)
    torch.testing.assert_close(plan.logits_TE, logits_TE)
    torch.testing.assert_close(plan.scores_TE, scores_TE)
    assert bool((plan.outcome_TK == Outcome.KEPT).all())
    assert plan.outcome_TK.dtype == torch.uint8


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=5, max_size=5), max_size=6), st.integers(1, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_ties_go_to_the_lowest_expert_number(logits: list[list[float]], k: int) -> None:
    plan = route(logits_router(5, k=k, normalise=False), torch.tensor(logits, dtype=torch.float64).view(-1, 5))
    for row, experts in zip(logits, plan.expert_ids_TK.tolist(), strict=True):
        assert experts == sorted(range(5), key=lambda e: (-row[e], e))[:k]


def test_a_hundred_equal_scores() -> None:
    """A size at which torch.topk no longer keeps the order of equals."""
    plan = route(logits_router(100, k=8), torch.zeros(50, 100, dtype=torch.float64))
    assert plan.expert_ids_TK.tolist() == [list(range(8))] * 50


def test_all_experts_and_no_tokens() -> None:
    assert route(logits_router(3, k=3), rows([1.0, 3.0, 2.0])).expert_ids_TK.tolist() == [[1, 2, 0]]
    plan = route(logits_router(3, k=2), torch.zeros(0, 3, dtype=torch.float64))
    assert plan.expert_ids_TK.shape == plan.weights_TK.shape == plan.outcome_TK.shape == (0, 2)


def test_a_learned_bias_stands_on_the_logits() -> None:
    router = logits_router(3, k=1, normalise=False, bias=True)
    assert router.bias is not None
    router.bias.data = torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64)
    plan = route(router, rows([1.0, 0.0, 2.0]))
    assert plan.logits_TE.tolist() == [[1.0, 5.0, 2.0]]
    assert plan.expert_ids_TK.tolist() == [[1]]


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [True, False])
def test_gradient_of_the_weights(score: str, normalise: bool) -> None:
    router = random_router(4, 5, k=2, score=score, normalise=normalise, scale=1.7, bias=True)
    names = [name for name, _ in router.named_parameters()]

    def weights(x_TD: Tensor, *parameters: Tensor) -> Tensor:
        arguments = (x_TD, token_batch(x_TD[None], StepContext(), None))
        state = dict(zip(names, parameters, strict=True))
        plan: RoutingPlan = torch.func.functional_call(router, state, arguments)
        return plan.weights_TK

    assert torch.autograd.gradcheck(weights, (tokens(3, 4).requires_grad_(), *router.parameters()))


def test_top_1_learns_without_normalisation_and_only_then() -> None:
    """Trap 5: the normalised weight of one choice is the constant 1."""
    for normalise in (False, True):
        router = random_router(4, 5, k=1, normalise=normalise)
        plan = route(router, tokens(6, 4))
        plan.weights_TK.square().sum().backward()
        assert router.weight.grad is not None
        assert bool(router.weight.grad.abs().max() > 1e-3) is not normalise


def test_top_1_with_normalisation_is_refused() -> None:
    """Trap 5, at start and by name."""
    config = {"num_experts": 4, "experts": {"hidden": 8}}
    with pytest.raises(ValueError, match=r"router\.normalise is true with router\.k = 1"):
        MoEConfig.model_validate({**config, "router": {"k": 1}})
    assert MoEConfig.model_validate({**config, "router": {"k": 1, "normalise": False}}).router.k == 1


@pytest.mark.parametrize(
    "wrong", [{"k": 5}, {"k": 0}, {"jitter": 1.0}, {"jitter": -0.1}, {"scale": 0.0}, {"score": "relu"}, {"top_k": 2}]
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^MoEConfig: .*router\.{next(iter(wrong))}"):
        MoEConfig.model_validate({"num_experts": 4, "experts": {"hidden": 8}, "router": wrong})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [-50.0, -200.0, -1000.0])
def test_a_sigmoid_router_cannot_hide_under_an_epsilon(level: float, dtype: torch.dtype) -> None:
    """Trap 12: with very negative logits the scores vanish; their ratio, and so the weights, must not."""
    router = TopKRouter(TopKRouterConfig(k=2, score="sigmoid"), 3, 3).to(dtype)
    torch.nn.init.eye_(router.weight)
    x = torch.tensor([[level + 1, level, level - 50]], dtype=dtype, requires_grad=True)
    plan = route(router, x)
    expected = torch.tensor([[1.0, 0.0]], dtype=dtype).softmax(-1)  # sigmoid(x) is exp(x) down there
    torch.testing.assert_close(plan.weights_TK, expected, rtol=1e-6, atol=0)
    plan.weights_TK[0, 0].backward()
    assert x.grad is not None
    slope = float(expected[0, 0] * expected[0, 1])
    assert x.grad[0].tolist() == pytest.approx([slope, -slope, 0.0], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes


def test_a_bfloat16_model_routes_in_float32() -> None:
    router = random_router(64, 6, k=2).float()
    x_TD = tokens(50, 64).bfloat16()
    plan = route(router, x_TD)
    assert plan.logits_TE.dtype == plan.scores_TE.dtype == plan.weights_TK.dtype == torch.float32
    exact = x_TD.double() @ router.weight.double().T
    torch.testing.assert_close(plan.logits_TE.double(), exact, rtol=1e-5, atol=1e-5)
    assert not torch.allclose((x_TD @ router.weight.bfloat16().T).double(), exact, rtol=1e-3, atol=1e-3)


def test_a_bfloat16_router_weight_is_widened() -> None:
    router = random_router(8, 4, k=2).bfloat16()
    plan = route(router, tokens(5, 8).bfloat16())
    assert plan.logits_TE.dtype == torch.float32


def test_a_float64_model_routes_in_float64() -> None:
    router = random_router(8, 4, k=2)
    x_TD = tokens(5, 8)
    plan = route(router, x_TD)
    assert plan.logits_TE.dtype == plan.scores_TE.dtype == plan.weights_TK.dtype == torch.float64
    torch.testing.assert_close(plan.logits_TE, x_TD @ router.weight.T, rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# Balance bias


def test_the_balance_bias_moves_the_choice_and_never_a_weight() -> None:
    scores = rows([0.8, 0.6, 0.5, 0.1])
    logits = (scores / (1 - scores)).log()
    router = logits_router(4, k=2, score="sigmoid", balance_bias_rate=0.001)
    assert route(router, logits).expert_ids_TK.tolist() == [[0, 1]]
    assert router.balance_bias_E is not None
    router.balance_bias_E += torch.tensor([-0.25, 0.0, 0.2, 0.0])  # 0.55, 0.6, 0.7, 0.1
    plan = route(router, logits)
    assert plan.expert_ids_TK.tolist() == [[2, 1]]
    assert plan.weights_TK[0].tolist() == pytest.approx([0.5 / 1.1, 0.6 / 1.1], rel=1e-12)
    torch.testing.assert_close(plan.scores_TE, scores)


def test_the_balance_bias_is_saved_and_not_trained() -> None:
    router = logits_router(4, k=2, score="sigmoid", balance_bias_rate=0.001)
    assert "balance_bias_E" in router.state_dict()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert logits_router(4, k=2).balance_bias_E is None


# ---------------------------------------------------------------------------------------------------------------------
# Jitter


def jittered(x_TD: Tensor, index_T: Tensor, context: StepContext, jitter: float = 0.1) -> RoutingPlan:
    router = logits_router(x_TD.shape[1], k=2, jitter=jitter)
    return router(x_TD, batch_of(index_T, context))


def test_jitter_is_a_factor_around_1() -> None:
    x_TD = tokens(200, 8)
    noise_TD = (jittered(x_TD, torch.arange(200), StepContext(seed=1)).logits_TE / x_TD).detach()
    assert float(noise_TD.min()) >= 0.9
    assert float(noise_TD.max()) <= 1.1
    assert abs(float(noise_TD.mean()) - 1.0) < 0.01
    assert float(noise_TD.var()) == pytest.approx(0.2**2 / 12, rel=0.15)


def test_jitter_is_a_function_of_the_token_and_not_of_its_batch() -> None:
    """The same tokens in another order, and split over two calls, give the same plans bit for bit."""
    x_TD, index_T, context = tokens(12, 6), torch.arange(12) * 7 + 3, StepContext(seed=1, step=2, micro_step=3, layer=4)
    whole = jittered(x_TD, index_T, context)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    permuted = jittered(x_TD[order], index_T[order], context)
    halves = [jittered(x_TD[part], index_T[part], context) for part in (slice(0, 5), slice(5, 12))]
    for name in ("logits_TE", "weights_TK", "expert_ids_TK"):
        expected = getattr(whole, name)
        assert torch.equal(getattr(permuted, name), expected[order])
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), expected)


def test_jitter_differs_by_seed_step_micro_step_layer_and_token() -> None:
    x_TD, index_T, context = tokens(4, 6), torch.arange(4), StepContext(seed=1)
    base = jittered(x_TD, index_T, context).logits_TE
    others = [replace(context, **{name: 9}) for name in ("seed", "step", "micro_step", "layer")]
    for other in others:
        assert not bool((jittered(x_TD, index_T, other).logits_TE == base).any()), other
    assert not bool((jittered(x_TD, index_T + 4, context).logits_TE == base).any())
    # Dropout's coordinate tells data ranks apart; jitter must not, or the layout would change the choices.
    assert torch.equal(jittered(x_TD, index_T, replace(context, coordinate=9)).logits_TE, base)


def test_jitter_is_off_in_evaluation() -> None:
    router = logits_router(6, k=2, jitter=0.1).eval()
    x_TD = tokens(5, 6)
    assert torch.equal(route(router, x_TD).logits_TE, x_TD)
    assert not torch.equal(route(router.train(), x_TD).logits_TE, x_TD)


def test_jitter_leaves_its_input_alone() -> None:
    """transformers' Mixtral and Switch multiply in place, and so give the noise to the experts too."""
    x_TD = tokens(5, 6)
    before = x_TD.clone()
    jittered(x_TD, torch.arange(5), StepContext())
    assert torch.equal(x_TD, before)


def test_jitter_of_a_bfloat16_model_is_finer_than_bfloat16() -> None:
    """Between 0.99 and 1.01 bfloat16 has 5 numbers; the noise is drawn and applied in float32."""
    router = logits_router(64, k=2, jitter=0.01).float()
    plan = route(router, torch.ones(64, 64, dtype=torch.bfloat16))
    assert len(set(plan.logits_TE.flatten().tolist())) > 4000


def test_the_plan_of_a_step_repeats_bit_for_bit() -> None:
    x_TD, index_T = tokens(30, 6), torch.arange(30)
    first, second = (jittered(x_TD, index_T, StepContext(seed=3, step=5)) for _ in range(2))
    assert torch.equal(first.expert_ids_TK, second.expert_ids_TK)
    assert torch.equal(first.weights_TK, second.weights_TK)


# ---------------------------------------------------------------------------------------------------------------------
# The k best, and who stands first among equals


# On the CPU, and on other devices.
BEST = pytest.mark.parametrize("function", [stable_topk_numpy, stable_topk_int64])


@BEST
@settings(deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_best_is_a_stable_sort(function: Callable[..., torch.Tensor], data: st.DataObject, dtype: torch.dtype) -> None:
    """Ties, both zeros, infinities and the smallest numbers: as Python's own sort, which is stable."""
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf])
    num_tokens, num_experts = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 9))
    row = st.lists(numbers, min_size=num_experts, max_size=num_experts)
    ranking = data.draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))
    k = data.draw(st.integers(1, num_experts))
    ranking_TE = torch.tensor(ranking, dtype=dtype).view(num_tokens, num_experts)
    before_TE = ranking_TE.clone()
    ids_TK = function(ranking_TE, k)
    assert ids_TK.tolist() == [sorted(range(num_experts), key=lambda e: -values[e])[:k] for values in ranking]
    assert ids_TK.dtype == torch.int64
    assert num_tokens == 0 or ids_TK.stride(1) == 1, "or its bytes could not be sent"
    assert torch.equal(ranking_TE, before_TE)


@BEST
def test_best_takes_a_diverged_router_without_an_error(function: Callable[..., torch.Tensor]) -> None:
    """NaN comes first, whatever its sign, in each dtype alike; the loss says NaN then, as it should."""
    negative = torch.tensor([-0x400000], dtype=torch.int32).view(torch.float32)  # what inf - inf is on x86
    row_E = torch.cat([torch.tensor([1.0]), negative, torch.tensor([torch.nan, 0.0])])
    for dtype in (torch.float32, torch.float64):
        assert function(row_E[None].to(dtype), 3).tolist() == [[1, 2, 0]]
        everything = torch.full((2, 3), torch.nan, dtype=dtype), torch.full((2, 3), -torch.inf, dtype=dtype)
        assert all(function(row_TE, 3).tolist() == 2 * [[0, 1, 2]] for row_TE in everything)


@BEST
def test_best_of_a_ranking_that_lies_otherwise_in_memory(function: Callable[..., torch.Tensor]) -> None:
    ranking_TE = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    expected = ranking_TE.sort(dim=1, descending=True).indices[:, :3]
    for strided_TE in (
        ranking_TE.T.contiguous().T,
        ranking_TE.repeat(2, 2)[::2, ::2][:0],
        ranking_TE.repeat(1, 2)[:, :6],
    ):
        assert torch.equal(function(strided_TE, 3), expected[: len(strided_TE)])


@pytest.mark.parametrize(
    ("device", "dtype", "k", "taken"),
    [
        ("cpu", torch.float32, 4, "stable_topk_numpy"),
        ("cpu", torch.float64, 10, "stable_topk_numpy"),
        ("cpu", torch.float64, 11, "stable_topk_int64"),  # of 40
        ("cpu", torch.bfloat16, 4, "stable_topk_int64"),  # which numpy does not know
        ("meta", torch.float32, 4, "stable_topk_int64"),
    ],
)
def test_which_way_best_takes(
    device: str, dtype: torch.dtype, k: int, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name, function in (("stable_topk_numpy", stable_topk_numpy), ("stable_topk_int64", stable_topk_int64)):
        noted = lambda x_TE, k, name=name, function=function: (calls.append(name), function(x_TE, k))[1]  # noqa: E731
        monkeypatch.setattr(topk, name, noted)
    assert stable_topk(torch.zeros(5, 40, dtype=dtype, device=device), k).shape == (5, k)
    assert calls == [taken]
