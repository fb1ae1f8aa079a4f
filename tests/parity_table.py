"""Prints the table of launchers in launch/MEASUREMENTS.md: 20 steps of quickstart in float64 under each of them.

    python -m tests.parity_table [--mpich FOLDER] [words ...]     # words: only rows whose name has one of them

Needs root for the rows of two nodes (tests/nodes.py). A row whose program is missing says so.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest

from tests.launches import ROOT, free_port
from tests.nodes import need_programs, nodes
from tests.processes import Processes, losses
from tests.slurm_cluster import slurm

STEPS, PORT = 20, 29500
FIRST = "torchrun, 1 x 2"
CONFIG = "configs/quickstart.yaml"
# A smaller batch, for the time it takes. With the capacity of `rank`, which tokens drop depends on the number of ranks.
SETTINGS = [
    *(f"training.steps={STEPS}", "training.global_batch=8", "training.dtype=float64", "model.dropout=0"),
    *("model.moe.capacity.scope=global", "evaluation.every=1000", "evaluation.sequences=2", "run.sample=null"),
    *("runtime.device=cpu", "runtime.timeout_seconds=300"),
]
HEAD = (
    "| launcher | nodes x ranks | carried by | loss of step 1 | of step {steps} | largest difference of {steps} steps |"
)


class NotRun(Exception):
    """And why not."""


@dataclass
class Run:
    """One row's: where it writes, and the settings on its command line."""

    processes: Processes
    folder: Path
    mpich: Path | None
    overrides: tuple[str, ...]

    @property
    def settings(self) -> list[str]:
        return [CONFIG, f"run.folder={self.folder / 'run'}", *SETTINGS, *self.overrides]

    @property
    def train(self) -> list[str]:
        return ["expert_parallel", "train", *self.settings]

    def start_all(self, *commands: list[str], **variables: str) -> None:
        started = [self.processes.start(f"node{node}", command, **variables) for node, command in enumerate(commands)]
        for process in started:
            if process.wait(3600) != 0:
                raise NotRun(f"exit code {process.popen.returncode}: {process.output[-2000:]}")


@dataclass(frozen=True)
class Row:
    nodes: int
    ranks: int  # on each node
    transport: str
    start: Callable[[Run], None]
    overrides: tuple[str, ...] = ()


def alone(run: Run) -> None:
    run.start_all(["python", "-m", *run.train])


def torchrun(run: Run, num_nodes: int, num_ranks: int) -> None:
    command = ["bash", "launch/train.sh", *run.settings, "--nproc", str(num_ranks)]
    if num_nodes == 1:
        run.start_all(command)
        return
    meet = ["--", "--nnodes", str(num_nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"n0:{PORT}"]
    with nodes(num_nodes) as cluster:
        run.start_all(*(cluster.on(node, [*command, *meet]) for node in range(num_nodes)))


def deepspeed(run: Run) -> None:
    need_programs({"deepspeed": "none; pip install 'expert-parallel[deepspeed]'"}, root=False)
    run.start_all(["deepspeed", "--num_accelerators", "2", "--master_port", free_port(), "--module", *run.train])


def open_mpi(run: Run, num_ranks: int) -> None:
    need_programs({"mpiexec": "openmpi-bin"}, root=False)
    options = ["--allow-run-as-root", "--oversubscribe", "-n", str(num_ranks)]
    run.start_all(["mpiexec", *options, "python", "-m", *run.train])


def mpich(run: Run, num_ranks: int) -> None:
    if run.mpich is None or not (run.mpich / "bin" / "mpiexec").exists():
        raise NotRun("MPICH: pip install --prefix FOLDER mpich, then --mpich FOLDER")
    variables = {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(run.mpich / "lib")}
    run.start_all([str(run.mpich / "bin" / "mpiexec"), "-n", str(num_ranks), "python", "-m", *run.train], **variables)


def slurm_job(run: Run, script: str) -> None:
    """Two ranks, one on each of two nodes."""
    with slurm(2, run.folder) as cluster:
        settings = [str(ROOT / CONFIG), *run.settings[1:]]
        options = ["--nodes", "2", "--ntasks-per-node", "1"]
        job = cluster.submit(ROOT / "launch" / "slurm" / script, *settings, options=options)
        cluster.wait(job, "COMPLETED", 3600)


MPI, ENGINE = ("runtime.backend=mpi",), ("training.engine.kind=deepspeed", "training.dtype=float32")
ROWS = {
    FIRST: Row(1, 2, "gloo", partial(torchrun, num_nodes=1, num_ranks=2)),
    "none": Row(1, 1, "nothing", alone, ("parallel.ep=1",)),
    "torchrun, 2 x 1": Row(2, 1, "gloo", partial(torchrun, num_nodes=2, num_ranks=1)),
    "torchrun, 2 x 2": Row(2, 2, "gloo", partial(torchrun, num_nodes=2, num_ranks=2)),
    "deepspeed": Row(1, 2, "gloo", deepspeed),
    "torchrun, DeepSpeed as engine, float32": Row(1, 2, "gloo", partial(torchrun, num_nodes=1, num_ranks=2), ENGINE),
    "mpirun (Open MPI), 2": Row(1, 2, "gloo", partial(open_mpi, num_ranks=2)),
    "mpirun (Open MPI), 4": Row(1, 4, "gloo", partial(open_mpi, num_ranks=4)),
    "mpirun (Open MPI), 2, MPI": Row(1, 2, "Open MPI", partial(open_mpi, num_ranks=2), MPI),
    "mpirun (Open MPI), 4, MPI": Row(1, 4, "Open MPI", partial(open_mpi, num_ranks=4), MPI),
    "mpiexec (MPICH), 2, MPI": Row(1, 2, "MPICH", partial(mpich, num_ranks=2), MPI),
    "Slurm, torchrun on each node": Row(2, 1, "gloo", partial(slurm_job, script="train.sbatch")),
    "Slurm, one task a rank": Row(2, 1, "gloo", partial(slurm_job, script="train_tasks.sbatch")),
}


@cache
def losses_of(name: str, mpich: Path | None) -> list[float]:
    """Of the steps; NotRun where they cannot be had."""
    with tempfile.TemporaryDirectory() as name_of_folder, Processes(Path(name_of_folder)) as processes:
        folder, row = Path(name_of_folder), ROWS[name]
        try:
            row.start(Run(processes, folder, mpich, row.overrides))
        except pytest.skip.Exception as missing:
            raise NotRun(str(missing)) from None
        except AssertionError as failure:
            raise NotRun(str(failure)[-2000:]) from None
        found = losses(folder / "run", "train/loss")
        assert len(found) == STEPS
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mpich", type=Path, help="folder with MPICH's bin and lib")
    parser.add_argument("words", nargs="*")
    chosen = parser.parse_args()
    print(HEAD.format(steps=STEPS), "|---|---|---|---|---|---|", sep="\n", flush=True)
    for name, row in ROWS.items():
        if chosen.words and not any(word in name for word in chosen.words):
            continue
        place = f"| {name} | {row.nodes} x {row.ranks} | {row.transport} |"
        try:
            expected = losses_of(FIRST, chosen.mpich)
            found = losses_of(name, chosen.mpich)
        except NotRun as reason:
            print(place, f"not run: {reason} | | |", flush=True)
            continue
        difference = max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True))
        print(place, f"{found[0]:.12f} | {found[-1]:.12f} | {difference:.1g} |", flush=True)


if __name__ == "__main__":
    main()
