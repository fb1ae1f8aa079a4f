"""Describes which shard of a logical tensor a rank holds under tensor or expert tensor parallelism."""

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expert_parallel.parallel.collectives import all_gather_rows, group_rank, group_size

logger = logging.getLogger(__name__)


class Segment(NamedTuple):
    """Locates `size` consecutive indices of a sharded dimension: `local` is their start in this rank's shard, `logical`
    their start in the unsharded tensor."""

    local: int
    logical: int
    size: int


def shard_segments(size: int, parts: int, index: int, blocks: int = 1) -> list[Segment]:
    """Returns the ranges of a dimension of length `size` that belong to shard number `index` of `parts` shards.

    The dimension consists of `blocks` blocks of equal length ([gate | up] has 2), and each block is split as by
    `torch.tensor_split`: if it does not divide evenly, the first shards are longer by one.
    """
    block = size // blocks
    small, larger = divmod(block, parts)
    first, length = index * small + min(index, larger), small + (index < larger)
    return [Segment(number * length, number * block + first, length) for number in range(blocks)]


@dataclass(frozen=True)
class TensorShard:
    """Describes this rank's shard of a tensor that is split along dimension `dim` over a process group.

    dim: negative, counted from the end, so that it is the same for one expert and for a stack of experts.
    size: the length of `dim` in the unsharded (logical) tensor. Shards may differ in length by one.
    group: the ranks that hold the whole tensor between them, in order of their shards.
    blocks: the number of equal blocks along `dim` ([gate | up] has 2), each split over the ranks separately.
    copies: the number of consecutive ranks that hold the same shard (a key head that several ranks share).
    """

    dim: int
    size: int
    group: dist.ProcessGroup
    blocks: int = 1
    copies: int = 1

    @property
    def parts(self) -> int:
        """Returns the number of different shards."""
        return group_size(self.group) // self.copies

    @property
    def index(self) -> int:
        """Returns the index of this rank's shard among the different shards."""
        return group_rank(self.group) // self.copies

    @property
    def suffix(self) -> str:
        """Returns what a state dict adds to the parameter's name, so that a shard is not taken for the whole or for
        another shard: `.shard_0_of_2`, or nothing if there is one shard."""
        return f".shard_{self.index}_of_{self.parts}" if self.parts > 1 else ""

    @property
    def segments(self) -> list[Segment]:
        """Returns the ranges of dimension `dim` that this rank holds."""
        return shard_segments(self.size, self.parts, self.index, self.blocks)

    def narrow_to_shard(self, full: Tensor) -> Tensor:
        """Returns this rank's shard of a tensor that is whole along `dim`."""
        assert full.shape[self.dim] == self.size, (full.shape, self)
        return torch.cat([full.narrow(self.dim, segment.logical, segment.size) for segment in self.segments], self.dim)

    def full_shape(self, local: torch.Size) -> torch.Size:
        """Returns the shape of the logical tensor, given the shape of the local shard."""
        shape = list(local)
        shape[self.dim] = self.size
        return torch.Size(shape)

    def gather_full(self, local: Tensor) -> Tensor:
        """Returns the unsharded tensor, given this rank's shard of it. It is a collective over `group`."""
        rows = local.movedim(self.dim, 0).contiguous()
        block_lengths = [len(shard) for shard in torch.arange(self.size // self.blocks).tensor_split(self.parts)]
        lengths = [length * self.blocks for length in block_lengths]
        rank_lengths = [length for length in lengths for _ in range(self.copies)]
        shards = all_gather_rows(rows, rank_lengths, self.group).split(rank_lengths)[:: self.copies]
        # Shard by shard -> block by block: [gate0 up0 gate1 up1] -> [gate0 gate1 up0 up1].
        chunks = [shard.chunk(self.blocks) for shard in shards]
        whole = torch.cat([chunk[block] for block in range(self.blocks) for chunk in chunks])
        return whole.movedim(0, self.dim)


def shard_parameter(
    module: nn.Module, name: str, dim: int, group: dist.ProcessGroup, blocks: int = 1, copies: int = 1
) -> None:
    """Replaces the module's parameter `name` by this rank's shard of it and records it in `module.tensor_shards`.

    The parameter must be on the meta device, as values would be lost. The caller has checked that the sizes divide.
    """
    full = getattr(module, name)
    assert full.is_meta, name
    part = TensorShard(dim, full.shape[dim], group, blocks, copies)
    setattr(module, name, nn.Parameter(part.narrow_to_shard(full.detach()).contiguous()))
    module.tensor_shards = {**get_tensor_shards(module), name: part}  # type: ignore[assignment]


def get_tensor_shards(module: nn.Module) -> dict[str, TensorShard]:
    """Returns the TensorShard of each of a module's own parameters that is sharded, by name of the parameter."""
    shards: dict[str, TensorShard] = getattr(module, "tensor_shards", {})
    return shards


def name_shards_in_state_dict(module: nn.Module) -> None:
    """Makes the module's state dicts name each sharded parameter with its shard, as in `weight.shard_0_of_2`.

    Loading takes this rank's shard from a dict that holds it, or the unsharded parameter. A dict of other shards alone
    is an error, with strict=False too. A shard under the plain name, as earlier versions wrote it, is read.
    """
    module.register_state_dict_post_hook(_add_suffixes)
    module.register_load_state_dict_pre_hook(_find_shards)


def _add_suffixes(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
    for name, shard in get_tensor_shards(module).items():
        state_dict[f"{prefix}{name}{shard.suffix}"] = state_dict.pop(prefix + name)


def _find_shards(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: object,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Puts this rank's shards under the plain names. `state_dict` is torch's copy for this module."""
    for name, shard in get_tensor_shards(module).items():
        whole, own = prefix + name, f"{prefix}{name}{shard.suffix}"
        local_shape = getattr(module, name).shape
        shards = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(f"{whole}.shard_")}
        if own in shards:
            state_dict[whole] = shards[own]
        elif shards and whole not in state_dict:
            error_msgs.append(
                f"the state dict has {', '.join(sorted(shards))}, but this rank holds {own}: load this rank's own "
                "file, or one of unsharded weights (expert_parallel.full_state_dict)"
            )
        elif whole in state_dict and state_dict[whole].shape == shard.full_shape(local_shape):
            state_dict[whole] = shard.narrow_to_shard(state_dict[whole])
        elif whole in state_dict and shard.suffix and state_dict[whole].shape == local_shape:
            logger.warning(
                "%s in the state dict does not name its shard, as an earlier version wrote it: it is right only if "
                "this rank (%s) wrote it",
                whole,
                own,
            )
