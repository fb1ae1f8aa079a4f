"""Processes that run beside a test: their output in files, and an end for all of them and their children.

with Processes(tmp_path) as processes:
    first = processes.start("first", ["bash", "launch/train.sh", ...], TOKEN="x")   # a variable more
    wait_until(lambda: "step 3" in first.output, "step 3", first)
    assert first.wait() == 0, first.output
    assert processes.left() == []        # not even a grandchild lives on
losses(tmp_path / "run") == losses_here(4, tmp_path)   # of the same run, undisturbed and without a launcher
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import torch

from expert_parallel.runtime.process import Launch, Runtime
from expert_parallel.training.config import load_config
from expert_parallel.training.loop import train
from tests.launches import ROOT, TIMEOUT_SECONDS, environment, small_config
from tests.ranks import run_ranks


class Process:
    def __init__(self, name: str, command: list[str], output: Path, variables: dict[str, str]) -> None:
        self.name, self.path = name, output
        with output.open("wb") as file:
            self.popen = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self.path.read_text(errors="replace")

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> int:
        """The exit code."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not ended after {timeout:.0f} s:\n{self.output}") from None


class Processes:
    """All carry one variable, unique to this test, which children inherit: so each can be found and ended."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.marker = folder, f"EXPERT_PARALLEL_TEST={uuid4().hex}"

    def start(self, name: str, command: list[str], **variables: Any) -> Process:
        """variables: over those of tests/launches.py."""
        marked = environment() | dict([self.marker.split("=")]) | {key: str(value) for key, value in variables.items()}
        return Process(name, [str(word) for word in command], self.folder / f"{name}.out", marked)

    def ids(self, *variables: str) -> list[int]:
        """Processes of this test that live, and have each `NAME=value` in their environment."""
        found, wanted = [], {self.marker, *variables}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted <= set(path.read_text(errors="replace").split("\0")):
                    found.append(int(path.parent.name))
            except OSError:  # gone since, or another user's
                continue
        return found

    def left(self, seconds: float = 30) -> list[int]:
        """Those that still live after so many seconds: a launcher may leave before its ranks are gone."""
        end = time.monotonic() + seconds
        while (living := self.ids()) and time.monotonic() < end:
            time.sleep(0.1)
        return living

    def kill(self, *variables: str) -> None:
        for number in self.ids(*variables):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        while self.ids():  # again, for a child that was born meanwhile
            self.kill()
            time.sleep(0.01)


def wait_until(condition: Callable[[], bool], what: str, *running: Process, seconds: float = TIMEOUT_SECONDS) -> None:
    """Polls; fails with the outputs of `running` if it takes longer, or one of them ends first."""
    end = time.monotonic() + seconds
    while not condition():
        ended = [process.name for process in running if process.popen.poll() is not None]
        outputs = "".join(f"\n--- {process.name}\n{process.output}" for process in running)
        assert not ended or condition(), f"{ended} ended before {what}{outputs}"
        assert time.monotonic() < end, f"no {what} after {seconds:.0f} s{outputs}"
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------------------
# What a run should come to


def losses(run: Path, *names: str) -> list[float]:
    """Of each step in turn; each step stands once. names: of metrics; default: all losses and the gradient norm."""
    path, names = run / "metrics.jsonl", names or ("train/loss", "eval/loss", "train/grad_norm")
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert [record["step"] for record in records] == list(range(len(records)))
    return [record[name] for record in records for name in names if name in record]


def losses_here(world_size: int, folder: Path, *overrides: str) -> list[float]:
    """Of the small run, on ranks of pytest's own."""
    folder = folder / "here"
    folder.mkdir()
    run_ranks(world_size, _train, world_size, small_config(folder), list(overrides))
    return losses(folder / "run")


def _train(rank: int, world_size: int, config: Path, overrides: list[str]) -> None:
    launch = Launch("test", rank, world_size, rank, world_size)
    train(load_config(config, overrides), Runtime(launch, torch.device("cpu"), "gloo", timedelta(seconds=120)))
