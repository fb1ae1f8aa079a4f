"""A run that fails says where: the first tensor that is not finite, in several layouts; the phase that ran
out of memory; and what torchrun is told.
"""

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner

from expert_parallel.checkpoint.save import CheckpointSaver
from expert_parallel.cli.app import app
from expert_parallel.model.transformer import Block
from expert_parallel.moe.parameters import local_tensor, logical_parameters
from expert_parallel.runtime import error_file
from expert_parallel.runtime.torchrun import closing_message
from expert_parallel.training import run as training_run
from expert_parallel.training.config import load_config
from expert_parallel.training.engines.native import NativeEngine
from expert_parallel.training.failures import advice
from expert_parallel.training.memory import estimate_memory
from expert_parallel.training.nonfinite import BadTensor, find_first_bad_tensor
from expert_parallel.training.optim import build_optimizer
from expert_parallel.training.out_of_memory import control_group_limit, is_out_of_memory, smaller_settings
from expert_parallel.training.run import TrainingRun
from expert_parallel.training.setup import check_degrees
from expert_parallel.training.step import train_step
from tests.launches import ROOT, environment, small_config
from tests.layouts import build_on
from tests.ranks import run_ranks
from tests.test_training import MODEL, SEED, batches, training_config

PLAIN = {"world": 1, "ep": 1, "data": "replicated", "micro_steps": 1, "recompute": "none"}
TENSOR = {**PLAIN, "world": 4, "tp": 2, "ep": 4, "recompute": "block"}
SHARDED = {**PLAIN, "world": 2, "ep": 2, "data": "sharded", "micro_steps": 2}
PIPELINE = {**PLAIN, "world": 4, "pp": 2, "ep": 2, "micro_steps": 2}


def weight_is_infinite(block: Block) -> None:
    assert block.moe is not None
    local_tensor(block.moe.experts.w_in).detach()[1, 0, 0] = torch.inf


def router_overflows(block: Block) -> None:
    assert block.moe is not None
    local_tensor(block.moe.router.weight).detach().mul_(1e308)


def output_is_nan(block: Block) -> None:
    block.attention.register_forward_hook(lambda module, arguments, output: output * torch.nan)


def gradient_is_nan(block: Block) -> None:
    def poison(module: Any, arguments: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.nan)

    block.attention.register_forward_hook(poison)


def fail(rank: int, layout: dict[str, Any], fault: Callable[[Block], None], where: int, number: int) -> tuple[Any, ...]:
    """Makes two steps, the second with a fault on rank `where` in block `number`. Returns the first bad tensor, whether
    the second step changed a weight or a moment, and whether its report was finite."""
    config = training_config(layout)
    mesh, model = build_on(layout, MODEL, SEED)
    engine = NativeEngine(model, build_optimizer(config.optimizer, model), mesh, config.clip_norm)

    def state() -> dict[str, Tensor]:
        moments = {f"{i} {k}": v for i, s in enumerate(engine.optimizer.state.values()) for k, v in s.items()}
        weights = {logical.names[0]: logical.parameter for logical in logical_parameters(model)}
        buffers = dict(model.named_buffers())
        return {name: local_tensor(x).detach().clone() for name, x in (moments | weights | buffers).items()}

    def make_step(step: int) -> Any:
        own = list(batches(config, step, mesh.degrees.dp, mesh.dp_rank))
        return own, train_step(model, engine, own, config, mesh, step=step, seed=SEED)

    make_step(0)
    if rank == where:
        (block,) = (block for index, block in model.local_blocks() if index == number)
        fault(block)
    before = state()
    own, report = make_step(1)
    unchanged = all(torch.equal(x, before[name]) for name, x in state().items())
    bad = find_first_bad_tensor(model, engine, own, config, mesh, step=1, seed=SEED, replay=None)
    found = None if bad is None else (bad.phase, bad.name, bad.rank, bad.micro_step)
    return found, unchanged, report.is_finite


