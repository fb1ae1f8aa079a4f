"""Defines Mellum 2: Qwen3-MoE with windows in some blocks, which have rotary positions of their own."""

from expert_parallel.interop.balance_loss import PooledBalanceLoss
from expert_parallel.interop.block_rules import LayerTypes, RopeByKind
from expert_parallel.interop.families.common import common_rules, head_rules, swiglu_expert_rules
from expert_parallel.interop.families.qwen_moe import qwen3_moe_tensor_map
from expert_parallel.interop.family import Family
from expert_parallel.interop.ignored_tensors import MTP
from expert_parallel.interop.moe_rules import MLPLayerTypes
from expert_parallel.interop.neutral_keys import MTP_KEYS
from expert_parallel.interop.rules import Copy, DenseHidden, HeadSize, QKNorm

FAMILIES = {
    "mellum": Family(
        "MellumForCausalLM",
        (
            *common_rules(eps=1e-6),
            *head_rules(4),
            HeadSize(default=128),
            LayerTypes(1024, lambda theirs, num_layers: [False] * num_layers),
            RopeByKind((500000.0, 10000.0)),
            Copy("attention_bias", "attention.bias", False),
            QKNorm("per_head"),
            *swiglu_expert_rules(("num_local_experts", "num_experts"), "moe_intermediate_size"),
            Copy("norm_topk_prob", "moe.router.normalise", True),
            PooledBalanceLoss(),
            MLPLayerTypes(dense=0),
            DenseHidden(),
        ),
        qwen3_moe_tensor_map,
        neutral=MTP_KEYS
        | {
            "mtp_layer_types": "the attention of layers of multi-token prediction",
            "mtp_mlp_layer_types": "their feed-forward networks",
        },
        set_aside={r"mtp\.": MTP},
    ),
}
