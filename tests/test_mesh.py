"""Degrees, groups and placement: numbers by hand, real groups, and a timeout that every group obeys."""

import time
from dataclasses import fields
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from expert_parallel.parallel.degrees import (
    DENSE_ORDER,
    EXPERT_ORDER,
    ParallelConfig,
    ParallelDegrees,
    ShardedConfig,
    format_rank_table,
    rank_coordinates,
    ranks_by_group,
    shard_counts,
)
from expert_parallel.parallel.mesh import build_mesh
from expert_parallel.parallel.placement import ExpertPlacement
from tests.ranks import run_ranks


def test_degrees_by_hand() -> None:
    folded = ParallelDegrees(world_size=8, tp=2, ep=4)
    assert (folded.dp, folded.edp) == (4, 2)
    assert (ParallelDegrees(16, cp=2, tp=2, pp=2, ep=4, etp=2).dp, ParallelDegrees(16, pp=2, ep=4, etp=2).edp) == (2, 1)


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"world_size": 6, "ep": 4}, ["world size (6)", "parallel.ep (4)", "experts"]),
        ({"world_size": 8, "tp": 3}, ["world size (8)", "parallel.tp (3)", "dense parts"]),
        (
            {"world_size": 4, "ep": 4, "pp": 2},
            ["world size (4)", "parallel.ep (4)", "parallel.pp (2)", "takes 8 ranks"],
        ),
    ],
)
def test_degrees_that_do_not_fit_name_every_factor(degrees: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ValueError, match="is not a multiple of") as error:
        ParallelDegrees(**degrees)
    assert all(word in str(error.value) for word in words), error.value


