"""Reads and writes token files in Megatron's indexed format: PREFIX.bin holds token ids, PREFIX.idx the index.

PREFIX.idx, little-endian, as megatron/core/datasets/indexed_dataset.py reads and writes it:

    9 bytes    b"MMIDIDX" and two zeros
    uint64     version: 1
    uint8      code of the tokens' dtype (DTYPES)
    uint64     N: sequences
    uint64     M: documents + 1
    int32 N    tokens of each sequence (sequence_lengths)
    int64 N    byte of PREFIX.bin at which each sequence begins (sequence_pointers); there are no gaps
    int64 M    sequence at which each document begins, then N (document_indices); mostly one sequence per document

Files are memory-mapped; opening reads the index only.
"""

import bisect
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK = 1 << 20  # sequences checked at a time


@dataclass(frozen=True, eq=False)
class IndexedDataset:
    """Holds a memory-mapped corpus in Megatron's format, in which a document consists of one or more sequences.

    tokens: all token ids, concatenated. lengths: the number of tokens of each sequence. begins: the byte of PREFIX.bin
    at which each sequence begins. documents: the index of the first sequence of each document, then the number of
    sequences.
    """

    path: Path
    tokens: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    begins: np.ndarray[Any, Any]
    documents: np.ndarray[Any, Any]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def document_begin(self, document: int) -> int:
        """Returns the index in `tokens` of a document's first token. For document = num_documents it returns the number
        of tokens."""
        sequence = int(self.documents[document])
        at_end = sequence == len(self.lengths)
        return self.num_tokens if at_end else int(self.begins[sequence]) // self.tokens.itemsize

    def document_begins(self, begin: int, end: int) -> np.ndarray[Any, Any]:
        """Returns the indices in `tokens`, from `begin` to `end` - 1, at which documents begin: int64, ascending.
        An empty document repeats the begin of the next one."""
        # Not np.searchsorted: the mapped integers are not aligned, so that it would copy the whole index.
        first, last = (
            bisect.bisect_left(range(self.num_documents), at, key=self.document_begin) for at in (begin, end)
        )
        return np.asarray(self.begins[self.documents[first:last]]) // self.tokens.itemsize

    @property
    def is_one_document(self) -> bool:
        """Returns True if all tokens belong to the same document, empty documents aside."""
        second = bisect.bisect_right(range(self.num_documents), 0, key=self.document_begin)
        return self.document_begin(second) == self.num_tokens

    def held_out_begin(self, held_out: float) -> int:
        """Returns the index in `tokens` of the first held-out token. held_out: the fraction of the tokens to hold out.

        The fewest last documents that make up the fraction are held out; if these are more than half of all tokens (a
        single document, say), the split is within a document.
        """
        wanted = math.ceil(held_out * self.num_tokens)
        latest = self.num_tokens - wanted
        document = bisect.bisect_right(range(self.num_documents), latest, key=self.document_begin) - 1
        begin = self.document_begin(document)
        return latest if 2 * (self.num_tokens - begin) > self.num_tokens else begin


def with_suffix(prefix: str, suffix: str) -> Path:
    """Returns the path prefix + suffix; the prefix may contain dots. Raises a ValueError if it ends in a slash."""
    if prefix.endswith("/"):
        raise ValueError(
            f"the prefix {prefix} ends in a slash: it must end in a name, to which .bin and .idx are added"
        )
    return Path(prefix + suffix)


def smallest_dtype(vocab_size: int) -> type[np.generic]:
    """Returns the dtype for token ids that Megatron would choose, or uint8 if that is enough. Megatron can read each of
    them."""
    return np.uint8 if vocab_size <= 256 else np.uint16 if vocab_size < 65500 else np.int32


