"""`expert-parallel data`: from files to token files, and what is in them."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from expert_parallel.cli.options import refusals
from expert_parallel.data.prepare import PrepareProgress

PLAIN_SECONDS = 10  # between two lines of progress, where there is no terminal

data = typer.Typer(no_args_is_help=True, help="Prepare corpora for training (data.kind: tokens), and look at them.")


@data.command("prepare")
def prepare_command(
    prefix: Annotated[str, typer.Argument(metavar="OUT_PREFIX", help="writes OUT_PREFIX.bin, .idx, .json")],
    files: Annotated[list[str], typer.Argument(metavar="FILES...", help="text (a document each), JSONL, parquet")],
    tokenizer: Annotated[str, typer.Option(help="bytes, a tokenizer.json, or train:VOCAB_SIZE")] = "bytes",
    end_token: Annotated[str | None, typer.Option(help="ends a document; default: the tokenizer's usual one")] = None,
    field: Annotated[str, typer.Option(help="of JSONL, or column of parquet, that holds the text")] = "text",
    format: Annotated[str, typer.Option(help="auto (by the files' names), text, jsonl or parquet")] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="processes; the output is the same for any number")] = 1,
) -> None:
    """Tokenize files into Megatron's indexed format."""
    from expert_parallel.data.prepare import prepare

    with refusals(ValueError):
        if format not in ("auto", "text", "jsonl", "parquet"):
            raise ValueError(f"--format is {format!r}, it must be one of auto, text, jsonl, parquet")
        if end_token is not None and tokenizer == "bytes":
            raise ValueError("--end-token is given but --tokenizer is bytes: documents of bytes end with a zero byte")
        begin = time.perf_counter()
        with progress_line() as report:
            info = prepare(
                prefix,
                files,
                tokenizer=tokenizer,
                end_token=end_token,
                field=field,
                format=format,
                workers=workers,
                say=lambda text: print(text, file=sys.stderr, flush=True),
                report=report,
            )
        seconds = time.perf_counter() - begin
    left_out = info.empty_documents_left_out
    print(
        f"{prefix}: {info.num_documents:,} documents, {info.num_tokens:,} tokens of {info.vocab_size:,}, from "
        f"{info.sources.bytes:,} bytes in {info.sources.files:,} files; {seconds:.1f} s, "
        f"{info.num_tokens / seconds:,.0f} tokens/s" + (f"; {left_out:,} empty documents left out" if left_out else "")
    )
    print(f"train on it with data='{{kind: tokens, corpora: [{{path: {prefix}}}]}}' model.vocab_size={info.vocab_size}")


@data.command("inspect")
def inspect_command(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx, also Megatron's")],
    tokens: Annotated[int, typer.Option(min=0, help="of the beginning, to show")] = 40,
    verify: Annotated[bool, typer.Option("--verify", help="read all tokens: digest, vocabulary, ends")] = False,
) -> None:
    """Documents, tokens, lengths, and the first tokens. Refuses damaged files, as training does."""
    from expert_parallel.data.inspect import describe

    with refusals(ValueError):
        print(describe(prefix, tokens, verify))


@contextmanager
def progress_line() -> Iterator[Callable[[PrepareProgress], None]]:
    """A line that moves, on a terminal; elsewhere a plain one every so often."""
    if not sys.stderr.isatty():
        last = begin = time.perf_counter()

        def print_line(now: PrepareProgress) -> None:
            nonlocal last
            if time.perf_counter() - last >= PLAIN_SECONDS:
                last = time.perf_counter()
                share = now.bytes_done / now.bytes_in_all
                print(f"{share:.0%}  {_counts(now, last - begin)}", file=sys.stderr, flush=True)

        yield print_line
        return
    columns = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(), TextColumn("{task.description}"))
    from rich.console import Console

    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task, begin = bar.add_task("reading", total=None), time.perf_counter()

        def move(now: PrepareProgress) -> None:
            text = _counts(now, time.perf_counter() - begin)
            bar.update(task, completed=now.bytes_done, total=now.bytes_in_all, description=text)

        yield move


def _counts(now: PrepareProgress, seconds: float) -> str:
    return f"{now.num_documents:,} documents, {now.num_tokens:,} tokens, {now.num_tokens / seconds:,.0f}/s"
