"""Opens the token files of `data.corpora`, and checks that they fit each other, the settings and the model.

Start-up reads PREFIX.json and the index; tokens are read when a batch needs them.
"""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from expert_parallel.data.blend import CorpusSplit
from expert_parallel.data.config import TokensData
from expert_parallel.data.documents import DocumentBoundaries
from expert_parallel.data.indexed import IndexedDataset, open_indexed_dataset, with_suffix
from expert_parallel.data.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    TokensInfo,
    check_info,
    check_tokenizer,
    file_sha256,
    open_tokenizer,
    read_info,
    recorded_tokenizer,
)

STRETCH, STRETCHES = 1 << 16, 64  # tokens in which an end token is looked for, if a corpus is one document


class TokenCorpus(NamedTuple):
    """Holds one opened corpus of `data.corpora`. setting: the path of the setting that names it, for error messages.
    weight: its share of the training sequences, relative to the sum of all weights."""

    setting: str
    weight: float
    tokens: IndexedDataset
    info: TokensInfo | None  # None for a corpus that Megatron prepared


def open_corpora(config: TokensData, vocab_size: int, absent: Collection[int] = ()) -> list[TokenCorpus]:
    """Opens all corpora of `data.corpora`. vocab_size: the model's. absent: the indices of corpora to leave out. Raises
    ValueError if a file is damaged, or if corpora, settings and model do not fit each other."""
    if not config.corpora:
        raise ValueError("data.corpora is empty: there is nothing to train on")
    corpora = []
    for number, entry in enumerate(config.corpora):
        if number in absent:
            continue
        setting = f"data.corpora[{number}].path"
        try:
            tokens, info = open_indexed_dataset(entry.path), read_info(entry.path)
            if info is not None:
                check_info(entry.path, tokens, info)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error
        corpora.append(TokenCorpus(setting, entry.weight, tokens, info))
    _check_same_tokenizer(config, corpora)
    tokenizer = load_tokenizer(config)
    sizes = [(f"{c.setting}: {c.tokens.path}", c.info.vocab_size) for c in corpora if c.info is not None]
    sizes += [("data.tokenizer", tokenizer.vocab_size)] if tokenizer is not None else []
    for what, size in sizes:
        if size > vocab_size:
            raise ValueError(f"{what} has a vocabulary of {size} tokens, model.vocab_size is {vocab_size}")
    return corpora


def find_end_id(config: TokensData, corpora: list[TokenCorpus]) -> int | None:
    """Returns the id of the token that ends a document, or None if it is unknown."""
    end_id = next((corpus.info.end_id for corpus in corpora if corpus.info is not None), config.end_id)
    if end_id is None and (tokenizer := load_tokenizer(config)) is not None:
        end_id = tokenizer.end_id
    return end_id


def corpus_digest(corpus: TokenCorpus) -> str:
    """Returns a SHA-256 that identifies a corpus: that of its tokens, from PREFIX.json, or that of its index file if
    Megatron made it."""
    return corpus.info.sha256 if corpus.info is not None else file_sha256(with_suffix(str(corpus.tokens.path), ".idx"))


def split_corpora(
    config: TokensData, corpora: list[TokenCorpus], end_id: int | None
) -> tuple[list[CorpusSplit], list[CorpusSplit]]:
    """Splits each corpus; returns (the training parts of all corpora, their held-out parts). end_id: the id of the
    token that ends a document, or None if it is unknown. Raises ValueError if documents are to be separated and nothing
    marks where they begin."""
    train: list[CorpusSplit] = []
    held: list[CorpusSplit] = []
    for corpus in corpora:
        boundaries = None
        if config.documents == "separate":
            _check_boundaries(corpus, end_id)
            boundaries = DocumentBoundaries(corpus.tokens, end_id)
        begin, file = corpus.tokens.held_out_begin(config.held_out), with_suffix(str(corpus.tokens.path), ".bin")
        parts = ((train, 0, corpus.tokens.tokens[:begin]), (held, begin, corpus.tokens.tokens[begin:]))
        for splits, first, tokens in parts:
            splits.append(CorpusSplit(corpus.setting, file, first, tokens, corpus.weight, boundaries))
    return train, held


