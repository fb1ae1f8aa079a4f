"""Which positions of each sequence a rank has, where sequences are divided over context and tensor parallel ranks.

Context parallel ranks hold two chunks each, one from the front and one from the back, so that causal attention costs
all of them the same (Llama 3, 2024, section 3.3.2). Tensor parallel ranks divide what their context rank has into
consecutive parts (sequence parallelism, Korthikanti et al. 2022): norms, residuals and MoE layers work on those.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_parallel.parallel.collectives import group_rank
from expert_parallel.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class SequencePlace:
    """A rank's place among those that divide a sequence. The default has it whole."""

    cp: int = 1
    cp_rank: int = 0
    tp: int = 1
    tp_rank: int = 0

    @staticmethod
    def of(mesh: ParallelMesh | None) -> "SequencePlace":
        if mesh is None:
            return SequencePlace()
        return SequencePlace(mesh.degrees.cp, group_rank(mesh.cp_group), mesh.degrees.tp, group_rank(mesh.tp_group))

    @property
    def is_whole(self) -> bool:
        return self.cp * self.tp == 1

    def context(self, length: int) -> Tensor:
        """Positions of this context rank in a sequence of `length` tokens, int64 (length / cp)."""
        if self.cp == 1:
            return torch.arange(length)
        chunks = torch.arange(length).chunk(2 * self.cp)
        return torch.cat([chunks[self.cp_rank], chunks[-1 - self.cp_rank]])

    def own(self, length: int) -> Tensor:
        """Positions of this rank, int64 (length / cp / tp)."""
        return self.context(length).chunk(self.tp)[self.tp_rank]

    def all_contexts(self, length: int) -> Tensor:
        """Positions of all context ranks, one after the other, int64 (length)."""
        return torch.cat([SequencePlace(self.cp, rank).context(length) for rank in range(self.cp)])


def length_unit(cp: int, tp: int) -> int:
    """Sequences are divided evenly where their length is a multiple of this: 2 cp chunks, and tp parts of a rank's."""
    return tp if cp == 1 else math.lcm(2 * cp, cp * tp)
