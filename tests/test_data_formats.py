"""How input files are recognised and read, by `data prepare` and by `data.kind: files` alike: formats, compression,
missing texts, empty files; and what is refused, by name and by content."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from expert_parallel.cli.app import app
from expert_parallel.data import inputs
from expert_parallel.data.config import FilesData
from expert_parallel.data.formats import find_inputs
from expert_parallel.data.indexed import open_indexed_dataset
from expert_parallel.data.prepare import prepare
from expert_parallel.data.text import SOURCES, load_corpus
from expert_parallel.data.tokenizer import TokensInfo

TEXTS = [f"document number {number} \u00fc" for number in range(40)]
RECORDS: list[dict[str, Any]] = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
CUT = LINES.index(b"\n", 500) + 1
ARRAY = json.dumps(RECORDS, indent=1).encode()


def zstd(content: bytes) -> bytes:
    compressed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return compressed


def parquet(texts: list[str | None]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), stream, row_group_size=7)
    return stream.getvalue()


def archive(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as zipped:
            zipped.writestr("a.txt", "text")
        return stream.getvalue()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = len(LINES)
        tar.addfile(member, io.BytesIO(LINES))
    return stream.getvalue()


def str_or_type(value: Any) -> str:
    """A test's name: bytes have none that is readable and the same in every process."""
    return value if isinstance(value, str) else type(value).__name__


def prepared(out: Path, *files: Path, **settings: Any) -> TokensInfo:
    names = [str(file) for file in files]
    return prepare(str(out), names, print_message=lambda text: None, report=lambda progress: None, **settings)


def documents(prefix: Path) -> list[str]:
    return open_indexed_dataset(str(prefix)).tokens.tobytes().decode().split("\0")[:-1]


def files(*paths: Path, **settings: Any) -> FilesData:
    return FilesData(kind="files", paths=[str(path) for path in paths], **settings)


def refused(file: Path, *words: str, **settings: Any) -> None:
    """Both ways of reading refuse the file, each in the words of its own settings, and nothing is written."""
    before = sorted(file.parent.iterdir())
    for call, names in (
        (lambda: prepared(file.parent / "out", file, **settings), ("FILES[0]", "--")),
        (lambda: load_corpus(files(file, **settings)), ("data.paths[0]", "data.")),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are looked at
            call()
        message = str(caught.value)
        assert message.startswith(f"{names[0]}: {file}")
        assert "\n" not in message
        for word in words:
            assert word.replace("OPTION.", names[1]) in message, f"{word!r} is not in: {message}"
    assert sorted(file.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("windows.json", LINES.replace(b"\n", b"\r\n")),
        ("array.json", ARRAY),
        ("a.parquet", parquet(list(TEXTS))),
        ("A.JSONL.GZ", gzip.compress(LINES)),
        ("c4.00000-of-01024.json.gz", gzip.compress(LINES)),
        ("members.jsonl.gz", gzip.compress(LINES[:CUT]) + gzip.compress(LINES[CUT:])),
        ("a.jsonl.zst", zstd(LINES)),
        ("frames.jsonl.zst", zstd(LINES[:CUT]) + zstd(LINES[CUT:])),
        ("array.json.zst", zstd(ARRAY)),
    ],
    ids=str_or_type,
)
def test_every_format_holds_the_same_documents(
    tmp_path: Path, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "JOB_BYTES", 100)
    (tmp_path / name).write_bytes(content)
    prepared(tmp_path / "out", tmp_path / name)
    assert documents(tmp_path / "out") == TEXTS
    assert [d.content.decode() for d in SOURCES["files"](files(tmp_path / name))] == TEXTS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("brace.txt", "{ begins with a brace\n"),
        ("front.md", '{"title": "front matter"}\n\n# Text\n'),
        ("prose.txt", '{"a": 1} and prose\nmore\n'),
        ("long.txt", "{" + "x" * 100_000),
        ("bracket", "[1] a footnote"),
        ("dict.py", "{}\n"),
        ("page.html", "<html>"),
        ("latex.tex", r"{\bf bold}"),
    ],
)
def test_what_merely_looks_like_json_is_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.txt.zst").write_bytes(zstd(text.encode()))
    for file in (name, "a.txt.gz", "a.txt.zst"):
        assert [d.content.decode() for d in SOURCES["files"](files(tmp_path / file))] == [text]


