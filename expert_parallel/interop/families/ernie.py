"""Defines ERNIE 4.5 MoE: biases of all but the routed experts, interleaved rotary positions, a selection bias."""

from dataclasses import dataclass

from expert_parallel.interop.balance_loss import PooledBalanceLoss
from expert_parallel.interop.families.common import (
    DENSE,
    EXPERTS,
    attention,
    common_rules,
    dense,
    head_rules,
    outside_blocks,
)
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.ignored_tensors import MTP
from expert_parallel.interop.moe_rules import SharedExperts
from expert_parallel.interop.neutral_keys import MTP_KEYS
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Const, CopyInt, DenseHidden, HeadSize, Require, get_setting, set_setting
from expert_parallel.interop.tensor_map import SINGLE_ROW, TensorMapping, half_split_rows

BIASES = ("attention.bias", "unembedding_bias", "ffn.bias", "moe.shared_experts.bias")


@dataclass(frozen=True)
class MoERange:
    """Places MoE blocks in every moe_layer_interval-th block from moe_layer_start_index to moe_layer_end_index; an end
    of -1, as in released files, or none stands for the last block."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        count = ours["num_layers"]
        interval, start = theirs.size("moe_layer_interval", default=1), theirs.size("moe_layer_start_index", least=0)
        end = theirs.take("moe_layer_end_index", default=None)
        last = count - 1 if end in (-1, None) else theirs.size("moe_layer_end_index", least=0)
        blocks = [layer for layer in range(start, min(last + 1, count)) if (layer + 1) % interval == 0]
        if blocks == list(range(count)):
            set_setting(ours, "moe_blocks", {"kind": "all"})
        elif blocks == list(range(start, count)):
            set_setting(ours, "moe_blocks", {"kind": "all_but_first", "k": start})
        else:
            set_setting(ours, "moe_blocks", {"kind": "list", "indices": blocks})

    def write(self, ours: Tree, theirs: Tree) -> None:
        blocks = ours["moe_layers"] or [ours["num_layers"]]
        interval = blocks[1] - blocks[0] if len(blocks) > 1 else 1
        theirs |= {"moe_layer_start_index": blocks[0], "moe_layer_end_index": blocks[-1]}
        theirs["moe_layer_interval"] = interval


@dataclass(frozen=True)
class UseBias:
    """Translates use_bias to the biases of attention, the logits, dense networks and shared experts. It comes after the
    rules of these."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        has_bias = theirs.flag("use_bias", default=False)
        for path in BIASES:
            block = path.rpartition(".")[0]
            if not block or get_setting(ours, block) is not None:
                set_setting(ours, path, has_bias)

    def write(self, ours: Tree, theirs: Tree) -> None:
        theirs["use_bias"] = get_setting(ours, BIASES[0])


def ernie_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of ERNIE 4.5 MoE. Adjacent rows of queries and keys are rotated together."""
    there = "model.layers.{L}.mlp"
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    selection = (f"{there}.moe_statics.e_score_correction_bias",)
    return [
        *outside_blocks(),
        *attention(rotary=half_split_rows(size, size)),
        *DENSE,
        *EXPERTS,
        *dense("blocks.{L}.moe.shared_experts", f"{there}.shared_experts"),
        TensorMapping("blocks.{L}.moe.router.balance_bias_E", selection, SINGLE_ROW),
    ]


FAMILIES = {
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        (
            *common_rules(eps=1e-5, tied=True),
            *head_rules(4),
            HeadSize(),
            Rope(default_theta=500_000.0),
            Const("moe.router.kind", "top_k"),
            CopyInt(("moe_num_experts", "num_experts"), "moe.num_experts"),
            CopyInt(("moe_k", "num_experts_per_tok"), "moe.router.k"),
            CopyInt("moe_intermediate_size", "moe.experts.hidden"),
            Const("moe.router.balance_bias_rate", 0.001),
            PooledBalanceLoss(),
            SharedExperts("moe_num_shared_experts", least=0),
            MoERange(),
            DenseHidden(),
            UseBias(),
            Require("moe_use_aux_free", True),
            Require("moe_gate", "topk"),
            Require("moe_gate_act", "softmax"),
            Require("moe_norm_min", 1e-12),
        ),
        ernie_tensor_map,
        neutral=MTP_KEYS | {"moe_capacity": "the capacity of experts in training"},
        set_aside={r"model\.mtp_": MTP},
    ),
}
