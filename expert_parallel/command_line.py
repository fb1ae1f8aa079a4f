"""What the commands of all rooms share: their arguments, and how they refuse."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from expert_parallel.config import load_config
from expert_parallel.runtime import LaunchError, LostContact, RuntimeConfig, UserError

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, for example configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted.key=value, over the file")
]


@contextmanager
def refusals(*also: type[Exception]) -> Iterator[None]:
    """What a user caused is one sentence on stderr and exit code 2. also: errors that only a user can cause here; any
    other is a defect of ours, and keeps its traceback."""
    said_here: tuple[type[Exception], ...] = (LaunchError, *also)
    try:
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
