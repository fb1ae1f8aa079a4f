"""With all experts on one rank, a layer that drops nothing, or whose experts are padded to capacity, asks its device
for no number: shapes and launches are the same in every step, as a CUDA graph wants them. torch's fake tensors stand
for a device, and refuse every operation that would ask."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import RouterReplay, StepContext, TokenBatch, token_batch
from expert_parallel.moe.experts.grouped_gemm import GROUPED_GEMMS
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.routers.base import LinearRouter, LinearSettings, Scores, score_logits
from expert_parallel.moe.routers.registry import ROUTERS
from expert_parallel.moe.types import Outcome, RoutingPlan

PADDED = {"kind": "factor", "train": 1.0, "minimum": 0, "pad": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "switch": {"router": {"k": 1, "normalise": False, "jitter": 0.01}},
    "renormalised": {"capacity": {**PADDED, "renormalise": True}},
    "by probability": {"capacity": {**PADDED, "priority": "probability"}},
    "each sequence's own": {"capacity": {**PADDED, "scope": "sequence"}},
    "losses": {"losses": [{"kind": "balance"}, {"kind": "z_loss"}]},
    "shared experts": {"shared_experts": {"hidden": 16}},
    "sigmoid with a bias": {"router": {"k": 2, "score": "sigmoid", "balance_bias_rate": 0.01}},
    "biases": {"experts": {"hidden": 16, "activation": "gelu", "bias": True}},
    "dropless": {"capacity": {"kind": "dropless"}},
    "dropless with noise": {"capacity": {"kind": "dropless"}, "router": {"kind": "noisy_top_k", "k": 2}},
    "dropless in a group": {
        "capacity": {"kind": "dropless"},
        "router": {"k": 2, "group_limit": {"count": 2, "limit": 1, "score": "max"}},
    },
}


def run_layer(context: StepContext | None = None, **settings: Any) -> tuple[int, ...]:
    """One step on a device that is none: CPU tensors would take the CPU's own way."""
    config = {
        "d_model": 16,
        "num_experts": 4,
        "router": {"k": 2},
        "capacity": PADDED,
        "experts": {"hidden": 16, "activation": "swiglu", "backend": "grouped_mm"},
        **settings,
    }
    if "experts" in settings:
        config["experts"] = {**settings["experts"], "backend": "grouped_mm"}
    layer = MoELayer(MoEConfig.model_validate(config)).bfloat16()
    no_autocast = mock.patch.object(torch, "autocast", return_value=nullcontext())  # which knows no meta
    with FakeTensorMode(allow_non_fake_inputs=True), no_autocast:
        layer = layer.to("meta")
        x_BSD = torch.randn(2, 12, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
        output = layer(x_BSD, context)
        (output.y.float().sum() + sum(output.losses.values())).backward()
        assert x_BSD.grad is not None
        assert all(parameter.grad is not None for parameter in layer.parameters())
        return tuple(output.y.shape)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_layer_asks_for_no_number(settings: dict[str, Any]) -> None:
    assert run_layer(**settings) == (2, 12, 16)


def test_a_pass_without_limits_asks_for_none_either() -> None:
    assert run_layer(StepContext(dropless=True), capacity={"kind": "factor", "train": 1.0}) == (2, 12, 16)


@pytest.mark.parametrize(
    "settings",
    [
        {"capacity": {"kind": "factor", "train": 1.0}},
        {"capacity": {**PADDED, "overflow": "reroute"}},
        {"capacity": {"kind": "dropless", "receive_bound": 1.5}},
        {"capacity": {"kind": "dropless"}, "router": {"kind": "gshard", "second": "proportional"}},
    ],
)
def test_what_it_would_notice(settings: dict[str, Any]) -> None:
    """Drops without padding have as many rows as are left, and so has a second expert that may be left out; rerouting
    goes on until all have found a place."""
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        run_layer(**settings)


def test_padding_is_left_out_of_a_dropless_layer() -> None:
    """Of which the layer's settings know nothing: the tokens' mask says it, in a second pass too."""
    experts = {"hidden": 8, "activation": "gelu", "backend": "loop"}
    config = {"d_model": 8, "num_experts": 4, "router": {"k": 2}, "experts": experts}
    layer = MoELayer(MoEConfig.model_validate(config))
    x_BSD, mask_BS, replay = torch.randn(1, 6, 8), torch.tensor([[True] * 4 + [False] * 2]), RouterReplay()
    whole = layer(x_BSD, StepContext(replay=replay))
    assert int(whole.stats.computed_E.sum()) == 12
    for context in (StepContext(mask_BS=mask_BS), StepContext(mask_BS=mask_BS, replay=replay)):
        masked = layer(x_BSD, context)
        assert int(masked.stats.computed_E.sum()) == 8
        assert torch.equal(masked.y[0, 4:], torch.zeros(2, 8))
        torch.testing.assert_close(masked.y[0, :4], whole.y[0, :4])


class Sparing(LinearRouter):
    """Leaves second choices out, behind the back of `choose`."""

    Config = LinearSettings

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        return score_logits(self.logits(x_TD), "softmax")

    def forward(self, x_TD: Tensor, batch: TokenBatch, recorded: tuple[Tensor, Tensor] | None = None) -> RoutingPlan:
        plan = super().forward(x_TD, batch, recorded)
        outcome_TK = plan.outcome_TK.clone()
        outcome_TK[:, 1] = Outcome.NOT_ROUTED
        return replace(plan, outcome_TK=outcome_TK)


@pytest.mark.parametrize("backend", GROUPED_GEMMS)
def test_a_router_that_leaves_choices_out_in_its_own_way(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who replaces a plan's reasons takes back that it is whole."""
    monkeypatch.setitem(ROUTERS, "sparing", Sparing)
    experts = {"hidden": 8, "activation": "gelu", "backend": backend}
    config = {"d_model": 8, "num_experts": 4, "router": {"kind": "sparing", "k": 2}, "experts": experts}
    layer, x_BSD = MoELayer(MoEConfig.model_validate(config)), torch.randn(1, 6, 8)
    assert int(layer(x_BSD).stats.computed_E.sum()) == 6
    plain = MoELayer(MoEConfig.model_validate({**config, "router": {"k": 2}, "capacity": {"kind": "dropless"}}))
    plain.load_state_dict(layer.state_dict())
    first = plain(x_BSD).y - _second_choices(plain, x_BSD)
    torch.testing.assert_close(layer(x_BSD).y, first, rtol=1e-4, atol=1e-6)


def _second_choices(layer: MoELayer, x_BSD: Tensor) -> Tensor:
    """What they add to each token's output, one by one."""
    plan = layer.router(x_BSD[0], token_batch(x_BSD, StepContext(), None))
    rows = [
        weight * torch.nn.functional.gelu(x_D @ layer.experts.w_in[e]) @ layer.experts.w_out[e]
        for x_D, e, weight in zip(x_BSD[0], plan.expert_ids_TK[:, 1].tolist(), plan.weights_TK[:, 1], strict=True)
    ]
    return torch.stack(rows)[None]
