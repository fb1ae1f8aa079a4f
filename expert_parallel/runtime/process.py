"""Starts and ends torch.distributed in this process, chooses its device, and reports an error of one rank on all ranks.

It is the only file that reads the variables of launchers: launchers.py interprets them, rendezvous.py connects the
ranks.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field

from expert_parallel.parallel.collectives import all_gather_text, any_rank
from expert_parallel.runtime.launchers import Launch, LaunchError, read_launch
from expert_parallel.runtime.mpi.backend import BACKEND, finalize_mpi, mpi_version_line, start_mpi
from expert_parallel.runtime.rendezvous import (
    LEAVE_TIMEOUT_SECONDS,
    RESPONSE_TIMEOUT_SECONDS,
    RankInfo,
    Rendezvous,
    first_line,
    format_hosts,
    join_rendezvous,
)
from expert_parallel.settings import Settings

__all__ = [
    "CPU",
    "Launch",
    "LaunchError",
    "LostContact",
    "OutOfMemory",
    "PermanentError",
    "RankFilter",
    "Runtime",
    "RuntimeConfig",
    "UserError",
    "distributed",
]

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
CPU = torch.device("cpu")  # control messages between ranks always use CPU tensors, so gloo (or MPI), never NCCL


# runtime.backend -> the torch.distributed backends for CPU tensors and for GPU tensors.
TORCH_BACKENDS = {
    "auto": ("gloo", "nccl"),
    "gloo": ("gloo", "gloo"),
    "nccl": ("gloo", "nccl"),
    "mpi": (BACKEND, BACKEND),
}


class RuntimeConfig(Settings):
    """Sets the device, the communication backend, and how long ranks wait for each other."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Sets the device that ranks compute on; `auto` takes GPUs if there are any."""
    backend: Literal["auto", "gloo", "nccl", "mpi"] = "auto"
    """Sets the communication backend for tensors; `auto` is nccl on GPUs and gloo on CPUs, `mpi` is the library of
    mpirun, through mpi4py."""
    timeout_seconds: float = Field(default=600.0, gt=0, le=1e6)
    """Sets how long a collective waits for a rank before it fails, in seconds."""
    rendezvous_seconds: float = Field(default=300.0, gt=0, le=1e6)
    """Sets how long ranks wait for each other at the start, in seconds."""
    wait_for_nodes_seconds: float = Field(default=0.0, ge=0, le=1e6)
    """Sets how long the ranks of an elastic run wait for further nodes if the degrees of parallelism do not fit their
    number, in seconds."""


