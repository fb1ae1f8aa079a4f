"""Defines the text model of Llama 4: chunks and rotary positions by block, and weights on the input of experts."""

from dataclasses import dataclass

from expert_parallel.interop.families.common import (
    attention,
    common_rules,
    dense,
    head_rules,
    outside_blocks,
    swiglu_expert_rules,
)
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Const, Copy, DenseHidden, HeadSize, Require, get_setting, set_setting
from expert_parallel.interop.tensor_map import IDENTITY, STACKED, TensorMapping, half_split_rows

LAYER_TYPES = ("chunked_attention", "full_attention")


@dataclass(frozen=True)
class PositionsByBlock:
    """Translates no_rope_layers, which lists 1 for blocks with rotary positions, and what follows from them: norms of
    queries and keys there, scaled queries in the others, and chunks, which layer_types may put elsewhere."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        count, every = ours["num_layers"], theirs.size("no_rope_layer_interval", default=4)
        flags = theirs.take("no_rope_layers", default=None)
        if flags is None or flags == []:
            flags = [int((layer + 1) % every != 0) for layer in range(count)]
        if not isinstance(flags, list) or len(flags) != count or any(flag not in (0, 1) for flag in flags):
            raise theirs.refuse("no_rope_layers", f"it must list {count} of 0 or 1")
        blocks = [layer for layer, flag in enumerate(flags) if flag]
        _set_blocks(ours, "rope_blocks", blocks)
        if theirs.flag("use_qk_norm", default=True):
            norm = {"kind": "l2", "eps": get_setting(ours, "norm.eps"), "after_rope": True}
            set_setting(ours, "attention.qk_norm", norm)
        scaling = {"beta": theirs.take("attn_scale", default=0.1), "length": theirs.size("floor_scale", default=8192)}
        if theirs.flag("attn_temperature_tuning", default=True) and scaling["beta"] != 0 and len(blocks) < count:
            set_setting(ours, "attention.length_scaling", {**scaling, "offset": 1, "blocks": "without_rope"})

        chunk = theirs.size("attention_chunk_size", default=8192)
        kinds = theirs.take("layer_types", default=None)
        if kinds is None:
            kinds = [LAYER_TYPES[0] if flag else LAYER_TYPES[1] for flag in flags]
        if not isinstance(kinds, list) or len(kinds) != count or any(kind not in LAYER_TYPES for kind in kinds):
            raise theirs.refuse("layer_types", f"it must list {count} of {' or '.join(LAYER_TYPES)}")
        if chunked := [layer for layer, kind in enumerate(kinds) if kind == LAYER_TYPES[0]]:
            set_setting(ours, "attention.chunk", chunk)
            _set_blocks(ours, "window_blocks", chunked)

    def write(self, ours: Tree, theirs: Tree) -> None:
        count, rope, chunked = ours["num_layers"], ours["rope_layers"], ours["window_layers"]
        scaling = get_setting(ours, "attention.length_scaling")
        theirs |= {
            "no_rope_layers": [int(layer in rope) for layer in range(count)],
            "layer_types": [LAYER_TYPES[0] if layer in chunked else LAYER_TYPES[1] for layer in range(count)],
            "use_qk_norm": get_setting(ours, "attention.qk_norm") is not None,
            "attn_temperature_tuning": scaling is not None,
        }
        if (chunk := get_setting(ours, "attention.chunk")) is not None:
            theirs["attention_chunk_size"] = chunk
        if scaling is not None:
            theirs |= {"attn_scale": scaling["beta"], "floor_scale": scaling["length"]}


@dataclass(frozen=True)
class MoELayers:
    """Places MoE blocks where moe_layers says, or else in every interleave_moe_layer_step-th block. Each has a shared
    expert as large as the routed ones."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        count, step = ours["num_layers"], theirs.size("interleave_moe_layer_step", default=1)
        blocks = theirs.take("moe_layers", default=None)
        if blocks is None:
            blocks = list(range(step - 1, count, step))
        if not isinstance(blocks, list) or any(type(block) is not int or not 0 <= block < count for block in blocks):
            raise theirs.refuse("moe_layers", f"it must be a list of block indices from 0 to {count - 1}")
        _set_blocks(ours, "moe_blocks", sorted(set(blocks)))
        hidden = get_setting(ours, "moe.experts.hidden")
        set_setting(ours, "moe.shared_experts", {"hidden": hidden, "activation": "swiglu"})

    def write(self, ours: Tree, theirs: Tree) -> None:
        theirs |= {"moe_layers": ours["moe_layers"], "interleave_moe_layer_step": 1}


def _set_blocks(ours: Tree, path: str, blocks: list[int]) -> None:
    is_all = len(blocks) == ours["num_layers"]
    set_setting(ours, path, {"kind": "all"} if is_all else {"kind": "list", "indices": blocks})


def llama4_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of Llama 4. Its rotary rows are interleaved, and its stacks are (E, D, 2 F), [gate | up], and (E,
    F, D). In blocks without rotary positions rows are permuted, too: of queries and keys alike, so nothing changes."""
    here, there = "blocks.{L}.moe", "model.layers.{L}.feed_forward"
    size = config.get("head_dim", HEAD_SIZE) or config["hidden_size"] // config["num_attention_heads"]  # as HeadSize
    return [
        *outside_blocks(),
        *attention(rotary=half_split_rows(size, size)),
        *dense("blocks.{L}.ffn", there),
        TensorMapping(f"{here}.router.weight", (f"{there}.router.weight",), IDENTITY),
        TensorMapping(f"{here}.experts.{{E}}.w_in", (f"{there}.experts.gate_up_proj",), STACKED),
        TensorMapping(f"{here}.experts.{{E}}.w_out", (f"{there}.experts.down_proj",), STACKED),
        *dense(f"{here}.shared_experts", f"{there}.shared_expert"),
    ]


HEAD_SIZE = 128  # if config.json has no head_dim

FAMILIES = {
    "llama4_text": Family(
        "Llama4ForCausalLM",
        (
            *common_rules(eps=1e-5),
            *head_rules(8),
            HeadSize(default=HEAD_SIZE),
            Rope(default_theta=500000.0),
            Copy("attention_bias", "attention.bias", False),
            PositionsByBlock(),
            *swiglu_expert_rules(("num_local_experts", "num_experts"), "intermediate_size"),
            Const("moe.experts.weight_input", True),
            Const("moe.router.score", "sigmoid"),
            Const("moe.router.normalise", False),
            Const("moe.losses", []),
            MoELayers(),
            DenseHidden("intermediate_size_mlp"),
            Require("router_jitter_noise", 0.0),
        ),
        llama4_tensor_map,
        # Of other programs: how transformers keeps keys and values, and whether a compressor unstacks experts.
        neutral={
            "cache_implementation": "how generation keeps keys and values",
            "for_llm_compressor": "how a tool for quantization loads the experts",
        },
    ),
}
