"""Defines the dense families: Llama, Qwen2 and Qwen3."""

from expert_parallel.interop.families.common import DENSE, attention, common_rules, head_rules, outside_blocks
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import Tree
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Const, Copy, CopyInt, HeadSize, QKNorm, Require, SlidingWindowByLayer
from expert_parallel.interop.tensor_map import TensorMapping


def llama_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of dense models: Llama, Qwen2 and Qwen3."""
    return [*outside_blocks(), *attention(), *DENSE]


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        (
            *common_rules(),
            *head_rules(None),
            HeadSize(),
            Rope(),
            Copy("attention_bias", "attention.bias", False),
            CopyInt("intermediate_size", "ffn.hidden"),
            Copy("mlp_bias", "ffn.bias", False),
            Require("rope_interleaved", False),
        ),
        llama_tensor_map,
        neutral={"is_llama_config": "names the family"},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        (
            *common_rules(),
            *head_rules(),
            HeadSize(),
            Rope(),
            Const("attention.bias", True),
            Const("attention.out_bias", False),
            Require("use_mrope", False),
            CopyInt("intermediate_size", "ffn.hidden"),
            SlidingWindowByLayer("use_sliding_window", first=28),
        ),
        llama_tensor_map,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        (
            *common_rules(),
            *head_rules(),
            HeadSize(default=128),
            Rope(),
            Copy("attention_bias", "attention.bias", False),
            QKNorm("per_head"),
            CopyInt("intermediate_size", "ffn.hidden"),
            SlidingWindowByLayer("use_sliding_window", first=28),
        ),
        llama_tensor_map,
    ),
}
