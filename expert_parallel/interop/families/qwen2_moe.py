"""Defines Qwen2-MoE: a shared expert with a gate."""

from dataclasses import dataclass

from expert_parallel.interop.balance_loss import PooledBalanceLoss
from expert_parallel.interop.families.common import common_rules, dense, head_rules, swiglu_expert_rules
from expert_parallel.interop.families.qwen_moe import qwen3_moe_tensor_map
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import (
    Const,
    Copy,
    DenseHidden,
    HeadSize,
    SlidingWindowByLayer,
    SparseStep,
    get_setting,
    set_setting,
)
from expert_parallel.interop.tensor_map import IDENTITY, TensorMapping


@dataclass(frozen=True)
class GatedSharedExpert:
    """Translates the hidden size of the shared expert of Qwen2-MoE, whose output a gate multiplies."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        hidden = theirs.size("shared_expert_intermediate_size", default=5632)
        set_setting(ours, "moe.shared_experts", {"hidden": hidden, "activation": "swiglu"})
        set_setting(ours, "moe.shared_expert_gate", True)

    def write(self, ours: Tree, theirs: Tree) -> None:
        theirs["shared_expert_intermediate_size"] = get_setting(ours, "moe.shared_experts.hidden")


def qwen2_moe_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of Qwen2-MoE."""
    gate = "model.layers.{L}.mlp.shared_expert_gate.weight"
    return [
        *qwen3_moe_tensor_map(config),
        *dense("blocks.{L}.moe.shared_experts", "model.layers.{L}.mlp.shared_expert"),
        TensorMapping("blocks.{L}.moe.shared_expert_gate.weight", (gate,), IDENTITY),
    ]


FAMILIES = {
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        (
            *common_rules(eps=1e-6),
            *head_rules(),
            HeadSize(),
            Rope(),
            Copy("qkv_bias", "attention.bias", True),
            Const("attention.out_bias", False),
            *swiglu_expert_rules(("num_experts", "num_local_experts"), "moe_intermediate_size"),
            Copy("norm_topk_prob", "moe.router.normalise", False),
            PooledBalanceLoss(),
            SparseStep(),
            DenseHidden(),
            GatedSharedExpert(),
            SlidingWindowByLayer("use_sliding_window", first=28, is_listed=True),
        ),
        qwen2_moe_tensor_map,
    ),
}
