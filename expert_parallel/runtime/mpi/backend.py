"""MPI as a carrier of torch.distributed, under the backend name "mpi4py": torch's own "mpi" is not in its wheels.

start_mpi(rank, world_size)          # checks, then registers the backend with torch
dist.init_process_group(BACKEND, store=store, rank=rank, world_size=world_size, timeout=timeout)
...
dist.destroy_process_group()
finish_mpi()                         # where all ranks come to their end; see there
"""

import sys
from typing import Any, NoReturn

import torch.distributed as dist

from expert_parallel.runtime.mpi.watchdog import Watchdog

BACKEND = "mpi4py"


def load_mpi() -> Any:
    """mpi4py's module MPI, with MPI started. The only place that imports it first. ValueError where it cannot be."""
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # see finish_mpi
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
        raise ValueError(
            f"mpi4py cannot be used ({str(error).splitlines()[0]}): pip install 'expert-parallel[mpi]'"
        ) from error
    return MPI


def start_mpi(rank: int, world_size: int) -> None:
    """Starts MPI and registers it with torch.distributed; called once more, it checks again.

    ValueError where mpi4py or the library is missing, lets one thread alone communicate, or sees other ranks than
    `rank` of `world_size`: so it is where no mpirun, or that of another library, has started the processes.
    """
    try:
        MPI = load_mpi()
    except ValueError as error:
        raise ValueError(f"runtime.backend is 'mpi' but {error}") from error
    world = MPI.COMM_WORLD
    if world.size != world_size:
        raise ValueError(
            f"runtime.backend is 'mpi' and there are {world_size} ranks but MPI's COMM_WORLD has {world.size} "
            f"({library_line()}): start the ranks with the mpirun of that library"
        )
    if world.rank != rank:
        raise ValueError(
            f"runtime.backend is 'mpi' and this process is rank {rank} but rank {world.rank} of MPI's COMM_WORLD: "
            "the numbers of mpirun count, unset RANK"
        )
    # Backward passes of GPUs communicate on a thread of autograd's, and the watchdog ends the job from its own.
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ValueError(
            f"runtime.backend is 'mpi' but {library_line()} gives thread level {MPI.Query_thread()}, needed is "
            f"{MPI.THREAD_MULTIPLE} (MPI_THREAD_MULTIPLE)"
        )
    if BACKEND not in dist.Backend.backend_list:
        from expert_parallel.runtime.mpi.process_group import group_maker

        make = group_maker(Watchdog(lambda: end_job(1)))
        dist.Backend.register_backend(BACKEND, make, extended_api=True, devices=["cpu", "cuda"])


def library_line() -> str:
    """As "Open MPI v5.0.11, COMM_WORLD of 4"."""
    MPI = load_mpi()
    name = MPI.Get_library_version().splitlines()[0].split(",")[0].replace("Version:", "")
    return f"{' '.join(name.split())}, COMM_WORLD of {MPI.COMM_WORLD.size}"


def finish_mpi() -> None:
    """MPI_Finalize, which waits for all ranks: for those that come to an orderly end together. Nothing without MPI.

    A rank that fails alone must not call it: it would wait for the others, and they for this rank in a collective, for
    ever. It just exits with a code that is not 0: mpirun sees that MPI_Finalize was not called, and ends the job.
    """
    if "mpi4py.MPI" in sys.modules:
        MPI = load_mpi()
        if not MPI.Is_finalized():
            MPI.Finalize()


def end_job(code: int) -> NoReturn:
    """Ends all ranks of the job at once with this exit code, from any thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    load_mpi().COMM_WORLD.Abort(code)
    raise AssertionError("Abort does not return")