def test_a_tree_of_sources_is_text(tmp_path: Path) -> None:
    """Empty files, as __init__.py often is, are left out and counted."""
    for name, text in {"__init__.py": "", "a.py": "{'a': 1}\n", "b/__init__.py": "", "b/c.py": "x = [1]\n"}.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(text)
    info = prepared(tmp_path / "out", tmp_path / "src" / "**" / "*.py")
    assert documents(tmp_path / "out") == ["{'a': 1}\n", "x = [1]\n"]
    assert (info.empty_files_left_out, info.sources.files) == (2, 2)
    assert info.describe_left_out() == "; 2 empty files left out"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", LINES, ["is JSON Lines by its content only: set OPTION.format=jsonl, or set OPTION.format=text"]),
        ("a", LINES, ["is JSON Lines by its content only"]),
        ("a.txt", LINES[: LINES.index(b"\n")], ["is JSON Lines by its content only"]),
        ("one_line", json.dumps({"text": "x" * 100_000}).encode(), ["is JSON Lines by its content only"]),
        ("a.txt", ARRAY, ["is a JSON array of objects by its content only: set OPTION.format=json"]),
        ("a.ipynb", json.dumps({"cells": []}, indent=1).encode(), ["is a JSON object by its content only"]),
        ("big", json.dumps({"a": ["x"] * 20_000}, indent=1).encode(), ["is a JSON object by its content only"]),
        ("a.json", b'{\n "a": 1\n}\n', ["is JSON by its name", "neither one object a line nor", "OPTION.format=text"]),
        ("a.json", b'"text"', ["is JSON by its name"]),
        ("a.json", b"[1]", ["item 1 is a JSON int, not an object with OPTION.field 'text'"]),
        ("a.json", b'[{"text": "a"}, {"body": "b"}]', ["item 2 has no field 'text' (OPTION.field), only ['body']"]),
        ("a.json", b'[{"text": "a"}]\n[{"text": "a"}]', ["is not valid JSON: Extra data"]),
        ("a.csv", b"text\na\n", ["is a table by its name", "OPTION.format=text"]),
        ("a.tsv.gz", gzip.compress(b"text\tid\n"), ["is a table by its name"]),
        ("a.txt", parquet(["a"]), ["is a parquet file by its content only: set OPTION.format=parquet"]),
        ("a.parquet.gz", gzip.compress(parquet(["a"])), ["is a compressed parquet file: decompress it"]),
        ("a.parquet", LINES, ["cannot be read as parquet"]),
        ("a.txt", gzip.compress(b"text"), ["is compressed with gzip, but its name does not say so", "OPTION.format"]),
        ("a.jsonl.gz", LINES, ["is not compressed, but its name ends in .gz"]),
        ("a.txt.gz", zstd(b"text"), ["is compressed with zstd, but its name ends in .gz"]),
        ("a.jsonl.gz", gzip.compress(gzip.compress(LINES)), ["is compressed twice"]),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], ["cannot be decompressed as gzip", "ended before"]),
        ("a.txt.gz", gzip.compress(b"text")[:5], ["cannot be decompressed as gzip"]),
        ("a.jsonl.gz", gzip.compress(LINES)[:60] + b"\0" * 900, ["cannot be decompressed as gzip"]),
        ("a.jsonl.zst", zstd(LINES)[:-9], ["cannot be decompressed as zstd: Truncated"]),
        ("a.txt", archive("zip"), ["is a zip archive"]),
        ("a.tar", archive("tar"), ["is a tar archive"]),
        ("a.tgz", gzip.compress(archive("tar")), ["is a tar archive"]),
        ("a.txt.bz2", bz2.compress(LINES), ["is compressed with bzip2"]),
        ("a.txt.xz", lzma.compress(LINES), ["is compressed with xz"]),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["is a PNG image"]),
        ("a.txt", b"%PDF-1.4\nascii\n", ["is a PDF document, which OPTION.format=auto does not read"]),
        ("a.txt", "text".encode("utf-16"), ["is UTF-16 text"]),
        ("a.txt", "text".encode("utf-16-le"), ["is binary, or UTF-16 text"]),
        ("a.bin", bytes(100), ["is binary, or UTF-16 text"]),
        ("a.json", b"\xef\xbb\xbf" + LINES, ["begins with a byte order mark"]),
    ],
    ids=str_or_type,
)
def test_what_is_unclear_is_refused(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, *words)


