"""Lists the families of Hugging Face models that we read and write: rules for config.json, and a map of tensors.

A new family is a new entry of FAMILIES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expert_parallel.interop.balance_loss import PooledBalanceLoss, SequenceBalanceLoss
from expert_parallel.interop.deepseek import (
    GroupLimit,
    LatentHeads,
    SharedExperts,
    deepseek_v3_tensor_map,
    num_mtp_layers,
)
from expert_parallel.interop.family_tensors import (
    gpt_oss_tensor_map,
    llama_tensor_map,
    mixtral_tensor_map,
    qwen3_moe_tensor_map,
)
from expert_parallel.interop.hf_config import REQUIRED, HuggingFaceConfig, Tree, short
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import (
    Const,
    Copy,
    CopyInt,
    DenseHidden,
    FirstDense,
    HeadSize,
    QKNorm,
    Require,
    Rule,
    SlidingWindow,
    SlidingWindowByLayer,
    SparseStep,
    get_setting,
    set_setting,
)
from expert_parallel.interop.tensor_map import TensorMapping
from expert_parallel.model.attention import HeadsConfig
from expert_parallel.model.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """Defines how one `model_type` is read and written.

    architecture: the class in transformers. tensor_map: returns the mappings of a model, given its config.json.
    neutral: keys of config.json that do not affect the logits, in addition to `NEUTRAL`. num_mtp_layers: returns how
    many layers of multi-token prediction may follow those of the model.
    """

    architecture: str
    rules: tuple[Rule, ...]
    tensor_map: Callable[[Tree], list[TensorMapping]]
    neutral: tuple[str, ...] = ()
    num_mtp_layers: Callable[[HuggingFaceConfig], int] = lambda theirs: 0

    def read(self, values: Tree) -> Tree:
        """Returns the `model` block of our config for a config.json.

        Raises a ValueError that names the first key whose value we do not support or do not know.
        """
        theirs = HuggingFaceConfig(values)
        ours: Tree = {}
        if quantized := values.get("quantization_config"):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            if not (method == "mxfp4" and self.architecture == "GptOssForCausalLM"):
                raise ValueError(
                    f"config.json: quantization_config has quant_method {short(method)}, which is not supported: save "
                    "the model without quantization, then import it"
                )
            theirs.asked.add("quantization_config")
        for rule in self.rules:
            rule.read(theirs, ours)
        theirs.refuse_unknown_keys(self.neutral)
        return ours

    def write(self, model: ModelConfig) -> Tree:
        """Returns the config.json of this family that is closest to the model's settings. It is exact only if reading
        it back gives the same settings."""
        ours, theirs = settings(model), {"architectures": [self.architecture]}
        if model.moe is not None:
            ours["moe"]["losses"] = [loss.model_dump(mode="json") for loss in model.moe.losses]
        for rule in self.rules:
            rule.write(ours, theirs)
        return theirs


def settings(model: ModelConfig) -> Tree:
    """Returns the settings that the logits of generation depend on, with defaults resolved.

    Omits settings of training, speed and layout, and the capacity, since generation is dropless.
    """
    tree = model.model_dump(mode="json")
    window_layers = model.window_blocks.blocks(model.num_layers) if get_setting(tree, "attention.window") else []
    tree |= {"moe_layers": model.moe_layers, "window_layers": window_layers}
    for name in ("moe_blocks", "window_blocks", "dropout", "init_std"):
        tree.pop(name)
    if isinstance(model.attention, HeadsConfig):
        set_setting(tree, "attention.num_kv_heads", model.attention.kv_heads)
        if model.attention.out_bias is None:
            set_setting(tree, "attention.out_bias", model.attention.bias)
    if tree["moe"] is not None:
        for name in ("preset", "preset_overrides", "d_model", "capacity", "losses", "dispatcher", "ledger"):
            tree["moe"].pop(name)
        for name in ("hidden_dropout", "output_dropout", "backend"):
            tree["moe"]["experts"].pop(name)
        tree["moe"]["router"].pop("jitter", None)
        if (rate := tree["moe"]["router"].pop("balance_bias_rate", None)) is not None:
            tree["moe"]["router"]["balance_bias"] = rate > 0
    return tree


# ---------------------------------------------------------------------------------------------------------------- rules


MAX_LAYERS = 100_000  # as in ModelConfig; rules list blocks before it is made


def common_rules(eps: Any = REQUIRED, tied: bool = False) -> list[Rule]:
    """Returns the rules of every family. eps, tied: the defaults of rms_norm_eps and tie_word_embeddings."""
    return [
        CopyInt("vocab_size", "vocab_size"),
        CopyInt("num_hidden_layers", "num_layers", most=MAX_LAYERS),
        CopyInt("hidden_size", "d_model"),
        Copy("rms_norm_eps", "norm.eps", eps),
        Copy("tie_word_embeddings", "tied_embeddings", tied),
        Require("hidden_act", "silu", written=True),
        Require("attention_dropout", 0.0),
    ]


def head_rules(kv_heads: Any = REQUIRED) -> list[Rule]:
    """Returns the rules of the numbers of heads.

    kv_heads: the default of num_key_value_heads; None stands for num_attention_heads.
    """
    return [
        CopyInt("num_attention_heads", "attention.num_heads"),
        CopyInt("num_key_value_heads", "attention.num_kv_heads", kv_heads),
    ]


def swiglu_expert_rules(count: tuple[str, ...], hidden: str) -> list[Rule]:
    """Returns the rules of top-k SwiGLU experts. count, hidden: the keys of config.json for the number of experts and
    for the hidden size of an expert."""
    return [
        Const("moe.router.kind", "top_k"),
        CopyInt(count, "moe.num_experts"),
        CopyInt("num_experts_per_tok", "moe.router.k"),
        CopyInt(hidden, "moe.experts.hidden"),
    ]


FAMILIES: dict[str, Family] = {
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
        neutral=("is_llama_config",),
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
            SlidingWindowByLayer("use_sliding_window"),
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
            SlidingWindowByLayer("use_sliding_window"),
        ),
        llama_tensor_map,
    ),
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
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        (
            *common_rules(),
            *head_rules(),
            HeadSize(),
            Rope(),
            Copy("attention_bias", "attention.bias", False),
            QKNorm("per_head"),
            *swiglu_expert_rules(("num_experts", "num_local_experts"), "moe_intermediate_size"),
            Copy("norm_topk_prob", "moe.router.normalise", False),
            PooledBalanceLoss(),
            SparseStep(),
            DenseHidden(),
            SlidingWindow("use_sliding_window"),
            Require("qkv_bias", False),
            Require("use_qk_norm", True),
            Require("shared_expert_intermediate_size", 0),
        ),
        qwen3_moe_tensor_map,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        (
            *common_rules(),
            *head_rules(None),
            HeadSize(is_free=False),
            Rope(),
            Copy("attention_bias", "attention.bias", False),
            QKNorm("whole"),
            Require("clip_qkv", None),
            *swiglu_expert_rules(("num_experts", "num_local_experts"), "intermediate_size"),
            Copy("norm_topk_prob", "moe.router.normalise", False),
            PooledBalanceLoss(default=0.01),
        ),
        qwen3_moe_tensor_map,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        (
            *common_rules(),
            LatentHeads(),
            Rope(),
            Require("attention_bias", False),
            *swiglu_expert_rules(("n_routed_experts", "num_local_experts"), "moe_intermediate_size"),
            Copy("norm_topk_prob", "moe.router.normalise", True),
            Copy("routed_scaling_factor", "moe.router.scale", 2.5),
            Const("moe.router.score", "sigmoid"),
            Const("moe.router.balance_bias_rate", 0.001),
            SequenceBalanceLoss(),
            GroupLimit(),
            SharedExperts(),
            FirstDense(),
            DenseHidden(),
            Require("scoring_func", "sigmoid"),
            Require("topk_method", "noaux_tc"),
            Require("moe_layer_freq", 1),
        ),
        deepseek_v3_tensor_map,
        neutral=("num_nextn_predict_layers", "num_mtp_layers", "ep_size"),
        num_mtp_layers=num_mtp_layers,
    ),
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
        neutral=("experts_per_token", "initial_context_length"),  # repeat other keys
    ),
}
