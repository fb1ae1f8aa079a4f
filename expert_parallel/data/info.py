"""PREFIX.json: what lies beside token files that `data prepare` made, and their tokenizer. Knows nothing of torch."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from expert_parallel.data.indexed import IndexedTokens, with_suffix
from expert_parallel.data.tokenizer import file_sha256
from expert_parallel.settings import Settings


class Sources(Settings):
    """sha256: of the files' own SHA-256s, in order."""

    files: int
    bytes: int
    sha256: str


def _plain_name(name: str) -> str:
    """A file beside PREFIX.json: what it says leads nowhere else."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} is not the plain name of a file")
    return name


class TokensInfo(Settings):
    """PREFIX.json. tokenizer: `bytes`, or the name of the tokenizer.json that lies beside it. sha256: of PREFIX.bin."""

    format: Literal["expert_parallel tokens 1"] = "expert_parallel tokens 1"
    tokenizer: Annotated[str, AfterValidator(_plain_name)]
    tokenizer_sha256: str | None
    vocab_size: int = Field(ge=1)
    end_id: int = Field(ge=0)
    num_documents: int
    num_tokens: int
    empty_documents_left_out: int
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    sources: Sources


def read_info(prefix: str) -> TokensInfo | None:
    path = with_suffix(prefix, ".json")
    if not path.exists():
        return None
    try:
        return TokensInfo.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} does not describe token files: {where}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def check_info(prefix: str, tokens: IndexedTokens, info: TokensInfo) -> None:
    """PREFIX.json belongs to these token files."""
    for what, said, found in (
        ("documents", info.num_documents, tokens.num_documents),
        ("tokens", info.num_tokens, tokens.num_tokens),
    ):
        if said != found:
            raise ValueError(f"{prefix}.json says {said} {what}, {prefix}.idx lists {found}")


def named_in(prefix: str, info: TokensInfo) -> tuple[str, int]:
    """ValueError where the tokenizer's file is not the one that made the corpus."""
    if info.tokenizer == "bytes":
        return "bytes", info.end_id
    path = Path(prefix).parent / info.tokenizer
    if not path.is_file():
        raise ValueError(f"{path} is missing, the tokenizer of {prefix}")
    check_tokenizer(path, prefix, info)
    return str(path), info.end_id


def check_tokenizer(path: Path, prefix: str, info: TokensInfo) -> None:
    """The file is the tokenizer that made the corpus."""
    if (found := file_sha256(path)) != info.tokenizer_sha256:
        raise ValueError(
            f"{path} is not the tokenizer of {prefix}: it has sha256 {found}, "
            f"{with_suffix(prefix, '.json')} says {info.tokenizer_sha256}"
        )
