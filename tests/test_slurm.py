"""launch/slurm: its command lines with stand-ins for Slurm's programs, and its jobs on a real Slurm."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launches import ROOT, small_config, start
from tests.slurm_cluster import Slurm, slurm

SCRIPTS = ROOT / "launch" / "slurm"
TRAIN = ("train.sbatch", "train_tasks.sbatch")
# Drops do not depend on the layout, so 2 and 4 ranks compute the same; long enough to be stopped in the middle.
RUN = ["model.moe.capacity.scope=global", "evaluation.every=1000", "checkpoint.every=10"]
STEPS = 60

# Says its arguments, as one line of JSON.
RECORD = """#!{python}
import json, sys
with open("{folder}/said", "a") as file:
    print(json.dumps(sys.argv), file=file)
sys.exit({code})
"""


# --- with stand-ins: the scripts alone ---


@pytest.fixture
def job(tmp_path: Path) -> "StandIns":
    return StandIns(tmp_path)


class StandIns:
    """srun and sleep say how they were called; scontrol knows one job, of the nodes n1 and n2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        self.program("srun")
        self.program("sleep")

    def program(self, name: str, code: int = 0) -> None:
        self._write(name, RECORD.format(python=sys.executable, folder=self.folder, code=code))

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = f"   Command={SCRIPTS / script} a b"  # the job that stands for an array shows its other tasks, too
        answers = f'job) printf "%s\\n" "{command}" "{command}" ;; hostnames) printf "n1\\nn2\\n" ;;'
        answers += ' config) echo "SlurmdTimeout           = 300 sec" ;;'
        self._write("scontrol", f"#!/bin/bash\ncase $2 in {answers} esac\n")
        told = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", **variables}
        path = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "EXPERT_PARALLEL_VENV": "/none"}
        command = ["bash", "/dev/stdin", *arguments]  # as in a job, the script does not lie in its folder
        text = (SCRIPTS / script).read_text()
        return subprocess.run(command, input=text, capture_output=True, text=True, cwd=self.folder, env=path | told)

    def said(self) -> list[list[str]]:
        """The programs that were called, with their arguments."""
        path = self.folder / "said"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [[Path(words[0]).name, *words[1:]] for words in map(json.loads, lines)]

    def _write(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)


def test_one_torchrun_a_node(job: StandIns) -> None:
    done = job.run("train.sbatch", "my config.yaml", "seed=1", SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="96")
    assert done.returncode == 0, done.stderr
    options = ["--kill-on-bad-exit=0", "--wait=60", "--cpus-per-task=96", "--ntasks=2", "--ntasks-per-node=1"]
    ours = ["bash", str(SCRIPTS / "node.sh"), "my config.yaml", "--nproc", "8", "seed=1", "--"]
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:10007", "--rdzv-id", "7.0"]
    assert job.said() == [["srun", *options, *ours, *meet, "--max-restarts", "0"]]


def test_one_task_a_gpu(job: StandIns) -> None:
    assert job.run("train_tasks.sbatch", "config.yaml", "seed=1").returncode == 0
    ((*_, python, m, package, command, config, override),) = job.said()
    assert (python, m, package, command, config, override) == (
        "python3",
        "-m",
        "expert_parallel",
        "train",
        "config.yaml",
        "seed=1",
    )


@pytest.mark.parametrize("script", TRAIN)
def test_a_container_is_all_that_differs(job: StandIns, script: str) -> None:
    def srun(**variables: str) -> list[str]:
        done = job.run(script, "config.yaml", **variables)
        assert done.returncode == 0, done.stderr
        (words,) = job.said()
        return words

    plain, folder = srun(), str(job.folder)
    command = plain.index("bash")
    assert srun(CONTAINER="apptainer:/images/ours.sif", MOUNTS="/data") == [
        *plain[:command],
        *["apptainer", "exec", "--nv", "--bind", f"{ROOT},{folder},/data", "--pwd", folder, "/images/ours.sif"],
        *plain[command:],
    ]
    pyxis = srun(CONTAINER="pyxis:registry#ours:1.0", MOUNTS="/data")
    container = [word for word in pyxis if word.startswith("--container")]
    assert container == [
        "--container-image=registry#ours:1.0",
        f"--container-mounts={ROOT}:{ROOT},{folder}:{folder},/data:/data",
        f"--container-workdir={folder}",
    ]
    assert [word for word in pyxis if word not in container] == plain
    assert pyxis.index(container[-1]) < pyxis.index("bash")
    refused = job.run(script, "config.yaml", CONTAINER="ours.sif")
    assert refused.returncode == 1
    assert "CONTAINER is 'ours.sif', it must be apptainer:IMAGE or pyxis:IMAGE" in refused.stderr


