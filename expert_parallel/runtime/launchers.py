"""Reads a launcher's environment variables, which the caller passes in, into a `Launch`.

| launcher | recognised by | address of the rendezvous |
|---|---|---|
| torchrun, deepspeed and the like | RANK, WORLD_SIZE, LOCAL_RANK | MASTER_ADDR:MASTER_PORT |
| Open MPI's mpirun | OMPI_COMM_WORLD_SIZE | a free port on rank 0's host, broadcast through MPI |
| MPICH's mpiexec (hydra) | PMI_SIZE, MPI_LOCALRANKID | the same |
| Slurm's srun, one task per rank | SLURM_STEP_ID, SLURM_STEP_NUM_TASKS | the first host, a port from the job id |
| none | none of these | none: a single process |

The first row that matches is used: torchrun started by srun or mpirun is torchrun.
"""

import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address

from expert_parallel.runtime.mpi.backend import load_mpi, mpi_version_line

Environment = Mapping[str, str]
SLURM_PORTS = range(20_000, 30_000)  # below the ephemeral ports of Linux (32768 and up)


class LaunchError(ValueError):
    """Signals that the launcher's environment variables contradict each other, or that the ranks could not connect.
    Every process that notices it raises this error."""


@dataclass(frozen=True)
class Launch:
    """Describes how this process was started: by which launcher, and as which rank of how many.

    local_rank, local_world_size: this process's index among the ranks of its node, and their number. master: (host,
    port) of the store at which the ranks meet; None for a single process. `hosts_store`: True if this process serves
    the store (rank 0, unless torchrun's agent does). `restart_count`: how often torchrun has restarted the ranks, if
    its agent keeps one store for all restarts; otherwise "". `mpi_library`: name and version of the MPI library in use,
    or "".
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master: tuple[str, int] | None = None
    hosts_store: bool = False
    restart_count: str = ""
    mpi_library: str = ""


def read_launch(environment: Environment) -> Launch:
    """Returns the Launch that the environment variables describe. Raises LaunchError if variables are missing or
    contradictory.

    Under mpirun it initialises MPI, and every rank must call it.
    """
    for is_used, read in LAUNCHERS:
        if is_used(environment):
            return _validated(read(environment), environment)
    raise AssertionError("the last launcher always matches")


def _from_rank_variables(environment: Environment) -> Launch:
    """Reads RANK, WORLD_SIZE and the like, as torchrun, deepspeed and others set them."""
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environment), "WORLD_SIZE")
    launcher = "env"
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher = "torchrun"
    elif "CROSS_SIZE" in environment:
        launcher = "deepspeed"
    rank = _require_int(environment, "RANK")
    is_agents_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(
        launcher,
        rank,
        _require_int(environment, "WORLD_SIZE"),
        _require_int(environment, "LOCAL_RANK"),
        _require_int(environment, local),
        (_require_host(environment, "MASTER_ADDR"), _require_port(environment, "MASTER_PORT")),
        hosts_store=rank == 0 and not is_agents_store,
        restart_count=environment.get("TORCHELASTIC_RESTART_COUNT", "") if is_agents_store else "",
    )


def _from_open_mpi(environment: Environment) -> Launch:
    """Reads the variables of Open MPI's mpirun."""
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    return _from_mpi("openmpi", *(_require_int(environment, f"OMPI_COMM_WORLD_{name}") for name in names))


def _from_mpich(environment: Environment) -> Launch:
    """Reads the variables of MPICH's mpiexec."""
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    return _from_mpi("mpich", *(_require_int(environment, name) for name in names))


def _from_mpi(launcher: str, rank: int, world_size: int, local_rank: int, local_world_size: int) -> Launch:
    """Agrees on a rendezvous address through MPI."""
    master, mpi_library = mpi_rendezvous(rank, world_size, is_one_host=local_world_size == world_size)
    return Launch(
        launcher, rank, world_size, local_rank, local_world_size, master, hosts_store=rank == 0, mpi_library=mpi_library
    )


