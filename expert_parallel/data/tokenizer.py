"""Text <-> token ids: bytes, or a tokenizer.json of Hugging Face's `tokenizers`; and PREFIX.json, which says what lies
beside token files that `data prepare` made, and which tokenizer made them. Knows nothing of torch: workers that
only tokenize start quickly."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import AfterValidator, Field, ValidationError
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from expert_parallel.data.indexed import IndexedTokens, with_suffix
from expert_parallel.settings import Settings

VOCABULARY_SIZE = 256  # of bytes
SEPARATOR = b"\0"  # ends a document of bytes; no byte of ordinary text

END_TOKEN = "<|endoftext|>"  # of tokenizers trained here
# What ends a document in other tokenizers, looked for in this order. A chat's end of turn is none of them.
END_TOKENS = (END_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "<|eos|>", "[EOS]")


class Tokenizer(Protocol):
    """vocab_size: one more than the largest id. end_id: ends a document; None where there is no such token."""

    vocab_size: int
    end_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    vocab_size: int = VOCABULARY_SIZE
    end_id: int | None = SEPARATOR[0]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json. Text is only text: what looks like a special token in it becomes ordinary tokens, and nothing
    is put before or after it. end: the token that ends documents; None for the first of END_TOKENS that it has."""

    def __init__(self, path: Path, end: str | int | None = None) -> None:
        try:
            self._tokenizer = HuggingFaceTokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"the tokenizer {path} cannot be read: {error.strerror}") from error
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_id: int | None = end if isinstance(end, int) else None
        if isinstance(end, str):
            if end not in vocabulary:
                raise ValueError(f"{path} has no token {end!r}, which is to end documents")
            self.end_id = vocabulary[end]
        elif end is None:
            self.end_id = next((vocabulary[token] for token in END_TOKENS if token in vocabulary), None)

    def encode(self, text: str) -> list[int]:
        # A batch of one: the library's quickest way, without the characters' offsets.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def open_tokenizer(name: str, end: str | int | None = None) -> Tokenizer:
    """name: `bytes`, or the path of a tokenizer.json. ValueError where it cannot be read."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name), end)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): any text can be encoded, whatever it was trained on.
    It may come out smaller, where the text has no more pairs to merge."""
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.write_text(tokenizer.to_str(pretty=False), encoding="utf-8")


def file_sha256(path: Path) -> str:
    """ValueError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


class Sources(Settings):
    """Counts the files that a token file was made from. sha256: hash of the files' SHA-256s, in order."""

    files: int
    bytes: int
    sha256: str


def _plain_name(name: str) -> str:
    """A file beside PREFIX.json: what it says leads nowhere else."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} is not the plain name of a file")
    return name


class TokensInfo(Settings):
    """Describes a token file, as PREFIX.json. tokenizer: `bytes`, or the name of a tokenizer.json in the same folder.
    sha256: hash of PREFIX.bin."""

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
