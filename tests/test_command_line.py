"""The command line: what is refused and in which words, what `check` says, and real runs alone and under torchrun.

A refusal is one line on stderr, `error: ` and a sentence with the setting's path and the numbers, with exit code 2,
before any training, by one rank only.
"""

import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner, Result

from expert_parallel.__main__ import main
from expert_parallel.cli.app import app
from expert_parallel.model.parallelize import build_model
from expert_parallel.training.check import format_duration
from expert_parallel.training.config import DTYPES, Config, load_config
from expert_parallel.training.memory import state_memory
from expert_parallel.training.setup import check_degrees
from tests.launches import ROOT, run_configs, run_folder, small_config, start

SHIPPED = run_configs()


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return small_config(tmp_path)


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A copy of a run of 2 steps on 2 ranks, to do with as one likes."""
    return shutil.copytree(run_folder("torchrun"), tmp_path / "copy")


def invoke(*arguments: str | Path) -> Result:
    """In this process, alone."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(result: Result) -> str:
    """The sentence, without `error: `."""
    assert isinstance(result.exception, SystemExit), result.exception  # no traceback
    assert result.exit_code == 2
    assert not result.stdout
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, "one line"
    return result.stderr.removeprefix("error: ").rstrip("\n")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: overrides on small_config (4 experts, d_model 16, 2 blocks), and what the sentence says

