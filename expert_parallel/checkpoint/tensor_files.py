"""Writes and reads the safetensors files of a checkpoint.

A file consists of 8 bytes (the length of the header), the header (JSON), and the tensors one after another. We write it
ourselves rather than through the library: the data passes through memory once, in blocks, hashed on the way, and a
full disk raises an OSError that names the file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expert_parallel.checkpoint.folders import add_path_to_oserror
from expert_parallel.checkpoint.manifest import DTYPE_NAMES, DTYPES, FileMetadata

BLOCK = 8 * 1024**2  # bytes written and hashed at a time

TensorHook = Callable[[str, Tensor], None]


def write_tensors(
    path: Path, tensors: Sequence[tuple[str, Tensor]], on_tensor: TensorHook | None = None
) -> FileMetadata:
    """Writes a new safetensors file, waits until it is on disk, and returns its size and SHA-256.

    tensors: (key, tensor), on any device and with any strides; one at a time is copied to the CPU, made contiguous, and
    passed to `on_tensor`. Raises OSError, which names the file.
    """
    header: dict[str, dict[str, object]] = {}
    end = 0
    for key, tensor in tensors:
        assert key not in header, f"{key} is written twice"
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    with add_path_to_oserror(path), path.open("xb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            sha256.update(part)
            file.write(part)
        for key, tensor in tensors:
            tensor = tensor.detach().cpu().contiguous()  # device sync, if on a GPU
            if on_tensor is not None:
                on_tensor(key, tensor)
            content = tensor.flatten().view(torch.uint8).numpy().data
            for start in range(0, len(content), BLOCK):
                block = content[start : start + BLOCK]
                file.write(block)
                sha256.update(block)
        file.flush()
        os.fsync(file.fileno())
    return FileMetadata(sha256=sha256.hexdigest(), bytes=8 + len(text) + end)


class TensorFile:
    """Opens a safetensors file for reading, memory-mapped. Raises ValueError if it is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path} is missing, though the manifest names it")
        try:
            self.file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        self.keys = set(self.file.keys())

    def dtype_and_shape(self, key: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """Returns dtype and shape of a tensor; the dtype is None if checkpoints do not support it."""
        part = self.file.get_slice(key)
        return DTYPES.get(part.get_dtype()), tuple(part.get_shape())

    def read(self, key: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Reads the rectangle of a tensor that begins at `start` and has `shape`. The result may share memory with the
        mapped file."""
        part = self.file.get_slice(key)
        if not shape:
            return self.file.get_tensor(key)
        return part[tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))]


def check_sha256(path: Path, record: FileMetadata) -> None:
    """Raises ValueError if the file is missing, or its size or SHA-256 differs from `record`, the manifest's."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, though the manifest names it")
    if (size := path.stat().st_size) != record.bytes:
        raise ValueError(f"{path} is damaged: it has {size} bytes, the manifest says {record.bytes}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
            raise ValueError(f"{path} is damaged: its SHA-256 differs from the manifest's")
