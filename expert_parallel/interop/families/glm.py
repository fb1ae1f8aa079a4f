"""Defines GLM-4.5, GLM-4.7-Flash and Solar Open: DeepSeek's experts, with heads or latent attention."""

from expert_parallel.interop.families.common import (
    DEEPSEEK_EXPERTS,
    DENSE,
    attention,
    common_rules,
    deepseek_expert_rules,
    head_rules,
    outside_blocks,
)
from expert_parallel.interop.families.deepseek import LatentHeads, deepseek_v3_tensor_map, num_mtp_layers
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import Tree
from expert_parallel.interop.moe_rules import MLPLayerTypes
from expert_parallel.interop.neutral_keys import MTP_KEYS
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Const, Copy, DenseHidden, FirstDense, HeadSize, QKNorm, Require
from expert_parallel.interop.tensor_map import TensorMapping


def glm4_moe_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of models with heads and DeepSeek's experts: GLM-4.5, Solar Open and dots.llm1."""
    return [*outside_blocks(), *attention(), *DENSE, *DEEPSEEK_EXPERTS]


FAMILIES = {
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        (
            *common_rules(eps=1e-5),
            *head_rules(),
            HeadSize(),
            Rope(partial=0.5),
            Copy("attention_bias", "attention.bias", False),
            Const("attention.out_bias", False),
            QKNorm("per_head", switch="use_qk_norm"),
            *deepseek_expert_rules(normalise=True, scale=1.0, groups=1),
            FirstDense(default=1),
            DenseHidden(),
        ),
        glm4_moe_tensor_map,
        neutral=MTP_KEYS,
        num_mtp_layers=num_mtp_layers,
        imports_mtp=True,
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        (
            *common_rules(eps=1e-5),
            LatentHeads(),
            Rope(),
            Require("attention_bias", False),
            *deepseek_expert_rules(normalise=True, scale=1.8, groups=1),
            MLPLayerTypes(),
            DenseHidden(),
        ),
        deepseek_v3_tensor_map,
        neutral=MTP_KEYS,
        num_mtp_layers=num_mtp_layers,
        imports_mtp=True,
    ),
    "solar_open": Family(
        "SolarOpenForCausalLM",
        (
            *common_rules(eps=1e-5),
            *head_rules(),
            HeadSize(default=128),
            Rope(default_theta=1e6),
            Copy("attention_bias", "attention.bias", False),
            Const("attention.out_bias", False),
            Require("use_qk_norm", False),
            *deepseek_expert_rules(normalise=True, scale=1.0, groups=1),
            Require("first_k_dense_replace", 0),
        ),
        glm4_moe_tensor_map,
        neutral={"intermediate_size": "the width of dense blocks, which there are none of"},
    ),
}