DENSE = ["model.moe=null", "model.ffn={hidden: 8}", "parallel.ep=1"]
REFUSED_SETTINGS: dict[str, tuple[list[str], str]] = {
    # names and types
    "misspelt": (
        ["model.moe.num_expert=8"],
        "unknown setting model.moe.num_expert (did you mean model.moe.num_experts?)",
    ),
    "misspelt, and so another is missing": (
        ["model.moe={num_expert: 8, experts: {hidden: 16}}"],
        "unknown setting model.moe.num_expert (did you mean model.moe.num_experts?) (and 1 more)",
    ),
    "misspelt in a list": (
        ["model.moe.losses=[{kind: z_loss, scale: 1}]"],
        "unknown setting model.moe.losses[0].scale",
    ),
    "misplaced": (
        ["training.learning_rate=3e-4"],
        "unknown setting training.learning_rate (did you mean training.optimizer.learning_rate?)",
    ),
    "unknown block": (["optimiser.learning_rate=3e-4"], "unknown setting optimiser"),
    "of another kind": (
        ["model.moe.capacity={kind: dropless, train: 1.0}"],
        "unknown setting model.moe.capacity.train (another kind of model.moe.capacity has it)",
    ),
    "missing": (["model={d_model: 16}"], "model.num_layers is missing (and 1 more)"),
    "text for a number": (["model.num_layers=two"], 'model.num_layers: input should be a valid integer, found "two"'),
    "fraction": (["training.steps=2.5"], "training.steps: input should be a valid integer, found 2.5"),
    "bool for a number": (["seed=true"], "seed: input should be a valid integer, found true"),
    "number for a bool": (
        ["model.tied_embeddings=1"],
        "model.tied_embeddings: input should be a valid boolean, found 1",
    ),
    "number for a text": (["run={folder: 5}"], "run.folder must be a text, found 5: a text that has a meaning in YAML"),
    "null": (["run={folder: }"], "run.folder: input should be a valid string, found null"),
    "number for a block": (["model.moe=5"], "model.moe must be a block of settings, found 5"),
    "list for a union": (["data=[a.txt]"], 'data must be a block of settings, found ["a.txt"]'),
    "block for a list": (["model.moe.losses={}"], "model.moe.losses: input should be a valid list, found {}"),
    "in a list": (["data.paths=[a.txt, 5]"], "data.paths[1] must be a text, found 5: a text that has"),
    "no kind": (["model.moe.capacity={train: 1.5}"], "model.moe.capacity.kind is missing"),
    "unknown kind": (
        ["model.moe.capacity.kind=choppy"],
        "model.moe.capacity.kind is 'choppy', it must be one of 'dropless', 'factor', 'absolute'",
    ),
    "unknown kind in a list": (
        ["model.moe.losses=[{kind: balance}, {kind: z}]"],
        "model.moe.losses[1].kind is 'z', it must be one of 'balance', 'z_loss', 'importance', 'load'",
    ),
    "unknown choice": (
        ["training.dtype=float16"],
        "training.dtype: input should be 'float32', 'bfloat16' or 'float64', found \"float16\"",
    ),
    # versions
    "a newer version, before whatever else it says": (
        ["version=2", "model.moe.num_expert=8"],
        "config.yaml: version is 2, newer than 1, the newest that this installation reads: update expert-parallel",
    ),
    "no version": (["version=0"], "version: input should be greater than or equal to 1, found 0"),
    "text for a version": (["version='1'"], 'version: input should be a valid integer, found "1"'),
    # ranges
    "too small": (["model.moe.num_experts=0"], "num_experts: input should be greater than or equal to 1, found 0"),
    "negative": (["seed=-1"], "seed: input should be greater than or equal to 0, found -1"),
    "not a number": (
        ["training.optimizer.learning_rate=.nan"],
        "learning_rate: input should be a finite number, found NaN",
    ),
    "infinite": (["model.moe.capacity.train=.inf"], "capacity.train: input should be a finite number, found Infinity"),
    "too large": (
        ["runtime.timeout_seconds=1e300"],
        "runtime.timeout_seconds: input should be less than or equal to 1000000, found 1e+300",
    ),
    "too short a list": (["training.optimizer.betas=[0.9]"], "training.optimizer.betas: list should have at least 2"),
    # what does not fit together, named in full from wherever it is found
    "k above experts": (["model.moe.router.k=9"], "model.moe.router.k (9) is larger than model.moe.num_experts (4)"),
    "k of 1": (
        ["model.moe.router.k=1"],
        "model.moe.router.normalise is true with model.moe.router.k = 1: the only weight would always be 1 and the "
        "router would never learn; set model.moe.router.normalise to false",
    ),
    "a loss twice": (
        ["model.moe.losses=[{kind: z_loss}, {kind: z_loss}]"],
        "model.moe.losses: each kind and scope may occur once, found z_loss, z_loss",
    ),
    "two widths": (["model.moe.d_model=3"], "model.moe.d_model (3) differs from model.d_model (16)"),
    "heads": (
        ["model.attention.num_kv_heads=3"],
        "model.attention.num_heads (2) is not a multiple of model.attention.num_kv_heads (3)",
    ),
    "odd heads": (
        ["model.attention.head_size=7"],
        "model.attention.head_size (7) must be even for model.position.kind rope",
    ),
    "too few positions": (
        ["model.position={kind: learned, max_length: 8}"],
        "model.position.max_length (8) is smaller than training.sequence_length (16)",
    ),
    "too small a vocabulary": (["model.vocab_size=100"], "model.vocab_size (100) must be at least 256"),
    "a block that is not there": (
        ["model.moe_blocks={kind: list, indices: [7]}"],
        "model.moe_blocks names block 7, but model.num_layers is 2",
    ),
    "no MoE block": (
        ["model.moe_blocks={kind: every_nth, n: 5}"],
        "model.moe is given, but model.moe_blocks selects none of the 2 blocks",
    ),
    "a block twice": (
        ["model.moe_blocks={kind: list, indices: [0, 1, 1]}"],
        "model.moe_blocks.indices names a block twice: [0, 1, 1]",
    ),
    "MoE blocks without experts": (
        [*DENSE, "model.moe_blocks={kind: every_nth, n: 2}"],
        "model.moe_blocks is given without model.moe: there are no experts to put into these blocks",
    ),
    "no ffn": (["model.moe_blocks={kind: every_nth, n: 2}"], "model.ffn is missing: 1 of the 2 blocks are dense"),
    "idle ffn": (["model.ffn={hidden: 8}"], "model.ffn is given, but all 2 blocks are MoE: it would do nothing"),
    "micro steps": (
        ["training.micro_steps=3"],
        "training.global_batch (4) is not a multiple of training.micro_steps (3)",
    ),
    "experts without a place": (
        ["parallel.ep=8"],
        "model.moe.num_experts (4) is smaller than parallel.ep (8): each expert-parallel rank must hold at least one",
    ),
    "ranks without experts": (
        [*DENSE, "parallel.ep=2"],
        "parallel.ep is 2 but the model has no experts (model.moe)",
    ),
    "recompute without experts": (
        [*DENSE, "training.recompute=moe"],
        "training.recompute is 'moe' but the model has no experts (model.moe)",
    ),
    "local dispatcher": (
        ["model.moe.dispatcher.kind=local"],
        "model.moe.dispatcher.kind 'local' cannot reach the experts of other ranks: parallel.ep is 2, it must be 1",
    ),
    "kernel without this dtype": (
        ["model.moe.experts.backend=grouped_mm"],
        "model.moe.experts.backend 'grouped_mm' cannot multiply these: training.dtype is float64",
    ),
    "kernel without these sizes": (
        ["model.moe.experts.backend=grouped_mm", "training.dtype=bfloat16", "model.moe.experts.hidden=12"],
        "model.d_model is 16 and model.moe.experts.hidden is 12 (it takes 16-byte multiples)",
    ),
    # overrides
    "no equals sign": (["seed"], "the override 'seed' is not of the form dotted.key=value"),
    "no key": (["model..k=3"], "the override 'model..k=3' is not of the form dotted.key=value"),
    "below a number": (
        ["model.num_layers.x=3"],
        "the override 'model.num_layers.x=3': model.num_layers is not a block of settings",
    ),
    "value is not YAML": (
        ["seed=["],
        "the override 'seed=[' is not valid YAML: it ends inside a bracket: if the shell has split it",
    ),
    "key twice": (["run={folder: a, folder: b}"], "is not valid YAML: the key 'folder' is given twice"),
}


