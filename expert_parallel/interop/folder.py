"""Reads and writes folders of Hugging Face models: config.json, safetensors files, their index, tokenizer files.

Reads tensor by tensor and writes shard by shard, so memory holds at most one shard. Nothing is unpickled.
"""

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expert_parallel.data.reading import read_json, unique_keys

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Copied unchanged, since only tokenizers and generation use them.
COPIED_FILES = (
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def missing(kind: str, path: Path) -> str:
    """Returns a sentence on a folder or file that does not exist; for the name of a model on the Hugging Face hub, how
    to download it. kind: `folder` or `file`."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)) or path.parent.exists():
        return f"there is no {kind} {path}"
    return (
        f"there is no {kind} {path}; a model of the hub is downloaded first, with "
        f"`hf download {path} --local-dir {path.name}`, and imported from the folder {path.name}"
    )


def format_bytes(count: int) -> str:
    """Formats a number of bytes, such as 14.2 GB.

    >>> format_bytes(999), format_bytes(1_230_000)
    ('999 bytes', '1.2 MB')
    """
    units = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}
    return next((f"{count / size:,.1f} {unit}" for unit, size in units.items() if count >= size), f"{count} bytes")


class HuggingFaceFolder:
    """Reads the tensors of a folder, whose files stay memory-mapped.

    Raises a ValueError if a file is missing or damaged, or if the index and the files disagree.
    """

    def __init__(self, path: Path) -> None:
        if path.is_file():
            raise ValueError(f"{path} is a file, it must be a folder (a {CONFIG} alone needs --config-only)")
        if not path.is_dir():
            raise ValueError(missing("folder", path))
        if not (path / CONFIG).is_file():
            raise ValueError(f"{path} is not a Hugging Face model: it has no {CONFIG}")
        self.path, self.config = path, read_json(path / CONFIG)
        self.files: dict[str, Any] = {}  # by tensor name: the open file that holds it
        by_index = read_index(path)
        self.file_names = sorted(set(by_index.values())) or [SINGLE]
        for file in self.file_names:
            self._open(file, {name for name, place in by_index.items() if place == file} if by_index else None)

    def _open(self, file: str, wanted: set[str] | None) -> None:
        """Opens a file. wanted: the tensors that the index assigns to it; None: there is no index."""
        try:
            opened = safe_open(self.path / file, "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path / file} cannot be read: {error}") from error
        refuse_doubled_names(self.path / file)
        names = set(opened.keys())
        for name in sorted(names):
            if not name.isprintable():
                raise ValueError(f"{self.path / file} holds a tensor whose name is not printable: {name!r}")
            if wanted is not None and name not in wanted:
                raise ValueError(f"{self.path / file} holds {name}, which {INDEX} does not assign to this file")
            self.files[name] = opened
        for name in sorted((wanted or names) - names):
            raise ValueError(f"{self.path / file} lacks {name!r}, which {INDEX} assigns to this file")

    @property
    def num_bytes(self) -> int:
        """Returns the size of the files that hold the tensors."""
        return sum((self.path / name).stat().st_size for name in self.file_names)

    def shape(self, name: str) -> list[int]:
        """Returns a tensor's shape without reading its data."""
        return list(self.files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Returns a tensor's dtype as safetensors names it, such as BF16, without reading its data."""
        return str(self.files[name].get_slice(name).get_dtype())

    def read_rows(self, name: str, first: int, end: int) -> Tensor:
        """Reads rows first to end - 1 of a matrix to the CPU, in the dtype of the file."""
        rows: Tensor = self.files[name].get_slice(name)[first:end]
        return rows

    def read(self, name: str) -> Tensor:
        """Reads a tensor to the CPU, in the dtype of the file."""
        tensor: Tensor = self.files[name].get_tensor(name)
        return tensor


def refuse_doubled_names(file: Path) -> None:
    """Raises a ValueError if a safetensors file names a tensor twice: the library accepts it, and takes the last."""
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    try:
        json.loads(header, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def read_index(path: Path) -> dict[str, str]:
    """Returns the file of each tensor, or an empty dict if the folder has a single file and no index.

    Raises a ValueError for an index that is not valid, and for a folder without safetensors.
    """
    if (path / INDEX).is_file():
        places = read_json(path / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{path / INDEX} has no weight_map")
        if (path / SINGLE).is_file() and SINGLE not in places.values():
            raise ValueError(
                f"{path} has both {SINGLE} and an {INDEX} of other files, which may hold other weights: remove the one "
                "that you do not mean"
            )
        for name, file in places.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{path / INDEX} assigns {name!r} to {file!r}, which is not a safetensors file of this folder"
                )
        return places
    if not (path / SINGLE).is_file():
        pickled = sorted(found.name for pattern in PICKLED for found in path.glob(pattern))
        if pickled:
            raise ValueError(
                f"{path} has {pickled[0]}, which is pickled and could run code when it is loaded: convert it to "
                "safetensors (in transformers: from_pretrained, then save_pretrained), then import that"
            )
        if shards := sorted(found.name for found in path.glob("*.safetensors") if found.is_file()):
            raise ValueError(
                f"{path} has {shards[0]}, but neither {SINGLE} nor {INDEX}, which says which file holds a tensor: "
                "download the folder again"
            )
        raise ValueError(f"{path} has no weights: neither {SINGLE} nor {INDEX} (--config-only needs none)")
    return {}


class FolderWriter:
    """Writes a Hugging Face folder, in files of at most `shard_bytes` unless a single tensor is larger.

    Use it as a context manager. The folder gets its final name only in `finish`, and an exception removes what was
    written. Raises a ValueError if the folder exists.
    """

    def __init__(self, final: Path, shard_bytes: int) -> None:
        if os.path.lexists(final):  # a broken link, too
            raise ValueError(f"{final} exists already")
        self.final, self.shard_bytes = final, shard_bytes
        self.partial = final.parent / f"partial_{final.name}_{secrets.token_hex(4)}"
        self.partial.mkdir(parents=True)
        self.places: dict[str, int] = {}  # by tensor name: the index of its shard
        self.num_shards = self.total_bytes = 0
        self._shard: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor to the current shard, and first writes that shard if it would become too large."""
        assert name not in self.places, f"{name} is added twice"
        if self._shard and sum(part.nbytes for part in self._shard.values()) + tensor.nbytes > self.shard_bytes:
            self._write_shard()
        self.places[name] = self.num_shards
        held = tensor.detach().cpu().contiguous()  # waits for the device: files are written from host memory
        if held.untyped_storage().nbytes() > held.nbytes:  # a view: safetensors refuses tensors that share storage
            held = held.clone()
        self._shard[name] = held
        self.total_bytes += tensor.nbytes

    def write_json(self, file: str, tree: dict[str, Any]) -> None:
        """Writes a JSON file into the folder."""
        (self.partial / file).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")

    def copy(self, file: Path) -> None:
        """Copies a file into the folder, under the same name."""
        shutil.copyfile(file, self.partial / file.name)

    def finish(self) -> Path:
        """Renames the shards as loaders expect, writes the index, and renames the folder. Returns its path."""
        self._write_shard()
        count = self.num_shards
        names = [SINGLE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        for number, file in enumerate(names):
            (self.partial / f"{number}.shard").rename(self.partial / file)
        if count > 1:
            places = {name: names[number] for name, number in self.places.items()}
            self.write_json(INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": places})
        self.partial.rename(self.final)
        return self.final

    def _write_shard(self) -> None:
        if not self._shard:
            return
        path = self.partial / f"{self.num_shards}.shard"
        try:
            save_file(self._shard, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        self._shard = {}
        self.num_shards += 1

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
