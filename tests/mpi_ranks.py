"""A rank of the tests of MPI, started by mpiexec: python -m tests.mpi_ranks ROLE FOLDER."""

import json
import sys
import time
from datetime import timedelta
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from expert_parallel.runtime.launchers import Launch
from expert_parallel.runtime.mpi.backend import BACKEND, finalize_mpi, load_mpi, start_mpi
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import load_config
from expert_parallel.training.loop import train
from tests.mpi_cases import CASES, DTYPES, GROUPS, compare

TIMEOUT = timedelta(seconds=200)
LAYOUTS = {
    "ep_tp": ["parallel.ep=2", "parallel.tp=2"],
    "ep_sharded": ["parallel.ep=2", "parallel.data.kind=sharded"],
    "pp": ["parallel.ep=1", "parallel.pp=2", "training.micro_steps=2"],
}
LIGHT = ["evaluation.every=2"]  # MPI spins: ranks that share cores with others' work are slow
HANG_SECONDS = 3


def cases(folder: Path) -> None:
    """FOLDER/RANK.json: what is wrong, by case."""
    rank, world_size = start("gloo", folder)
    start_mpi(rank, world_size)
    results = {}
    for name, lists in GROUPS.items():
        pairs = [(dist.new_group(ranks, backend=BACKEND), dist.new_group(ranks, backend="gloo")) for ranks in lists]
        mine = next((pair for pair, ranks in zip(pairs, lists, strict=True) if rank in ranks), None)
        for case, dtype in product(CASES, DTYPES if name == "world" else ("float64", "bfloat16")):
            results[f"{case}, {name}, {dtype}"] = "" if mine is None else compare(case, *mine, DTYPES[dtype])
        if name == "world":  # the ways of what is too long for an int
            with mock.patch("expert_parallel.runtime.mpi.messages.MAX_COUNT", 5):
                for case, dtype in product(CASES, ("float64", "bfloat16")):
                    results[f"{case}, too long, {dtype}"] = compare(case, *mine, DTYPES[dtype])
    results["counts beyond an int"] = wrong_sizes()
    (folder / f"{rank}.json").write_text(json.dumps(results))


def wrong_sizes() -> str:
    """Arithmetic alone: the memory is never touched."""
    from expert_parallel.runtime.mpi.messages import buffer_spec, contiguous_datatype

    _, count, datatype = buffer_spec(torch.empty(2**31 + 20, dtype=torch.uint8), blocks=4)
    found = [count, datatype.Get_size(), contiguous_datatype(7, torch.bfloat16).Get_size()]
    long = contiguous_datatype(2**33 + 5, torch.float32)
    found += [long.Get_size(), *long.Get_extent()]
    expected = [1, 2**29 + 5, 14, 4 * (2**33 + 5), 0, 4 * (2**33 + 5)]
    return "" if found == expected else f"{found} is not {expected}"


def runs(folder: Path) -> None:
    """A run of each layout, with MPI as the only carrier, in FOLDER/LAYOUT."""
    rank, world_size = start(BACKEND, folder)
    launch = Launch("test", rank, world_size, rank, world_size)
    for name, overrides in LAYOUTS.items():
        config = load_config(folder / "config.yaml", [*overrides, f"run.folder={folder / name}", *LIGHT])
        train(config, Runtime(launch, torch.device("cpu"), BACKEND, TIMEOUT))


def fail(folder: Path) -> None:
    """One rank alone."""
    rank, _ = start(BACKEND, folder)
    if rank == 1:
        raise RuntimeError("rank 1 fails alone")
    dist.barrier()


def hang(folder: Path) -> None:
    rank, _ = start(BACKEND, folder, timedelta(seconds=HANG_SECONDS))
    if rank == 1:
        time.sleep(1000)
    dist.all_reduce(torch.ones(1))


def start(backend: str, folder: Path, timeout: timedelta = TIMEOUT) -> tuple[int, int]:
    torch.set_num_threads(1)
    world = load_mpi().COMM_WORLD
    start_mpi(world.rank, world.size)
    store = dist.FileStore(str(folder / "store"), world.size)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    return world.rank, world.size


ROLES = {"cases": cases, "runs": runs, "fail": fail, "hang": hang}

if __name__ == "__main__":
    ROLES[sys.argv[1]](Path(sys.argv[2]))
    dist.destroy_process_group()
    finalize_mpi()
