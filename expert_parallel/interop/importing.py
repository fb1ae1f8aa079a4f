"""A Hugging Face folder -> a run folder of ours, from which `generate` speaks and `train` goes on."""

import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from expert_parallel.checkpoint.files import CheckpointWriter
from expert_parallel.data.open import TOKENIZER_FILE
from expert_parallel.interop.folder import CONFIG, COPIED_FILES
from expert_parallel.interop.hf_model import HuggingFaceModel
from expert_parallel.training.config import Config, dump_config

ORIGIN = "huggingface"  # in a run: config.json, tokenizer and the like, as they were when the model was imported
MAX_SEQUENCE_LENGTH = 2048  # tokens of a training sequence, where the model allows more


def import_folder(path: Path, out: Path, shard_bytes: int) -> Path:
    """Weights keep the bits and the dtype that they have in the folder. ValueError for what we cannot have exactly."""
    source = HuggingFaceModel(path)
    config, tokenizer = imported_config(source, out), path / TOKENIZER_FILE
    return write_run(out, config, source.weights(), origin=path, tokenizer=tokenizer, shard_bytes=shard_bytes)


def imported_config(source: HuggingFaceModel, out: Path) -> Config:
    """A config to edit: the model is given, training has numbers to start from, data is text through the folder's
    tokenizer, without corpora yet."""
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
    """What the run of this checkpoint was imported from."""
    run = run_folder(path)
    return run / ORIGIN if run is not None and (run / ORIGIN / CONFIG).is_file() else None


def find_tokenizer(path: Path) -> Path | None:
    """That of the run of this checkpoint."""
    run = run_folder(path)
    return run / TOKENIZER_FILE if run is not None and (run / TOKENIZER_FILE).is_file() else None


def run_folder(path: Path) -> Path | None:
    """The run whose folder, checkpoints or checkpoint `path` is; None where a checkpoint lies by itself."""
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
    """config.yaml, a checkpoint of step 0, and the tokenizer's file if there is one: whole or not at all. weights: by
    logical name. origin: a Hugging Face folder whose config.json and the like are kept beside."""
    if out.exists():
        raise ValueError(f"{out} exists already")
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
