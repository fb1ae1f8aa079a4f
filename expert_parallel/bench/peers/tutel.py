"""Wraps Tutel's MoE layer. Tutel is not on PyPI: build it from github.com/microsoft/tutel (NO_CUDA=1 for a CPU)."""

import torch
from torch import Tensor, nn

from expert_parallel.bench.peers.implementation import Case, Implementation, NotMeasured, installed_version
from expert_parallel.nn.ffn import ACTIVATIONS

PACKAGE = "tutel"
CAPACITY_FACTOR = 1.0


class TutelLayer(Implementation):
    """Runs Tutel's layer with its capacity."""

    def __init__(self, module: nn.Module, case: Case, computes: str, version: str) -> None:
        super().__init__(module, computes, version)
        self.case = case

    @property
    def capacity(self) -> int:
        """Returns how many rows an expert accepts from each rank, computed as Tutel's `extract_critical` does."""
        shape = self.case.shape
        return shape.k * int(CAPACITY_FACTOR * -(-len(self.case.x_TD) // shape.num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.module(x_TD)

    def forward_dropless(self, x_TD: Tensor) -> Tensor:
        """Computes the layer with factor 0, which is the capacity that the fullest expert needs."""
        (gate,) = self.module.gates
        gate.capacity_factor = 0.0
        try:
            return self.forward(x_TD)
        finally:
            gate.capacity_factor = CAPACITY_FACTOR

    def dropped_share(self) -> float:
        """Returns the dropped share from Tutel's counts, which are taken before it drops."""
        counts_E = self.module.dispatch_count
        assert isinstance(counts_E, Tensor)
        return float((counts_E - self.capacity).clamp(min=0).sum() / counts_E.sum())

    def bytes_sent(self) -> int:
        """Returns the bytes of its padded buffers, out and back, forward and backward."""
        shape, ranks = self.case.shape, self.case.ranks
        rows = shape.num_experts * self.capacity * (ranks - 1) // ranks
        return 4 * rows * shape.d_model * self.case.dtype.itemsize


def build(case: Case) -> Implementation:
    """Builds the layer with the case's weights."""
    version = installed_version(PACKAGE, extra="")
    if case.activation != "gelu":
        raise NotMeasured("its own experts have two matrices, without a gate")
    if case.device.type == "cpu" and case.dtype not in (torch.float32, torch.float64):
        raise NotMeasured("its CPU kernels take float32 and float64 alone")
    num_local = case.experts_per_rank()
    from tutel import moe

    shape, weights = case.shape, case.weights
    with torch.device(case.device):
        layer = moe.moe_layer(
            gate_type={"type": "top", "k": shape.k, "fp32_gate": True, "capacity_factor": CAPACITY_FACTOR},
            model_dim=shape.d_model,
            experts={
                "type": "ffn",
                "count_per_node": num_local,
                "hidden_size_per_expert": shape.hidden,
                "activation_fn": ACTIVATIONS[case.activation],
                "has_fc1_bias": False,
                "has_fc2_bias": False,
            },
            group=case.group,
            normalize_gate=shape.k > 1,
        ).to(case.dtype)
    with torch.no_grad():
        layer.gates[0].wg.weight.copy_(weights.router_ED)
        layer.experts.batched_fc1_w.copy_(weights.w_in_eDF.transpose(1, 2))
        layer.experts.batched_fc2_w.copy_(weights.w_out_eFD)
    return TutelLayer(layer, case, f"capacity {CAPACITY_FACTOR:g}, {case.activation}", version)
