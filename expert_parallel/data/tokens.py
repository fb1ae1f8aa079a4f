"""Token files of a config's blend: whether they fit each other, the settings and the model. Start-up reads PREFIX.json
and the index; tokens are read when a batch needs them."""

from pathlib import Path
from typing import NamedTuple

from expert_parallel.data.blend import Part
from expert_parallel.data.config import TokensData
from expert_parallel.data.indexed import IndexedTokens, open_indexed, with_suffix
from expert_parallel.data.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    TokensInfo,
    check_info,
    check_tokenizer,
    file_sha256,
    named_in,
    open_tokenizer,
    read_info,
)


class TokenCorpus(NamedTuple):
    setting: str
    weight: float
    tokens: IndexedTokens
    info: TokensInfo | None  # None for a corpus that Megatron prepared


def open_corpora(config: TokensData, vocab_size: int) -> list[TokenCorpus]:
    """ValueError where a file is damaged, or where corpora, settings and model do not fit each other."""
    if not config.corpora:
        raise ValueError("data.corpora is empty: there is nothing to train on")
    corpora = []
    for number, entry in enumerate(config.corpora):
        setting = f"data.corpora[{number}].path"
        try:
            tokens, info = open_indexed(entry.path), read_info(entry.path)
            if info is not None:
                check_info(entry.path, tokens, info)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error
        corpora.append(TokenCorpus(setting, entry.weight, tokens, info))
    _check_agreement(config, corpora)
    tokenizer = load_tokenizer(config)
    sizes = [(f"{c.setting}: {c.tokens.path}", c.info.vocab_size) for c in corpora if c.info is not None]
    sizes += [("data.tokenizer", tokenizer.vocab_size)] if tokenizer is not None else []
    for what, size in sizes:
        if size > vocab_size:
            raise ValueError(f"{what} has a vocabulary of {size} tokens, model.vocab_size is {vocab_size}")
    return corpora


def end_of(config: TokensData, corpora: list[TokenCorpus]) -> int | None:
    """The token that ends a document; None where none is known and none is needed."""
    end_id = next((corpus.info.end_id for corpus in corpora if corpus.info is not None), config.end_id)
    if end_id is None and (tokenizer := load_tokenizer(config)) is not None:
        end_id = tokenizer.end_id
    if end_id is None and config.documents == "separate":
        raise ValueError("data.documents is 'separate' but no token is known that ends a document: give data.end_id")
    return end_id


def digest_of(corpus: TokenCorpus) -> str:
    """Of the tokens, as `data prepare` wrote it down; of the index, where Megatron prepared them."""
    return corpus.info.sha256 if corpus.info is not None else file_sha256(with_suffix(str(corpus.tokens.path), ".idx"))


def halves(corpora: list[TokenCorpus], held_out: float) -> tuple[list[Part], list[Part]]:
    """For training, and held out."""
    train, held = [], []
    for setting, weight, indexed, _ in corpora:
        begin, file = indexed.held_out_begin(held_out), with_suffix(str(indexed.path), ".bin")
        train.append(Part(setting, file, 0, indexed.tokens[:begin], weight))
        held.append(Part(setting, file, begin, indexed.tokens[begin:], weight))
    return train, held


def load_tokenizer(config: TokensData) -> Tokenizer | None:
    """That of data.tokenizer, or of the corpora; None where there is neither."""
    name = tokenizer_name(config)
    try:
        return None if name is None else open_tokenizer(*name)
    except ValueError as error:
        raise ValueError(f"{'data.corpora' if config.tokenizer is None else 'data.tokenizer'}: {error}") from error


def tokenizer_name(config: TokensData) -> tuple[str, int | None] | None:
    """`bytes` or the path of a tokenizer.json, and the token that ends documents, where that is known."""
    if config.tokenizer is not None:
        return config.tokenizer, config.end_id
    described = described_corpus(config)
    return None if described is None else named_in(*described)


def described_corpus(config: TokensData) -> tuple[str, TokensInfo] | None:
    """The first corpus at hand that has a PREFIX.json, and what that says."""
    infos = ((entry.path, read_info(entry.path)) for entry in config.corpora)
    return next(((prefix, info) for prefix, info in infos if info is not None), None)


def load_kept_tokenizer(config: TokensData, kept: Path) -> Tokenizer:
    """That of a run whose folder holds `kept`, also where its corpora are not. A folder may have been copied, or its
    model imported: the file counts only where tokens are not bytes, and where PREFIX.json, if at hand, says the same.
    """
    try:
        described, end_id = described_corpus(config), config.end_id
        name = described[1].tokenizer if config.tokenizer is None and described is not None else config.tokenizer
        if name == "bytes":
            return ByteTokenizer()
        if described is not None:
            check_tokenizer(kept, *described)
            end_id = described[1].end_id if end_id is None else end_id
        return open_tokenizer(str(kept), end_id)
    except ValueError as error:
        raise ValueError(f"data: {error}") from error


def _check_agreement(config: TokensData, corpora: list[TokenCorpus]) -> None:
    """All token ids mean the same."""
    known = [(corpus.setting, corpus.info) for corpus in corpora if corpus.info is not None]
    for setting, info in known[1:]:
        first_setting, first = known[0]
        for name in ("tokenizer_sha256", "vocab_size", "end_id"):
            if (one := getattr(info, name)) != (other := getattr(first, name)):
                raise ValueError(f"{setting} has another tokenizer than {first_setting}: {name} {one}, not {other}")
    for setting, info in known[:1]:
        if config.end_id not in (None, info.end_id):
            raise ValueError(f"data.end_id is {config.end_id}, documents of {setting} end with {info.end_id}")
        if config.tokenizer is not None:
            load_tokenizer(config)  # says what is wrong with the file
            given = None if config.tokenizer == "bytes" else file_sha256(Path(config.tokenizer))
            if given != info.tokenizer_sha256:
                raise ValueError(f"data.tokenizer is {config.tokenizer!r}, another tokenizer made {setting}")