def test_a_pipe_or_a_device_is_refused(tmp_path: Path) -> None:
    """What is read of a pipe to recognise it could not be read again."""
    (tmp_path / "null.txt").symlink_to("/dev/null")
    refused(tmp_path / "null.txt", "is a pipe or a device")


def test_a_format_that_is_given_holds_for_any_name(tmp_path: Path) -> None:
    """Compression shows in the content alone: no text begins so."""
    (tmp_path / "a.csv").write_bytes(LINES)
    (tmp_path / "b.txt").write_bytes(gzip.compress(ARRAY))
    (tmp_path / "c.jsonl").write_bytes(parquet(list(TEXTS)))
    for name, format in (("a.csv", "jsonl"), ("b.txt", "json"), ("c.jsonl", "parquet")):
        assert [d.content.decode() for d in SOURCES["files"](files(tmp_path / name, format=format))] == TEXTS
    assert [d.content for d in SOURCES["files"](files(tmp_path / "a.csv", format="text"))] == [LINES]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n{"text": ""}\n{"id": 4}\n', "line"),
        ("a.json", b'[{"text": "a"}, {"text": null}, {"text": ""}, {"id": 4}]', "item"),
        ("a.parquet", parquet(["a", None, "", None]), "row"),
    ],
    ids=str_or_type,
)
def test_missing_texts(tmp_path: Path, name: str, content: bytes, place: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    refused(file, f"{place} 2: field 'text' (OPTION.field) is of type NoneType, not a string; OPTION.missing=skip")
    arguments = ["data", "prepare", str(tmp_path / "out"), str(file)]
    result = CliRunner().invoke(app, [*arguments, "--missing", "skip"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].endswith("; 1 empty documents left out; 2 missing texts left out")
    assert documents(tmp_path / "out") == ["a"]
    assert "2 missing texts left out" in CliRunner().invoke(app, ["data", "inspect", str(tmp_path / "out")]).stdout
    corpus = load_corpus(files(file, missing="skip"))
    assert (corpus.num_documents, bytes([*corpus.train, *corpus.held_out])) == (1, b"a")
    assert corpus.description.endswith("; 3 empty files or missing texts left out")
    wrong = CliRunner().invoke(app, [*arguments, "--missing", "drop"])
    assert "--missing is 'drop', it must be one of error, skip" in wrong.stderr
    wrong_field = "has no column 'body'" if place == "row" else "hold 4 documents, all of them without text"
    with pytest.raises(ValueError, match=wrong_field):
        load_corpus(files(file, missing="skip", field="body"))


def test_parquet_without_rows_in_a_glob_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "part0.parquet").write_bytes(parquet([]))
    (tmp_path / "part1.parquet").write_bytes(parquet(["a"]))
    assert prepared(tmp_path / "out", tmp_path / "part*.parquet").empty_files_left_out == 1
    refused(tmp_path / "part0.parquet", "is empty (0 rows)")


def test_a_compressed_file_is_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "JOB_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    found, _ = find_inputs([str(tmp_path / "*")], "FILES", "auto", "--format")
    jobs = list(inputs.split_into_jobs(found))
    assert [len(job) for job in jobs] == [1] * (-(-len(LINES) // 100) + 1)
    prepared(tmp_path / "out", tmp_path / "*")
    assert documents(tmp_path / "out") == TEXTS * 2


@pytest.mark.parametrize("make", [zstd, parquet])
def test_without_pyarrow(tmp_path: Path, make: Callable[[Any], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    name = "a.jsonl.zst" if make is zstd else "a.parquet"
    (tmp_path / name).write_bytes(make(LINES if make is zstd else ["a"]))
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'expert-parallel\[data\]'"):
        prepared(tmp_path / "out", tmp_path / name)
