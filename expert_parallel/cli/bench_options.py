"""Defines the options of `expert-parallel bench ...`, and runs benchmarks on their own ranks or on a launcher's."""

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from expert_parallel.cli.options import exit_on_user_error
from expert_parallel.runtime.process import Runtime, RuntimeConfig, distributed
from expert_parallel.verify.ranks import RankError, RankFn, spawn_ranks

Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME=VALUE", help="sizes that override the shape's, such as tokens=1024"),
]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="dtype of weights and tokens")]
Rounds = Annotated[int, typer.Option(min=1, help="measurements of each; medians are reported")]
Ranks = Annotated[int | None, typer.Option(min=1, help="ranks to start on this machine's CPU, without a launcher")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU if there is one")]
Transport = Annotated[
    Literal["auto", "gloo", "mpi", "nccl"],
    typer.Option(help="backend of the collectives; mpi needs mpirun, nccl needs GPUs"),
]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads per rank")]
Peers = Annotated[str | None, typer.Option(help="comma-separated other implementations; default: all installed")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="also write the results to this JSON file")]


def run_bench(
    fn: RankFn, make_task: Callable[[int], Any], ranks: int | None, config: RuntimeConfig, json_file: Path | None
) -> Any | None:
    """Runs a benchmark and returns its results on rank 0, None on the others; also writes them to json_file."""
    try:
        with exit_on_user_error(OSError), distributed(config) as runtime:
            task = runtime.run_on_all_ranks(lambda: _check(make_task, runtime, ranks, config, json_file))
            if runtime.world_size == 1 and (ranks or 1) > 1:
                result = spawn_ranks(ranks or 1, fn, task, _print_progress, timedelta(seconds=config.timeout_seconds))
            else:
                result = fn(task, runtime, _print_progress if runtime.rank == 0 else lambda text: None)
            is_first = runtime.rank == 0
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if "disagreement" in result:
        if is_first:
            print(f"error: {result['disagreement']}", file=sys.stderr)
        raise typer.Exit(1)
    if is_first and json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    return result if is_first else None


def _check(
    make_task: Callable[[int], Any], runtime: Runtime, ranks: int | None, config: RuntimeConfig, json_file: Path | None
) -> Any:
    """Returns the task. Raises ValueError if ranks, transport or json_file are not possible."""
    if runtime.launch.launcher != "none" and ranks not in (None, runtime.world_size):
        raise ValueError(f"--ranks is {ranks} but the launcher has started {runtime.world_size}: leave it out")
    if runtime.launch.launcher == "none" and (ranks or 1) > 1:
        if runtime.device.type == "cuda" and config.device == "cuda":
            raise ValueError(f"--ranks {ranks} starts ranks on the CPU: for GPUs start them with torchrun")
        if config.backend in ("mpi", "nccl"):
            raise ValueError(f"--transport {config.backend}: ranks started by --ranks use gloo; use a launcher instead")
    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json: there is no folder {json_file.parent}")
    if json_file is not None and json_file.is_dir():
        raise ValueError(f"--json: {json_file} is a folder")
    return make_task(max(ranks or 1, runtime.world_size))


def _print_progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
