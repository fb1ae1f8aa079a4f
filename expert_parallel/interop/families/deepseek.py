"""Defines DeepSeek-V3, Kimi K2 of the same architecture, and A.X-K1 with one more norm: latent attention, expert
groups, shared experts."""

from dataclasses import dataclass, replace

from expert_parallel.interop.families.common import (
    DEEPSEEK_EXPERTS,
    DENSE,
    common_rules,
    deepseek_expert_rules,
    outside_blocks,
)
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import REQUIRED, HuggingFaceConfig, Tree
from expert_parallel.interop.ignored_tensors import UNUSED
from expert_parallel.interop.moe_rules import MLPLayerTypes
from expert_parallel.interop.neutral_keys import MTP_KEYS
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Const, DenseHidden, FirstDense, Require, get_setting, set_setting
from expert_parallel.interop.tensor_map import IDENTITY, TensorMapping, half_split_rows


@dataclass(frozen=True)
class LatentHeads:
    """Translates the sizes of multi-head latent attention, in which every head has its own keys and values.

    head_dim_is_whole: head_dim counts all columns of a key, not the rotary ones alone.
    """

    head_dim_is_whole: bool = False

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        count = theirs.size("num_attention_heads")
        if theirs.take("num_key_value_heads", default=None) not in (None, count):
            raise theirs.refuse("num_key_value_heads", f"it must be num_attention_heads ({count})")
        set_setting(ours, "attention", {"kind": "latent", "num_heads": count})
        for key, path in LATENT_SIZES.items():
            set_setting(ours, path, theirs.size(key, default=None if key == "q_lora_rank" else REQUIRED))
        rope, nope = (get_setting(ours, f"attention.{size}") for size in ("rope_size", "nope_size"))
        for key, value in (("head_dim", rope + nope if self.head_dim_is_whole else rope), ("qk_head_dim", rope + nope)):
            if theirs.take(key, default=value) != value:
                raise theirs.refuse(key, f"it must be {value}, as follows from qk_rope_head_dim and qk_nope_head_dim")
        theirs.flag("rope_interleave", default=True)  # only the tensor map uses it
        num_mtp_layers(theirs)

    def write(self, ours: Tree, theirs: Tree) -> None:
        theirs |= {key: get_setting(ours, path) for key, path in LATENT_SIZES.items()}
        theirs["num_attention_heads"] = theirs["num_key_value_heads"] = get_setting(ours, "attention.num_heads")


LATENT_SIZES = {
    "q_lora_rank": "attention.query_rank",
    "kv_lora_rank": "attention.kv_rank",
    "qk_nope_head_dim": "attention.nope_size",
    "qk_rope_head_dim": "attention.rope_size",
    "v_head_dim": "attention.value_size",
}


def num_mtp_layers(theirs: HuggingFaceConfig) -> int:
    """Returns the number of layers of multi-token prediction, whose tensors follow those of the other layers."""
    count: int = theirs.size("num_nextn_predict_layers", "num_mtp_layers", default=1, least=0)
    return count


def latent_attention(config: Tree) -> list[TensorMapping]:
    """Returns the mappings of latent attention. rope_interleave: rotary rows are interleaved in the files (the
    default)."""
    here, there = "blocks.{L}.attention", "model.layers.{L}.self_attn"
    nope, rope, kv_rank = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank"))
    interleaved = config.get("rope_interleave", True)
    query = half_split_rows(nope + rope, rope) if interleaved else IDENTITY
    key = half_split_rows(kv_rank + rope, rope) if interleaved else IDENTITY
    tensor_map = []
    for own, their, transform in (
        ("query", "q_proj", query),
        ("query_down", "q_a_proj", IDENTITY),
        ("query_norm", "q_a_layernorm", IDENTITY),
        ("query_up", "q_b_proj", query),
        ("kv_down", "kv_a_proj_with_mqa", key),
        ("kv_norm", "kv_a_layernorm", IDENTITY),
        ("kv_up", "kv_b_proj", IDENTITY),
        ("out", "o_proj", IDENTITY),
    ):
        tensor_map += [
            TensorMapping(f"{here}.{own}.{leaf}", (f"{there}.{their}.{leaf}",), transform)
            for leaf in ("weight", "bias")
        ]
    return tensor_map


def deepseek_v3_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of DeepSeek-V3."""
    return [*outside_blocks(), *DENSE, *DEEPSEEK_EXPERTS, *latent_attention(config)]


DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM",
    (
        *common_rules(),
        LatentHeads(),
        Rope(),
        Require("attention_bias", False),
        *deepseek_expert_rules(normalise=True, scale=2.5),
        FirstDense(),
        DenseHidden(),
    ),
    deepseek_v3_tensor_map,
    neutral=MTP_KEYS | {"ep_size": "the layout of inference"},
    num_mtp_layers=num_mtp_layers,
    imports_mtp=True,
)


def axk1_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of A.X-K1, DeepSeek-V3 with a norm behind the experts."""
    output_norm = ("model.layers.{L}.post_mlp_layernorm.weight",)
    return [
        *deepseek_v3_tensor_map(config),
        TensorMapping("blocks.{L}.ffn_output_norm.weight", output_norm, IDENTITY),
    ]


AXK1 = Family(
    "AXK1ForCausalLM",
    (
        *common_rules(eps=1e-6),
        LatentHeads(),
        Rope(),
        Require("attention_bias", False),
        Const("moe_output_norm", True),
        *deepseek_expert_rules(normalise=True, scale=2.5),
        MLPLayerTypes(reads_first=True),
        DenseHidden(),
    ),
    axk1_tensor_map,
    neutral=MTP_KEYS | {"ep_size": "the layout of inference"},
    num_mtp_layers=num_mtp_layers,
    # Released files have the norm in dense layers, too, which do not use it, and no selection biases.
    set_aside={r"model\.layers\.\d+\.post_mlp_layernorm\.": UNUSED},
    zeros=("router.balance_bias_E",),
)
# Kimi K2 has DeepSeek-V3's class in code of its folder, which is never run: transformers loads it by the other name.
FAMILIES = {
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": replace(DEEPSEEK_V3, exported_as="deepseek_v3"),
    "axk1": AXK1,
}