@dataclass(frozen=True)
class Runtime:
    """Describes this process while torch.distributed is running.

    launch: how this process was started. backend: the string that was passed to init_process_group. timeout: of every
    collective. `rendezvous`: the store that the ranks share; None if the process group was set up without it.
    """

    launch: Launch
    device: torch.device
    backend: str
    timeout: timedelta
    rendezvous: Rendezvous | None = None

    @property
    def hosts(self) -> str:
        """Returns the hosts with their ranks, as in `n0 0-3, n1 4-7`."""
        return format_hosts(self.rendezvous.rank_infos) if self.rendezvous is not None else ""

    @property
    def rank(self) -> int:
        """Returns this process's global rank."""
        return self.launch.rank

    @property
    def world_size(self) -> int:
        """Returns the number of ranks."""
        return self.launch.world_size

    def run_on_all_ranks(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on this rank; if it fails on any rank, all ranks raise the same UserError."""
        return run_on_all_ranks(work)


class UserError(Exception):
    """Signals an error that the user can fix; its message names the setting and the numbers. All ranks raise it
    together."""


class PermanentError(UserError):
    """Signals a UserError that the same command would meet again, so that starting it again is of no use."""


class LostContact(Exception):
    """Signals that another rank has ended or does not answer. One of the ranks that notice it logs which rank it is."""


class OutOfMemory(Exception):
    """Signals that this rank has run out of memory. The first rank to which it happens logs the message."""


class RankFilter(logging.Filter):
    """Sets `rank` on log records, for formats that use it: the torch.distributed rank, or None before it runs."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Sets the attribute and keeps the record."""
        if not hasattr(record, "rank"):  # set by callers that log before torch.distributed runs
            record.rank = dist.get_rank() if dist.is_initialized() else None
        return True


def run_on_all_ranks(work: Callable[[], Result]) -> Result:
    """Runs `work` and returns this rank's result. Every rank must call it; `work` itself must not communicate.

    If it raises ValueError or OSError on any rank, all ranks raise the same UserError, so that no rank goes on and
    waits for one that has failed.
    """
    result, error = None, ""
    try:
        result = work()
    except (ValueError, OSError) as failure:
        error = str(failure) or type(failure).__name__
    if any_rank(bool(error)):
        raise UserError(next(text for text in all_gather_text(error, CPU) if text))
    return result  # type: ignore[return-value]


@contextmanager
def distributed(config: RuntimeConfig, settings: Mapping[str, Any] | None = None) -> Iterator[Runtime]:
    """Starts torch.distributed in this process, yields its Runtime, and destroys the process group on exit.

    settings: the run's resolved config, which must be the same on all ranks. If the body raises a UserError, as all
    ranks then do, rank 0 logs it, and no rank exits before all have arrived, since the launcher would kill the others.
    Raises LaunchError if the ranks cannot connect, and LostContact if a rank has ended or does not answer; one of the
    other ranks logs it.
    """
    launch = read_launch(os.environ)
    backend = choose_backend(config)
    timeout = timedelta(seconds=config.timeout_seconds)
    rendezvous_timeout = timedelta(seconds=config.rendezvous_seconds)
    if launch.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_world_size))
    warn_about_restarts(launch, os.environ)
    rendezvous = join_rendezvous(launch, rendezvous_timeout, settings)
    if config.backend == "mpi":
        launch = start_mpi_backend(launch)
    if launch.master is not None:
        rendezvous.start_health_responder(rendezvous_timeout)
    is_clean_exit = False
    try:
        start_process_group(backend, launch, rendezvous, timeout)
        device = choose_device_on_all_ranks(config.device, launch)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        logger.info("ready: %s on %s", backend, device)
        yield Runtime(launch, device, backend, timeout, rendezvous)
        is_clean_exit = True
    except UserError as error:
        if launch.rank == 0:
            logger.error("%s", error)
        all_gather_text("", CPU)
        is_clean_exit = True
        raise
    except OutOfMemory as error:
        if rendezvous.is_first_to_report():
            logger.error("%s", error)
        raise
    except RuntimeError as error:
        if not is_communication_error(error):
            raise
        if not (lost := rendezvous.lost_ranks()):
            raise  # all ranks answer: a defect, or a rank that runs another collective
        sentence = lost_ranks_message(launch, lost, error)
        if rendezvous.is_first_to_report():
            logger.error("%s", sentence)
        raise LostContact(sentence) from error
    finally:
        if dist.is_initialized() and (is_clean_exit or config.backend != "mpi"):  # MPI would wait for lost ranks
            dist.destroy_process_group()
        rendezvous.leave(LEAVE_TIMEOUT_SECONDS if is_clean_exit else RESPONSE_TIMEOUT_SECONDS)
        if is_clean_exit:
            finalize_mpi()


def warn_about_restarts(launch: Launch, environment: Mapping[str, str]) -> None:
    """Warns on rank 0 if torchrun may restart the ranks in a way that fails in torch 2.13."""
    shares_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launch.rank == 0 and shares_store and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        logger.warning(
            "torchrun may restart the ranks, which fails in torch 2.13 (pytorch#135712): set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, as launch/train.sh does",
            extra={"rank": launch.rank},
        )


def set_deepspeed_environment(runtime: Runtime) -> None:
    """Sets the environment variables that DeepSpeed reads. Call it before DeepSpeed is first imported."""
    os.environ["LOCAL_RANK"] = str(runtime.launch.local_rank)
    os.environ["DS_ACCELERATOR"] = runtime.device.type


