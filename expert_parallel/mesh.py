"""Degrees of parallelism (validated numbers) and the process groups made from them. Built once, passed down.

Rank order, innermost first: pp outermost, then dp, cp, tp for the dense parts; for the experts, over the same ranks
("parallel folding", Liu et al. 2025): pp outermost, then edp, ep, etp.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh

from expert_parallel.settings import Settings


class ParallelConfig(Settings):
    """`data`: `replicated` keeps all dense weights on every rank; `sharded` divides weights, gradients and optimizer
    state over the data ranks (FSDP2): dense ones over dp, experts over edp."""

    ep: int = Field(default=1, ge=1, description="expert parallel: ranks over which the experts are divided")
    ranks_per_node: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="consecutive ranks that share a machine; default: as the launcher says"
    )
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
class Nodes:
    """How an expert-parallel group lies on machines, as one of its ranks sees it. node_group: the group's ranks on this
    node. rail_group: on each node the one with this rank's place. None: this rank alone."""

    ranks_per_node: int
    node_group: dist.ProcessGroup | None
    rail_group: dist.ProcessGroup | None


@dataclass(frozen=True)
class ParallelMesh:
    """The process groups of one rank.

    dp_group: the ranks that hold replicas (or shards) of the dense parameters; their tokens make up a micro-step.
    ep_group: the ranks among which the experts are divided. edp_group: those that hold the same experts.
    nodes: how ep_group lies on machines.
    dp_mesh, edp_mesh: the same groups for FSDP2.
    """

    degrees: ParallelDegrees
    rank: int
    dp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    edp_group: dist.ProcessGroup
    dp_mesh: DeviceMesh
    edp_mesh: DeviceMesh
    nodes: Nodes

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


def node_grid(degrees: ParallelDegrees, ranks_per_node: int) -> dict[str, list[list[int]]]:
    """The ranks of every node and rail group. ValueError where an expert-parallel group does not fill whole nodes, or a
    node whole groups.

    >>> node_grid(ParallelDegrees(world_size=4, ep=4), ranks_per_node=2)
    {'node': [[0, 1], [2, 3]], 'rail': [[0, 2], [1, 3]]}
    """
    within = min(degrees.ep, ranks_per_node)
    if degrees.ep % within or ranks_per_node % within:
        raise ValueError(
            f"parallel.ep ({degrees.ep}) and the ranks of a node ({ranks_per_node}, parallel.ranks_per_node) must "
            "divide one another for model.moe.dispatcher.kind 'hierarchical': a group fills whole nodes, or a node "
            "whole groups"
        )
    ranks = torch.arange(degrees.world_size).view(-1, degrees.ep // within, within)
    return {"node": ranks.flatten(0, 1).tolist(), "rail": ranks.mT.flatten(0, 1).tolist()}


def build_nodes(degrees: ParallelDegrees, ranks_per_node: int, device_type: str, timeout: timedelta) -> Nodes:
    """Every rank of the world calls it."""
    axes = node_grid(degrees, ranks_per_node)
    node, rail = (_build_group(ranks, device_type, timeout) if len(ranks[0]) > 1 else None for ranks in axes.values())
    return Nodes(ranks_per_node, node, rail)


def _build_group(ranks: list[list[int]], device_type: str, timeout: timedelta) -> dist.ProcessGroup:
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)
    dist.all_reduce(torch.zeros(1, device=device_type), group=group)
    return group


def build_mesh(
    degrees: ParallelDegrees,
    device_type: str,
    timeout: timedelta,
    ranks_per_node: int | None = None,
    hierarchical: bool = False,
) -> ParallelMesh:
    """Builds every group with the user's timeout, and warms each up, so that no first step waits or hangs in one.

    ranks_per_node: default: all ranks share one. hierarchical: node and rail groups too.
    """
    assert degrees.world_size == dist.get_world_size(), (degrees, dist.get_world_size())
    groups = {axis: _build_group(ranks, device_type, timeout) for axis, ranks in grid(degrees).items()}
    ranks_per_node = ranks_per_node or degrees.world_size
    nodes = Nodes(ranks_per_node, None, None)
    if hierarchical:
        nodes = build_nodes(degrees, ranks_per_node, device_type, timeout)
    return ParallelMesh(
        degrees=degrees,
        rank=dist.get_rank(),
        dp_group=groups["dp"],
        ep_group=groups["ep"],
        edp_group=groups["edp"],
        dp_mesh=DeviceMesh.from_group(groups["dp"], device_type, mesh_dim_names=("dp",)),
        edp_mesh=DeviceMesh.from_group(groups["edp"], device_type, mesh_dim_names=("edp",)),
        nodes=nodes,
    )
