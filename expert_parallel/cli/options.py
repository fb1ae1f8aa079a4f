"""What the commands of all rooms share: their arguments, how they refuse, and where log records go."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from expert_parallel.runtime.process import LaunchError, LostContact, RankFilter, RuntimeConfig, UserError
from expert_parallel.training.config import load_config

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, for example configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted.key=value, over the file")
]
Level = Literal["debug", "info", "warning", "error"]
LogLevel = Annotated[Level, typer.Option(help="the least severe messages to show on stderr, on every rank")]


@contextmanager
def refusals(*also: type[Exception], log_level: Level = "warning") -> Iterator[None]:
    """What a user caused is one sentence on stderr and exit code 2. also: errors that only a user can cause here; any
    other is a defect of ours, and keeps its traceback. log_level: of the package's messages, which go there, too."""
    said_here: tuple[type[Exception], ...] = (LaunchError, *also)
    try:
        with log_to_stderr(log_level):
            yield
    except UserError:  # rank 0 has said it
        raise typer.Exit(2) from None
    except LostContact:  # one of the ranks that are left has said it
        raise typer.Exit(1) from None
    except said_here as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def early_config(path: Path, overrides: list[str]) -> tuple[RuntimeConfig, dict[str, Any]]:
    """What `distributed` takes: the config's runtime block, and its settings, but for where data lies, which nodes may
    have in places of their own (what it holds is compared later). The defaults where the config is not
    readable: then the ranks meet, agree on the error and leave together, instead of some being killed before rank 0
    has spoken."""
    try:
        config = load_config(path, overrides)
    except ValueError:
        return RuntimeConfig(), {}
    settings = config.model_dump(mode="json")
    for name in ("paths", "corpora"):
        settings["data"].pop(name, None)
    return config.runtime, settings


class TerminalFormatter(logging.Formatter):
    """Writes `[rank 3] WARNING expert_parallel.runtime.process: ...`, and an error as every command does: `error:
    ...`."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).rstrip("\n")  # Python's warnings end with a line break of their own
        if record.levelno >= logging.ERROR:
            return f"error: {text}"
        rank = getattr(record, "rank", None)
        return f"{'' if rank is None else f'[rank {rank}] '}{record.levelname} {record.name}: {text}"


@contextmanager
def log_to_stderr(level: Level) -> Iterator[None]:
    """Writes the package's log records from `level` on, and Python's warnings, to stderr."""
    handler = logging.StreamHandler()
    handler.setLevel(level.upper())
    handler.addFilter(RankFilter())
    handler.setFormatter(TerminalFormatter())
    package, warnings = logging.getLogger("expert_parallel"), logging.getLogger("py.warnings")
    level_before = package.level
    package.setLevel(level.upper())
    package.addHandler(handler)
    warnings.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        warnings.removeHandler(handler)
        package.removeHandler(handler)
        package.setLevel(level_before)
