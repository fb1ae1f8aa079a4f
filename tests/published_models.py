"""The config.json of a released model of every sparse family, as it was published (`tests/published`), and the same
model made small: every key stays, and every value that is not a size."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from expert_parallel.interop.families.registry import FAMILIES

Tree = dict[str, Any]
PUBLISHED = Path(__file__).parent / "published"
WORDS, LAYERS, ORIGINAL = 260, 4, 8
# Code of a folder is never run: transformers' own class of the same arithmetic is the oracle.
SAME_CLASS = {"kimi_k2": "deepseek_v3"}

SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "head_dim": 8,
    "attention_head_dim": 8,
    "swa_head_dim": 8,
    "v_head_dim": 6,
    "swa_v_head_dim": 6,
    "rotary_dim": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 6,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "qk_head_dim": 10,
    "intermediate_size": 12,
    "moe_intermediate_size": 10,
    "expert_hidden_dim": 10,
    "intermediate_size_mlp": 14,
    "shared_expert_intermediate_size": 14,
    "shared_intermediate_size": 14,
    "moe_shared_expert_intermediate_size": 14,
    "sliding_window": 4,
    "sliding_window_size": 4,
    "attention_chunk_size": 4,
    "floor_scale": 4,
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOICES = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k", "num_experts_per_token")
KEY_HEADS = ("num_key_value_heads", "swa_num_key_value_heads")


def published(name: str) -> Tree:
    """The config.json of a family, a model_type, as published."""
    tree: Tree = json.loads((PUBLISHED / f"{name}.json").read_text())
    return tree


def shrink(config: Tree) -> Tree:
    """The same model, small: of 4 layers, 8 experts, and few columns. Lists by layer keep their beginning."""
    layers = config["num_hidden_layers"]
    return {key: _shrunk(key, value, config, layers) for key, value in config.items() if key != "quantization_config"}


def _shrunk(key: str, value: Any, config: Tree, layers: int) -> Any:
    if isinstance(value, dict) and key.startswith("rope_"):
        return {inner: _shrunk_rope(inner, part, config) for inner, part in value.items()}
    if isinstance(value, list) and len(value) == layers:
        return [_shrunk(key, part, config, layers) for part in value[:LAYERS]]
    if key == "moe_layers" and isinstance(value, list):
        return [layer for layer in value if layer < LAYERS]
    if value is None or isinstance(value, bool):
        return value
    if key.endswith(("_token_id", "_token_ids")):
        return value if isinstance(value, int) and value < WORDS else None
    if key == "moe_intermediate_size" and value == config.get("intermediate_size"):
        return SIZES["intermediate_size"]
    if key == "head_dim" and value == config.get("qk_rope_head_dim"):
        return SIZES["qk_rope_head_dim"]
    if key == "head_dim" and value == config.get("qk_head_dim"):
        return SIZES["qk_head_dim"]
    if key in SIZES:
        return SIZES[key] if value else value  # 0: there is none
    if key in EXPERTS:
        return 8
    if key in CHOICES:
        return min(value, 3)
    if key == "swa_num_key_value_heads":  # as many times the other blocks' key heads as before
        usual = config["num_key_value_heads"]
        return value * _shrunk("num_key_value_heads", usual, config, layers) // usual
    if key in KEY_HEADS:
        return 4 if value == config["num_attention_heads"] else min(value, 2 if key in config else 1)
    if key in ("n_group", "topk_group"):
        return max(1, value // 2)
    if key in ("num_hidden_layers", "max_window_layers", "moe_layer_end_index"):
        return min(value, LAYERS)
    if key in ("first_k_dense_replace", "moe_layer_start_index"):
        return min(value, 1)
    return _shrunk_length(key, value, config)


def _shrunk_rope(key: str, value: Any, config: Tree) -> Any:
    if isinstance(value, dict):  # one for each kind of block
        return {inner: _shrunk_rope(inner, part, config) for inner, part in value.items()}
    if isinstance(value, list):  # a factor for each pair of columns
        size = SIZES["head_dim"] if "head_dim" in config else SIZES["hidden_size"] // SIZES["num_attention_heads"]
        return value[: size // 2]
    if key == "partial_rotary_factor" and "qk_head_dim" in config:
        return SIZES["qk_rope_head_dim"] / SIZES["qk_head_dim"]
    return _shrunk_length(key, value, config)


def _shrunk_length(key: str, value: Any, config: Tree) -> Any:
    """Lengths of contexts keep their ratio, and the original one becomes 8, so that short texts are beyond it."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    name = "original_max_position_embeddings"
    original = config.get(name) or rope.get(name)
    if key in (name, "max_position_embeddings", "initial_context_length") and original:
        return max(1, round(value * ORIGINAL / original))
    return value


def oracle_class(config: Tree) -> Any:
    """transformers' own class. AutoModelForCausalLM does not find all of them."""
    return getattr(transformers, FAMILIES[config["model_type"]].architecture)


def oracle_config(config: Tree) -> Any:
    """The config of transformers' own class."""
    kind = SAME_CLASS.get(config["model_type"], config["model_type"])
    config_class = transformers.CONFIG_MAPPING[kind]
    values = {
        key: value for key, value in config.items() if key not in ("auto_map", "model_type", "quantization_config")
    }
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return config_class.from_dict({**values, "torch_dtype": "float32"}, **eager)


def oracle(config: Tree, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' model, in evaluation mode, with random weights: vectors around 1, matrices around 0."""
    model: nn.Module = oracle_class(config)(oracle_config(config)).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    buffers = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for key, tensor in [*model.named_parameters(), *buffers]:
        centre = float("norm" in key.split(".")[-2] and key.endswith("weight"))
        drawn = torch.empty(tensor.shape, dtype=torch.float64).normal_(0.0, 0.3, generator=generator)
        tensor.data = (drawn + centre).to(tensor.dtype)
    return model


def count_parameters(config: Tree) -> int:
    """The trainable parameters of transformers' class, without its weights."""
    with torch.device("meta"):
        model = oracle_class(config)(oracle_config(config))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def generated(model: Any, prompt_BS: Tensor, count: int) -> Tensor:
    """What transformers writes greedily after a prompt."""
    mask_BS = torch.ones_like(prompt_BS)
    ends = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    ends["use_mtp"] = False  # MiniMax-M2's config.json asks for it, but transformers has no such layers of it
    text_BS: Tensor = model.generate(prompt_BS, attention_mask=mask_BS, **ends)
    return text_BS[:, prompt_BS.shape[1] :]
