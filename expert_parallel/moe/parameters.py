"""Maps parameters to logical tensors, whose names and shapes do not depend on the layout, for initialisation and
checkpoints.

A dense parameter has one logical tensor, under its own name. A stack of experts has one for each expert:
`...experts.w_in` on a rank that holds experts 2 and 3 is `...experts.2.w_in` and `...experts.3.w_in`. A logical tensor
is always the unsharded one; `pieces` yields the parts of it that a rank holds.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from expert_parallel.moe.experts.grouped import GroupedExperts
from expert_parallel.nn.random import mix
from expert_parallel.parallel.collectives import group_rank, group_size
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.parallel.sharding import Segment, TensorShard, get_tensor_shards

TIED = ("embedding.weight",)  # the names of the parameter of which the last pipeline stage may have a tied copy


@dataclass(frozen=True)
class LogicalParameter:
    """Relates a parameter of this rank to the logical tensors of which it holds all or a shard.

    names: the names of the logical tensors: one for a dense parameter; one for each local expert, in slot order, for a
    stack of experts. is_expert: True for a stack of experts. tensor_shard: the shard that this rank holds under tensor
    parallelism (tp or etp); None: the parameter is not sharded by it.
    """

    parameter: nn.Parameter
    names: tuple[str, ...]
    is_expert: bool
    tensor_shard: TensorShard | None = None

    @property
    def shape(self) -> torch.Size:
        """Returns the shape of one logical tensor."""
        shape = (
            self.parameter.shape if self.tensor_shard is None else self.tensor_shard.full_shape(self.parameter.shape)
        )
        return shape[1:] if self.is_expert else shape

    def whole(self, tensor: Tensor) -> dict[str, Tensor]:
        """Returns the unsharded logical tensors by name.

        tensor: the parameter, or a tensor of its shape (its gradient or moments). If it is sharded, this gathers it, so
        every rank of the groups that share it calls this.
        """
        full = full_tensor(tensor)
        if self.tensor_shard is not None:
            full = self.tensor_shard.gather_full(full)
        return dict(zip(self.names, full.unbind(0) if self.is_expert else (full,), strict=True))

    def fill(self, tensor: Tensor, whole: list[Tensor]) -> None:
        """Copies this rank's part of unsharded logical tensors, in the order of `names`, into `tensor`: the inverse of
        `whole`. Communicates nothing."""
        full = torch.stack(whole) if self.is_expert else whole[0]
        fill(tensor, full if self.tensor_shard is None else self.tensor_shard.narrow_to_shard(full))


def logical_parameters(module: nn.Module, prefix: str = "") -> Iterator[LogicalParameter]:
    """Yields every parameter of the module once, in the order of `named_parameters`; a tied parameter under its first
    name.

    A ModuleList holds parts of one model: its own indices are not part of the names. prefix: put before every name.
    """
    if isinstance(module, nn.ModuleList):
        for part in module:
            yield from logical_parameters(part, prefix)
        return
    owners = dict(module.named_modules())
    for name, parameter in module.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner, shard = owners[path], get_tensor_shards(owners[path]).get(leaf)
        if isinstance(owner, GroupedExperts):
            dotted = f"{path}." if path else ""
            names = tuple(f"{prefix}{dotted}{expert}.{leaf}" for expert in owner.expert_ids)
            yield LogicalParameter(parameter, names, True, shard)
        else:
            yield LogicalParameter(parameter, (prefix + name,), False, shard)


def shard_offset(parameter: Tensor) -> int:
    """Returns the first row of this rank's FSDP2 shard, in dimension 0; 0 if the parameter is not an FSDP2 shard."""
    if not isinstance(parameter, DTensor):
        return 0
    # Shards the row numbers in the same way, so that FSDP2's rule for uneven shards is not repeated here.
    rows = torch.arange(len(parameter), device=parameter.device_mesh.device_type)
    mine = distribute_tensor(rows, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    assert len(mine) == len(parameter.to_local()), (parameter.placements, "another dimension is sharded")
    return int(mine[0]) if len(mine) else 0  # the host waits; used by checkpoints alone


def pieces(logical: LogicalParameter, local: Tensor, first: int) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Yields this rank's rectangles of the logical tensors: (name, start in the logical tensor, view of `local`).

    local: the parameter's local tensor, or a tensor of its shape (its moments, a copy of either). first: the
    parameter's `shard_offset`. FSDP2 shards dimension 0 of the tensor that tp or etp has already sharded; for a stack,
    that dimension is the experts.
    """
    by_dim = [[Segment(0, 0, size)] for size in local.shape]
    by_dim[0] = [Segment(0, 0, first + len(local))]
    if logical.tensor_shard is not None:
        by_dim[logical.tensor_shard.dim] = logical.tensor_shard.segments
    by_dim[0] = [
        segment for segment in (_crop(segment, first, len(local)) for segment in by_dim[0]) if segment.size > 0
    ]
    for segments in itertools.product(*by_dim):
        view, start = local, tuple(segment.logical for segment in segments)
        for dim, segment in enumerate(segments):
            view = view.narrow(dim, segment.local, segment.size)
        if not logical.is_expert:
            yield logical.names[0], start, view
            continue
        for name, one in zip(logical.names[start[0] :], view.unbind(0), strict=False):
            yield name, start[1:], one


def _crop(segment: Segment, first: int, length: int) -> Segment:
    """Limits a segment to the `length` rows from `first` on; its `local` then counts from `first`."""
    begin, end = max(segment.local, first), min(segment.local + segment.size, first + length)
    return Segment(begin - first, segment.logical + begin - segment.local, end - begin)


def replica_index_and_count(logical: LogicalParameter, mesh: ParallelMesh) -> tuple[int, int]:
    """Returns this rank's index among the ranks that hold the same elements of a parameter, and their number.

    The tied copy of an embedding on the last stage gets an index >= the number: so it is not counted in norms, and no
    writer is chosen from its ranks.
    """
    data, divided = (mesh.edp_group, mesh.etp_group) if logical.is_expert else (mesh.dense_group, mesh.tp_group)
    index, count = group_rank(data), group_size(data)
    if isinstance(logical.parameter, DTensor):
        over = logical.parameter.device_mesh  # [shards] or [replicas, shards]
        index, count = (over.get_local_rank(0), over.size(0)) if over.ndim > 1 else (0, 1)
    copies = group_size(divided) if logical.tensor_shard is None else logical.tensor_shard.copies
    index, count = index * copies + group_rank(divided) % copies, count * copies
    is_tied_copy = logical.names == TIED and group_rank(mesh.tied_embedding_group) > 0
    return index + count * is_tied_copy, count


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the unsharded tensor, by a collective over its mesh if FSDP2 has sharded it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor that FSDP2 may have sharded, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, full: Tensor) -> None:
    """Copies `full`, which every rank has, into a tensor that FSDP2 may have sharded. Communicates nothing."""
    assert tensor.shape == full.shape, (tensor.shape, full.shape)
    full = full.to(tensor.device, tensor.dtype)
    if isinstance(tensor, DTensor):
        full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    local_tensor(tensor).copy_(full)


def init_parameters(module: nn.Module, seed: int, std: Callable[[str], float], prefix: str = "") -> None:
    """Draws every weight from a normal distribution keyed by (seed, logical name): the same on every layout.

    std: logical name -> standard deviation. One-dimensional logical tensors are not drawn: norm weights are 1, biases
    0. Drawn in float32 on the CPU, so that all dtypes and devices start from the same numbers.
    """
    for logical in logical_parameters(module, prefix):
        logical.fill(logical.parameter, [_initial(name, logical.shape, seed, std) for name in logical.names])


def _initial(name: str, shape: torch.Size, seed: int, std: Callable[[str], float]) -> Tensor:
    """Draws one logical tensor; see `init_parameters`."""
    if len(shape) == 1:
        is_norm_weight = name.endswith("norm.weight")
        return torch.ones(shape) if is_norm_weight else torch.zeros(shape)
    name_key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    generator = torch.Generator().manual_seed(mix(seed, name_key))
    return torch.empty(shape).normal_(0.0, std(name), generator=generator)
