"""Defines Hy3: the attention of Qwen3, a sigmoid router, shared experts."""

from expert_parallel.interop.families.common import (
    DENSE,
    attention,
    balance_bias,
    common_rules,
    dense,
    experts,
    head_rules,
    outside_blocks,
    sigmoid_router_rules,
    swiglu_expert_rules,
)
from expert_parallel.interop.families.deepseek import num_mtp_layers
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import Tree
from expert_parallel.interop.moe_rules import MLPLayerTypes, SharedExperts
from expert_parallel.interop.neutral_keys import MTP_KEYS
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Const, Copy, DenseHidden, HeadSize, QKNorm, Require
from expert_parallel.interop.tensor_map import TensorMapping


def hy_v3_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of Hy3."""
    there = "model.layers.{L}.mlp"
    return [
        *outside_blocks(),
        *attention(),
        *DENSE,
        *experts(there, "gate_proj", "up_proj", "down_proj", router="router.gate"),
        *dense("blocks.{L}.moe.shared_experts", f"{there}.shared_mlp"),
        balance_bias(f"{there}.expert_bias"),
    ]


IN_FLOAT32 = ("enable_moe_fp32_combine", "enable_lm_head_fp32", "enable_attention_fp32_softmax")

FAMILIES = {
    "hy_v3": Family(
        "HYV3ForCausalLM",
        (
            *common_rules(eps=1e-5),
            *head_rules(),
            HeadSize(default=128),
            Rope(default_theta=11_158_840.0),
            Copy("attention_bias", "attention.bias", False),
            QKNorm("per_head"),
            Require("qk_norm", True),
            *swiglu_expert_rules(("num_experts", "num_local_experts"), ("moe_intermediate_size", "expert_hidden_dim")),
            *sigmoid_router_rules(),
            Const("moe.router.normalise", True),
            Copy("router_scaling_factor", "moe.router.scale", 2.826),
            Const("moe.losses", []),
            Require("moe_router_use_sigmoid", True),
            Require("moe_router_enable_expert_bias", True),
            Require("route_norm", True),
            SharedExperts("num_shared_experts"),
            MLPLayerTypes(),
            DenseHidden(),
            Require("mlp_bias", False),
        ),
        hy_v3_tensor_map,
        neutral=MTP_KEYS | dict.fromkeys(IN_FLOAT32, "how sums are rounded in 16 bits: the same numbers in float32"),
        num_mtp_layers=num_mtp_layers,
    ),
}
