"""The tutorial (expert_parallel/README.md) runs as it is printed, and prints what it says.

A block that begins with `# name.py` or `# name.yaml` is a file. A bash block is run line by line; one that begins with
`# on the cluster` is only parsed. The text block after it is the output, with `...` for what is left out.
"""

import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expert_parallel.cli.app import app
from tests.launches import ROOT

PAGE = (ROOT / "expert_parallel" / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
SETUP = "source .venv/bin/activate\n"
ROUNDING = re.compile(r"\d(\.\d+)?e-1\d")
NUMBER = re.compile(r"[\d,.]*\d")


def steps() -> list[tuple[str, str, str]]:
    """Returns (language, content, the text block behind it or nothing) of each block but the outputs."""
    blocks = BLOCK.findall(PAGE)
    following = [*blocks[1:], ("", "")]
    return [
        (language, content, after if kind == "text" else "")
        for (language, content), (kind, after) in zip(blocks, following, strict=True)
        if language != "text"
    ]


def run(command: str, folder: Path) -> str:
    """Returns what one line prints. The package's own command runs in this process, which has imported it already."""
    words = shlex.split(command)
    if words[0] == "expert-parallel":
        return CliRunner().invoke(app, words[1:], env={"COLUMNS": "200"}).output
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


def words_of(line: str) -> list[str]:
    """Rounding errors are all alike; a run's figures depend on the version of Python, whose library is its text."""
    line = ROUNDING.sub("0", line)
    if line.startswith(("data:", "step ")) or re.search(r"\(\d+ s\)$", line):
        line = NUMBER.sub("0", line)
    return line.split()


def is_same(printed: str, expected: str) -> bool:
    """True if the words are equal, numbers to two figures; a line that ends in `...` goes on."""
    found, wanted = words_of(printed), words_of(expected)
    if wanted and wanted[-1] == "...":
        wanted.pop()
        found = found[: len(wanted)]
    return len(found) == len(wanted) and all(map(is_same_word, found, wanted))


def is_same_word(found: str, wanted: str) -> bool:
    try:
        return math.isclose(float(found), float(wanted), rel_tol=0.02, abs_tol=1e-9)
    except ValueError:
        return found == wanted


def assert_prints(output: str, expected: str) -> None:
    """Each expected line stands in the output, in this order."""
    printed = iter(output.splitlines())
    for line in expected.splitlines():
        if line.strip() != "...":
            assert any(is_same(candidate, line) for candidate in printed), f"{line!r} is not in:\n{output}"


def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    num_run = 0
    for language, content, expected in steps():
        if content == SETUP or language == "toml":
            continue
        first, _, rest = content.partition("\n")
        if language in ("python", "yaml"):
            Path(first.removeprefix("# ")).write_text(rest)
        elif first == "# on the cluster":
            subprocess.run(["bash", "-n"], input=content, text=True, check=True)
        else:
            assert language == "bash"
            assert expected, f"no output is shown of: {content}"
            assert_prints("".join(run(command, tmp_path) for command in content.splitlines()), expected)
            num_run += 1
    assert num_run == 7


def test_the_router_is_short() -> None:
    (router,) = (content for language, content, _ in steps() if content.startswith("# my_router.py"))
    assert len([line for line in router.splitlines() if line.strip()]) <= 20


def test_a_wrong_output_is_found() -> None:
    assert_prints("a\nstep 1  loss 2.0\nx 0.101 3\n", "step 1  loss 7.1\nx 0.1009 3\n")
    with pytest.raises(AssertionError, match="is not in"):
        assert_prints("x 0.101 4\n", "x 0.101 3\n")
