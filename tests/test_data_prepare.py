"""`data prepare` and `data inspect`: what is written, whatever the number of workers; what is refused."""

import gzip
import io
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from expert_parallel.cli.app import app
from expert_parallel.data import inputs
from expert_parallel.data import prepare as module
from expert_parallel.data.formats import InputFile
from expert_parallel.data.indexed import open_indexed_dataset
from expert_parallel.data.prepare import PrepareProgress, prepare
from expert_parallel.data.reading import TextRules
from expert_parallel.data.tokenizer import ByteTokenizer, FileTokenizer, TokensInfo, read_info, train_tokenizer

TEXTS = ["one", "zwei \u2028 ü", "three\nlines\n", "", "vier " * 40, "<|endoftext|> is text here"] * 20


def no_report(progress: PrepareProgress) -> None: ...


def prepared(prefix: Path, *files: Path, **settings: Any) -> TokensInfo:
    said: list[str] = []
    return prepare(str(prefix), [str(file) for file in files], print_message=said.append, report=no_report, **settings)


def documents(prefix: Path) -> list[list[int]]:
    corpus = open_indexed_dataset(str(prefix))
    bounds = [corpus.document_begin(number) for number in range(corpus.num_documents + 1)]
    return [corpus.tokens[begin:end].tolist() for begin, end in itertools.pairwise(bounds)]


def as_bytes(texts: list[str]) -> list[list[int]]:
    return [[*text.encode(), 0] for text in texts if text]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)))
    return path


def write_parquet(path: Path, column: Any, rows: int = 7) -> Path:
    pq.write_table(pa.table({"id": list(range(len(column))), "text": column}), path, row_group_size=rows)
    return path


@pytest.fixture
def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "JOB_BYTES", 100)


# ---------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.usefixtures("small_jobs")
def test_all_formats_hold_the_same_documents(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "d.jsonl", TEXTS)
    parquet = write_parquet(tmp_path / "d.parquet", TEXTS)
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:03}.txt").write_text(text or "not empty", newline="")
    assert prepared(tmp_path / "j", jsonl).num_documents == 100
    assert prepared(tmp_path / "p", parquet).empty_documents_left_out == 20
    prepared(tmp_path / "t", tmp_path / "*.txt")
    assert documents(tmp_path / "j") == documents(tmp_path / "p") == as_bytes(TEXTS)
    assert documents(tmp_path / "t") == as_bytes([text or "not empty" for text in TEXTS])
    prepared(tmp_path / "m", parquet, jsonl, tmp_path / "00?.txt")
    assert documents(tmp_path / "m") == as_bytes(TEXTS) * 2 + documents(tmp_path / "t")[:10]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("job_bytes", [1, 2, 7, 16, 17, 18, 1000])
def test_wherever_a_file_is_cut_no_line_is_lost(
    tmp_path: Path, ending: str, job_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "JOB_BYTES", job_bytes)
    lines = [json.dumps({"text": f"{number}" * (number % 7 + 1)}) for number in range(12)]
    (tmp_path / "d.jsonl").write_bytes(ending.join(lines).encode())  # the last line has no end
    prepared(tmp_path / "o", tmp_path / "d.jsonl")
    assert documents(tmp_path / "o") == as_bytes([f"{number}" * (number % 7 + 1) for number in range(12)])


@pytest.mark.usefixtures("small_jobs")
def test_jobs_in_a_long_line_do_not_read_it_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = [0]

    class Counted(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(size)
            read[0] += len(line)
            return line

    content = json.dumps({"text": "x" * 9000}).encode() + b'\n{"text": "y"}\n'
    (tmp_path / "d.jsonl").write_bytes(content)
    path = tmp_path / "d.jsonl"
    pieces = list(inputs.split_file(InputFile(path, str(path), "jsonl", "none", len(content))))
    rules = TextRules("text", "--", zero_is_separator=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: Counted(content))
        texts = [text for piece in pieces for _, text in inputs.read_documents(piece, rules)]
    assert texts == ["x" * 9000, "y"]
    assert len(pieces) > 90
    assert read[0] < 3 * len(content)


@pytest.mark.usefixtures("small_jobs")
def test_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / "d.jsonl", TEXTS), write_parquet(tmp_path / "d.parquet", TEXTS)]
    (tmp_path / "a.txt").write_text("some text")
    files.append(tmp_path / "e.jsonl.gz")
    files[-1].write_bytes(gzip.compress(files[0].read_bytes()))
    written = []
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        prepared(folder / "o", *files, tmp_path / "a.txt", tokenizer="train:300", workers=workers)
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert set(written[0]) == {"o.bin", "o.idx", "o.json", "o.tokenizer.json"}
    assert written[0] == written[1] == written[2]


