"""Defines the command line `expert-parallel`, with its commands train, check, generate, experts and verify."""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from expert_parallel import __version__
from expert_parallel.cli.bench import bench
from expert_parallel.cli.checkpoint import checkpoint
from expert_parallel.cli.convert import convert
from expert_parallel.cli.data import data
from expert_parallel.cli.options import ConfigFile, LogLevel, Overrides, early_config, exit_on_user_error
from expert_parallel.cli.settings import settings
from expert_parallel.cli.study import study
from expert_parallel.cli.surgery import experts
from expert_parallel.config import load_tree
from expert_parallel.runtime.output import exit_if_unreadable, print_line
from expert_parallel.runtime.process import UserError, distributed
from expert_parallel.settings import MAX_SEED
from expert_parallel.training.config import Config, config_file, load_config, renamed_folder

# The order of `--help` is that in which people need the commands.
ORDER = [
    *("train", "generate"),  # a first run and its text
    *("check", "verify", "settings"),  # what is asked before a longer one
    *("data", "convert", "checkpoint"),  # own data, and models in other forms
    *("experts", "study", "bench"),  # what runs have learned, compared and measured
]


class Commands(TyperGroup):
    """Runs a command; one whose output nobody can read any more ends without a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        with exit_if_unreadable():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # reflows the paragraphs of docstrings to the width of the terminal
)
app.add_typer(bench, name="bench")
app.add_typer(checkpoint, name="checkpoint")
checkpoint.add_typer(experts, name="experts")
app.add_typer(convert, name="convert")
app.add_typer(data, name="data")
app.command("settings")(settings)
app.command("study")(study)


def print_version(wanted: bool) -> None:
    """Prints the version and exits, if asked to."""
    if wanted:
        print(f"expert-parallel {__version__}")
        raise typer.Exit


@app.callback()
def expert_parallel(
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train mixture-of-experts models, with experts sharded over ranks.

    Example: `expert-parallel train configs/uomni.yaml`
    """
    # The deepspeed launcher puts --local_rank before the command; we read the same number from LOCAL_RANK.


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, log_level: LogLevel = "warning") -> None:
    """Train a model, or resume from the newest checkpoint in run.folder.

    CONFIG may also be the folder of a run, which then continues in this folder. Runs on this process alone, or on every
    rank of a launcher. Exit code 75 if SIGUSR1 stopped it (0 under torchrun).

    Example: `expert-parallel train configs/uomni.yaml training.steps=100`
    """
    from expert_parallel.interop.start import START_KINDS
    from expert_parallel.training.loop import train as run
    from expert_parallel.training.resume import EXIT_CODE, stop_on_signal

    with (
        stop_on_signal() as stop,
        exit_on_user_error(log_level=log_level),
        distributed(*early_config(config, overrides or [])) as runtime,
    ):
        loaded = runtime.run_on_all_ranks(lambda: load_config(config, overrides or []))
        if runtime.rank == 0:
            print_run_folder(config, overrides or [])
        is_done = run(loaded, runtime, stop, START_KINDS)
    if not is_done and runtime.launch.launcher != "torchrun":  # torchrun treats any code but 0 as a failure
        raise typer.Exit(EXIT_CODE)


def print_run_folder(path: Path, overrides: list[str]) -> None:
    """Prints a line if the folder of a run's config.yaml replaces the one that the file names."""
    path = config_file(path)
    tree = load_tree(path, (), Config)
    if (renamed := renamed_folder(path, tree)) is not None and not any(o.startswith("run.folder=") for o in overrides):
        print_line(
            f"run.folder: {renamed}, where this config.yaml and its checkpoints lie, instead of {tree['run']['folder']}"
        )


@app.command()
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="number of ranks; default: the fewest that fit the degrees")
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="ranks of a node; default: parallel.ranks_per_node, or else 8")
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="also print all effective settings, the rank table, and the model's dense twins"),
    ] = False,
) -> None:
    """Validate a config and print its parameters, memory of a rank, FLOPs, and what crosses nodes.

    Starts no processes. Data that does not exist on this machine is a warning, since it may be on the cluster.

    Example: `expert-parallel check configs/mixtral-8x7b.yaml --world-size 32`
    """
    from expert_parallel.training.check import format_config_report

    with exit_on_user_error(ValueError):
        loaded = load_config(config, overrides or [])
        if ranks_per_node is not None and loaded.parallel.ranks_per_node not in (None, ranks_per_node):
            raise ValueError(
                f"--ranks-per-node is {ranks_per_node} but parallel.ranks_per_node is "
                f"{loaded.parallel.ranks_per_node}: leave one of them out"
            )
        print(format_config_report(loaded, world_size, ranks_per_node, everything=everything))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, with config and checkpoints")],
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option(help="text to continue; repeat for a batch")] = None,
    tokens: Annotated[int, typer.Option(help="number of tokens to generate, 1 or more")] = 200,
    temperature: Annotated[float, typer.Option(help="sampling temperature; 0: greedy decoding")] = 0.7,
    top_k: Annotated[int | None, typer.Option(help="sample from the k most likely tokens; default: all")] = None,
    top_p: Annotated[
        float, typer.Option(help="nucleus sampling: total probability to sample from, above 0, at most 1")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="random seed of the sampling")] = 0,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens", help="read special tokens such as <|im_start|> in prompts, and show those of the texts"
        ),
    ] = False,
    cache: Annotated[bool, typer.Option(help="use a KV cache")] = True,
    log_level: LogLevel = "warning",
) -> None:
    """Generate text from a run's newest checkpoint.

    Runs on this process alone, whatever layout trained it; or on every rank under torchrun, in the run's layout or a
    given one (such as parallel.tp=2). An imported model begins and ends texts as its tokenizer.json,
    tokenizer_config.json and generation_config.json say; these options take the place of the file's.

    Example: `expert-parallel generate runs/uomni --prompt "def " --tokens 100`
    """
    from expert_parallel.model.generation import Sampling
    from expert_parallel.training.generate import generate_from_run

    with (
        exit_on_user_error(ValueError, OSError, log_level=log_level),
        distributed(*early_config(run / "config.yaml", overrides or [])) as ranks,
    ):
        refuse_generate_options(tokens, temperature, top_k, top_p, seed)
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        texts = generate_from_run(
            run,
            overrides or [],
            prompt or [""],
            ranks,
            num_tokens=tokens,
            sampling=sampling,
            seed=seed,
            special_tokens=special_tokens,
            use_cache=cache,
        )
        if ranks.rank == 0:
            print_line(f"\n{'-' * 80}\n".join(texts))


