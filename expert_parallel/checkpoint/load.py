"""Loads a checkpoint into any layout: each rank reads its own shards, and all ranks verify the digests together."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.checkpoint.digest import MODULUS, digest
from expert_parallel.checkpoint.files import Checkpoint, open_checkpoint
from expert_parallel.checkpoint.manifest import MOMENTS, WEIGHTS, check_shapes
from expert_parallel.checkpoint.state import TrainingState, balance_biases, expected_shapes, range_shards
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.moe.parameters import (
    local_tensor,
    logical_parameters,
    pieces,
    replica_index_and_count,
    shard_offset,
)
from expert_parallel.parallel.collectives import all_reduce_sum
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.process import Runtime

Result = TypeVar("Result")
LoadTarget = tuple[str, tuple[int, ...], Tensor, bool]  # full name, start, memory to fill, whether the digest counts it
LIMB = 1 << 32
BLOCK = re.compile(r"\w+/blocks\.(\d+)\.")


ReadSlice = Callable[[str, Sequence[int], Sequence[int]], Tensor]  # logical name, start, shape


@torch.no_grad()
def fill_weights(
    read_slice: ReadSlice, model: LanguageModel, state: TrainingState, runtime: Runtime, mesh: ParallelMesh
) -> None:
    """Fills the weights of a model of any layout from a source that is no checkpoint. Every rank calls it.

    read_slice: returns a rectangle of a logical tensor, in any dtype; each rank asks for those that it holds, one after
    another. state: `engine.state`. An error of any rank is a UserError on all.
    """

    def fill() -> None:
        for name, start, target, _ in _load_targets(model, (WEIGHTS,), state, mesh):
            target.copy_(read_slice(name.removeprefix(f"{WEIGHTS}/"), start, target.shape))

    runtime.run_on_all_ranks(fill)
    state.finish_loading()


@torch.no_grad()
def load_checkpoint(
    path: Path,
    model: LanguageModel,
    state: TrainingState | None = None,
    runtime: Runtime | None = None,
    mesh: ParallelMesh | None = None,
    *,
    model_only: bool = False,
) -> Checkpoint:
    """Loads weights, and optionally optimizer state, into a model of any layout. Returns the checkpoint.

    state: `engine.state`, or `TorchState(optimizer)` for a torch optimizer. Only the weights are loaded if state is
    None, `model_only` is set, or the checkpoint has no moments; an engine that keeps its own copy of the weights must
    pass its state in any case. runtime and mesh None: this process alone holds the whole model.

    Nothing is modified unless the manifest is valid, the shapes match the model, and all files have the SHA-256 of the
    manifest (each rank checks a share of them). What the model may lack is left out (`left_out`). After loading, the
    digests of what the model holds are summed over the ranks, each element once; ValueError (UserError on all ranks if
    there is a runtime) names a tensor whose digest differs.
    """
    rank, world_size = (0, 1) if runtime is None else (runtime.rank, runtime.world_size)

    def run_on_all_ranks(work: Callable[[], Result]) -> Result:
        return work() if runtime is None else runtime.run_on_all_ranks(work)

    def check() -> Checkpoint:
        checkpoint = open_checkpoint(path)
        with_moments = takes_moments and checkpoint.has_moments
        found, expected = _shapes(checkpoint, model.config, with_moments), expected_shapes(model.config, with_moments)
        check_shapes(f"{path}: checkpoint of another model", found, expected)
        for file in list(checkpoint.manifest.files)[rank::world_size]:
            checkpoint.check_file(file)
        return checkpoint

    def fill() -> None:
        for name, start, target, _ in _load_targets(model, parts, state, mesh):
            target.copy_(checkpoint.read_slice(name, start, target.shape))

    def digests() -> dict[str, int]:
        totals: dict[str, int] = {}
        for name, start, target, counts in _load_targets(model, parts, state, mesh):
            if counts:
                entry = checkpoint.tensors[name]
                values = _as_saved(checkpoint, name, start, target)
                totals[name] = totals.get(name, 0) + digest(values, start, entry.shape)
        return totals

    takes_moments = state is not None and not model_only
    checkpoint = run_on_all_ranks(check)
    parts: tuple[str, ...] = (WEIGHTS,)
    if state is not None and takes_moments and checkpoint.has_moments:
        state.init_moments(checkpoint.step)
        parts = (WEIGHTS, *MOMENTS)
    run_on_all_ranks(fill)
    if state is not None:
        state.finish_loading()
    # Of the model itself, found anew: not of what was read, which may have gone to the wrong memory.
    totals = _sum_over_ranks(run_on_all_ranks(digests), _shapes(checkpoint, model.config, len(parts) > 1), runtime)
    run_on_all_ranks(lambda: _compare_digests(checkpoint, totals))
    return checkpoint


def left_out(checkpoint: Checkpoint, model: ModelConfig) -> list[str]:
    """Returns the full names of the tensors that a model without multi-token prediction does not load from a checkpoint
    of a model with it: those of its blocks, which no other block depends on."""
    saved = checkpoint.config["model"]
    if model.mtp is not None or saved.get("mtp") is None:
        return []
    blocks = ((name, BLOCK.match(name)) for name in checkpoint.tensors)
    return [name for name, block in blocks if block is not None and int(block[1]) >= saved["num_layers"]]


def _shapes(checkpoint: Checkpoint, model: ModelConfig, with_moments: bool) -> dict[str, list[int]]:
    """Returns the shapes of the checkpoint's weights, and moments, by full name, without those that are left out."""
    found, absent = checkpoint.manifest.shapes, left_out(checkpoint, model)
    wanted = (name for name in found if with_moments or name.startswith(f"{WEIGHTS}/"))
    return {name: found[name] for name in wanted if name not in absent}


