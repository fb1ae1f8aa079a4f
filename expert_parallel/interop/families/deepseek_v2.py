"""Defines DeepSeek-V2: latent attention, softmax scores without a selection bias, shared experts."""

from dataclasses import dataclass

from expert_parallel.interop.balance_loss import SequenceBalanceLoss
from expert_parallel.interop.families.common import common_rules, swiglu_expert_rules
from expert_parallel.interop.families.deepseek import LatentHeads, deepseek_v3_tensor_map
from expert_parallel.interop.family import Family
from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.moe_rules import GroupLimit, SharedExperts
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import Const, Copy, DenseHidden, FirstDense, Require, get_setting


@dataclass(frozen=True)
class GreedyGroups:
    """Translates the routing of DeepSeek-V2: the best experts of all (topk_method is greedy), or of the topk_group
    best of n_group groups, each of which is as good as its best expert (group_limited_greedy)."""

    def read(self, theirs: HuggingFaceConfig, ours: Tree) -> None:
        method = theirs.take("topk_method", default="greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise theirs.refuse("topk_method", "it must be greedy or group_limited_greedy")
        if method == "group_limited_greedy":
            GroupLimit(score="max").read(theirs, ours)
        else:
            for unused in ("n_group", "topk_group"):
                theirs.take(unused, default=None)

    def write(self, ours: Tree, theirs: Tree) -> None:
        is_limited = get_setting(ours, "moe.router.group_limit") is not None
        theirs["topk_method"] = "group_limited_greedy" if is_limited else "greedy"
        GroupLimit(score="max").write(ours, theirs)


FAMILIES = {
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        (
            *common_rules(eps=1e-6),
            LatentHeads(),
            Rope(),
            Require("attention_bias", False),
            Require("mlp_bias", False),
            *swiglu_expert_rules(("n_routed_experts", "num_experts"), "moe_intermediate_size"),
            Require("scoring_func", "softmax"),
            Const("moe.router.normalise", False),
            Require("norm_topk_prob", False),
            Copy("routed_scaling_factor", "moe.router.scale", 1.0),
            SequenceBalanceLoss(),
            GreedyGroups(),
            SharedExperts(),
            Require("moe_layer_freq", 1),
            FirstDense(default=0),
            DenseHidden(),
        ),
        deepseek_v3_tensor_map,
        neutral={"ep_size": "the layout of inference"},
    ),
}
