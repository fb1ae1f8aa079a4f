"""Training text as bytes (vocabulary 256, a token is a byte): from documents to the micro-batch of one data rank.

Which sequences a step sees follows from (seed, step) alone: not from the number of ranks or micro-steps, nor from
where the files lie. So a checkpoint holds the step number, and no reader state.
Shape letters here: B sequences of one rank's micro-batch, S positions of a sequence.
"""

import glob
import hashlib
import io
import json
import math
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from expert_parallel.settings import Settings

VOCABULARY_SIZE = 256
SEPARATOR = b"\0"  # between two documents; no byte of ordinary text

# Of the standard library's folder: what is installed, generated or a fixture rather than the library's own source.
LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "_bundled"}

HeldOut = Annotated[float, Field(gt=0, lt=0.5)]
Pattern = Annotated[str, Field(min_length=1)]


def _as_list(paths: Any) -> Any:
    return [paths] if isinstance(paths, str) else paths


class StdlibData(Settings):
    """The sources of the running Python's standard library: real text with nothing to download."""

    kind: Literal["stdlib"]
    held_out: HeldOut = 0.05

    def describe(self) -> str:
        return f"standard library of Python {platform.python_version()}"


class FilesData(Settings):
    """The user's own text: a text file is one document, a JSONL line is one document (its `field`)."""

    kind: Literal["files"]
    paths: Annotated[list[Pattern], Field(min_length=1), BeforeValidator(_as_list)]
    format: Literal["auto", "text", "jsonl"] = "auto"
    field: str = "text"
    held_out: HeldOut = 0.05

    def describe(self) -> str:
        return f"files {', '.join(self.paths)}"


DataConfig = Annotated[StdlibData | FilesData, Field(discriminator="kind")]


class Document(NamedTuple):
    name: str  # says which document of the corpus, never where it lies: the corpus is ordered by it
    content: bytes


@dataclass(frozen=True, eq=False)
class Corpus:
    """Both parts are uint8, 1-D, and views of one stream of documents with a separator between each two."""

    train: Tensor
    held_out: Tensor
    num_documents: int
    sha256: str  # of the documents in their order
    description: str


def load_corpus(config: StdlibData | FilesData) -> Corpus:
    """Read every document, bring them in a fixed pseudo-random order, join them, hold out the end."""
    documents = sorted(SOURCES[config.kind](config), key=lambda d: hashlib.sha256(d.name.encode()).digest())
    assert all(d.content for d in documents), "a source yields no empty documents"
    assert documents, "a source yields documents"

    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document.content).to_bytes(8, "little"))  # so that moving a boundary changes the digest
        digest.update(document.content)

    # A bytearray joins into a bytearray: memory that torch may share without a copy.
    stream = torch.frombuffer(bytearray(SEPARATOR).join(d.content for d in documents), dtype=torch.uint8)
    start = held_out_start([len(d.content) for d in documents], config.held_out)
    description = (
        f"{config.describe()}: {len(documents):,} documents, {start:,} bytes for training, "
        f"{len(stream) - start:,} held out, sha256 {digest.hexdigest()[:12]}"
    )
    return Corpus(stream[:start], stream[start:], len(documents), digest.hexdigest(), description)


def held_out_start(sizes: list[int], held_out: float) -> int:
    """The byte of the joined stream at which the held-out part begins, given the documents' sizes in order.

    It is the start of a document: the fewest last documents that make up the fraction are held out. Where these
    are more than half of the stream (a lone document, or one that dwarfs the others), it is the byte instead.
    """
    total = sum(sizes) + len(sizes) - 1
    wanted = math.ceil(held_out * total)
    held = -1  # no separator follows the last document
    for size in reversed(sizes):
        held += size + 1
        if held >= wanted:
            break
    return total - (wanted if 2 * held > total else held)


# ---------------------------------------------------------------------------------------------------------------------
# Sources: where documents come from. A further one is a config class in DataConfig and a line in SOURCES.


