"""The families of Hugging Face models that we read and write: each is its rules for config.json and its table of
tensors. A further one is one more entry of FAMILIES."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expert_parallel.interop.deepseek import Groups, LatentHeads, SharedExperts, deepseek_v3_links
from expert_parallel.interop.family_tensors import gpt_oss_links, llama_links, mixtral_links, qwen3_moe_links
from expert_parallel.interop.rope import Rope
from expert_parallel.interop.rules import (
    REQUIRED,
    DenseHidden,
    FirstDense,
    HeadSize,
    Must,
    Ours,
    QKNorm,
    Rule,
    Same,
    Size,
    SparseStep,
    TheirConfig,
    Tree,
    Window,
    WindowByBlock,
    get_setting,
    set_setting,
)
from expert_parallel.interop.tensor_map import Link
from expert_parallel.model.attention import HeadsConfig
from expert_parallel.model.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """architecture: the class in transformers. links: of a model with this config.json. neutral: keys of its
    config.json that change nothing that is computed, beside those of all families."""

    architecture: str
    rules: tuple[Rule, ...]
    links: Callable[[Tree], list[Link]]
    neutral: tuple[str, ...] = ()

    def read(self, values: Tree) -> Tree:
        """config.json -> the `model` block of our config. ValueError for a key with its value, where we compute
        something else or do not know."""
        theirs = TheirConfig(values)
        ours: Tree = {}
        if quantized := values.get("quantization_config"):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            if not (method == "mxfp4" and self.architecture == "GptOssForCausalLM"):
                raise ValueError(
                    f"config.json: quantization_config says {method!r}: save the model unquantised, then import it"
                )
            theirs.asked.add("quantization_config")
        for rule in self.rules:
            rule.read(theirs, ours)
        theirs.refuse_the_rest(self.neutral)
        return ours

    def write(self, model: ModelConfig) -> Tree:
        """The nearest config.json that this family has. Whether it is this model's: read it back and compare."""
        ours, theirs = settings(model), {"architectures": [self.architecture]}
        for rule in self.rules:
            rule.write(ours, theirs)
        return theirs


def settings(model: ModelConfig) -> Tree:
    """What decides over the logits of generation (which has no capacity limits), with defaults resolved. The rest is of
    training, of speed, or of the layout."""
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
        for name in ("preset", "d_model", "capacity", "losses", "dispatcher", "ledger"):
            tree["moe"].pop(name)
        for name in ("hidden_dropout", "output_dropout", "backend"):
            tree["moe"]["experts"].pop(name)
        tree["moe"]["router"].pop("jitter", None)
        if (rate := tree["moe"]["router"].pop("balance_bias_rate", None)) is not None:
            tree["moe"]["router"]["balance_bias"] = rate > 0
    return tree


# ---------------------------------------------------------------------------------------------------------------- rules


def of_all(eps: Any = REQUIRED, tied: bool = False) -> list[Rule]:
    return [
        Size("vocab_size", "vocab_size"),
        Size("num_hidden_layers", "num_layers"),
        Size("hidden_size", "d_model"),
        Same("rms_norm_eps", "norm.eps", eps),
        Same("tie_word_embeddings", "tied_embeddings", tied),
        Must("hidden_act", "silu", written=True),
        Must("attention_dropout", 0.0),
    ]


def heads(kv_heads: Any = REQUIRED) -> list[Rule]:
    """kv_heads: what an absent num_key_value_heads means; None: as many as there are heads."""
    return [
        Size("num_attention_heads", "attention.num_heads"),
        Size("num_key_value_heads", "attention.num_kv_heads", kv_heads),
    ]