def _load_targets(
    model: LanguageModel, parts: tuple[str, ...], state: TrainingState | None, mesh: ParallelMesh | None
) -> Iterator[LoadTarget]:
    """Yields every tensor that this rank fills, as a rectangle of a logical tensor.

    Replicated tensors enter the digest once, from the first rank that holds them; ZeRO ranges enter from their owner.
    """
    for name, buffer in balance_biases(model):
        yield f"{WEIGHTS}/{name}", (0,) * buffer.dim(), buffer, mesh is None or mesh.stage_rank == 0
    for logical in logical_parameters(model):
        parameter, first = logical.parameter, shard_offset(logical.parameter)
        is_first = mesh is None or replica_index_and_count(logical, mesh)[0] == 0
        for part in parts:
            divided = None if state is None else state.flat_range(part, parameter)
            tensor = local_tensor(parameter.detach()) if state is None else state.tensor(part, parameter)
            found = pieces(logical, tensor, first) if divided is None else range_shards(logical, tensor, divided)
            for name, start, view in found:
                yield f"{part}/{name}", start, view, divided is not None or is_first


def _as_saved(checkpoint: Checkpoint, name: str, start: tuple[int, ...], target: Tensor) -> Tensor:
    """Returns the values that the model holds, on the CPU and in the checkpoint's dtype.

    If the model's dtype is narrower, its values are compared with those of the file, which are returned. Raises a
    ValueError if they differ.
    """
    held = target.detach().cpu()  # the host waits for the copy
    dtype = checkpoint.tensors[name].dtype
    if torch.promote_types(held.dtype, dtype) == held.dtype:
        return held.to(dtype)  # exact: the model's dtype holds every value of the checkpoint's
    values = checkpoint.read_slice(name, start, target.shape)
    if not torch.equal(held, values.to(held.dtype)):
        raise ValueError(f"{checkpoint.path}: {name} is not what was saved: the model holds other values than the file")
    return values


def _sum_over_ranks(totals: dict[str, int], names: Collection[str], runtime: Runtime | None) -> dict[str, int]:
    """Sums 128-bit digests over the ranks, as four 32-bit limbs each, whose sums fit into int64."""
    limbs = [[(totals.get(name, 0) // LIMB**place) % LIMB for place in range(4)] for name in names]
    group = None if runtime is None else dist.group.WORLD
    # int64 on the CPU (gloo): exact up to 2**31 ranks, and .tolist() needs no device sync.
    sums = all_reduce_sum(torch.tensor(limbs, dtype=torch.int64), group).tolist()
    return {
        name: sum(limb * LIMB**place for place, limb in enumerate(row)) % MODULUS
        for name, row in zip(names, sums, strict=True)
    }


def _compare_digests(checkpoint: Checkpoint, totals: dict[str, int]) -> None:
    """Raises ValueError for the first tensor of `totals` whose digest differs from the manifest's."""
    for name, total in totals.items():
        entry = checkpoint.tensors[name]
        if total != int(entry.digest, 16):
            raise ValueError(
                f"{checkpoint.path}: {name} is not what was saved: the digest of what the model holds is "
                f"{total:032x}, the manifest says {entry.digest}"
            )