@pytest.mark.parametrize("case", REFUSED_SETTINGS)
def test_a_setting_that_cannot_work_is_refused(case: str, config_file: Path) -> None:
    """By `check` and by `train`, in the same words (train: a sample of them here, since it is the same function)."""
    overrides, sentence = REFUSED_SETTINGS[case]
    refused = refusal(invoke("check", config_file, *overrides))
    assert sentence in refused
    assert refused.startswith(("the override", str(config_file)))


@pytest.mark.parametrize("case", ["misspelt", "text for a number", "k above experts", "experts without a place"])
def test_training_refuses_in_the_same_words(case: str, config_file: Path) -> None:
    overrides, _ = REFUSED_SETTINGS[case]
    assert refusal(invoke("train", config_file, *overrides)) == refusal(invoke("check", config_file, *overrides))
    assert not (config_file.parent / "run").exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must hold a mapping of settings, found null"),
        ("- run\n- model\n", 'must hold a mapping of settings, found ["run", "model"]'),
        ("just words", 'must hold a mapping of settings, found "just words"'),
        ("run: [", "is not valid YAML: while parsing a flow node"),
        ("seed: 1\nrun: {folder: a}\nseed: 2\n", "is not valid YAML: the key 'seed' is given twice (line 3"),
        ("seed: 1\nrun: {folder: a}\nseed: 2\n", "line 3"),
        ("seed: !!python/object/apply:os.system ['true']\n", "could not determine a constructor for the tag"),
        ("seed: \0", "is not valid YAML: unacceptable character"),
        ("5: 6\n", "keys should be strings, found 5"),
        ("[1]: 6\n", "found unhashable key"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    refused = refusal(invoke("check", path))
    assert sentence in refused
    assert str(path) in refused


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"run: {folder: caf\xe9}")
    for name, reason in (
        ("absent.yaml", "cannot be read: No such file or directory"),
        ("latin.yaml", "is not valid YAML: 'utf-8' codec can't decode byte 0xe9"),
    ):
        refused = refusal(invoke("train", tmp_path / name))
        assert refused.startswith(f"the config file {tmp_path / name} {reason}")


# What only a run can find out: overrides on small_config alone (parallel.ep=1).
REFUSED_AT_START: dict[str, tuple[Sequence[str], str]] = {
    "world size": (["parallel.ep=2"], "the world size (1) is not a multiple of parallel.ep (2)"),
    "no GPU": (["runtime.device=cuda"], "runtime.device is 'cuda' but torch finds no GPU"),
    "no data": (["data.paths=[absent/*.txt]"], "data.paths[0]: absent/*.txt matches 0 files"),
    "empty data": (["data.paths=[{folder}/empty.txt]"], "empty.txt is empty (0 bytes)"),
    "too little data": (
        ["training.sequence_length=5000"],
        "data holds 1900 bytes for training, a sequence needs sequence_length + 1 = 5001 (training.sequence_length)",
    ),
    "too little held out": (
        ["data.held_out=0.005"],
        "data.held_out leaves 10 bytes for evaluation, a sequence needs sequence_length + 1 = 17",
    ),
    "folder below a file": (["run.folder={folder}/text.txt/run"], "text.txt/run: Not a directory"),
    "folder is a file": (["run.folder={folder}/text.txt"], "run.folder: cannot write to"),
}