def choose_backend(config: RuntimeConfig) -> str:
    """Returns the backend argument of init_process_group. Raises LaunchError for NCCL without a GPU."""
    has_gpu = config.device != "cpu" and torch.cuda.is_available()
    cpu, gpu = TORCH_BACKENDS[config.backend]
    if config.backend == "nccl" and not has_gpu:
        raise LaunchError("runtime.backend is 'nccl' but there is no GPU to use: it must be auto, gloo or mpi")
    return f"cpu:{cpu},cuda:{gpu}" if has_gpu else cpu


def start_mpi_backend(launch: Launch) -> Launch:
    """Registers the MPI backend and returns `launch` with `mpi_library` filled in. Raises LaunchError if MPI cannot be
    used."""
    try:
        start_mpi(launch.rank, launch.world_size)
    except ValueError as error:
        raise LaunchError(str(error)) from error
    return replace(launch, mpi_library=mpi_version_line())


def start_process_group(backend: str, launch: Launch, rendezvous: Rendezvous, timeout: timedelta) -> None:
    """Initialises torch.distributed through the store that the ranks share. Raises LaunchError if they cannot
    connect."""
    store = rendezvous.store
    store.set_timeout(timeout)
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("torch", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    except RuntimeError as error:
        if lost := rendezvous.lost_ranks():
            raise LaunchError(
                f"rank {launch.rank} met the others, but these were gone before the work began: "
                f"{', '.join(map(str, lost))}"
            ) from error
        hosts = format_hosts(rendezvous.rank_infos)
        raise LaunchError(
            f"rank {launch.rank} met the others ({hosts}) but cannot exchange tensors with them "
            f"({first_line(error)}): see GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in launch/README.md"
        ) from error


def is_communication_error(error: RuntimeError) -> bool:
    """Returns True if torch.distributed raised the error because a rank is gone or did not answer in time."""
    return isinstance(error, dist.DistError) or bool(re.search(r"gloo|NCCL|ProcessGroup|mpi4py", str(error)))


def lost_ranks_message(launch: Launch, lost: list[RankInfo], error: RuntimeError) -> str:
    """Returns the message of LostContact. lost: the ranks that do not answer."""
    return (
        f"rank {launch.rank} lost contact in the middle of work ({first_line(error)}); ranks that do not answer: "
        f"{', '.join(map(str, lost))}. Started again, a training run goes on from its last checkpoint"
    )


def choose_device_on_all_ranks(kind: str, launch: Launch) -> torch.device:
    """Returns this rank's device. Every rank must call it. kind: `runtime.device`.

    Raises UserError on all ranks if a node has too few GPUs, if only some ranks have a GPU, or if two share one.
    """
    device = run_on_all_ranks(lambda: choose_device(kind, launch))
    types = all_gather_text(device.type, CPU)
    if len(set(types)) > 1:
        raise UserError(
            f"runtime.device is {kind!r} and {types.count('cuda')} of {len(types)} ranks have a GPU, rank "
            f"{types.index('cpu')} has none"
        )
    if device.type == "cuda":
        names = all_gather_text(str(torch.cuda.get_device_properties(device).uuid), CPU)
        for rank, name in enumerate(names):
            if (first := names.index(name)) < rank:
                raise UserError(f"ranks {first} and {rank} have the same GPU ({name}): start one rank for each GPU")
    return device


def choose_device(kind: str, launch: Launch) -> torch.device:
    """Returns the CPU, or the GPU whose index is this rank's local rank. kind: `runtime.device`. Raises ValueError if
    there is no GPU or too few."""
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise ValueError(f"runtime.device is {kind!r} but torch finds no GPU on the node of rank {launch.rank}")
    num_gpus = torch.cuda.device_count()
    if num_gpus == 1:  # or the only one that the launcher makes visible (srun --gpus-per-task=1)
        return torch.device("cuda", 0)
    if launch.local_rank >= num_gpus:
        raise ValueError(
            f"runtime.device is {kind!r} and the node of rank {launch.rank} has {num_gpus} GPUs, too few for "
            f"{launch.local_world_size} ranks"
        )
    return torch.device("cuda", launch.local_rank)
