"""`expert-parallel checkpoint experts add | remove | merge`. torch is imported inside, so that `--help` is quick."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expert_parallel.cli.options import refusals

if TYPE_CHECKING:
    from expert_parallel.interop.surgery import Surgery

experts = typer.Typer(no_args_is_help=True, help="A checkpoint with more, fewer or merged experts in all MoE blocks.")

Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="a run (its newest checkpoint) or a checkpoint")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="the run folder to make")]
ShardGB = Annotated[float, typer.Option("--shard-gb", min=0.001, help="size of a file; no more than one is in memory")]
Check = Annotated[bool, typer.Option(help="say the loss before and after: needs memory for both models")]


@experts.command("add")
def add_command(
    source: Source,
    out: Out,
    like: Annotated[str, typer.Option(help="the experts to copy, as 3,5: a new one of each, after the old ones")],
    noise: Annotated[float, typer.Option(min=0, help="added to the copies, in standard deviations")] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="of the noise")] = 0,
    shard_gb: ShardGB = 2.0,
    check: Check = True,
) -> None:
    """Add experts: copies of old ones, a little apart. `training.trainable` can train them alone."""
    from expert_parallel.interop.surgery import add

    with refusals(ValueError, OSError):
        _operate(source, out, add(_count(source), _numbers(like, "--like"), noise, seed), shard_gb, check)


@experts.command("remove")
def remove_command(
    source: Source,
    out: Out,
    which: Annotated[str, typer.Option("--experts", help="the experts to leave out, as 3,5")],
    shard_gb: ShardGB = 2.0,
    check: Check = True,
) -> None:
    """Leave experts out; the others keep their order and get new numbers."""
    from expert_parallel.interop.surgery import remove

    with refusals(ValueError, OSError):
        _operate(source, out, remove(_count(source), _numbers(which, "--experts")), shard_gb, check)


@experts.command("merge")
def merge_command(
    source: Source,
    out: Out,
    which: Annotated[list[str], typer.Option("--experts", help="experts that become one, as 3,5; several times")],
    shard_gb: ShardGB = 2.0,
    check: Check = True,
) -> None:
    """Make one expert of several: the mean of their weights and of their rows in the router."""
    from expert_parallel.interop.surgery import merge

    with refusals(ValueError, OSError):
        groups = [_numbers(group, "--experts") for group in which]
        _operate(source, out, merge(_count(source), groups), shard_gb, check)


def _count(source: Path) -> int:
    from expert_parallel.checkpoint.files import open_checkpoint
    from expert_parallel.interop.surgery import num_experts_of

    return num_experts_of(open_checkpoint(source))


def _operate(source: Path, out: Path, surgery: "Surgery", shard_gb: float, check: bool) -> None:
    from expert_parallel.interop.surgery import operate
    from expert_parallel.interop.upcycle import compare

    print(f"wrote {operate(source, out, surgery, int(shard_gb * 1024**3))}: {len(surgery.parents)} experts")
    sys.stdout.flush()
    if check:
        print(compare(source, out))


def _numbers(text: str, option: str) -> list[int]:
    if not all(part.strip().isascii() and part.strip().isdigit() for part in text.split(",")):
        raise ValueError(f"{option} is {text!r}, it must be numbers of experts, as 3,5")
    return [int(part) for part in text.split(",")]
