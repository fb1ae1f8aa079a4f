"""Real launchers for the tests: the command line as a user starts it, alone or on 2 ranks.

result = start("torchrun", "train", config)      # returncode and output of all ranks together
folder = run_folder("torchrun")                  # of a run of 2 steps; made once, then shared: copy before changing
output = run_output("torchrun")                  # what it printed, with --log-level info
"""

import fcntl
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from typer.testing import Result

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 240
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI_", "PMIX_", "SLURM_", "TORCHELASTIC_")

LAUNCHERS = {
    "alone": [sys.executable, "-m"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
    "mpirun": ["mpiexec", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m"],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--module", "--master_port"],  # and a free port
}


def run_configs() -> list[Path]:
    """What configs/ has for `train`, `check` and `verify`: all but that of a study."""
    return [path for path in sorted((ROOT / "configs").glob("**/*.yaml")) if path.name != "study.yaml"]


def assert_refused(result: Result, what: str) -> None:
    """A command said one sentence that begins so, and nothing else."""
    assert result.exit_code == 2
    assert not result.stdout
    assert result.stderr.startswith(f"error: {what}"), result.stderr
    assert result.stderr.count("\n") == 1


# Small, but with all that a run has: two MoE layers, drops, a balance loss; float64, so that launchers can be compared.
SMALL = """
run: {{folder: {folder}/run, log_every: 1}}
model:
  num_layers: 2
  d_model: 16
  attention: {{num_heads: 2, head_size: 8}}
  moe:
    num_experts: 4
    router: {{kind: top_k, k: 2}}
    capacity: {{kind: factor, train: 1.0, eval: 2.0, minimum: 1}}
    losses: [{{kind: balance}}]
    experts: {{hidden: 16}}
parallel: {{ep: 2}}
training: {{steps: 2, global_batch: 4, sequence_length: 16, dtype: float64}}
evaluation: {{every: 1, sequences: 4}}
data: {{kind: files, paths: [{folder}/text.txt]}}
runtime: {{device: cpu, timeout_seconds: 60}}
"""


@dataclass(frozen=True)
class Finished:
    returncode: int
    output: str


def small_config(folder: Path) -> Path:
    """A config for 2 ranks in `folder`, beside its data; it writes to folder/run."""
    (folder / "text.txt").write_text("It is a truth universally acknowledged. " * 50)
    path = folder / "config.yaml"
    path.write_text(SMALL.format(folder=folder))
    return path


def start(launcher: str, *arguments: str | Path) -> Finished:
    command = [*LAUNCHERS[launcher], *([free_port()] if launcher == "deepspeed" else [])]
    command += ["expert_parallel", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # so that the launcher ends its ranks
        output, _ = process.communicate(timeout=60)
        raise AssertionError(f"{command} was not done after {TIMEOUT_SECONDS} s:\n{output}") from None
    return Finished(process.returncode, output)


def run_folder(launcher: str) -> Path:
    return _finished_run(launcher) / "run"


def run_output(launcher: str) -> str:
    return (_finished_run(launcher) / "output.txt").read_text()


@cache
def _finished_run(launcher: str) -> Path:
    """The workers of pytest-xdist share one run of each launcher: the first that needs it makes it."""
    folder = Path(os.environ["EP_TESTS_SHARED_FOLDER"]) / launcher  # set by conftest.py
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "output.txt"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            result = start(launcher, "train", small_config(folder), "--log-level", "info")
            assert result.returncode == 0, result.output
            assert result.output.count("done: 2 steps") == 1, f"one rank speaks, to the end:\n{result.output}"
            done.write_text(result.output)
    return folder


def environment() -> dict[str, str]:
    """This process's, without what a launcher of the tests themselves may have set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