@pytest.mark.parametrize(
    ("layout", "fault", "where", "number", "expected"),
    [
        (PLAIN, weight_is_infinite, 0, 1, ("weights", "blocks.1.moe.experts.1.w_in", 0, 0)),
        (PLAIN, router_overflows, 0, 2, ("forward", "logits_TE of blocks.2.moe.router", 0, 0)),
        (TENSOR, output_is_nan, 1, 1, ("forward", "blocks.1.attention", 1, 0)),
        (SHARDED, weight_is_infinite, 1, 2, ("weights", "blocks.2.moe.experts.5.w_in", 1, 0)),
        (SHARDED, output_is_nan, 1, 0, ("forward", "blocks.0.attention", 1, 0)),
        (PIPELINE, output_is_nan, 3, 2, ("forward", "blocks.2.attention", 3, 0)),
        (PIPELINE, gradient_is_nan, 1, 1, ("backward", "blocks.1.attention.out.weight", 1, 0)),
    ],
)
def test_the_first_bad_tensor_is_named(
    layout: dict[str, Any], fault: Callable[[Block], None], where: int, number: int, expected: tuple[Any, ...]
) -> None:
    """And the step leaves every weight, moment and balance bias as it was."""
    for found, unchanged, is_finite in run_ranks(layout["world"], fail, layout, fault, where, number):
        assert found == expected
        assert unchanged
        assert not is_finite


def no_fault(block: Block) -> None:
    pass


def test_a_healthy_step_has_no_bad_tensor() -> None:
    for layout in (TENSOR, PIPELINE):
        for found, unchanged, is_finite in run_ranks(4, fail, layout, no_fault, 0, 0):
            assert (found, unchanged, is_finite) == (None, False, True)


@pytest.mark.parametrize("name", ["logits_TE of blocks.1.moe.router", "blocks.1.attention", "loss"])
@pytest.mark.parametrize("config", ["quickstart", "one-gpu", "mixtral-8x7b"])
def test_settings_to_try_are_valid_and_not_in_force(config: str, name: str) -> None:
    before = load_config(ROOT / f"configs/{config}.yaml")
    bad = BadTensor("forward", name, 0, [0, 0, 7], 0, 1, 0, 8)
    settings = [setting for setting, _ in advice(before, 3, bad)]
    assert len(settings) >= 3
    for setting in settings:
        assert load_config(ROOT / f"configs/{config}.yaml", shlex.split(setting)) != before
    assert before.model.moe is not None
    lacks_z_loss = "z_loss" not in [loss.kind for loss in before.model.moe.losses]
    assert any("z_loss" in setting for setting in settings) == ("router" in name and lacks_z_loss)


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory


def ask_for_too_much(*arguments: Any, **_: Any) -> Any:
    if isinstance(arguments[0], Block) and not arguments[0].training:
        return run_block(*arguments)  # evaluation comes first
    return torch.empty(2**58, dtype=torch.uint8)  # refused by torch's allocator on the CPU


run_block = Block._run


@pytest.mark.parametrize(
    ("owner", "name", "phase"),
    [
        (Block, "_run", "in the forward pass"),
        (Tensor, "backward", "in the backward pass"),
        (torch.optim.AdamW, "step", "in the update of the weights"),
        (TrainingRun, "held_out_batches", "in the evaluation"),
        (training_run, "build", "while the model was built"),
        (CheckpointSaver, "_copy_to_host", "while a checkpoint was saved"),
    ],
)
def test_out_of_memory_is_one_sentence(
    owner: Any, name: str, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, ask_for_too_much)
    overrides = ["parallel.ep=1", "evaluation.every=2"] + (["evaluation.every=1"] if "evaluation" in phase else [])
    result = CliRunner().invoke(app, ["train", str(small_config(tmp_path)), *overrides])
    assert result.exit_code == 1
    start = f"error: rank 0 has run out of memory {phase} when it asked for 268,435,456 GiB more: its machine has "
    assert result.stderr.startswith(start), result.stderr
    assert result.stderr.count("\n") == 1
    assert re.search(r" estimates [\d.]+ MiB for a step .* training.micro_steps=2 \([\d.]+ MiB\), .*, ", result.stderr)


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) == is_it


