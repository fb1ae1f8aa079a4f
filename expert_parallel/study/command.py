"""The command `expert-parallel study`."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from expert_parallel.command_line import Overrides, refusals
from expert_parallel.study.carry_out import carry_out
from expert_parallel.study.plan import Study, read_study
from expert_parallel.study.results import StudyResult, describe, gather
from expert_parallel.study.step_times import step_times

SECONDS_BETWEEN_LINES = 60  # where no terminal shows one that is renewed


def study(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, for example configs/study.yaml")],
    overrides: Overrides = None,
    only: Annotated[
        str | None, typer.Option(help="variants with commas between, beside the reference; default: all")
    ] = None,
) -> None:
    """Train a dense model and mixtures of experts with as many operations a token, and tell what each needs to reach
    the dense one's loss. Runs unattended; started again, it goes on where it was. Writes results.json, table.md and
    loss.png."""
    console = Console(highlight=False, soft_wrap=True)
    with refusals(ValueError, OSError, ImportError), interrupted_by_term():
        draw = find_plot()  # at once: a study of hours must not end for want of matplotlib
        loaded = read_study(config, overrides or [], None if only is None else [n.strip() for n in only.split(",")])
        console.print(outline(loaded))
        rates = train_all(loaded, console)
    console.print("timing a step of each variant, in turn")
    result = gather(loaded, rates, *step_times(loaded, rates))
    (loaded.folder / "results.json").write_text(result.model_dump_json(indent=1) + "\n")
    (loaded.folder / "table.md").write_text(describe(result) + "\n")
    draw(result, loaded.folder / "loss.png")
    print(f"\n{describe(result)}\n\nwritten: table.md, results.json and loss.png in {loaded.folder}")


def find_plot() -> Callable[[StudyResult, Path], None]:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the plot needs matplotlib: pip install 'expert-parallel[study]' ({error})") from None
    from expert_parallel.study.plot import plot

    return plot


def outline(study: Study) -> str:
    """What will be trained."""
    settings = study.settings
    long_runs = len(study.names) * len(settings.seeds)
    return (
        f"variants: {', '.join(study.names)}; reference: {settings.reference}\n"
        f"{len(study.names) * len(settings.learning_rates)} trials of {settings.trial_steps:,} steps, then {long_runs} "
        f"runs of {study.steps:,} steps (some go on from trials), {settings.jobs} at a time, in {study.folder}"
    )


def train_all(study: Study, console: Console) -> dict[str, float]:
    """With a text that is renewed on a terminal, or a line a minute elsewhere."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            return carry_out(study, live.console.print, lambda text: live.update(text, refresh=True))
    last = [-float("inf")]

    def show(text: str) -> None:
        if time.monotonic() - last[0] >= SECONDS_BETWEEN_LINES:
            print(text, flush=True)
            last[0] = time.monotonic()

    return carry_out(study, lambda text: print(text, flush=True), show)


@contextmanager
def interrupted_by_term() -> Iterator[None]:
    """SIGTERM is an interrupt: the runs save what they have."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
