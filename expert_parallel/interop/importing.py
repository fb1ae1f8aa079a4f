"""Imports a Hugging Face folder as a run folder, which `generate` and `train` can use."""

import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from expert_parallel.checkpoint.files import CheckpointWriter
from expert_parallel.data.imported import read_imported_generation
from expert_parallel.data.open import ORIGIN, TOKENIZER_FILE
from expert_parallel.interop.folder import CONFIG, COPIED_FILES
from expert_parallel.interop.hf_model import HuggingFaceModel
from expert_parallel.training.config import Config, dump_config

MAX_SEQUENCE_LENGTH = 2048  # training.sequence_length of the new config is the model's limit, but at most this


def import_folder(path: Path, out: Path, shard_bytes: int) -> Path:
    """Imports a model and returns the run folder `out`. Weights keep their bits and dtype.

    Raises a ValueError for a model that we do not compute exactly.
    """
    source = HuggingFaceModel(path)
    config, tokenizer = imported_config(source, out), path / TOKENIZER_FILE
    return write_run(out, config, source.weights(), origin=path, tokenizer=tokenizer, shard_bytes=shard_bytes)


def imported_config(source: HuggingFaceModel, out: Path) -> Config:
    """Returns the config of the new run, which the user can edit.

    Sets the model, initial values for training, and tokenized data without any corpora yet.
    """
    theirs = source.folder.config
    longest = theirs.get("max_position_embeddings")
    ends = theirs.get("eos_token_id")
    end_id = ends[0] if isinstance(ends, list) and ends else ends
    training = {
        "steps": 1000,
        "global_batch": 8,
        "sequence_length": min(longest, MAX_SEQUENCE_LENGTH) if isinstance(longest, int) else MAX_SEQUENCE_LENGTH,
    }
    return Config.model_validate(
        {
            "run": {"folder": str(out)},
            "model": source.model.model_dump(mode="json"),
            "training": training,
            "data": {"kind": "tokens", "end_id": end_id if isinstance(end_id, int) else None},
        }
    )


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


def write_run(
    out: Path,
    config: Config,
    weights: Iterable[tuple[str, Tensor]],
    *,
    origin: Path | None,
    tokenizer: Path | None,
    shard_bytes: int,
) -> Path:
    """Writes a run folder: config.yaml, a checkpoint of step 0 and, if given, the tokenizer file. Returns `out`.

    weights: by logical name. origin: a Hugging Face folder, whose config.json and tokenizer files are copied into
    `ORIGIN`, where generation reads them. The folder gets its name when it is complete; an error leaves nothing behind.
    """
    if out.exists():
        raise ValueError(f"{out} exists already")
    if origin is not None:
        read_imported_generation(origin)  # raises an error for files that generation could not follow
    partial = out.parent / f"partial_{out.name}_{secrets.token_hex(4)}"
    tree: dict[str, Any] = config.model_dump(mode="json")
    try:
        partial.mkdir(parents=True)
        if origin is not None:
            (partial / ORIGIN).mkdir()
            for name in (CONFIG, *COPIED_FILES):
                if (origin / name).is_file():
                    shutil.copyfile(origin / name, partial / ORIGIN / name)
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
