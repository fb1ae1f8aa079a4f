"""Formats the output of the `checkpoint` commands: the content of a checkpoint, its damage, and how two of them
differ."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from expert_parallel.checkpoint.digest import MODULUS, digest
from expert_parallel.checkpoint.files import Checkpoint, expected_shapes
from expert_parallel.checkpoint.manifest import DTYPE_NAMES, WEIGHTS, TensorMetadata, check_shapes
from expert_parallel.model.config import ModelConfig
from expert_parallel.settings import changed_settings


def format_checkpoint(checkpoint: Checkpoint) -> str:
    """Returns a text with the step, parameters, layout, experts, tensors (grouped by name) and files of a
    checkpoint."""
    manifest = checkpoint.manifest
    weights = {name.removeprefix(f"{WEIGHTS}/"): e for name, e in manifest.tensors.items() if name.startswith(WEIGHTS)}
    numbers = sum(entry.numel for entry in weights.values())
    in_experts = sum(entry.numel for name, entry in weights.items() if _parse_expert(name))
    share = f", of which {in_experts:,} ({in_experts / numbers:.1%}) in experts" if in_experts else ""
    lines = [
        f"{checkpoint.path}",
        f"step        {manifest.step}",
        f"written by  {manifest.layout}",
        f"numbers     {numbers:,} in weights and balance biases{share}",
        f"holds       {', '.join(_format_dtypes(checkpoint))}",
        f"experts     {_format_experts(weights)}",
        "",
        *_format_table([("tensors", "count", "shape", "numbers"), *_tensor_rows(weights)]),
        "",
        *_format_table([("files", "bytes"), *((name, f"{record.bytes:,}") for name, record in manifest.files.items())]),
        f"{sum(record.bytes for record in manifest.files.values()):,} bytes in {len(manifest.files)} files",
    ]
    return "\n".join(lines)


def find_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Yields a sentence for every problem of a checkpoint: damaged or unlisted files, tensors whose name or shape does
    not fit its config, tensors whose digest differs from the manifest's.

    Opening the checkpoint has already checked that the manifest is valid and covers each tensor once.
    """
    damaged = set()
    for file in checkpoint.manifest.files:
        try:
            checkpoint.check_file(file)
        except ValueError as error:
            damaged.add(file)
            yield str(error)
    stray = {path.name for path in checkpoint.path.glob("*.safetensors")} - checkpoint.manifest.files.keys()
    yield from (f"{checkpoint.path / name} is not among the manifest's files" for name in sorted(stray))
    where = f"{checkpoint.path}: its config has no model that this version knows"
    try:
        model = ModelConfig.model_validate(checkpoint.config.get("model"), context={"where": where})
        expected = expected_shapes(model, checkpoint.has_moments)
        check_shapes(f"{checkpoint.path}: against its config", checkpoint.manifest.shapes, expected)
    except ValueError as error:
        yield str(error)
    for name, entry in checkpoint.tensors.items():
        try:
            found = f"{recompute_digest(checkpoint, name):032x}"
        except ValueError as error:
            yield str(error)
            continue
        if found != entry.digest:
            yield f"{checkpoint.path}: {name} has changed: its digest is {found}, the manifest says {entry.digest}"


def recompute_digest(checkpoint: Checkpoint, name: str) -> int:
    """Returns the digest of a tensor, computed from the files shard by shard."""
    entry = checkpoint.tensors[name]
    parts = (
        digest(checkpoint.read_slice(name, piece.start, piece.shape), piece.start, entry.shape)
        for piece in entry.pieces
    )
    return sum(parts) % MODULUS


@dataclass(frozen=True)
class CheckpointDifference:
    """Describes how a tensor differs between two checkpoints. name: the tensor's full name. what: the difference in
    words."""

    name: str
    what: str


