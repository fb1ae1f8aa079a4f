"""Degrees, groups and placement: numbers by hand, real groups, and a timeout that every group obeys."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from expert_parallel.mesh import ParallelDegrees, build_mesh, grid
from expert_parallel.placement import ExpertPlacement
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


@given(st.integers(0, 4), st.integers(0, 4))
def test_every_rank_is_once_in_each_axis(log_edp: int, log_ep: int) -> None:
    degrees = ParallelDegrees(2 ** (log_edp + log_ep), ep=2**log_ep)
    groups = grid(degrees)
    for axis, size in (("dp", degrees.dp), ("ep", degrees.ep), ("edp", degrees.edp)):
        assert sorted(rank for group in groups[axis] for rank in group) == list(range(degrees.world_size))
        assert {len(group) for group in groups[axis]} == {size}
    assert all(len(set(ep) & set(edp)) == 1 for ep in groups["ep"] for edp in groups["edp"])


def coordinates(rank: int) -> tuple[int, int, int, bool]:
    mesh = build_mesh(ParallelDegrees(4, ep=2), "cpu", timedelta(seconds=20))
    total = torch.tensor([10.0**rank])
    dist.all_reduce(total, group=mesh.edp_group)
    return mesh.dp_rank, mesh.ep_rank, int(total), mesh.holds_first_replica


def test_groups_of_real_ranks() -> None:
    assert run_ranks(4, coordinates) == [(0, 0, 101, True), (1, 1, 1010, True), (2, 0, 101, False), (3, 1, 1010, False)]


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
    assert 1.0 < run_ranks(2, wait_alone)[0] < 50.0  # the pool itself would wait 60 s


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
