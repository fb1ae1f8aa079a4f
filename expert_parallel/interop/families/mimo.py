"""Defines MiMo-V2-Flash: blocks with a window have sinks, twice the key heads, and rotary positions of their own."""

from dataclasses import dataclass

from expert_parallel.interop.block_rules import RopeByKind
from expert_parallel.interop.families.common import (
    DENSE,
    EXPERTS,
    attention,
    balance_bias,
    common_rules,
    head_rules,
    outside_blocks,
    sigmoid_router_rules,
    swiglu_expert_rules,
)
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.ignored_tensors import MTP
from expert_parallel.interop.moe_rules import GroupLimit, MLPLayerTypes
from expert_parallel.interop.rules import (
    WINDOWED,
    Const,
    Copy,
    CopyInt,
    DenseHidden,
    HeadSize,
    Require,
    get_setting,
    layer_types,
    read_layer_types,
    set_setting,
)
from expert_parallel.interop.tensor_map import IDENTITY, TensorMapping

# Keys of the released files that repeat a value which others give: they must agree. Exports write them.
REPEATED = {
    "layernorm_epsilon": "norm.eps",
    "swa_num_attention_heads": "attention.num_heads",
    "swa_head_dim": "attention.head_size",
    "swa_v_head_dim": "attention.value_size",
}


@dataclass(frozen=True)
class Repeated:
    """Accepts the keys of REPEATED if they agree with the settings that earlier rules have set."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        for key, path in REPEATED.items():
            value = get_setting(ours, path)
            if theirs.take(key, default=value) != value:
                raise theirs.refuse(key, f"it must be {value}, as in the other blocks")

    def write(self, ours: Tree, theirs: Tree) -> None:
        theirs |= {key: get_setting(ours, path) for key, path in REPEATED.items()}


@dataclass(frozen=True)
class NullIsOne(Copy):
    """Copies a factor, for which null stands for 1."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        value = theirs.take(*self.names, default=self.default)
        set_setting(ours, self.path, 1.0 if value is None else value)


@dataclass(frozen=True)
class WindowBlocks:
    """Gives some blocks a window, sinks and twice the key heads. Comes after the rules of heads.

    layer_types lists them or, in the released files, hybrid_layer_pattern with 1; by default all but the first and
    every sixth one. There, sliding_window_size is the number of tokens before a query's own that it attends to.
    """

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        count, kv_heads = ours["num_layers"], get_setting(ours, "attention.num_kv_heads")
        before = theirs.size("sliding_window_size", default=None, least=0)
        size = theirs.size("sliding_window", default=129 if before is None else before + 1)
        if before is not None and size not in (before, before + 1):
            raise theirs.refuse("sliding_window", f"it must be sliding_window_size ({before}), or one more")
        if theirs.take("attention_chunk_size", default=before) != before:
            raise theirs.refuse("attention_chunk_size", f"it must be sliding_window_size ({before})")
        pattern = theirs.take("hybrid_layer_pattern", default=None)
        usual = [layer > 0 and (layer + 1) % 6 != 0 for layer in range(count)]
        if pattern is not None:
            if not isinstance(pattern, list) or len(pattern) != count or any(one not in (0, 1) for one in pattern):
                raise theirs.refuse("hybrid_layer_pattern", f"it must list {count} of 0 (full) or 1 (a window)")
            usual = [one == 1 for one in pattern]
        read_layer_types(theirs, ours, usual, size if before is None else before + 1)
        kinds = theirs.values.get("layer_types")
        if pattern is not None and kinds is not None and [kind == WINDOWED for kind in kinds] != usual:
            raise theirs.refuse("hybrid_layer_pattern", "it must agree with layer_types")
        if get_setting(ours, "window_blocks.kind") == "all":
            raise theirs.refuse("layer_types", "all blocks have a window: only models with both kinds are supported")
        if theirs.size("swa_num_key_value_heads", default=2 * kv_heads) != 2 * kv_heads:
            raise theirs.refuse("swa_num_key_value_heads", f"it must be twice num_key_value_heads ({kv_heads})")
        if "window_blocks" in ours:
            set_setting(ours, "window_overrides", {"num_kv_heads": 2 * kv_heads, "sinks": True})

    def write(self, ours: Tree, theirs: Tree) -> None:
        kinds, size = layer_types(ours), get_setting(ours, "attention.window")
        theirs |= {"layer_types": kinds, "hybrid_layer_pattern": [int(kind == WINDOWED) for kind in kinds]}
        if (kv_heads := get_setting(ours, "attention.num_kv_heads")) is not None:  # None: latent attention
            theirs["swa_num_key_value_heads"] = 2 * kv_heads
        if size is not None:
            theirs |= {"sliding_window": size, "sliding_window_size": size - 1}


def mimo_v2_flash_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of MiMo-V2-Flash."""
    sinks = TensorMapping("blocks.{L}.attention.sinks", ("model.layers.{L}.self_attn.attention_sink_bias",), IDENTITY)
    others = [mapping for mapping in attention() if mapping.ours != sinks.ours]
    bias = balance_bias("model.layers.{L}.mlp.gate.e_score_correction_bias")
    return [*outside_blocks(), *others, sinks, *DENSE, *EXPERTS, bias]


FAMILIES = {
    "mimo_v2_flash": Family(
        "MiMoV2FlashForCausalLM",
        (
            *common_rules(eps=1e-5),
            *head_rules(4),
            HeadSize(default=192),
            CopyInt("v_head_dim", "attention.value_size", 128),
            NullIsOne("attention_value_scale", "attention.value_scale", 0.707),
            Copy("attention_bias", "attention.bias", False),
            Const("attention.out_bias", False),
            Repeated(),
            WindowBlocks(),
            RopeByKind((5e6, 1e4), keys=("rope_theta", "swa_rope_theta"), partial=0.334),
            Require("add_swa_attention_sink_bias", True, written=True),
            Require("add_full_attention_sink_bias", False, written=True),
            Require("hybrid_block_size", None),
            *swiglu_expert_rules(("n_routed_experts", "num_local_experts"), "moe_intermediate_size"),
            *sigmoid_router_rules(),
            Copy("norm_topk_prob", "moe.router.normalise", True),
            NullIsOne("routed_scaling_factor", "moe.router.scale", 1.0),
            Const("moe.losses", []),
            GroupLimit(1),
            Require("n_shared_experts", None, also=(0,)),
            Require("topk_method", "noaux_tc"),
            MLPLayerTypes(flags="moe_layer_freq"),
            DenseHidden(),
        ),
        mimo_v2_flash_tensor_map,
        set_aside={r"model\.mtp\.": MTP},
    ),
}
