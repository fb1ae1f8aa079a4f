"""Defines gpt-oss."""

from expert_parallel.interop.balance_loss import PooledBalanceLoss
from expert_parallel.interop.families.common import (
    attention,
    common_rules,
    head_rules,
    outside_blocks,
    swiglu_expert_rules,
)
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import Tree
from expert_parallel.interop.quantization import is_mxfp4
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Const, Copy, HeadSize, Require, SlidingWindowByLayer
from expert_parallel.interop.tensor_map import (
    IDENTITY,
    MXFP4,
    MXFP4_INTERLEAVED,
    STACKED,
    STACKED_INTERLEAVED,
    TensorMapping,
)


def gpt_oss_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of gpt-oss.

    Experts are stacks (E, in, out) with alternating gate and up columns; OpenAI's own files hold them as MXFP4.
    """
    here, there = "blocks.{L}.moe.experts.{E}", "model.layers.{L}.mlp.experts"
    tensor_map = [
        *outside_blocks(),
        *attention(),
        TensorMapping("blocks.{L}.moe.router.weight", ("model.layers.{L}.mlp.router.weight",), IDENTITY),
        TensorMapping("blocks.{L}.moe.router.bias", ("model.layers.{L}.mlp.router.bias",), IDENTITY),
        TensorMapping(f"{here}.b_in", (f"{there}.gate_up_proj_bias",), STACKED_INTERLEAVED),
        TensorMapping(f"{here}.b_out", (f"{there}.down_proj_bias",), STACKED),
    ]
    if is_mxfp4(config):
        packed = {name: (f"{there}.{name}_blocks", f"{there}.{name}_scales") for name in ("gate_up_proj", "down_proj")}
        return [
            *tensor_map,
            TensorMapping(f"{here}.w_in", packed["gate_up_proj"], MXFP4_INTERLEAVED),
            TensorMapping(f"{here}.w_out", packed["down_proj"], MXFP4),
        ]
    return [
        *tensor_map,
        TensorMapping(f"{here}.w_in", (f"{there}.gate_up_proj",), STACKED_INTERLEAVED),
        TensorMapping(f"{here}.w_out", (f"{there}.down_proj",), STACKED),
    ]


FAMILIES = {
    "gpt_oss": Family(
        "GptOssForCausalLM",
        (
            *common_rules(),
            *head_rules(),
            HeadSize(default=64),
            Rope(default_theta=150000.0, is_optional=False),
            Copy("attention_bias", "attention.bias", True),
            Const("attention.sinks", True),
            *swiglu_expert_rules(("num_local_experts", "num_experts"), "intermediate_size"),
            Const("moe.experts.activation", "gpt_oss"),
            Const("moe.experts.bias", True),
            Const("moe.router.bias", True),
            PooledBalanceLoss(),
            Require("swiglu_alpha", 1.702),
            Require("swiglu_limit", 7.0),
            SlidingWindowByLayer(),
        ),
        gpt_oss_tensor_map,
        neutral={
            "experts_per_token": "repeats num_experts_per_tok",
            "initial_context_length": "repeats original_max_position_embeddings",
        },
    ),
}
