"""Checkpoints: safetensors and JSON, in logical names, independent of the layout that wrote them. Nothing is pickled.

    checkpoints/step_00000100/
        manifest.json             step, model config, every tensor's file, shape and dtype, every file's SHA-256
        rank_00000.safetensors    the tensors that rank 0 wrote: weights/NAME, exp_avg/NAME, exp_avg_sq/NAME
        ...

Each logical tensor stands in exactly one file. A folder gets its final name by an atomic rename when it is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from expert_parallel.mesh import ParallelMesh
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.pipeline import Pipeline
from expert_parallel.model.transformer import ModelConfig, Transformer
from expert_parallel.moe.parameters import fill, logical_parameters
from expert_parallel.runtime import Runtime
from expert_parallel.settings import Settings
from expert_parallel.training.grads import is_first_holder

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointConfig(Settings):
    """`every`: steps between checkpoints; one is written at the end in any case. `keep`: the newest that stay."""

    every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)


def save_checkpoint(
    folder: Path,
    model: Transformer | Pipeline,
    optimizer: torch.optim.Optimizer,
    mesh: ParallelMesh,
    runtime: Runtime,
    *,
    step: int,
    config: dict[str, Any],
    keep: int,
) -> Path:
    """Writes `folder/step_XXXXXXXX`, all ranks together, and removes all but the newest `keep`. step: steps done."""
    final = folder / f"step_{step:08d}"
    partial = folder / f"partial_{step:08d}"
    tensors = _tensors_to_write(model, optimizer, mesh)  # collectives: every rank takes part

    def clear() -> None:
        if runtime.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> None:
        if tensors:
            path = partial / f"rank_{runtime.rank:05d}.safetensors"
            try:
                save_file(tensors, path)
            except SafetensorError as error:
                raise OSError(f"cannot write {path}: {error}") from error
            _sync(path)

    def finish() -> None:
        if runtime.rank == 0:
            _write_manifest(partial, step, config, expected=_expected_names(model.config, optimizer))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync(folder)
            for old in list_checkpoints(folder)[:-keep]:
                shutil.rmtree(old)

    for work in (clear, write, finish):
        runtime.together(work)
    return final


def load_checkpoint(
    path: Path, model: Transformer | Pipeline, optimizer: torch.optim.Optimizer | None, runtime: Runtime | None = None
) -> dict[str, Any]:
    """Fills model and optimizer, whatever layout they are in, and returns the manifest.

    Refuses, before anything is changed, a file that is missing or differs from its digest, and any name or shape that
    is missing, left over or different. Communicates nothing but the agreement that all ranks can go on.
    """
    rank, world_size = (0, 1) if runtime is None else (runtime.rank, runtime.world_size)

    def check() -> dict[str, Any]:
        manifest = read_manifest(path)
        for name, digest in list(manifest["files"].items())[rank::world_size]:
            _check_digest(path / name, digest)
        _check_names(path, manifest, model, optimizer)
        return manifest

    manifest = check() if runtime is None else runtime.together(check)
    reader = _Reader(path, manifest)
    for name, buffer in _saved_buffers(model):
        fill(buffer, reader.read(f"weights/{name}"))
    for logical in logical_parameters(model):
        logical.fill(logical.parameter, [reader.read(f"weights/{name}") for name in logical.names])
        if optimizer is None:
            continue
        state = optimizer.state[logical.parameter]
        state["step"] = torch.tensor(float(manifest["step"]))
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(logical.parameter, requires_grad=False)
            logical.fill(state[moment], [reader.read(f"{moment}/{name}") for name in logical.names])
    return manifest


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete ones, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "manifest.json").is_file())


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a checkpoint: manifest.json cannot be read ({error})") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: manifest.json has format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def _tensors_to_write(
    model: Transformer | Pipeline, optimizer: torch.optim.Optimizer, mesh: ParallelMesh
) -> dict[str, Tensor]:
    """This rank's part: each logical tensor is written by the first rank that holds it, or its first slice."""
    tensors = {f"weights/{name}": buffer.cpu() for name, buffer in _saved_buffers(model) if mesh.stage_rank == 0}
    for logical in logical_parameters(model):
        state = optimizer.state[logical.parameter]
        parts = {"weights": logical.parameter.detach(), **{moment: state[moment] for moment in MOMENTS}}
        is_first_slice = logical.slice is None or logical.slice.index == 0
        writes = is_first_slice and is_first_holder(logical, mesh, sharded=False)
        for part, value in parts.items():
            whole = logical.whole(value)  # a collective: every rank takes part
            if writes:
                tensors.update({f"{part}/{name}": tensor.cpu().contiguous().clone() for name, tensor in whole.items()})
    return tensors


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Balance biases, with the names that they have in the whole model."""
    for part in model if isinstance(model, nn.ModuleList) else [model]:
        yield from ((name, buffer) for name, buffer in part.named_buffers() if name.endswith("balance_bias_E"))


def _expected_names(config: ModelConfig, optimizer: torch.optim.Optimizer | None) -> dict[str, list[int]]:
    """Every logical tensor of a whole checkpoint and its shape, from the config alone."""
    model = build_model(config, device=torch.device("meta"))
    shapes = {f"weights/{name}": list(buffer.shape) for name, buffer in _saved_buffers(model)}
    parts = ("weights", *MOMENTS) if optimizer is not None else ("weights",)
    for logical in logical_parameters(model):
        shapes.update({f"{part}/{name}": list(logical.shape) for part in parts for name in logical.names})
    return shapes


def _write_manifest(folder: Path, step: int, config: dict[str, Any], expected: dict[str, list[int]]) -> None:
    files = {path.name: _digest(path) for path in sorted(folder.glob("*.safetensors"))}
    tensors: dict[str, dict[str, Any]] = {}
    for file in files:
        with safe_open(folder / file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a dict
                assert name not in tensors, f"{name} was written twice: {tensors[name]['file']} and {file}"
                part = reader.get_slice(name)
                tensors[name] = {"file": file, "shape": part.get_shape(), "dtype": part.get_dtype()}
    _compare(f"{folder}: what the ranks wrote", {name: entry["shape"] for name, entry in tensors.items()}, expected)
    manifest = {"format": FORMAT, "step": step, "config": config, "files": files, "tensors": tensors}
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1))
    _sync(path)


def _check_names(
    path: Path, manifest: dict[str, Any], model: Transformer | Pipeline, optimizer: torch.optim.Optimizer | None
) -> None:
    found = {name: entry["shape"] for name, entry in manifest["tensors"].items()}
    if optimizer is None:
        found = {name: shape for name, shape in found.items() if name.startswith("weights/")}
    _compare(f"{path}: checkpoint of another model", found, _expected_names(model.config, optimizer))


def _compare(what: str, found: dict[str, list[int]], expected: dict[str, list[int]]) -> None:
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{what}: {name} is missing ({len(found)} tensors found, {len(expected)} expected)")
        if found[name] != shape:
            raise ValueError(f"{what}: {name} has shape {found[name]}, expected {shape}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{what}: {name} is left over ({len(found)} tensors found, {len(expected)} expected)")


def _check_digest(path: Path, digest: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing, though the manifest names it")
    if _digest(path) != digest:
        raise ValueError(f"{path} is damaged: its SHA-256 differs from the manifest's")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class _Reader:
    """Reads single tensors; files stay open as memory maps."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.tensors = manifest["tensors"]
        self.files = {file: safe_open(path / file, "pt") for file in manifest["files"]}

    def read(self, name: str) -> Tensor:
        return self.files[self.tensors[name]["file"]].get_tensor(name)
