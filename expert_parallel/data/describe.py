"""Describes the data of a run as far as it is on this machine, as `expert-parallel check` does: it may run on a laptop,
with the data on the cluster."""

import glob
import os
from collections.abc import Callable
from typing import Any

from expert_parallel.data.config import DataConfig, FilesData, StdlibData, TokensData
from expert_parallel.data.formats import find_inputs
from expert_parallel.data.open import DataRequirements, open_data
from expert_parallel.data.tokens import open_corpora


def describe_data(config: DataConfig, requirements: DataRequirements) -> tuple[str, list[str]]:
    """Returns (a description of the data, a sentence for each of its paths that does not exist on this machine).

    Reads the indexes of token files and the first bytes of text files. Raises ValueError if data that exists here
    cannot be read, or token files do not fit the run.
    """
    return DESCRIBERS[config.kind](config, requirements)


def _describe_stdlib(config: StdlibData, requirements: DataRequirements) -> tuple[str, list[str]]:
    return config.describe(), []


def _describe_files(config: FilesData, requirements: DataRequirements) -> tuple[str, list[str]]:
    absent = {}
    for index, pattern in enumerate(config.paths):
        if not os.path.lexists(pattern) and not glob.glob(pattern, recursive=True):
            what = "matches no file" if glob.has_magic(pattern) else "does not exist"
            absent[index] = f"data.paths[{index}]: {pattern} {what} {_here(pattern)}"
    first, num_more = config.paths[0], len(config.paths) - 1
    name = f"files {first}{f' and {num_more:,} more paths' if num_more else ''}"
    if len(absent) == len(config.paths):
        return f"{name}: none is on this machine", list(absent.values())
    found, _ = find_inputs(config.paths, "data.paths", config.format, "data.format", absent)
    size = sum(file.bytes for file in found)
    count = f"{len(found):,} file{'' if len(found) == 1 else 's'}"
    return f"{name}: {count}, {size:,} bytes on disk", list(absent.values())


def _describe_tokens(config: TokensData, requirements: DataRequirements) -> tuple[str, list[str]]:
    if not config.corpora:
        return "none yet: data.corpora is empty", []
    absent = {}
    for index, entry in enumerate(config.corpora):
        if not any(os.path.lexists(entry.path + suffix) for suffix in ("", ".bin", ".idx", ".json")):
            absent[index] = f"data.corpora[{index}].path: {entry.path}.bin does not exist {_here(entry.path)}"
    sentences, here = list(absent.values()), config
    if config.tokenizer not in (None, "bytes") and not os.path.lexists(config.tokenizer):
        sentences.append(f"data.tokenizer: {config.tokenizer} does not exist {_here(config.tokenizer)}")
        here = config.model_copy(update={"tokenizer": None})
    if not sentences:
        return open_data(config, requirements).description, []
    corpora = open_corpora(here, requirements.vocab_size, absent)
    if not corpora:
        return (
            f"{len(config.corpora)} token file{'s' if config.corpora[1:] else ''}: none is on this machine",
            sentences,
        )
    count = sum(corpus.tokens.num_tokens for corpus in corpora)
    return f"{count:,} tokens on this machine, in {len(corpora)} of {len(config.corpora)} corpora", sentences


def _here(path: str) -> str:
    """Returns the place where a path was looked for."""
    return "on this machine" + ("" if os.path.isabs(path) else f" (working folder {os.getcwd()})")


# One line for each kind of data, as in OPENERS.
DESCRIBERS: dict[str, Callable[[Any, DataRequirements], tuple[str, list[str]]]] = {
    "stdlib": _describe_stdlib,
    "files": _describe_files,
    "tokens": _describe_tokens,
}
