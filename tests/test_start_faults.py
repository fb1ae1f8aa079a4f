"""What can go wrong when ranks are to meet, and when one is lost: one sentence that names the rank or the host, within
the time that the user set, and no process that stays.

The ranks are processes with RANK and WORLD_SIZE set by hand, forked from a server that has imported everything.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expert_parallel import __version__
from expert_parallel.__main__ import main
from expert_parallel.runtime import rendezvous
from tests import ranks
from tests.launches import LAUNCHER_VARIABLES, small_config
from tests.processes import wait_until

SECONDS = 3  # runtime.rendezvous_seconds where somebody does not come
HOST = socket.gethostname()
NO_END = ["training.steps=1000000", "evaluation.every=1000000", "checkpoint.every=1000000"]
forked = multiprocessing.get_context("forkserver")


def command_line(output: Path, variables: dict[str, str], arguments: list[str], version: str) -> None:
    """`expert-parallel ARGUMENTS`, in a process of its own. version: of the package, as of another checkout."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in [name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)]:
        del os.environ[name]
    os.environ.update(variables)
    rendezvous.__version__ = version  # what it tells the other ranks
    torch.set_num_threads(1)
    sys.argv = ["expert-parallel", *arguments]
    main()


class Ranks:
    """The ranks of one run that fails; output and exit code of each."""

    def __init__(self, folder: Path) -> None:
        assert ranks.close_pools  # its import tells the server what to import
        self.folder, self.config = folder, small_config(folder)
        self.started: list[multiprocessing.process.BaseProcess] = []
        with socket.socket() as free:
            free.bind(("", 0))
            self.port = free.getsockname()[1]

    def start(self, rank: int, world_size: int, *overrides: str, version: str = __version__, **variables: str) -> int:
        """Its place in `exit_codes` and `outputs`."""
        number = len(self.started)
        local = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
        variables = (
            {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(self.port)} | local | variables
        )
        arguments = ["train", str(self.config), "parallel.ep=1", f"runtime.rendezvous_seconds={SECONDS}", *overrides]
        process = forked.Process(target=command_line, args=(self._file(number), variables, arguments, version))
        process.start()
        self.started.append(process)
        return number

    def exit_code(self, number: int) -> int | None:
        """None: it is still there after SECONDS and what a slow machine needs."""
        self.started[number].join(SECONDS + 60)
        return self.started[number].exitcode

    def exit_codes(self) -> list[int | None]:
        return [self.exit_code(number) for number in range(len(self.started))]

    def outputs(self) -> list[str]:
        return [self._file(number).read_text() for number in range(len(self.started))]

    def steps(self) -> int:
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def _file(self, number: int) -> Path:
        return self.folder / f"output{number}"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Ranks]:
    started = Ranks(tmp_path)
    try:
        yield started
    finally:
        for process in started.started:
            process.kill()


def one_sentence(output: str) -> str:
    """The last line; there is no traceback."""
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    return lines[0].removeprefix("error: ")


# ---------------------------------------------------------------------------------------------------------------------
# The ranks do not meet


def test_an_unknown_host(run: Ranks) -> None:
    run.start(1, 2, MASTER_ADDR="nowhere.invalid")
    assert run.exit_codes() == [2], run.outputs()
    sentence = one_sentence(run.outputs()[0])
    assert sentence.startswith(f"rank 1 on host {HOST} does not know the host 'nowhere.invalid' ("), sentence
    assert "MASTER_ADDR" in sentence


def test_nobody_at_the_meeting_place(run: Ranks) -> None:
    run.start(1, 2)
    assert run.exit_codes() == [2], run.outputs()
    sentence = one_sentence(run.outputs()[0])
    place = f"rank 1 on host {HOST} cannot reach rank 0 at 127.0.0.1:{run.port} within {SECONDS} s"
    assert sentence.startswith(f"{place} (runtime.rendezvous_seconds)"), sentence