def test_the_json(tmp_path: Path) -> None:
    from hashlib import sha256

    files = [write_jsonl(tmp_path / "d.jsonl", TEXTS), write_parquet(tmp_path / "d.parquet", TEXTS)]
    info = prepared(tmp_path / "o", *files)
    assert read_info(str(tmp_path / "o")) == info
    assert info.sha256 == sha256((tmp_path / "o.bin").read_bytes()).hexdigest()
    digests = [sha256(file.read_bytes()).hexdigest() for file in files]
    assert info.sources.sha256 == sha256("".join(digests).encode()).hexdigest()
    assert (info.sources.files, info.sources.bytes) == (2, sum(file.stat().st_size for file in files))
    assert (info.tokenizer, info.vocab_size, info.end_id) == ("bytes", 256, 0)
    assert (info.num_documents, info.num_tokens) == (200, (tmp_path / "o.bin").stat().st_size)


@pytest.mark.usefixtures("small_jobs")
def test_progress_adds_up(tmp_path: Path) -> None:
    seen: list[PrepareProgress] = []
    files = [str(write_jsonl(tmp_path / "d.jsonl", TEXTS)), str(write_parquet(tmp_path / "e.parquet", TEXTS))]
    info = prepare(str(tmp_path / "o"), files, print_message=print, report=seen.append)
    assert len(seen) > 20
    assert all(a.bytes_done <= b.bytes_done and a.num_tokens <= b.num_tokens for a, b in itertools.pairwise(seen))
    assert (seen[-1].num_documents, seen[-1].num_tokens) == (info.num_documents, info.num_tokens)
    assert seen[-1].bytes_done == seen[-1].total_bytes


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_a_tokenizer_trained_on_the_spot(tmp_path: Path) -> None:
    info = prepared(tmp_path / "o", write_jsonl(tmp_path / "d.jsonl", TEXTS), tokenizer="train:300")
    assert info.tokenizer == "o.tokenizer.json"
    assert 257 < info.vocab_size <= 300
    tokenizer = FileTokenizer(tmp_path / "o.tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.end_id) == (info.vocab_size, info.end_id)
    found = documents(tmp_path / "o")
    assert all(document[-1] == info.end_id and info.end_id not in document[:-1] for document in found)
    assert [tokenizer.decode(document[:-1]) for document in found] == [text for text in TEXTS if text]
    assert info.num_tokens < sum(len(text.encode()) + 1 for text in TEXTS) * 0.6
    # And again with it, as a file that was there before.
    again = prepared(tmp_path / "again", tmp_path / "d.jsonl", tokenizer=str(tmp_path / "o.tokenizer.json"))
    assert again.tokenizer_sha256 == info.tokenizer_sha256
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "o.bin").read_bytes()


def test_what_a_tokenizer_file_adds_or_cuts_is_left_out(tmp_path: Path) -> None:
    """Special tokens around a text, truncation and padding would change documents in silence."""
    train_tokenizer(TEXTS, 300, tmp_path / "t.json")
    plain = FileTokenizer(tmp_path / "t.json")
    raw = Tokenizer.from_file(str(tmp_path / "t.json"))
    raw.add_special_tokens(["<s>", "</s>"])
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    from tokenizers.processors import TemplateProcessing

    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    raw.save(str(tmp_path / "u.json"))
    spoilt = FileTokenizer(tmp_path / "u.json", "</s>")
    for text in ("three\nlines\n", "<s> <|endoftext|></s>"):
        assert spoilt.encode(text) == plain.encode(text)
        assert plain.decode(plain.encode(text)) == text
    assert spoilt.vocab_size == plain.vocab_size + 2
    assert (plain.end_id, spoilt.end_id) == (0, raw.token_to_id("</s>"))


