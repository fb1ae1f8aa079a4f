"""Defines dots.llm1: Qwen3's attention and DeepSeek's experts."""

from expert_parallel.interop.families.common import common_rules, deepseek_expert_rules, head_rules
from expert_parallel.interop.families.glm import glm4_moe_tensor_map
from expert_parallel.interop.family import Family
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import (
    Copy,
    DenseHidden,
    FirstDense,
    HeadSize,
    QKNorm,
    Require,
    SlidingWindowByLayer,
)

FAMILIES = {
    "dots1": Family(
        "Dots1ForCausalLM",
        (
            *common_rules(eps=1e-6),
            *head_rules(None),
            HeadSize(),
            Rope(),
            Copy("attention_bias", "attention.bias", False),
            QKNorm("per_head"),
            *deepseek_expert_rules(normalise=False, scale=1.0, groups=1),
            FirstDense(default=0),
            DenseHidden(),
            SlidingWindowByLayer(first=62),
            Require("use_sliding_window", False),
        ),
        glm4_moe_tensor_map,
    ),
}