def refuse_generate_options(tokens: int, temperature: float, top_k: int | None, top_p: float, seed: int) -> None:
    """Raises UserError for the first option of `generate` that is out of its range."""
    ranges = (
        ("--tokens", tokens, tokens >= 1, "1 or more"),
        ("--temperature", temperature, 0 <= temperature < math.inf, "a finite number, 0 or more"),
        ("--top-k", top_k, top_k is None or top_k >= 1, "1 or more"),
        ("--top-p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("--seed", seed, 0 <= seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
    )
    for name, value, is_valid, wanted in ranges:
        if not is_valid:  # also NaN, as it compares false
            raise UserError(f"{name} is {value}, it must be {wanted}")


@app.command("experts")
def experts_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, with config, metrics and checkpoints")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="HTML file to write; default: experts.html in RUN")] = None,
    json: Annotated[Path | None, typer.Option(help="also write the report's numbers to this JSON file")] = None,
    text: Annotated[Path | None, typer.Option(help="text file to route; default: the run's held-out data")] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="maximum number of sequences to route; default: as in evaluation")
    ] = None,
    log_level: LogLevel = "warning",
) -> None:
    """Report in one HTML file what the experts of a run have learned.

    Shows the load of each expert over training, the experts of each token of a text, and the most frequent tokens of
    each expert. Runs on this process alone, whatever layout trained the run.

    Example: `expert-parallel experts runs/uomni --out experts.html`
    """
    from expert_parallel.report.experts import as_json, build_report
    from expert_parallel.report.page import render

    with (
        exit_on_user_error(ValueError, OSError, log_level=log_level),
        distributed(*early_config(run / "config.yaml", overrides or [])) as ranks,
    ):
        report = build_report(run, overrides or [], ranks, text, sequences)
        page = out or run / "experts.html"
        page.write_text(render(report), encoding="utf-8")
        if json is not None:
            json.write_text(as_json(report), encoding="utf-8")
        print(f"wrote {page}" + (f" and {json}" if json is not None else ""))


@app.command()
def verify(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="ranks to start if there is no launcher; default: 4")] = None,
    layout: Annotated[
        list[str] | None, typer.Option(help="layout such as ep=4,data=sharded; repeatable; default: a selection")
    ] = None,
    dtype: Annotated[str, typer.Option(help="compute dtype: float64, float32 or bfloat16")] = "float64",
    full: Annotated[bool, typer.Option("--full", help="use the config's own sizes, not small ones (slow)")] = False,
    count_bytes: Annotated[bool, typer.Option("--bytes", help="print the bytes sent per axis in a step")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="one step per layout, and nothing beside training")] = False,
    log_level: LogLevel = "warning",
) -> None:
    """Verify that every layout computes the same model as one rank with simple reference code.

    Starts its ranks itself on the CPU, or runs on every rank under torchrun. Exit code 1 if a layout differs.

    Example: `expert-parallel verify configs/quickstart.yaml --layout tp=2,ep=2`
    """
    from expert_parallel.cli.verify import verify_command
    from expert_parallel.verify.ranks import RankError

    runtime_config, settings = early_config(config, overrides or [])
    if runtime_config.device == "cuda":  # a config for a cluster can be verified on a laptop
        runtime_config = runtime_config.model_copy(update={"device": "auto"})
    try:
        with exit_on_user_error(log_level=log_level), distributed(runtime_config, settings) as runtime:

            def print_rank_0(text: str) -> None:
                if runtime.rank == 0:
                    print(text, file=sys.stderr, flush=True)

            loaded = runtime.run_on_all_ranks(lambda: load_config(config, overrides or []))
            passes = verify_command(loaded, runtime, ranks, layout or [], dtype, full, print_rank_0, count_bytes, quick)
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if not passes:
        raise typer.Exit(1)
