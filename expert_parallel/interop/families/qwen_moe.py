"""Defines Qwen3-MoE, OLMoE and FlexOlmo."""

from expert_parallel.interop.balance_loss import PooledBalanceLoss
from expert_parallel.interop.families.common import (
    DENSE,
    EXPERTS,
    attention,
    common_rules,
    head_rules,
    outside_blocks,
    swiglu_expert_rules,
)
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import Tree
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Const, Copy, DenseHidden, HeadSize, QKNorm, Require, SlidingWindow, SparseStep
from expert_parallel.interop.tensor_map import IDENTITY, TensorMapping


def qwen3_moe_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of Qwen3-MoE and OLMoE."""
    return [*outside_blocks(), *attention(), *DENSE, *EXPERTS]


def flex_olmo_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of FlexOlmo, whose norms are those of the branches' outputs."""
    norms = {"attention_output_norm": "post_attention_layernorm", "ffn_output_norm": "post_feedforward_layernorm"}
    branches = [
        TensorMapping(f"blocks.{{L}}.{own}.weight", (f"model.layers.{{L}}.{their}.weight",), IDENTITY)
        for own, their in norms.items()
    ]
    return [*outside_blocks(), *branches, *attention(), *EXPERTS]


FAMILIES = {
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        (
            *common_rules(),
            *head_rules(),
            HeadSize(),
            Rope(),
            Copy("attention_bias", "attention.bias", False),
            QKNorm("per_head"),
            *swiglu_expert_rules(("num_experts", "num_local_experts"), "moe_intermediate_size"),
            Copy("norm_topk_prob", "moe.router.normalise", False),
            PooledBalanceLoss(),
            SparseStep(),
            DenseHidden(),
            SlidingWindow("use_sliding_window"),
            Require("qkv_bias", False),
            Require("use_qk_norm", True),
            Require("shared_expert_intermediate_size", 0),
        ),
        qwen3_moe_tensor_map,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        (
            *common_rules(),
            *head_rules(None),
            HeadSize(is_free=False),
            Rope(),
            Copy("attention_bias", "attention.bias", False),
            QKNorm("whole"),
            Require("clip_qkv", None),
            *swiglu_expert_rules(("num_experts", "num_local_experts"), "intermediate_size"),
            Copy("norm_topk_prob", "moe.router.normalise", False),
            PooledBalanceLoss(default=0.01),
        ),
        qwen3_moe_tensor_map,
    ),
    "flex_olmo": Family(
        "FlexOlmoForCausalLM",
        (
            *common_rules(eps=1e-6),
            *head_rules(None),
            HeadSize(),
            Rope(default_theta=500_000.0),
            Copy("attention_bias", "attention.bias", False),
            QKNorm("whole"),
            Const("norm_placement", "branch"),
            *swiglu_expert_rules(("num_experts", "num_local_experts"), "intermediate_size"),
            Copy("norm_topk_prob", "moe.router.normalise", False),
            PooledBalanceLoss(default=0.01),
        ),
        flex_olmo_tensor_map,
    ),
}
