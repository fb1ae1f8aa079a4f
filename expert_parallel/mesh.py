"""Degrees of parallelism (validated numbers) and the process groups made from them. Built once, passed down.

Rank order, innermost first: pp outermost, then dp, cp, tp for the dense parts; for the experts, over the same ranks
("parallel folding", Liu et al. 2025): pp outermost, then edp, ep, etp.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh

from expert_parallel.settings import Settings


class ParallelConfig(Settings):
    """`data`: `replicated` keeps all dense weights on every rank; `sharded` divides weights, gradients and optimizer
    state over the data ranks (FSDP2): dense ones over dp, experts over edp."""

    ep: int = Field(default=1, ge=1, description="expert parallel: ranks over which the experts are divided")
    data: Literal["replicated", "sharded"] = "replicated"


@dataclass(frozen=True)
class ParallelDegrees:
    """world = dp * cp * tp * pp = edp * ep * etp * pp. dp and edp are derived."""

    world_size: int
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for kind, names in (("dense parts", ("cp", "tp", "pp")), ("experts", ("ep", "etp", "pp"))):
            product = 1
            for name in names:
                product *= getattr(self, name)
            if self.world_size % product:
                factors = " * ".join(
                    f"parallel.{name} ({getattr(self, name)})" for name in names if getattr(self, name) > 1
                )
                raise ValueError(
                    f"the world size ({self.world_size}) is not a multiple of {factors}: one copy of the "
                    f"{kind} takes {product} ranks"
                )

    @property
    def dp(self) -> int:
        return self.world_size // (self.cp * self.tp * self.pp)

    @property
    def edp(self) -> int:
        return self.world_size // (self.ep * self.etp * self.pp)


@dataclass(frozen=True)
class ParallelMesh:
    """The process groups of one rank.

    dp_group: the ranks that hold replicas (or shards) of the dense parameters; their tokens make up a micro-step.
    ep_group: the ranks among which the experts are divided. edp_group: those that hold the same experts.
    dp_mesh, edp_mesh: the same groups for FSDP2.
    """

    degrees: ParallelDegrees
    rank: int
    dp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    edp_group: dist.ProcessGroup
    dp_mesh: DeviceMesh
    edp_mesh: DeviceMesh

    @property
    def holds_first_replica(self) -> bool:
        """Whether this rank is the first of those that hold its experts."""
        return dist.get_rank(self.edp_group) == 0

    @property
    def dp_rank(self) -> int:
        return dist.get_rank(self.dp_group)

    @property
    def ep_rank(self) -> int:
        return dist.get_rank(self.ep_group)


def grid(degrees: ParallelDegrees) -> dict[str, list[list[int]]]:
    """The ranks of every group, by axis: from one arange, so that each rank's place is arithmetic. pp, cp, tp, etp = 1.

    >>> grid(ParallelDegrees(world_size=4, ep=2))
    {'dp': [[0, 1, 2, 3]], 'ep': [[0, 1], [2, 3]], 'edp': [[0, 2], [1, 3]]}
    """
    experts = torch.arange(degrees.world_size).view(degrees.edp, degrees.ep)
    return {"dp": [experts.flatten().tolist()], "ep": experts.tolist(), "edp": experts.mT.tolist()}


def build_mesh(degrees: ParallelDegrees, device_type: str, timeout: timedelta) -> ParallelMesh:
    """Builds every group with the user's timeout, and warms each up, so that no first step waits or hangs in one."""
    assert degrees.world_size == dist.get_world_size(), (degrees, dist.get_world_size())
    groups = {}
    for axis, ranks in grid(degrees).items():
        groups[axis], _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)
        dist.all_reduce(torch.zeros(1, device=device_type), group=groups[axis])
    return ParallelMesh(
        degrees=degrees,
        rank=dist.get_rank(),
        dp_group=groups["dp"],
        ep_group=groups["ep"],
        edp_group=groups["edp"],
        dp_mesh=DeviceMesh.from_group(groups["dp"], device_type, mesh_dim_names=("dp",)),
        edp_mesh=DeviceMesh.from_group(groups["edp"], device_type, mesh_dim_names=("edp",)),
    )
