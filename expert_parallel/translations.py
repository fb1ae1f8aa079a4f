"""Translates words of Hugging Face, Megatron-LM, DeepSpeed and torchtitan into the settings of this package: for the
messages about unknown settings, and for the table in configs/README.md."""

from typing import NamedTuple


class Translation(NamedTuple):
    """Holds the settings that take the place of another system's word (none, if there are none), and what to know when
    they are written."""

    paths: tuple[str, ...] = ()
    note: str = ""


BALANCE = "write 'model.moe.losses=[{kind: balance, coefficient: 0.01}]'"
LATENT = "set model.attention.kind=latent, too"
FACTOR = "set model.moe.capacity.kind=factor, too"
# (words, paths, note); a word with a dot means the setting in this block alone.
_ROWS: list[tuple[str, str, str]] = [
    # The optimizer and its schedule.
    ("lr learning_rate peak_lr", "training.optimizer.learning_rate", ""),
    ("weight_decay wd", "training.optimizer.weight_decay", ""),
    ("adam_beta1 adam_beta2 beta1 beta2 betas", "training.optimizer.betas", "it is the list of both"),
    ("adam_epsilon adam_eps epsilon", "training.optimizer.eps", ""),
    ("optim optimizer_name optimizer.name optimizer.type", "training.optimizer.kind", "adamw is the only one"),
    ("max_grad_norm clip_grad gradient_clipping grad_clip max_norm", "training.clip_norm", "null does not clip"),
    ("lr_scheduler_type lr_decay_style lr_scheduler scheduler decay_type", "training.schedule.kind", ""),
    ("min_lr lr_min min_lr_factor min_lr_ratio", "training.schedule.final_fraction", "it is a fraction of the peak"),
    (
        "warmup_steps lr_warmup_iters lr_warmup_steps num_warmup_steps warmup_num_steps",
        "training.schedule.warmup_steps",
        "",
    ),
    (
        "warmup_ratio lr_warmup_fraction",
        "training.schedule.warmup_steps",
        "it is a number of steps: the ratio x training.steps",
    ),
    # The batch and the length of a run.
    ("global_batch_size train_batch_size", "training.global_batch", "it counts sequences of a step over all ranks"),
    (
        "micro_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu local_batch_size batch_size "
        "device_train_batch_size",
        "training.global_batch training.micro_steps",
        "a rank's micro-batch is training.global_batch / training.micro_steps / dp",
    ),
    ("gradient_accumulation_steps num_microbatches grad_accum", "training.micro_steps", ""),
    ("max_steps train_iters train_steps max_iters num_train_steps total_steps", "training.steps", ""),
    ("lr_decay_iters lr_decay_steps total_num_steps", "training.steps", "a schedule ends with the run"),
    (
        "num_train_epochs num_epochs max_epochs epochs train_samples",
        "training.steps",
        "there are no epochs: steps = sequences to train on / training.global_batch",
    ),
    ("seq_length seq_len max_seq_length max_seq_len block_size context_length", "training.sequence_length", ""),
    (
        "max_position_embeddings n_positions",
        "training.sequence_length model.position.max_length",
        "only learned positions have a largest length",
    ),
    # Precision, memory, and speed.
    (
        "bf16 bfloat16 torch_dtype compute_dtype precision mixed_precision mixed_precision_param params_dtype",
        "training.dtype",
        "write training.dtype=bfloat16",
    ),
    (
        "fp16 float16 half loss_scale initial_loss_scale",
        "training.dtype",
        "there is no float16: write training.dtype=bfloat16, which needs no loss scale",
    ),
    ("fp8 fp8_format fp8_recipe float8", "training.dtype", "there is no FP8: write training.dtype=bfloat16"),
    (
        "activation_checkpointing activation_checkpoint gradient_checkpointing checkpoint_activations "
        "recompute_activations recompute_granularity recompute_method",
        "training.recompute",
        "it is none, moe or block",
    ),
    ("torch_compile compile", "", "a run is not compiled, and there is no setting for it"),
    (
        "fsdp fsdp2 fsdp_config use_fsdp use_torch_fsdp2 use_distributed_optimizer",
        "parallel.data.kind",
        "write parallel.data.kind=sharded",
    ),
    (
        "data_parallel_shard_degree dp_shard hsdp",
        "parallel.data.shards",
        "set parallel.data.kind=sharded, too",
    ),
    (
        "dp dp_size data_parallel_size data_parallel_degree data_parallel_replicate_degree dp_replicate",
        "",
        "dp is not set: it is the number of ranks / parallel.cp / parallel.tp / parallel.pp",
    ),
    ("deepspeed", "training.engine.kind", "write training.engine.kind=deepspeed"),
    (
        "zero zero_stage zero_optimization zero_optimization.stage",
        "training.engine.zero_stage",
        "set training.engine.kind=deepspeed, too",
    ),
    (
        "offload_optimizer cpu_offload optimizer_cpu_offload",
        "training.engine.offload",
        "set training.engine.kind=deepspeed, too",
    ),
    # Parallelism.
    (
        "expert_model_parallel_size expert_parallel_size expert_parallel_degree expert_parallel ep_size ep_degree",
        "parallel.ep",
        "",
    ),
    (
        "expert_tensor_parallel_size expert_tensor_parallel_degree etp_size enable_expert_tensor_parallelism",
        "parallel.etp",
        "",
    ),
    (
        "tensor_model_parallel_size tensor_parallel_size tensor_parallel_degree tensor_parallel tp_size tp_degree",
        "parallel.tp",
        "",
    ),
    (
        "pipeline_model_parallel_size pipeline_parallel_size pipeline_parallel_degree pipeline_parallel pp_size",
        "parallel.pp",
        "",
    ),
    ("context_parallel_size context_parallel_degree context_parallel cp_size", "parallel.cp", ""),
    ("sequence_parallel", "parallel.tp", "tensor parallel ranks always divide the sequence between layers"),
    (
        "virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage",
        "parallel.pipeline.stages_per_rank",
        "set parallel.pipeline.kind=interleaved, too",
    ),
    ("pipeline_parallel_schedule pipeline_schedule", "parallel.pipeline.kind", ""),
    # The model.
    ("hidden_size dim n_embd embed_dim model_dim", "model.d_model", ""),
    ("num_hidden_layers n_layers n_layer", "model.num_layers", ""),
    ("num_attention_heads n_heads n_head", "model.attention.num_heads", ""),
    ("num_key_value_heads num_query_groups n_kv_heads", "model.attention.num_kv_heads", ""),
    ("head_dim kv_channels", "model.attention.head_size", ""),
    (
        "intermediate_size ffn_hidden_size ffn_dim d_ff n_inner inter_dim",
        "model.ffn.hidden model.moe.experts.hidden",
        "of the dense blocks, and of each expert",
    ),
    (
        "hidden_act hidden_activation activation_func",
        "model.ffn.activation model.moe.experts.activation",
        "gated SiLU is swiglu",
    ),
    ("rotary_dim", "model.attention.rope_size", ""),
    (
        "partial_rotary_factor rotary_percent rotary_pct",
        "model.attention.rope_size",
        "write the product of this share and model.attention.head_size",
    ),
    ("rope_theta rotary_base rope_base", "model.position.theta", ""),
    ("rope_scaling rope_parameters", "model.position.scaling", ""),
    ("position_embedding_type", "model.position.kind", ""),
    ("rms_norm_eps layer_norm_eps layernorm_epsilon norm_epsilon norm_eps", "model.norm.eps", ""),
    ("normalization norm_type", "model.norm.kind", ""),
    ("tie_word_embeddings tie_embeddings weight_tying", "model.tied_embeddings", ""),
    ("untie_embeddings_and_output_weights", "model.tied_embeddings", "true there is false here"),
    ("num_nextn_predict_layers num_mtp_layers mtp_num_layers", "model.mtp.depth", ""),
    ("mtp_loss_scaling_factor", "model.mtp.weight", ""),
    ("initializer_range init_method_std", "model.init_std", ""),
    ("sliding_window window_size", "model.attention.window", ""),
    ("swa_num_key_value_heads", "model.window_overrides.num_kv_heads", ""),
    ("rope_local_base_freq swa_rope_theta", "model.window_overrides.position.theta", ""),
    ("attention_chunk_size", "model.attention.chunk", ""),
    ("no_rope_layers no_rope_layer_interval no_rope_freq", "model.rope_blocks", "it selects the blocks with positions"),
    ("attention_multiplier softmax_scale", "model.attention.scale", ""),
    ("logits_scaling", "model.logits_divisor", ""),
    ("lm_head_bias", "model.unembedding_bias", ""),
    ("qk_layernorm use_qk_norm", "model.attention.qk_norm", ""),
    ("attn_temperature_tuning floor_scale attn_scale llama_4_scaling_beta", "model.attention.length_scaling", ""),
    ("attention_bias add_qkv_bias qkv_bias", "model.attention.bias", ""),
    ("hidden_dropout_prob resid_pdrop dropout_rate", "model.dropout", ""),
    ("vocab_size padded_vocab_size", "model.vocab_size", ""),
    ("q_lora_rank", "model.attention.query_rank", LATENT),
    ("kv_lora_rank", "model.attention.kv_rank", LATENT),
    ("qk_nope_head_dim", "model.attention.nope_size", LATENT),
    ("qk_rope_head_dim", "model.attention.rope_size", LATENT),
    ("v_head_dim", "model.attention.value_size", ""),
    ("attention_value_scale", "model.attention.value_scale", ""),
    # The experts and their router.
    (
        "num_local_experts n_routed_experts num_moe_experts moe_num_experts num_experts n_experts",
        "model.moe.num_experts",
        "",
    ),
    ("num_experts_per_tok num_experts_per_token moe_router_topk moe_top_k moe_k topk k", "model.moe.router.k", ""),
    ("top_k", "model.moe.router.k run.sample.top_k", ""),
    (
        "moe_intermediate_size moe_ffn_hidden_size moe_inter_dim expert_intermediate_size",
        "model.moe.experts.hidden",
        "",
    ),
    (
        "n_shared_experts num_shared_experts",
        "model.moe.shared_experts.hidden",
        "one shared network has the hidden sizes of all shared experts together",
    ),
    (
        "moe_shared_expert_intermediate_size shared_expert_intermediate_size",
        "model.moe.shared_experts.hidden",
        "",
    ),
    ("moe_shared_expert_gate", "model.moe.shared_expert_gate", ""),
    ("moe_apply_probs_on_input score_before_experts", "model.moe.experts.weight_input", ""),
    ("moe_aux_loss_coeff aux_loss_coef aux_loss_coeff aux_loss_alpha moe_loss_coeff", "model.moe.losses", BALANCE),
    (
        "router_aux_loss_coef",
        "model.moe.losses",
        f"{BALANCE}, where the coefficient is router_aux_loss_coef x k, since that loss is not divided by k",
    ),
    (
        "moe_z_loss_coeff router_z_loss_coef z_loss_coef z_loss_coeff",
        "model.moe.losses",
        "write 'model.moe.losses=[{kind: z_loss, coefficient: 0.001}]'",
    ),
    (
        "moe_router_load_balancing_type",
        "model.moe.losses model.moe.router.kind",
        "aux_loss is a balance loss, sinkhorn is model.moe.router.kind=sinkhorn",
    ),
    (
        "moe_expert_capacity_factor capacity_factor moe_capacity_factor train_capacity_factor capacity.factor",
        "model.moe.capacity.train",
        FACTOR,
    ),
    ("eval_capacity_factor moe_eval_capacity_factor", "model.moe.capacity.eval", FACTOR),
    ("min_capacity", "model.moe.capacity.minimum", FACTOR),
    ("expert_capacity", "model.moe.capacity.train", "set model.moe.capacity.kind=absolute, too"),
    ("drop_tokens", "model.moe.capacity.kind", "dropless drops no tokens"),
    ("moe_token_drop_policy", "model.moe.capacity.priority", "probs is probability"),
    ("use_rts", "model.moe.capacity.priority", "write model.moe.capacity.priority=random"),
    ("moe_pad_expert_input_to_capacity", "model.moe.capacity.pad", ""),
    ("moe_router_score_function scoring_func score_func", "model.moe.router.score", ""),
    ("norm_topk_prob route_norm", "model.moe.router.normalise", ""),
    ("routed_scaling_factor moe_router_topk_scaling_factor route_scale", "model.moe.router.scale", ""),
    ("n_group moe_router_num_groups n_expert_groups num_expert_groups", "model.moe.router.group_limit.count", ""),
    (
        "topk_group moe_router_group_topk n_limited_groups num_limited_groups",
        "model.moe.router.group_limit.limit",
        "",
    ),
    ("moe_router_bias_update_rate load_balance_coeff", "model.moe.router.balance_bias_rate", ""),
    ("router_jitter_noise moe_input_jitter_eps jitter_eps", "model.moe.router.jitter", ""),
    (
        "noisy_gate_policy",
        "model.moe.router.kind",
        "Jitter is model.moe.router.jitter, RSample is kind noisy_top_k with noise gumbel",
    ),
    (
        "moe_layer_freq decoder_sparse_step expert_interval",
        "model.moe_blocks",
        "write 'model.moe_blocks={kind: every_nth, n: 2}'",
    ),
    (
        "first_k_dense_replace n_dense_layers",
        "model.moe_blocks",
        "write 'model.moe_blocks={kind: all_but_first, k: 1}'",
    ),
    ("moe_token_dispatcher_type", "model.moe.dispatcher.kind", ""),
    ("moe_grouped_gemm use_grouped_mm", "model.moe.experts.backend", ""),
    # Data, files, and reports.
    ("data_path dataset_path dataset dataset_name train_file", "data.paths data.corpora", "texts, or prepared tokens"),
    (
        "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_model tokenizer_type",
        "data.tokenizer",
        "for Megatron-LM's token files; texts become tokens by `data prepare --tokenizer`",
    ),
    ("output_dir save save_dir save_folder dump_folder", "run.folder", ""),
    ("save_steps save_interval checkpoint_interval checkpoint.interval", "checkpoint.every", ""),
    ("save_total_limit keep_latest_k", "checkpoint.keep", ""),
    (
        "load resume_from_checkpoint initial_load_path load_dir",
        "checkpoint.start_from",
        "a run continues from the newest checkpoint in run.folder by itself",
    ),
    (
        "initial_load_in_hf",
        "checkpoint.start_from",
        "{kind: hf, path: FOLDER} takes the weights of a Hugging Face folder",
    ),
    ("eval_steps eval_interval evaluation.interval", "evaluation.every", ""),
    ("eval_iters eval_batch_size per_device_eval_batch_size", "evaluation.sequences", "it counts sequences in all"),
    ("logging_steps log_interval log_freq steps_per_print", "run.log_every", ""),
    (
        "report_to wandb wandb_project tensorboard_dir logging_dir",
        "run.folder",
        "a run always writes metrics.jsonl and tensorboard/ there",
    ),
    ("random_seed manual_seed", "seed", ""),
    ("use_cpu no_cuda", "runtime.device", "write runtime.device=cpu"),
    ("ddp_backend distributed_backend", "runtime.backend", ""),
    (
        "ddp_timeout distributed_timeout_minutes distributed_timeout",
        "runtime.timeout_seconds",
        "it is a number of seconds",
    ),
]
TRANSLATIONS: dict[str, Translation] = {
    word: Translation(tuple(paths.split()), note) for words, paths, note in _ROWS for word in words.split()
}


def translate(path: str) -> Translation | None:
    """Returns the translation of a dotted path by its last words, in any spelling with `-` or capitals; None if it has
    none. Of `model.capacity.factor`, `capacity.factor` is looked up before `factor`."""
    words = [word.strip("_") for word in path.lower().replace("-", "_").split(".")]
    endings = (".".join(words[start:]) for start in range(len(words)))
    return next((TRANSLATIONS[ending] for ending in endings if ending in TRANSLATIONS), None)


def translation_table() -> str:
    """Returns all translations as a table in Markdown: a row for each of our settings, with the words that mean it."""
    words_of: dict[Translation, list[str]] = {}
    for word, translation in TRANSLATIONS.items():
        words_of.setdefault(translation, []).append(f"`{word}`")
    rows = ["| elsewhere | here | |", "|---|---|---|"]
    for translation, words in words_of.items():
        here = " or ".join(f"`{path}`" for path in translation.paths) or "no setting"
        rows.append(f"| {', '.join(words)} | {here} | {translation.note} |")
    return "\n".join(rows)