def stdlib_documents(config: StdlibData) -> Iterator[Document]:
    """Every .py file below the library's folder, its bytes as they are: a few are not UTF-8. Empty ones say nothing."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT_FOLDERS]  # os.walk goes where this says
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(f"data.kind: stdlib found 0 .py files below {root}; give your own text with data.kind: files")
    for file in sorted(files):
        if content := read_bytes(file, "data.kind: stdlib"):
            yield Document(file.relative_to(root).as_posix(), content)


def file_documents(config: FilesData) -> Iterator[Document]:
    """The documents of all matched files, named by the file's position in the sorted list and the line in it."""
    for position, (setting, file) in enumerate(matched_files(config.paths)):
        content = read_bytes(file, setting)
        if not content:
            raise ValueError(f"{setting}: {file} is empty (0 bytes)")
        is_jsonl = file.suffix.lower() == ".jsonl" if config.format == "auto" else config.format == "jsonl"
        if is_jsonl:
            for number, text in jsonl_texts(content, config.field, f"{setting}: {file}"):
                yield Document(f"{position}:{number}", text)
        else:
            refuse_other_encodings(content, f"{setting}: {file}", offset=0)
            yield Document(f"{position}", content)


SOURCES: dict[str, Callable[[Any], Iterator[Document]]] = {"stdlib": stdlib_documents, "files": file_documents}


def matched_files(paths: list[str]) -> list[tuple[str, Path]]:
    """(setting that names it, file) for every file: the patterns in the order given, the matches of each sorted.

    As in a shell, a glob leaves out hidden files, and folders are passed through. A file that is matched twice is
    refused: its text could be trained on and held out at once.
    """
    found: dict[str, tuple[str, Path]] = {}
    for index, pattern in enumerate(paths):
        setting = f"data.paths[{index}]"
        if os.path.isdir(pattern):
            below = os.path.join(pattern, "**", "*.txt")
            raise ValueError(f"{setting}: {pattern} is a folder; for the text files in it write {below}")
        # A file whose name holds [ or * is taken by its name.
        matches = [pattern] if os.path.lexists(pattern) else sorted(set(glob.glob(pattern, recursive=True)))
        files = [Path(match) for match in matches if not os.path.isdir(match)]
        if not files:
            raise ValueError(f"{setting}: {pattern} matches 0 files (working folder {os.getcwd()})")
        for file in files:
            key = os.path.realpath(file)
            if key in found:
                raise ValueError(f"{setting}: {file} is already matched by {found[key][0]} (as {found[key][1]})")
            found[key] = (setting, file)
    return list(found.values())


