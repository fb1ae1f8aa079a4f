"""Defines the commands `expert-parallel data prepare | inspect`."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from expert_parallel.cli.options import exit_on_user_error
from expert_parallel.data.prepare import PrepareProgress

PLAIN_SECONDS = 10  # between two lines of progress, if stderr is not a terminal

data = typer.Typer(
    no_args_is_help=True,
    help="Prepare and inspect tokenized corpora (data.kind: tokens)."
    "\n\nExample: `expert-parallel data prepare my/tokens a.txt --tokenizer train:8000`",
)


@data.command("prepare")
def prepare_command(
    prefix: Annotated[
        str, typer.Argument(metavar="OUT_PREFIX", help="path of the outputs OUT_PREFIX.bin, .idx and .json")
    ],
    files: Annotated[
        list[str], typer.Argument(metavar="FILES", help="text (a document each), JSONL, JSON or parquet; .gz, .zst")
    ],
    tokenizer: Annotated[str, typer.Option(help="bytes, the path of a tokenizer.json, or train:VOCAB_SIZE")] = "bytes",
    end_token: Annotated[str | None, typer.Option(help="token that ends a document; default: the tokenizer's")] = None,
    field: Annotated[str, typer.Option(help="JSON field or parquet column that holds the text")] = "text",
    format: Annotated[str, typer.Option(help="auto (by name and content), text, jsonl, json or parquet")] = "auto",
    missing: Annotated[str, typer.Option(help="documents without text: error or skip (count them)")] = "error",
    workers: Annotated[int, typer.Option(min=1, help="worker processes; the output is the same for any number")] = 1,
) -> None:
    """Tokenize files into Megatron's indexed dataset format.

    Example: `expert-parallel data prepare my/tokens a.txt --tokenizer train:8000`
    """
    from expert_parallel.data.formats import FORMATS
    from expert_parallel.data.prepare import prepare

    with exit_on_user_error(ValueError):
        for option, value, choices in (("format", format, ("auto", *FORMATS)), ("missing", missing, ("error", "skip"))):
            if value not in choices:
                raise ValueError(f"--{option} is {value!r}, it must be one of {', '.join(choices)}")
        if end_token is not None and tokenizer == "bytes":
            raise ValueError("--end-token is given but --tokenizer is bytes: documents of bytes end with a zero byte")
        begin = time.perf_counter()
        with progress_display() as report:
            info = prepare(
                prefix,
                files,
                tokenizer=tokenizer,
                end_token=end_token,
                field=field,
                format=format,
                missing=missing,
                workers=workers,
                print_message=lambda text: print(text, file=sys.stderr, flush=True),
                report=report,
            )
        seconds = time.perf_counter() - begin
    print(
        f"{prefix}: {info.num_documents:,} documents, {info.num_tokens:,} tokens of {info.vocab_size:,}, from "
        f"{info.sources.bytes:,} bytes in {info.sources.files:,} files; {seconds:.1f} s, "
        f"{info.num_tokens / seconds:,.0f} tokens/s{info.describe_left_out()}"
    )
    print(f"train on it with data='{{kind: tokens, corpora: [{{path: {prefix}}}]}}' model.vocab_size={info.vocab_size}")


@data.command("inspect")
def inspect_command(
    prefix: Annotated[
        str, typer.Argument(metavar="PREFIX", help="path without .bin or .idx; also of a Megatron corpus")
    ],
    tokens: Annotated[int, typer.Option(min=0, help="number of tokens to show")] = 40,
    verify: Annotated[
        bool, typer.Option("--verify", help="read all tokens and check SHA-256, ids, and end tokens")
    ] = False,
) -> None:
    """Show documents, tokens, lengths, and the first tokens of a corpus.

    Damaged files are an error, as in training.

    Example: `expert-parallel data inspect my/tokens --tokens 100`
    """
    from expert_parallel.data.inspect import format_corpus

    with exit_on_user_error(ValueError):
        print(format_corpus(prefix, tokens, verify))


@contextmanager
def progress_display() -> Iterator[Callable[[PrepareProgress], None]]:
    """Shows a progress bar on a terminal; elsewhere prints a line every PLAIN_SECONDS."""
    if not sys.stderr.isatty():
        last = begin = time.perf_counter()

        def print_line(now: PrepareProgress) -> None:
            nonlocal last
            if time.perf_counter() - last >= PLAIN_SECONDS:
                last = time.perf_counter()
                share = now.bytes_done / now.total_bytes
                print(f"{share:.0%}  {_format_counts(now, last - begin)}", file=sys.stderr, flush=True)

        yield print_line
        return
    columns = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(), TextColumn("{task.description}"))
    from rich.console import Console

    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task, begin = bar.add_task("reading", total=None), time.perf_counter()

        def move(now: PrepareProgress) -> None:
            text = _format_counts(now, time.perf_counter() - begin)
            bar.update(task, completed=now.bytes_done, total=now.total_bytes, description=text)

        yield move


def _format_counts(now: PrepareProgress, seconds: float) -> str:
    """Formats the counts of a progress line."""
    return f"{now.num_documents:,} documents, {now.num_tokens:,} tokens, {now.num_tokens / seconds:,.0f}/s"