@pytest.mark.parametrize("case", REFUSED_AT_START)
def test_a_run_that_cannot_work_is_refused_at_start(
    case: str, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (config_file.parent / "empty.txt").touch()
    overrides, sentence = REFUSED_AT_START[case]
    overrides = [override.format(folder=config_file.parent) for override in overrides]
    assert sentence in refusal(invoke("train", config_file, "parallel.ep=1", *overrides))
    assert not list(config_file.parent.rglob("metrics.jsonl")), "before any training"
    assert not dist.is_initialized()


def test_a_launcher_that_started_no_ranks_is_refused(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert refusal(invoke("train", config_file)).startswith(
        "SLURM_NTASKS is 4 but nothing says which rank this process is"
    )


def test_a_bug_keeps_its_traceback(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError that no check has foreseen is ours: it is not called the user's."""

    def train_with_a_bug(*arguments: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("expert_parallel.training.loop.train", train_with_a_bug)
    result = invoke("train", config_file)
    assert isinstance(result.exception, ValueError)
    assert "error:" not in result.output


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.d_model=32", "model.d_model is 16 there and 32 here"),
        ("model.moe.num_experts=8", "model.moe.num_experts is 4 there and 8 here"),
        ("seed=7", "seed is 0 there and 7 here"),
        ("training.sequence_length=4", "training.sequence_length is"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(override: str, sentence: str, finished_run: Path) -> None:
    before = (finished_run / "config.yaml").read_text()
    arguments = [f"run.folder={finished_run}", "parallel.ep=1", "training.steps=3", override]
    refused = refusal(invoke("train", finished_run / "config.yaml", *arguments))
    assert re.search(
        f"step_00000002 (is a checkpoint of another model|was trained on another order of data): {re.escape(sentence)}",
        refused,
    )
    assert (finished_run / "config.yaml").read_text() == before


def test_generate_refuses_what_is_no_run(finished_run: Path) -> None:
    def refused(run: Path, *options: str, prompt: str = "x") -> str:
        return refusal(invoke("generate", run, "--prompt", prompt, *options))

    for option, value, wanted in (
        ("--temperature", "nan", "a finite number, 0 or more"),
        ("--temperature", "inf", "a finite number, 0 or more"),
        ("--temperature", "-0.5", "a finite number, 0 or more"),
        ("--top-p", "0.0", "above 0 and at most 1"),
        ("--top-p", "1.5", "above 0 and at most 1"),
        ("--top-p", "nan", "above 0 and at most 1"),
        ("--top-k", "0", "1 or more"),
        ("--tokens", "0", "1 or more"),
        ("--seed", "-1", "from 0 to 9223372036854775807"),
        ("--seed", str(2**63), "from 0 to 9223372036854775807"),
    ):
        assert refused(finished_run, option, value) == f"{option} is {value}, it must be {wanted}"
    assert refused(finished_run, "--special-tokens").endswith("but this run's tokens are bytes")

    assert refused(finished_run / "absent") == f"there is no run folder {finished_run / 'absent'}"
    assert "config.yaml cannot be read: No such file" in refused(finished_run / "checkpoints")
    assert refused(finished_run, prompt="") == "the prompt is empty, at least one token is needed (--prompt)"
    shutil.rmtree(finished_run / "checkpoints")
    assert refused(finished_run) == f"there is no checkpoint {finished_run / 'checkpoints'}"


# ---------------------------------------------------------------------------------------------------------------------
# check


def rows_of(output: str) -> dict[str, str]:
    """The rows of the summary by their names, each in one line."""
    rows: dict[str, str] = {}
    name = ""
    for line in output.partition("warning: ")[0].splitlines():
        name = line[:21].strip() or name
        rows[name] = f"{rows[name]} {line[21:]}" if not line[:21].strip() else line[21:]
    return rows


def test_check_starts_nothing(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start_nothing(*arguments: Any, **more: Any) -> None:
        raise AssertionError("check starts nothing")

    monkeypatch.setattr(dist, "init_process_group", start_nothing)
    before = set(config_file.parent.iterdir())
    assert invoke("check", config_file).exit_code == 0
    assert set(config_file.parent.iterdir()) == before


def test_check_prints_the_effective_config(config_file: Path) -> None:
    output = invoke("check", config_file, "--all", "seed=5", "training.clip_norm=null").stdout
    shown = Config.model_validate(yaml.safe_load(output.partition("\n\n")[0]))
    assert shown == load_config(config_file, ["seed=5", "training.clip_norm=null"])


def test_check_counts_parameters(config_file: Path) -> None:
    """By hand: embedding, final norm; in each block q, k, v, out, 2 norms, router; an expert is 16 x 32 and 16 x 16."""
    dense = 256 * 16 + 16 + 2 * (4 * 16 * 16 + 2 * 16 + 16 * 4)
    expert = 16 * 32 + 16 * 16
    output = invoke("check", config_file).stdout
    assert f"{dense + 2 * 4 * expert:,} in all, {dense + 2 * 2 * expert:,} active for a token" in output
    assert f": {dense:,} dense, {2 * 4 * expert:,} in experts\n" in output


def test_check_says_what_the_ranks_hold(config_file: Path) -> None:
    output = invoke("check", config_file, "--all", "--world-size", "4", "model.moe.num_experts=5").stdout
    lines = output.splitlines()
    grid = next(number for number, line in enumerate(lines) if line.startswith("rank "))
    said = rows_of(output)
    assert said["ranks"] == "4: dp 4, cp 1, tp 1, pp 1 | edp 2, ep 2, etp 1, replicated"
    assert said["tokens"] == "64 a step (4 sequences of 16), 128 in 2 steps"
    assert said["MoE blocks"] == "0, 1: 5 experts, 3 on the fullest rank, router top_k, 2 a token"
    assert said["capacity"].startswith("7 choices an expert takes of the 16 tokens of a scope (rank) in training, 13")
    assert said["memory of a rank"].startswith("0.00 GiB weights, gradients and optimizer")
    assert lines[grid].split() == ["rank", "pp", "dp", "cp", "tp", "edp", "ep", "etp"]
    assert lines[grid + 3].split() == ["2", "0", "2", "0", "0", "1", "0", "0", "blocks", "0-1;", "experts", "0-2"]


def test_check_is_a_summary(config_file: Path) -> None:
    """In ten rows: 32 ranks on nodes of 8, in two stages of 16, each an expert-parallel group on two nodes, with
    tensor parallelism inside of them; with 64 ranks on a node nothing crosses."""
    fitting = ["parallel.tp=2", "parallel.pp=2", "parallel.ep=16", "model.moe.num_experts=16"]
    fitting += ["training.global_batch=16", "training.micro_steps=2"]
    result = invoke("check", config_file, *fitting, "--world-size", "32")
    assert result.exit_code == 0, result.output
    said = rows_of(result.stdout)
    assert len(said) == 10
    assert max(map(len, result.stdout.partition("warning: ")[0].splitlines())) <= 120
    assert said["nodes"] == (
        "4 of 8 ranks (assumed): ep 16 crosses nodes of 8, as do pp 2, dp 8; tp 2 stays within a node; "
        "ep's dispatcher is all_to_all"
    )
    assert said["placement"] == "blocks 0 on pp 0, 1 on pp 1; experts 0 on ep 0, 1 on ep 1, ..., 15 on ep 15"
    config = load_config(config_file, fitting)
    flops = config.model.flops_per_token(16) * 16 * 16  # a step has 16 sequences of 16 tokens
    assert said["FLOPs"].startswith(f"{flops / 1e6:.2f} MFLOP a step, {flops / 32 / 1e3:.2f} kFLOP of it on a rank; ")
    for sized in (["--ranks-per-node", "64"], ["parallel.ranks_per_node=64"]):
        nodes = rows_of(invoke("check", config_file, *fitting, "--world-size", "32", *sized).stdout)["nodes"]
        assert nodes == "1 of up to 64 ranks: ep 16, tp 2, pp 2, dp 8 stay within a node"
    both = ["--ranks-per-node", "8", "parallel.ranks_per_node=4"]
    assert "--ranks-per-node is 8 but parallel.ranks_per_node is 4" in refusal(invoke("check", config_file, *both))


def test_check_counts_what_is_recomputed(config_file: Path) -> None:
    """By hand: 2 blocks of 4 projections, 2 norms, a router, 2 experts, and attention to 8 of 16 tokens."""
    experts = 2 * (16 * 4 + 2 * (16 * 32 + 16 * 16))
    block = experts + 2 * (4 * 16 * 16 + 2 * 16) + 2 * 2 * 16 * 8
    for part, forward in (("moe", 2 * experts), ("block", 2 * block)):
        recompute = ["runtime.device=cuda", "training.dtype=bfloat16", f"training.recompute={part}"]
        said = rows_of(invoke("check", config_file, *recompute, "training.steps=2000000000").stdout)
        assert f" a token + {forward / 1e3:.2f} kFLOP recomputed; " in said["FLOPs"]
        seconds = 64 * 2e9 * (3 * 2 * block + 6 * (256 * 16 + 16) + forward) / 2 / 300e12
        assert said["time"] == f"about {seconds:.1f} seconds if every rank reached 300 TFLOP/s (assumed)"
    durations = {5: "5.0 seconds", 90: "1.5 minutes", 9000: "2.5 hours", 241_920: "2.8 days"}
    assert {seconds: format_duration(seconds) for seconds in durations} == durations


def test_check_says_what_does_not_fit(config_file: Path) -> None:
    sizes = ["training.global_batch=100000000", "--world-size", "2"]
    for device, has in (("cpu", "this machine has "), ("cuda", "a GPU of 80 GB has 74.5 GiB")):
        output = invoke("check", config_file, f"runtime.device={device}", *sizes).stdout
        memory = rows_of(output)["memory of a rank"]
        assert has in memory
        assert memory.endswith(": does not fit")
        assert len(re.findall(r"[a-z]+ [\d.,]+(?=[,;])", memory.partition("of it ")[2])) == 3
        assert "\nwarning: a step does not fit: a rank needs about " in output
    assert "not fit" not in invoke("check", config_file, "runtime.device=cuda").stdout


def test_check_names_no_groups_of_experts_without_experts(config_file: Path) -> None:
    dense = ["parallel.ep=1", "model.moe=null", "model.ffn={hidden: 16, activation: gelu}", "training.micro_steps=2"]
    staged = ["model.num_layers=4", "parallel.pp=2", "parallel.pipeline={kind: interleaved}"]
    said = rows_of(invoke("check", config_file, *dense, *staged, "--world-size", "4", "--ranks-per-node", "2").stdout)
    assert said["placement"] == "blocks 0 and 2 on pp 0, 1 and 3 on pp 1"
    assert said["nodes"] == "2 of 2 ranks: pp 2 crosses nodes of 2; dp 2 stays within a node"


def test_check_finds_shards_that_stay_within_a_node(config_file: Path) -> None:
    """Of 16 data ranks on nodes of 4: dense weights are sharded over 4 neighbors, whichever ranks replicate them."""
    sharded = ["parallel.ep=1", "parallel.data={kind: sharded, shards: 4}", "training.global_batch=16"]
    result = invoke("check", config_file, *sharded, "--world-size", "16", "--ranks-per-node", "4")
    assert rows_of(result.stdout)["nodes"] == (
        "4 of 4 ranks: dp 16 crosses nodes of 4, as does edp 16; shards 4, expert_shards 4 stay within a node"
    )


@pytest.mark.parametrize(
    ("data", "absent"),
    [
        ("{kind: files, paths: [/absent/a.txt, '{folder}/text.txt', /absent/*.txt]}", ["paths[0]", "paths[2]"]),
        ("{kind: tokens, corpora: [{path: /absent/a}, {path: '{folder}/tokens'}]}", ["corpora[0].path"]),
        ("{kind: tokens, corpora: [{path: /absent/a}], tokenizer: /absent/b}", ["corpora[0].path", "tokenizer"]),
    ],
)
def test_data_on_another_machine_is_a_warning_of_check(data: str, absent: list[str], config_file: Path) -> None:
    """What is here is still opened: once it is damaged, it is refused, under its own number."""
    folder = config_file.parent
    assert invoke("data", "prepare", folder / "tokens", folder / "text.txt").exit_code == 0
    override = f"data={data.replace('{folder}', str(folder))}"
    result = invoke("check", config_file, override)
    assert result.exit_code == 0, result.stderr
    warned = [line for line in result.stdout.splitlines() if line.startswith("warning: data.")]
    assert [line.split(": ")[1] for line in warned] == [f"data.{name}" for name in absent]
    assert all(line.endswith(" on this machine") and "/absent/" in line for line in warned)
    if str(folder) in override:
        (folder / "text.txt").write_bytes(b"\x7fELF")
        (folder / "tokens.bin").write_bytes(b"")
        assert re.match(r"data\.(paths|corpora)\[1\]", refusal(invoke("check", config_file, override)))


def test_check_knows_the_memory_of_a_rank(config_file: Path) -> None:
    """Weights, their gradients and two moments: of a real model alone, and of its parts on more ranks."""

    def state_bytes(world_size: int, *overrides: str) -> int:
        config = load_config(config_file, overrides)
        return round(state_memory(config, check_degrees(config, world_size)).state)

    for dtype, width in (("float64", 8), ("float32", 4), ("bfloat16", 4)):
        config = load_config(config_file, ["parallel.ep=1", f"training.dtype={dtype}"])
        model = build_model(config.model, dtype=DTYPES[dtype])
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        assert state_bytes(1, "parallel.ep=1", f"training.dtype={dtype}") == 4 * weights

        counts = config.model.parameter_counts()
        on_two = 4 * width * (counts.dense + counts.experts // 2)
        assert state_bytes(2, f"training.dtype={dtype}") == on_two
        assert state_bytes(4, f"training.dtype={dtype}") == on_two, "replicas save no memory"
        sharded = 4 * width * (counts.dense // 4 + counts.experts // 4)
        assert state_bytes(4, f"training.dtype={dtype}", "parallel.data={kind: sharded}") == sharded

    counts = load_config(config_file, ["model.moe.num_experts=5"]).model.parameter_counts()
    fullest = 4 * 8 * (counts.dense + counts.experts * 3 // 5)
    assert state_bytes(2, "model.moe.num_experts=5") == fullest, "the rank with 3 of 5 experts"


@pytest.mark.parametrize(
    ("world_size", "overrides", "sentence"),
    [
        (3, [], "the world size (3) is not a multiple of parallel.ep (2)"),
        (
            8,
            [],
            "training.global_batch / training.micro_steps (4 sequences) is smaller than the number of data ranks (8), "
            "and some ranks would have no sequence: set training.global_batch to at least 8",
        ),
        (
            4,
            ["training.micro_steps=2"],
            "(2 sequences) is smaller than the number of data ranks (4), and some ranks would have no sequence: set "
            "training.micro_steps to at most 1 or training.global_batch to at least 8",
        ),
    ],
)
def test_check_refuses_a_world_that_does_not_fit(
    world_size: int, overrides: list[str], sentence: str, config_file: Path
) -> None:
    assert sentence in refusal(invoke("check", config_file, "--world-size", str(world_size), *overrides))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_passes_check(path: Path) -> None:
    result = invoke("check", path)
    assert result.exit_code == 0, result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Real processes


def test_the_console_command_is_the_module() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"expert-parallel": f"{main.__module__}:{main.__name__}"}


def test_the_version_may_be_printed_to_a_closed_pipe() -> None:
    command = f"set -o pipefail; (sleep 0.5; '{sys.executable}' -m expert_parallel --version) | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_process_alone_refuses_in_one_sentence(config_file: Path) -> None:
    result = start("alone", "train", config_file, "parallel.ep=1", "model.moe.num_expert=8")
    assert result.returncode == 2
    assert result.output == (
        f"error: {config_file}: unknown setting model.moe.num_expert (did you mean model.moe.num_experts?)\n"
    )


@pytest.mark.parametrize(
    ("launcher", "override", "sentence"),
    [
        pytest.param(
            "torchrun",
            "model.moe.num_expert=8",
            "unknown setting model.moe.num_expert (did you mean model.moe.num_exper",
            marks=pytest.mark.full,
        ),
        (
            "torchrun",
            "run.folder={folder}/text.txt/x",
            "run.folder: cannot write to {folder}/text.txt/x: Not a directory",
        ),
    ],
    ids=["misspelt", "not writable"],
)
def test_of_two_ranks_one_refuses(launcher: str, override: str, sentence: str, config_file: Path) -> None:
    """Also where only rank 0 can see it, as with the folder. `start` bounds the time."""
    sentence = sentence.format(folder=config_file.parent)
    result = start(launcher, "train", config_file, override.format(folder=config_file.parent))
    said = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, result.output
    assert sentence in said[0]  # torchrun's own report, which follows, repeats it
    assert result.returncode != 0
    assert "expert_parallel/" not in result.output, (
        "the launcher reports in its own words, but there is no traceback of ours"
    )


def test_metrics_of_a_run() -> None:
    start_of_run, first, last = metrics_of(run_folder("torchrun"))
    assert [record["step"] for record in (start_of_run, first, last)] == [0, 1, 2]
    assert [record["tokens"] for record in (start_of_run, first, last)] == [0, 64, 128]
    assert "eval/loss" in start_of_run
    assert "train/loss" not in start_of_run
    for record in (first, last):
        assert {
            "train/loss",
            "eval/loss",
            "train/grad_norm",
            "moe/dropped_share",
            "moe/balance_loss",
            "moe/load_cv",
            "perf/tokens_per_second",
        } <= set(record)
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in record.values())
        for name in ("dropped_share", "balance_loss", "load_cv"):
            layers = [record[f"moe/layer_{layer}/{name}"] for layer in (0, 1)]
            assert record[f"moe/{name}"] == pytest.approx(sum(layers) / 2)
            assert f"moe/layer_2/{name}" not in record
    assert 0.01 < last["moe/dropped_share"] < 0.5, "capacity factor 1 drops some"
    assert 4 < last["train/loss"] < 7, "about log 256 at the start"


def test_tensorboard_shows_what_the_metrics_say() -> None:
    """Loads of experts are in histograms instead (test_metrics.py)."""
    run = run_folder("torchrun")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    shown: dict[tuple[int, str], float] = {
        (event.step, tag): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
    }
    written = {
        (record["step"], name): value
        for record in metrics_of(run)
        for name, value in record.items()
        if name not in ("step", "tokens") and "/load/" not in name
    }
    assert shown == pytest.approx(written, rel=1e-6)  # float32


def test_the_resolved_config_stands_beside_the_run() -> None:
    run = run_folder("torchrun")
    resolved, given = load_config(run / "config.yaml"), load_config(run.parent / "config.yaml")
    data = given.data.model_copy(update={"sha256": resolved.data.sha256})
    assert resolved == given.model_copy(update={"data": data}), "the digest of its data is filled in"
    assert re.fullmatch("[0-9a-f]{64}", str(resolved.data.sha256))
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["micro_steps"] == 1, "with its defaults"


def test_a_run_of_two_ranks_generates_alone(finished_run: Path) -> None:
    def generated(*options: str) -> str:
        result = invoke("generate", finished_run, "--prompt", "It is ", "--tokens", "8", *options)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    text = generated("--seed", "1", "--temperature", "5")
    assert text.startswith("It is ")
    assert generated("--seed", "1", "--temperature", "5") == text, "the same seed, the same text"
    assert generated("--seed", "2", "--temperature", "5") != text


@pytest.mark.parametrize(
    "layout",
    [pytest.param(["parallel.ep=2"], marks=pytest.mark.full), ["parallel.tp=2", "parallel.ep=2"]],
    ids=str,
)
def test_ranks_generate_what_one_process_does(layout: list[str], finished_run: Path) -> None:
    """A batch of two prompts, with the cache and without."""
    options = ["--prompt", "It is ", "--prompt", "a truth", "--tokens", "6", "--temperature", "0"]
    alone = invoke("generate", finished_run, *options).stdout
    assert alone.count("It is ") == alone.count("a truth") == 1
    assert invoke("generate", finished_run, *options, "--no-cache").stdout == alone
    ranks = start("torchrun", "generate", finished_run, *layout, *options)
    assert ranks.returncode == 0, ranks.output
    assert ranks.output.count(alone) == 1, "rank 0 alone speaks"


def test_a_finished_run_says_so_and_changes_nothing(finished_run: Path) -> None:
    before = metrics_of(finished_run)
    result = invoke("train", finished_run / "config.yaml", f"run.folder={finished_run}", "parallel.ep=1")
    assert result.exit_code == 0, result.stderr
    assert "this run is finished: 2 of 2 steps are done" in result.stdout
    result = invoke("train", finished_run, "parallel.ep=1", "training.steps=1")
    assert "this run has done 2 steps and training.steps is 1: nothing is left to do; results are in" in result.stdout
    assert metrics_of(finished_run) == before


def test_a_run_with_more_steps_resumes_in_another_layout(finished_run: Path) -> None:
    before = metrics_of(finished_run)
    arguments = [f"run.folder={finished_run}", "parallel.ep=1", "training.steps=4"]
    result = invoke("train", finished_run / "config.yaml", *arguments)
    assert result.exit_code == 0, result.stderr
    assert f"resumed from {finished_run}/checkpoints/step_00000002 after step 2; changed: " in result.stdout
    assert "training.steps 2 -> 4" in result.stdout
    assert "parallel.ep 2 -> 1" in result.stdout
    after = metrics_of(finished_run)
    assert after[:3] == before
    assert [(record["step"], record["tokens"]) for record in after[3:]] == [(3, 192), (4, 256)]
    assert load_config(finished_run / "config.yaml").training.steps == 4
    names = sorted(path.name for path in (finished_run / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002", "step_00000004"]
