"""Opens checkpoints for reading (`open_checkpoint`), and writes them from one process, tensor by tensor.

    step_00000100/
        manifest.json             its SHA-256; step, config, layout; files with SHA-256; tensors with shards and digests
        rank_00000.safetensors    written by rank 0
        ...

Tensors are named `weights/LOGICAL`, `exp_avg/LOGICAL` and `exp_avg_sq/LOGICAL`; moe/parameters.py defines LOGICAL.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from expert_parallel.checkpoint.digest import digest, format_digest
from expert_parallel.checkpoint.folders import (
    MANIFEST,
    find_checkpoint,
    list_checkpoints,
    make_partial_folder,
    publish,
    step_folder,
    update_latest_link,
    write_atomically,
)
from expert_parallel.checkpoint.manifest import (
    DTYPE_NAMES,
    FORMAT,
    WEIGHTS,
    FileMetadata,
    Manifest,
    ShardMetadata,
    TensorMetadata,
    check_shapes,
    read_manifest,
)
from expert_parallel.checkpoint.state import expected_shapes
from expert_parallel.checkpoint.tensor_files import TensorFile, check_sha256, write_tensors
from expert_parallel.model.config import ModelConfig

__all__ = ["Checkpoint", "CheckpointWriter", "expected_shapes", "list_checkpoints", "open_checkpoint"]


class Checkpoint:
    """Reads logical tensors from a checkpoint, whatever layout wrote it. Its files stay memory-mapped.

    Raises ValueError, which names file and tensor, if a file does not hold what the manifest says.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._files: dict[str, TensorFile] = {}

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def config(self) -> dict[str, Any]:
        return self.manifest.config

    @property
    def has_moments(self) -> bool:
        return self.manifest.has_moments

    @property
    def tensors(self) -> dict[str, TensorMetadata]:
        """Returns the metadata of each tensor by full name, such as `weights/embedding.weight`."""
        return self.manifest.tensors

    def read(self, name: str) -> Tensor:
        """Reads a whole logical tensor, in the dtype of the file."""
        shape = self.tensors[name].shape
        return self.read_slice(name, [0] * len(shape), shape)

    def read_slice(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Reads the rectangle of a logical tensor that begins at `start` and has `shape`, and nothing outside it;
        assembles it if it spans several shards."""
        entry = self.tensors[name]
        stop = [first + size for first, size in zip(start, shape, strict=True)]
        assert all(last <= whole for last, whole in zip(stop, entry.shape, strict=True)), (name, start, shape)
        part: Tensor | None = None
        for piece in entry.pieces:
            low = [max(a, b) for a, b in zip(start, piece.start, strict=True)]
            high = [min(a, b + n) for a, b, n in zip(stop, piece.start, piece.shape, strict=True)]
            size = [last - first for first, last in zip(low, high, strict=True)]
            if min(size, default=1) <= 0:
                continue
            first = [a - b for a, b in zip(low, piece.start, strict=True)]
            found = self._file_with_shard(name, entry, piece).read(piece.key, first, size)
            if size == list(shape):
                return found
            part = torch.empty(list(shape), dtype=entry.dtype) if part is None else part
            part[tuple(slice(a - b, a - b + n) for a, b, n in zip(low, start, size, strict=True))] = found
        assert part is not None, (name, start, shape)
        return part

    def check_file(self, file: str) -> None:
        """Raises ValueError if the file's SHA-256 or its tensors differ from those that the manifest lists."""
        check_sha256(self.path / file, self.manifest.files[file])
        named = set()
        for name, entry in self.tensors.items():
            for piece in entry.pieces:
                if piece.file == file:
                    self._file_with_shard(name, entry, piece)
                    named.add(piece.key)
        for key in self._file(file).keys - named:
            raise ValueError(f"{self.path / file} holds {key}, which the manifest does not name")

    def _file(self, file: str) -> TensorFile:
        if file not in self._files:
            self._files[file] = TensorFile(self.path / file)
        return self._files[file]

    def _file_with_shard(self, name: str, entry: TensorMetadata, piece: ShardMetadata) -> TensorFile:
        """Opens the file that holds a shard, and checks the shard's key, dtype and shape."""
        file = self._file(piece.file)
        if piece.key not in file.keys:
            raise ValueError(f"{file.path}: {name} is missing, though the manifest names it")
        dtype, shape = file.dtype_and_shape(piece.key)
        if (dtype, shape) != (entry.dtype, piece.shape):
            raise ValueError(
                f"{file.path}: {name} is {dtype} {list(shape)}, the manifest says {entry.dtype} {list(piece.shape)}"
            )
        return file


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint for reading.

    path: a `step_` folder, the link `latest`, or a folder of checkpoints or a run's folder, of which the newest
    checkpoint is taken. Raises ValueError if there is none or its manifest is invalid; tensor files are checked when
    they are read.
    """
    found = find_checkpoint(path)
    return Checkpoint(found, read_manifest(found))


class CheckpointWriter:
    """Writes a checkpoint from one process, in files of about `shard_bytes` bytes, of which it holds one in memory at a
    time.

    Use it as a context manager: if the body raises, the files written so far are removed. final: the checkpoint's
    folder, as `step_folder` names it. layout: a description for readers. Raises ValueError if `final` exists, or if a
    tensor is missing, given twice, of the wrong shape, or not part of the model that config["model"] describes.
    """

    def __init__(
        self,
        final: Path,
        *,
        step: int,
        config: dict[str, Any],
        shard_bytes: int = 2 * 1024**3,
        layout: str = "one process",
    ) -> None:
        assert final == step_folder(final.parent, step), (final, step)
        if final.exists():
            raise ValueError(f"{final} exists already")
        self.final = final
        self.step = step
        self.config = config
        self.shard_bytes = shard_bytes
        self.layout = layout
        self.expected = expected_shapes(ModelConfig.model_validate(config["model"]), moments=True)
        self.partial = make_partial_folder(final)
        self.files: dict[str, FileMetadata] = {}
        self.tensors: dict[str, TensorMetadata] = {}
        self._shard: list[tuple[str, Tensor]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a whole logical tensor. name: the full name, `weights/...`. tensor: floating point, on any device."""
        if name not in self.expected:
            raise ValueError(f"{self.final}: {name} is left over: the model has no such tensor")
        if list(tensor.shape) != self.expected[name]:
            raise ValueError(f"{self.final}: {name} has shape {list(tensor.shape)}, expected {self.expected[name]}")
        if name in self.tensors:
            raise ValueError(f"{self.final}: {name} is given twice")
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{self.final}: {name} is {tensor.dtype}, which checkpoints do not hold")
        held = tensor.detach().cpu().contiguous()  # device sync, if on a GPU: shards are written from host memory
        if self._shard and sum(part.nbytes for _, part in self._shard) + held.nbytes > self.shard_bytes:
            self._write_shard()
        if held.data_ptr() == tensor.data_ptr():
            held = held.clone()  # the caller may reuse its memory
        self._shard.append((name, held))
        shape, start = tuple(tensor.shape), (0,) * tensor.dim()
        piece = ShardMetadata(file=self._file, key=name, start=start, shape=shape)
        total = format_digest(digest(held, start, shape))
        self.tensors[name] = TensorMetadata(dtype=tensor.dtype, shape=shape, digest=total, pieces=(piece,))

    def finish(self) -> Path:
        """Checks that no tensor is missing (moments: all or none), writes the manifest, renames the folder to `final`,
        and returns `final`."""
        manifest = self._manifest()
        moments = manifest.has_moments
        expected = {n: s for n, s in self.expected.items() if moments or n.startswith(f"{WEIGHTS}/")}
        check_shapes(f"{self.final}", manifest.shapes, expected)
        self._write_shard()
        write_atomically(self.partial / MANIFEST, self._manifest().to_json())
        publish(self.partial, self.final)
        update_latest_link(self.final.parent)
        return self.final

    @property
    def _file(self) -> str:
        return f"shard_{len(self.files):05d}.safetensors"

    def _manifest(self) -> Manifest:
        return Manifest(
            format=FORMAT,
            step=self.step,
            config=self.config,
            layout=self.layout,
            files=self.files,
            tensors=self.tensors,
        )

    def _write_shard(self) -> None:
        if self._shard:
            self.files[self._file] = write_tensors(self.partial / self._file, self._shard)
            self._shard = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
