"""Ours: MoELayer, as a model has it."""

from typing import Any

import torch
from torch import Tensor

import expert_parallel
from expert_parallel.bench.peers.contender import Case, Contender
from expert_parallel.moe.layer import MoEConfig, MoELayer
from expert_parallel.moe.plan import LoadStats


class Ours(Contender):
    """All bytes that the layer's log counts: rows, and what travels beside them."""

    def __init__(self, layer: MoELayer, computes: str) -> None:
        super().__init__(layer, computes, expert_parallel.__version__)
        self.stats: LoadStats | None = None

    def forward(self, x_TD: Tensor) -> Tensor:
        output = self.module(x_TD)
        self.stats = output.stats
        return output.y

    def bytes_sent(self) -> int | None:
        assert self.stats is not None
        return sum(count for (_, link), count in self.stats.log.bytes_sent.items() if link != "own")


def build_ours(case: Case) -> Contender:
    shape = case.shape
    config: dict[str, Any] = {
        "d_model": shape.d_model,
        "num_experts": shape.num_experts,
        "router": {"k": shape.k, "normalise": shape.k > 1},
        "experts": {"hidden": shape.hidden, "activation": case.activation},
    }
    layer: Any
    with torch.device(case.device):
        layer = MoELayer(MoEConfig.model_validate(config), case.group).to(case.dtype)
    with torch.no_grad():
        layer.router.weight.copy_(case.weights.router_ED)
        layer.experts.w_in.copy_(case.weights.w_in_eDF)
        layer.experts.w_out.copy_(case.weights.w_out_eFD)
    return Ours(layer, f"dropless, {case.activation}")