def test_end_token_of_deepseek(tmp_path: Path) -> None:
    """As in the tokenizer.json of DeepSeek-V3: U+FF5C where others have |, and U+2581 for blanks."""
    from tokenizers.models import WordLevel

    end = "<\N{FULLWIDTH VERTICAL LINE}end\N{LOWER ONE EIGHTH BLOCK}of\N{LOWER ONE EIGHTH BLOCK}sentence"
    end += "\N{FULLWIDTH VERTICAL LINE}>"
    Tokenizer(WordLevel({"a": 0, end: 1}, unk_token="a")).save(str(tmp_path / "t.json"))
    assert FileTokenizer(tmp_path / "t.json").end_id == 1


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.decode([97, 195, 169, 195]) == "aé\ufffd"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and that nothing is left behind


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def refused(folder: Path, *arguments: Any, workers: int = 1) -> str:
    before = sorted(folder.iterdir())
    result = invoke("prepare", folder / "out", *arguments, "--workers", workers)
    assert result.exit_code == 2, result.output
    assert sorted(folder.iterdir()) == before
    assert result.stderr.startswith("error: ")
    line: str = result.stderr.splitlines()[-1]
    return line


@pytest.mark.usefixtures("small_jobs")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{'text': 1}", ["is not valid JSON"]),
        (b"", ["is blank"]),
        (b'["text"]', ["is a JSON list, not an object", "--field", "'text'"]),
        (b'{"body": "x"}', ["has no field 'text'", "--field", "body"]),
        (b'{"text": 5}', ["is of type int, not a string"]),
        (b'{"text": "\\ud800"}', ["is not Unicode text"]),
        (b'{"text": "caf\xe9"}', ["is not UTF-8", "byte 0xe9 at offset 693"]),
        (b'{"text": "cut o', ["is not valid JSON"]),
    ],
)
def test_a_wrong_line_far_into_a_file(tmp_path: Path, line: bytes, words: list[str]) -> None:
    """The number of the line counts from the file's beginning, though a job begins in its middle."""
    content = b'{"text": "good"}\n' * 40 + line + b"\n"
    (tmp_path / "d.jsonl").write_bytes(content)
    message = refused(tmp_path, tmp_path / "d.jsonl")
    for word in ["d.jsonl, line 41", *words]:
        assert word in message, f"{word!r} is not in: {message}"


