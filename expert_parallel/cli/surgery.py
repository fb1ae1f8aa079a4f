"""Defines the commands `expert-parallel checkpoint experts add | remove | merge`.

The commands import torch inside their functions, so that `--help` is fast.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expert_parallel.cli.options import ShardGB, exit_on_user_error
from expert_parallel.settings import MAX_SEED

if TYPE_CHECKING:
    from expert_parallel.interop.surgery import Surgery

experts = typer.Typer(
    no_args_is_help=True,
    help="Add, remove or merge the experts of a checkpoint."
    "\n\nExample: `expert-parallel checkpoint experts add runs/a runs/b --like 3,5`",
)

Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="a run folder (its newest checkpoint) or a checkpoint")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="the run folder to create")]
Check = Annotated[bool, typer.Option(help="print the loss before and after; needs memory for both models")]


@experts.command("add")
def add_command(
    source: Source,
    out: Out,
    like: Annotated[str, typer.Option(help="experts to copy, such as 3,5; copies come after the existing ones")],
    noise: Annotated[
        float,
        typer.Option(min=0, max=1e6, help="Gaussian noise on the copies, in standard deviations"),
    ] = 0.01,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="seed of the noise")] = 0,
    shard_gb: ShardGB = 2.0,
    check: Check = True,
) -> None:
    """Add experts to all MoE blocks: copies of existing ones, with some noise.

    To train only the new experts, set training.trainable.

    Example: `expert-parallel checkpoint experts add runs/a runs/b --like 3,5`
    """
    from expert_parallel.interop.surgery import add

    with exit_on_user_error(ValueError, OSError):
        _run_surgery(
            source, out, add(_num_experts(source), _parse_expert_ids(like, "--like"), noise, seed), shard_gb, check
        )


@experts.command("remove")
def remove_command(
    source: Source,
    out: Out,
    which: Annotated[str, typer.Option("--experts", help="experts to remove, such as 3,5")],
    shard_gb: ShardGB = 2.0,
    check: Check = True,
) -> None:
    """Remove experts from all MoE blocks; the others keep their order and are renumbered.

    Example: `expert-parallel checkpoint experts remove runs/a runs/b --experts 2,7`
    """
    from expert_parallel.interop.surgery import remove

    with exit_on_user_error(ValueError, OSError):
        _run_surgery(source, out, remove(_num_experts(source), _parse_expert_ids(which, "--experts")), shard_gb, check)


@experts.command("merge")
def merge_command(
    source: Source,
    out: Out,
    which: Annotated[list[str], typer.Option("--experts", help="experts to merge into one, such as 3,5; repeatable")],
    shard_gb: ShardGB = 2.0,
    check: Check = True,
) -> None:
    """Merge experts of all MoE blocks: averages their weights and their rows of the router.

    Example: `expert-parallel checkpoint experts merge runs/a runs/b --experts 2,7`
    """
    from expert_parallel.interop.surgery import merge

    with exit_on_user_error(ValueError, OSError):
        groups = [_parse_expert_ids(group, "--experts") for group in which]
        _run_surgery(source, out, merge(_num_experts(source), groups), shard_gb, check)


def _num_experts(source: Path) -> int:
    """Returns the number of experts of a checkpoint."""
    from expert_parallel.checkpoint.files import open_checkpoint
    from expert_parallel.interop.surgery import num_experts_of

    return num_experts_of(open_checkpoint(source))


def _run_surgery(source: Path, out: Path, surgery: "Surgery", shard_gb: float, check: bool) -> None:
    """Writes the changed checkpoint and, with `check`, prints the loss before and after."""
    from expert_parallel.interop.surgery import perform_surgery
    from expert_parallel.interop.upcycle import compare

    print(f"wrote {perform_surgery(source, out, surgery, int(shard_gb * 1024**3))}: {len(surgery.parents)} experts")
    sys.stdout.flush()
    if check:
        print(compare(source, out))


def _parse_expert_ids(text: str, option: str) -> list[int]:
    """Parses expert numbers such as 3,5. Raises ValueError, which names the option."""
    if not all(part.strip().isascii() and part.strip().isdigit() for part in text.split(",")):
        raise ValueError(f"{option} is {text!r}, it must be a list of expert numbers, such as 3,5")
    return [int(part) for part in text.split(",")]
