"""Holds the settings of the training data: its sources, how documents are separated, and the fraction held out for
evaluation."""

import platform
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from expert_parallel.settings import PathText, Settings

HeldOut = Annotated[
    float, Field(gt=0, lt=0.5, description="Keeps this fraction of the data out of training, for evaluation.")
]
Documents = Annotated[
    Literal["joined", "separate"],
    Field(
        description="Lets tokens attend to other documents in their sequence (`joined`), or separates documents in "
        "attention and in balance losses (`separate`)."
    ),
]
Digest = Annotated[
    Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None,
    Field(
        description="Refuses data with another SHA-256 (hexadecimal); a run fills it in, in its own config.yaml and "
        "its checkpoints, so that a resumed run sees the same data."
    ),
]


def _as_list(paths: Any) -> Any:
    return [paths] if isinstance(paths, str) else paths


class StdlibData(Settings):
    """Trains on the sources of the running Python's standard library, as bytes: real text without a download."""

    kind: Literal["stdlib"]
    held_out: HeldOut = 0.05
    documents: Documents = "joined"
    sha256: Digest = None

    def describe(self) -> str:
        return f"standard library of Python {platform.python_version()}"


class FilesData(Settings):
    """Trains on text, JSONL, JSON and parquet files, as bytes; a text file, a line, an object or a row is one document.
    Files compressed with gzip or zstd are decompressed."""

    kind: Literal["files"]
    paths: Annotated[
        list[PathText],
        Field(min_length=1),
        BeforeValidator(_as_list, json_schema_input_type=Annotated[list[PathText], Field(min_length=1)] | PathText),
    ]
    """Lists the files to read; each entry may be a glob pattern, and a single one needs no list."""
    format: Literal["auto", "text", "jsonl", "json", "parquet"] = "auto"
    """Sets how files are read; `auto` decides by each file's name and content, and refuses a file if they disagree;
    `json` is an array of objects."""
    field: str = "text"
    """Names the field of a JSON object, or the column of a parquet file, that holds the document's text."""
    missing: Literal["error", "skip"] = "error"
    """Refuses documents whose text is missing, null or empty, or skips and counts them."""
    held_out: HeldOut = 0.05
    documents: Documents = "joined"
    sha256: Digest = None

    def describe(self) -> str:
        return f"files {', '.join(self.paths)}"


class CorpusSettings(Settings):
    """Names a token file, PREFIX.bin with PREFIX.idx, and its share of the training sequences."""

    path: PathText
    """Sets the PREFIX of the token file."""
    weight: float = Field(default=1.0, gt=0)
    """Sets the corpus's share of the training sequences, relative to the sum of all weights."""


class TokensData(Settings):
    """Trains on token files written by `expert-parallel data prepare` or by Megatron-LM."""

    kind: Literal["tokens"]
    corpora: list[CorpusSettings] = Field(default=[])  # an imported model, which only generates, has none
    """Lists the token files and their weights."""
    held_out: HeldOut = 0.05
    documents: Documents = "joined"
    tokenizer: PathText | None = None
    """Sets the tokenizer of token files that do not name theirs (Megatron-LM's): a tokenizer.json, or `bytes`."""
    end_id: Annotated[int, Field(ge=0)] | None = None
    """Sets the token id that ends a document in token files that do not name theirs (Megatron-LM's)."""
    sha256: Digest = None


DataConfig = Annotated[StdlibData | FilesData | TokensData, Field(discriminator="kind")]
