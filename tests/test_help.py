"""The help of every command: it ends with an example, which is parsed here as far as that starts nothing."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from expert_parallel.cli.app import ORDER, app
from expert_parallel.study.definition import read_study
from expert_parallel.training.config import load_config
from expert_parallel.training.setup import check_degrees
from expert_parallel.verify.layouts import Layout, check_layout
from tests.launches import ROOT

LAUNCHER = ["mpirun", "-n", "2"]


def walk(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, *path, name)


EVERY = dict(walk(get_command(app)))


def parsed(words: list[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The path of the command that these words call, and its parameters. A wrong word is an error."""
    path: tuple[str, ...] = ()
    while hasattr(EVERY[path], "commands"):
        path = (*path, words[len(path)])
    return path, EVERY[path].make_context(path[-1], words[len(path) :]).params


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_every_help_has_an_example_that_works(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    printed = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"}).stdout
    (line,) = re.findall(r"^ *Example: (.*?) *$", printed, re.MULTILINE)
    assert f"`{line}`" in EVERY[path].help, "whole, on a terminal of 80 columns, so that it can be copied"
    words = shlex.split(line)
    words = words[len(LAUNCHER) :] if words[: len(LAUNCHER)] == LAUNCHER else words
    assert words[0] == "expert-parallel"
    called, values = parsed(words[1:])
    assert called[: len(path)] == path
    monkeypatch.chdir(ROOT)
    if called == ("study",):
        read_study(values["config"], values["overrides"] or [], None)
    elif "config" in values:
        config = load_config(values["config"], values["overrides"] or [])
        if called != ("verify",):
            check_degrees(config, values.get("world_size") or 1)
        for layout in values.get("layout") or []:
            check_layout(config, Layout.parse(layout), 4)  # ranks, as many as `verify` starts


def test_the_commands_are_listed_in_the_order_of_need() -> None:
    printed = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).stdout
    assert re.findall(r"^│ ([a-z]+) ", printed, re.MULTILINE) == ORDER
    assert {path[0] for path in EVERY if path} == set(ORDER)
