"""Defines Mistral 4: DeepSeek's latent attention with scaled queries, softmax scores, and experts in stacks."""

from expert_parallel.interop.families.common import DENSE, common_rules, dense, outside_blocks, swiglu_expert_rules
from expert_parallel.interop.families.deepseek import LatentHeads, latent_attention
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import Tree
from expert_parallel.interop.moe_rules import GroupLimit, SharedExperts
from expert_parallel.interop.rope_variants import ScaledQueriesRope
from expert_parallel.interop.rules import Const, Copy, DenseHidden, FirstDense, Require
from expert_parallel.interop.tensor_map import IDENTITY, STACKED_TRANSPOSED, TensorMapping


def mistral4_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of Mistral 4. Its stacks are (E, 2 F, D), [gate; up], and (E, D, F)."""
    here, there = "blocks.{L}.moe", "model.layers.{L}.mlp"
    return [
        *outside_blocks(),
        *latent_attention(config),
        *DENSE,
        TensorMapping(f"{here}.router.weight", (f"{there}.gate.weight",), IDENTITY),
        TensorMapping(f"{here}.experts.{{E}}.w_in", (f"{there}.experts.gate_up_proj",), STACKED_TRANSPOSED),
        TensorMapping(f"{here}.experts.{{E}}.w_out", (f"{there}.experts.down_proj",), STACKED_TRANSPOSED),
        *dense(f"{here}.shared_experts", f"{there}.shared_experts"),
    ]


FAMILIES = {
    "mistral4": Family(
        "Mistral4ForCausalLM",
        (
            *common_rules(eps=1e-6),
            LatentHeads(head_dim_is_whole=True),
            ScaledQueriesRope(is_optional=False),
            Require("attention_bias", False),
            *swiglu_expert_rules(("n_routed_experts", "num_local_experts"), "moe_intermediate_size"),
            Copy("norm_topk_prob", "moe.router.normalise", True),
            Copy("routed_scaling_factor", "moe.router.scale", 1.0),
            Const("moe.losses", []),
            GroupLimit(1),
            SharedExperts(),
            FirstDense(default=0),
            DenseHidden(),
        ),
        mistral4_tensor_map,
    ),
}
