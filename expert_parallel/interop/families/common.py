"""Builds the rules and the mappings of tensors that families share.

Mappings of tensors that a model lacks are ignored, so families that differ by a bias or a norm share a map.
"""

from typing import Any

from expert_parallel.interop.balance_loss import SequenceBalanceLoss
from expert_parallel.interop.hf_config import REQUIRED
from expert_parallel.interop.moe_rules import GroupLimit, SharedExperts
from expert_parallel.interop.rules import Const, Copy, CopyInt, Require, Rule
from expert_parallel.interop.tensor_map import (
    GATE_UP_COLUMNS,
    GATE_UP_ROWS,
    IDENTITY,
    TRANSPOSED,
    TensorMapping,
    Transform,
)

MAX_LAYERS = 100_000  # as in ModelConfig; rules list blocks before it is made


def common_rules(eps: Any = REQUIRED, tied: bool = False, dropouts: tuple[float, ...] = ()) -> list[Rule]:
    """Returns the rules of every family. eps, tied: the defaults of rms_norm_eps and tie_word_embeddings. dropouts:
    values of attention_dropout in released files, which logits do not depend on and training here does not have."""
    return [
        CopyInt("vocab_size", "vocab_size"),
        CopyInt("num_hidden_layers", "num_layers", most=MAX_LAYERS),
        CopyInt("hidden_size", "d_model"),
        Copy("rms_norm_eps", "norm.eps", eps),
        Copy("tie_word_embeddings", "tied_embeddings", tied),
        Require("hidden_act", "silu", written=True),
        Require("attention_dropout", 0.0, also=dropouts),
    ]


def head_rules(kv_heads: Any = REQUIRED) -> list[Rule]:
    """Returns the rules of the numbers of heads.

    kv_heads: the default of num_key_value_heads; None stands for num_attention_heads.
    """
    return [
        CopyInt("num_attention_heads", "attention.num_heads"),
        CopyInt("num_key_value_heads", "attention.num_kv_heads", kv_heads),
    ]


def swiglu_expert_rules(count: tuple[str, ...], hidden: tuple[str, ...] | str) -> list[Rule]:
    """Returns the rules of top-k SwiGLU experts. count, hidden: the keys of config.json for the number of experts and
    for the hidden size of an expert."""
    return [
        Const("moe.router.kind", "top_k"),
        CopyInt(count, "moe.num_experts"),
        CopyInt("num_experts_per_tok", "moe.router.k"),
        CopyInt(hidden, "moe.experts.hidden"),
    ]


def sigmoid_router_rules() -> list[Rule]:
    """Returns the rules of routers with sigmoid scores, and a bias that only selects, which balances the load."""
    return [
        Const("moe.router.score", "sigmoid"),
        Const("moe.router.balance_bias_rate", 0.001),
        Require("scoring_func", "sigmoid", also=("noaux_tc",)),  # dots.llm1 has the topk_method here
    ]


def deepseek_expert_rules(normalise: bool, scale: float, groups: Any = REQUIRED) -> list[Rule]:
    """Returns the rules of DeepSeek-V3's experts: routed ones, in groups if there are several, and shared ones.

    normalise, scale: the defaults of norm_topk_prob and routed_scaling_factor. groups: that of n_group and topk_group.
    """
    return [
        *swiglu_expert_rules(("n_routed_experts", "num_local_experts"), "moe_intermediate_size"),
        *sigmoid_router_rules(),
        Copy("norm_topk_prob", "moe.router.normalise", normalise),
        Copy("routed_scaling_factor", "moe.router.scale", scale),
        SequenceBalanceLoss(),
        GroupLimit(groups),
        SharedExperts(),
        Require("topk_method", "noaux_tc"),
        Require("moe_layer_freq", 1),
    ]


# ------------------------------------------------------------------------------------------------------------- tensors


def outside_blocks() -> list[TensorMapping]:
    """Returns the mappings of embedding, unembedding and residual norms, including biases that only some families
    have."""
    norms = {
        "final_norm": "model.norm",
        "blocks.{L}.attention_norm": "model.layers.{L}.input_layernorm",
        "blocks.{L}.ffn_norm": "model.layers.{L}.post_attention_layernorm",
    }
    return [
        TensorMapping("embedding.weight", ("model.embed_tokens.weight",), IDENTITY),
        TensorMapping("unembedding.weight", ("lm_head.weight",), IDENTITY),
        TensorMapping("unembedding_bias", ("lm_head.bias",), IDENTITY),
        *(
            TensorMapping(f"{own}.{leaf}", (f"{their}.{leaf}",), IDENTITY)
            for own, their in norms.items()
            for leaf in ("weight", "bias")
        ),
    ]


def attention(rotary: Transform = IDENTITY) -> list[TensorMapping]:
    """Returns the mappings of attention, including the biases, norms and sinks that only some families have.

    rotary: the transform of the rows of queries and keys, which are rotary.
    """
    matrices = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    names = {f"{own}.{leaf}": f"{their}.{leaf}" for own, their in matrices.items() for leaf in ("weight", "bias")}
    names |= {"query_norm.weight": "q_norm.weight", "key_norm.weight": "k_norm.weight", "sinks": "sinks"}
    here, there = "blocks.{L}.attention.", "model.layers.{L}.self_attn."
    return [
        TensorMapping(here + own, (there + their,), rotary if own.startswith(("query.", "key.")) else IDENTITY)
        for own, their in names.items()
    ]


def dense(ours: str, theirs: str) -> list[TensorMapping]:
    """Returns the mappings of a dense SwiGLU network, {gate,up,down}_proj. ours, theirs: the module's name in our model
    and in the Hugging Face model."""
    tensor_map = []
    for leaf in ("weight", "bias"):
        tensor_map += [
            TensorMapping(
                f"{ours}.w_in.{leaf}", (f"{theirs}.gate_proj.{leaf}", f"{theirs}.up_proj.{leaf}"), GATE_UP_ROWS
            ),
            TensorMapping(f"{ours}.w_out.{leaf}", (f"{theirs}.down_proj.{leaf}",), IDENTITY),
        ]
    return tensor_map


def experts(theirs: str, gate: str, up: str, down: str, router: str = "gate") -> list[TensorMapping]:
    """Returns the mappings of a router and its SwiGLU experts, each a module of its own.

    theirs: the name of the MoE module in the Hugging Face model. gate, up, down: the names of an expert's matrices
    there. router: that of the router.
    """
    here, there = "blocks.{L}.moe.experts.{E}", f"{theirs}.experts.{{E}}"
    return [
        TensorMapping("blocks.{L}.moe.router.weight", (f"{theirs}.{router}.weight",), IDENTITY),
        TensorMapping(f"{here}.w_in", (f"{there}.{gate}.weight", f"{there}.{up}.weight"), GATE_UP_COLUMNS),
        TensorMapping(f"{here}.w_out", (f"{there}.{down}.weight",), TRANSPOSED),
    ]


def balance_bias(theirs: str) -> TensorMapping:
    """Returns the mapping of the bias that selects experts. theirs: its name in the Hugging Face model."""
    return TensorMapping("blocks.{L}.moe.router.balance_bias_E", (theirs,), IDENTITY)


DENSE = dense("blocks.{L}.ffn", "model.layers.{L}.mlp")
EXPERTS = experts("model.layers.{L}.mlp", "gate_proj", "up_proj", "down_proj")
DEEPSEEK_EXPERTS = [
    *EXPERTS,
    *dense("blocks.{L}.moe.shared_experts", "model.layers.{L}.mlp.shared_experts"),
    balance_bias("model.layers.{L}.mlp.gate.e_score_correction_bias"),
]
