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

from expert_parallel.data.formats import find_inputs
from expert_parallel.data.indexed import smallest_dtype, with_suffix, write_index
from expert_parallel.data.inputs import Job, read_documents, split_into_jobs
from expert_parallel.data.reading import TextRules, read_bytes
from expert_parallel.data.tokenizer import Sources, Tokenizer, TokensInfo, file_sha256, open_tokenizer, train_tokenizer

TRAINING_BYTES = 1 << 30  # most text that a tokenizer is trained on

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TokenizedJob:
    """Holds the tokens of a job's documents, concatenated, each followed by the token that ends documents. lengths:
    int32, the number of tokens of each document. num_empty, num_missing: the numbers of documents that are left out
    since their text is empty, or missing."""

    tokens: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    num_empty: int
    num_missing: int


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
    missing: str = "error",
    workers: int = 1,
    print_message: Callable[[str], None],
    report: Callable[[PrepareProgress], None],
) -> TokensInfo:
    """Tokenizes files and writes PREFIX.bin, .idx, .json and, unless tokens are bytes, .tokenizer.json. Returns the
    content of PREFIX.json. tokenizer: `bytes`, the path of a tokenizer.json, or `train:VOCAB_SIZE`. missing: `error` or
    `skip`, for documents without text. Raises ValueError, with file and position, if an input is not valid; no output
    is left then."""
    found, num_empty_files = find_inputs(files, "FILES", format, "--format")
    jobs = list(split_into_jobs(found))
    rules = TextRules(field, "--", zero_is_separator=tokenizer == "bytes", skip_missing=missing == "skip")
    with atomic_outputs(prefix) as partial_name, executor(workers) as submit:
        kept = None if tokenizer == "bytes" else partial_name(".tokenizer.json")
        if kept is not None and tokenizer.startswith("train:"):
            with output_errors(prefix):
                train_on_jobs(jobs, kept, parse_vocab_size(tokenizer), rules, print_message)
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
        digests = map_in_order(submit, file_sha256, [source.file for source in found], ahead=2 * workers)
        sha256_of_sources = hashlib.sha256("".join(digests).encode()).hexdigest()
        key = ("bytes", known.end_id, None) if kept is None else (str(kept), known.end_id, file_sha256(kept))
        work = partial(tokenize, tokenizer=key, rules=rules, dtype=dtype)
        results = map_in_order(submit, work, jobs, ahead=2 * workers)
        lengths, sha256, num_empty, num_missing = write_tokens(prefix, partial_name(".bin"), jobs, results, report)
        if not len(lengths):
            raise ValueError(f"FILES: {files[:3]} hold {num_empty + num_missing} documents, all of them without text")
        info = TokensInfo(
            tokenizer="bytes" if kept is None else with_suffix(prefix, ".tokenizer.json").name,
            tokenizer_sha256=key[2],
            vocab_size=known.vocab_size,
            end_id=known.end_id,
            num_documents=len(lengths),
            num_tokens=int(lengths.sum(dtype=np.int64)),
            empty_documents_left_out=num_empty,
            missing_texts_left_out=num_missing,
            empty_files_left_out=num_empty_files,
            sha256=sha256,
            sources=Sources(files=len(found), bytes=sum(source.bytes for source in found), sha256=sha256_of_sources),
        )
        with output_errors(prefix):
            partial_name(".json").write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
            write_index(partial_name(".idx"), dtype, lengths)
    return info


@lru_cache(maxsize=1)  # all jobs of a worker have the same tokenizer
def cached_tokenizer(name: str, end_id: int, sha256: str | None) -> Tokenizer:
    """Opens a tokenizer once per worker process. sha256: that of its file, so that a changed file is opened again."""
    return open_tokenizer(name, end_id)


def tokenize(
    job: Job, tokenizer: tuple[str, int, str | None], rules: TextRules, dtype: type[np.generic]
) -> TokenizedJob:
    """Tokenizes a job, in a worker. tokenizer: arguments of `cached_tokenizer`. Documents without text are only
    counted."""
    known, end_id = cached_tokenizer(*tokenizer), tokenizer[1]
    documents, num_empty, num_missing = [], 0, 0
    for split in job:
        for _, text in read_documents(split, rules):
            if not text:
                num_empty += text == ""
                num_missing += text is None
                continue
            documents.append(np.array([*known.encode(text), end_id], dtype=dtype))
            if len(documents[-1]) > np.iinfo(np.int32).max:
                raise ValueError(
                    f"{split.source.where}: a document of {len(documents[-1])} tokens is too long for an index"
                )
    tokens = np.concatenate([np.empty(0, dtype), *documents])
    lengths = np.array([len(document) for document in documents], np.int32)
    return TokenizedJob(tokens, lengths, num_empty, num_missing)


def write_tokens(
    prefix: str, path: Path, jobs: list[Job], results: Iterator[TokenizedJob], report: Callable[[PrepareProgress], None]
) -> tuple[np.ndarray[Any, Any], str, int, int]:
    """Writes tokens as results arrive; returns (lengths of all documents, SHA-256, number of empty documents, number of
    missing ones)."""
    digest = hashlib.sha256()
    lengths = []
    num_tokens = num_documents = num_empty = num_missing = done = 0
    sizes = [sum(split.bytes for split in job) for job in jobs]
    with output_errors(prefix), path.open("wb") as stream:
        for size, result in zip(sizes, results, strict=True):
            stream.write(result.tokens.data)
            digest.update(result.tokens.data)
            lengths.append(result.lengths)
            done += size
            num_empty += result.num_empty
            num_missing += result.num_missing
            num_tokens += len(result.tokens)
            num_documents += len(result.lengths)
            report(PrepareProgress(done, sum(sizes), num_documents, num_tokens))
        stream.flush()
        os.fsync(stream.fileno())
    return np.concatenate(lengths), digest.hexdigest(), num_empty, num_missing


def parse_vocab_size(tokenizer: str) -> int:
    """Parses the size in `train:VOCAB_SIZE`. Raises ValueError if it is not a valid size."""
    size = tokenizer.removeprefix("train:")
    if not size.isdecimal() or not 257 <= int(size) <= 1 << 24:
        raise ValueError(f"--tokenizer train:{size}: the size must be a number from 257 (all bytes, and the end token)")
    return int(size)


def train_on_jobs(
    jobs: list[Job], path: Path, vocab_size: int, rules: TextRules, print_message: Callable[[str], None]
) -> None:
    """Trains a tokenizer on all texts, or on every n-th job if they exceed TRAINING_BYTES, and writes it to `path`."""
    size = sum(split.bytes for job in jobs for split in job)
    every = -(-size // TRAINING_BYTES)
    part = "all of it" if every == 1 else f"1 of every {every} parts of it"
    print_message(f"training a tokenizer of {vocab_size:,} tokens on {size:,} bytes: {part}")
    splits = (split for job in jobs[::every] for split in job)
    texts = (text for split in splits for _, text in read_documents(split, rules) if text)
    train_tokenizer(texts, vocab_size, path)


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
