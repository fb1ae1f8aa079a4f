"""Splits input files into parts, which are read on their own, and reads the documents of a part. It does not import
torch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from expert_parallel.data.formats import InputFile
from expert_parallel.data.reading import (
    TextRules,
    decode_text_file,
    open_parquet,
    open_stream,
    read_json_array,
    read_jsonl,
    read_parquet,
)

JOB_BYTES = 1 << 20


@dataclass(frozen=True)
class InputSplit:
    """Describes a whole input file, a byte range of a JSONL file, or a row group of a parquet file.

    first, last: for JSONL, the lines that begin at the bytes first to last - 1; for parquet, the row groups first to
    last - 1; None: to the end. bytes: its approximate size on disk.
    """

    source: InputFile
    first: int
    last: int | None
    bytes: int


Job = list[InputSplit]


def split_into_jobs(sources: Iterable[InputFile]) -> Iterator[Job]:
    """Splits files into jobs, lists of inputs of about JOB_BYTES together; small files share a job."""
    job: Job = []
    for source in sources:
        for split in split_file(source):
            if job and sum(other.bytes for other in job) + split.bytes > JOB_BYTES:
                yield job
                job = []
            job.append(split)
    if job:
        yield job


def split_file(source: InputFile) -> Iterator[InputSplit]:
    """Splits a file into parts that can be read separately. A compressed file is one part, since it can only be read
    from its beginning, and so is a text or a JSON array."""
    if source.format == "jsonl" and source.compression == "none":
        for first in range(0, source.bytes, JOB_BYTES):
            last = min(first + JOB_BYTES, source.bytes)
            yield InputSplit(source, first, last, last - first)
    elif source.format == "parquet":
        groups = open_parquet(source.file, source.where).metadata.num_row_groups
        for group in range(groups):
            yield InputSplit(source, group, group + 1, source.bytes // groups)
    else:
        yield whole_file(source)


def whole_file(source: InputFile) -> InputSplit:
    return InputSplit(source, 0, None, source.bytes)


def read_documents(split: InputSplit, rules: TextRules) -> Iterator[tuple[int, str | None]]:
    """Yields (number, text) for each document of one input: the number of its line, item or row, counted from 1; for
    JSONL, from the first line of the split. A text is None if it is missing and `rules` allow it. Raises ValueError,
    with the file and the place, if an input is not valid."""
    source = split.source
    if source.format == "parquet":
        yield from read_parquet(source.file, source.where, rules, split.first, split.last)
        return
    with open_stream(source.file, source.where, source.compression) as stream:
        if source.format == "jsonl":
            yield from read_jsonl(stream, source.where, rules, split.first, split.last)
        elif source.format == "json":
            yield from read_json_array(stream, source.where, rules)
        else:
            yield 1, decode_text_file(stream.read(), source.where, rules)
