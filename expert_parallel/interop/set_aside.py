"""Keeps the tensors that an import sets aside in the run, beside the files of its origin, and exports them again."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expert_parallel.checkpoint.manifest import DTYPE_NAMES, DTYPES
from expert_parallel.data.reading import read_json
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.folder import CONFIG, format_bytes
from expert_parallel.interop.fp8_export import keep_scales
from expert_parallel.interop.hf_config import Tree
from expert_parallel.interop.hf_model import HuggingFaceModel, logical_shapes, read_model_config
from expert_parallel.interop.ignored_tensors import MTP, TIED, UNUSED, list_briefly
from expert_parallel.model.config import ModelConfig

INDEX = "set_aside.json"
SHARD_BYTES = 256 * 1024**2  # of a file, which is in memory while it is written


@dataclass(frozen=True)
class SetAside:
    """Holds what was set aside when a folder was imported.

    folder: where the files are. files: the file of each tensor that is kept, by name. tied: the dtype, as safetensors
    names it, of each tensor that equaled the embedding, to which it is tied.
    """

    folder: Path
    files: dict[str, str]
    tied: dict[str, str]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the kept tensors in their dtype; they stay memory-mapped. Raises a ValueError if a file is missing or
        damaged."""
        for name, file in self.files.items():
            try:
                with safe_open(self.folder / file, "pt") as opened:
                    yield name, opened.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{self.folder / file} cannot be read: {error}") from error

    def exported(self, table: Tensor | None, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors of an export. table: the embedding, if heads are tied to it. dtype: converts to it all but
        selection biases, whose updates are small; None keeps each tensor's own, and so every bit."""
        if table is not None:
            # Copies: safetensors refuses to write the same memory twice.
            yield from ((name, table.to(dtype or DTYPES[own], copy=True)) for name, own in self.tied.items())
        for name, tensor in self.tensors():
            keeps = dtype is None or name.endswith("e_score_correction_bias")
            yield name, tensor if keeps else tensor.to(dtype)


def keep_set_aside(source: HuggingFaceModel, folder: Path) -> list[str]:
    """Writes to files in `folder`, bit for bit, the tensors of parts that our model does not have, such as multi-token
    prediction. INDEX says which file each is in, and which tensors are tied to the embedding. Writes the scales of
    quantized weights, too. Returns a sentence if it writes tensors.

    Quantized tensors are kept in the dtype in which weights are imported. Memory holds one file of SHARD_BYTES, or a
    larger tensor.
    """
    keep_scales(source.folder, folder)
    tied = {name: source.folder.dtype(name) for name, kind in source.ignored.items() if kind == TIED}
    names = [name for name, kind in source.ignored.items() if kind in (MTP, UNUSED)]
    if not tied and not names:
        return []
    files: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = count = 0
    for name in names:
        tensor = source.folder.read(name)
        if shard and sum(part.nbytes for part in shard.values()) + tensor.nbytes > SHARD_BYTES:
            _write(shard, folder / f"set_aside-{count:05d}.safetensors")
            shard, count = {}, count + 1
        shard[name], files[name] = tensor, f"set_aside-{count:05d}.safetensors"
        total += tensor.nbytes
    if shard:
        _write(shard, folder / f"set_aside-{count:05d}.safetensors")
    (folder / INDEX).write_text(json.dumps({"tied": tied, "weight_map": files}, indent=2) + "\n", encoding="utf-8")
    return [f"kept {list_briefly(names)} for export, {format_bytes(total)}"] if names else []


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes one file. Raises an OSError that names it."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def read_set_aside(folder: Path | None) -> SetAside | None:
    """Returns what was set aside, given the folder of the origin's files, or None if it has no INDEX. Raises a
    ValueError if INDEX is not valid."""
    if folder is None or not (folder / INDEX).is_file():
        return None
    tree = read_json(folder / INDEX)
    files, tied = tree.get("weight_map"), tree.get("tied")
    if not isinstance(files, dict) or not isinstance(tied, dict):
        raise ValueError(f"{folder / INDEX} lacks weight_map or tied")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} assigns {name!r} to {file!r}, which is no safetensors file beside it")
    for name, dtype in tied.items():
        if dtype not in DTYPES:
            raise ValueError(f"{folder / INDEX}: the dtype of {name!r} is {dtype!r}, it must be {' or '.join(DTYPES)}")
    return SetAside(folder, files, tied)


def set_aside_for_export(
    folder: Path | None, family: str, model: ModelConfig, config: Tree, print_message: Callable[[str], None]
) -> SetAside | None:
    """Returns what was set aside, or None if an export cannot have it again. Prints which tensors it has, or why not.

    folder: that of the origin's files. family, model, config: the exported family, model and config.json.
    """
    found = read_set_aside(folder)
    if found is None:
        return None
    reason = _reason_to_leave_out(found, family, model, config)
    listed = list_briefly(list(found.files))
    if found.files:
        print_message(f"left out {listed}: {reason}" if reason else f"exported {listed} as imported, not trained")
    return None if reason else found


def _reason_to_leave_out(found: SetAside, family: str, model: ModelConfig, config: Tree) -> str | None:
    """Returns why the exported model cannot have the tensors that were set aside, or None if it can."""
    origin = read_json(found.folder / CONFIG)
    if origin.get("model_type") != family:
        return f"the model was imported as {origin.get('model_type')}, and is exported as {family}"
    old = logical_shapes(read_model_config(FAMILIES[family], {**origin, "quantization_config": None}))
    if model.mtp is not None and found.files:
        return "the model has blocks of multi-token prediction of its own (model.mtp)"
    new = logical_shapes(model.model_copy(update={"mtp": None}))
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name) and name != "unembedding.weight":  # which depends on how a head was set aside
            return f"{name} had the shape {old.get(name)} in the imported model, and has {new.get(name)}"
    quantized = [name for name, tensor in found.tensors() if tensor.dtype not in DTYPE_NAMES]
    if quantized and not config.get("quantization_config"):
        return f"{quantized[0]} is quantized, and the export is not"
    return None
