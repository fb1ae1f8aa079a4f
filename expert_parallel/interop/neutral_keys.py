"""Lists the keys of a config.json on which the logits of no family depend, each with the reason."""

# key -> why the logits do not depend on it. What a family adds is in its `neutral`.
NEUTRAL: dict[str, str] = {
    # What the file describes, and how it is loaded.
    "architectures": "names a class of transformers; the family is that of model_type",
    "model_type": "chooses the family",
    "transformers_version": "the version that wrote the file",
    "torch_dtype": "the dtype that loaders prefer; tensors have their own",
    "dtype": "the name of torch_dtype since transformers 5",
    "auto_map": "names Python code beside the file, which is never run",
    "_name_or_path": "the place that the model was loaded from",
    "name_or_path": "the older name of _name_or_path",
    "_commit_hash": "the version of the folder on the hub",
    "tokenizer_class": "describes the tokenizer, whose own files are read",
    "prefix": "a text that pipelines put before prompts",
    "task_specific_params": "arguments of pipelines",
    "finetuning_task": "the name of a benchmark",
    "id2label": "names of classes; a language model has none",
    "label2id": "the inverse of id2label",
    "num_labels": "the number of classes; a language model has none",
    "problem_type": "the loss of a classifier; a language model has none",
    "max_position_embeddings": "the longest text; read where the scaling of positions depends on it",
    "unsloth_version": "the version of a tool for training",
    # How transformers computes the same numbers, and what it returns beside the logits.
    "_attn_implementation": "which kernel computes attention",
    "_attn_implementation_autoset": "whether that kernel was chosen automatically",
    "attn_implementation": "another name of _attn_implementation",
    "experts_implementation": "which kernel computes experts",
    "use_cache": "whether keys and values are kept between tokens",
    "return_dict": "the type of what a model returns",
    "use_return_dict": "another name of return_dict",
    "output_attentions": "returns attention weights beside the logits",
    "output_hidden_states": "returns the residual stream beside the logits",
    "output_router_logits": "returns router logits, and adds the balance loss to the loss",
    "torchscript": "how a model is exported",
    "pretraining_tp": "splits the same products into parts, to repeat their rounding in training",
    "chunk_size_feed_forward": "splits the same feed-forward network by tokens",
    "use_bfloat16": "the dtype of TPUs",
    "tf_legacy_loss": "the loss of TensorFlow models",
    "gradient_checkpointing": "recomputes activations in the backward pass",
    "is_decoder": "every family here is a decoder",
    # Training; rules of the families that have the losses read them, see balance_loss.py.
    "initializer_range": "the standard deviation of initial weights; --config-only reads it",
    "router_aux_loss_coef": "the coefficient of a balance loss",
    "router_z_loss_coef": "the coefficient of a z-loss",
    "aux_loss_alpha": "the coefficient of a balance loss",
    "seq_aux": "the scope of a balance loss",
    # Generation, which has its own file; ids of tokens end in _token_id, see `is_neutral`.
    "max_length": "the longest text that is written",
    "min_length": "the shortest text that is written",
    "do_sample": "draws tokens instead of taking the likeliest",
    "early_stopping": "when beam search ends",
    "num_beams": "the width of beam search",
    "num_beam_groups": "groups of beam search",
    "temperature": "divides logits before a token is drawn",
    "top_k": "draws from the k likeliest tokens; routers have num_experts_per_tok",
    "top_p": "draws from the likeliest tokens of this total probability",
    "typical_p": "draws from typical tokens",
    "epsilon_cutoff": "the least probability of a drawn token",
    "eta_cutoff": "the least probability of a drawn token, by entropy",
    "repetition_penalty": "makes tokens of the text less likely",
    "length_penalty": "scores of beam search by length",
    "diversity_penalty": "scores of groups of beam search",
    "encoder_repetition_penalty": "as repetition_penalty, for the prompt",
    "no_repeat_ngram_size": "forbids repeated sequences of tokens",
    "encoder_no_repeat_ngram_size": "as no_repeat_ngram_size, for the prompt",
    "bad_words_ids": "tokens that are not written",
    "suppress_tokens": "tokens that are not written",
    "begin_suppress_tokens": "tokens that are not written first",
    "exponential_decay_length_penalty": "makes the end token likelier in long texts",
    "num_return_sequences": "how many texts are written",
    "output_scores": "returns scores beside the text",
    "return_dict_in_generate": "the type of what generation returns",
    "remove_invalid_values": "replaces NaN and infinite scores in generation",
    "num_assistant_tokens": "how many tokens a draft model writes at once",
    "num_assistant_tokens_schedule": "how that number changes",
    "assistant_confidence_threshold": "when a draft model stops",
    "assistant_lookbehind": "aligns the tokenizer of a draft model",
    "target_lookbehind": "aligns the tokenizer of a draft model",
}
# Counts of layers of multi-token prediction: whether a model has them is found from its tensors.
MTP_KEYS: dict[str, str] = {
    "num_nextn_predict_layers": "layers that predict further tokens, no part of the logits",
    "num_mtp_layers": "the name of num_nextn_predict_layers since transformers 5",
}
# Keys that make another model, unless they are null, false, 0 or empty.
SWITCHED_OFF: dict[str, str] = {
    "add_cross_attention": "attention to an encoder",
    "cross_attention_hidden_size": "the width of an encoder",
    "is_encoder_decoder": "an encoder",
    "tie_encoder_decoder": "weights that an encoder shares",
    "pruned_heads": "heads that are left out",
    "per_layer_config": "settings that differ between blocks",
    "quantization_config": "another form of the weights, which families read by themselves",
}


def is_neutral(key: str) -> bool:
    """Returns True if the logits of no family depend on a key of config.json."""
    return key in NEUTRAL or key.endswith("_token_id")