def test_a_job_whose_node_is_lost_waits_for_slurm(job: StandIns) -> None:
    """Slurm takes 300 s to give up a node. A job that had ended by itself before would not be put back."""
    job.program("srun", code=9)
    done = job.run("train.sbatch", "config.yaml")
    assert done.returncode == 9, "it is the ranks' code if Slurm does not take the job back"
    ranks, probe, patience = job.said()
    assert ranks[0] == "srun"
    assert probe == ["srun", "--overlap", "--nodes=2", "--ntasks-per-node=1", "true"]
    assert patience == ["sleep", "360"]
    assert "a node does not answer" in done.stdout


def test_a_job_does_not_start_for_ever(job: StandIns) -> None:
    assert job.run("train.sbatch", "config.yaml", SLURM_RESTART_COUNT="20").returncode == 0
    assert len(job.said()) == 1
    done = job.run("train.sbatch", "config.yaml", SLURM_RESTART_COUNT="21")
    assert done.returncode == 1
    assert "job 7 was started again 21 times, MAX_RESTARTS is 20" in done.stderr
    assert job.said() == []


def test_the_list_of_a_sweep(job: StandIns) -> None:
    (job.folder / "list").write_text("seed=1\nseed=2 'data={kind: files, paths: [$HOME]}'\n\n")
    array = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2"}
    done = job.run("sweep.sbatch", "config.yaml", "list", "training.steps=5", **array)
    assert done.returncode == 0, done.stderr
    (words,) = job.said()
    first = words.index("config.yaml")
    assert words[first : words.index("--")] == [
        *["config.yaml", "--nproc", "1", "seed=2", "data={kind: files, paths: [$HOME]}", "training.steps=5"],
        "run.folder=runs/sweep-6/2",
    ]
    assert "list has no line 3, or it is empty" in job.run(
        "sweep.sbatch", "config.yaml", "list", **array | {"SLURM_ARRAY_TASK_ID": "3"}
    ).stderr  # fmt: skip
    assert "this job is no array: give sbatch --array=1-3%4" in job.run("sweep.sbatch", "config.yaml", "list").stderr
    assert job.said() == []


# --- on a real Slurm ---


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(4, tmp_path_factory.mktemp("slurm")) as four:
        yield four


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses on one node, under torchrun."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = start("torchrun", "train", small_config(folder), f"training.steps={STEPS}", *RUN)
    assert result.returncode == 0, result.output
    return losses(folder / "run")


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def submit(cluster: Slurm, script: str, folder: Path, nodes: int, *overrides: str, **variables: str) -> str:
    """A job with one rank a node."""
    options = ["--nodes", str(nodes), "--ntasks-per-node", "1"]
    return cluster.submit(SCRIPTS / script, small_config(folder), *RUN, *overrides, options=options, **variables)


def await_step(cluster: Slurm, run: Path, step: int) -> None:
    path = run / "metrics.jsonl"
    cluster.until(lambda: path.exists() and len(path.read_text().splitlines()) > step, f"step {step}")


@pytest.mark.system
@pytest.mark.parametrize("script", TRAIN)
def test_four_nodes(cluster: Slurm, undisturbed: list[float], tmp_path: Path, script: str) -> None:
    cluster.wait(submit(cluster, script, tmp_path, 4, "training.steps=10"), "COMPLETED")
    assert losses(tmp_path / "run") == pytest.approx(undisturbed[:10], rel=1e-12, abs=0)


