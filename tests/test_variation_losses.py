"""Losses of importance and load: numbers by hand, probabilities against drawn noise, evaluation, and what is refused.
Values and gradients of every layout: test_dispatch.py, against the reference layer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import StepContext, token_batch
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.routers.losses import LossConfig, router_losses
from expert_parallel.moe.routers.variation_losses import ImportanceLossConfig, LoadLossConfig
from expert_parallel.moe.types import LogitNoise, Outcome, RoutingPlan


def plan_of(logits_TE: Tensor, k: int, noise: LogitNoise | None = None) -> RoutingPlan:
    """Top-k with weights that are a softmax over the chosen logits."""
    values_TK, ids_TK = logits_TE.topk(k)
    scores_TE = logits_TE.softmax(-1)
    outcome_TK = torch.full_like(ids_TK, Outcome.KEPT, dtype=torch.uint8)
    return RoutingPlan(
        logits_TE,
        scores_TE,
        scores_TE,
        ids_TK,
        values_TK.softmax(-1),
        outcome_TK,
        logits_TE.shape[1],
        noise=noise,
    )


def loss_of(config: LossConfig, plan: RoutingPlan) -> float:
    batch = token_batch(torch.empty(1, len(plan.expert_ids_TK), 1), StepContext(), None)
    return float(router_losses([config], plan, batch)[0][config.kind])


def test_importance_by_hand() -> None:
    """Three of four tokens choose expert 0 with weight 1: (3, 1) has variance 1 and mean 2. The probabilities
    (3/4, 1/4), three times, and (1/4, 3/4) sum to (2.5, 1.5): variance 1/4, mean 2."""
    plan = plan_of(torch.tensor([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0], [1.0, 3.0]], dtype=torch.float64).log(), 1)
    assert loss_of(ImportanceLossConfig(kind="importance"), plan) == pytest.approx(1 / 4, rel=1e-12)
    of_all = ImportanceLossConfig(kind="importance", of="probabilities")
    assert loss_of(of_all, plan) == pytest.approx(1 / 16, rel=1e-12)
    assert loss_of(LoadLossConfig(kind="load"), plan) == pytest.approx(1 / 4, rel=1e-12)  # no noise: choices
    one_expert = plan_of(torch.tensor([[50.0, 0.0, 0.0, 0.0]], dtype=torch.float64), 1)
    assert loss_of(of_all, one_expert) == pytest.approx(3.0)  # E - 1, the largest value


@pytest.mark.parametrize("threshold", ["others", "all"])
@pytest.mark.parametrize("k", [1, 2])
def test_load_is_how_often_new_noise_chooses_an_expert(threshold: Any, k: int) -> None:
    """Each expert's noise is drawn again 100,000 times, while the noisy logits of the others stay: it is chosen if it
    is above the k-th of the others; V-MoE compares it with the k-th of all, its own old logit included."""
    clean_TE = torch.tensor([[0.8, 0.1, 0.0, -0.9], [0.6, 0.5, 0.2, -0.3]], dtype=torch.float64)
    std_TE = torch.tensor([[0.3, 0.5, 0.2, 0.9]], dtype=torch.float64).expand(2, 4)
    generator = torch.Generator().manual_seed(0)
    noisy_TE = clean_TE + std_TE * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    again_NTE = clean_TE + std_TE * torch.randn(100_000, 2, 4, generator=generator, dtype=torch.float64)
    load = [0.0] * 4
    for t in range(2):
        for e in range(4):
            rivals = [float(noisy_TE[t, i]) for i in range(4) if i != e or threshold == "all"]
            load[e] += float((again_NTE[:, t, e] > sorted(rivals)[-k]).double().mean())
    mean = sum(load) / 4
    expected = sum((one - mean) ** 2 for one in load) / 4 / mean**2
    plan = plan_of(noisy_TE, k, LogitNoise(clean_TE, std_TE))
    assert loss_of(LoadLossConfig(kind="load", threshold=threshold), plan) == pytest.approx(expected, rel=0.02)


def layer_config(**options: Any) -> MoEConfig:
    return MoEConfig.model_validate({"d_model": 8, "num_experts": 6, "experts": {"hidden": 4}, **options})


@pytest.mark.parametrize("preset", ["shazeer", "v_moe"])
def test_the_losses_of_a_preset_balance_its_router(preset: str) -> None:
    """Gradient descent on the two losses alone brings a skewed router to a tenth of each."""
    torch.manual_seed(0)
    layer = MoELayer(layer_config(preset=preset, router={"k": 2})).double()
    layer.router.weight.data = torch.randn(6, 8, dtype=torch.float64) * 0.3 + torch.arange(6)[:, None] * 0.3
    x_BSD = torch.rand(1, 256, 8, dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    found = []
    for step in range(40):
        losses = layer(x_BSD, StepContext(step=step)).losses
        assert list(losses) == ["importance", "load"]
        found.append({name: float(loss.detach()) for name, loss in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(found[-1][name] < found[0][name] / 10 for name in found[0]), (found[0], found[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": {"k": 2}}, "losses: load needs router.kind 'noisy_top_k' .* found 'top_k'"),
        ({"router": {"kind": "noisy_top_k", "noise": "gumbel"}}, "found 'noisy_top_k' with router.noise 'gumbel'"),
        ({"router": {"kind": "noisy_top_k", "k": 6}}, r"router\.k \(6\) equals num_experts \(6\)"),
    ],
)
def test_a_load_that_cannot_be_computed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_config(losses=[{"kind": "load"}], **options)