def swiglu_experts(count: tuple[str, ...], hidden: str) -> list[Rule]:
    return [
        Ours("moe.router.kind", "top_k"),
        Size(count, "moe.num_experts"),
        Size("num_experts_per_tok", "moe.router.k"),
        Size(hidden, "moe.experts.hidden"),
    ]


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        (
            *of_all(),
            *heads(None),
            HeadSize(),
            Rope(),
            Same("attention_bias", "attention.bias", False),
            Size("intermediate_size", "ffn.hidden"),
            Same("mlp_bias", "ffn.bias", False),
            Must("rope_interleaved", False),
        ),
        llama_links,
        neutral=("is_llama_config",),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        (
            *of_all(),
            *heads(),
            HeadSize(),
            Rope(),
            Ours("attention.bias", True),
            Ours("attention.out_bias", False),
            Must("use_mrope", False),
            Size("intermediate_size", "ffn.hidden"),
            WindowByBlock("use_sliding_window"),
        ),
        llama_links,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        (
            *of_all(),
            *heads(),
            HeadSize(default=128),
            Rope(),
            Same("attention_bias", "attention.bias", False),
            QKNorm("per_head"),
            Size("intermediate_size", "ffn.hidden"),
            WindowByBlock("use_sliding_window"),
        ),
        llama_links,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        (
            *of_all(),
            *heads(),
            HeadSize(),
            Rope(default_theta=1e6),
            *swiglu_experts(("num_local_experts", "num_experts"), "intermediate_size"),
            Must("router_jitter_noise", 0.0),
            Window(),
        ),
        mixtral_links,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        (
            *of_all(),
            *heads(),
            HeadSize(),
            Rope(),
            Same("attention_bias", "attention.bias", False),
            QKNorm("per_head"),
            *swiglu_experts(("num_experts", "num_local_experts"), "moe_intermediate_size"),
            Same("norm_topk_prob", "moe.router.normalise", False),
            SparseStep(),
            DenseHidden(),
            Window("use_sliding_window"),
            Must("qkv_bias", False),
            Must("use_qk_norm", True),
            Must("shared_expert_intermediate_size", 0),
        ),
        qwen3_moe_links,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        (
            *of_all(),
            *heads(None),
            HeadSize(is_free=False),
            Rope(),
            Same("attention_bias", "attention.bias", False),
            QKNorm("whole"),
            Must("clip_qkv", None),
            *swiglu_experts(("num_experts", "num_local_experts"), "intermediate_size"),
            Same("norm_topk_prob", "moe.router.normalise", False),
        ),
        qwen3_moe_links,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        (
            *of_all(),
            LatentHeads(),
            Rope(),
            Must("attention_bias", False),
            *swiglu_experts(("n_routed_experts", "num_local_experts"), "moe_intermediate_size"),
            Same("norm_topk_prob", "moe.router.normalise", True),
            Same("routed_scaling_factor", "moe.router.scale", 2.5),
            Ours("moe.router.score", "sigmoid"),
            Ours("moe.router.balance_bias_rate", 0.001),
            Groups(),
            SharedExperts(),
            FirstDense(),
            DenseHidden(),
            Must("scoring_func", "sigmoid"),
            Must("topk_method", "noaux_tc"),
            Must("moe_layer_freq", 1),
        ),
        deepseek_v3_links,
        neutral=("num_nextn_predict_layers", "num_mtp_layers", "ep_size", "aux_loss_alpha", "seq_aux"),
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        (
            *of_all(),
            *heads(),
            HeadSize(default=64),
            Rope(default_theta=150000.0, is_optional=False),
            Same("attention_bias", "attention.bias", True),
            Ours("attention.sinks", True),
            *swiglu_experts(("num_local_experts", "num_experts"), "intermediate_size"),
            Ours("moe.experts.activation", "gpt_oss"),
            Ours("moe.experts.bias", True),
            Ours("moe.router.bias", True),
            Must("swiglu_alpha", 1.702),
            Must("swiglu_limit", 7.0),
            WindowByBlock(),
        ),
        gpt_oss_links,
        neutral=("experts_per_token", "initial_context_length"),  # num_experts_per_tok and max_position_embeddings
    ),
}
