"""Reads users' files: text, JSONL, parquet. Errors name the file and the position. It does not import torch."""

import glob
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextRules:
    """Says where a document's text is, and which texts are valid.

    field: the field of a JSON object, or the column of a parquet file, that holds the text. settings: what precedes the
    names of settings in errors, `data.` or `--`. zero_is_separator: True if a zero byte ends documents, so that no text
    may contain one. skip_missing: True if an absent or null text is None, and not an error.
    """

    field: str
    settings: str
    zero_is_separator: bool
    skip_missing: bool = False

    @property
    def named_field(self) -> str:
        return f"field {self.field!r} ({self.settings}field)"


class Match(NamedTuple):
    """Names a file that a setting matches. setting: the setting's path. is_named: True if it is named by itself, False
    if a glob pattern matches it."""

    setting: str
    file: Path
    is_named: bool


def match_files(paths: list[str], setting: str, absent: Collection[int] = ()) -> list[Match]:
    """Returns the files that the glob patterns match: patterns in the order given, the matches of each sorted.

    As in a shell, a glob skips hidden files. Folders that it matches are skipped. A file that is matched twice is
    refused: its text could be in both the training and the held-out part. absent: the indices of patterns to leave out.
    """
    found: dict[str, Match] = {}
    for index, pattern in enumerate(paths):
        if index in absent:
            continue
        name = f"{setting}[{index}]"
        if os.path.isdir(pattern):
            below = os.path.join(pattern, "**", "*.txt")
            raise ValueError(f"{name}: {pattern} is a folder; for the text files in it write {below}")
        is_named = os.path.lexists(pattern)  # also a file whose name holds [ or *
        matches = [pattern] if is_named else sorted(set(glob.glob(pattern, recursive=True)))
        files = [Path(match) for match in matches if not os.path.isdir(match)]
        if not files:
            raise ValueError(f"{name}: {pattern} matches 0 files (working folder {os.getcwd()})")
        for file in files:
            key = os.path.realpath(file)
            if key in found:
                raise ValueError(f"{name}: {file} is already matched by {found[key].setting} (as {found[key].file})")
            found[key] = Match(name, file, is_named)
    return list(found.values())


def read_bytes(file: Path, setting: str) -> bytes:
    """Reads a file. Raises ValueError, which names the setting, if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{setting}: {file} cannot be read: {error.strerror}") from error


def _open_zstd(file: Path) -> IO[bytes]:
    try:
        from pyarrow import CompressedInputStream
    except ImportError as error:
        raise ValueError(f"{file}: reading zstd needs pyarrow: pip install 'expert-parallel[data]'") from error
    return io.BufferedReader(CompressedInputStream(file.open("rb"), "zstd"))


# By compression. zstd is not in the standard library; pyarrow, which parquet needs anyway, decompresses it.
STREAMS: dict[str, Callable[[Path], Any]] = {
    "none": lambda file: file.open("rb"),
    "gzip": lambda file: gzip.open(file, "rb"),  # noqa: SIM115 - open_stream closes it
    "zstd": _open_zstd,
}


@contextmanager
def open_stream(file: Path, where: str, compression: str) -> Iterator[IO[bytes]]:
    """Opens a file for reading, and decompresses what is read. where: the file, for error messages. Raises ValueError
    if it cannot be read, or if the compressed content is truncated or damaged, also in the body of the `with`."""
    try:
        with STREAMS[compression](file) as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        if reason := getattr(error, "strerror", None):
            raise ValueError(f"{where} cannot be read: {reason}") from error
        raise ValueError(f"{where} cannot be decompressed as {compression}: {_one_line(error)}") from error


def decode_utf8(content: bytes, where: str, offset: int) -> str:
    """Decodes UTF-8. Raises ValueError with the offset of the error; a byte order mark is refused, as it would be
    trained on.

    offset: the position of `content` in its file.
    """
    if offset == 0 and content.startswith(BYTE_ORDER_MARK):
        raise ValueError(f"{where} begins with a byte order mark: save the file as UTF-8 without BOM")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte, at = content[error.start], offset + error.start
        raise ValueError(f"{where} is not UTF-8: byte 0x{byte:02x} at offset {at} ({error.reason})") from error


def decode_text_file(content: bytes, where: str, rules: TextRules) -> str:
    """Decodes a text file. where: the file, for error messages. Raises ValueError if the text is not valid."""
    text = decode_utf8(content, where, offset=0)
    if rules.zero_is_separator and (at := content.find(0)) >= 0:
        raise ValueError(f"{where} holds a zero byte at offset {at}: where tokens are bytes, it ends a document")
    return text


def read_jsonl(
    stream: IO[bytes], where: str, rules: TextRules, first: int = 0, last: int | None = None
) -> Iterator[tuple[int, str | None]]:
    """Yields (line number, text) for each line that begins at the bytes first to last - 1 of a JSONL file; the first of
    these lines has number 1. A text is None if it is missing and `rules` allow it.

    Blank lines are refused, not skipped; an empty string is a text. stream: the whole file, just opened; if `first` is
    not 0, seekable. Line numbers in errors count from the start of the file.
    """
    offset, number = _next_line(stream, first, last), 0
    while (last is None or offset < last) and (line := stream.readline()):
        number += 1
        try:
            yield number, _parse_line(line, offset, rules)
        except ValueError as error:
            if first:
                stream.seek(0)
                number += _count_lines(stream, _next_line(stream, first, last))
            raise ValueError(f"{where}, line {number}{error}") from error.__cause__
        offset += len(line)


def _parse_line(line: bytes, offset: int, rules: TextRules) -> str | None:
    """Extracts the text of one line. The messages of its errors continue after the line number."""
    text = decode_utf8(line, "", offset)
    if not text.strip():
        raise ValueError(" is blank")
    return extract_text(_parse_json(text), rules)


def _parse_json(text: str) -> Any:
    """Parses JSON. The message of its error continues after the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
        raise ValueError(f" is not valid JSON: {error}") from error


