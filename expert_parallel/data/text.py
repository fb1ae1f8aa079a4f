"""Loads text from disk as one stream of bytes: all documents in a fixed pseudo-random order, with a zero byte between
two."""

import hashlib
import math
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expert_parallel.data.config import FilesData, StdlibData
from expert_parallel.data.formats import find_inputs
from expert_parallel.data.inputs import read_documents, whole_file
from expert_parallel.data.reading import TextRules, read_bytes
from expert_parallel.data.tokenizer import SEPARATOR

# Folders in the standard library's folder that are installed, generated or fixtures, rather than its own source.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "_bundled"}


PLACES = {"text": "document", "jsonl": "line", "json": "item", "parquet": "row"}  # of a document in its file


class Document(NamedTuple):
    """Holds a document. One without content stands for a file or a text that is left out, and counted."""

    name: str  # identifies the document independently of its folder: the order of the corpus depends on it
    content: bytes


@dataclass(frozen=True, eq=False)
class Corpus:
    """Holds the bytes of all documents in memory. train, held_out: uint8, 1-D, the training part and the held-out part
    of one stream, in which a zero byte separates two documents."""

    train: Tensor
    held_out: Tensor
    num_documents: int
    sha256: str  # of the documents in their order
    description: str


def load_corpus(config: StdlibData | FilesData) -> Corpus:
    """Reads all documents, shuffles them in a fixed pseudo-random order, joins them into one stream, and holds out its
    end for evaluation."""
    found = list(SOURCES[config.kind](config))
    documents = [document for document in found if document.content]
    if not documents:
        raise ValueError(f"data: {config.describe()} hold {len(found)} documents, all of them without text")
    documents.sort(key=lambda d: hashlib.sha256(d.name.encode()).digest())

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
    if left_out := len(found) - len(documents):
        description += f"; {left_out:,} empty files or missing texts left out"
    return Corpus(stream[:start], stream[start:], len(documents), digest.hexdigest(), description)


def held_out_start(sizes: list[int], held_out: float) -> int:
    """Returns the index of the byte of the joined stream at which the held-out part begins. sizes: the documents'
    numbers of bytes, in order. held_out: the fraction to hold out.

    It is the start of a document: the fewest last documents that make up the fraction are held out. If these are more
    than half of the stream (a single document, or one much larger than the others), the split is within a document.
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
# Sources of documents. To add one: a config class in DataConfig and a line in SOURCES.


def stdlib_documents(config: StdlibData) -> Iterator[Document]:
    """Yields every non-empty .py file of the standard library as a document, with its bytes unchanged: a few files are
    not UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in EXCLUDED_FOLDERS
        ]  # os.walk descends only into these
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(f"data.kind: stdlib found 0 .py files below {root}; give your own text with data.kind: files")
    for file in sorted(files):
        if content := read_bytes(file, "data.kind: stdlib"):
            yield Document(file.relative_to(root).as_posix(), content)


def file_documents(config: FilesData) -> Iterator[Document]:
    """Yields the documents of all files that `data.paths` matches, each named by the file's position in this list and
    the number of its line, item or row.

    If documents are kept apart, a zero byte within one is refused: it would end the document.
    """
    rules = TextRules(config.field, "data.", config.documents == "separate", config.missing == "skip")
    sources, num_empty_files = find_inputs(config.paths, "data.paths", config.format, "data.format")
    for position, source in enumerate(sources):
        for number, text in read_documents(whole_file(source), rules):
            if not text and not rules.skip_missing:
                place = f"{source.where}, {PLACES[source.format]} {number}"
                raise ValueError(f"{place}: {rules.named_field} is an empty string")
            name = f"{position}" if source.format == "text" else f"{position}:{number}"
            yield Document(name, (text or "").encode())
    yield from [Document("empty file", b"")] * num_empty_files


SOURCES: dict[str, Callable[[Any], Iterator[Document]]] = {"stdlib": stdlib_documents, "files": file_documents}