@pytest.mark.system
@pytest.mark.parametrize("script", TRAIN)
def test_a_job_stopped_in_time_goes_on(cluster: Slurm, undisturbed: list[float], tmp_path: Path, script: str) -> None:
    """On two nodes. The signal is the one that Slurm sends before the time limit."""
    job = submit(cluster, script, tmp_path, 2, f"training.steps={STEPS}")
    await_step(cluster, tmp_path / "run", 1)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    record, log = cluster.wait(job, "COMPLETED"), cluster.log(job)
    assert record["Restarts"] == "1"
    for words in (
        "stopped on SIGUSR1 after step",
        f"job {job}: stopped in time",
        "start 2 of at most 21",
        "resumed from",
    ):
        assert log.count(words) == 1, log
    assert losses(tmp_path / "run") == pytest.approx(undisturbed, rel=1e-12, abs=0)


@pytest.mark.system
def test_a_job_goes_on_without_the_node_that_it_lost(cluster: Slurm, undisturbed: list[float], tmp_path: Path) -> None:
    job = submit(cluster, "train.sbatch", tmp_path, 2, f"training.steps={STEPS}")
    await_step(cluster, tmp_path / "run", 13)
    _, second = cluster.run("scontrol", "show", "hostnames", cluster.record(job)["NodeList"]).split()
    cluster.kill(int(second[1:]))
    try:
        record, log = cluster.wait(job, "COMPLETED"), cluster.log(job)
    finally:
        cluster.boot(int(second[1:]))
        cluster.until(lambda: set(cluster.node_states()) == {"idle"}, "idle nodes")
    assert record["Restarts"] == "1"
    assert second not in cluster.run("scontrol", "show", "hostnames", record["NodeList"]).split()
    assert f"Node failure on {second}" in log
    assert log.count("resumed from") == 1
    assert losses(tmp_path / "run") == pytest.approx(undisturbed, rel=1e-12, abs=0)


@pytest.mark.system
def test_a_sweep(cluster: Slurm, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("seed=11\nseed=12 training.clip_norm=0.5\nseed=13\n")
    more = ["parallel.ep=1", "training.steps=1"]
    options = ["--nodes=1", "--array=1-3%2"]
    script, runs = SCRIPTS / "sweep.sbatch", tmp_path / "runs"
    job = cluster.submit(script, small_config(tmp_path), tmp_path / "list", *more, options=options, FOLDER=str(runs))
    for number in (1, 2, 3):
        cluster.wait(f"{job}_{number}", "COMPLETED")
        assert f"seed: 1{number}\n" in (runs / str(number) / "config.yaml").read_text()
        assert len(losses(runs / str(number))) == 1
    assert "clip_norm: 0.5\n" in (runs / "2" / "config.yaml").read_text()


@pytest.mark.system
def test_a_job_that_fails_stays_ended(cluster: Slurm, tmp_path: Path) -> None:
    job = submit(cluster, "train_tasks.sbatch", tmp_path, 2, "training.steps=-1")
    record = cluster.wait(job, "FAILED")
    assert (record["Restarts"], record["ExitCode"]) == ("0", "2:0")
    assert "training.steps" in cluster.log(job)


@pytest.mark.system
@pytest.mark.parametrize(
    ("script", "arguments", "options"),
    [
        ("train.sbatch", ["config.yaml"], []),
        ("train_tasks.sbatch", ["config.yaml"], ["--ntasks-per-node=8"]),
        ("sweep.sbatch", ["config.yaml", "list"], ["--array=1-8%4"]),
    ],
)
def test_slurm_takes_jobs_of_8_gpus_a_node(
    cluster: Slurm, script: str, arguments: list[str], options: list[str]
) -> None:
    def ask(gpus: int) -> str:
        more = ["--nodes=4", f"--gpus-per-node={gpus}", "--cpus-per-task=8", "--time=1:00:00", *options]
        return cluster.run("sbatch", "--test-only", *more, SCRIPTS / script, *arguments, may_fail=True)

    assert "to start at" in ask(8)
    assert "Requested node configuration is not available" in ask(9)