def _check_boundaries(corpus: TokenCorpus, end_id: int | None) -> None:
    """Raises ValueError if the index lists a single document and no end token is found in it, as nothing would separate
    the documents. Of a large corpus, evenly spaced stretches and the last token are searched."""
    indexed = corpus.tokens
    if not indexed.is_one_document:
        return
    count = min(STRETCHES, -(-indexed.num_tokens // STRETCH))
    firsts = [number * indexed.num_tokens // count for number in range(count)] + [indexed.num_tokens - 1]
    if end_id is not None and any((indexed.tokens[first : first + STRETCH] == end_id).any() for first in firsts):
        return
    why = "data.end_id is not set" if end_id is None else f"the end token {end_id} (data.end_id) was not found in it"
    raise ValueError(
        f"{corpus.setting}: data.documents is 'separate', but {indexed.path}.idx lists 1 document and {why}, so that "
        "nothing marks where documents begin; prepare the corpus with its documents, set data.end_id, or use "
        "data.documents=joined"
    )


def load_tokenizer(config: TokensData) -> Tokenizer | None:
    """Opens the tokenizer that `data.tokenizer` names, or else the one that made the corpora; returns None if neither
    is known."""
    name = tokenizer_name(config)
    try:
        return None if name is None else open_tokenizer(*name)
    except ValueError as error:
        raise ValueError(f"{'data.corpora' if config.tokenizer is None else 'data.tokenizer'}: {error}") from error


def tokenizer_name(config: TokensData) -> tuple[str, int | None] | None:
    """Returns (`bytes` or the path of a tokenizer.json, the id of the token that ends documents or None); returns None
    if the tokenizer is unknown."""
    if config.tokenizer is not None:
        return config.tokenizer, config.end_id
    described = first_described_corpus(config)
    return None if described is None else recorded_tokenizer(*described)


def first_described_corpus(config: TokensData) -> tuple[str, TokensInfo] | None:
    """Returns (prefix, content of PREFIX.json) of the first corpus that has a PREFIX.json, or None if none has one."""
    infos = ((entry.path, read_info(entry.path)) for entry in config.corpora)
    return next(((prefix, info) for prefix, info in infos if info is not None), None)


def load_saved_tokenizer(config: TokensData, kept: Path) -> Tokenizer:
    """Opens the tokenizer that a run's folder keeps in `kept`, even if its corpora are missing.

    kept: the path of the tokenizer.json in the run's folder. The folder may be a copy of another run, or hold an
    imported model, so the file is ignored if tokens are bytes, and must match PREFIX.json if that is available.
    """
    try:
        described, end_id = first_described_corpus(config), config.end_id
        name = described[1].tokenizer if config.tokenizer is None and described is not None else config.tokenizer
        if name == "bytes":
            return ByteTokenizer()
        if described is not None:
            check_tokenizer(kept, *described)
            end_id = described[1].end_id if end_id is None else end_id
        return open_tokenizer(str(kept), end_id)
    except ValueError as error:
        raise ValueError(f"data: {error}") from error


def _check_same_tokenizer(config: TokensData, corpora: list[TokenCorpus]) -> None:
    """Raises ValueError unless all corpora, and data.tokenizer, have the same tokenizer."""
    known = [(corpus.setting, corpus.info) for corpus in corpora if corpus.info is not None]
    for setting, info in known[1:]:
        first_setting, first = known[0]
        for name in ("tokenizer_sha256", "vocab_size", "end_id"):
            if (one := getattr(info, name)) != (other := getattr(first, name)):
                raise ValueError(f"{setting} has another tokenizer than {first_setting}: {name} is {one}, not {other}")
    for setting, info in known[:1]:
        if config.end_id not in (None, info.end_id):
            raise ValueError(f"data.end_id is {config.end_id}, documents of {setting} end with {info.end_id}")
        if config.tokenizer is not None:
            load_tokenizer(config)  # raises an error about the file, if there is one
            given = None if config.tokenizer == "bytes" else file_sha256(Path(config.tokenizer))
            if given != info.tokenizer_sha256:
                raise ValueError(f"data.tokenizer is {config.tokenizer!r}, but another tokenizer made {setting}")
