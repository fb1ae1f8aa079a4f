"""What each launcher's variables say of a process; contradictions and gaps are refused by name."""

import re
import sys
from types import SimpleNamespace

import pytest

from expert_parallel.runtime import launchers
from expert_parallel.runtime.launchers import (
    SLURM_PORTS,
    Launch,
    LaunchError,
    parse_first_host,
    parse_tasks_per_node,
    read_launch,
)

ENV = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
TORCHRUN = ENV | {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "False"}
DEEPSPEED = {name: value for name, value in ENV.items() if name != "LOCAL_WORLD_SIZE"}
DEEPSPEED |= {"LOCAL_SIZE": "4", "CROSS_SIZE": "2", "CROSS_RANK": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {  # rank 3 of 5, on the second of two nodes
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2,3",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
LEFT_OVER = ENV | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
MPI_VARIABLES = [(environment, name) for environment in (OPEN_MPI, MPICH) for name in environment]


@pytest.fixture
def mpi_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        launchers, "mpi_rendezvous", lambda rank, size, is_one_host: ((f"node0 of {size}", 4321), "An MPI 5.0")
    )


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        ("node0:29500", "alone, without its port"),
        ("[::1]:29500", "alone, without its port"),
        ("", "alone"),
        ("node 0", "alone"),
        ("[::1]", "alone"),
        ("http://node0", "alone"),
        ("a..b", "with 1 to 63 characters between dots"),
        ("n" * 64, "with 1 to 63 characters between dots"),
    ],
)
def test_a_malformed_address_is_refused_at_once(host: str, problem: str) -> None:
    sentence = (
        f"the environment variable MASTER_ADDR is {host!r}, expected the name or the address of a host, {problem}"
    )
    with pytest.raises(LaunchError, match=f"^{re.escape(sentence)}$"):
        read_launch(ENV | {"MASTER_ADDR": host})


@pytest.mark.parametrize("host", ["node_0", "node-0.local.", "10.0.0.1", "::1", "fe80::1%eth0"])
def test_an_address_may_be_a_name_or_a_number(host: str) -> None:
    assert read_launch(ENV | {"MASTER_ADDR": host}).master == (host, 29500)


def without(environment: dict[str, str], name: str) -> dict[str, str]:
    return {other: value for other, value in environment.items() if other != name}


