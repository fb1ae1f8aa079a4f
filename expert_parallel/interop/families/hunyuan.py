"""Defines Hunyuan-A13B: norms after rotary positions, and a shared expert as large as each routed one."""

from dataclasses import dataclass
from typing import Any

from expert_parallel.interop.families.common import attention, common_rules, dense, experts, head_rules, outside_blocks
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.rope_variants import StretchedRope
from expert_parallel.interop.rules import Const, Copy, CopyInt, HeadSize, Require, get_setting, set_setting
from expert_parallel.interop.tensor_map import IDENTITY, TensorMapping


def entry_of_all_blocks(theirs: HuggingFaceConfig, key: str, count: int, default: Any = None) -> Any:
    """Returns the value of a key, which may be a list of the same integer for each of `count` blocks."""
    value = theirs.take(key, default=default)
    if not isinstance(value, list):
        return value
    if len(value) != count or any(type(entry) is not int or entry != value[0] for entry in value):
        raise theirs.refuse(key, f"it must list the same integer for each of {count} blocks")
    return value[0]


@dataclass(frozen=True)
class ExpertsOfAllBlocks:
    """Translates the numbers of chosen and shared experts and their hidden size, which may be lists by block.

    transformers takes the hidden size of all of them from intermediate_size, and one shared expert.
    """

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        count, hidden = ours["num_layers"], theirs.size("intermediate_size")
        k = entry_of_all_blocks(theirs, "moe_topk", count)
        if k is None:
            k = theirs.size("num_experts_per_tok", default=1)
        if type(k) is not int or k < 1:
            raise theirs.refuse("moe_topk", "it must be an integer of at least 1")
        for key, value in (("num_shared_expert", 1), ("moe_intermediate_size", hidden)):
            if entry_of_all_blocks(theirs, key, count, value) != value:
                raise theirs.refuse(key, f"only {value} is supported, as in transformers")
        set_setting(ours, "moe.router", {"kind": "top_k", "k": k, "normalise": True})
        set_setting(ours, "moe.experts.hidden", hidden)
        set_setting(ours, "moe.shared_experts", {"hidden": hidden, "activation": "swiglu"})

    def write(self, ours: Tree, theirs: Tree) -> None:
        theirs |= {"moe_topk": get_setting(ours, "moe.router.k"), "num_shared_expert": 1}
        theirs["intermediate_size"] = theirs["moe_intermediate_size"] = get_setting(ours, "moe.experts.hidden")


@dataclass(frozen=True)
class NormAfterRope:
    """Enables norms of each query and key after rotary positions, with the epsilon of the other norms."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        norm = {"kind": "per_head", "eps": get_setting(ours, "norm.eps"), "after_rope": True}
        set_setting(ours, "attention.qk_norm", norm)
        size = get_setting(ours, "attention.head_size")
        if theirs.take("attention_head_dim", default=size) != size:
            raise theirs.refuse("attention_head_dim", f"it must be head_dim ({size})")

    def write(self, ours: Tree, theirs: Tree) -> None:
        pass


def hunyuan_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of Hunyuan-A13B."""
    here, there = "blocks.{L}.attention", "model.layers.{L}.self_attn"
    norms = [
        TensorMapping(f"{here}.{name}_norm.weight", (f"{there}.{name}_layernorm.weight",), IDENTITY)
        for name in ("query", "key")
    ]
    return [
        *outside_blocks(),
        *(mapping for mapping in attention() if "_norm." not in mapping.ours),
        *norms,
        *experts("model.layers.{L}.mlp", "gate_proj", "up_proj", "down_proj", router="gate.wg"),
        *dense("blocks.{L}.moe.shared_experts", "model.layers.{L}.mlp.shared_mlp"),
    ]


# Keys of released files that belong to other models of the same code.
GROUPS = ("n_group", "topk_group", "routed_scaling_factor")
LATENTS = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
CLASSIFIER = ("add_classification_head", "class_num", "dense_list", "pool_type", "skip_cls_token")
TOKENS = (
    *("pad_id", "mask_init_id", "im_start_id", "im_end_id", "im_newline_id", "text_start_id", "text_end_id"),
    *("video_start_id", "video_end_id", "num_media_embeds", "org_vocab_size"),
)

FAMILIES = {
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1ForCausalLM",
        (
            *common_rules(eps=1e-5, dropouts=(0.1,)),
            *head_rules(None),
            HeadSize(),
            StretchedRope(),
            Copy("attention_bias", "attention.bias", False),
            NormAfterRope(),
            CopyInt(("num_experts", "num_local_experts"), "moe.num_experts"),
            ExpertsOfAllBlocks(),
            Const("moe.losses", []),
            Require("use_mixed_mlp_moe", True),  # shared experts
            Require("moe_layer_num_skipped", 0),  # dense blocks
            Require("norm_topk_prob", True),
            Require("group_limited_greedy", False),
            Require("use_qk_norm", True),
            Require("use_cla", False),  # blocks that share keys and values
            Require("use_mla", False),
            Require("use_rotary_pos_emb", True),
            Require("position_embedding_xdrope", False),
            Require("mlp_bias", False),
            Require("norm_type", "rms", also=("hf_rms", "fused")),
            Require("vit_type", None),
            Require("vit_path", None),
        ),
        hunyuan_tensor_map,
        neutral={
            "cla_share_factor": "of blocks that share keys and values, which there are none of",
            **dict.fromkeys(GROUPS, "of topk_method group_limited_greedy, which there is none of"),
            **dict.fromkeys(LATENTS, "of latent attention, which there is none of (use_mla)"),
            "xdrope_section": "of position_embedding_xdrope, which is refused",
            **dict.fromkeys(("moe_drop_tokens", "moe_random_routing_dropped_token"), "the capacity of training"),
            **dict.fromkeys(CLASSIFIER, "of classifiers, which are other models"),
            **dict.fromkeys(TOKENS, "an id or a count of tokens; the embedding has vocab_size rows"),
        },
    ),
}
