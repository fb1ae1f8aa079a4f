"""The same code under every launcher: what it says of a rank, how ranks agree on an error, equal losses from all."""

import json
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from expert_parallel.runtime import process
from expert_parallel.runtime.process import (
    CPU,
    Launch,
    Runtime,
    RuntimeConfig,
    UserError,
    choose_device,
    choose_device_on_all_ranks,
    distributed,
)
from tests.launches import LAUNCHER_VARIABLES, run_folder
from tests.ranks import run_ranks


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(LAUNCHER_VARIABLES):
            monkeypatch.delenv(name)


# ---------------------------------------------------------------------------------------------------------------------
# Devices


@pytest.mark.parametrize(
    ("kind", "num_gpus", "local_rank", "expected"),
    [
        ("auto", 0, 3, "cpu"),
        ("cpu", 8, 3, "cpu"),
        ("auto", 8, 3, "cuda:3"),
        ("cuda", 4, 3, "cuda:3"),
        ("cuda", 0, 3, "runtime.device is 'cuda' but torch finds no GPU on the node of rank 7"),
        ("cuda", 3, 3, "runtime.device is 'cuda' and the node of rank 7 has 3 GPUs, too few for 4 ranks"),
        ("auto", 1, 3, "cuda:0"),  # the launcher lets each rank see its own; if not, choose_device_on_all_ranks refuses
    ],
)
def test_device_of_a_rank(
    kind: str, num_gpus: int, local_rank: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    try:
        device = str(choose_device(kind, Launch("torchrun", 7, 8, local_rank, 4)))
    except ValueError as error:
        device = str(error)
    assert device == expected


def agree_with_a_gpu_on_rank_0_only(rank: int) -> str:
    device = torch.device("cuda", 0) if rank == 0 else CPU
    with mock.patch.object(process, "choose_device", return_value=device), pytest.raises(UserError) as refused:
        choose_device_on_all_ranks("auto", Launch("torchrun", rank, 2, rank, 2))
    return str(refused.value)


def test_ranks_with_and_without_a_gpu_are_refused() -> None:
    sentence = "runtime.device is 'auto' and 1 of 2 ranks have a GPU, rank 1 has none"
    assert run_ranks(2, agree_with_a_gpu_on_rank_0_only) == [sentence, sentence]


def agree_on_gpus(rank: int, names: list[str]) -> str:
    properties = SimpleNamespace(uuid=names[rank])
    with (
        mock.patch.object(process, "choose_device", return_value=torch.device("cuda", 0)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        try:
            return str(choose_device_on_all_ranks("auto", Launch("slurm", rank, 2, rank, 2)))
        except UserError as error:
            return str(error)


def test_two_ranks_on_one_gpu_are_refused() -> None:
    assert run_ranks(2, agree_on_gpus, ["GPU-a", "GPU-b"]) == ["cuda:0"] * 2, "each sees its own alone"
    sentence = "ranks 0 and 1 have the same GPU (GPU-a): start one rank for each GPU"
    assert run_ranks(2, agree_on_gpus, ["GPU-a", "GPU-a"]) == [sentence] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Agreement


def work_together(rank: int, failing: dict[int, Exception]) -> str:
    def work() -> str:
        if rank in failing:
            raise failing[rank]
        return f"work of rank {rank}"

    try:
        return Runtime(Launch("torchrun", rank, 3), CPU, "gloo", timedelta(seconds=9)).run_on_all_ranks(work)
    except UserError as error:
        return f"refused: {error}"


def test_what_one_rank_finds_all_ranks_refuse() -> None:
    assert run_ranks(3, work_together, {}) == ["work of rank 0", "work of rank 1", "work of rank 2"]
    for failing, sentence in (
        ({2: ValueError("parallel.ep is 2")}, "parallel.ep is 2"),
        ({0: PermissionError(13, "Permission denied", "/runs")}, "[Errno 13] Permission denied: '/runs'"),
        ({1: ValueError("the first"), 2: ValueError("the second")}, "the first"),
        ({0: ValueError("ä" * 5000)}, None),  # longer than what is exchanged
        ({1: OSError()}, "OSError"),
    ):
        answers = run_ranks(3, work_together, failing)
        assert len(set(answers)) == 1, answers
        assert answers[0].startswith("refused: ")
        assert sentence is None or answers[0] == f"refused: {sentence}"


@pytest.mark.usefixtures("no_launcher")
def test_one_process_alone_starts_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    with distributed(RuntimeConfig(device="cpu", timeout_seconds=9)) as alone:
        assert (alone.rank, alone.world_size, alone.device, alone.backend) == (0, 1, CPU, "gloo")
        assert alone.timeout == timedelta(seconds=9)
        assert dist.is_initialized()
    assert not dist.is_initialized()

    with pytest.raises(UserError), distributed(RuntimeConfig(device="cpu")) as alone:
        alone.run_on_all_ranks(lambda: int("x"))
    assert caplog.messages == ["invalid literal for int() with base 10: 'x'"]
    assert not dist.is_initialized()

    with pytest.raises(ValueError, match="a bug"), distributed(RuntimeConfig(device="cpu")):
        raise ValueError("a bug")
    assert len(caplog.messages) == 1, "a bug keeps its traceback, and is not called the user's"


# ---------------------------------------------------------------------------------------------------------------------
# Real launchers


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        record[name] for record in records for name in ("train/loss", "eval/loss", "train/grad_norm") if name in record
    ]


@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
def test_every_launcher_trains_the_same(launcher: str) -> None:
    expected = losses(run_folder("torchrun"))
    assert len(expected) == 7
    assert losses(run_folder(launcher)) == pytest.approx(expected, rel=1e-12, abs=0)
