"""Defines Granite MoE, without and with shared experts: multipliers, and experts in stacks."""

from dataclasses import dataclass

from expert_parallel.interop.balance_loss import PooledBalanceLoss
from expert_parallel.interop.families.common import (
    attention,
    common_rules,
    head_rules,
    outside_blocks,
    swiglu_expert_rules,
)
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Copy, HeadSize, Rule, get_setting, set_setting
from expert_parallel.interop.tensor_map import IDENTITY, STACKED_TRANSPOSED, TensorMapping


@dataclass(frozen=True)
class SharedHidden:
    """Translates the hidden size of the shared experts; 0 stands for none."""

    key: str = "shared_intermediate_size"

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        if hidden := theirs.size(self.key, default=0, least=0):
            set_setting(ours, "moe.shared_experts", {"hidden": hidden, "activation": "swiglu"})

    def write(self, ours: Tree, theirs: Tree) -> None:
        theirs[self.key] = get_setting(ours, "moe.shared_experts.hidden") or 0


def granite_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of Granite MoE. Its stacks are (E, 2 F, D), [gate; up], and (E, D, F)."""
    here, there, shared = "blocks.{L}.moe", "model.layers.{L}.block_sparse_moe", "model.layers.{L}.shared_mlp"
    names = {
        f"{here}.router.weight": (f"{there}.router.layer.weight", IDENTITY),
        f"{here}.experts.{{E}}.w_in": (f"{there}.input_linear.weight", STACKED_TRANSPOSED),
        f"{here}.experts.{{E}}.w_out": (f"{there}.output_linear.weight", STACKED_TRANSPOSED),
        f"{here}.shared_experts.w_in.weight": (f"{shared}.input_linear.weight", IDENTITY),
        f"{here}.shared_experts.w_out.weight": (f"{shared}.output_linear.weight", IDENTITY),
    }
    experts = [TensorMapping(ours, (theirs,), transform) for ours, (theirs, transform) in names.items()]
    return [*outside_blocks(), *attention(), *experts]


def granite_rules() -> list[Rule]:
    """Returns the rules of both families."""
    return [
        *common_rules(eps=1e-6),
        *head_rules(None),
        HeadSize(),
        Rope(),
        Copy("attention_bias", "attention.bias", False),
        Copy("attention_multiplier", "attention.scale", 1.0),
        Copy("embedding_multiplier", "embedding_multiplier", 1.0),
        Copy("residual_multiplier", "residual_multiplier", 1.0),
        Copy("logits_scaling", "logits_divisor", 1.0),
        *swiglu_expert_rules(("num_local_experts", "num_experts"), "intermediate_size"),
        PooledBalanceLoss(),
    ]


FAMILIES = {
    "granitemoe": Family("GraniteMoeForCausalLM", tuple(granite_rules()), granite_tensor_map),
    "granitemoeshared": Family("GraniteMoeSharedForCausalLM", (*granite_rules(), SharedHidden()), granite_tensor_map),
}
