"""Assigns each tensor to a rank that writes it, writes a rank's shards, and merges the ranks' manifests into one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from expert_parallel.checkpoint.digest import MODULUS, digest, format_digest
from expert_parallel.checkpoint.manifest import (
    MOMENTS,
    WEIGHTS,
    FileMetadata,
    Manifest,
    Shapes,
    ShardMetadata,
    TensorMetadata,
    check_shapes,
    check_shards,
)
from expert_parallel.checkpoint.state import FlatRange, TrainingState, balance_biases, range_shards
from expert_parallel.checkpoint.tensor_files import write_tensors
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.moe.parameters import (
    LogicalParameter,
    logical_parameters,
    pieces,
    replica_index_and_count,
    shard_offset,
)
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.settings import Settings


@dataclass(frozen=True)
class LocalTensor:
    """Describes a weight, a moment or a buffer of which this rank writes its local part.

    part: `weights`, `exp_avg` or `exp_avg_sq`. logical: the parameter, or the name of a buffer. first: the first row of
    this rank's FSDP2 shard (see `shard_offset`). range: the range of the flattened local tensor that this rank holds
    (ZeRO); None: it holds the whole local tensor.
    """

    part: str
    logical: LogicalParameter | str  # str: the name of a buffer, which is whole on this rank
    first: int
    range: FlatRange | None = None

    def pieces(self, local: Tensor) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]:
        """Yields the rectangular parts of logical tensors that `local` consists of: (full name, shape of the logical
        tensor, start of the part in it, values)."""
        if isinstance(self.logical, str):
            yield f"{self.part}/{self.logical}", tuple(local.shape), (0,) * local.dim(), local
            return
        if self.range is None:
            shape, found = tuple(self.logical.shape), pieces(self.logical, local, self.first)
        else:
            shape, found = self.range.shape[self.logical.is_expert :], range_shards(self.logical, local, self.range)
        for name, start, values in found:
            yield f"{self.part}/{name}", shape, start, values


class RankManifest(Settings):
    """Holds the files and tensors that one rank has written, as in its rank_N.json. Digests are those of this rank's
    parts of a tensor only."""

    files: dict[str, FileMetadata]
    tensors: dict[str, TensorMetadata]


def assign_writers(
    model: LanguageModel, mesh: ParallelMesh, state: TrainingState | None = None
) -> Iterator[LocalTensor]:
    """Yields the local tensors that this rank writes.

    A tensor that several ranks hold is written by one of them, chosen so that all write about equally many elements.
    Ranges that the engine's state shards (ZeRO) are written by the rank that holds them. state: None if the engine does
    not shard by flat ranges.
    """
    loads: dict[tuple[bool, int], list[int]] = {}
    for logical in logical_parameters(model):
        index, count = replica_index_and_count(logical, mesh)
        # All ranks of a group see the same parameters in the same order, so they agree without communication.
        load = loads.setdefault((logical.is_expert, count), [0] * count)
        first = shard_offset(logical.parameter)
        for part in (WEIGHTS, *MOMENTS):
            divided = None if state is None else state.flat_range(part, logical.parameter)
            if divided is not None:
                if divided.length > 0:
                    yield LocalTensor(part, logical, 0, divided)
                continue
            writer = load.index(min(load))
            load[writer] += len(logical.names) * logical.shape.numel()
            if writer == index:
                yield LocalTensor(part, logical, first)
    if mesh.stage_rank == 0:
        yield from (LocalTensor(WEIGHTS, name, 0) for name, _ in balance_biases(model))


def write_rank_file(folder: Path, rank: int, content: list[tuple[LocalTensor, Tensor]]) -> RankManifest:
    """Writes this rank's safetensors file and returns its part of the manifest. A rank without tensors writes no file.
    content: the tensors to write, with their descriptions."""
    file = f"rank_{rank:05d}.safetensors"
    entries: dict[str, TensorMetadata] = {}
    tensors: list[tuple[str, Tensor]] = []
    places: dict[str, tuple[str, tuple[int, ...]]] = {}
    for held, local in content:
        for name, shape, start, values in held.pieces(local):
            key = name if values.shape == shape else f"{name}@{','.join(map(str, start))}"
            piece = ShardMetadata(file=file, key=key, start=start, shape=tuple(values.shape))
            before = entries[name].pieces if name in entries else ()
            entries[name] = TensorMetadata(
                dtype=values.dtype, shape=shape, digest=format_digest(0), pieces=(*before, piece)
            )
            places[key] = (name, start)
            tensors.append((key, values))
    totals = dict.fromkeys(entries, 0)

    def add_digest(key: str, values: Tensor) -> None:
        name, start = places[key]
        totals[name] += digest(values, start, entries[name].shape)

    files = {file: write_tensors(folder / file, tensors, add_digest)} if tensors else {}
    found = {name: entry.model_copy(update={"digest": format_digest(totals[name])}) for name, entry in entries.items()}
    return RankManifest(files=files, tensors=found)


def merge_manifests(manifest: Manifest, markers: list[Path], expected: Shapes) -> Manifest:
    """Returns `manifest` with the files and tensors of all ranks. Raises ValueError if a tensor is missing, unexpected,
    or not covered exactly once.

    markers: the paths of the ranks' manifests, rank_N.json. expected: the shape of every tensor by full name.
    """
    files: dict[str, FileMetadata] = {}
    tensors: dict[str, TensorMetadata] = {}
    for path in markers:
        try:
            part = RankManifest.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise ValueError(f"{path} is damaged: {error.errors()[0]['msg']}") from error
        files |= part.files
        for name, entry in part.tensors.items():
            other = tensors.get(name, entry.model_copy(update={"digest": format_digest(0), "pieces": ()}))
            assert (entry.shape, entry.dtype) == (other.shape, other.dtype), (name, entry, other)
            total = (int(other.digest, 16) + int(entry.digest, 16)) % MODULUS
            joined = {"digest": format_digest(total), "pieces": (*other.pieces, *entry.pieces)}
            tensors[name] = entry.model_copy(update=joined)
    whole = manifest.model_copy(update={"files": files, "tensors": dict(sorted(tensors.items()))})
    check_shapes(f"step {manifest.step}: what the ranks have written", whole.shapes, expected)
    check_shards(f"step {manifest.step}: what the ranks have written", whole)
    return whole


def rank_manifest_path(folder: Path, rank: int) -> Path:
    """Returns the path of a rank's manifest; once it exists, the rank's safetensors file is complete."""
    return folder / f"rank_{rank:05d}.json"
