"""Runs under torchrun that lose a rank or a node, or get one back: they re-form, go on from the last checkpoint, and
end with the losses of a run that nothing happened to."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launches import small_config
from tests.nodes import Cluster, nodes
from tests.processes import Process, Processes, losses, losses_here, wait_until

pytestmark = pytest.mark.system
STEPS = 40
# Drops that do not depend on the number of data ranks, so that no loss does.
LONG = [f"training.steps={STEPS}", "checkpoint.every=2", "evaluation.every=20", "model.moe.capacity.scope=global"]
TIMES = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=300"
ELASTIC = ["--nnodes", "1:2", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-conf", TIMES]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with nodes(2) as two:
        yield two


def train(config: Path, num_ranks: int, *overrides: str, options: list[str]) -> list[str]:
    script = ["bash", "launch/train.sh", str(config), "--nproc", str(num_ranks)]
    return [*script, *LONG, "runtime.timeout_seconds=15", *overrides, "--", *options]


def test_a_killed_rank(processes: Processes, tmp_path: Path) -> None:
    """One of 4 on one node."""
    command = train(small_config(tmp_path), 4, options=["--max-restarts", "3"])
    run = processes.start("train", command)
    wait_until(lambda: len(losses(tmp_path / "run")) > 12, "step 6", run)
    processes.kill("RANK=2")
    assert run.wait() == 0, run.output
    assert run.output.count("resumed from ") == 1, run.output
    assert processes.left() == []
    assert losses(tmp_path / "run") == losses_here(4, tmp_path, *LONG)


def test_a_lost_node_and_one_that_comes_back(cluster: Cluster, processes: Processes, tmp_path: Path) -> None:
    """dp is 4, then 2, then 4 again."""
    command = train(small_config(tmp_path), 2, options=[*ELASTIC, "--rdzv-endpoint", "n0:29500"])
    first, _ = (processes.start(f"n{node}", cluster.on(node, command)) for node in (0, 1))
    wait_until(lambda: len(losses(tmp_path / "run")) > 12, "step 6", first)
    cluster.kill(1)
    wait_until(lambda: "\nstep " in first.output.partition("ranks: 2 on cpu")[2], "a step on 2 ranks", first)
    # Held still while the new node starts: else the run might be over before.
    held = processes.ids("RANK=0") + processes.ids("RANK=1")
    send(signal.SIGSTOP, held)
    cluster.boot(1)
    second = processes.start("n1 again", cluster.on(1, command))
    wait_until(lambda: all(is_told_to_end(number) for number in held), "that torchrun ends the 2 ranks", first, second)
    send(signal.SIGCONT, held)
    ends_well(processes, first, second)
    assert re.findall(r"ranks: .* (dp \d), ", first.output) == ["dp 4", "dp 2", "dp 4"]
    assert losses(tmp_path / "run") == pytest.approx(losses_here(4, tmp_path, *LONG), rel=1e-9, abs=0)


def test_ranks_wait_for_a_node_without_which_the_degrees_do_not_fit(
    cluster: Cluster, processes: Processes, tmp_path: Path
) -> None:
    """ep 2 over two nodes of one rank each, of which one is lost and comes back."""
    wait = "runtime.wait_for_nodes_seconds=600"
    command = train(small_config(tmp_path), 1, wait, options=[*ELASTIC, "--rdzv-endpoint", "n0:29500"])
    first, _ = (processes.start(f"n{node}", cluster.on(node, command)) for node in (0, 1))
    wait_until(lambda: len(losses(tmp_path / "run")) > 12, "step 6", first)
    cluster.kill(1)
    wait_until(lambda: "waiting 600 s for other nodes to join: " in first.output, "a word of waiting", first)
    cluster.boot(1)
    second = processes.start("n1 again", cluster.on(1, command))
    ends_well(processes, first, second)
    assert losses(tmp_path / "run") == pytest.approx(losses_here(2, tmp_path, *LONG), rel=1e-12, abs=0)


def test_ranks_do_not_wait_for_ever(processes: Processes, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        meet = ["--rdzv-endpoint", f"127.0.0.1:{free.getsockname()[1]}"]
    wait = "runtime.wait_for_nodes_seconds=2"
    command = train(small_config(tmp_path), 1, wait, options=[*ELASTIC, "--max-restarts", "0", *meet])
    run = processes.start("train", command)
    assert run.wait() == 2, run.output  # the code of a rank that refuses
    assert "waiting 2 s for other nodes to join: " in run.output, run.output
    (sentence,) = (line for line in run.output.splitlines() if line.startswith("error: "))
    assert "parallel.ep" in sentence
    assert sentence.endswith("; no other node has joined in 2 s (runtime.wait_for_nodes_seconds)")
    assert processes.left() == []


def ends_well(processes: Processes, first: Process, second: Process) -> None:
    for process in (first, second):
        assert process.wait() == 0, f"{first.output}\n---\n{second.output}"
    assert first.output.count(f"done: {STEPS} steps") == 1, first.output
    assert processes.left() == []


def send(number: signal.Signals, processes: list[int]) -> None:
    for process in processes:
        os.kill(process, number)


def is_told_to_end(process: int) -> bool:
    """Whether SIGTERM waits for it: it is held still."""
    status = Path(f"/proc/{process}/status").read_text()
    pending = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)