def read_json_array(stream: IO[bytes], where: str, rules: TextRules) -> Iterator[tuple[int, str | None]]:
    """Yields (item number, counted from 1, text) for each object of a file that is one JSON array of objects. A text is
    None if it is missing and `rules` allow it. The whole file is read into memory."""
    text = decode_utf8(stream.read(), where, offset=0)
    try:
        items = _parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}{error}; the format of one object a line is jsonl") from error.__cause__
    if not isinstance(items, list):
        raise ValueError(f"{where} is a JSON {type(items).__name__}, not an array of objects")
    for number, item in enumerate(items, start=1):
        try:
            yield number, extract_text(item, rules)
        except ValueError as error:
            raise ValueError(f"{where}, item {number}{error}") from error


def extract_text(record: Any, rules: TextRules) -> str | None:
    """Returns the text of a parsed JSON object; None if it is missing and `rules` allow it. The messages of its errors
    continue after the place."""
    if not isinstance(record, dict):
        raise ValueError(
            f" is a JSON {type(record).__name__}, not an object with {rules.settings}field {rules.field!r}"
        )
    if rules.field not in record and not rules.skip_missing:
        raise ValueError(
            f" has no field {rules.field!r} ({rules.settings}field), only {list(record)[:10]}{_hint_missing(rules)}"
        )
    return check_text(record.get(rules.field), rules)


def check_text(value: Any, rules: TextRules) -> str | None:
    """Returns `value` if it is valid text; None if it is None and `rules` allow it. Raises ValueError if it is not a
    string, or contains a character that is not allowed."""
    if value is None and rules.skip_missing:
        return None
    if not isinstance(value, str):
        hint = _hint_missing(rules) if value is None else ""
        raise ValueError(f": {rules.named_field} is of type {type(value).__name__}, not a string{hint}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f": {rules.named_field} is not Unicode text: {error.reason}") from error
    if rules.zero_is_separator and (at := value.find("\0")) >= 0:
        what = f"{rules.named_field} holds a zero byte (character {at} of the text)"
        raise ValueError(f": {what}: where tokens are bytes, it ends a document")
    return value


def _hint_missing(rules: TextRules) -> str:
    return f"; {rules.settings}missing=skip leaves out documents without text"


def _next_line(stream: IO[bytes], position: int, last: int | None) -> int:
    """Moves to the first line that begins at `position` or later, if that is not 0, and returns its offset.

    If none begins before `last`, returns `last` or the end of the file, so that no job reads a long line to its end.
    """
    if position == 0:
        return 0
    stream.seek(position - 1)
    stream.readline(-1 if last is None else last - position + 1)
    return stream.tell()


def _count_lines(stream: IO[bytes], end: int) -> int:
    """Counts line ends before byte `end`."""
    stream.seek(0)
    count = 0
    while end > 0 and (chunk := stream.read(min(end, 1 << 20))):
        count, end = count + chunk.count(b"\n"), end - len(chunk)
    return count


def open_parquet(file: Path, where: str) -> Any:
    """Opens a parquet file with pyarrow. Raises ValueError if it is damaged, or if pyarrow is not installed."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{where}: reading parquet needs pyarrow: pip install 'expert-parallel[data]'") from error
    try:
        return ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{where} cannot be read as parquet: {_one_line(error)}") from error


def read_parquet(
    file: Path, where: str, rules: TextRules, first: int = 0, last: int | None = None
) -> Iterator[tuple[int, str | None]]:
    """Yields (row number, text) for each row of the row groups first to last - 1, or of all from `first` on. Rows are
    numbered from 1 over the whole file. A text is None if it is missing and `rules` allow it."""
    from pyarrow import ArrowException

    parquet = open_parquet(file, where)
    names = parquet.schema_arrow.names
    if rules.field not in names:
        raise ValueError(f"{where} has no column {rules.field!r} ({rules.settings}field), only {names[:10]}")
    before = sum(parquet.metadata.row_group(number).num_rows for number in range(first))
    for group in range(first, parquet.metadata.num_row_groups if last is None else last):
        try:
            column = parquet.read_row_group(group, columns=[rules.field]).column(0)
        except (ArrowException, OSError) as error:
            damage = f"row group {group} (from row {before + 1}) is damaged: {_one_line(error)}"
            raise ValueError(f"{where}, {damage}") from error
        for number, value in enumerate(column, start=before + 1):
            try:
                yield number, check_text(value.as_py(), rules)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}, row {number} is not UTF-8: {error.reason} at byte {error.start}") from error
            except ValueError as error:
                raise ValueError(f"{where}, row {number}{error}") from error
        before += len(column)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object. Raises a ValueError of one sentence if it does not, or if an object has a
    key twice, of which JSON readers take different ones."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is not a JSON object")
    return tree


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object as a dict. Raises a ValueError if it has a key twice."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return tree


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
