"""Defines the commands `expert-parallel checkpoint inspect | verify | diff`."""

import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer

from expert_parallel.cli.options import exit_on_user_error

checkpoint = typer.Typer(
    no_args_is_help=True,
    help="Inspect, verify, compare and modify checkpoints.\n\nExample: `expert-parallel checkpoint inspect runs/uomni`",
)

AnyPath = Annotated[
    Path, typer.Argument(metavar="PATH", help="a checkpoint, or a folder of checkpoints or run folder (its newest one)")
]
MAX_LINES = 40


@checkpoint.command()
def inspect(path: AnyPath) -> None:
    """Show what a checkpoint holds, and which layout wrote it.

    Reads only the manifest.

    Example: `expert-parallel checkpoint inspect runs/uomni`
    """
    from expert_parallel.checkpoint.files import open_checkpoint
    from expert_parallel.checkpoint.report import format_checkpoint

    with exit_on_user_error(ValueError, OSError):
        print(format_checkpoint(open_checkpoint(path)))


@checkpoint.command()
def verify(path: AnyPath) -> None:
    """Verify that a checkpoint is complete and undamaged.

    Checks the SHA-256 of all files, checks that every tensor of the config's model occurs once and has the right
    shape, and recomputes all digests. Exit code 1 and a list of problems if it is damaged, 2 if it has a format that
    this version does not read.

    Example: `expert-parallel checkpoint verify runs/uomni`
    """
    from expert_parallel.checkpoint.files import Checkpoint
    from expert_parallel.checkpoint.folders import find_checkpoint
    from expert_parallel.checkpoint.manifest import UnsupportedFormatError, read_manifest
    from expert_parallel.checkpoint.report import find_problems

    with exit_on_user_error(ValueError, OSError):
        found = find_checkpoint(path)
    with exit_on_user_error(UnsupportedFormatError):
        try:
            opened = Checkpoint(found, read_manifest(found))
            wrong = list(find_problems(opened))
        except UnsupportedFormatError:
            raise
        except ValueError as error:
            wrong = [str(error)]
    if wrong:
        _print_first(wrong, sys.stderr)
        raise typer.Exit(1)
    count, files = len(opened.tensors), opened.manifest.files
    size = sum(record.bytes for record in files.values())
    print(f"{found}: whole, {count} tensors, {len(files)} files, {size:,} bytes: all digests match the manifest")


@checkpoint.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="a checkpoint, or a folder of checkpoints or run folder")],
    second: Annotated[Path, typer.Argument(metavar="B", help="another one")],
) -> None:
    """List the tensors that differ between two checkpoints, whatever layouts wrote them.

    Shows the largest absolute difference of each. Compares the digests in the manifests, and reads only tensors whose
    digests differ. Exit code 1 if any tensor differs.

    Example: `expert-parallel checkpoint diff runs/a runs/b`
    """
    from expert_parallel.checkpoint.files import open_checkpoint
    from expert_parallel.checkpoint.report import compare_checkpoints, format_header

    with exit_on_user_error(ValueError, OSError):
        one, other = open_checkpoint(first), open_checkpoint(second)
        print(format_header(one, other))
        found = [f"{difference.name}: {difference.what}" for difference in compare_checkpoints(one, other)]
    if not found:
        equal = f"all {len(one.tensors)} are equal according to the digests in the manifests"
        print(f"tensors: {equal} (`checkpoint verify` reads the files)")
        return
    print(f"tensors: {len(found)} of {len(one.tensors | other.tensors)} differ")
    _print_first(found, sys.stdout)
    raise typer.Exit(1)


def _print_first(lines: list[str], stream: TextIO) -> None:
    """Prints the first MAX_LINES lines, and how many more there are."""
    for line in lines[:MAX_LINES]:
        print(f"  {line}", file=stream)
    if len(lines) > MAX_LINES:
        print(f"  and {len(lines) - MAX_LINES} more", file=stream)
