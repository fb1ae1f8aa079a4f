"""Defines MiniMax-M2: Mixtral's experts under a sigmoid router, partly rotary heads, norms of all heads together."""

from dataclasses import dataclass

from expert_parallel.interop.balance_loss import LogitBalanceLoss
from expert_parallel.interop.families.common import (
    attention,
    balance_bias,
    common_rules,
    experts,
    head_rules,
    outside_blocks,
    sigmoid_router_rules,
    swiglu_expert_rules,
)
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Const, HeadSize, QKNorm, Require
from expert_parallel.interop.tensor_map import TensorMapping


@dataclass(frozen=True)
class FullAttention:
    """Accepts attn_type_list only if it lists 1, softmax attention, for every block: 0 is MiniMax-01's linear one."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        full = [1] * ours["num_layers"]
        if theirs.take("attn_type_list", default=full) != full:
            raise theirs.refuse("attn_type_list", f"it must list 1 for each of {len(full)} blocks")

    def write(self, ours: Tree, theirs: Tree) -> None:
        pass


def num_mtp_layers(theirs: HuggingFaceConfig) -> int:
    """Returns the number of layers of multi-token prediction, whose tensors follow those of the other layers."""
    modules: int = theirs.size("num_mtp_modules", default=0, least=0)
    return modules * int(theirs.size("mtp_transformer_layers", default=1, least=0))


def minimax_m2_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of MiniMax-M2."""
    there = "model.layers.{L}.block_sparse_moe"
    return [
        *outside_blocks(),
        *attention(),
        *experts(there, "w1", "w3", "w2"),
        balance_bias(f"{there}.e_score_correction_bias"),
    ]


FAMILIES = {
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        (
            *common_rules(eps=1e-6),
            *head_rules(),
            HeadSize(default=128),
            Rope(default_theta=5e6, partial=1.0, size_key="rotary_dim"),
            QKNorm("whole"),
            Require("use_qk_norm", True),
            Require("qk_norm_type", "per_layer"),
            Require("attention_bias", False),
            Require("sliding_window", None),
            FullAttention(),
            *swiglu_expert_rules(("num_local_experts", "num_experts"), "intermediate_size"),
            *sigmoid_router_rules(),
            Const("moe.router.normalise", True),
            Require("use_routing_bias", True),
            Require("router_jitter_noise", 0.0),
            Require("shared_intermediate_size", 0),
            LogitBalanceLoss(),
            # Factors of the residual branches of MiniMax-01.
            Require("layernorm_full_attention_beta", 1.0),
            Require("layernorm_linear_attention_beta", 1.0),
            Require("layernorm_mlp_beta", 1.0),
        ),
        minimax_m2_tensor_map,
        # Of shared experts and dense blocks, which there are none of, and of multi-token prediction.
        neutral={
            "shared_moe_mode": "of shared experts, which there are none of",
            "mlp_intermediate_size": "the width of dense blocks, which there are none of",
            **dict.fromkeys(("use_mtp", "num_mtp_modules", "mtp_transformer_layers"), "of multi-token prediction"),
        },
        num_mtp_layers=num_mtp_layers,
    ),
}
