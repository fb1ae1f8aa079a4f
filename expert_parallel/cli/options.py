"""Defines what all commands share: common arguments, exit codes of errors, and logging to stderr."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from expert_parallel.runtime.error_file import write_error_file
from expert_parallel.runtime.process import (
    LaunchError,
    LostContact,
    OutOfMemory,
    PermanentError,
    RankFilter,
    RuntimeConfig,
    UserError,
)
from expert_parallel.training.config import load_config

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="settings that override the file, such as training.steps=100"),
]
Level = Literal["debug", "info", "warning", "error"]
ShardGB = Annotated[
    float,
    typer.Option("--shard-gb", min=0.001, max=1e6, help="largest size of a file in GiB; at most one is in memory"),
]
LogLevel = Annotated[Level, typer.Option(help="lowest level of the log messages on stderr, on every rank")]


@contextmanager
def exit_on_user_error(*also: type[Exception], log_level: Level = "warning") -> Iterator[None]:
    """Turns errors that users cause into one sentence on stderr and exit code 2.

    also: further exceptions that only users can cause here; others are bugs and keep their traceback. log_level: the
    package's log messages also go to stderr, from this level on.
    """
    reported_here: tuple[type[Exception], ...] = (LaunchError, *also)
    try:
        with log_to_stderr(log_level):
            yield
    except UserError as error:  # rank 0 has printed it
        write_error_file(str(error), is_permanent=isinstance(error, PermanentError))
        raise typer.Exit(2) from None
    except (LostContact, OutOfMemory) as error:  # one of the ranks has printed it
        write_error_file(str(error), is_permanent=False)
        raise typer.Exit(1) from None
    except reported_here as error:
        print(f"error: {error}", file=sys.stderr)
        write_error_file(str(error), is_permanent=False)
        raise typer.Exit(2) from None


def early_config(path: Path, overrides: list[str]) -> tuple[RuntimeConfig, dict[str, Any]]:
    """Returns the arguments of `distributed`: the config's runtime block, and its settings for comparison of ranks.

    Paths of data are left out, as they may differ between nodes (the content is compared later). If the config cannot
    be read, returns defaults: then the ranks connect, agree on the error and exit together, instead of some being
    killed before rank 0 has printed it.
    """
    try:
        config = load_config(path, overrides)
    except ValueError:
        return RuntimeConfig(), {}
    settings = config.model_dump(mode="json")
    for name in ("paths", "corpora"):
        settings["data"].pop(name, None)
    return config.runtime, settings


class TerminalFormatter(logging.Formatter):
    """Formats records as `[rank 3] WARNING expert_parallel.runtime.process: ...`, errors as `error: ...`."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).rstrip("\n")  # Python's warnings end with a line break of their own
        if record.levelno >= logging.ERROR:
            return f"error: {text}"
        rank = getattr(record, "rank", None)
        return f"{'' if rank is None else f'[rank {rank}] '}{record.levelname} {record.name}: {text}"


@contextmanager
def log_to_stderr(level: Level) -> Iterator[None]:
    """Writes the package's log records from `level` on, and Python's warnings, to stderr.

    On leaving, all logging settings are as before.
    """
    handler = logging.StreamHandler()
    handler.setLevel(level.upper())
    handler.addFilter(RankFilter())
    handler.setFormatter(TerminalFormatter())
    package, python_warnings = logging.getLogger("expert_parallel"), logging.getLogger("py.warnings")
    level_before = package.level
    package.setLevel(level.upper())
    package.addHandler(handler)
    python_warnings.addHandler(handler)
    shown_by = warnings.showwarning
    logging.captureWarnings(True)
    were_captured = warnings.showwarning is shown_by  # by the caller, before: then they stay captured
    try:
        yield
    finally:
        if not were_captured:
            logging.captureWarnings(False)
        python_warnings.removeHandler(handler)
        package.removeHandler(handler)
        package.setLevel(level_before)
