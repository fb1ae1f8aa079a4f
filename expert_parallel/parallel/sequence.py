"""Computes which positions of each sequence a rank holds under context and sequence parallelism.

A sequence is cut into 2 cp chunks; context parallel rank r holds chunks r and 2 cp - 1 - r, so that causal attention
costs all ranks the same (Llama 3, 2024, section 3.3.2). The tensor parallel ranks split the positions of their context
rank into consecutive ranges (sequence parallelism, Korthikanti et al. 2022), on which norms, residuals and MoE layers
work.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_parallel.parallel.collectives import group_rank
from expert_parallel.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class SequenceShard:
    """Holds the sizes of the two axes that divide sequences, and a rank's coordinates on them. By default sequences are
    whole."""

    cp: int = 1
    cp_rank: int = 0
    tp: int = 1
    tp_rank: int = 0

    @staticmethod
    def of(mesh: ParallelMesh | None) -> "SequenceShard":
        """Returns the coordinates of this rank in the mesh; if mesh is None, sequences are whole."""
        if mesh is None:
            return SequenceShard()
        return SequenceShard(mesh.degrees.cp, group_rank(mesh.cp_group), mesh.degrees.tp, group_rank(mesh.tp_group))

    @property
    def is_whole(self) -> bool:
        """Returns True if this rank holds every position of its sequences."""
        return self.cp * self.tp == 1

    def context(self, length: int) -> Tensor:
        """Returns the positions that the tensor parallel ranks of this context parallel rank hold together, int64
        (length / cp), ascending. Raises ValueError if the ranks cannot hold equally many.

        A model computes them before it communicates, so that all ranks raise the error.
        """
        if length % (unit := sequence_length_multiple(self.cp, self.tp)):
            raise ValueError(
                f"the sequence length ({length}) is not a multiple of {unit}: sequences are divided evenly over "
                f"parallel.cp ({self.cp}, two chunks a rank) and parallel.tp ({self.tp})"
            )
        if self.cp == 1:
            return torch.arange(length)
        chunks = torch.arange(length).chunk(2 * self.cp)
        return torch.cat([chunks[self.cp_rank], chunks[-1 - self.cp_rank]])

    def own(self, length: int) -> Tensor:
        """Returns the positions that this rank itself holds, int64 (length / cp / tp), ascending."""
        return self.context(length).chunk(self.tp)[self.tp_rank]

    def all_contexts(self, length: int) -> Tensor:
        """Returns the positions of all context parallel ranks, concatenated in rank order, int64 (length)."""
        return torch.cat([SequenceShard(self.cp, rank).context(length) for rank in range(self.cp)])


def sequence_length_multiple(cp: int, tp: int) -> int:
    """Returns the number that a sequence length must be a multiple of, so that all ranks hold equally many positions:
    2 cp chunks, and tp equal ranges per context parallel rank."""
    return tp if cp == 1 else math.lcm(2 * cp, cp * tp)