@pytest.mark.parametrize(("config", "world_size"), [("quickstart", 2), ("switch", 8), ("1t-20b", 512)])
def test_proposed_settings_fit_and_need_less(config: str, world_size: int) -> None:
    """As `check` would say of them."""
    path = ROOT / f"configs/{config}.yaml"
    before = load_config(path)
    degrees = check_degrees(before, world_size)
    total = estimate_memory(before, degrees, "cuda").total
    proposed = list(smaller_settings(before, degrees, total, "cuda"))
    assert len(proposed) == 3
    for override, needs in proposed:
        changed = load_config(path, [override])
        assert estimate_memory(changed, check_degrees(changed, world_size), "cuda").total == needs < total


def test_proposed_settings_fit_what_the_process_may_have() -> None:
    config = load_config(ROOT / "configs/quickstart.yaml")
    degrees = check_degrees(config, 2)
    total = estimate_memory(config, degrees, "cpu").total
    ((most, _), *_) = smaller_settings(config, degrees, total, "cpu")
    assert most == "training.micro_steps=2", "the least change that needs less"
    fitting = smaller_settings(config, degrees, total, "cpu", total / 3)
    assert fitting[0][0].startswith("training.micro_steps=")
    assert all(needs <= total / 3 for _, needs in fitting)


@pytest.mark.parametrize(
    ("membership", "limits", "found"),
    [
        ("0::/a/b\n", {"a/memory.max": "4096", "a/b/memory.max": "max"}, 4096),
        ("0::/host/scope\n", {"memory.max": "2048"}, 2048),  # in a container, whose group is the root
        ("5:cpu,memory:/a\n4:pids:/b\n", {"memory/a/memory.limit_in_bytes": "512", "b/memory.max": "1"}, 512),
        ("0::/a\n", {}, math.inf),
    ],
)
def test_the_limit_of_control_groups(membership: str, limits: dict[str, str], found: float, tmp_path: Path) -> None:
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "membership").write_text(membership)
    assert control_group_limit(tmp_path / "membership", tmp_path) == found


# ---------------------------------------------------------------------------------------------------------------------
# What torchrun is told


def test_a_restart_after_a_permanent_error_ends_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt in ("attempt_0", "attempt_1"):
        (tmp_path / attempt / "3").mkdir(parents=True)
    monkeypatch.setenv(error_file.VARIABLE, str(tmp_path / "attempt_0/3/error.json"))
    error_file.write_error_file("a lost node", is_permanent=False)
    monkeypatch.setenv(error_file.VARIABLE, str(tmp_path / "attempt_1/3/error.json"))
    assert not error_file.repeats_permanent_error()
    monkeypatch.setenv(error_file.VARIABLE, str(tmp_path / "attempt_0/3/error.json"))
    error_file.write_error_file("the loss is nan", is_permanent=True)
    monkeypatch.setenv(error_file.VARIABLE, str(tmp_path / "attempt_1/3/error.json"))
    code = "import sys; from expert_parallel.__main__ import main; sys.modules['torch'] = None; main()"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "")
    failure = ProcessFailure(3, 1234, 2, str(tmp_path / "attempt_1/3/error.json"))
    assert closing_message(ChildFailedError("train", {7: failure})) == "the loss is nan"
    assert closing_message(ChildFailedError("train", {0: failure})) == "", "rank 0 has printed it"


@pytest.mark.parametrize(
    ("exit_code", "message"),
    [
        (1, "rank 1 (process 1234) has ended with exit code 1; its own error is above"),
        (
            -9,
            "rank 1 (process 1234) was ended by SIGKILL: the kernel does so when memory runs out, which `dmesg` shows",
        ),
        (-11, "rank 1 (process 1234) was ended by SIGSEGV"),
    ],
)
def test_a_rank_that_left_no_message_is_named_last(exit_code: int, message: str) -> None:
    failure = ProcessFailure(1, 1234, exit_code, "no such file")
    assert closing_message(ChildFailedError("train", {1: failure})) == message


@pytest.mark.full
def test_under_torchrun_our_error_is_the_last_and_is_not_repeated(tmp_path: Path) -> None:
    diverging = ["training.optimizer.learning_rate=1e30", "training.schedule.warmup_steps=0", "training.steps=9"]
    command = ["bash", "launch/train.sh", str(small_config(tmp_path)), *diverging, "--", "--max-restarts", "3"]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert ended.returncode == 2
    assert ended.stderr.count("error:") == 1
    assert ended.stderr.endswith("refused until then\n")
