"""Validates the degrees of parallelism and computes every rank's coordinates, by arithmetic alone: it needs no process
groups.

The same ranks form two grids ("parallel folding", Liu et al. 2025): pp, dp, cp, tp for the dense parts, and within each
pipeline stage edp, ep, etp for the experts. By default pp is the outermost axis and tp (etp) the innermost, so that the
ranks that communicate most share a node.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from expert_parallel.settings import Settings

AxisOrder = tuple[str, ...]
DENSE_ORDER: AxisOrder = ("pp", "dp", "cp", "tp")
EXPERT_ORDER: AxisOrder = ("edp", "ep", "etp")
Degree = Annotated[int, Field(ge=1)]


class ReplicatedConfig(Settings):
    """Replicates the weights on all data ranks."""

    kind: Literal["replicated"] = "replicated"


class ShardedConfig(Settings):
    """Shards weights, gradients and optimizer state over the data ranks (FSDP2): dense ones over dp x cp, experts over
    edp."""

    kind: Literal["sharded"]
    shards: Degree | None = None
    """Shards dense weights over this many neighboring ranks of dp x cp and replicates them between (hybrid sharding);
    null shards them over all."""
    expert_shards: Degree | None = None
    """Shards experts over this many neighboring ranks of edp and replicates them between; null takes as many as lie
    within the ranks of `shards`."""
    reshard_after_forward: bool = True
    """Frees gathered weights after the forward pass and gathers them again for the backward pass: less memory, more
    bytes sent."""


class OneForwardOneBackwardConfig(Settings):
    """Gives each rank one stage and alternates forward and backward passes (Narayanan et al. 2021, section 2.2.1)."""

    kind: Literal["1f1b"] = "1f1b"


class InterleavedConfig(Settings):
    """Gives each rank several stages: a smaller bubble, more exchanges (Narayanan et al. 2021, section 2.2.2)."""

    kind: Literal["interleaved"]
    stages_per_rank: int = Field(default=2, ge=2)
    """Sets the number of stages of each rank (Megatron-Core's virtual pipeline size)."""


class ParallelConfig(Settings):
    """Sets the degrees of parallelism; dp and edp follow from world = dp * cp * tp * pp = edp * ep * etp * pp."""

    cp: Degree = 1
    """Divides each sequence over this many ranks (context parallelism)."""
    tp: Degree = 1
    """Divides dense matrices over this many ranks (tensor parallelism)."""
    pp: Degree = 1
    """Divides the blocks over this many ranks (pipeline parallelism)."""
    ep: Degree = 1
    """Divides the experts over this many ranks (expert parallelism)."""
    etp: Degree = 1
    """Divides each expert's matrices over this many ranks (expert tensor parallelism)."""
    order: list[Literal["pp", "dp", "cp", "tp"]] = Field(default_factory=lambda: list(DENSE_ORDER))  # type: ignore[arg-type]
    """Orders the axes of the dense parts' rank grid, outermost first."""
    expert_order: list[Literal["edp", "ep", "etp"]] = Field(default_factory=lambda: list(EXPERT_ORDER))  # type: ignore[arg-type]
    """Orders the axes of the experts' rank grid, outermost first."""
    ranks_per_node: Degree | None = None
    """Sets the number of consecutive ranks that share a machine; null takes it from the launcher."""
    data: Annotated[ReplicatedConfig | ShardedConfig, Field(discriminator="kind")] = ReplicatedConfig()
    """Chooses whether data ranks replicate or shard the weights."""
    pipeline: Annotated[OneForwardOneBackwardConfig | InterleavedConfig, Field(discriminator="kind")] = (
        OneForwardOneBackwardConfig()
    )
    """Chooses the pipeline schedule."""

    @model_validator(mode="after")
    def _name_each_axis_once(self) -> "ParallelConfig":
        for name, order, axes in (
            ("order", self.order, DENSE_ORDER),
            ("expert_order", self.expert_order, EXPERT_ORDER),
        ):
            if sorted(order) != sorted(axes):
                raise ValueError(f"{name} is [{', '.join(order)}]: it must name each of {', '.join(axes)} once")
        return self

    @property
    def stages_per_rank(self) -> int:
        return self.pipeline.stages_per_rank if isinstance(self.pipeline, InterleavedConfig) else 1

    def degrees(self, world_size: int) -> "ParallelDegrees":
        """Returns the degrees of parallelism for `world_size` ranks. Raises a ValueError if this number is not a
        multiple of the product of the degrees, or FSDP2's shards do not divide it."""
        degrees = ParallelDegrees(
            world_size, self.cp, self.tp, self.pp, self.ep, self.etp, tuple(self.order), tuple(self.expert_order)
        )
        if isinstance(self.data, ShardedConfig):
            shard_counts(self.data, degrees)
        return degrees


@dataclass(frozen=True)
class ParallelDegrees:
    """Holds the degrees of parallelism of `world_size` ranks, dp * cp * tp * pp = edp * ep * etp * pp.

    dp and edp are derived from the other degrees. Raises ValueError where the world size is not a multiple of their
    product.
    """

    world_size: int
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    order: AxisOrder = DENSE_ORDER
    expert_order: AxisOrder = EXPERT_ORDER

    def __post_init__(self) -> None:
        for kind, names in (("dense parts", ("cp", "tp", "pp")), ("experts", ("ep", "etp", "pp"))):
            product = math.prod(getattr(self, name) for name in names)
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
        """Returns the data parallel degree of the dense parts."""
        return self.world_size // (self.cp * self.tp * self.pp)

    @property
    def edp(self) -> int:
        """Returns the data parallel degree of the experts."""
        return self.world_size // (self.ep * self.etp * self.pp)

    def __str__(self) -> str:
        """Formats the degrees, as in `dp 2, cp 1, tp 4, pp 1 | edp 4, ep 2, etp 1`."""
        dense = ", ".join(f"{axis} {getattr(self, axis)}" for axis in ("dp", "cp", "tp", "pp"))
        return f"{dense} | " + ", ".join(f"{axis} {getattr(self, axis)}" for axis in EXPERT_ORDER)


def rank_grids(degrees: ParallelDegrees) -> tuple[Tensor, Tensor]:
    """Returns the ranks arranged as two grids, int64 tensors of shape [pp, dp, cp, tp] and [pp, edp, ep, etp].

    >>> rank_grids(ParallelDegrees(world_size=4, tp=2, ep=2))[0].squeeze().tolist()
    [[0, 1], [2, 3]]
    """
    sizes = [getattr(degrees, axis) for axis in degrees.order]
    dense = torch.arange(degrees.world_size).view(sizes)
    dense = dense.permute([degrees.order.index(axis) for axis in DENSE_ORDER]).contiguous()
    stages = dense.flatten(1).sort(dim=1).values
    sizes = [getattr(degrees, axis) for axis in degrees.expert_order]
    places = [1 + degrees.expert_order.index(axis) for axis in EXPERT_ORDER]
    return dense, stages.view(degrees.pp, *sizes).permute(0, *places).contiguous()


# Maps each group's name to the axes of its grid and to the axes along which its members differ.
GROUPS: dict[str, tuple[AxisOrder, AxisOrder]] = {
    "pp": (DENSE_ORDER, ("pp",)),
    "dp": (DENSE_ORDER, ("dp",)),
    "cp": (DENSE_ORDER, ("cp",)),
    "tp": (DENSE_ORDER, ("tp",)),
    "stage": (DENSE_ORDER, ("dp", "cp", "tp")),
    "dense": (DENSE_ORDER, ("dp", "cp")),
    "sequence": (DENSE_ORDER, ("cp", "tp")),
    "edp": (("pp", *EXPERT_ORDER), ("edp",)),
    "ep": (("pp", *EXPERT_ORDER), ("ep",)),
    "etp": (("pp", *EXPERT_ORDER), ("etp",)),
}


def ranks_by_group(degrees: ParallelDegrees) -> dict[str, list[list[int]]]:
    """Returns, for each name in GROUPS, the ranks of all process groups of this name; the ranks of a group are in
    ascending order.

    >>> groups = ranks_by_group(ParallelDegrees(world_size=4, ep=2))
    >>> {axis: groups[axis] for axis in ("edp", "ep")}
    {'edp': [[0, 2], [1, 3]], 'ep': [[0, 1], [2, 3]]}
    """
    dense, experts = rank_grids(degrees)
    return {
        name: _ranks_along(dense if all_axes == DENSE_ORDER else experts, all_axes, axes)
        for name, (all_axes, axes) in GROUPS.items()
    }


def _ranks_along(ranks: Tensor, all_axes: AxisOrder, axes: AxisOrder) -> list[list[int]]:
    moved = ranks.movedim([all_axes.index(axis) for axis in axes], list(range(-len(axes), 0)))
    return moved.flatten(-len(axes)).flatten(0, -2).sort(dim=1).values.tolist()


def crosses_nodes(groups: list[list[int]], ranks_per_node: int) -> bool:
    """Returns True if the ranks of one of the groups are on several nodes, of `ranks_per_node` consecutive ranks each.
    The ranks of a group are in ascending order.

    >>> crosses_nodes(ranks_by_group(ParallelDegrees(world_size=32, ep=16))["ep"], ranks_per_node=8)
    True
    """
    return any(ranks[0] // ranks_per_node != ranks[-1] // ranks_per_node for ranks in groups)


def rank_coordinates(degrees: ParallelDegrees, rank: int) -> dict[str, int]:
    """Returns the coordinates of a rank on every axis of both grids, by name of the axis."""
    dense, experts = rank_grids(degrees)
    coordinates = dict(zip(DENSE_ORDER, (dense == rank).nonzero()[0].tolist(), strict=True))
    return coordinates | dict(zip(EXPERT_ORDER, (experts == rank).nonzero()[0, 1:].tolist(), strict=True))


def format_rank_table(degrees: ParallelDegrees, contents: Callable[[dict[str, int]], str] = lambda _: "") -> str:
    """Returns a table, as text, of all ranks with their coordinates and, for each, the text `contents(coordinates)`."""
    axes = [*DENSE_ORDER, *EXPERT_ORDER]
    lines = ["rank  " + " ".join(f"{axis:>4}" for axis in axes)]
    for rank in range(degrees.world_size):
        place = rank_coordinates(degrees, rank)
        lines.append(
            (f"{rank:>4}  " + " ".join(f"{place[axis]:>4}" for axis in axes) + f"  {contents(place)}").rstrip()
        )
    return "\n".join(lines)


def shard_counts(config: ShardedConfig, degrees: ParallelDegrees) -> tuple[int, int]:
    """Returns (number of FSDP2 shards of dense weights, number of FSDP2 shards of experts). Raises ValueError if one
    does not divide the number of ranks that hold the same weights."""
    dense = degrees.dp * degrees.cp
    shards = config.shards or dense
    if dense % shards:
        raise ValueError(
            f"parallel.data.shards ({shards}) does not divide the {dense} ranks of dp x cp that hold the same weights"
        )
    within = max(1, shards * degrees.tp // (degrees.ep * degrees.etp))
    expert_shards = config.expert_shards or (degrees.edp if config.shards is None else math.gcd(degrees.edp, within))
    if degrees.edp % expert_shards:
        raise ValueError(
            f"parallel.data.expert_shards ({expert_shards}) does not divide the {degrees.edp} ranks of edp that hold "
            "the same experts"
        )
    return shards, expert_shards


def node_and_rail_ranks(degrees: ParallelDegrees, ranks_per_node: int) -> dict[str, list[list[int]]]:
    """Returns the ranks of all node groups and of all rail groups within the expert parallel groups.

    A node group holds the ranks of an expert parallel group that share a node; a rail group holds one rank of each node
    of an expert parallel group, those with the same index within their node. Raises ValueError if an expert parallel
    group has different numbers of ranks on its nodes.

    >>> node_and_rail_ranks(ParallelDegrees(world_size=4, ep=4), ranks_per_node=2)
    {'node': [[0, 1], [2, 3]], 'rail': [[0, 2], [1, 3]]}
    """
    nodes, rails = [], []
    for ranks in ranks_by_group(degrees)["ep"]:
        parts: dict[int, list[int]] = {}
        for rank in ranks:
            parts.setdefault(rank // ranks_per_node, []).append(rank)
        nodes += list(parts.values())
        if len({len(node) for node in nodes}) > 1:
            raise ValueError(
                f"parallel.ep ({degrees.ep}) and the ranks of a node ({ranks_per_node}, parallel.ranks_per_node) must "
                "divide one another for model.moe.dispatcher.kind 'hierarchical': a group fills whole nodes, or a node "
                "whole groups"
            )
        rails += [list(rail) for rail in zip(*parts.values(), strict=True)]
    return {"node": nodes, "rail": rails}
