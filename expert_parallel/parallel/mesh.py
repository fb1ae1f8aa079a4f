"""Builds the process groups of a rank from the degrees of parallelism. They are built once and passed down."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from expert_parallel.parallel.collectives import group_rank
from expert_parallel.parallel.degrees import (
    ParallelDegrees,
    ReplicatedConfig,
    ShardedConfig,
    node_and_rail_ranks,
    rank_grids,
    ranks_by_group,
    shard_counts,
)

__all__ = ["ParallelDegrees", "ParallelMesh", "build_mesh", "build_node_groups", "group_builder", "node_and_rail_ranks"]


@dataclass(frozen=True)
class NodeGroups:
    """Holds the process groups of a hierarchical exchange within this rank's expert parallel group.

    ranks_per_node: the number of consecutive global ranks that share a node. node_group: the ranks of the expert
    parallel group that are on this rank's node. rail_group: of each node, the rank that has the same index within its
    node as this rank. None stands for a group of this rank only.
    """

    ranks_per_node: int
    node_group: dist.ProcessGroup | None
    rail_group: dist.ProcessGroup | None


@dataclass(frozen=True)
class ParallelMesh:
    """Holds the process groups that this rank belongs to. None stands for a group of this rank only.

    pp_group: the stages of one pipeline. dp_group, cp_group, tp_group: the ranks along one axis of the dense grid.
    stage_group (dp x cp x tp): all ranks of this pipeline stage; a micro-step consists of their tokens.
    dense_group (dp x cp): the ranks that hold the same shard of the dense weights.
    sequence_group (cp x tp): the ranks that split the same sequences.
    kv_replica_group: consecutive tp ranks that hold the same key and value heads, if there are fewer heads than ranks.
    tied_embedding_group: the first and the last stage, if they each have a copy of the embedding table.
    ep_group: the ranks over which experts are distributed. etp_group: the ranks over which each expert is split.
    edp_group: the ranks that hold the same shard of the same experts. nodes: node and rail groups within ep_group.
    dense_mesh, expert_mesh: dense_group and edp_group for FSDP2, [shards] or [replicas, shards]; None if not sharded.
    """

    degrees: ParallelDegrees
    rank: int
    pp_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    cp_group: dist.ProcessGroup | None
    tp_group: dist.ProcessGroup | None
    stage_group: dist.ProcessGroup | None
    dense_group: dist.ProcessGroup | None
    sequence_group: dist.ProcessGroup | None
    kv_replica_group: dist.ProcessGroup | None
    tied_embedding_group: dist.ProcessGroup | None
    ep_group: dist.ProcessGroup | None
    etp_group: dist.ProcessGroup | None
    edp_group: dist.ProcessGroup | None
    nodes: NodeGroups
    dense_mesh: DeviceMesh | None
    expert_mesh: DeviceMesh | None

    @property
    def dp_rank(self) -> int:
        """Returns this rank's coordinate on the dp axis."""
        return group_rank(self.dp_group)

    @property
    def ep_rank(self) -> int:
        """Returns this rank's coordinate on the ep axis."""
        return group_rank(self.ep_group)

    @property
    def pp_rank(self) -> int:
        """Returns this rank's coordinate on the pp axis."""
        return group_rank(self.pp_group)

    @property
    def stage_rank(self) -> int:
        """Returns this rank's index within stage_group, whose ranks all hold different tokens; it is part of the seed
        of dropout."""
        return group_rank(self.stage_group)


def build_node_groups(
    degrees: ParallelDegrees, ranks_per_node: int, make: Callable[..., dist.ProcessGroup | None]
) -> NodeGroups:
    """Builds the node and rail groups of this rank with `make`, from `group_builder`. Every rank must call it."""
    axes = node_and_rail_ranks(degrees, ranks_per_node)
    return NodeGroups(ranks_per_node, make(axes["node"]), make(axes["rail"]))


