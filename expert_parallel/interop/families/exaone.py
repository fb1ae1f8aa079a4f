"""Defines K-EXAONE: rotary positions in blocks with a window alone, norms per head, the experts of DeepSeek."""

from dataclasses import dataclass

from expert_parallel.interop.block_rules import LayerTypes
from expert_parallel.interop.families.common import (
    DENSE,
    EXPERTS,
    attention,
    balance_bias,
    common_rules,
    dense,
    head_rules,
    outside_blocks,
    sigmoid_router_rules,
    swiglu_expert_rules,
)
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.ignored_tensors import MTP
from expert_parallel.interop.moe_rules import GroupLimit, MLPLayerTypes, SharedExperts
from expert_parallel.interop.neutral_keys import MTP_KEYS
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Const, Copy, DenseHidden, HeadSize, QKNorm, Require, get_setting, set_setting
from expert_parallel.interop.tensor_map import TensorMapping


def all_but_every_nth(theirs: HuggingFaceConfig, num_layers: int) -> list[bool]:
    """Returns which blocks have a window: all but every n-th, n being sliding_window_pattern.

    If there is layer_types, it decides, and sliding_window_pattern may have any other form, such as LLLG.
    """
    theirs.take("sliding_window_pattern", default=None)
    if theirs.values.get("layer_types") is not None:
        return []
    n = theirs.size("sliding_window_pattern", default=4)
    return [(layer + 1) % n != 0 for layer in range(num_layers)]


@dataclass(frozen=True)
class RopeInWindows:
    """Gives the blocks with a window rotary positions, and the others none. Comes after the rules of windows and
    positions."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        if "window_blocks" not in ours:
            raise theirs.refuse("layer_types", "no block has a sliding window, and so none has positions")
        set_setting(ours, "rope_blocks", get_setting(ours, "window_blocks"))

    def write(self, ours: Tree, theirs: Tree) -> None:
        pass


def exaone_moe_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of K-EXAONE."""
    there = "model.layers.{L}.mlp"
    return [
        *outside_blocks(),
        *attention(),
        *DENSE,
        *EXPERTS,
        *dense("blocks.{L}.moe.shared_experts", f"{there}.shared_experts"),
        balance_bias(f"{there}.e_score_correction_bias"),
    ]


FAMILIES = {
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM",
        (
            *common_rules(eps=1e-5),
            *head_rules(32),
            HeadSize(),
            Rope(),
            QKNorm("per_head"),
            LayerTypes(4096, all_but_every_nth),
            RopeInWindows(),
            *swiglu_expert_rules(("num_experts", "num_local_experts"), "moe_intermediate_size"),
            *sigmoid_router_rules(),
            Copy("norm_topk_prob", "moe.router.normalise", True),
            Copy("routed_scaling_factor", "moe.router.scale", 2.5),
            Const("moe.losses", []),
            GroupLimit(1),
            SharedExperts("num_shared_experts"),
            MLPLayerTypes(reads_first=True, flags="is_moe_layer"),
            DenseHidden(),
            Require("topk_method", "noaux_tc"),
        ),
        exaone_moe_tensor_map,
        neutral=MTP_KEYS
        | {
            "mtp_share_layers": "whether layers of multi-token prediction share their weights",
            "mtp_loss_scaling_factor": "the weight of their loss in training",
        },
        set_aside={r"mtp\.": MTP},
    ),
}
