"""Launcher environment -> rank, world size, device, backend. The only file that reads the environment.

torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; Open MPI's mpirun
sets its own, and the rendezvous goes through mpi4py; with none of them this is one process alone.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field

from expert_parallel.collectives import gather_text
from expert_parallel.settings import Settings

Result = TypeVar("Result")
CPU = torch.device("cpu")  # what the ranks tell each other before and beside training goes through gloo


class RuntimeConfig(Settings):
    """`timeout_seconds`: how long a collective waits for a rank before it fails, in every group."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_seconds: float = Field(default=600.0, gt=0, le=1e6)


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process. master: host and port of the rendezvous; None for one process alone."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master: tuple[str, int] | None = None


@dataclass(frozen=True)
class Runtime:
    """This process among the others, with torch.distributed running."""

    launch: Launch
    device: torch.device
    backend: str
    timeout: timedelta

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    def together(self, work: Callable[[], Result]) -> Result:
        return together(work)


class UserError(Exception):
    """One sentence for the user: what is wrong, which setting, which numbers. Every rank raises the same one."""


class LaunchError(ValueError):
    """What the launcher says does not add up, so that the ranks cannot meet: each process that sees it says it."""


def together(work: Callable[[], Result]) -> Result:
    """Runs `work`, which communicates nothing. If it fails for a reason that a user can mend, on any rank, every
    rank raises the same UserError: nobody goes on, and nobody waits for a rank that is gone."""
    result, error = None, ""
    try:
        result = work()
    except (ValueError, OSError) as failure:
        error = str(failure) or type(failure).__name__
    errors = [text for text in gather_text(error, CPU) if text]
    if errors:
        raise UserError(errors[0])
    return result  # type: ignore[return-value]


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Raises LaunchError where the variables contradict each other or one is missing."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environment), "WORLD_SIZE")
        master = (_text(environment, "MASTER_ADDR"), _number(environment, "MASTER_PORT"))
        if world_size < _number(environment, "OMPI_COMM_WORLD_SIZE", default="0"):
            raise LaunchError(
                f"mpirun started {environment['OMPI_COMM_WORLD_SIZE']} processes but WORLD_SIZE is {world_size}: "
                "unset RANK and WORLD_SIZE"
            )
        local_rank, local_world_size = _number(environment, "LOCAL_RANK"), _number(environment, local)
        return _checked(Launch("torchrun", rank, world_size, local_rank, local_world_size, master))
    if "OMPI_COMM_WORLD_SIZE" in environment:
        rank, world_size = _number(environment, "OMPI_COMM_WORLD_RANK"), _number(environment, "OMPI_COMM_WORLD_SIZE")
        local_rank = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK")
        local_world_size = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
        return _checked(Launch("mpirun", rank, world_size, local_rank, local_world_size, _meet_through_mpi(world_size)))
    for name in ("SLURM_NTASKS", "PMI_SIZE"):
        if _number(environment, name, default="1") > 1:
            raise LaunchError(
                f"{name} is {environment[name]} but RANK and WORLD_SIZE are not set: start the ranks with torchrun "
                "(launch/train.sh), one a node"
            )
    return Launch("none")


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.world_size:
        raise LaunchError(f"this process has rank {launch.rank}, which does not fit the world size {launch.world_size}")
    if not 0 <= launch.local_rank < launch.local_world_size <= launch.world_size:
        raise LaunchError(
            f"this process has local rank {launch.local_rank}, which does not fit the {launch.local_world_size} "
            f"ranks of its node and the world size {launch.world_size}"
        )
    return launch


def _text(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        others = [other for other in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE") if other in environment]
        raise LaunchError(f"the environment variable {name} is not set, though {' and '.join(others)} is")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    value = _text(environment, name) if default is None else environment.get(name, default)
    if not value.isdecimal():
        raise LaunchError(f"the environment variable {name} is {value!r}, expected a number")
    return int(value)


def _meet_through_mpi(world_size: int) -> tuple[str, int]:
    """Rank 0 offers a host and a free port. Buffers only, no pickling."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
        raise LaunchError(f"mpirun started {world_size} ranks but mpi4py cannot be used ({error})") from error
    if world_size != MPI.COMM_WORLD.size:
        raise LaunchError(
            f"mpirun started {world_size} ranks but mpi4py's COMM_WORLD has {MPI.COMM_WORLD.size}: mpi4py found "
            f"another MPI library than the mpirun in use ({MPI.Get_library_version().split(',')[0]})"
        )
    offer = bytearray(256)
    if MPI.COMM_WORLD.rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            text = f"{socket.gethostname()}:{free.getsockname()[1]}".encode()
        offer[: len(text)] = text
    MPI.COMM_WORLD.Bcast(offer, root=0)
    host, port = bytes(offer).rstrip(b"\0").decode().rsplit(":", 1)
    return host, int(port)


@contextmanager
def distributed(config: RuntimeConfig) -> Iterator[Runtime]:
    """Starts torch.distributed for this launch, and ends it on leaving. A UserError, which all ranks raise, is said
    by rank 0 alone, and no rank leaves before: a launcher would end the others."""
    launch = read_launch(os.environ)
    backend = "cpu:gloo,cuda:nccl" if config.device != "cpu" and torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=config.timeout_seconds)
    if launch.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_world_size))
    if launch.launcher == "torchrun":
        dist.init_process_group(backend, init_method="env://", timeout=timeout)
    else:
        store: dist.Store = dist.HashStore()
        if launch.master is not None:
            host, port = launch.master
            store = dist.TCPStore(host, port, launch.world_size, is_master=launch.rank == 0, timeout=timeout)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    try:
        device = agree_on_device(config.device, launch)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        yield Runtime(launch, device, backend, timeout)
    except UserError as error:
        if launch.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        gather_text("", CPU)
        raise
    finally:
        dist.destroy_process_group()


def agree_on_device(kind: str, launch: Launch) -> torch.device:
    """This rank's device; a UserError on all ranks if one has too few GPUs, or none where others have some."""
    device = together(lambda: choose_device(kind, launch))
    types = gather_text(device.type, CPU)
    if len(set(types)) > 1:
        raise UserError(
            f"runtime.device is {kind!r} and {types.count('cuda')} of {len(types)} ranks have a GPU, rank "
            f"{types.index('cpu')} has none"
        )
    return device


def choose_device(kind: str, launch: Launch) -> torch.device:
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise ValueError(f"runtime.device is {kind!r} but torch finds no GPU on the node of rank {launch.rank}")
    if launch.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"runtime.device is {kind!r} and the node of rank {launch.rank} has {torch.cuda.device_count()} GPUs, "
            f"too few for {launch.local_world_size} ranks"
        )
    return torch.device("cuda", launch.local_rank)
