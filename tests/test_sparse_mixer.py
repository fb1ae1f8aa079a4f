"""The router `sparsemixer` against transformers' Phi-3.5-MoE, the probabilities of its paper, and the reference."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import RouterReplay, StepContext, pass_seed
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.moe.reference.reference_layer import reference_layer
from expert_parallel.moe.types import RoutingPlan
from expert_parallel.nn import random
from expert_parallel.nn.random import Stream
from tests.test_routers import CHI_SQUARE, batch_of, chi_square, draw, from_logits, route

CONTEXT = StepContext(seed=1, step=2, micro_step=3, layer=4)


def theirs(logits_TE: Tensor, margin: float, training: bool) -> tuple[Tensor, Tensor]:
    """(weights, expert ids) of transformers, with our random numbers in the place of theirs."""
    index_T, num_experts = batch_of(logits_TE, CONTEXT).index_T, logits_TE.shape[1]
    gumbel_T2E = random.gumbel(pass_seed(CONTEXT, Stream.MIXER_CHOICE), index_T, 2 * num_experts)
    lots_T2 = random.uniform(pass_seed(CONTEXT, Stream.MIXER_STEP), index_T, 2)
    lots = lots_T2.split(1, 1)
    with (
        mock.patch.object(torch.Tensor, "exponential_", side_effect=torch.exp(-gumbel_T2E).split(num_experts, 1)),
        mock.patch.object(torch, "rand_like", side_effect=lots),
        mock.patch.object(torch.Tensor, "uniform_", side_effect=lots[1:]),
    ):
        weights_TK, expert_ids_TK = sparsemixer(logits_TE, margin, training)
    return weights_TK, expert_ids_TK


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("margin", [0.01, 0.3])
def test_it_is_that_of_transformers(training: bool, margin: float) -> None:
    """Choices, weights, and the gradient of the logits. Their factors are 0.3333 and 0.6667 where Heun's is 1/3."""
    logits_TE = draw(300, 5).requires_grad_()
    plan = route(from_logits("sparsemixer", 5, margin=margin).train(training), logits_TE, CONTEXT)
    weights_TK, expert_ids_TK = theirs(logits_TE, margin, training)
    assert torch.equal(plan.expert_ids_TK, expert_ids_TK)
    assert torch.equal(expert_ids_TK, logits_TE.topk(2).indices) is not training
    torch.testing.assert_close(plan.weights_TK, weights_TK, rtol=2e-4 if training else 1e-12, atol=0)
    upstream_TK = draw(300, 2, seed=1)
    (actual,), (expected,) = (torch.autograd.grad(w, logits_TE, upstream_TK) for w in (plan.weights_TK, weights_TK))
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def many_tokens(logits_E: Tensor) -> RoutingPlan:
    return route(from_logits("sparsemixer", 4, margin=0.25), logits_E.expand(20_000, 4), CONTEXT)


def test_both_experts_are_draws_among_those_near_the_best() -> None:
    """Near 2.0 are logits of at least 2 - 2 * 0.25 * 2 = 1: not expert 3. Near 1.0, if expert 0 has gone, is expert 2,
    and near 0.8, if expert 1 has gone as well, nobody."""
    logits_E = torch.tensor([2.0, 1.0, 0.8, -1.0], dtype=torch.float64)
    plan = many_tokens(logits_E)
    first_T, second_T = plan.expert_ids_TK.unbind(1)
    shares_E = logits_E[:2].softmax(0)
    assert chi_square(first_T.bincount(minlength=4)[:2], shares_E) < CHI_SQUARE[4]
    assert set(first_T.tolist()) == {0, 1}
    assert set(second_T[first_T == 1].tolist()) == {0}, "0.8 is not near 2"
    after_0 = second_T[first_T == 0]
    assert chi_square(after_0.bincount(minlength=4)[1:3], logits_E[1:3].softmax(0)) < CHI_SQUARE[4]
    assert set(after_0.tolist()) == {1, 2}


def test_the_steps_integrate_quadratics() -> None:
    """Heun: of an expert that is not the best, the means of s and s^2 are their integrals from 0 to 1; else s is 1."""
    logits_E = torch.tensor([2.0, 1.6, 1.4, -1.0], dtype=torch.float64)
    plan = many_tokens(logits_E)
    share_E = logits_E[:3].softmax(0)
    first_T, weight_T = plan.expert_ids_TK[:, 0], plan.weights_TK[:, 0].detach()
    steps_T = weight_T / share_E[first_T]
    torch.testing.assert_close(steps_T[first_T == 0], torch.ones_like(steps_T[first_T == 0]))
    others_T = steps_T[first_T != 0]
    assert len(others_T) > 5_000
    assert float(others_T.mean()) == pytest.approx(1 / 2, abs=0.015)
    assert float(others_T.square().mean()) == pytest.approx(1 / 3, abs=0.015)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "capacity", [{"kind": "dropless"}, {"kind": "factor", "train": 1.0, "eval": 0.9, "minimum": 0}]
)
def test_a_layer_equals_the_reference(training: bool, capacity: dict[str, object]) -> None:
    """Values, losses and all gradients, also where the choices are replayed."""
    losses = [{"kind": "balance", "coefficient": 1.0}, {"kind": "importance", "coefficient": 1.0}]
    router = {"kind": "sparsemixer", "margin": 0.4, "bias": True}
    blocks = {"d_model": 6, "num_experts": 5, "router": router, "capacity": capacity, "losses": losses}
    config = MoEConfig.model_validate({**blocks, "experts": {"hidden": 4}})
    layer = MoELayer(config).double().train(training)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed)
    x_BSD = draw(3, 5, 6).requires_grad_()
    context = StepContext(seed=3, step=5, micro_step=1, layer=2, replay=RouterReplay())
    logical = {name: value for p in logical_parameters(layer) for name, value in p.whole(p.parameter.detach()).items()}
    parameters = {name: value.clone().requires_grad_() for name, value in logical.items()}
    reference = reference_layer(config, parameters, [x_BSD], training, context)
    assert any(bool(dropped.any()) for dropped in reference.dropped) is (capacity["kind"] == "factor")
    total = reference.y[0].sin().sum() + sum(reference.losses.values())
    expected = torch.autograd.grad(total, [x_BSD, *parameters.values()])
    for _ in range(2):  # the second pass replays the choices of the first
        layer.zero_grad()
        x_BSD.grad = None
        output = layer(x_BSD, context)
        close = torch.testing.assert_close
        close(output.y, reference.y[0], rtol=1e-10, atol=1e-12)
        (output.y.sin().sum() + sum(output.losses.values())).backward()
        grads = {n: g for p in logical_parameters(layer) for n, g in p.whole(p.parameter.grad).items()}
        for name, found in zip(["x", *parameters], expected, strict=True):
            close(x_BSD.grad if name == "x" else grads[name], found, rtol=1e-9, atol=1e-11)


def test_it_cannot_reroute() -> None:
    with pytest.raises(ValueError, match=r"capacity\.overflow is 'reroute' but router\.kind is 'sparsemixer'"):
        MoEConfig.model_validate(
            {
                "num_experts": 4,
                "router": {"kind": "sparsemixer"},
                "capacity": {"kind": "factor", "overflow": "reroute"},
                "experts": {"hidden": 4},
            }
        )