@st.composite
def degrees_of_any_kind(draw: st.DrawFn) -> ParallelDegrees:
    """Degrees that fit, in any order of the axes."""
    dp, cp, tp, pp = (draw(st.sampled_from([1, 2, 3, 4])) for _ in range(4))
    stage = dp * cp * tp
    ep = draw(st.sampled_from([n for n in range(1, stage + 1) if stage % n == 0]))
    etp = draw(st.sampled_from([n for n in range(1, stage // ep + 1) if stage // ep % n == 0]))
    order, expert_order = (tuple(draw(st.permutations(axes))) for axes in (DENSE_ORDER, EXPERT_ORDER))
    return ParallelDegrees(stage * pp, cp, tp, pp, ep, etp, order, expert_order)


@settings(deadline=None)
@given(degrees_of_any_kind())
def test_groups_are_those_of_the_coordinates(degrees: ParallelDegrees) -> None:
    """Two ranks share a group exactly if their coordinates on all axes but the group's are equal."""
    places = [rank_coordinates(degrees, rank) for rank in range(degrees.world_size)]
    dense_axes, expert_axes = {"pp", "dp", "cp", "tp"}, {"pp", "edp", "ep", "etp"}
    moving = {name: {name} for name in ("pp", "dp", "cp", "tp", "edp", "ep", "etp")}
    moving |= {"stage": {"dp", "cp", "tp"}, "dense": {"dp", "cp"}, "sequence": {"cp", "tp"}}
    for name, groups in ranks_by_group(degrees).items():
        fixed = sorted((expert_axes if name in ("edp", "ep", "etp") else dense_axes) - moving[name])
        expected: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(places):
            expected.setdefault(tuple(place[axis] for axis in fixed), []).append(rank)
        assert sorted(groups) == sorted(expected.values()), name


@settings(deadline=None)
@given(degrees_of_any_kind())
def test_places_count_up_in_the_order_of_the_axes(degrees: ParallelDegrees) -> None:
    """The rank is its coordinates read as a number, the outermost axis first; the experts' within its stage."""
    seen = [0] * degrees.pp
    for rank in range(degrees.world_size):
        place, number = rank_coordinates(degrees, rank), 0
        for axis in degrees.order:
            number = number * getattr(degrees, axis) + place[axis]
        assert number == rank
        number = 0
        for axis in degrees.expert_order:
            number = number * getattr(degrees, axis) + place[axis]
        assert number == seen[place["pp"]]
        seen[place["pp"]] += 1


def test_folding_by_hand() -> None:
    """8 ranks, dp 4 x tp 2, ep 4 x edp 2: an expert-parallel group spans two data and two tensor parallel ranks."""
    groups = ranks_by_group(ParallelDegrees(8, tp=2, ep=4))
    assert groups["tp"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups["dense"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert groups["ep"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups["edp"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    lines = format_rank_table(ParallelDegrees(8, tp=2, ep=4)).splitlines()
    assert lines[0].split() == ["rank", "pp", "dp", "cp", "tp", "edp", "ep", "etp"]
    assert lines[6].split() == ["5", "0", "2", "0", "1", "1", "1", "0"]


def test_an_order_names_each_axis_once() -> None:
    with pytest.raises(ValueError, match=r"order is \[pp, dp, cp, cp\]: it must name each of pp, dp, cp, tp once"):
        ParallelConfig.model_validate({"order": ["pp", "dp", "cp", "cp"]})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"shards": 3}, r"parallel.data.shards \(3\) does not divide the 8 ranks of dp x cp"),
        ({"expert_shards": 3}, r"parallel.data.expert_shards \(3\) does not divide the 4 ranks of edp"),
    ],
)
def test_shards_that_do_not_divide_are_refused(data: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParallelConfig.model_validate({"ep": 2, "data": {"kind": "sharded", **data}}).degrees(8)


@pytest.mark.parametrize(
    ("data", "counts"), [({}, (8, 4)), ({"shards": 4}, (4, 2)), ({"shards": 2}, (2, 1)), ({"shards": 1}, (1, 1))]
)
def test_experts_are_sharded_within_the_dense_shards(data: dict[str, int], counts: tuple[int, int]) -> None:
    assert shard_counts(ShardedConfig(kind="sharded", **data), ParallelDegrees(8, ep=2)) == counts


def test_a_mesh_of_4096_ranks_without_processes() -> None:
    """As rank 1,234 of dp 32 x cp 2 x tp 8 x pp 8 sees it, from the arithmetic of its number alone."""
    dist.init_process_group("fake", store=FakeStore(), rank=1234, world_size=4096)
    try:
        data = ShardedConfig(kind="sharded", shards=8)
        degrees = ParallelDegrees(4096, cp=2, tp=8, pp=8, ep=64)
        mesh = build_mesh(degrees, "cpu", timedelta(seconds=5), data=data, kv_copies=4, tied_embeddings=True)
        ranks = {
            field.name: dist.get_process_group_ranks(getattr(mesh, field.name))
            for field in fields(mesh)
            if isinstance(getattr(mesh, field.name), dist.ProcessGroup)
        }
    finally:
        dist.destroy_process_group()
    stage, inside = divmod(1234, 512)  # stage 2; 210 = dp 13, cp 0, tp 2 = edp 3, ep 18
    assert (stage, inside) == (2, 13 * 16 + 0 * 8 + 2) == (2, 3 * 64 + 18)
    assert ranks["pp_group"] == [210 + 512 * i for i in range(8)]
    assert ranks["dp_group"] == [1024 + 16 * i + 2 for i in range(32)]
    assert ranks["cp_group"] == [1234, 1242]
    assert ranks["tp_group"] == list(range(1232, 1240))
    assert ranks["stage_group"] == list(range(1024, 1536))
    assert ranks["dense_group"] == [1024 + 8 * i + 2 for i in range(64)]
    assert ranks["sequence_group"] == list(range(1232, 1248))
    assert ranks["kv_replica_group"] == list(range(1232, 1236))
    assert ranks["ep_group"] == list(range(1216, 1280))
    assert ranks["edp_group"] == [1024 + 64 * i + 18 for i in range(8)]
    assert "etp_group" not in ranks
    assert "tied_embedding_group" not in ranks  # neither the first nor the last stage
    assert mesh.dense_mesh is not None
    assert mesh.dense_mesh.mesh.tolist() == [[1024 + 8 * (8 * r + s) + 2 for s in range(8)] for r in range(8)]
    assert mesh.expert_mesh is not None
    assert mesh.expert_mesh.mesh.tolist() == [[1024 + 64 * i + 18] for i in range(8)]  # 8 shards x tp 8 = one ep group


def coordinates(rank: int) -> tuple[int, int, int]:
    mesh = build_mesh(ParallelDegrees(4, ep=2), "cpu", timedelta(seconds=120))
    total = torch.tensor([10.0**rank])
    dist.all_reduce(total, group=mesh.edp_group)
    return mesh.dp_rank, mesh.ep_rank, int(total)


def test_groups_of_real_ranks() -> None:
    assert run_ranks(4, coordinates) == [(0, 0, 101), (1, 1, 1010), (2, 0, 101), (3, 1, 1010)]


def wait_alone(rank: int) -> float:
    """Rank 0 enters a collective that rank 1 never joins."""
    mesh = build_mesh(ParallelDegrees(2, ep=2), "cpu", timedelta(seconds=2))
    start = time.monotonic()
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed? ?out"):
            dist.all_reduce(torch.zeros(1), group=mesh.ep_group)
    return time.monotonic() - start


def test_a_group_obeys_the_timeout() -> None:
    """Trap 21: an expert-parallel group that waits half an hour, whatever the user set."""
    assert 1.0 < run_ranks(2, wait_alone)[0] < 50.0  # the pool itself would wait 240 s


@given(st.integers(1, 40), st.integers(1, 16))
def test_contiguous_placement(num_experts: int, num_ranks: int) -> None:
    if num_experts < num_ranks:
        with pytest.raises(ValueError, match=rf"num_experts \({num_experts}\).*parallel.ep \({num_ranks}\)"):
            ExpertPlacement.contiguous(num_experts, num_ranks)
        return
    placement = ExpertPlacement.contiguous(num_experts, num_ranks)
    held = [placement.experts_on(rank) for rank in range(num_ranks)]
    assert [expert for experts in held for expert in experts] == list(range(num_experts))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert all(placement.slot_of_expert[expert] == slot for experts in held for slot, expert in enumerate(experts))


def test_scattered_placement_by_hand() -> None:
    placement = ExpertPlacement((1, 0, 1, 1), num_ranks=2)
    assert (placement.experts_on(0), placement.experts_on(1)) == ((1,), (0, 2, 3))
    assert placement.slot_of_expert == (0, 0, 1, 2)
