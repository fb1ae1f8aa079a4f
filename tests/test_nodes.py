"""One training run over two nodes (namespaces with a network between them), under each launcher that can: the same
losses as on one node."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launches import run_folder, small_config
from tests.nodes import Cluster, need_programs, nodes
from tests.processes import Process, Processes, losses, losses_here, wait_until

pytestmark = pytest.mark.system
PORT = 29500  # the nodes' ports are their own


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with nodes(2) as two:
        two.serve_ssh()
        yield two


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


def ends_well(processes: Processes, *started: Process) -> None:
    for process in started:
        assert process.wait() == 0, "".join(f"\n--- {each.name}\n{each.output}" for each in started)
    assert sum(process.output.count("done: 2 steps") for process in started) == 1, "rank 0 alone speaks"
    assert processes.left() == []


def test_torchrun_on_two_nodes(cluster: Cluster, processes: Processes, tmp_path: Path) -> None:
    """4 ranks, through launch/train.sh as launch/README.md shows it."""
    config = small_config(tmp_path)
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"n0:{PORT}"]
    command = ["bash", "launch/train.sh", str(config), "--nproc", "2", "--", *meet]
    ends_well(processes, *(processes.start(f"n{node}", cluster.on(node, command)) for node in (0, 1)))
    assert len(losses(tmp_path / "run")) == 7
    assert losses(tmp_path / "run") == pytest.approx(losses_here(4, tmp_path), rel=1e-12, abs=0)


def test_train_sh_where_the_hosts_own_name_has_no_address(processes: Processes, tmp_path: Path) -> None:
    """On one node no name is needed, neither by torchrun nor by gloo."""
    script = f"hostname own-name.invalid; exec bash launch/train.sh {small_config(tmp_path)} --nproc 2"
    process = processes.start("alone", ["unshare", "--uts", "bash", "-c", script])
    ends_well(processes, process)
    assert "started by torchrun: own-name.invalid 0-1" in process.output


def start_deepspeed(cluster: Cluster, processes: Processes, hosts: list[str], config: Path, *overrides: str) -> Process:
    """Its launcher on n0 starts a rank on each host by pdsh, which brings along only what .deepspeed_env names."""
    need_programs({"pdsh": "pdsh"})
    hostfile, environment = config.parent / "hostfile", config.parent / "environment"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts))
    environment.write_text(f"DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n{processes.marker}\n")
    command = ["deepspeed", "--hostfile", str(hostfile), "--master_addr", "n0", "--master_port", str(PORT)]
    command += ["--module", "expert_parallel", "train", str(config), *overrides]
    variables = {"DS_ENV_FILE": environment, "PDSH_RCMD_TYPE": "ssh"}
    return processes.start("n0", cluster.on(0, command), **variables)


def test_deepspeed_with_a_hostfile(cluster: Cluster, processes: Processes, tmp_path: Path) -> None:
    ends_well(processes, start_deepspeed(cluster, processes, ["n0", "n1"], small_config(tmp_path)))
    assert losses(tmp_path / "run") == pytest.approx(losses(run_folder("torchrun")), rel=1e-12, abs=0)


def test_a_wrong_host_in_the_hostfile(cluster: Cluster, processes: Processes, tmp_path: Path) -> None:
    """ssh names the host, and the rank that did come says in time that it waits no longer."""
    seconds = "runtime.rendezvous_seconds=10"
    launcher = start_deepspeed(cluster, processes, ["n0", "n9"], small_config(tmp_path), seconds)
    assert launcher.wait() != 0, launcher.output
    assert "Could not resolve hostname n9" in launcher.output, launcher.output
    assert "error: rank 1 of 2 did not come within 10 s" in launcher.output, launcher.output
    assert processes.left() == []


def test_mpirun_by_ssh(cluster: Cluster, processes: Processes, tmp_path: Path) -> None:
    need_programs({"mpiexec": "openmpi-bin"})
    command = ["mpiexec", "--allow-run-as-root", "--host", "n0:1,n1:1", "-x", processes.marker.split("=")[0]]
    command += ["-x", "OMP_NUM_THREADS", "-x", "PATH", "python", "-m", "expert_parallel", "train"]
    command += [str(small_config(tmp_path))]
    ends_well(processes, processes.start("n0", cluster.on(0, command)))
    assert losses(tmp_path / "run") == pytest.approx(losses(run_folder("torchrun")), rel=1e-12, abs=0)


def start_by_hand(cluster: Cluster, processes: Processes, config: Path, *overrides: str) -> list[Process]:
    """The env:// way of any launcher that sets RANK and WORLD_SIZE."""
    command = ["python", "-m", "expert_parallel", "train", str(config), *overrides]
    started = []
    for rank in (0, 1):
        variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        variables |= {"MASTER_ADDR": "n0", "MASTER_PORT": PORT}
        started.append(processes.start(f"n{rank}", cluster.on(rank, command), **variables))
    return started


def test_variables_set_by_hand(cluster: Cluster, processes: Processes, tmp_path: Path) -> None:
    ends_well(processes, *start_by_hand(cluster, processes, small_config(tmp_path)))
    assert losses(tmp_path / "run") == pytest.approx(losses(run_folder("torchrun")), rel=1e-12, abs=0)


def test_a_node_that_is_cut_off_is_named(cluster: Cluster, processes: Processes, tmp_path: Path) -> None:
    """Each side of the cut names the other; nobody waits for ever at the store, which is on one side."""
    settings = ["training.steps=100000", "runtime.timeout_seconds=10"]
    ranks = start_by_hand(cluster, processes, small_config(tmp_path), *settings)
    wait_until(lambda: len(losses(tmp_path / "run")) > 6, "step 2", *ranks)
    cluster.cut(1)
    try:
        for rank, other in ((0, 1), (1, 0)):
            assert ranks[rank].wait() == 1, ranks[rank].output
            assert f"ranks that do not answer: rank {other} (host n{other})" in ranks[rank].output
        assert processes.left() == []
    finally:
        cluster.heal(1)
