"""A layer whose experts are padded to capacity asks its device for no number: shapes and launches are the same in every
step, as a CUDA graph wants them. torch's fake tensors stand for a device, and refuse every operation that would ask."""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from expert_parallel.moe.layer import MoEConfig, MoELayer

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
}


def run_layer(**settings: Any) -> tuple[int, ...]:
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
        output = layer(x_BSD)
        (output.y.float().sum() + sum(output.losses.values())).backward()
        assert x_BSD.grad is not None
        assert all(parameter.grad is not None for parameter in layer.parameters())
        return tuple(output.y.shape)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_padded_layer_asks_for_no_number(settings: dict[str, Any]) -> None:
    assert run_layer(**settings) == (2, 12, 16)


@pytest.mark.parametrize("capacity", [{"kind": "factor", "train": 1.0}, {**PADDED, "overflow": "reroute"}])
def test_what_it_would_notice(capacity: dict[str, Any]) -> None:
    """Drops without padding have as many rows as are left; rerouting goes on until all have found a place."""
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        run_layer(capacity=capacity)
