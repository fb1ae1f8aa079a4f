"""Megatron's indexed format: bytes written by hand from its layout, and every way in which files can be wrong."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_parallel.data.indexed import DTYPES, open_indexed_dataset, smallest_dtype, write_index

# Three documents of 2 + 1, 4 and 1 tokens, the first of two sequences; as megatron-core's IndexedDatasetBuilder wrote
# it (0.16.1, dtype uint16: add_document([7, 8, 9], [2, 1]), add_document([1, 2, 3, 4], [4]), add_document([500], [1])).
BIN = struct.pack("<8H", 7, 8, 9, 1, 2, 3, 4, 500)
HEADER = b"MMIDIDX\x00\x00" + b"\x01\0\0\0\0\0\0\0" + b"\x08" + b"\x04\0\0\0\0\0\0\0" + b"\x04\0\0\0\0\0\0\0"
LENGTHS = struct.pack("<4i", 2, 1, 4, 1)
BEGINS = struct.pack("<4q", 0, 4, 6, 14)
DOCUMENTS = struct.pack("<4q", 0, 2, 3, 4)
IDX = HEADER + LENGTHS + BEGINS + DOCUMENTS


def written(folder: Path, index: bytes = IDX, data: bytes = BIN) -> str:
    (folder / "c.idx").write_bytes(index)
    (folder / "c.bin").write_bytes(data)
    return str(folder / "c")


def refused(prefix: str, *words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are looked at
        open_indexed_dataset(prefix)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def test_bytes_by_hand_are_read(tmp_path: Path) -> None:
    corpus = open_indexed_dataset(written(tmp_path))
    assert corpus.tokens.tolist() == [7, 8, 9, 1, 2, 3, 4, 500]
    assert corpus.tokens.dtype == np.uint16
    assert (corpus.num_documents, corpus.num_tokens) == (3, 8)
    assert [corpus.document_begin(number) for number in range(4)] == [0, 3, 7, 8]
    assert isinstance(corpus.tokens, np.memmap)
    assert isinstance(corpus.begins, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1


def test_bytes_by_hand_are_written(tmp_path: Path) -> None:
    write_index(tmp_path / "w.idx", np.uint16, np.array([3, 4, 1], np.int32))
    assert (tmp_path / "w.idx").read_bytes() == (
        HEADER[:18]
        + struct.pack("<2Q", 3, 4)
        + struct.pack("<3i", 3, 4, 1)
        + struct.pack("<3q", 0, 6, 14)
        + struct.pack("<4q", 0, 1, 2, 3)
    )


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype(tmp_path: Path, code: int) -> None:
    values = np.array([1, 2, 100], DTYPES[code])
    write_index(tmp_path / "c.idx", DTYPES[code], np.array([2, 1], np.int32))
    assert (tmp_path / "c.idx").read_bytes()[17] == code
    (tmp_path / "c.bin").write_bytes(values.tobytes())
    assert open_indexed_dataset(str(tmp_path / "c")).tokens.tolist() == [1, 2, 100]


def test_the_smallest_dtype() -> None:
    assert [smallest_dtype(size) for size in (2, 256, 257, 65499, 65500, 2**20)] == [
        *[np.uint8] * 2,
        *[np.uint16] * 2,
        *[np.int32] * 2,
    ]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20), held_out=st.floats(0.001, 0.499))
def test_whole_documents_are_held_out(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], held_out: float
) -> None:
    folder = tmp_path_factory.mktemp("c")
    write_index(folder / "c.idx", np.uint8, np.array(lengths, np.int32))
    (folder / "c.bin").write_bytes(bytes(sum(lengths)))
    begin, total = open_indexed_dataset(str(folder / "c")).held_out_begin(held_out), sum(lengths)
    begins = [sum(lengths[:number]) for number in range(len(lengths))]
    fewest = max(b for b in begins if total - b >= held_out * total)
    if 2 * (total - fewest) > total:
        assert total - begin == int(np.ceil(held_out * total))
    else:
        assert begin == fewest


def replaced(content: bytes, offset: int, value: bytes) -> bytes:
    return content[:offset] + value + content[offset + len(value) :]


@pytest.mark.parametrize(
    ("index", "data", "words"),
    [
        (IDX, BIN[:-1], ["c.bin has 15 bytes", "says 16"]),
        (IDX, BIN + b"\0\0", ["c.bin has 18 bytes", "says 16"]),
        (IDX, b"", ["c.bin has 0 bytes", "says 16"]),
        (b"", BIN, ["c.idx is truncated: it has 0 bytes", "34"]),
        (IDX[:20], BIN, ["c.idx is truncated: it has 20 bytes", "34"]),
        (IDX[:-3], BIN, [f"c.idx has {len(IDX) - 3} bytes", "4 sequences and 4 document entries", f"take {len(IDX)}"]),
        (IDX + b"\0" * 5, BIN, [f"c.idx has {len(IDX) + 5} bytes", f"take {len(IDX)}"]),
        (IDX + b"\0" * 4, BIN, ["a mode for each of 4 sequences", "multimodal"]),
        (replaced(IDX, 0, b"X"), BIN, ["c.idx is not a Megatron index", "XMIDIDX"]),
        (replaced(IDX, 9, b"\2"), BIN, ["version 2 (byte 9)", "version 1"]),
        (replaced(IDX, 17, b"\7"), BIN, ["code 7", "(byte 17)", "[1, 2, 3, 4, 5, 8]"]),
        (replaced(IDX, 17, b"\4"), BIN, ["sequence 1 of 4", "from byte 4", "begin at byte 8"]),
        (
            HEADER + LENGTHS + struct.pack("<4q", 0, 4, 8, 14) + DOCUMENTS,
            BIN,
            ["sequence 2 of 4 has 4 tokens from byte 8", "byte 6"],
        ),
        (
            HEADER + LENGTHS + struct.pack("<4q", 0, 6, 4, 14) + DOCUMENTS,
            BIN,
            ["sequence 1 of 4", "from byte 6", "byte 4"],
        ),
        (
            HEADER + LENGTHS + struct.pack("<4q", 0, 4, 6, 99) + DOCUMENTS,
            BIN,
            ["sequence 3 of 4", "from byte 99", "byte 14"],
        ),
        (HEADER + struct.pack("<4i", 2, 1, -4, 1) + BEGINS + DOCUMENTS, BIN, ["sequence 2 of 4 has -4 tokens"]),
        (HEADER + LENGTHS + BEGINS + struct.pack("<4q", 0, 3, 2, 4), BIN, ["document 2 begins with sequence 2", "3"]),
        (HEADER + LENGTHS + BEGINS + struct.pack("<4q", 0, 2, 9, 4), BIN, ["document 2 begins with sequence 9 of 4"]),
        (HEADER + LENGTHS + BEGINS + struct.pack("<4q", 1, 2, 3, 4), BIN, ["document 0 begins with sequence 1"]),
        (HEADER + LENGTHS + BEGINS + struct.pack("<4q", -1, 2, 3, 4), BIN, ["document 0 begins with sequence -1"]),
        (HEADER + LENGTHS + BEGINS + struct.pack("<4q", 0, 1, 2, 3), BIN, ["end with sequence 3 of 4"]),
        (HEADER[:18] + struct.pack("<2Q", 0, 1) + struct.pack("<q", 0), b"", ["c.idx is empty", "0 sequences"]),
        (HEADER[:18] + struct.pack("<2Q", 1, 0) + struct.pack("<iq", 1, 0), b"ab", ["c.idx is empty", "no document"]),
        (HEADER[:18] + struct.pack("<2Q", 1, 2) + struct.pack("<iqqq", 0, 0, 0, 1), b"", ["c.bin is empty"]),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, index: bytes, data: bytes, words: list[str]) -> None:
    refused(written(tmp_path, index, data), *words)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    refused(str(tmp_path / "c"), "there is no file", "c.idx and no file", "c.bin")
    prefix = written(tmp_path)
    refused(prefix + ".bin", "give the path without .bin or .idx")
    (tmp_path / "c.bin").unlink()
    refused(prefix, "there is no file", "c.bin, though", "c.idx is there")
    written(tmp_path)
    (tmp_path / "c.idx").unlink()
    refused(prefix, "there is no file", "c.idx, though", "c.bin is there")


def test_a_wrong_sequence_is_found_in_every_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expert_parallel.data import indexed

    monkeypatch.setattr(indexed, "CHUNK", 3)
    lengths = np.arange(1, 12, dtype=np.int32)
    write_index(tmp_path / "c.idx", np.uint8, lengths)
    (tmp_path / "c.bin").write_bytes(bytes(int(lengths.sum())))
    good = (tmp_path / "c.idx").read_bytes()
    assert open_indexed_dataset(str(tmp_path / "c")).num_tokens == 66
    for place in range(11):
        (tmp_path / "c.idx").write_bytes(replaced(good, 34 + 4 * 11 + 8 * place, struct.pack("<q", 70)))
        refused(str(tmp_path / "c"), f"sequence {place} of 11", "from byte 70")
    for place in range(1, 11):
        (tmp_path / "c.idx").write_bytes(replaced(good, 34 + 12 * 11 + 8 * place, struct.pack("<q", place - 2)))
        refused(str(tmp_path / "c"), f"document {place} begins with sequence {place - 2} of 11")


def test_opening_reads_the_index_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of 64 GiB, more than the machine may have: mapped, never read."""
    length = 1 << 30
    write_index(tmp_path / "c.idx", np.int32, np.full(16, length, np.int32))
    with (tmp_path / "c.bin").open("wb") as stream:
        stream.truncate(16 * length * 4)
    corpus = open_indexed_dataset(str(tmp_path / "c"))
    assert corpus.num_tokens == 16 * length
    assert corpus.held_out_begin(0.05) == 15 * length
    assert corpus.tokens[15 * length : 15 * length + 4].tolist() == [0] * 4
