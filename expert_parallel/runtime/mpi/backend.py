"""Registers MPI as a torch.distributed backend named "mpi4py": torch's own "mpi" backend is not in its wheels.

start_mpi(rank, world_size)          # checks, then registers the backend with torch
dist.init_process_group(BACKEND, store=store, rank=rank, world_size=world_size, timeout=timeout)
...
dist.destroy_process_group()
finalize_mpi()                         # only if all ranks end in order; see there
"""

import sys
from typing import Any, NoReturn

import torch.distributed as dist

from expert_parallel.runtime.mpi.watchdog import Watchdog

BACKEND = "mpi4py"


def load_mpi() -> Any:
    """Imports the module MPI of mpi4py, which initialises MPI. Raises ValueError if it cannot be imported."""
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # see finalize_mpi
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        raise ValueError(
            f"mpi4py cannot be used ({str(error).splitlines()[0]}): pip install 'expert-parallel[mpi]'"
        ) from error
    return MPI


def start_mpi(rank: int, world_size: int) -> None:
    """Initialises MPI and registers it with torch.distributed. Further calls only check again.

    Raises ValueError if mpi4py or an MPI library is missing, if the library lets only one thread communicate, or if it
    sees other ranks than `rank` of `world_size`, as when no mpirun, or another library's, started the processes.
    """
    try:
        MPI = load_mpi()
    except ValueError as error:
        raise ValueError(f"runtime.backend is 'mpi' but {error}") from error
    world = MPI.COMM_WORLD
    if world.size != world_size:
        raise ValueError(
            f"runtime.backend is 'mpi' and there are {world_size} ranks but MPI's COMM_WORLD has {world.size} "
            f"({mpi_version_line()}): start the ranks with the mpirun of that library"
        )
    if world.rank != rank:
        raise ValueError(
            f"runtime.backend is 'mpi' and this process is rank {rank} but rank {world.rank} of MPI's COMM_WORLD: "
            "the numbers of mpirun count, unset RANK"
        )
    # autograd communicates from its own threads in the backward pass, and the watchdog aborts the job from another.
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ValueError(
            f"runtime.backend is 'mpi' but {mpi_version_line()} gives thread level {MPI.Query_thread()}, needed is "
            f"{MPI.THREAD_MULTIPLE} (MPI_THREAD_MULTIPLE)"
        )
    if BACKEND not in dist.Backend.backend_list:
        from expert_parallel.runtime.mpi.process_group import group_builder

        make = group_builder(Watchdog(lambda: abort_job(1)))
        dist.Backend.register_backend(BACKEND, make, extended_api=True, devices=["cpu", "cuda"])


def mpi_version_line() -> str:
    """Returns the library's name and version and the world size, as in "Open MPI v5.0.11, COMM_WORLD of 4"."""
    MPI = load_mpi()
    name = MPI.Get_library_version().splitlines()[0].split(",")[0].replace("Version:", "")
    return f"{' '.join(name.split())}, COMM_WORLD of {MPI.COMM_WORLD.size}"


def finalize_mpi() -> None:
    """Calls MPI_Finalize, which waits for all ranks. Does nothing if MPI was never initialised.

    A rank that fails alone must not call it: it would wait for the others, and they for it in a collective, for ever.
    It must exit with a code other than 0 instead: mpirun then sees that MPI_Finalize is missing and ends the job.
    """
    if "mpi4py.MPI" in sys.modules:
        MPI = load_mpi()
        if not MPI.Is_finalized():
            MPI.Finalize()


def abort_job(code: int) -> NoReturn:
    """Ends all ranks of the job at once with this exit code, from any thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    load_mpi().COMM_WORLD.Abort(code)
    raise AssertionError("Abort does not return")
