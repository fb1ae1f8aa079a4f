"""The package's public face: what `from expert_parallel import ...` gives, and what it does not load before."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import expert_parallel
from expert_parallel import _MODULES, __version__
from tests.launches import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_type_checkers_read_what_the_table_says() -> None:
    tree = ast.parse(Path(expert_parallel.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    assert all(alias.asname == alias.name for node in imports for alias in node.names), "`as` says that it is public"
    found = {alias.name: node.module for node in imports for alias in node.names}
    assert found == _MODULES


def test_every_name_is_there_and_listed() -> None:
    for name in expert_parallel.__all__:
        assert getattr(expert_parallel, name) is not None
    assert set(expert_parallel.__all__) == {"__version__", *_MODULES} == set(dir(expert_parallel))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'expert_parallel' has no attribute 'MoELayers'"):
        expert_parallel.MoELayers  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'MoELayers' from 'expert_parallel'"):
        exec("from expert_parallel import MoELayers")


def test_the_import_loads_nothing_but_itself() -> None:
    listed = "import expert_parallel, json, sys; dir(expert_parallel); print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run("-c", listed).stdout)
    assert [name for name in loaded if name.startswith("expert_parallel")] == ["expert_parallel"]
    assert "torch" not in loaded


def test_the_version_is_printed_without_torch() -> None:
    done = run("-X", "importtime", "-m", "expert_parallel", "--version")
    assert (done.returncode, done.stdout) == (0, f"expert-parallel {__version__}\n")
    assert "import time:" in done.stderr
    assert "torch" not in done.stderr
    after_an_option = run("-m", "expert_parallel", "--local_rank=0", "--version")
    assert (after_an_option.returncode, after_an_option.stdout, after_an_option.stderr) == (0, done.stdout, "")
