"""Defines Mixtral."""

from expert_parallel.interop.balance_loss import PooledBalanceLoss
from expert_parallel.interop.families.common import (
    attention,
    common_rules,
    experts,
    head_rules,
    outside_blocks,
    swiglu_expert_rules,
)
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import Tree
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import HeadSize, Require, SlidingWindow
from expert_parallel.interop.tensor_map import TensorMapping


def mixtral_tensor_map(config: Tree) -> list[TensorMapping]:
    """Returns the map of Mixtral."""
    return [*outside_blocks(), *attention(), *experts("model.layers.{L}.block_sparse_moe", "w1", "w3", "w2")]


FAMILIES = {
    "mixtral": Family(
        "MixtralForCausalLM",
        (
            *common_rules(),
            *head_rules(),
            HeadSize(),
            Rope(default_theta=1e6),
            *swiglu_expert_rules(("num_local_experts", "num_experts"), "intermediate_size"),
            PooledBalanceLoss(),
            Require("router_jitter_noise", 0.0),
            SlidingWindow(),
        ),
        mixtral_tensor_map,
    ),
}
