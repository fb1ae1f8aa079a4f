"""Defines the command `expert-parallel study`."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from expert_parallel.checkpoint.folders import write_atomically
from expert_parallel.cli.options import LogLevel, Overrides, exit_on_user_error
from expert_parallel.study.definition import Study, read_study
from expert_parallel.study.folder import find_data_digest
from expert_parallel.study.results import StudyResult, collect_results, format_study
from expert_parallel.study.runner import best_rate, done_variants, run_study
from expert_parallel.study.step_times import step_times

SECONDS_BETWEEN_TEXTS, SECONDS_BETWEEN_LINES = 5, 60  # on a terminal, where the text is redrawn, and elsewhere


def study(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, such as configs/study.yaml")],
    overrides: Overrides = None,
    only: Annotated[
        str | None, typer.Option(help="comma-separated variants to train besides the reference; default: all")
    ] = None,
    log_level: LogLevel = "warning",
) -> None:
    """Compare a dense model with mixtures of experts that use as many FLOPs per token.

    Trains all of them and reports what each needs to reach the dense model's loss. If interrupted, the same command
    resumes it. Writes results.json, table.md and loss.png.

    Example: `expert-parallel study configs/study.yaml`
    """
    # markup: off, since the output of the runs contains brackets
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with exit_on_user_error(ValueError, OSError, ImportError, log_level=log_level), interrupt_on_signals():
        draw = find_plot()  # first, so that a long study does not fail at its end without matplotlib
        loaded = read_study(config, overrides or [], None if only is None else [n.strip() for n in only.split(",")])
        console.print(format_outline(loaded))
        train_all(loaded, console)
        everything = replace(loaded, names=done_variants(loaded))  # also those trained earlier, with another --only
        rates = {name: best_rate(everything, name) for name in everything.names}
        find_data_digest(everything)
        console.print("timing a step of each variant against the reference's")
        result = collect_results(everything, rates, *step_times(everything, rates))
        write_atomically(loaded.folder / "results.json", result.model_dump_json(indent=1) + "\n")
        write_atomically(loaded.folder / "table.md", format_study(result) + "\n")
        draw(result, loaded.folder / "loss.png")
    print(f"\n{format_study(result)}\n\nwritten: table.md, results.json and loss.png in {loaded.folder}")


def find_plot() -> Callable[[StudyResult, Path], None]:
    """Returns the function that draws the plot. Raises ImportError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the plot needs matplotlib: pip install 'expert-parallel[study]' ({error})") from None
    from expert_parallel.study.plot import plot

    return plot


def format_outline(study: Study) -> str:
    """Formats what will be trained."""
    settings = study.settings
    long_runs = len(study.names) * len(settings.seeds)
    return (
        f"variants: {', '.join(study.names)}; reference: {settings.reference}\n"
        f"{len(study.names) * len(settings.learning_rates)} trials of {settings.trial_steps:,} steps, then {long_runs} "
        f"runs of {study.steps:,} steps (some continue trials), {settings.jobs} at a time, in {study.folder}"
    )


def train_all(study: Study, console: Console) -> None:
    """Runs the study, with a text that is redrawn on a terminal, or a line every minute elsewhere."""
    every = SECONDS_BETWEEN_TEXTS if console.is_terminal else SECONDS_BETWEEN_LINES
    last = [-float("inf")]
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:

        def show(text: Callable[[], str]) -> None:
            if time.monotonic() - last[0] < every:
                return
            last[0] = time.monotonic()
            if live is not None:
                live.update(Text(text()), refresh=True)
            else:
                print(text(), flush=True)

        run_study(study, console.print if live is not None else lambda text: print(text, flush=True), show)


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into KeyboardInterrupt, on which the runs save a checkpoint."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}  # nohup ignores SIGHUP: keep that
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
