"""The wheel: built from the source alone, and installed into an empty environment, it trains there."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from expert_parallel import __version__
from tests.launches import ROOT, environment, small_config

pytestmark = pytest.mark.system


def run(*command: str | Path, folder: Path) -> str:
    """What it prints. Without PYTHONPATH, and not from the repository: neither may be what makes it work."""
    variables = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy: setuptools leaves its build folder beside the source, and takes what an older one has left there."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("expert_parallel", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", ".", folder=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_what_the_wheel_holds(wheel: Path) -> None:
    """Every module, the types' mark and the READMEs; no tests, no caches."""
    assert wheel.name == f"expert_parallel-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"expert_parallel-{__version__}.dist-info/METADATA").decode()
    source = ROOT / "expert_parallel"
    expected = {
        path for pattern in ("*.py", "py.typed", "README.md", "MEASUREMENTS.md") for path in source.rglob(pattern)
    }
    own = {name for name in names if ".dist-info/" not in name}
    assert own == {str(path.relative_to(ROOT)) for path in expected}
    assert "License-Expression: Apache-2.0" in metadata
    assert "Classifier: Typing :: Typed" in metadata


def test_it_trains_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    run(sys.executable, "-m", "venv", tmp_path / "venv", folder=folder)
    commands = tmp_path / "venv" / "bin"
    constraints = ROOT / "launch" / "constraints.txt"
    run(commands / "python", "-m", "pip", "install", "--no-compile", "--constraint", constraints, wheel, folder=folder)

    assert run(commands / "expert-parallel", "--version", folder=folder) == f"expert-parallel {__version__}\n"
    place = run(commands / "python", "-c", "import expert_parallel; print(expert_parallel.__file__)", folder=folder)
    assert Path(place).is_relative_to(tmp_path / "venv")
    output = run(commands / "expert-parallel", "train", config, "parallel.ep=1", folder=folder)
    (last,) = (line for line in output.splitlines() if line.startswith("step 2/2  loss "))
    assert 5 < float(last.split()[3]) < 6, "about ln 256 after two steps"
    assert "done: 2 steps" in output
    assert list(folder.iterdir()) == []
    shutil.rmtree(tmp_path / "venv")  # a gigabyte, which pytest would keep