@pytest.mark.parametrize(
    ("launcher", "environment"), [("env", ENV), ("torchrun", TORCHRUN), ("deepspeed", DEEPSPEED)], ids=str
)
def test_those_that_set_rank(launcher: str, environment: dict[str, str]) -> None:
    assert read_launch(environment) == Launch(launcher, 5, 8, 1, 4, ("node0", 29500), hosts_store=False)
    first = environment | {"RANK": "0", "LOCAL_RANK": "0"}
    assert read_launch(first).hosts_store
    assert not read_launch(first | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts_store, (
        "torchrun's agent has the port"
    )


@pytest.mark.usefixtures("mpi_of_two")
@pytest.mark.parametrize(("launcher", "environment"), [("openmpi", OPEN_MPI), ("mpich", MPICH)], ids=str)
def test_mpi(launcher: str, environment: dict[str, str]) -> None:
    expected = Launch(launcher, 1, 2, 1, 2, ("node0 of 2", 4321), hosts_store=False, mpi_library="An MPI 5.0")
    assert read_launch(environment) == expected
    # mpirun in a Slurm job starts its daemons by srun: what srun says is of them, not of the ranks
    assert read_launch(environment | SLURM) == expected


def test_slurm() -> None:
    port = SLURM_PORTS[17 * 7 + 2]
    assert read_launch(SLURM) == Launch("slurm", 3, 5, 1, 3, ("gpu007", port), hosts_store=False)
    assert read_launch(SLURM | {"PMI_RANK": "3", "PMI_SIZE": "5"}).launcher == "slurm", "srun --mpi=pmi2"
    assert read_launch(SLURM | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"}).master == ("10.0.0.7", 4000)
    first = SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    assert read_launch(first) == Launch("slurm", 0, 5, 0, 2, ("gpu007", port), hosts_store=True)
    assert read_launch(first | {"SLURM_STEP_ID": "3"}).master != read_launch(first).master, "steps run at one time"
    assert read_launch(SLURM | TORCHRUN).launcher == "torchrun"


@pytest.mark.parametrize(
    ("text", "tasks"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,3,1(x2)", [1, 3, 1, 1])], ids=str
)
def test_tasks_of_nodes(text: str, tasks: list[int]) -> None:
    assert parse_tasks_per_node(text) == tasks


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n0", "n0"),
        ("n0,n1", "n0"),
        ("n[0-3]", "n0"),
        ("node[007-010,012],big1", "node007"),
        ("gpu-a[3,5]", "gpu-a3"),
        ("rack[1-2]-x,other", "rack1-x"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert parse_first_host(nodes) == first


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "7", "PMI_SIZE": "1"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
    ],
)
def test_one_process_alone(environment: dict[str, str]) -> None:
    assert read_launch(environment) == Launch("none", rank=0, world_size=1, local_rank=0, local_world_size=1)


def test_torchrun_in_slurm_and_torchrun_on_every_node_of_mpirun() -> None:
    assert read_launch(TORCHRUN | {"SLURM_NTASKS": "2"}).world_size == 8
    assert read_launch(TORCHRUN | OPEN_MPI).launcher == "torchrun"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(LaunchError, match=f"^the environment variable {name} is not set, though "):
        read_launch(without(TORCHRUN, name))


@pytest.mark.usefixtures("mpi_of_two")
@pytest.mark.parametrize(("environment", "name"), MPI_VARIABLES)
def test_a_missing_variable_of_mpi_is_named(environment: dict[str, str], name: str) -> None:
    if name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALRANKID"):
        return  # by which it is known at all
    with pytest.raises(LaunchError, match=f"^the environment variable {name} is not set, though "):
        read_launch(without(environment, name))


@pytest.mark.parametrize(
    "name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"]
)
def test_a_missing_variable_of_slurm_is_named(name: str) -> None:
    with pytest.raises(
        LaunchError, match=f"^the environment variable {name} is not set, though SLURM_STEP_NUM_TASKS is"
    ):
        read_launch(without(SLURM, name))


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (ENV | {"RANK": "8"}, "this process has rank 8, which does not fit the world size 8"),
        (ENV | {"WORLD_SIZE": "0", "RANK": "0"}, "this process has rank 0, which does not fit the world size 0"),
        (ENV | {"LOCAL_RANK": "4"}, "local rank 4, which does not fit the 4 ranks of its node"),
        (ENV | {"LOCAL_WORLD_SIZE": "9"}, "does not fit the 9 ranks of its node and the world size 8"),
        (ENV | {"RANK": "two"}, "the environment variable RANK is 'two', expected a number"),
        (ENV | {"RANK": "-1"}, "the environment variable RANK is '-1', expected a number"),
        (ENV | {"RANK": "\u0663"}, "the environment variable RANK is '\u0663', expected a number"),
        (ENV | {"LOCAL_WORLD_SIZE": ""}, "the environment variable LOCAL_WORLD_SIZE is '', expected a number"),
        (ENV | {"MASTER_PORT": "http"}, "the environment variable MASTER_PORT is 'http', expected a number"),
        (ENV | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000, a port is a number from 1 to 65535"),
        # Left over in a shell: under mpirun -n 2 each of both would train alone, into the same folder.
        (OPEN_MPI | LEFT_OVER, "mpirun started 2 processes but WORLD_SIZE is 1"),
        (MPICH | LEFT_OVER, "mpiexec started 2 processes but WORLD_SIZE is 1"),
        (SLURM | LEFT_OVER, "srun started 5 tasks but WORLD_SIZE is 1: unset RANK"),
        (
            {"SLURM_NTASKS": "4"},
            "SLURM_NTASKS is 4 but nothing says which rank this process is: start the ranks with srun",
        ),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "PMI_SIZE is 4 but nothing says which rank this process is"),
        (SLURM | {"SLURM_NODEID": "2"}, "SLURM_NODEID is 2 but SLURM_STEP_TASKS_PER_NODE (2,3) names 2 nodes"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2x3"}, "SLURM_STEP_TASKS_PER_NODE is '2x3', expected like '2(x3),1'"),
        (SLURM | {"SLURM_PROCID": "5"}, "this process has rank 5, which does not fit the world size 5"),
    ],
)
def test_contradictions_are_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(LaunchError) as refused:
        read_launch(environment)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("environment", [OPEN_MPI, MPICH], ids=["openmpi", "mpich"])
def test_an_mpi_other_than_the_launchers_is_refused(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """mpi4py with another library gives N worlds of size 1 in silence."""
    fake = SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1, rank=0), Get_library_version=lambda: "MPICH 5.0, built")
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=fake, rc=SimpleNamespace()))
    with pytest.raises(LaunchError, match=r"mpirun started 2 ranks but mpi4py found .* \(MPICH 5.0, COMM_WORLD of 1\)"):
        read_launch(environment)
    fake.COMM_WORLD.size = 2
    with pytest.raises(LaunchError, match=r"mpirun says rank 1 but mpi4py's COMM_WORLD says 0 \(MPICH 5.0, "):
        read_launch(environment)


def test_mpirun_without_mpi4py_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match="mpirun started 2 ranks but mpi4py cannot be used"):
        read_launch(OPEN_MPI)