def _from_slurm(environment: Environment) -> Launch:
    """Reads the variables of srun. Steps of a job use different ports: the port is derived from both ids."""
    rank, node = _require_int(environment, "SLURM_PROCID"), _require_int(environment, "SLURM_NODEID")
    tasks = parse_tasks_per_node(_require(environment, "SLURM_STEP_TASKS_PER_NODE"))
    if node >= len(tasks):
        raise LaunchError(
            f"SLURM_NODEID is {node} but SLURM_STEP_TASKS_PER_NODE ({environment['SLURM_STEP_TASKS_PER_NODE']}) names "
            f"{len(tasks)} nodes"
        )
    nodes = _require(environment, "SLURM_STEP_NODELIST")
    host = _require_host(environment, "MASTER_ADDR") if environment.get("MASTER_ADDR") else parse_first_host(nodes)
    job = _require_int(environment, "SLURM_JOB_ID") * 7 + _require_int(environment, "SLURM_STEP_ID")
    port = SLURM_PORTS[job % len(SLURM_PORTS)]
    if "MASTER_PORT" in environment:
        port = _require_port(environment, "MASTER_PORT")
    world_size, local_rank = (
        _require_int(environment, "SLURM_STEP_NUM_TASKS"),
        _require_int(environment, "SLURM_LOCALID"),
    )
    return Launch("slurm", rank, world_size, local_rank, tasks[node], (host, port), hosts_store=rank == 0)


def _single_process(environment: Environment) -> Launch:
    """Returns the launch of a single process. Raises LaunchError if a launcher has started several without ranks."""
    for name, advice in (
        ("SLURM_NTASKS", "start the ranks with srun or torchrun (launch/slurm), or one process alone with srun -n 1"),
        ("PMI_SIZE", "start the ranks with MPICH's own mpiexec, which sets MPI_LOCALRANKID, or with torchrun"),
        ("MV2_COMM_WORLD_SIZE", "start the ranks with torchrun, one process a node"),
    ):
        if _require_int(environment, name, default="1") > 1:
            raise LaunchError(f"{name} is {environment[name]} but nothing says which rank this process is: {advice}")
    return Launch("none")


# (matches, read) of each launcher; the first that matches is used.
LAUNCHERS: tuple[tuple[Callable[[Environment], bool], Callable[[Environment], Launch]], ...] = (
    (lambda environment: "RANK" in environment or "WORLD_SIZE" in environment, _from_rank_variables),
    (lambda environment: "OMPI_COMM_WORLD_SIZE" in environment, _from_open_mpi),
    (lambda environment: "PMI_SIZE" in environment and "MPI_LOCALRANKID" in environment, _from_mpich),
    (lambda environment: _is_slurm_step(environment), _from_slurm),
    (lambda environment: True, _single_process),
)


def _is_slurm_step(environment: Environment) -> bool:
    """Returns True if this process is one of several tasks of an srun step."""
    return "SLURM_STEP_ID" in environment and _require_int(environment, "SLURM_STEP_NUM_TASKS", default="1") > 1


def _validated(launch: Launch, environment: Environment) -> Launch:
    """Returns `launch`. Raises LaunchError if its ranks and sizes contradict each other or another launcher."""
    if not 0 <= launch.rank < launch.world_size:
        raise LaunchError(f"this process has rank {launch.rank}, which does not fit the world size {launch.world_size}")
    if not 0 <= launch.local_rank < launch.local_world_size <= launch.world_size:
        raise LaunchError(
            f"this process has local rank {launch.local_rank}, which does not fit the {launch.local_world_size} "
            f"ranks of its node and the world size {launch.world_size}"
        )
    if launch.launcher in ("env", "deepspeed", "torchrun"):  # RANK may be a leftover in the shell
        for starter, name in (("mpirun", "OMPI_COMM_WORLD_SIZE"), ("mpiexec", "PMI_SIZE")):
            started = _require_int(environment, name, default="0")
            if launch.world_size < started:
                raise LaunchError(
                    f"{starter} started {started} processes but WORLD_SIZE is {launch.world_size}: unset RANK and "
                    "WORLD_SIZE"
                )
        if launch.launcher != "torchrun" and _is_slurm_step(environment):  # a task may have a torchrun of its own
            started = _require_int(environment, "SLURM_STEP_NUM_TASKS")
            if launch.world_size < started:
                raise LaunchError(
                    f"srun started {started} tasks but WORLD_SIZE is {launch.world_size}: unset RANK and WORLD_SIZE"
                )
    return launch