def read_bytes(file: Path, setting: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{setting}: {file} cannot be read: {error.strerror}") from error


def refuse_other_encodings(content: bytes, where: str, offset: int) -> None:
    """`offset`: of `content` in its file."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        byte, at = content[error.start], offset + error.start
        raise ValueError(f"{where} is not UTF-8: byte 0x{byte:02x} at offset {at} ({error.reason})") from error


def jsonl_texts(content: bytes, field: str, where: str) -> Iterator[tuple[int, bytes]]:
    """(line number, text) of every line. A line without text is refused, not skipped; so are blank lines."""
    offset = 0
    for number, line in enumerate(io.BytesIO(content), start=1):
        at_line = f"{where}, line {number}"
        refuse_other_encodings(line, at_line, offset)
        offset += len(line)
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
            raise ValueError(f"{at_line} is not valid JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{at_line} is a JSON {type(record).__name__}, not an object with data.field {field!r}")
        if field not in record:
            raise ValueError(f"{at_line} has no field {field!r} (data.field), only {list(record)[:10]}")
        text = record[field]
        if not isinstance(text, str) or not text:
            found = "an empty string" if text == "" else f"of type {type(text).__name__}, not a string"
            raise ValueError(f"{at_line}: field {field!r} (data.field) is {found}")
        try:
            yield number, text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{at_line}: field {field!r} (data.field) is not Unicode text: {error.reason}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: from a stream of tokens to sequences.


@dataclass(frozen=True, eq=False)
class TokenSampler:
    """An endless list of sequences, in which sample i is a function of (seed, i) alone.

    The tokens are cut into windows of S + 1 that overlap by one, so that each token but the first is a target once.
    Every epoch goes through all windows in an order of its own.
    """

    tokens: Tensor  # uint8, 1-D
    sequence_length: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise ValueError(_too_short("data holds", "for training", self.tokens, self.sequence_length))

    @property
    def num_windows(self) -> int:
        return (len(self.tokens) - 1) // self.sequence_length

    def sequences(self, first: int, count: int) -> Tensor:
        """Samples first .. first + count - 1 as int64, (count, S + 1)."""
        order = torch.tensor([self.window_of(sample) for sample in range(first, first + count)], dtype=torch.int64)
        return _windows(self.tokens, self.sequence_length)[order].long()

    def window_of(self, sample: int) -> int:
        epoch, position = divmod(sample, self.num_windows)
        return int(epoch_order(self.seed, epoch, self.num_windows)[position])


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def epoch_order(seed: int, epoch: int, num_windows: int) -> Tensor:
    """The windows in the order in which this epoch visits them."""
    key = hashlib.sha256(f"epoch order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)  # the seed is a signed 64-bit
    return torch.randperm(num_windows, generator=generator)


def held_out_sequences(tokens: Tensor, sequence_length: int, limit: int | None) -> Tensor:
    """Windows of the held-out part from its start, as int64, (n, S + 1); at most `limit`, evenly spread over it."""
    assert limit is None or limit >= 1, f"limit {limit}"
    if len(tokens) <= sequence_length:
        raise ValueError(_too_short("data.held_out leaves", "for evaluation", tokens, sequence_length))
    windows = _windows(tokens, sequence_length)
    if limit is not None and limit < len(windows):
        windows = windows[torch.arange(limit) * len(windows) // limit]
    return windows.long()


def _windows(tokens: Tensor, sequence_length: int) -> Tensor:
    """A view, (number of windows, S + 1): window w begins at token w * S."""
    return tokens.unfold(0, sequence_length + 1, sequence_length)


def _too_short(what: str, purpose: str, tokens: Tensor, sequence_length: int) -> str:
    needed = f"a sequence needs sequence_length + 1 = {sequence_length + 1} (training.sequence_length)"
    return f"{what} {len(tokens)} bytes {purpose}, {needed}"


# ---------------------------------------------------------------------------------------------------------------------
# Sharding: which of a step's sequences belong to one data rank.


@dataclass(frozen=True, eq=False)
class MicroBatch:
    inputs_BS: Tensor  # int64
    targets_BS: Tensor  # int64: the inputs' next tokens
    sequence_index_B: Tensor  # int64: which sequence of the micro-step's global batch

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(self.inputs_BS.to(device), self.targets_BS.to(device), self.sequence_index_B.to(device))

    def at(self, positions_S: Tensor) -> "MicroBatch":
        """Some positions of each sequence."""
        return MicroBatch(self.inputs_BS[:, positions_S], self.targets_BS[:, positions_S], self.sequence_index_B)


def shard_bounds(total: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """(first, count) of this rank's run of `total` items; the first ranks hold one more where it does not divide."""
    share, rest = divmod(total, num_ranks)
    return rank * share + min(rank, rest), share + (rank < rest)


def micro_batch(
    sampler: TokenSampler,
    *,
    step: int,
    global_batch: int,
    num_micro_steps: int,
    micro_step: int,
    num_ranks: int,
    rank: int,
) -> MicroBatch:
    """This rank's share of one micro-step. Micro-steps cut a step's samples in order, ranks cut a micro-step's."""
    assert global_batch % num_micro_steps == 0, f"global_batch {global_batch}, num_micro_steps {num_micro_steps}"
    size = global_batch // num_micro_steps
    first, count = shard_bounds(size, num_ranks, rank)
    sequences = sampler.sequences(step * global_batch + micro_step * size + first, count)
    return MicroBatch(
        inputs_BS=sequences[:, :-1].contiguous(),
        targets_BS=sequences[:, 1:].contiguous(),
        sequence_index_B=torch.arange(first, first + count),
    )
