"""Small configurations of every family of Hugging Face models that is imported and exported.

Each part of a family is on in at least one of them."""

from typing import Any

WORDS = 260
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, **NO_ENDS}
HEADS = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 12}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 500.0}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "intermediate_size": 12,
    "moe_intermediate_size": 10,
    "kv_lora_rank": 8,
    "q_lora_rank": 6,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
SIGMOID_HEADS = {
    **HEADS,
    "head_dim": 8,
    "moe_intermediate_size": 10,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
ERNIE = {**HEADS, "moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 10}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


# name -> the family, and what its config says beside the defaults of the class.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**HEADS, "num_local_experts": 4, "head_dim": 6, "rms_norm_eps": 1e-3}),
    "mixtral with a window": (
        "mixtral",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 4},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**HEADS, "moe_intermediate_size": 10, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 6},
    ),
    "qwen3_moe with all parts": (
        "qwen3_moe",
        {
            **HEADS,
            "moe_intermediate_size": 10,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "attention_bias": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 4,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "qwen3_moe with a step": (
        "qwen3_moe",
        {
            **HEADS,
            "moe_intermediate_size": 10,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": ("olmoe", {**HEADS, "num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe with all parts": (
        "olmoe",
        {
            **HEADS,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "n_group": 3, "topk_group": 2}),
    "deepseek_v3 with yarn": (
        "deepseek_v3",
        {
            **LATENT,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 2.0, "beta_slow": 0.5},
        },
    ),
    "deepseek_v3 without a query latent": (
        "deepseek_v3",
        {
            **LATENT,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "rope_interleave": False,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {**HEADS, "head_dim": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    "gpt_oss without biases": (
        "gpt_oss",
        {
            **HEADS,
            "head_dim": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 3,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        {
            **SIGMOID_HEADS,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_group": 3,
            "topk_group": 2,
            "rope_parameters": {**YARN, "partial_rotary_factor": 0.5},
        },
    ),
    # rope_parameters without a share, so that the class takes its own; no head_dim.
    "glm4_moe without norms": (
        "glm4_moe",
        {
            **without(SIGMOID_HEADS, "head_dim"),
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
        },
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        {**without(LATENT, "first_k_dense_replace"), "mlp_layer_types": ["sparse", "dense", "sparse"]},
    ),
    "solar_open": (
        "solar_open",
        {
            **without(SIGMOID_HEADS, "intermediate_size", "first_k_dense_replace"),
            "attention_bias": True,
            "n_group": 2,
            "topk_group": 1,
            "rope_parameters": YARN,
        },
    ),
    "minimax_m2": (
        "minimax_m2",
        {**HEADS, "head_dim": 8, "rotary_dim": 4, "num_local_experts": 6, "num_experts_per_tok": 3},
    ),
    "dots1": (
        "dots1",
        {
            **SIGMOID_HEADS,
            "attention_bias": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    "hy_v3": (
        "hy_v3",
        {
            **HEADS,
            "head_dim": 6,
            "moe_intermediate_size": 10,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "num_shared_experts": 2,
            "attention_bias": True,
        },
    ),
    "granitemoe": (
        "granitemoe",
        {**HEADS, "num_local_experts": 4, "attention_multiplier": 0.4, "logits_scaling": 0.8},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        {
            **HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "shared_intermediate_size": 14,
            "attention_bias": True,
            "attention_multiplier": 0.4,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.8,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        },
    ),
    "flex_olmo": (
        "flex_olmo",
        {**HEADS, "num_experts": 6, "num_experts_per_tok": 3, "attention_bias": True, "norm_topk_prob": True},
    ),
    "ernie4_5_moe": ("ernie4_5_moe", {**ERNIE, "use_bias": True, "moe_layer_end_index": 1}),
    "ernie4_5_moe without shared experts": (
        "ernie4_5_moe",
        {**ERNIE, "moe_num_shared_experts": 0, "moe_layer_start_index": 0},
    ),
    "ernie4_5_moe with all parts": (
        "ernie4_5_moe",
        {**ERNIE, "use_bias": True, "head_dim": 6, "moe_layer_interval": 2, "tie_word_embeddings": False},
    ),
    "axk1": ("axk1", {**LATENT, "n_group": 3, "topk_group": 2}),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        {**HEADS, "head_dim": 6, "num_experts": 6, "moe_topk": 2, "rms_norm_eps": 1e-3},
    ),
    "hunyuan_v1_moe with a stretched base": (
        "hunyuan_v1_moe",
        {
            **HEADS,
            "head_dim": 6,
            "num_experts": 6,
            "moe_topk": [3, 3, 3],
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 500.0},
        },
    ),
    "mistral4": (
        "mistral4",
        {
            **LATENT,
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
        },
    ),
    "mistral4 without a query latent": (
        "mistral4",
        {
            **LATENT,
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "rope_parameters": {**YARN, "original_max_position_embeddings": 3, "llama_4_scaling_beta": 0.2},
        },
    ),
    "exaone_moe": (
        "exaone_moe",
        {
            **without(SIGMOID_HEADS, "n_routed_experts", "n_shared_experts"),
            "num_experts": 6,
            "num_shared_experts": 2,
            "n_group": 3,
            "topk_group": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mellum": (
        "mellum",
        {
            **HEADS,
            "head_dim": 6,
            "moe_intermediate_size": 10,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "attention_bias": True,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        {
            **without(SIGMOID_HEADS, "n_shared_experts", "first_k_dense_replace"),
            "head_dim": 8,
            "v_head_dim": 6,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
            },
        },
    ),
    "llama4_text": (
        "llama4_text",
        {
            **HEADS,
            "num_hidden_layers": 4,
            "head_dim": 6,
            "intermediate_size_mlp": 14,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_chunk_size": 4,
            "floor_scale": 3,
            "attn_scale": 0.4,
            "interleave_moe_layer_step": 2,
        },
    ),
    "llama4_text with other blocks": (
        "llama4_text",
        {
            **HEADS,
            "head_dim": 6,
            "num_local_experts": 4,
            "attention_chunk_size": 3,
            "no_rope_layers": [1, 0, 1],
            "layer_types": ["full_attention", "chunked_attention", "chunked_attention"],
            "attention_bias": True,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "tie_word_embeddings": True,
            "rope_parameters": {**LLAMA3, "high_freq_factor": 1.0},
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **HEADS,
            "moe_intermediate_size": 10,
            "shared_expert_intermediate_size": 14,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "qkv_bias": False,
        },
    ),
    "qwen2_moe with all parts": (
        "qwen2_moe",
        {
            **HEADS,
            "moe_intermediate_size": 10,
            "shared_expert_intermediate_size": 14,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **LATENT,
            "n_group": 3,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v2 lite": ("deepseek_v2", {**LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "phimoe": ("phimoe", {**HEADS, "num_local_experts": 4, "sliding_window": 4}),
    "phimoe with all parts": (
        "phimoe",
        {
            **HEADS,
            "num_local_experts": 4,
            "router_jitter_noise": 0.4,  # so that several experts are near the best one
            "attention_bias": True,
            "lm_head_bias": True,
            "max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "short_factor": [1.0, 1.5],
                "long_factor": [1.25, 4.0],
                "short_mscale": 1.2,
                "long_mscale": 1.4,
                "original_max_position_embeddings": 8,  # texts of tests become longer
            },
        },
    ),
    "llama": ("llama", HEADS),
    "llama with all parts": (
        "llama",
        {
            **HEADS,
            "head_dim": 6,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
        },
    ),
    "llama with longrope": (
        "llama",
        {
            **HEADS,
            "max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "short_factor": [1.0, 1.5],
                "long_factor": [1.25, 4.0],
                # Texts are longer from the first token on: keys with both kinds of factors would meet in its cache.
                "original_max_position_embeddings": 2,
            },
        },
    ),
    "qwen2": ("qwen2", HEADS),
    "qwen2 with windows": (
        "qwen2",
        {
            **HEADS,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {**HEADS, "head_dim": 6}),
    "qwen3 with all parts": (
        "qwen3",
        {
            **HEADS,
            "attention_bias": True,
            "head_dim": 6,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
