"""Dispatchers over a slow link between two nodes (namespaces, and a rate that `tc` limits): the same values in chunks
as at once, and the bytes between nodes. What time is saved is measured by the same commands, `expert-parallel bench
overlap` and `bench nodes`."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import Cluster, need_programs, nodes
from tests.processes import Processes

pytestmark = pytest.mark.system
PORT = 29500  # the nodes' ports are their own
RATE, BURST = 200e6 / 8, 256 * 1024  # bytes a second, and bytes that pass at once after a pause


def limit_rate(cluster: Cluster) -> None:
    """Of what each node sends."""
    for node in range(cluster.count):
        limit = [
            "tc",
            "qdisc",
            "replace",
            "dev",
            "eth0",
            "root",
            "tbf",
            "rate",
            f"{8 * RATE:.0f}bit",
            "burst",
            f"{BURST}b",
            "latency",
            "400ms",
        ]
        subprocess.run(cluster.on(node, limit), check=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need_programs({"tc": "iproute2"})
    with nodes(2) as two:
        limit_rate(two)
        yield two


def bench(cluster: Cluster, folder: Path, command: list[str], ranks_per_node: int) -> dict[str, Any]:
    """What the command finds, with that many ranks on each of two nodes."""
    result = folder / "result.json"
    arguments = ["python", "-m", "expert_parallel", "bench", *command, "--json", str(result)]
    world_size = 2 * ranks_per_node
    with Processes(folder) as processes:
        started = []
        for rank in range(world_size):
            variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % ranks_per_node}
            variables |= {"LOCAL_WORLD_SIZE": ranks_per_node, "MASTER_ADDR": "n0", "MASTER_PORT": PORT}
            node = rank // ranks_per_node
            started.append(processes.start(f"rank{rank}", cluster.on(node, arguments), **variables))
        for process in started:
            assert process.wait() == 0, "".join(f"\n--- {each.name}\n{each.output}" for each in started)
        assert "forward and backward" in started[0].output
    return json.loads(result.read_text())


@pytest.mark.parametrize("dispatcher", ["all_to_all", "hierarchical"])
def test_chunks_change_nothing_on_a_slow_link(cluster: Cluster, tmp_path: Path, dispatcher: str) -> None:
    command = ["overlap", "--shape", "base", "tokens=2048", "hidden=256", "--rounds", "1", "--dispatcher", dispatcher]
    found = bench(cluster, tmp_path, command, ranks_per_node=1)
    assert found["difference"] < 1e-5
    assert found["overlap"] == 4
    row_bytes = 1024 * 256 * 4 / 2  # of at least half of a rank's 1024 tokens, each way, four times
    assert found["exchange"]["smallest"] > 4 * 1000 * (row_bytes - BURST) / RATE, "the link is not slow"


def test_bytes_between_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """Top-8 of 64 experts on 2 x 2 ranks: at most 0.27 of one row a choice, and 0.58 of one row a rank."""
    command = ["nodes", "--ranks-per-node", "2", "--shape", "fine-grained", "tokens=512", "--rounds", "1"]
    rows = bench(cluster, tmp_path, command, ranks_per_node=2)["rows"]
    assert rows["hierarchical"]["bytes"] <= 0.27 * rows["one row a choice"]["bytes"]
    assert rows["hierarchical"]["bytes"] <= 0.58 * rows["one row a rank"]["bytes"]
    assert rows["hierarchical"]["bytes"] == 4 * rows["hierarchical"]["rows_out"] * 256 * 4 > 0
