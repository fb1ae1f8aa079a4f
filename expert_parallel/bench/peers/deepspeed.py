"""Wraps DeepSpeed's MoE layer, with expert parallelism over the ranks, with its own kernels or Tutel's."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expert_parallel.bench.peers.implementation import Case, Implementation, NotMeasured, installed_version
from expert_parallel.nn.ffn import ACTIVATIONS, w_in_columns
from expert_parallel.runtime.process import Runtime, set_deepspeed_environment

PACKAGE = "deepspeed"
CAPACITY_FACTOR = 1.0
MIN_CAPACITY = 4


class Expert(nn.Module):
    """Computes one expert; DeepSpeed copies the module for each."""

    def __init__(self, d_model: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[activation]
        self.w_in = nn.Parameter(torch.empty(d_model, w_in_columns(activation, hidden)))
        self.w_out = nn.Parameter(torch.empty(hidden, d_model))

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(x @ self.w_in) @ self.w_out


class DeepSpeedLayer(Implementation):
    """Runs DeepSpeed's layer with its capacity."""

    def __init__(self, module: nn.Module, case: Case, computes: str, version: str) -> None:
        super().__init__(module, computes, version)
        self.case, self.counts_E = case, torch.zeros(case.shape.num_experts)

    @property
    def capacity(self) -> int:
        """Returns how many rows an expert accepts from each rank, computed as DeepSpeed's `_capacity` does."""
        shape, tokens = self.case.shape, len(self.case.x_TD)
        return max(MIN_CAPACITY, -(-tokens * shape.k // shape.num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD, _, self.counts_E = self.module(x_TD)
        return y_TD

    def forward_dropless(self, x_TD: Tensor) -> Tensor:
        """Computes the layer with what `drop_tokens=False` sets in DeepSpeed."""
        gate = self.module.deepspeed_moe.gate
        gate.drop_tokens = False
        try:
            return self.forward(x_TD)
        finally:
            gate.drop_tokens = True

    def dropped_share(self) -> float:
        """Returns the dropped share from DeepSpeed's counts, which are taken before it drops."""
        dropped = (self.counts_E - self.capacity).clamp(min=0).sum()
        return float(dropped / self.counts_E.sum())

    def bytes_sent(self) -> int:
        """Returns the bytes of its padded buffers, out and back, forward and backward."""
        shape, ranks = self.case.shape, self.case.ranks
        rows = shape.num_experts * self.capacity * (ranks - 1) // ranks
        return 4 * rows * shape.d_model * self.case.dtype.itemsize


def start_deepspeed(runtime: Runtime) -> None:
    """Starts DeepSpeed's communication over the existing process groups. Raises `NotMeasured` where it is not
    installed."""
    installed_version(PACKAGE)
    set_deepspeed_environment(runtime)
    import deepspeed

    from expert_parallel.training.engines.deepspeed import set_up_deepspeed

    set_up_deepspeed(runtime)
    if not deepspeed.comm.is_initialized():
        backend = "nccl" if runtime.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, dist_init_required=False, verbose=False)


def build_moe(case: Case, use_tutel: bool) -> nn.Module:
    """Builds DeepSpeed's layer with its own initial weights. Layers of the same ranks share their process groups."""
    from deepspeed.moe.layer import MoE

    shape = case.shape
    with torch.device(case.device):
        layer = MoE(
            shape.d_model,
            Expert(shape.d_model, shape.hidden, case.activation),
            shape.num_experts,
            ep_size=case.ranks,
            k=shape.k,
            capacity_factor=CAPACITY_FACTOR,
            min_capacity=MIN_CAPACITY,
            top2_2nd_expert_sampling=False,  # sampling would choose other second experts than ours
            use_rts=False,
            use_tutel=use_tutel,
        )
    if case.ranks > 1:
        layer.set_deepspeed_parallelism()
    return layer


def build(case: Case, use_tutel: bool = False) -> Implementation:
    """Builds the layer with the case's weights."""
    version = installed_version(PACKAGE)
    if use_tutel:
        version = f"{version}, Tutel {installed_version('tutel', extra='')}"
        if case.device.type == "cpu" and case.dtype not in (torch.float32, torch.float64):
            raise NotMeasured("Tutel's CPU kernels take float32 and float64 alone")
    case.experts_per_rank()
    start_deepspeed(case.runtime)
    layer: Any = build_moe(case, use_tutel).to(case.dtype)
    inner = layer.deepspeed_moe
    with torch.no_grad():
        inner.gate.wg.weight.copy_(case.weights.router_ED)
        for slot, expert in enumerate(inner.experts.deepspeed_experts):
            expert.w_in.copy_(case.weights.w_in_eDF[slot])
            expert.w_out.copy_(case.weights.w_out_eFD[slot])
    computes = f"capacity {CAPACITY_FACTOR:g}, {case.activation}"
    return DeepSpeedLayer(layer, case, computes, version)


build_deepspeed = partial(build, use_tutel=False)
build_deepspeed_tutel = partial(build, use_tutel=True)
