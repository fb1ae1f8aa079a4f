"""Defines the manifest of a checkpoint: which tensors it has, in which shards of which files, with which digests.

A manifest is untrusted input. It is validated before anything in it is used: its SHA-256, types, file names, and that
the shards cover each tensor exactly once.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from expert_parallel.checkpoint.folders import MANIFEST, parse_step
from expert_parallel.settings import CONFIG_VERSION, Settings, refuse_newer

FORMAT = 2
SHA256 = "sha256"  # the key of the SHA-256 of all other keys
WEIGHTS, MOMENTS = "weights", ("exp_avg", "exp_avg_sq")
# By the names that safetensors uses.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Size = Annotated[int, Field(ge=0)]
DType = Annotated[
    torch.dtype, BeforeValidator(lambda name: _dtype(name)), PlainSerializer(lambda dtype: DTYPE_NAMES[dtype])
]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.safetensors$")]  # never a path out of the folder
Shapes = dict[str, list[int]]


class ShardMetadata(Settings):
    """Locates a rectangular part of a logical tensor: it begins at the indices `start`, has `shape`, and is stored
    under the name `key` in `file`."""

    file: FileName
    key: str
    start: tuple[Size, ...]
    shape: tuple[Size, ...]


class TensorMetadata(Settings):
    """Describes a logical tensor. digest: its digest as computed by digest.py, 32 hexadecimal digits. pieces: the
    rectangular parts in which it is stored."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    dtype: DType
    shape: tuple[Size, ...]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    pieces: tuple[ShardMetadata, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class FileMetadata(Settings):
    """Holds a file's size in bytes and its SHA-256 (hexadecimal)."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Size


class Manifest(Settings):
    """Lists the files and tensors of a checkpoint. config: the run's resolved config. layout: a description of the
    parallel layout that wrote it, for readers; loading ignores it. files: by file name. tensors: by full name, such as
    `weights/embedding.weight`."""

    format: int
    step: Size
    config: dict[str, Any]
    layout: str
    files: dict[FileName, FileMetadata]
    tensors: dict[str, TensorMetadata]

    @property
    def has_moments(self) -> bool:
        return any(not name.startswith(f"{WEIGHTS}/") for name in self.tensors)

    @property
    def shapes(self) -> Shapes:
        return {name: list(entry.shape) for name, entry in self.tensors.items()}

    def to_json(self) -> str:
        """Returns the manifest as JSON with its SHA-256, one line for each tensor and file, so that `grep` works."""
        tree = add_checksum(self.model_dump(mode="json"))
        last = {key: tree.pop(key) for key in ("files", "tensors")}
        blocks = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in tree.items()]
        for key, entries in last.items():
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
            blocks.append(f"{json.dumps(key)}: {{\n{lines}\n }}")
        return "{\n " + ",\n ".join(blocks) + "\n}\n"


class UnsupportedFormatError(ValueError):
    """Reports that a manifest has a format that this version of the package does not read; it may be undamaged."""


def add_checksum(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a manifest's JSON tree with the SHA-256 of all its other keys, in place of an earlier one."""
    rest = {key: value for key, value in tree.items() if key != SHA256}
    return {SHA256: hashlib.sha256(_canonical_json(rest).encode()).hexdigest(), **rest}


def read_manifest(folder: Path) -> Manifest:
    """Reads and validates the manifest of the checkpoint `folder`. Raises ValueError, which names the folder and the
    fault."""
    try:
        tree = json.loads((folder / MANIFEST).read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicate_keys)
        recorded = tree.pop(SHA256, None) if isinstance(tree, dict) else None
        content = _canonical_json(tree)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is not a checkpoint: {MANIFEST} cannot be read ({error})") from error
    number = tree.get("format") if isinstance(tree, dict) else None
    if not isinstance(number, int):
        raise ValueError(f"{folder}: {MANIFEST} is damaged: its format is {number!r}, not a number")
    _refuse_newer(f"{folder}: the format of {MANIFEST}", number, FORMAT)
    if number < FORMAT:
        raise UnsupportedFormatError(
            f"{folder}: the format of {MANIFEST} is {number}, older than {FORMAT}, the oldest that this installation "
            "reads: use the expert-parallel that wrote it"
        )
    if recorded != (found := hashlib.sha256(content.encode()).hexdigest()):
        raise ValueError(f"{folder}: {MANIFEST} is damaged: the SHA-256 of its content is {found}, it says {recorded}")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{folder}: {MANIFEST} is damaged at {where}: {first['msg']}") from None
    if not isinstance(manifest.config.get("model"), dict):
        raise ValueError(f"{folder}: {MANIFEST} does not describe its model: its config has no mapping `model`")
    if isinstance(version := manifest.config.get("version"), int):
        _refuse_newer(f"{folder}: the version of the config in {MANIFEST}", version, CONFIG_VERSION)
    if parse_step(folder) not in (None, manifest.step):
        raise ValueError(
            f"{folder} has the name of step {parse_step(folder)}, its {MANIFEST} is of step {manifest.step}: "
            "rename the folder back"
        )
    check_shards(f"{folder}", manifest)
    return manifest


def _refuse_newer(what: str, found: int, newest: int) -> None:
    try:
        refuse_newer(what, found, newest)
    except ValueError as error:
        raise UnsupportedFormatError(str(error)) from None


def check_shards(what: str, manifest: Manifest) -> None:
    """Raises ValueError if the shards of a tensor do not cover it exactly once, or are in a file that the manifest does
    not list. what: the beginning of the message."""
    places: dict[tuple[str, str], str] = {}
    for name, entry in manifest.tensors.items():
        check_coverage(f"{what}: {name}", entry.shape, [(piece.start, piece.shape) for piece in entry.pieces])
        for piece in entry.pieces:
            if piece.file not in manifest.files:
                raise ValueError(f"{what}: {name} lies in {piece.file}, which is not among the manifest's files")
            other = places.setdefault((piece.file, piece.key), name)
            if other != name or entry.pieces.count(piece) > 1:
                raise ValueError(f"{what}: {other} and {name} claim the same {piece.key} in {piece.file}")


def check_coverage(what: str, shape: Sequence[int], pieces: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Raises ValueError unless `pieces`, rectangles (start, shape), lie within a tensor of `shape`, do not overlap, and
    fill it. what: the beginning of the message."""
    for start, size in pieces:
        fits = len(start) == len(size) == len(shape)
        if not fits or any(s + n > whole for s, n, whole in zip(start, size, shape, strict=True)):
            raise ValueError(f"{what}: a shard of shape {list(size)} at {list(start)} does not fit into {list(shape)}")
    covered = sum(math.prod(size) for _, size in pieces)
    whole = math.prod(shape)
    if covered < whole or not pieces:
        raise ValueError(f"{what} is incomplete: its shards hold {covered} of {whole} elements")
    if len(pieces) > 1 and (pair := _find_overlap(pieces)):
        first, second = (list(pieces[index][0]) for index in pair)
        raise ValueError(f"{what} is covered twice: the shards at {first} and {second} overlap")
    assert covered == whole, (what, covered, whole)


def _find_overlap(pieces: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[int, int] | None:
    """Returns the indices of the first two rectangles that overlap, or None."""
    starts = np.array([start for start, _ in pieces])
    ends = starts + np.array([size for _, size in pieces])
    for index in range(len(pieces) - 1):
        meets = ((starts[index + 1 :] < ends[index]) & (starts[index] < ends[index + 1 :])).all(1)
        if meets.any():
            return index, index + 1 + int(meets.argmax())
    return None


def check_shapes(what: str, found: Mapping[str, list[int]], expected: Mapping[str, list[int]]) -> None:
    """Raises ValueError, which names the first tensor that is missing from `found`, has another shape than in
    `expected`, or is not expected. what: the beginning of the message."""
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{what}: {name} is missing ({len(found)} tensors found, {len(expected)} expected)")
        if found[name] != shape:
            raise ValueError(f"{what}: {name} has shape {found[name]}, expected {shape}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{what}: {name} is left over ({len(found)} tensors found, {len(expected)} expected)")


def _dtype(name: Any) -> Any:
    if isinstance(name, str) and name not in DTYPES:
        raise ValueError(f"the dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES.get(name, name)


def _canonical_json(tree: Any) -> str:
    """Serializes JSON so that equal content gives equal text, whatever its spacing and key order were."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} appears twice")
    return tree