def group_builder(device_type: str, timeout: timedelta) -> Callable[..., dist.ProcessGroup | None]:
    """Returns a function that builds the process groups with given ranks and returns the one that contains this rank.

    The function returns None for a rank that is in no group or alone in its group. It builds each set of groups once,
    and runs one collective in it, since NCCL connects lazily: the first training step would be slow, and ranks that
    cannot reach each other would hang there. timeout: of every collective in these groups.
    """
    built: dict[str, dist.ProcessGroup | None] = {}

    def make(ranks: list[list[int]], alone: bool = False) -> dist.ProcessGroup | None:
        """Builds the groups or finds them. alone: build a real group for a single rank too, as DeviceMesh needs one."""
        if max(map(len, ranks)) == 1 and not alone:
            return None
        if str(ranks) not in built:
            group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)
            if group is not None:
                dist.all_reduce(torch.zeros(1, device=device_type), group=group)
            built[str(ranks)] = group
        return built[str(ranks)]

    return make


def build_mesh(
    degrees: ParallelDegrees,
    device_type: str,
    timeout: timedelta,
    ranks_per_node: int | None = None,
    hierarchical: bool = False,
    data: ReplicatedConfig | ShardedConfig | None = None,
    kv_copies: int = 1,
    tied_embeddings: bool = False,
) -> ParallelMesh:
    """Builds the process groups of this rank. Every rank of the world must call it with the same arguments.

    timeout: of every collective. ranks_per_node: None if all ranks share a node. hierarchical: True builds node and
    rail groups too. data: a ShardedConfig also builds the device meshes for FSDP2. kv_copies: the number of consecutive
    tensor parallel ranks that hold the same key and value heads. tied_embeddings: True if the first and the last stage
    each have a copy of the embedding table.
    """
    assert degrees.world_size == dist.get_world_size(), (degrees, dist.get_world_size())
    make, ranks = group_builder(device_type, timeout), ranks_by_group(degrees)
    groups = {f"{name}_group": make(of) for name, of in ranks.items()}
    key_ranks = [tp[i : i + kv_copies] for tp in ranks["tp"] for i in range(0, degrees.tp, kv_copies)]
    tied_ranks = [sorted({stages[0], stages[-1]}) for stages in rank_grids(degrees)[0].flatten(1).mT.tolist()]
    ranks_per_node = ranks_per_node or degrees.world_size
    nodes = NodeGroups(ranks_per_node, None, None)
    if hierarchical:
        nodes = build_node_groups(degrees, ranks_per_node, make)
    dense_mesh = expert_mesh = None
    if isinstance(data, ShardedConfig):
        shards, expert_shards = shard_counts(data, degrees)
        dense_mesh = _fsdp_mesh(ranks["dense"], shards, make, device_type)
        expert_mesh = _fsdp_mesh(ranks["edp"], expert_shards, make, device_type)
    return ParallelMesh(
        degrees=degrees,
        rank=dist.get_rank(),
        **groups,
        kv_replica_group=make(key_ranks),
        tied_embedding_group=make(tied_ranks) if tied_embeddings else None,
        nodes=nodes,
        dense_mesh=dense_mesh,
        expert_mesh=expert_mesh,
    )


def _fsdp_mesh(
    ranks: list[list[int]], shards: int, make: Callable[..., dist.ProcessGroup | None], device_type: str
) -> DeviceMesh:
    """Builds the device mesh over this rank's group of `ranks`: [shards] if `shards` covers the whole group, else
    [replicas, shards]."""
    if shards == len(ranks[0]):
        group = make(ranks, alone=True)
        assert group is not None
        return DeviceMesh.from_group(group, device_type, mesh_dim_names=("shards",))
    sharded = [group[i : i + shards] for group in ranks for i in range(0, len(group), shards)]
    replicated = [group[i::shards] for group in ranks for i in range(shards)]
    mine = next(torch.tensor(group).view(-1, shards) for group in ranks if dist.get_rank() in group)
    pair = [group for group in (make(replicated, alone=True), make(sharded, alone=True)) if group is not None]
    return DeviceMesh.from_group(pair, device_type, mine, mesh_dim_names=("replicas", "shards"))
