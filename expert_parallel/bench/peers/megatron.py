"""Wraps Megatron-Core's MoE layer, dropless, with its all-to-all dispatcher."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expert_parallel.bench.peers.implementation import Case, Implementation, installed_version

PACKAGE = "megatron-core"


class MegatronLayer(Implementation):
    """Runs Megatron-Core's layer."""

    def __init__(self, module: nn.Module, case: Case, computes: str, version: str) -> None:
        super().__init__(module, computes, version)
        self.case = case

    def forward(self, x_TD: Tensor) -> Tensor:
        y, _ = self.module(x_TD[:, None])  # Megatron-Core's layout is (S, B, D)
        return y[:, 0]

    def bytes_sent(self) -> int:
        """Returns the bytes of a row for each choice on another rank, out and back, forward and backward, without its
        weights."""
        return self.case.bytes_of_one_row_per_choice()

    def execution_context(self) -> AbstractContextManager[None]:
        return without_cuda_calls(self.case.device)


class NoStream:
    """Replaces a CUDA stream on a CPU, where work is not asynchronous."""

    def wait_stream(self, other: Any) -> None: ...
    def record_event(self) -> "NoStream":
        return self

    def synchronize(self) -> None: ...


@contextmanager
def without_cuda_calls(device: torch.device) -> Iterator[None]:
    """Lets Megatron-Core run on a CPU, where it asks torch for the current CUDA device and streams: patches these
    calls.

    Megatron-Core converts sizes to numpy arrays on a GPU but leaves them as tensors on a CPU, which its collectives
    refuse; they are converted here as well."""
    if device.type == "cuda":
        yield
        return
    from megatron.core.transformer.moe import token_dispatcher

    with (
        mock.patch.object(torch.cuda, "current_device", return_value=device),
        mock.patch.object(torch.cuda, "Stream", NoStream),
        mock.patch.object(torch.cuda, "current_stream", NoStream),
        mock.patch.object(torch.cuda, "stream", return_value=nullcontext()),
        mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _as_on_gpu),
    ):
        yield


def _as_on_gpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.tolist() if as_numpy and torch.is_tensor(tensor) else tensor


def build(case: Case) -> Implementation:
    """Builds the layer with the case's weights."""
    version = installed_version(PACKAGE)
    num_local = case.experts_per_rank()
    with without_cuda_calls(case.device):
        layer: Any = build_moe(case).to(device=case.device, dtype=case.dtype)
    weights = case.weights
    with torch.no_grad():
        layer.router.weight.copy_(weights.router_ED)
        for slot in range(num_local):
            expert = layer.experts.local_experts[slot]
            expert.linear_fc1.weight.copy_(weights.w_in_eDF[slot].T)
            expert.linear_fc2.weight.copy_(weights.w_out_eFD[slot].T)
    return MegatronLayer(layer, case, f"dropless, {case.activation}", version)


def build_moe(case: Case) -> nn.Module:
    """Builds Megatron-Core's layer with its own initial weights."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = case.shape
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 reads it, but defines it only with Transformer Engine
        moe_utils.te_general_gemm = None
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=case.ranks)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.d_model,
        num_attention_heads=1,
        ffn_hidden_size=shape.hidden,
        moe_ffn_hidden_size=shape.hidden,
        num_moe_experts=shape.num_experts,
        moe_router_topk=shape.k,
        moe_router_pre_softmax=shape.k == 1,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=case.ranks,
        gated_linear_unit=case.activation == "swiglu",
        activation_func=F.silu if case.activation == "swiglu" else F.gelu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        params_dtype=case.dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        bf16=case.dtype == torch.bfloat16,
    )
    # Transformer Engine needs CUDA; without it Megatron-Core computes one expert after the other.
    spec = get_moe_module_spec(use_te=False, num_experts=shape.num_experts, moe_grouped_gemm=False)
    return MoELayer(config, spec.submodules)
