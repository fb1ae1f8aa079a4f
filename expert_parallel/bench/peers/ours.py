"""Wraps our `MoELayer`, as a model uses it, and with a capacity, for comparison with peers that have one."""

from typing import Any

import torch
from torch import Tensor

from expert_parallel import __version__
from expert_parallel.bench.peers.implementation import Case, Implementation
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.types import LoadStats

CAPACITY_FACTOR = 1.0


class OurLayer(Implementation):
    """Runs our layer. `bytes_sent` counts everything that the layer's log counts: rows and metadata."""

    def __init__(self, layer: MoELayer, computes: str) -> None:
        super().__init__(layer, computes, __version__)
        self.stats: LoadStats | None = None

    def forward(self, x_TD: Tensor) -> Tensor:
        return self._forward(x_TD, StepContext())

    def forward_dropless(self, x_TD: Tensor) -> Tensor:
        return self._forward(x_TD, StepContext(dropless=True))

    def _forward(self, x_TD: Tensor, context: StepContext) -> Tensor:
        output = self.module(x_TD, context)
        self.stats = output.stats
        return output.y

    def dropped_share(self) -> float:
        assert self.stats is not None
        return float(self.stats.dropped_capacity_E.sum() / self.stats.routed_E.sum())

    def bytes_sent(self) -> int | None:
        assert self.stats is not None
        return sum(count for (_, link), count in self.stats.log.bytes_sent.items() if link != "own")


def build_ours(case: Case) -> Implementation:
    """Builds our dropless layer."""
    return _build(case, {"kind": "dropless"}, f"dropless, {case.activation}")


def build_with_capacity(case: Case) -> Implementation:
    """Builds our layer with a capacity that drops by position, second choices after first ones, as GShard does."""
    capacity = {"kind": "factor", "train": CAPACITY_FACTOR}
    return _build(case, capacity, f"capacity {CAPACITY_FACTOR:g}, {case.activation}")


def _build(case: Case, capacity: dict[str, Any], computes: str) -> Implementation:
    shape = case.shape
    config: dict[str, Any] = {
        "d_model": shape.d_model,
        "num_experts": shape.num_experts,
        "router": {"k": shape.k, "normalise": shape.k > 1},
        "capacity": capacity,
        "experts": {"hidden": shape.hidden, "activation": case.activation},
    }
    layer: Any
    with torch.device(case.device):
        layer = MoELayer(MoEConfig.model_validate(config), case.group).to(case.dtype)
    with torch.no_grad():
        layer.router.weight.copy_(case.weights.router_ED)
        layer.experts.w_in.copy_(case.weights.w_in_eDF)
        layer.experts.w_out.copy_(case.weights.w_out_eFD)
    return OurLayer(layer, computes)
