"""Imports a Hugging Face folder as a run folder, which `generate` and `train` can use."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from expert_parallel.checkpoint.files import CheckpointWriter
from expert_parallel.data.imported import read_imported_generation
from expert_parallel.data.open import ORIGIN, TOKENIZER_FILE
from expert_parallel.data.reading import read_json
from expert_parallel.data.tokenizer import FileTokenizer
from expert_parallel.interop.folder import CONFIG, COPIED_FILES
from expert_parallel.interop.hf_config import Tree
from expert_parallel.interop.hf_model import HuggingFaceModel
from expert_parallel.interop.set_aside import keep_set_aside
from expert_parallel.training.config import Config, dump_config, read_config

MAX_SEQUENCE_LENGTH = 2048  # training.sequence_length of the new config is the model's limit, but at most this


def import_folder(
    path: Path,
    out: Path,
    shard_bytes: int,
    print_message: Callable[[str], None] = print,
    dtype: str | None = None,
) -> Path:
    """Imports a model and returns the run folder `out`. Weights keep their bits and dtype.

    dtype: what quantized weights become, see `open_folder`. print_message: called, once the run is written, for what
    differs from the folder, such as tensors that are set aside. Raises a ValueError for a model that we do not compute
    exactly.
    """
    source = HuggingFaceModel(path, dtype)
    config, tokenizer = imported_config(source, out), path / TOKENIZER_FILE
    source.check_values()  # the only errors that values give: before anything is written
    kept: list[str] = []
    run = write_run(
        out,
        config,
        source.weights(),
        origin=path,
        tokenizer=tokenizer,
        shard_bytes=shard_bytes,
        keep_beside=lambda folder: kept.extend(keep_set_aside(source, folder)),
    )
    for note in [*source.notes, *kept]:
        print_message(note)
    return run


def imported_config(source: HuggingFaceModel, out: Path) -> Config:
    """Returns the config of the new run, which the user can edit."""
    folder = source.folder
    tree = run_tree(folder.config, source.model.model_dump(mode="json"), str(out))
    return read_config(tree, f"{folder.path / CONFIG} gives a config that is not valid")


def run_tree(theirs: Tree, model: Tree, folder: str) -> Tree:
    """Returns the settings of a run: its model, initial values for training, and tokenized data without corpora yet.

    theirs: the config.json. model: our settings for it. folder: `run.folder`.
    """
    longest = theirs.get("max_position_embeddings")
    ends = theirs.get("eos_token_id")
    end_id = ends[0] if isinstance(ends, list) and ends else ends
    training = {
        "steps": 1000,
        "global_batch": 8,
        "sequence_length": min(longest, MAX_SEQUENCE_LENGTH) if isinstance(longest, int) else MAX_SEQUENCE_LENGTH,
    }
    return {
        "run": {"folder": folder},
        "model": model,
        "training": training,
        "data": {"kind": "tokens", "corpora": [], "end_id": end_id if isinstance(end_id, int) else None},
    }


def find_origin(path: Path) -> Path | None:
    """Returns the folder with the Hugging Face files that a run or checkpoint was imported from, or None."""
    run = run_folder(path)
    return run / ORIGIN if run is not None and (run / ORIGIN / CONFIG).is_file() else None


def find_tokenizer(path: Path) -> Path | None:
    """Returns the tokenizer file of a run or checkpoint, or None."""
    run = run_folder(path)
    return run / TOKENIZER_FILE if run is not None and (run / TOKENIZER_FILE).is_file() else None


def run_folder(path: Path) -> Path | None:
    """Returns the run folder of a run, its folder of checkpoints or one of them; None if a checkpoint is in no run."""
    candidates = (path, *path.resolve().parents[:2])
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def refuse_larger_tokenizer(path: Path, vocab_size: int) -> None:
    """Raises a ValueError if a tokenizer.json has an id, such as that of an added token, that the model does not have.

    Fewer ids are usual: tables are often padded.
    """
    largest = FileTokenizer(path).vocab_size - 1
    if largest >= vocab_size:
        raise ValueError(
            f"{path} has token ids up to {largest}, but the model has only {vocab_size} (0 to {vocab_size - 1}; "
            "model.vocab_size): it is the tokenizer of another model"
        )


def origin_files(origin: Path) -> list[Path]:
    """Returns the files of a Hugging Face folder that a run keeps: config.json and those of tokenizer and
    generation."""
    return [origin / name for name in (CONFIG, *COPIED_FILES) if (origin / name).is_file()]


def check_origin_files(origin: Path) -> None:
    """Raises a ValueError if one of these files is damaged, or asks for what generation could not follow."""
    for file in origin_files(origin):
        if file.suffix == ".json":
            read_json(file)
    read_imported_generation(origin)


def copy_origin_files(origin: Path, folder: Path) -> None:
    """Creates a folder with copies of these files."""
    folder.mkdir()
    for file in origin_files(origin):
        shutil.copyfile(file, folder / file.name)


def write_run(
    out: Path,
    config: Config,
    weights: Iterable[tuple[str, Tensor]],
    *,
    origin: Path | None,
    tokenizer: Path | None,
    shard_bytes: int,
    keep_beside: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Writes a run folder: config.yaml, a checkpoint of step 0 and, if given, the tokenizer file. Returns `out`.

    Raises a ValueError, before anything is written, if `out` exists, the tokenizer has more ids than the model, or a
    JSON file of the origin is damaged.

    weights: by logical name. origin: a Hugging Face folder, whose config.json and tokenizer files are copied into
    `ORIGIN`, where generation reads them. keep_beside: writes further files into that folder. The run's folder gets its
    name when it is complete; an error leaves nothing behind.
    """
    if os.path.lexists(out):  # a broken link, too
        raise ValueError(f"{out} exists already")
    partial = out.parent / f"partial_{out.name}_{secrets.token_hex(4)}"
    tree: dict[str, Any] = config.model_dump(mode="json")
    if tokenizer is not None and tokenizer.is_file():
        refuse_larger_tokenizer(tokenizer, config.model.vocab_size)
    if origin is not None:
        check_origin_files(origin)
    try:
        partial.mkdir(parents=True)
        if origin is not None:
            copy_origin_files(origin, partial / ORIGIN)
            keep_beside(partial / ORIGIN)
        if tokenizer is not None and tokenizer.is_file():
            shutil.copyfile(tokenizer, partial / TOKENIZER_FILE)
        (partial / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        final = partial / "checkpoints" / "step_00000000"
        with CheckpointWriter(final, step=0, config=tree, shard_bytes=shard_bytes, layout="one process") as writer:
            for name, tensor in weights:
                writer.add(f"weights/{name}", tensor)
            writer.finish()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out
