"""Tokenizes files into token files; documents are tokenized in parallel and written in the order of the input.

The input is split into jobs by its bytes alone, and their results are written in order: the same files give the same
bytes for any number of workers. Outputs have temporary names until all of them are complete. This module does not
import torch.
"""

import hashlib
import multiprocessing
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from expert_parallel.data.indexed import smallest_dtype, with_suffix, write_index
from expert_parallel.data.reading import (
    decode_text_file,
    match_files,
    open_parquet,
    read_bytes,
    read_jsonl,
    read_parquet,
)
from expert_parallel.data.tokenizer import Sources, Tokenizer, TokensInfo, file_sha256, open_tokenizer, train_tokenizer

JOB_BYTES = 1 << 20
TRAINING_BYTES = 1 << 30  # most text that a tokenizer is trained on
SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet"}  # for format `auto`; other suffixes are text
FIELD = "--field"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class InputSplit:
    """Describes one input of a job: a text file, a byte range of a JSONL file, or a row group of a parquet file.

    first, last: for JSONL, it consists of the lines that begin at the bytes first to last - 1; for parquet, of row
    group number `first`. bytes: its approximate size on disk.
    """

    file: Path
    format: str
    first: int
    last: int
    bytes: int


Job = list[InputSplit]


@dataclass(frozen=True)
class TokenizedJob:
    """Holds the tokens of a job's documents, concatenated, each followed by the token that ends documents. lengths:
    int32, the number of tokens of each document. num_empty: the number of empty documents, which are left out."""

    tokens: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    num_empty: int


@dataclass(frozen=True)
class PrepareProgress:
    """Counts the input bytes that have been tokenized so far, of total_bytes, and the documents and tokens written."""

    bytes_done: int
    total_bytes: int
    num_documents: int
    num_tokens: int


def prepare(
    prefix: str,
    files: list[str],
    *,
    tokenizer: str = "bytes",
    end_token: str | None = None,
    field: str = "text",
    format: str = "auto",
    workers: int = 1,
    print_message: Callable[[str], None],
    report: Callable[[PrepareProgress], None],
) -> TokensInfo:
    """Tokenizes files and writes PREFIX.bin, .idx, .json and, unless tokens are bytes, .tokenizer.json. Returns the
    content of PREFIX.json. tokenizer: `bytes`, the path of a tokenizer.json, or `train:VOCAB_SIZE`. Raises ValueError,
    with file and position, if an input is not valid; no output is left then."""
    found = [file for _, file in match_files(files, "FILES")]
    jobs = list(split_into_jobs(found, format))
    with atomic_outputs(prefix) as partial_name, executor(workers) as submit:
        kept = None if tokenizer == "bytes" else partial_name(".tokenizer.json")
        if kept is not None and tokenizer.startswith("train:"):
            with output_errors(prefix):
                train_on_jobs(jobs, kept, parse_vocab_size(tokenizer), field, print_message)
            known = open_tokenizer(str(kept), end_token)
        else:
            known = open_tokenizer(tokenizer, end_token)
            if kept is not None:
                content = read_bytes(Path(tokenizer), "--tokenizer")
                with output_errors(prefix):
                    kept.write_bytes(content)
        if known.end_id is None:
            raise ValueError(f"--tokenizer {tokenizer} has no known token that ends a document: use --end-token")
        dtype = smallest_dtype(known.vocab_size)
        digests = map_in_order(submit, file_sha256, found, ahead=2 * workers)
        sources = Sources(
            files=len(found),
            bytes=sum(map(file_size, found)),
            sha256=hashlib.sha256("".join(digests).encode()).hexdigest(),
        )
        key = ("bytes", known.end_id, None) if kept is None else (str(kept), known.end_id, file_sha256(kept))
        work = partial(tokenize, tokenizer=key, field=field, dtype=dtype)
        results = map_in_order(submit, work, jobs, ahead=2 * workers)
        lengths, sha256, num_empty = write_tokens(prefix, partial_name(".bin"), jobs, results, report)
        if not len(lengths):
            raise ValueError(f"{', '.join(map(str, found[:3]))}: {num_empty} documents, all of them empty")
        info = TokensInfo(
            tokenizer="bytes" if kept is None else with_suffix(prefix, ".tokenizer.json").name,
            tokenizer_sha256=key[2],
            vocab_size=known.vocab_size,
            end_id=known.end_id,
            num_documents=len(lengths),
            num_tokens=int(lengths.sum(dtype=np.int64)),
            empty_documents_left_out=num_empty,
            sha256=sha256,
            sources=sources,
        )
        with output_errors(prefix):
            partial_name(".json").write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
            write_index(partial_name(".idx"), dtype, lengths)
    return info


