"""The commands `expert-parallel checkpoint inspect | verify | diff`."""

import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer

from expert_parallel.cli.options import refusals

checkpoint = typer.Typer(no_args_is_help=True, help="Look into checkpoints, check them, compare them.")

AnyPath = Annotated[
    Path, typer.Argument(metavar="PATH", help="a checkpoint, `latest`, a folder of checkpoints or a run (the newest)")
]
MOST_LINES = 40


@checkpoint.command()
def inspect(path: AnyPath) -> None:
    """What a checkpoint holds, and which layout wrote it. Reads the manifest alone."""
    from expert_parallel.checkpoint.files import open_checkpoint
    from expert_parallel.checkpoint.report import describe

    with refusals(ValueError, OSError):
        print(describe(open_checkpoint(path)))


@checkpoint.command()
def verify(path: AnyPath) -> None:
    """Read all of a checkpoint and check it: SHA-256 of files, names and shapes against the config, each tensor there
    once, digests computed anew. Exit code 1, and what is wrong by name, where it is not what was saved."""
    from expert_parallel.checkpoint.files import Checkpoint
    from expert_parallel.checkpoint.folders import find_checkpoint
    from expert_parallel.checkpoint.manifest import read_manifest
    from expert_parallel.checkpoint.report import problems

    with refusals(ValueError, OSError):
        found = find_checkpoint(path)
    try:
        opened = Checkpoint(found, read_manifest(found))
        wrong = list(problems(opened))
    except ValueError as error:
        wrong = [str(error)]
    if wrong:
        _print_some(wrong, sys.stderr)
        raise typer.Exit(1)
    count, files = len(opened.tensors), opened.manifest.files
    size = sum(record.bytes for record in files.values())
    print(f"{found}: whole, {count} tensors, {len(files)} files, {size:,} bytes: every digest is that of the manifest")


@checkpoint.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="a checkpoint, or where to find one")],
    second: Annotated[Path, typer.Argument(metavar="B", help="another")],
) -> None:
    """Which tensors of two checkpoints differ, and by how much at most, whatever layouts wrote them. Exit code 1 where
    one does. Compares the digests in the manifests, and reads only tensors whose digests differ."""
    from expert_parallel.checkpoint.files import open_checkpoint
    from expert_parallel.checkpoint.report import differences, headline

    with refusals(ValueError, OSError):
        one, other = open_checkpoint(first), open_checkpoint(second)
        print(headline(one, other))
        found = [f"{difference.name}: {difference.what}" for difference in differences(one, other)]
    if not found:
        equal = f"all {len(one.tensors)} are equal, by the digests in their manifests"
        print(f"tensors: {equal} (`checkpoint verify` reads the files)")
        return
    print(f"tensors: {len(found)} of {len(one.tensors | other.tensors)} differ")
    _print_some(found, sys.stdout)
    raise typer.Exit(1)


def _print_some(lines: list[str], stream: TextIO) -> None:
    for line in lines[:MOST_LINES]:
        print(f"  {line}", file=stream)
    if len(lines) > MOST_LINES:
        print(f"  and {len(lines) - MOST_LINES} more", file=stream)
