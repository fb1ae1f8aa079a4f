"""Opens the data of a run, whatever its kind: a sampler for training, held-out sequences, and a description."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_parallel.data import tokens
from expert_parallel.data.blend import BlendSampler, blended_held_out
from expert_parallel.data.config import DataConfig, FilesData, StdlibData, TokensData
from expert_parallel.data.sampler import Sampler, Sequences, TokenSampler, held_out_sequences
from expert_parallel.data.text import load_corpus
from expert_parallel.data.tokenizer import SEPARATOR, ByteTokenizer, Tokenizer


@dataclass(frozen=True)
class DataRequirements:
    """Holds the requirements of a run that its data must meet."""

    sequence_length: int
    vocab_size: int
    held_out_sequences: int
    num_samples: int  # of the whole run
    seed: int


@dataclass(frozen=True, eq=False)
class RunData:
    """Holds the opened data of a run.

    sampler: draws the training sequences. description: a text for the terminal. config: the settings of the data, with
    data.sha256 and the id of the token that ends documents filled in.
    """

    sampler: Sampler
    held_out: Sequences
    description: str
    config: StdlibData | FilesData | TokensData


def open_data(config: DataConfig, requirements: DataRequirements) -> RunData:
    """Opens the data. Raises ValueError if it cannot be read, does not fit the run, or does not match data.sha256."""
    data = OPENERS[config.kind](config, requirements)
    if config.sha256 not in (None, found := data.config.sha256):
        raise ValueError(f"data.sha256 is {config.sha256} but the data has {found}: it is other data")
    return data


def _open_text(config: StdlibData | FilesData, requirements: DataRequirements) -> RunData:
    corpus = load_corpus(config)
    end_id = SEPARATOR[0] if config.documents == "separate" else None
    length = requirements.sequence_length
    sampler = TokenSampler(corpus.train, length, requirements.seed, end_id=end_id)
    held_out = held_out_sequences(corpus.held_out, length, requirements.held_out_sequences, end_id)
    return RunData(sampler, held_out, corpus.description, config.model_copy(update={"sha256": corpus.sha256}))


def _open_tokens(config: TokensData, requirements: DataRequirements) -> RunData:
    corpora = tokens.open_corpora(config, requirements.vocab_size)
    end_id = tokens.find_end_id(config, corpora)
    train, held = tokens.split_corpora(config, corpora, end_id)
    sampler = BlendSampler(train, requirements.sequence_length, requirements.seed, requirements.vocab_size)
    held_out = blended_held_out(
        held, requirements.sequence_length, requirements.held_out_sequences, requirements.vocab_size
    )
    digests = [tokens.corpus_digest(corpus) for corpus in corpora]
    sha256 = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    total, epochs = sum(corpus.weight for corpus in corpora), sampler.epochs(requirements.num_samples)
    lines = [
        f"{corpus.tokens.path}: {corpus.tokens.num_documents:,} documents, {len(here.tokens):,} tokens for training, "
        f"{len(there.tokens):,} held out; {corpus.weight / total:.1%} of the sequences, {epochs_here:.3g} epochs"
        for corpus, here, there, epochs_here in zip(corpora, train, held, epochs, strict=True)
    ]
    description = "\n      ".join([*lines, f"sha256 {sha256[:12]}"])
    return RunData(sampler, held_out, description, config.model_copy(update={"sha256": sha256, "end_id": end_id}))


# To add a kind of data: a config class in DataConfig and a line here.
OPENERS: dict[str, Callable[[Any, DataRequirements], RunData]] = {
    "stdlib": _open_text,
    "files": _open_text,
    "tokens": _open_tokens,
}


TOKENIZER_FILE = "tokenizer.json"  # in a run's folder
ORIGIN = "huggingface"  # in a run's folder: config.json, tokenizer files etc. of the model that it was imported from


def load_tokenizer(config: DataConfig, folder: Path | None = None) -> Tokenizer | None:
    """Returns the tokenizer of the data, or None if it is unknown, as for a corpus that Megatron made.

    folder: the run's folder, which keeps a copy of the tokenizer, so that the run can generate text without its
    corpora.
    """
    if not isinstance(config, TokensData):
        return ByteTokenizer()
    if folder is not None and (folder / TOKENIZER_FILE).is_file():
        return tokens.load_saved_tokenizer(config, folder / TOKENIZER_FILE)
    return tokens.load_tokenizer(config)


def save_tokenizer(config: DataConfig, folder: Path) -> None:
    """Copies the tokenizer's file into the folder of a run.

    If tokens are bytes, it removes a tokenizer that is there: the folder is a copy of another run, or holds an imported
    model. If no tokenizer is known, it changes nothing.
    """
    name = tokens.tokenizer_name(config) if isinstance(config, TokensData) else ("bytes", None)
    if name is None:
        return
    kept = folder / TOKENIZER_FILE
    if name[0] == "bytes":
        kept.unlink(missing_ok=True)
    elif not (kept.exists() and kept.samefile(name[0])):
        shutil.copyfile(name[0], kept)