def _require(environment: Environment, name: str) -> str:
    """Returns a variable. Raises LaunchError if it is missing, naming the ones that made it necessary."""
    if name not in environment:
        launcher_variables = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
        others = [other for other in launcher_variables if other in environment]
        verb = "is" if len(others) == 1 else "are"
        raise LaunchError(f"the environment variable {name} is not set, though {' and '.join(others)} {verb}")
    return environment[name]


def _require_int(environment: Environment, name: str, default: str | None = None) -> int:
    """Returns a variable as a non-negative integer. Raises LaunchError if it is none, or missing without a default."""
    value = _require(environment, name) if default is None else environment.get(name, default)
    if not re.fullmatch("[0-9]+", value):
        raise LaunchError(f"the environment variable {name} is {value!r}, expected a number")
    return int(value)


def _require_port(environment: Environment, name: str) -> int:
    """Returns a variable as a port. Raises LaunchError if it is missing or none."""
    port = _require_int(environment, name)
    if not 0 < port < 2**16:
        raise LaunchError(f"the environment variable {name} is {port}, a port is a number from 1 to {2**16 - 1}")
    return port


def _require_host(environment: Environment, name: str) -> str:
    """Returns a variable as the name or address of a host. Raises LaunchError if it is missing or none."""
    host = _require(environment, name)
    with suppress(ValueError):
        return str(ip_address(host))  # v4 or v6, whose colons begin no port
    problem = ""
    if re.fullmatch(r"\[?[^\s/\[\]]+\]?:[0-9]+", host):
        problem = "alone, without its port"
    elif not re.fullmatch(r"[^\s/:\[\]@,]+", host):
        problem = "alone"
    else:
        try:
            host.encode("idna")
        except UnicodeError:
            problem = "with 1 to 63 characters between dots"
    if problem:
        raise LaunchError(
            f"the environment variable {name} is {host!r}, expected the name or the address of a host, {problem}"
        )
    return host


def parse_tasks_per_node(text: str) -> list[int]:
    """Returns the number of tasks on each node from Slurm's compact list: `2(x3),1` is [2, 2, 2, 1]. Raises LaunchError
    if the text is no such list."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LaunchError(
                f"the environment variable SLURM_STEP_TASKS_PER_NODE is {text!r}, expected like '2(x3),1'"
            )
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def parse_first_host(nodes: str) -> str:
    """Returns the first host of Slurm's compact list of hosts: `node[007-010,012],big1` gives node007."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    assert match is not None
    return match[1] + (match[2] or "") + match[3]


def mpi_rendezvous(rank: int, world_size: int, is_one_host: bool) -> tuple[tuple[str, int], str]:
    """Broadcasts rank 0's host and a free port on it. Returns (host, port), and the MPI library's name and version.

    Every rank must call it. The address is sent as bytes in a buffer, so that nothing is unpickled. Raises LaunchError
    if mpi4py is missing, or uses another MPI library than the mpirun that started the ranks.
    """
    try:
        MPI = load_mpi()
    except ValueError as error:
        raise LaunchError(f"mpirun started {world_size} ranks but {error}") from error
    world = MPI.COMM_WORLD
    mpi_library = mpi_version_line()
    if world_size != world.size:
        raise LaunchError(
            f"mpirun started {world_size} ranks but mpi4py found another MPI library than that of the mpirun in use "
            f"({mpi_library})"
        )
    if rank != world.rank:
        raise LaunchError(f"mpirun says rank {rank} but mpi4py's COMM_WORLD says {world.rank} ({mpi_library})")
    offer = bytearray(256)
    if rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            host = "127.0.0.1" if is_one_host else socket.gethostname()
            text = f"{host}:{free.getsockname()[1]}".encode()
        offer[: len(text)] = text
    world.Bcast(offer, root=0)
    host, port = bytes(offer).rstrip(b"\0").decode().rsplit(":", 1)
    return (host, int(port)), mpi_library