def write_index(path: Path, dtype: type[np.generic], lengths: np.ndarray[Any, Any]) -> None:
    """Writes PREFIX.idx for documents of one sequence each. dtype: that of the token ids. lengths: int32, the number of
    tokens of each document."""
    code = next(code for code, known in DTYPES.items() if known is dtype)
    ends = np.cumsum(lengths, dtype="<i8") * np.dtype(dtype).itemsize
    with path.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write(np.concatenate([np.zeros(1, "<i8"), ends])[:-1].tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def open_indexed_dataset(prefix: str) -> IndexedDataset:
    """Opens PREFIX.idx and PREFIX.bin. Raises ValueError, with file and position, if one is missing, truncated, or
    invalid."""
    index, data = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
    missing = [path for path in (index, data) if not path.is_file()]
    if missing:
        hint = " (give the path without .bin or .idx)" if prefix.endswith((".bin", ".idx")) else ""
        also = "" if len(missing) == 2 else f", though {({index, data} - set(missing)).pop()} is there"
        raise ValueError(f"there is no file {' and no file '.join(map(str, missing))}{also}{hint}")
    try:
        size, data_size = index.stat().st_size, data.stat().st_size
        with index.open("rb") as stream:
            header = stream.read(HEADER.size)
        if len(header) < HEADER.size:
            raise ValueError(f"{index} is truncated: it has {size} bytes, its header alone takes {HEADER.size}")
        dtype, num_sequences, num_entries = _read_header(index, header, size)
        lengths = np.memmap(index, "<i4", "r", HEADER.size, (num_sequences,))
        begins = np.memmap(index, "<i8", "r", HEADER.size + lengths.nbytes, (num_sequences,))
        documents = np.memmap(index, "<i8", "r", HEADER.size + lengths.nbytes + begins.nbytes, (num_entries,))
        num_bytes = _check_sequences(index, lengths, begins, dtype.itemsize)
        _check_documents(index, documents, num_sequences)
        if data_size != num_bytes:
            raise ValueError(f"{data} has {data_size} bytes, its index {index} says {num_bytes}")
        if num_bytes == 0:
            raise ValueError(f"{data} is empty: its index lists {num_sequences} sequences without a token")
        return IndexedDataset(Path(prefix), np.memmap(data, dtype, "r"), lengths, begins, documents)
    except OSError as error:
        raise ValueError(f"{error.filename or index} cannot be read: {error.strerror or error}") from error


def _read_header(index: Path, header: bytes, size: int) -> tuple[np.dtype[Any], int, int]:
    """Parses the header; returns (dtype of the tokens, N, M)."""
    magic, version, code, num_sequences, num_entries = HEADER.unpack(header)
    if magic != MAGIC:
        raise ValueError(f"{index} is not a Megatron index: it begins with {magic!r}, not with {MAGIC!r}")
    if version != 1:
        raise ValueError(f"{index} has version {version} (byte 9), only version 1 is supported")
    if code not in DTYPES:
        raise ValueError(f"{index} has code {code} for the tokens' dtype (byte 17), it must be one of {list(DTYPES)}")
    expected = HEADER.size + 12 * num_sequences + 8 * num_entries
    if size == expected + num_sequences and num_sequences:
        raise ValueError(
            f"{index} holds a mode for each of {num_sequences} sequences: multimodal corpora are not supported"
        )
    if size != expected:
        raise ValueError(
            f"{index} has {size} bytes, but {num_sequences} sequences and {num_entries} document entries (bytes 18 to "
            f"33) take {expected}"
        )
    if num_sequences == 0:
        raise ValueError(f"{index} is empty: it lists 0 sequences")
    return np.dtype(DTYPES[code]).newbyteorder("<"), num_sequences, num_entries


def _check_sequences(index: Path, lengths: np.ndarray[Any, Any], begins: np.ndarray[Any, Any], itemsize: int) -> int:
    """Checks that each sequence begins where the previous one ends; returns the total number of bytes."""
    expected = 0
    for first in range(0, len(lengths), CHUNK):
        length_n = np.asarray(lengths[first : first + CHUNK], dtype=np.int64)
        begin_n = np.asarray(begins[first : first + CHUNK])
        expected_n = expected + np.concatenate([[0], np.cumsum(length_n) * itemsize])
        wrong_n = (length_n < 0) | (begin_n != expected_n[:-1])
        if wrong_n.any():
            place = int(wrong_n.argmax())
            raise ValueError(
                f"{index}: sequence {first + place} of {len(lengths)} has {length_n[place]} tokens from byte "
                f"{begin_n[place]}, it should begin at byte {expected_n[place]}, where the previous one ends"
            )
        expected = int(expected_n[-1])
    return expected


def _check_documents(index: Path, documents: np.ndarray[Any, Any], num_sequences: int) -> None:
    """Checks that documents begin at sequence 0, are in order, and end with the last sequence."""
    if len(documents) < 2:
        raise ValueError(f"{index} is empty: it lists {num_sequences} sequences but no document")
    before = 0
    for first in range(0, len(documents), CHUNK):
        begin_n = np.asarray(documents[first : first + CHUNK])
        wrong_n = np.diff(begin_n, prepend=before) < 0
        wrong_n |= begin_n > num_sequences
        if first == 0:
            wrong_n[0] |= begin_n[0] != 0
        if wrong_n.any():
            place = int(wrong_n.argmax())
            raise ValueError(
                f"{index}: document {first + place} begins with sequence {begin_n[place]} of {num_sequences}, out of "
                f"order: the previous one begins with {begin_n[place - 1] if place else before}"
            )
        before = int(begin_n[-1])
    if before != num_sequences:
        raise ValueError(f"{index}: its documents end with sequence {before} of {num_sequences}")
