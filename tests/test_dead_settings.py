"""Settings without effect are named in `check` and at the start of `train`, each beside a neighbour that has one."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expert_parallel.cli.app import app
from expert_parallel.training.config import load_config
from expert_parallel.training.dead_settings import dead_settings
from tests.launches import run_configs, small_config

GROUPS = "model.moe.router={{kind: top_k, k: 2, group_limit: {{count: 2, limit: {}}}}}"
CAPACITY = "model.moe.capacity={{kind: factor, train: {0}, eval: {0}}}"
ABSOLUTE = "model.moe.capacity={{kind: absolute, train: {0}, eval: {0}}}"
HASH = "model.moe={{num_experts: 4, router: {{kind: {}, k: 2}}, experts: {{hidden: 8}}, capacity: {}}}"
BY_SCORE = "{kind: factor, priority: probability}"
BALANCE, ONE = "model.moe.losses=[{kind: balance}]", ["model.moe.router={k: 1, normalise: false}"]
GSHARD = "model.moe.router={{kind: gshard, second: {}, threshold: 0.2}}"
QUIET = ["training.steps=10", "training.schedule.warmup_steps=2", "checkpoint.every=5", "evaluation.every=5"]
FOUR = [*QUIET, "model.moe.num_experts=4", "training.sequence_length=16", "training.global_batch=4"]
PAIRS = [  # overrides with a dead setting, those of its neighbour, words of the sentence
    (["training.schedule.warmup_steps=10"], ["training.schedule.warmup_steps=9"], "warmup_steps (10) is not below"),
    (["evaluation.every=11"], ["evaluation.every=10"], "evaluation.every (11) is above training.steps (10)"),
    (["checkpoint.every=11"], ["checkpoint.every=10"], "checkpoint.every (11) is above training.steps (10)"),
    (["checkpoint.keep_every=11"], ["checkpoint.keep_every=10"], "checkpoint.keep_every (11) is above"),
    (
        ["training.schedule.final_fraction=1"],
        ["training.schedule.final_fraction=0.9"],
        "training.schedule.final_fraction is 1",
    ),
    ([GROUPS.format(2)], [GROUPS.format(1)], "group_limit.limit (2) equals model.moe.router.group_limit.count (2)"),
    (["model.moe.router.k=4", "model.moe.losses=[]"], ["model.moe.router.k=3"], "router.k (4) equals"),
    (["model.moe.router.k=4", BALANCE], ["model.moe.router.k=3", BALANCE], "losses[0] balances the load"),
    (
        ["model.moe.router={k: 4, balance_bias_rate: 0.1}"],
        ["model.moe.router={k: 3, balance_bias_rate: 0.1}"],
        "balance_bias_rate (0.1) changes the choice",
    ),
    (
        [*ONE, "model.moe.losses=[{kind: balance, choices: first}]"],
        ["model.moe.router.k=2", "model.moe.losses=[{kind: balance, choices: first}]"],
        "losses[0].choices is 'first'",
    ),
    ([GSHARD.format("gumbel")], [GSHARD.format("proportional")], "router.threshold (0.2) is used by"),
    ([HASH.format("hash", BY_SCORE)], [HASH.format("top_k", BY_SCORE)], "router.kind is 'hash', whose scores"),
    (
        [*ONE, "model.moe.capacity={kind: factor, first_choices_first: false}"],
        [
            "model.moe.router.k=2",
            "model.moe.capacity={kind: factor, train: 1.0, eval: 1.0, first_choices_first: false}",
        ],
        "first_choices_first is false",
    ),
    ([CAPACITY.format(2.0)], [CAPACITY.format(1.9)], "every expert has room for every token"),
    ([ABSOLUTE.format(64)], [ABSOLUTE.format(63)], "not below the 64 tokens of a micro-step"),
    (["model.attention.window=16"], ["model.attention.window=15"], "attention.window (16) is not below"),
    (["model.attention.chunk=16"], ["model.attention.chunk=15"], "attention.chunk (16) is not below"),
    (
        ["model.attention.length_scaling={beta: 0.1, length: 17, offset: 1}"],
        ["model.attention.length_scaling={beta: 0.1, length: 16, offset: 1}"],
        "attention.length_scaling.length (17) is not below training.sequence_length + offset (17)",
    ),
    (
        ["parallel.data={kind: sharded, shards: 1, expert_shards: 1}"],
        ["parallel.data={kind: sharded}"],
        "shards and expert_shards are 1",
    ),
    (
        ["parallel.ep=1", "model.moe.dispatcher={kind: all_to_all, exchange_dtype: bfloat16}"],
        ["parallel.ep=2", "model.moe.dispatcher={kind: all_to_all, exchange_dtype: bfloat16}"],
        "exchange_dtype is 'bfloat16'",
    ),
    (
        ["parallel.ep=1", "model.moe.dispatcher={kind: all_to_all, overlap: 2}"],
        ["parallel.ep=2", "model.moe.dispatcher={kind: all_to_all, overlap: 2}"],
        "dispatcher.overlap is 2",
    ),
]


@pytest.mark.parametrize("path", run_configs(), ids=lambda path: path.stem)
def test_a_shipped_config_has_none(path: Path) -> None:
    assert dead_settings(load_config(path)) == []


@pytest.mark.parametrize(("dead", "neighbour", "words"), PAIRS, ids=[words for *_, words in PAIRS])
def test_a_dead_setting_is_named_and_its_neighbour_is_not(
    dead: list[str], neighbour: list[str], words: str, tmp_path: Path
) -> None:
    file = small_config(tmp_path)
    assert words in "\n".join(dead_settings(load_config(file, [*FOUR, *dead])))
    assert words not in "\n".join(dead_settings(load_config(file, [*FOUR, *neighbour])))


def test_one_expert_needs_no_balance(tmp_path: Path) -> None:
    one = ["model.moe.num_experts=1", "parallel.ep=1", *ONE, BALANCE]
    file, by_score = small_config(tmp_path), f"model.moe.capacity={BY_SCORE}"
    found = dead_settings(load_config(file, [*QUIET, *one, by_score]))
    assert any("losses[0] balances the load" in sentence for sentence in found)
    assert any("model.moe.num_experts is 1, whose score is always 1" in sentence for sentence in found)


def test_check_and_train_print_them(tmp_path: Path) -> None:
    file = small_config(tmp_path)
    late = [*QUIET, "training.steps=1", "training.schedule.warmup_steps=3", "parallel.ep=1"]
    line = re.compile(r"^warning: training\.schedule\.warmup_steps \(3\) is not below training\.steps \(1\)", re.M)
    for command in ("check", "train"):
        output = CliRunner().invoke(app, [command, str(file), *late, f"run.folder={tmp_path / 'run'}"]).output
        assert len(line.findall(output)) == 1, output


def test_more_experts_than_there_are_are_refused_with_both_paths(tmp_path: Path) -> None:
    words = r"model\.moe.*router\.k \(5\) is larger than .*num_experts \(4\)"
    with pytest.raises(ValueError, match=words):
        load_config(small_config(tmp_path), ["model.moe.num_experts=4", "model.moe.router.k=5"])
