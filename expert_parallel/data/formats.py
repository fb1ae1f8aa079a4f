"""Recognises how an input file is read: its format and its compression. It does not import torch.

The setting `auto` looks at the name and at the content, and refuses a file if they disagree, or if it knows neither:
what is read in the wrong format would be trained on as if it were text.
"""

import json
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePath

from expert_parallel.data.reading import BYTE_ORDER_MARK, Match, match_files, open_parquet, open_stream

FORMATS = ("text", "jsonl", "json", "parquet")
HEAD_BYTES = 1 << 16  # what is looked at of each file

# Suffixes of names; all others name text.
FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    **dict.fromkeys((".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx"), "table"),
}
COMPRESSION_OF_SUFFIX = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".zstd": "zstd"}

# First bytes of contents. None of them begins a UTF-8 text, save `%PDF-` and `GGUF`, which begin no other file.
COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\x50\x2a\x4d\x18": "zstd"}
PARQUET_MAGIC = b"PAR1\x15"
OTHER_MAGIC = {
    b"PK\x03\x04": "a zip archive (or a document, or a checkpoint, in one)",
    b"BZh91AY&SY": "compressed with bzip2",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"%PDF-": "a PDF document",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"ARROW1\x00\x00": "an Arrow table",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"GGUF": "a GGUF model",
    b"\x7fELF": "a program",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}

JSON_KINDS = {"jsonl": "JSON Lines", "json": "a JSON array of objects", "object": "a JSON object"}
JSON_ARRAY = re.compile(rb'\s*\[\s*\{\s*"')  # of objects
JSON_OBJECT = re.compile(rb'\s*\{\s*\n\s*"[^"\n]*"\s*:')  # over several lines


@dataclass(frozen=True)
class InputFile:
    """Names an input file and how it is read. where: the setting that names it, and the file, for error messages.
    format: one of FORMATS. compression: `none`, `gzip` or `zstd`. bytes: its size on disk."""

    file: Path
    where: str
    format: str
    compression: str
    bytes: int


class EmptyFileError(ValueError):
    """Is raised for a file without content."""


def find_inputs(
    paths: list[str], setting: str, format: str, format_setting: str, absent: Collection[int] = ()
) -> tuple[list[InputFile], int]:
    """Returns (the files that `paths` match, in order, the number of empty files left out). paths, absent: see
    match_files.

    Empty files that a glob matches are left out; one that is named by itself is an error, as is a match of empty files
    alone. setting, format_setting: name the paths and the format in errors. format: one of FORMATS, or `auto`.
    """
    found: list[InputFile] = []
    matches = match_files(paths, setting, absent)
    for match in matches:
        try:
            found.append(inspect_file(match, format, format_setting))
        except EmptyFileError:
            if match.is_named:
                raise
    if not found:
        raise ValueError(f"{setting}: each of the {len(matches)} files that match is empty")
    return found, len(matches) - len(found)


def inspect_file(match: Match, format: str, format_setting: str) -> InputFile:
    """Returns how a file is read. Raises EmptyFileError if it is empty, and ValueError if it cannot be read, or if
    `format` is `auto` and the format is unclear."""
    file, where = match.file, f"{match.setting}: {match.file}"
    try:
        found = file.stat()
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):  # a pipe would lose what is read here
        raise ValueError(f"{where} is a pipe or a device: write its content to a file, which can be read twice")
    with open_stream(file, where, "none") as stream:
        first = stream.read(4)
    compression = next((name for magic, name in COMPRESSION_MAGIC.items() if first.startswith(magic)), "none")
    with open_stream(file, where, compression) as stream:
        head = stream.read(HEAD_BYTES)
        if format == "auto" and head.lstrip().startswith(b"{"):
            head += stream.readline()  # so that all lines are whole
    if not head:
        raise EmptyFileError(f"{where} is empty (0 bytes{'' if compression == 'none' else ', decompressed'})")
    if format == "auto":
        _check_compression(file, where, compression, format_setting)
        format = recognize(file, where, head, compression, format_setting)
    if format == "parquet" and open_parquet(file, where).metadata.num_rows == 0:
        raise EmptyFileError(f"{where} is empty (0 rows)")
    return InputFile(file, where, format, compression, found.st_size)


