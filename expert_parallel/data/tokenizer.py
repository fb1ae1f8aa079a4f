"""Encodes text as token ids, either its bytes or by a tokenizer.json of Hugging Face's `tokenizers`, and reads
PREFIX.json.

PREFIX.json describes token files that `data prepare` made, and their tokenizer. This module does not import torch, so
that workers start quickly.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import AfterValidator, Field
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from expert_parallel.data.indexed import IndexedDataset, with_suffix
from expert_parallel.settings import Settings, refuse_newer

FORMAT = 1  # newest version of PREFIX.json, as TokensInfo.format has it
VOCABULARY_SIZE = 256  # of bytes
SEPARATOR = b"\0"  # ends a document of bytes; does not occur in ordinary text

END_TOKEN = "<|endoftext|>"  # of tokenizers trained here
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"  # U+FF5C in place of |, U+2581 of blanks
# Tokens that end a document in other tokenizers, in order of preference. A chat's end of turn is not one.
END_TOKENS = (END_TOKEN, "<|end_of_text|>", "</s>", "<eos>", DEEPSEEK_END, "<|eos|>", "[EOS]")


class Tokenizer(Protocol):
    """Encodes and decodes text. vocab_size: the largest token id + 1. end_id: the id of the token that ends a document;
    None if there is no such token."""

    vocab_size: int
    end_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """Encodes text as its UTF-8 bytes; a zero byte ends a document."""

    vocab_size: int = VOCABULARY_SIZE
    end_id: int | None = SEPARATOR[0]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class FileTokenizer:
    """Encodes text by a tokenizer.json.

    Unless asked for, special tokens in the text are encoded as ordinary text, and none are added. end: the token that
    ends documents, as its text or its id; None takes the first of END_TOKENS that is in the vocabulary.
    """

    def __init__(self, path: Path, end: str | int | None = None) -> None:
        try:
            self._tokenizer = HuggingFaceTokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"the tokenizer {path} cannot be read: {error.strerror}") from error
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_id: int | None = end if isinstance(end, int) else None
        if isinstance(end, str):
            if end not in vocabulary:
                raise ValueError(f"{path} has no token {end!r} to end documents with")
            self.end_id = vocabulary[end]
        elif end is None:
            self.end_id = next((vocabulary[token] for token in END_TOKENS if token in vocabulary), None)

    @property
    def adds_special_tokens(self) -> bool:
        """Returns True if the tokenizer.json has a post-processor that adds tokens to a text, such as `<s>`."""
        return self._tokenizer.num_special_tokens_to_add(is_pair=False) > 0

    def mark_special(self, tokens: Iterable[str]) -> None:
        """Makes tokens of the vocabulary special tokens. Those that it lacks, and special ones, stay as they are."""
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        others = [token for token in tokens if token not in special and self.find_id(token) is not None]
        self._tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in others])

    def find_id(self, token: str) -> int | None:
        """Returns the id of a token, or None if the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = False, split_special_tokens: bool = True) -> list[int]:
        """Encodes a text. add_special_tokens: adds the tokens of the tokenizer's post-processor. split_special_tokens:
        special tokens in the text are encoded as ordinary text."""
        self._tokenizer.encode_special_tokens = split_special_tokens
        # A batch of one: the library's fastest call, which skips character offsets.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def open_tokenizer(name: str, end: str | int | None = None) -> Tokenizer:
    """Opens a tokenizer. name: `bytes`, or the path of a tokenizer.json. end: see FileTokenizer. Raises ValueError if
    it cannot be read."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name), end)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-level BPE tokenizer, which can encode any text, and writes it to `path` (Sennrich et al. 2016;
    Radford et al. 2019).

    The vocabulary is smaller than vocab_size if the text has no more pairs to merge.
    """
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
    """Returns the SHA-256 of a file in hex. Raises ValueError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


class Sources(Settings):
    """Describes the input files that a token file was made from: their number, their bytes in total, and sha256, the
    SHA-256 of the concatenated SHA-256s of the files, in order."""

    files: int
    bytes: int
    sha256: str


def _check_file_name(name: str) -> str:
    """Checks that a name in PREFIX.json is a plain file name, so that it cannot point outside the folder."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


class TokensInfo(Settings):
    """Describes a token file: the content of PREFIX.json. tokenizer: `bytes`, or the name of a tokenizer.json in the
    same folder. end_id: the id of the token that ends a document. missing_texts_left_out: the number of documents
    without the field, or with null in it. sha256: that of PREFIX.bin."""

    format: Literal["expert_parallel tokens 1"] = "expert_parallel tokens 1"
    tokenizer: Annotated[str, AfterValidator(_check_file_name)]
    tokenizer_sha256: str | None
    vocab_size: int = Field(ge=1)
    end_id: int = Field(ge=0)
    num_documents: int
    num_tokens: int
    empty_documents_left_out: int
    missing_texts_left_out: int = 0
    empty_files_left_out: int = 0
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    sources: Sources

    def describe_left_out(self) -> str:
        """Returns a text, which continues a line, with what was left out, or an empty one if nothing was."""
        counts = {
            "empty documents": self.empty_documents_left_out,
            "missing texts": self.missing_texts_left_out,
            "empty files": self.empty_files_left_out,
        }
        return "".join(f"; {count:,} {what} left out" for what, count in counts.items() if count)


def read_info(prefix: str) -> TokensInfo | None:
    """Reads PREFIX.json, or returns None if there is none. Raises ValueError if it is invalid or of a newer version."""
    path = with_suffix(prefix, ".json")
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    version = re.fullmatch(r"expert_parallel tokens (\d+)", str(tree.get("format"))) if isinstance(tree, dict) else None
    if version is not None:
        refuse_newer(f"{path}: the format", int(version[1]), FORMAT)
    return TokensInfo.model_validate(tree, context={"where": f"{path} does not describe token files"})


def check_info(prefix: str, tokens: IndexedDataset, info: TokensInfo) -> None:
    """Raises ValueError if the counts in PREFIX.json differ from those of the token files."""
    for what, recorded, found in (
        ("documents", info.num_documents, tokens.num_documents),
        ("tokens", info.num_tokens, tokens.num_tokens),
    ):
        if recorded != found:
            raise ValueError(f"{prefix}.json says {recorded} {what}, {prefix}.idx lists {found}")


def recorded_tokenizer(prefix: str, info: TokensInfo) -> tuple[str, int]:
    """Returns (`bytes` or the path of a tokenizer.json, end_id) of the tokenizer that PREFIX.json names. Raises
    ValueError if its file is missing, or its SHA-256 is not the one in PREFIX.json."""
    if info.tokenizer == "bytes":
        return "bytes", info.end_id
    path = Path(prefix).parent / info.tokenizer
    if not path.is_file():
        raise ValueError(f"{path} is missing, the tokenizer of {prefix}")
    check_tokenizer(path, prefix, info)
    return str(path), info.end_id


def check_tokenizer(path: Path, prefix: str, info: TokensInfo) -> None:
    """Raises ValueError if the SHA-256 of the tokenizer.json `path` is not that of the tokenizer in PREFIX.json."""
    if (found := file_sha256(path)) != info.tokenizer_sha256:
        raise ValueError(
            f"{path} is not the tokenizer of {prefix}: it has sha256 {found}, "
            f"{with_suffix(prefix, '.json')} says {info.tokenizer_sha256}"
        )
