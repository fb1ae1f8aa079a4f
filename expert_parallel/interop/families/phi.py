"""Defines Phi-3.5-MoE: layer norms, biases, the router sparsemixer, and LongRoPE."""

from expert_parallel.interop.balance_loss import PooledBalanceLoss
from expert_parallel.interop.families.common import common_rules, head_rules
from expert_parallel.interop.families.mixtral import mixtral_tensor_map
from expert_parallel.interop.family import Family
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Const, Copy, CopyInt, HeadSize, Require, SlidingWindow

FAMILIES = {
    "phimoe": Family(
        "PhimoeForCausalLM",
        (
            *common_rules(eps=1e-5),
            Const("norm.kind", "layer_norm"),
            *head_rules(),
            HeadSize(),
            Rope(default_theta=1e6, mscales=True),
            Copy("attention_bias", "attention.bias", False),
            Copy("lm_head_bias", "unembedding_bias", False),
            Const("moe.router.kind", "sparsemixer"),
            CopyInt(("num_local_experts", "num_experts"), "moe.num_experts", 16),
            CopyInt("num_experts_per_tok", "moe.router.k", 2),
            Copy("router_jitter_noise", "moe.router.margin", 0.01),
            CopyInt("intermediate_size", "moe.experts.hidden"),
            PooledBalanceLoss(),
            Require("hidden_dropout", 0.0),
            SlidingWindow(),
        ),
        mixtral_tensor_map,
        neutral={"input_jitter_noise": "noise of training on the inputs of MoE layers, which is not here"},
    ),
}
