"""Which part of a logical tensor a rank holds, where tensor parallel or expert tensor parallel divides it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expert_parallel.parallel.collectives import all_gather_rows, group_rank, group_size


class Run(NamedTuple):
    """`size` neighbours along a dimension: where they begin in a rank's part, and where in the logical tensor."""

    local: int
    logical: int
    size: int


def runs_of_part(size: int, parts: int, index: int, blocks: int = 1) -> list[Run]:
    """What of a dimension `size` long is in part `index` of `parts`, where each of `blocks` equal blocks is divided
    alike, as `tensor_split` does: the first parts are longer by one where they do not divide evenly."""
    block = size // blocks
    small, larger = divmod(block, parts)
    first, length = index * small + min(index, larger), small + (index < larger)
    return [Run(number * length, number * block + first, length) for number in range(blocks)]


@dataclass(frozen=True)
class Slice:
    """Part `index` of `parts` of dimension `dim`, which is `size` long in the logical tensor.

    dim: counted from the end (-1 is the last), so that it means the same for one expert and for a stack of them.
    blocks: the dimension is so many equal blocks side by side ([gate | up]), each divided alike.
    copies: so many neighbouring ranks of `group` hold the same part (a key head that several ranks share).
    group: the ranks that hold the whole together, in order of their parts. Parts may differ by one in size.
    """

    dim: int
    size: int
    group: dist.ProcessGroup
    blocks: int = 1
    copies: int = 1

    @property
    def parts(self) -> int:
        return group_size(self.group) // self.copies

    @property
    def index(self) -> int:
        return group_rank(self.group) // self.copies

    @property
    def runs(self) -> list[Run]:
        """What of `dim` this rank has."""
        return runs_of_part(self.size, self.parts, self.index, self.blocks)

    def take(self, full: Tensor) -> Tensor:
        """This rank's part of a tensor that is whole in `dim`."""
        assert full.shape[self.dim] == self.size, (full.shape, self)
        return torch.cat([full.narrow(self.dim, run.logical, run.size) for run in self.runs], self.dim)

    def full_shape(self, local: torch.Size) -> torch.Size:
        shape = list(local)
        shape[self.dim] = self.size
        return torch.Size(shape)

    def gather(self, local: Tensor) -> Tensor:
        """The whole tensor, of which `local` is this rank's part. A collective over `group`."""
        rows = local.movedim(self.dim, 0).contiguous()
        sizes = [len(part) * self.blocks for part in torch.arange(self.size // self.blocks).tensor_split(self.parts)]
        everyone = [size for size in sizes for _ in range(self.copies)]
        gathered = all_gather_rows(rows, everyone, self.group).split(everyone)[:: self.copies]
        blocks = [part.chunk(self.blocks) for part in gathered]
        whole = torch.cat([parts[block] for block in range(self.blocks) for parts in blocks])
        return whole.movedim(0, self.dim)


def divide(module: nn.Module, name: str, dim: int, group: dist.ProcessGroup, blocks: int = 1, copies: int = 1) -> None:
    """Leaves the module this rank's part of its parameter `name` alone, and notes the slice in `module.tensor_shards`.

    The parameter must have no values yet (meta device). The caller has checked that it can be divided."""
    full = getattr(module, name)
    assert full.is_meta, name
    part = Slice(dim, full.shape[dim], group, blocks, copies)
    setattr(module, name, nn.Parameter(part.take(full.detach()).contiguous()))
    module.tensor_shards = {**slices_of(module), name: part}  # type: ignore[assignment]


def slices_of(module: nn.Module) -> dict[str, Slice]:
    """The slices of a module's own parameters, by name; whole ones are not in it."""
    shards: dict[str, Slice] = getattr(module, "tensor_shards", {})
    return shards