def compare_checkpoints(first: Checkpoint, second: Checkpoint) -> Iterator[CheckpointDifference]:
    """Yields a difference for each tensor that one of two checkpoints lacks, or whose shape, dtype or values differ.

    Tensors with equal digests in the manifests count as equal and are not read.
    """
    for name in sorted(first.tensors | second.tensors, key=_weights_first_key):
        one, other = first.tensors.get(name), second.tensors.get(name)
        if one is None or other is None:
            yield CheckpointDifference(name, f"only in {'A' if other is None else 'B'}")
        elif one.shape != other.shape:
            yield CheckpointDifference(name, f"shape {list(one.shape)} and {list(other.shape)}")
        elif (one.dtype, one.digest) != (other.dtype, other.digest):
            dtypes = "" if one.dtype == other.dtype else f"{DTYPE_NAMES[one.dtype]} and {DTYPE_NAMES[other.dtype]}, "
            gap = (first.read(name).double() - second.read(name).double()).abs().max()
            yield CheckpointDifference(name, f"{dtypes}largest absolute difference {float(gap):.3g}")


def format_header(first: Checkpoint, second: Checkpoint) -> str:
    """Returns a text with the paths, steps and layouts of two checkpoints, and the settings in which their configs
    differ."""
    both = {"A": first, "B": second}
    lines = [f"{letter}: {c.path}, step {c.step}, written by {c.manifest.layout}" for letter, c in both.items()]
    lines.append(f"layouts: {'the same' if first.manifest.layout == second.manifest.layout else 'different'}")
    changes = changed_settings(first.config, second.config)
    lines += [f"config: {path} {old!r} -> {new!r}" for path, old, new in changes] or ["config: the same"]
    return "\n".join(lines)


def _format_dtypes(checkpoint: Checkpoint) -> list[str]:
    """Lists the state kinds of a checkpoint with their dtypes, such as `weights (F32)`."""
    dtypes: dict[str, set[torch.dtype]] = {}
    for name, entry in checkpoint.tensors.items():
        dtypes.setdefault(name.partition("/")[0], set()).add(entry.dtype)
    parts = sorted(dtypes.items(), key=lambda item: _weights_first_key(item[0]))
    return [f"{part} ({', '.join(sorted(DTYPE_NAMES[d] for d in found))})" for part, found in parts]


def _parse_expert(name: str) -> tuple[str, int] | None:
    """Returns (block, global expert number) of an expert's tensor, or None."""
    match = re.fullmatch(r"(.*)\.experts\.(\d+)\.\w+", name)
    return (match.group(1), int(match.group(2))) if match else None


def _format_experts(weights: dict[str, TensorMetadata]) -> str:
    """Formats the number of experts of each block, such as `8 in blocks 1, 3`."""
    of_layer: dict[str, set[int]] = {}
    for layer, expert in filter(None, map(_parse_expert, weights)):
        of_layer.setdefault(layer, set()).add(expert)
    blocks: dict[int, list[str]] = {}
    for layer in sorted(of_layer, key=_natural_key):
        blocks.setdefault(len(of_layer[layer]), []).append(re.sub(r"\D", "", layer))
    return "; ".join(f"{count} in blocks {', '.join(numbers)}" for count, numbers in blocks.items()) or "none"


def _tensor_rows(weights: dict[str, TensorMetadata]) -> Iterator[tuple[str, ...]]:
    """Yields table rows (name pattern, count, shape, elements) of tensors whose names differ only in numbers."""
    groups: dict[tuple[str, tuple[int, ...]], list[TensorMetadata]] = {}
    for name in sorted(weights, key=_natural_key):
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        groups.setdefault((pattern, weights[name].shape), []).append(weights[name])
    for (pattern, shape), entries in groups.items():
        yield pattern, str(len(entries)), str(list(shape)), f"{sum(entry.numel for entry in entries):,}"


def _weights_first_key(name: str) -> tuple[bool, list[int | str]]:
    return not name.startswith(WEIGHTS), _natural_key(name)


def _natural_key(name: str) -> list[int | str]:
    """Returns a key that sorts block 10 after block 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _format_table(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligns the first column of a table to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