def split_into_jobs(files: Iterable[Path], format: str) -> Iterator[Job]:
    """Splits files into jobs, lists of inputs of about JOB_BYTES together; small files share a job."""
    job: Job = []
    for file in files:
        for split in split_file(file, SUFFIXES.get(file.suffix.lower(), "text") if format == "auto" else format):
            if job and sum(other.bytes for other in job) + split.bytes > JOB_BYTES:
                yield job
                job = []
            job.append(split)
    if job:
        yield job


def split_file(file: Path, format: str) -> Iterator[InputSplit]:
    """Splits a file into parts that can be tokenized separately. Raises ValueError if it is empty."""
    size = file_size(file)
    if size == 0:
        raise ValueError(f"{file} is empty (0 bytes)")
    if format == "jsonl":
        for first in range(0, size, JOB_BYTES):
            last = min(first + JOB_BYTES, size)
            yield InputSplit(file, format, first, last, last - first)
    elif format == "parquet":
        metadata = open_parquet(file).metadata
        groups = metadata.num_row_groups
        if metadata.num_rows == 0:
            raise ValueError(f"{file} is empty (0 rows)")
        for group in range(groups):
            yield InputSplit(file, format, group, group + 1, size // groups)
    else:
        yield InputSplit(file, format, 0, size, size)


def file_size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def read_texts(split: InputSplit, field: str, *, zero_is_separator: bool) -> Iterator[str]:
    """Yields the texts of the documents of one input. zero_is_separator: see decode_text_file."""
    if split.format == "parquet":
        yield from read_parquet(split.file, split.first, field, FIELD, zero_is_separator=zero_is_separator)
    elif split.format == "jsonl":
        try:
            with split.file.open("rb") as stream:
                texts = read_jsonl(
                    stream,
                    field,
                    str(split.file),
                    FIELD,
                    zero_is_separator=zero_is_separator,
                    first=split.first,
                    last=split.last,
                )
                yield from (text for _, text in texts)
        except OSError as error:
            raise ValueError(f"{split.file} cannot be read: {error.strerror}") from error
    else:
        yield decode_text_file(read_bytes(split.file, "FILES"), str(split.file), zero_is_separator=zero_is_separator)


@lru_cache(maxsize=1)  # all jobs of a worker have the same tokenizer
def cached_tokenizer(name: str, end_id: int, sha256: str | None) -> Tokenizer:
    """Opens a tokenizer once per worker process. sha256: that of its file, so that a changed file is opened again."""
    return open_tokenizer(name, end_id)


def tokenize(job: Job, tokenizer: tuple[str, int, str | None], field: str, dtype: type[np.generic]) -> TokenizedJob:
    """Tokenizes a job, in a worker. tokenizer: arguments of `cached_tokenizer`. Empty documents are only counted."""
    known, end_id = cached_tokenizer(*tokenizer), tokenizer[1]
    documents, num_empty = [], 0
    for split in job:
        for text in read_texts(split, field, zero_is_separator=tokenizer[0] == "bytes"):
            if not text:
                num_empty += 1
                continue
            documents.append(np.array([*known.encode(text), end_id], dtype=dtype))
            if len(documents[-1]) > np.iinfo(np.int32).max:
                raise ValueError(f"{split.file}: a document of {len(documents[-1])} tokens is too long for an index")
    tokens = np.concatenate([np.empty(0, dtype), *documents])
    return TokenizedJob(tokens, np.array([len(document) for document in documents], np.int32), num_empty)


def write_tokens(
    prefix: str, path: Path, jobs: list[Job], results: Iterator[TokenizedJob], report: Callable[[PrepareProgress], None]
) -> tuple[np.ndarray[Any, Any], str, int]:
    """Writes tokens as results arrive; returns (lengths of all documents, SHA-256, number of empty documents)."""
    digest = hashlib.sha256()
    lengths = []
    num_tokens = num_documents = num_empty = done = 0
    sizes = [sum(split.bytes for split in job) for job in jobs]
    with output_errors(prefix), path.open("wb") as stream:
        for size, result in zip(sizes, results, strict=True):
            stream.write(result.tokens.data)
            digest.update(result.tokens.data)
            lengths.append(result.lengths)
            done += size
            num_empty += result.num_empty
            num_tokens += len(result.tokens)
            num_documents += len(result.lengths)
            report(PrepareProgress(done, sum(sizes), num_documents, num_tokens))
        stream.flush()
        os.fsync(stream.fileno())
    return np.concatenate(lengths), digest.hexdigest(), num_empty


def parse_vocab_size(tokenizer: str) -> int:
    """Parses the size in `train:VOCAB_SIZE`. Raises ValueError if it is not a valid size."""
    size = tokenizer.removeprefix("train:")
    if not size.isdecimal() or not 257 <= int(size) <= 1 << 24:
        raise ValueError(f"--tokenizer train:{size}: the size must be a number from 257 (all bytes, and the end token)")
    return int(size)


def train_on_jobs(
    jobs: list[Job], path: Path, vocab_size: int, field: str, print_message: Callable[[str], None]
) -> None:
    """Trains a tokenizer on all texts, or on every n-th job if they exceed TRAINING_BYTES, and writes it to `path`."""
    size = sum(split.bytes for job in jobs for split in job)
    every = -(-size // TRAINING_BYTES)
    part = "all of it" if every == 1 else f"1 of every {every} parts of it"
    print_message(f"training a tokenizer of {vocab_size:,} tokens on {size:,} bytes: {part}")
    splits = (split for job in jobs[::every] for split in job)
    train_tokenizer(
        (text for split in splits for text in read_texts(split, field, zero_is_separator=False)), vocab_size, path
    )


@contextmanager
def atomic_outputs(prefix: str) -> Iterator[Callable[[str], Path]]:
    """Yields a function that returns the temporary path of the output with a given suffix, unique to this command.

    On success the files are renamed, the index last, since a corpus exists only with its index. On failure they are
    removed.
    """
    final = {suffix: with_suffix(prefix, suffix) for suffix in (".tokenizer.json", ".bin", ".json", ".idx")}
    partials = {suffix: with_suffix(prefix, f".partial_{secrets.token_hex(4)}{suffix}") for suffix in final}
    check_absent(final.values())
    if not final[".bin"].parent.is_dir():
        raise ValueError(f"OUT_PREFIX: there is no folder {final['.bin'].parent}")
    named: list[Path] = []
    try:
        yield partials.__getitem__
        check_absent(final.values())  # another command may have made them meanwhile
        with output_errors(prefix):
            for suffix, path in partials.items():
                if path.exists():
                    named.append(path.rename(final[suffix]))
    except BaseException:
        for path in named:
            path.unlink(missing_ok=True)
        raise
    finally:
        for path in partials.values():
            path.unlink(missing_ok=True)


def check_absent(paths: Iterable[Path]) -> None:
    """Raises ValueError if any of the paths exists."""
    if there := [str(path) for path in paths if path.exists()]:
        raise ValueError(f"{' and '.join(there)} exists already: choose another OUT_PREFIX, or remove it")


@contextmanager
def output_errors(prefix: str) -> Iterator[None]:
    """Turns an OSError of its body into a ValueError about the output; errors of reading are ValueErrors already."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{prefix} cannot be written: {error.strerror or error}") from error


@contextmanager
def executor(workers: int) -> Iterator[Callable[..., Future[Any]] | None]:
    """Yields the `submit` of a pool of `workers` processes, or None if workers is 1: this process then does the
    work."""
    if workers == 1:
        yield None
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"))
    try:
        yield pool.submit
    finally:
        pool.shutdown(cancel_futures=True)


def map_in_order(
    submit: Callable[..., Future[Any]] | None, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Yields work(item) for each item, in the order of the items, with at most `ahead` results pending, which bounds
    the memory. submit: from `executor`."""
    if submit is None:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError("a worker was killed, perhaps out of memory: try fewer --workers") from error
    except OSError as error:
        raise ValueError(f"workers cannot be started ({error.strerror or error}): try fewer --workers") from error