@pytest.mark.usefixtures("small_jobs")
def test_a_zero_byte_would_end_a_document_of_bytes(tmp_path: Path) -> None:
    texts = ["good"] * 40 + ["one\0two"]
    (tmp_path / "a.txt").write_bytes(b"one\0two")
    write_jsonl(tmp_path / "b.jsonl", texts)
    write_parquet(tmp_path / "c.parquet", texts)
    of_field = (
        "field 'text' (--field) holds a zero byte (character 3 of the text): where tokens are bytes, it ends a doc"
    )
    assert "a.txt holds a zero byte at offset 3: where tokens are bytes" in refused(tmp_path, tmp_path / "a.txt")
    assert f"b.jsonl, line 41: {of_field}" in refused(tmp_path, tmp_path / "b.jsonl")
    assert f"c.parquet, row 41: {of_field}" in refused(tmp_path, tmp_path / "c.parquet")
    info = prepared(
        tmp_path / "o", *(tmp_path / name for name in ("a.txt", "b.jsonl", "c.parquet")), tokenizer="train:300"
    )
    assert info.num_documents == 83
    assert all(document.count(info.end_id) == 1 for document in documents(tmp_path / "o"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + b'{"text": "good"}\n')
    message = refused(tmp_path, tmp_path / name)
    assert f"{name}" in message
    assert message.endswith(" begins with a byte order mark: save the file as UTF-8 without BOM")


def test_a_worker_says_what_is_wrong(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    message = refused(tmp_path, tmp_path / "*.jsonl", workers=2)
    assert message.endswith("d.jsonl, line 2 is not UTF-8: byte 0xe9 at offset 30 (invalid continuation byte)")


def spoilt_parquet(folder: Path) -> Path:
    """Text that claims to be UTF-8."""
    column = pa.array([b"good"] * 8 + [b"caf\xe9"]).cast(pa.binary()).view(pa.string())
    return write_parquet(folder / "d.parquet", column)


def cut_parquet(folder: Path) -> Path:
    path = write_parquet(folder / "d.parquet", TEXTS)
    path.write_bytes(path.read_bytes()[:-30])
    return path


def damaged_parquet(folder: Path) -> Path:
    path = write_parquet(folder / "d.parquet", [f"text {number}" * 9 for number in range(21)])
    content = bytearray(path.read_bytes())
    begin = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    content[begin : begin + 20] = b"\xff" * 20
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: write_parquet(folder / "d.parquet", ["a"] * 8 + [None]), ["row 9", "is of type NoneType"]),
        (lambda folder: write_parquet(folder / "d.parquet", list(range(9))), ["row 1", "is of type int, not a string"]),
        (spoilt_parquet, ["row 9 is not UTF-8", "at byte 3"]),
        (cut_parquet, ["cannot be read as parquet"]),
        (damaged_parquet, ["row group 1 (from row 8) is damaged"]),
        (lambda folder: write_parquet(folder / "d.parquet", pa.array([], pa.string())), ["is empty (0 rows)"]),
    ],
)
def test_wrong_parquet(tmp_path: Path, make: Callable[[Path], Path], words: list[str]) -> None:
    message = refused(tmp_path, make(tmp_path))
    for word in ["d.parquet", *words]:
        assert word in message, f"{word!r} is not in: {message}"
    assert "has no column 'body' (--field), only ['id', 'text']" in refused(
        tmp_path, write_parquet(tmp_path / "e.parquet", ["a"]), "--field", "body"
    )


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = write_parquet(tmp_path / "d.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'expert-parallel[data]'" in refused(tmp_path, path)


def test_wrong_files_and_arguments(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("un café".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    good = tmp_path / "good.txt"
    assert "empty.txt is empty (0 bytes)" in refused(tmp_path, good, tmp_path / "empty.txt")
    assert "latin.txt is not UTF-8: byte 0xe9 at offset 6" in refused(tmp_path, good, tmp_path / "latin.txt")
    assert "FILES[1]" in refused(tmp_path, good, tmp_path / "none.txt")
    assert "is a folder" in refused(tmp_path, tmp_path / "folder")
    assert "already matched" in refused(tmp_path, good, good)
    assert "--format is 'csv'" in refused(tmp_path, good, "--format", "csv")
    assert "train:10: the size must be a number from 257" in refused(tmp_path, good, "--tokenizer", "train:10")
    assert "train:many" in refused(tmp_path, good, "--tokenizer", "train:many")
    assert "--end-token is given but --tokenizer is bytes" in refused(tmp_path, good, "--end-token", "</s>")
    assert "none.json" in refused(tmp_path, good, "--tokenizer", tmp_path / "none.json")
    assert "is not a tokenizer.json" in refused(tmp_path, good, "--tokenizer", good)
    train_tokenizer(TEXTS, 300, tmp_path / "t.json")
    message = refused(tmp_path, good, "--tokenizer", tmp_path / "t.json", "--end-token", "</s>")
    assert message == f"error: {tmp_path}/t.json has no token '</s>' to end documents with"
    text = (tmp_path / "t.json").read_text().replace("<|endoftext|>", "<|fin|>")
    (tmp_path / "u.json").write_text(text)
    assert "no known token that ends a document: use --end-token" in refused(
        tmp_path, good, "--tokenizer", tmp_path / "u.json"
    )
    assert "4 documents, all of them without text" in refused(tmp_path, write_jsonl(tmp_path / "n.jsonl", [""] * 4))
    result = invoke("prepare", tmp_path / "no" / "out", good)
    assert f"there is no folder {tmp_path}/no" in result.stderr
    slash = invoke("prepare", f"{tmp_path}/", good)
    assert slash.exit_code == 2
    assert f"the prefix {tmp_path}/ ends in a slash" in slash.stderr
    assert invoke("prepare", tmp_path / "out", good).exit_code == 0
    assert "out.bin and" in refused(tmp_path, good)
    assert "exists already" in refused(tmp_path, good)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "good.txt").write_text("good")
    monkeypatch.setattr(module.os, "fsync", full)
    assert refused(tmp_path, tmp_path / "good.txt").endswith("out cannot be written: No space left on device")


def test_an_input_that_cannot_be_read_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be when the command began."""
    open_file = Path.open

    def deny(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == "good.txt":
            raise PermissionError(13, "Permission denied", str(path))  # a chmod would not stop root
        return open_file(path, *arguments, **named)

    (tmp_path / "good.txt").write_text("good")
    monkeypatch.setattr(Path, "open", deny)
    message = refused(tmp_path, tmp_path / "good.txt")
    assert message == f"error: FILES[0]: {tmp_path}/good.txt cannot be read: Permission denied"


def test_two_commands_with_one_prefix(tmp_path: Path) -> None:
    """The quicker one's files stay whole; the other's are removed."""

    def slower() -> None:
        with module.atomic_outputs(str(tmp_path / "o")) as first:
            first(".bin").write_text("first")
            with module.atomic_outputs(str(tmp_path / "o")) as second:
                second(".bin").write_text("second")
            assert first(".bin").read_text() == "first"

    with pytest.raises(ValueError, match=r"o\.bin exists already"):
        slower()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"o.bin": "second"}


def test_names_are_given_to_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail_for_index(path: Path, target: Path) -> Path:
        if target.suffix == ".idx":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    (tmp_path / "good.txt").write_text("good")
    monkeypatch.setattr(Path, "rename", fail_for_index)
    assert refused(tmp_path, tmp_path / "good.txt").endswith("out cannot be written: Input/output error")


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def test_what_the_commands_print(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", TEXTS)
    result = invoke("prepare", tmp_path / "o", tmp_path / "d.jsonl", "--tokenizer", "train:300", "--workers", "2")
    assert result.exit_code == 0, result.output
    assert "training a tokenizer of 300 tokens on " in result.stderr
    pattern = (
        r"o: 100 documents, [\d,]+ tokens of \d+, from [\d,]+ bytes in 1 files; [\d.]+ s, [\d,]+ tokens/s; 20 empty"
    )
    assert re.search(pattern, result.stdout)
    assert "data='{kind: tokens, corpora: [{path: " in result.stdout
    shown = invoke("inspect", tmp_path / "o", "--verify", "--tokens", "4")
    assert shown.exit_code == 0, shown.output
    for line in (
        "documents   100\n",
        "ends a document\n",
        "lengths     ",
        "sha256      ",
        "verified    sha256, ids up to",
    ):
        assert line in shown.stdout
    (tmp_path / "o.json").unlink()
    assert "there is no o.json to compare with" in invoke("inspect", tmp_path / "o", "--verify").stdout


def test_inspect_finds_damage(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", TEXTS)
    prepared(tmp_path / "o", tmp_path / "d.jsonl")
    content = bytearray((tmp_path / "o.bin").read_bytes())
    content[5] ^= 1
    (tmp_path / "o.bin").write_bytes(content)
    assert invoke("inspect", tmp_path / "o").exit_code == 0
    result = invoke("inspect", tmp_path / "o", "--verify")
    assert result.exit_code == 2
    assert "o.bin has sha256" in result.stderr
    (tmp_path / "o.bin").write_bytes(content[:-1])
    assert f"o.bin has {len(content) - 1} bytes" in invoke("inspect", tmp_path / "o").stderr


def test_lengths_by_hand(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", ["a" * length for length in (1, 3, 3, 9)])
    prepared(tmp_path / "o", tmp_path / "d.jsonl")
    shown = invoke("inspect", tmp_path / "o").stdout
    assert "lengths     2 to 10 tokens, median 4, mean 5.0" in shown
    assert np.array_equal(open_indexed_dataset(str(tmp_path / "o")).lengths, [2, 4, 4, 10])
