"""The same code under every launcher: what it says of a rank, how ranks agree on an error, equal losses from all."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from expert_parallel import runtime
from expert_parallel.runtime import (
    CPU,
    Launch,
    LaunchError,
    Runtime,
    RuntimeConfig,
    UserError,
    agree_on_device,
    choose_device,
    distributed,
    read_launch,
)
from tests.launches import LAUNCHER_VARIABLES, run_folder
from tests.ranks import run_ranks

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(LAUNCHER_VARIABLES):
            monkeypatch.delenv(name)


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher says


@pytest.mark.parametrize("environment", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_torchrun_and_deepspeed(environment: dict[str, str]) -> None:
    assert read_launch(environment) == Launch("torchrun", 5, 8, 1, 4, ("node0", 29500))


def test_open_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_meet_through_mpi", lambda world_size: (f"node0 of {world_size}", 4321))
    assert read_launch(OPEN_MPI) == Launch("mpirun", 1, 2, 1, 2, ("node0 of 2", 4321))


@pytest.mark.parametrize("environment", [{}, {"SLURM_NTASKS": "1"}, {"SLURM_JOB_ID": "7", "PMI_SIZE": "1"}])
def test_one_process_alone(environment: dict[str, str]) -> None:
    assert read_launch(environment) == Launch("none", rank=0, world_size=1, local_rank=0, local_world_size=1)


def test_torchrun_in_slurm_and_torchrun_on_every_node_of_mpirun() -> None:
    assert read_launch(TORCHRUN | {"SLURM_NTASKS": "2"}).world_size == 8
    assert read_launch(TORCHRUN | OPEN_MPI).launcher == "torchrun"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    environment = {other: value for other, value in TORCHRUN.items() if other != name}
    with pytest.raises(LaunchError, match=f"^the environment variable {name} is not set, though "):
        read_launch(environment)


@pytest.mark.parametrize("name", [name for name in OPEN_MPI if name != "OMPI_COMM_WORLD_SIZE"])
def test_a_missing_variable_of_open_mpi_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_meet_through_mpi", lambda world_size: ("node0", 4321))
    environment = {other: value for other, value in OPEN_MPI.items() if other != name}
    with pytest.raises(LaunchError, match=f"^the environment variable {name} is not set, though OMPI_COMM_WORLD_SIZE "):
        read_launch(environment)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (TORCHRUN | {"RANK": "8"}, "this process has rank 8, which does not fit the world size 8"),
        (TORCHRUN | {"WORLD_SIZE": "0", "RANK": "0"}, "this process has rank 0, which does not fit the world size 0"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4, which does not fit the 4 ranks of its node"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "does not fit the 9 ranks of its node and the world size 8"),
        (TORCHRUN | {"RANK": "two"}, "the environment variable RANK is 'two', expected a number"),
        (TORCHRUN | {"RANK": "-1"}, "the environment variable RANK is '-1', expected a number"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": ""}, "the environment variable LOCAL_WORLD_SIZE is '', expected a number"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "the environment variable MASTER_PORT is 'http', expected a number"),
        # Left over in a shell: under mpirun -n 2 each of both would train alone, into the same folder.
        (TORCHRUN | OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"}, "mpirun started 2 processes but WORLD_SIZE is 1"),
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS is 4 but RANK and WORLD_SIZE are not set: start the ranks with torchrun"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "PMI_SIZE is 4 but RANK and WORLD_SIZE are not set"),
    ],
)
def test_contradictions_are_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(LaunchError) as refused:
        read_launch(environment)
    assert sentence in str(refused.value)


def test_an_mpi_other_than_the_launchers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpi4py with another library gives N worlds of size 1 in silence."""
    fake = SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1, rank=0), Get_library_version=lambda: "MPICH 5.0, built")
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=fake))
    with pytest.raises(LaunchError, match=r"mpirun started 2 ranks but mpi4py's COMM_WORLD has 1: .*\(MPICH 5.0\)"):
        read_launch(OPEN_MPI)


def test_mpirun_without_mpi4py_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match="mpirun started 2 ranks but mpi4py cannot be used"):
        read_launch(OPEN_MPI)


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
        ("auto", 1, 3, "runtime.device is 'auto' and the node of rank 7 has 1 GPUs, too few for 4 ranks"),
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
    with mock.patch.object(runtime, "choose_device", return_value=device), pytest.raises(UserError) as refused:
        agree_on_device("auto", Launch("torchrun", rank, 2, rank, 2))
    return str(refused.value)


def test_ranks_with_and_without_a_gpu_are_refused() -> None:
    sentence = "runtime.device is 'auto' and 1 of 2 ranks have a GPU, rank 1 has none"
    assert run_ranks(2, agree_with_a_gpu_on_rank_0_only) == [sentence, sentence]


# ---------------------------------------------------------------------------------------------------------------------
# Agreement


def work_together(rank: int, failing: dict[int, Exception]) -> str:
    def work() -> str:
        if rank in failing:
            raise failing[rank]
        return f"work of rank {rank}"

    try:
        return Runtime(Launch("torchrun", rank, 3), CPU, "gloo", timedelta(seconds=9)).together(work)
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
def test_one_process_alone_starts_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with distributed(RuntimeConfig(device="cpu", timeout_seconds=9)) as alone:
        assert (alone.rank, alone.world_size, alone.device, alone.backend) == (0, 1, CPU, "gloo")
        assert alone.timeout == timedelta(seconds=9)
        assert dist.is_initialized()
    assert not dist.is_initialized()

    with pytest.raises(UserError), distributed(RuntimeConfig(device="cpu")) as alone:
        alone.together(lambda: int("x"))
    assert capsys.readouterr().err == "error: invalid literal for int() with base 10: 'x'\n"
    assert not dist.is_initialized()

    with pytest.raises(ValueError, match="a bug"), distributed(RuntimeConfig(device="cpu")):
        raise ValueError("a bug")
    assert capsys.readouterr().err == "", "a bug keeps its traceback, and is not called the user's"


# ---------------------------------------------------------------------------------------------------------------------
# Real launchers


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        record[name] for record in records for name in ("train/loss", "eval/loss", "train/grad_norm") if name in record
    ]


@pytest.mark.system
@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
def test_every_launcher_trains_the_same(launcher: str) -> None:
    expected = losses(run_folder("torchrun"))
    assert len(expected) == 7
    assert losses(run_folder(launcher)) == pytest.approx(expected, rel=1e-12, abs=0)
