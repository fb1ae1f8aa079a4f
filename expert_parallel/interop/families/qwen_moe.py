"""Defines Qwen3-MoE and OLMoE."""

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
from expert_parallel.interop.rules import Copy, DenseHidden, HeadSize, QKNorm, Require, SlidingWindow, SparseStep
from expert_parallel.interop.tensor_map import TensorMapping


def qwen3_moe_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of Qwen3-MoE and OLMoE."""
    return [*outside_blocks(), *attention(), *DENSE, *EXPERTS]


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
}
