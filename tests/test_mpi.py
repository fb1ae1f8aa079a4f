"""MPI as transport, with Open MPI and with MPICH: it moves and adds what gloo does, trains to the same losses, and a
rank that fails or hangs does not keep the others."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from expert_parallel.runtime.mpi.backend import start_mpi
from tests.launches import ROOT, small_config
from tests.mpi_cases import CASES, WORLD
from tests.mpi_ranks import HANG_SECONDS, LAYOUTS, LIGHT
from tests.processes import Process, Processes, losses, losses_here

pytestmark = pytest.mark.system

BIN = Path(sys.executable).parent
MPICH = Path(sys.prefix) / "mpich"  # beside Open MPI, whose mpiexec and libmpi its own would overwrite
LIBRARIES = {
    "Open MPI": [BIN / "mpiexec", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"],
    "MPICH": [MPICH / "bin" / "mpiexec"],
}
VARIABLES = {"Open MPI": {}, "MPICH": {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(MPICH / "lib")}}


@pytest.fixture(scope="module", params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    assert LIBRARIES[request.param][0].exists(), "launch/install.sh puts both libraries here"
    return request.param


@pytest.fixture(scope="module")
def results(library: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is wrong, by case, on any rank."""
    folder = tmp_path_factory.mktemp("cases")
    with Processes(folder) as processes:
        ranks = mpiexec(processes, library, WORLD, "tests.mpi_ranks", "cases", folder)
        assert ranks.wait(600) == 0, ranks.output
    wrong: dict[str, str] = {}
    for rank in range(WORLD):
        for case, found in json.loads((folder / f"{rank}.json").read_text()).items():
            wrong[case] = wrong.get(case, "") + found
    return wrong


def mpiexec(processes: Processes, library: str, world_size: int, module: str, *arguments: object) -> Process:
    command = [*LIBRARIES[library], "-n", world_size, sys.executable, "-m", module, *arguments]
    return processes.start(f"{module}-{len(processes.ids())}", command, **VARIABLES[library])


@pytest.mark.parametrize("case", CASES)
def test_does_what_gloo_does(results: dict[str, str], case: str) -> None:
    """Over all dtypes and groups, strided and empty tensors among them, and as if tensors were too long for an int."""
    found = {name: wrong for name, wrong in results.items() if name.startswith(f"{case}, ")}
    assert len(found) == 9 + 2 * 4
    assert not any(found.values()), "\n".join(f"{name}: {wrong}" for name, wrong in found.items() if wrong)


def test_counts_that_an_int_does_not_hold(results: dict[str, str]) -> None:
    assert results["counts beyond an int"] == ""


def test_trains_to_the_same_losses(library: str, tmp_path: Path) -> None:
    small_config(tmp_path)
    with Processes(tmp_path) as processes:
        ranks = mpiexec(processes, library, WORLD, "tests.mpi_ranks", "runs", tmp_path)
        assert ranks.wait(600) == 0, ranks.output
    for name, overrides in LAYOUTS.items():
        here = tmp_path / f"gloo_{name}"
        here.mkdir()
        expected = losses_here(WORLD, here, *overrides, *LIGHT)
        assert len(expected) == 6, "two steps, two evaluations"
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-12, abs=0), name


def test_the_command_line(library: str, tmp_path: Path) -> None:
    """The same file as under any launcher; the start names the library."""
    config = small_config(tmp_path)
    with Processes(tmp_path) as processes:
        ranks = mpiexec(processes, library, 2, "expert_parallel", "train", config, "runtime.backend=mpi")
        assert ranks.wait() == 0, ranks.output
        assert "done: 2 steps" in ranks.output
        assert library in ranks.output
        assert "COMM_WORLD of 2" in ranks.output
        assert processes.left() == []


@pytest.mark.parametrize(
    ("role", "said"),
    [
        ("fail", "rank 1 fails alone"),
        ("hang", f"all_reduce among ranks 0, 1 was not done within {HANG_SECONDS} s (runtime.timeout_seconds)"),
    ],
)
def test_a_rank_that_fails_or_hangs_ends_the_job(library: str, tmp_path: Path, role: str, said: str) -> None:
    """MPI alone would wait for ever."""
    with Processes(tmp_path) as processes:
        ranks = mpiexec(processes, library, 2, "tests.mpi_ranks", role, tmp_path)
        assert ranks.wait() not in (0, None)
        assert said in ranks.output
        assert processes.left() == []


def test_another_world_than_the_launchers_is_refused(library: str) -> None:
    """As where no mpirun started the ranks, or that of another library: each is then alone in its COMM_WORLD."""
    script = """
from expert_parallel.runtime.mpi.backend import finalize_mpi, start_mpi
for rank, world_size in ((0, 4), (1, 1)):
    try:
        start_mpi(rank, world_size)
    except ValueError as error:
        print(error)
finalize_mpi()
"""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI"))}
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=variables | VARIABLES[library],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "there are 4 ranks but MPI's COMM_WORLD has 1 (" in found.stdout, found.stdout + found.stderr
    assert library in found.stdout
    assert "this process is rank 1 but rank 0 of MPI's COMM_WORLD" in found.stdout


def test_mpi4py_that_is_missing() -> None:
    with (
        mock.patch.dict(sys.modules, {"mpi4py": None}),
        pytest.raises(ValueError, match=r"backend is 'mpi' but mpi4py"),
    ):
        start_mpi(0, 1)
