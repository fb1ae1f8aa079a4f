"""The config's `data` block: what a run trains on, how documents are kept apart, and what is held out."""

import platform
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from expert_parallel.settings import Settings

HeldOut = Annotated[float, Field(gt=0, lt=0.5)]
Pattern = Annotated[str, Field(min_length=1)]
# joined: documents of a sequence see each other. separate: attention and balance losses keep them apart.
Documents = Literal["joined", "separate"]
# Refuses other data than these. A run fills it in, so that its own config.yaml and its checkpoints say what they saw.
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None


def _as_list(paths: Any) -> Any:
    return [paths] if isinstance(paths, str) else paths


class StdlibData(Settings):
    """The sources of the running Python's standard library, as bytes: real text with nothing to download."""

    kind: Literal["stdlib"]
    held_out: HeldOut = 0.05
    documents: Documents = "joined"
    sha256: Digest = None

    def describe(self) -> str:
        return f"standard library of Python {platform.python_version()}"


class FilesData(Settings):
    """The user's own text, as bytes: a text file is one document, a JSONL line is one document (its `field`)."""

    kind: Literal["files"]
    paths: Annotated[list[Pattern], Field(min_length=1), BeforeValidator(_as_list)]
    format: Literal["auto", "text", "jsonl"] = "auto"
    field: str = "text"
    held_out: HeldOut = 0.05
    documents: Documents = "joined"
    sha256: Digest = None

    def describe(self) -> str:
        return f"files {', '.join(self.paths)}"


class CorpusSettings(Settings):
    """A token file, PREFIX.bin and PREFIX.idx; its share of the sequences is its weight over the sum of all."""

    path: Pattern
    weight: float = Field(default=1.0, gt=0)


class TokensData(Settings):
    """Token files from `expert-parallel data prepare`, or Megatron's. `tokenizer` (a tokenizer.json, or `bytes`) and
    `end_id` (the token that ends a document) are for those of Megatron, which do not say it themselves."""

    kind: Literal["tokens"]
    corpora: list[CorpusSettings] = Field(default=[])  # an imported model, which only generates, has none
    held_out: HeldOut = 0.05
    documents: Documents = "joined"
    tokenizer: Pattern | None = None
    end_id: Annotated[int, Field(ge=0)] | None = None
    sha256: Digest = None


DataConfig = Annotated[StdlibData | FilesData | TokensData, Field(discriminator="kind")]
