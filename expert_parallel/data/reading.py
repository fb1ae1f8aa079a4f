"""Reads users' files: text, JSONL, parquet. Errors name the file and the position. It does not import torch."""

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def match_files(paths: list[str], setting: str) -> list[tuple[str, Path]]:
    """Returns (setting that names the file, file) for each file that the glob patterns match: patterns in the order
    given, the matches of each sorted.

    As in a shell, a glob skips hidden files. Folders that it matches are skipped. A file that is matched twice is
    refused: its text could be in both the training and the held-out part.
    """
    found: dict[str, tuple[str, Path]] = {}
    for index, pattern in enumerate(paths):
        name = f"{setting}[{index}]"
        if os.path.isdir(pattern):
            below = os.path.join(pattern, "**", "*.txt")
            raise ValueError(f"{name}: {pattern} is a folder; for the text files in it write {below}")
        # A file whose name holds [ or * is taken by its name.
        matches = [pattern] if os.path.lexists(pattern) else sorted(set(glob.glob(pattern, recursive=True)))
        files = [Path(match) for match in matches if not os.path.isdir(match)]
        if not files:
            raise ValueError(f"{name}: {pattern} matches 0 files (working folder {os.getcwd()})")
        for file in files:
            key = os.path.realpath(file)
            if key in found:
                raise ValueError(f"{name}: {file} is already matched by {found[key][0]} (as {found[key][1]})")
            found[key] = (name, file)
    return list(found.values())


def read_bytes(file: Path, setting: str) -> bytes:
    """Reads a file. Raises ValueError, which names the setting, if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{setting}: {file} cannot be read: {error.strerror}") from error


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


def decode_text_file(content: bytes, where: str, *, zero_is_separator: bool) -> str:
    """Decodes a text file. where: the file, for error messages. zero_is_separator: True if a zero byte ends documents,
    so that no text may contain one. Raises ValueError if the text is not valid."""
    text = decode_utf8(content, where, offset=0)
    if zero_is_separator and (at := content.find(0)) >= 0:
        raise ValueError(f"{where} holds a zero byte at offset {at}: where tokens are bytes, it ends a document")
    return text


def read_jsonl(
    stream: BinaryIO,
    field: str,
    where: str,
    setting: str,
    *,
    zero_is_separator: bool,
    first: int = 0,
    last: int | None = None,
) -> Iterator[tuple[int, str]]:
    """Yields (line number, text) for each line that begins at the bytes first to last - 1 of a JSONL file; the first of
    these lines has number 1.

    Lines without the field and blank lines are refused, not skipped; an empty string is a text. stream: the whole file,
    open. setting: names the field in errors, in which line numbers count from the start of the file. zero_is_separator:
    see decode_text_file.
    """
    offset, number = _next_line(stream, first, last), 0
    while (last is None or offset < last) and (line := stream.readline()):
        number += 1
        try:
            yield number, _parse_line(line, field, setting, offset, zero_is_separator)
        except ValueError as error:
            if first:
                stream.seek(0)
                number += _count_lines(stream, _next_line(stream, first, last))
            raise ValueError(f"{where}, line {number}{error}") from error.__cause__
        offset += len(line)


def _parse_line(line: bytes, field: str, setting: str, offset: int, zero_is_separator: bool) -> str:
    """Extracts the text of one line. The messages of its errors continue after the line number."""
    text = decode_utf8(line, "", offset)
    if not text.strip():
        raise ValueError(" is blank")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
        raise ValueError(f" is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f" is a JSON {type(record).__name__}, not an object with {setting} {field!r}")
    if field not in record:
        raise ValueError(f" has no field {field!r} ({setting}), only {list(record)[:10]}")
    return check_text(record[field], field, setting, zero_is_separator)


def check_text(value: Any, field: str, setting: str, zero_is_separator: bool) -> str:
    """Returns `value` if it is valid text. Raises ValueError if it is not a string, or contains a character that is not
    allowed."""
    if not isinstance(value, str):
        raise ValueError(f": field {field!r} ({setting}) is of type {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f": field {field!r} ({setting}) is not Unicode text: {error.reason}") from error
    if zero_is_separator and (at := value.find("\0")) >= 0:
        what = f"field {field!r} ({setting}) holds a zero byte (character {at} of the text)"
        raise ValueError(f": {what}: where tokens are bytes, it ends a document")
    return value


def _next_line(stream: BinaryIO, position: int, last: int | None) -> int:
    """Seeks to the first line that begins at `position` or later and returns its offset.

    If none begins before `last`, returns `last` or the end of the file, so that no job reads a long line to its end.
    """
    if position == 0:
        return stream.seek(0)
    stream.seek(position - 1)
    stream.readline(-1 if last is None else last - position + 1)
    return stream.tell()


def _count_lines(stream: BinaryIO, end: int) -> int:
    """Counts line ends before byte `end`."""
    stream.seek(0)
    count = 0
    while end > 0 and (chunk := stream.read(min(end, 1 << 20))):
        count, end = count + chunk.count(b"\n"), end - len(chunk)
    return count


def open_parquet(file: Path) -> Any:
    """Opens a parquet file with pyarrow. Raises ValueError if it is damaged, or if pyarrow is not installed."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{file}: reading parquet needs pyarrow: pip install 'expert-parallel[data]'") from error
    try:
        return ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {_one_line(error)}") from error


def read_parquet(file: Path, group: int, field: str, setting: str, *, zero_is_separator: bool) -> Iterator[str]:
    """Yields the texts of one row group. Errors number rows from 1 over the whole file. zero_is_separator: see
    decode_text_file."""
    from pyarrow import ArrowException

    parquet = open_parquet(file)
    names = parquet.schema_arrow.names
    if field not in names:
        raise ValueError(f"{file} has no column {field!r} ({setting}), only {names[:10]}")
    before = sum(parquet.metadata.row_group(number).num_rows for number in range(group))
    try:
        column = parquet.read_row_group(group, columns=[field]).column(0)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file}, row group {group} (from row {before + 1}) is damaged: {_one_line(error)}") from error
    for number, value in enumerate(column, start=before + 1):
        try:
            yield check_text(value.as_py(), field, setting, zero_is_separator)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, row {number} is not UTF-8: {error.reason} at byte {error.start}") from error
        except ValueError as error:
            raise ValueError(f"{file}, row {number}{error}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
