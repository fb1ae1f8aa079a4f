"""Wraps torchtitan's MoE layer, with its all-to-all dispatcher on several ranks."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from expert_parallel.bench.peers.implementation import Case, Implementation, NotMeasured, installed_version

PACKAGE = "torchtitan"


class TitanLayer(Implementation):
    """Runs torchtitan's layer."""

    def __init__(self, module: nn.Module, case: Case, computes: str, version: str) -> None:
        super().__init__(module, computes, version)
        self.case = case

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.module(x_TD[None])[0]  # torchtitan's layout is (B, L, D)

    @contextmanager
    def execution_context(self) -> Iterator[None]:
        """Silences torch's warning that the router's autocast to float32 has no effect on a CPU."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "In CPU autocast")
            yield

    def bytes_sent(self) -> int:
        """Returns the bytes of a row for each choice on another rank, out and back, forward and backward."""
        return self.case.bytes_of_one_row_per_choice()


def without_bfloat16_casts(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Disables casts to bfloat16 in torchtitan's experts, which cast whatever they receive, so that they compute in
    float32."""

    @wraps(forward)
    def run(*arguments: Any) -> Tensor:
        with mock.patch.object(torch.Tensor, "bfloat16", lambda x: x):
            return forward(*arguments)

    return run


def build(case: Case) -> Implementation:
    """Builds the layer with the case's weights."""
    version = installed_version(PACKAGE)
    if case.activation != "swiglu":
        raise NotMeasured("its experts are SwiGLU")
    if case.device.type == "cuda" and case.dtype != torch.bfloat16:
        raise NotMeasured("on GPUs its grouped products take bfloat16 alone")
    num_local = case.experts_per_rank()
    layer: Any = build_moe(case, num_local)
    weights, experts = case.weights, layer.routed_experts.inner_experts
    w_gate_eDF, w_up_eDF = weights.w_in_eDF.chunk(2, -1)
    with torch.no_grad():
        layer.router.gate.weight.copy_(weights.router_ED)
        for own, given in (("w1_EFD", w_gate_eDF), ("w3_EFD", w_up_eDF), ("w2_EDF", weights.w_out_eFD)):
            getattr(experts, own).copy_(given.transpose(1, 2))
    experts.forward = without_bfloat16_casts(experts.forward)
    return TitanLayer(layer, case, "dropless, swiglu", version)


def build_moe(case: Case, num_local: int) -> nn.Module:
    """Builds torchtitan's layer with this rank's experts, as its own parallelize() would leave them on a rank."""
    from torch.distributed.device_mesh import DeviceMesh
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    shape = case.shape
    set_spmd_backend("partial_dtensor")  # the default backend needs the mesh of a whole model
    config = MoE.Config(
        num_experts=shape.num_experts,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=shape.d_model, hidden_dim=shape.hidden, num_experts=num_local),
            token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=shape.num_experts, top_k=shape.k),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=shape.num_experts,
            gate=Linear.Config(in_features=shape.d_model, out_features=shape.num_experts),
            top_k=shape.k,
            score_func="softmax",
            route_norm=shape.k > 1,
        ),
        load_balance_coeff=None,
    )
    with torch.device(case.device):
        layer = config.build().to(case.dtype)
    layer.tokens_per_expert_E = layer.tokens_per_expert_E.float()  # counts, which bfloat16 would round
    if case.group is not None:
        mesh = DeviceMesh.from_group(case.group, case.device.type)
        layer.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)
    return layer