def _check_compression(file: Path, where: str, compression: str, format_setting: str) -> None:
    """Raises ValueError if a file's name says another compression than its content."""
    suffix = file.suffix.lower()
    named = COMPRESSION_OF_SUFFIX.get(suffix, "none")
    if named == compression:
        return
    content = "is not compressed" if compression == "none" else f"is compressed with {compression}"
    name = f"ends in {suffix}" if named != "none" else "does not say so"
    raise ValueError(f"{where} {content}, but its name {name}: rename it, or set {format_setting} to its format")


def recognize(file: Path, where: str, head: bytes, compression: str, format_setting: str) -> str:
    """Returns the format, one of FORMATS, that both the name and the content of a file show. Raises ValueError if they
    disagree or show none. head: the first bytes of the content, decompressed; if it begins with `{`, whole lines."""
    name = PurePath(file.name)
    if name.suffix.lower() in COMPRESSION_OF_SUFFIX:
        name = name.with_suffix("")
    named = FORMAT_OF_SUFFIX.get(name.suffix.lower(), "text")
    as_text = f"set {format_setting}=text to read it as plain text"
    is_parquet = head.startswith(PARQUET_MAGIC)
    if is_parquet and compression != "none":
        raise ValueError(f"{where} is a compressed parquet file: decompress it (parquet compresses its columns itself)")
    if is_parquet and named != "parquet":
        raise ValueError(f"{where} is a parquet file by its content only: set {format_setting}=parquet, or rename it")
    if named == "parquet" or head.startswith(BYTE_ORDER_MARK):  # reading a text with a mark is refused
        return named if named in FORMATS else "text"
    if what := describe_binary(head):
        raise ValueError(
            f"{where} is {what}, which {format_setting}=auto does not read: convert it to UTF-8 text first"
        )
    if named == "table":
        raise ValueError(f"{where} is a table by its name: convert it to JSON Lines or parquet, or {as_text}")
    if named == "jsonl" or (named == "json" and head.lstrip().startswith(b"[")):
        return named  # errors of reading name the line or the item
    content = recognize_json(head)
    if named == "json" and content != "jsonl":
        what = "JSON by its name, but holds neither one object a line nor an array of objects"
        raise ValueError(f"{where} is {what}: convert it, or {as_text}")
    if named == "text" and content is not None:
        how = as_text if content == "object" else f"set {format_setting}={content}, or {as_text}"
        raise ValueError(f"{where} is {JSON_KINDS[content]} by its content only: {how}")
    return content or "text"


def describe_binary(head: bytes) -> str | None:
    """Returns what a file that is not text holds, by its first bytes, or None if it may be text."""
    if any(head.startswith(magic) for magic in COMPRESSION_MAGIC):
        return "compressed twice"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if what := next((what for magic, what in OTHER_MAGIC.items() if head.startswith(magic)), None):
        return what
    # UTF-16 without a mark, old archives and tables of numbers have many zero bytes; a text may have a few.
    return "binary, or UTF-16 text" if 4 * head.count(0) > len(head) else None


def recognize_json(head: bytes) -> str | None:
    """Returns the kind of JSON, a key of JSON_KINDS, that a file begins with, or None: a text that merely begins with a
    bracket is not JSON. head: the first bytes; if they begin with `{`, whole lines."""
    lines = [line for line in head.split(b"\n") if line.strip()][:3]
    if lines and all(map(_is_record, lines)):
        return "jsonl"
    if JSON_ARRAY.match(head):
        return "json"
    return "object" if _is_record(head) or (len(head) >= HEAD_BYTES and JSON_OBJECT.match(head)) else None


def _is_record(text: bytes) -> bool:
    """Returns True if the text is a JSON object with a key."""
    try:
        record = json.loads(text.decode())
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and bool(record)