def test_the_port_is_in_use(run: Ranks) -> None:
    """By a program that takes connections, and never answers."""
    with socket.socket() as other:
        other.bind(("", run.port))
        other.listen()
        run.start(0, 2)
        run.start(1, 2)
        assert run.exit_codes() == [2, 2], run.outputs()
    first, second = map(one_sentence, run.outputs())
    assert first.startswith(f"rank 0 cannot open port {run.port} on host {HOST}: it is in use"), first
    assert f"127.0.0.1:{run.port}" in second
    assert second.startswith("rank 1 on host "), second


def test_a_rank_that_never_comes(run: Ranks) -> None:
    run.start(0, 3)
    run.start(1, 3)
    assert run.exit_codes() == [2, 2], run.outputs()
    sentence = f"rank 2 of 3 did not come within {SECONDS} s (runtime.rendezvous_seconds); 2 came, from {HOST}"
    assert [one_sentence(output) for output in run.outputs()] == [sentence] * 2


def test_two_processes_with_one_number(run: Ranks) -> None:
    for rank in (0, 1, 1):
        run.start(rank, 3)
    assert run.exit_codes() == [2, 2, 2], run.outputs()
    sentences = set(map(one_sentence, run.outputs()))
    pids = sorted(str(process.pid) for process in run.started[1:])
    said = {f"two processes say that they are rank 1: on host {HOST} (pids {a} and {b})" for a, b in (pids, pids[::-1])}
    assert len(sentences) == 1, sentences
    assert sentences <= said, sentences


def test_two_processes_with_number_0(run: Ranks) -> None:
    run.start(0, 2)
    run.start(0, 2)
    assert run.exit_codes() == [2, 2], run.outputs()
    sentences = sorted(map(one_sentence, run.outputs()))
    assert sentences[0].startswith(f"rank 0 cannot open port {run.port} on host {HOST}: it is in use"), sentences
    assert sentences[1].startswith("rank 1 of 2 did not come within"), sentences


@pytest.mark.parametrize(
    ("overrides", "version", "sentence"),
    [
        (["seed=7"], None, "rank 1 (host {host}) has another config: seed is 7 there and 0 on rank 0 (host {host})"),
        ([], "0.0.7", "rank 1 (host {host}) runs expert_parallel 0.0.7, "),
    ],
    ids=["config", "version"],
)
def test_another_config_or_version_on_one_node(
    overrides: list[str], version: str | None, sentence: str, run: Ranks
) -> None:
    run.start(0, 2, "runtime.rendezvous_seconds=60")
    run.start(1, 2, "runtime.rendezvous_seconds=60", *overrides, version=version or __version__)
    assert run.exit_codes() == [2, 2], run.outputs()
    first, second = map(one_sentence, run.outputs())
    assert first == second
    assert first.startswith(sentence.format(host=HOST)), first


# ---------------------------------------------------------------------------------------------------------------------
# A rank is lost in the middle of the run


@pytest.mark.parametrize(
    ("how", "lost"),
    [
        (signal.SIGKILL, 0),
        (signal.SIGSTOP, 1),
        pytest.param(signal.SIGKILL, 2, marks=pytest.mark.full),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.full),
    ],
    ids=["rank 0 killed", "rank 1 hangs", "rank 2 killed", "rank 0 hangs"],
)
def test_a_lost_rank_is_named(how: signal.Signals, lost: int, run: Ranks) -> None:
    """Rank 0 takes along the store at which the others look for each other."""
    for rank in range(3):
        run.start(rank, 3, "runtime.rendezvous_seconds=60", "runtime.timeout_seconds=5", *NO_END)
    wait_until(lambda: run.steps() >= 3 or any(process.exitcode is not None for process in run.started), "step 3")
    os.kill(run.started[lost].pid or 0, how)
    survivors = [rank for rank in range(3) if rank != lost]
    assert [run.exit_code(rank) for rank in survivors] == [1, 1], run.outputs()
    outputs = [run.outputs()[rank] for rank in survivors]
    assert any(f"ranks that do not answer: rank {lost} (host {HOST})" in output for output in outputs), outputs
    assert all("Traceback" not in output for output in outputs), outputs
