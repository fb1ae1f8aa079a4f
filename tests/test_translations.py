"""Words of other systems lead to our settings, wherever they are written; the README prints the same table."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from expert_parallel.cli.settings import with_translations
from expert_parallel.config import load_tree, read_settings
from expert_parallel.settings import setting_paths
from expert_parallel.training.config import Config, load_config
from expert_parallel.translations import TRANSLATIONS
from tests.launches import ROOT, small_config

PATHS = setting_paths(Config)
# What users of these systems write first: options of their trainers, and keys of their model configs.
HUGGING_FACE = """
    learning_rate per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps warmup_steps
    weight_decay max_grad_norm save_steps eval_steps logging_steps bf16 fp16 fsdp hidden_size num_hidden_layers
    num_attention_heads num_key_value_heads intermediate_size moe_intermediate_size num_local_experts n_routed_experts
    num_experts_per_tok router_aux_loss_coef max_position_embeddings rope_theta rms_norm_eps vocab_size
"""
MEGATRON = """
    lr micro_batch_size global_batch_size train_iters lr_warmup_iters clip_grad save_interval moe_router_topk
    moe_aux_loss_coeff moe_z_loss_coeff moe_expert_capacity_factor expert_model_parallel_size
    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size recompute_granularity
"""
DEEPSPEED = """
    train_batch_size train_micro_batch_size_per_gpu gradient_clipping zero_stage capacity_factor eval_capacity_factor
    min_capacity ep_size k
"""
TORCHTITAN = """
    local_batch_size seq_len max_norm expert_parallel_degree tensor_parallel_degree data_parallel_shard_degree
    activation_checkpoint top_k aux_loss_coef topk max_seq_length activation_checkpointing tokenizer
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return load_tree(small_config(tmp_path_factory.mktemp("config")), (), Config)


def test_the_words_of_each_system_are_known() -> None:
    words = " ".join((HUGGING_FACE, MEGATRON, DEEPSPEED, TORCHTITAN)).split()
    assert len(words) >= 45
    assert set(words) <= TRANSLATIONS.keys()


def test_every_translation_is_a_setting_or_says_why_not() -> None:
    for word, translation in TRANSLATIONS.items():
        assert set(translation.paths) <= set(PATHS), word
        assert translation.paths or translation.note, word
        assert word not in PATHS, "it would never be looked up"


def test_every_word_leads_to_its_translation(tree: dict[str, Any]) -> None:
    """Typed at the top level, as if there were no blocks."""
    for word, translation in TRANSLATIONS.items():
        block, dot, name = word.partition(".")
        if dot and block in tree:  # `optimizer.name` is none of ours, `evaluation.interval` lies in one of ours
            changed = tree | {block: {**tree[block], name: 1}}
        else:
            changed = tree | {block: {name: 1} if dot else 1}
        with pytest.raises(ValueError, match="unknown setting") as refused:
            read_settings(Config, changed, "config.yaml")
        message = str(refused.value)
        assert message.startswith(f"config.yaml: unknown setting {word} ("), message
        assert " or ".join(translation.paths) in message
        assert message.endswith(translation.note + ")") or not translation.note, message


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lr=3e-4", "unknown setting lr (did you mean training.optimizer.learning_rate?)"),
        ("training.lr=3e-4", "unknown setting training.lr (did you mean training.optimizer.learning_rate?)"),
        ("training.optimizer.lr=1", "training.optimizer.lr (did you mean training.optimizer.learning_rate?)"),
        ("optimizer={params: {lr: 1}}", "optimizer.params.lr (did you mean training.optimizer.learning_rate?)"),
        ("capacity.factor=1.25", "unknown setting capacity.factor (did you mean model.moe.capacity.train? set"),
        ("model.moe.capacity.factor=1", "model.moe.capacity.factor (did you mean model.moe.capacity.train? set"),
        ("model.moe.capacity={kind: absolute, factor: 1}", "capacity.factor (did you mean model.moe.capacity.train?"),
        ("model.moe.losses=[{kind: balance, aux_loss_coef: 1}]", "model.moe.losses[0].aux_loss_coef (did you mean"),
        ("moe.topk=2", "unknown setting moe.topk (did you mean model.moe.router.k?)"),
        ("zero_optimization.stage=2", "zero_optimization.stage (did you mean training.engine.zero_stage?"),
        ("--micro-batch-size=2", "--micro-batch-size (did you mean training.global_batch or training.micro_steps?"),
        ("MicroBatchSize=2", "unknown setting MicroBatchSize"),
        ("model.hidden_sise=2", "unknown setting model.hidden_sise (did you mean model.d_model?)"),
        ("parallel.dp=2", "unknown setting parallel.dp (dp is not set: it is the number of ranks / parallel.cp"),
        ("num_train_epochs=3", "did you mean training.steps? there are no epochs"),
        # our own words, in other blocks, are found as before
        ("learning_rates=[1]", "unknown setting learning_rates"),
        ("training.num_experts=2", "training.num_experts (did you mean model.moe.num_experts?)"),
        ("model.moe.router.train=2", "(another kind of model.moe.router has it)"),
    ],
)
def test_the_sentence(override: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown setting") as refused:
        load_config(small_config(tmp_path), [override])
    assert sentence in str(refused.value)


def test_a_file_of_another_system_is_answered_by_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.yaml"
    path.write_text(yaml.safe_dump({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}))
    with pytest.raises(ValueError, match=r"unknown setting bf16 \(did you mean training.dtype\?.*\(and \d more\)$"):
        load_config(path)


def test_the_readme_prints_the_table() -> None:
    page = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    assert page.count("\n| `") > 60
    assert page == with_translations(page), "the table has changed: `expert-parallel settings --write configs`"
