"""Capacity and drops: the numbers of C by hand, and who keeps a place against a literal queue in Python."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from expert_parallel.moe.capacity import (
    POLICIES,
    DroplessConfig,
    FactorConfig,
    expert_capacity,
    limit_by_factor,
    place_in_expert,
)
from expert_parallel.moe.plan import Reason, RoutingPlan, RowCounts, count_choices

NAIVE = settings(max_examples=80, deadline=None, derandomize=True)


def make_plan(
    expert_ids: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], num_choices: int = 1, num_experts: int = 2
) -> RoutingPlan:
    """A plan with the given choices and their scores. Logits fall where scores rise, so that nobody ranks by them."""
    expert_ids_TK = torch.tensor(expert_ids, dtype=torch.int64).view(-1, num_choices)
    scores_TK = torch.tensor(scores, dtype=torch.float64).view(-1, num_choices)
    scores_TE = scores_TK.new_full((len(expert_ids), num_experts), 0.01).scatter(1, expert_ids_TK, scores_TK)
    return RoutingPlan(
        logits_TE=-scores_TE,
        scores_TE=scores_TE,
        probabilities_TE=scores_TE,
        expert_ids_TK=expert_ids_TK,
        weights_TK=torch.ones(expert_ids_TK.shape, dtype=torch.float64),
        reason_TK=torch.full_like(expert_ids_TK, Reason.KEPT, dtype=torch.uint8),
        num_experts=num_experts,
    )


def factor(train: float, **options: object) -> FactorConfig:
    return FactorConfig(kind="factor", **{"train": train, "minimum": 0, **options})


def kept(config: FactorConfig, plan: RoutingPlan) -> list[list[bool]]:
    return limit_by_factor(config, plan, training=True).kept_TK.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# C = max(minimum, ceil(factor * T * K / E))


@pytest.mark.parametrize(
    ("capacity_factor", "num_tokens", "num_choices", "num_experts", "capacity"),
    [
        (1.0, 8, 2, 4, 4),
        (1.25, 8, 2, 4, 5),
        (1.0, 9, 2, 4, 5),  # 4.5
        (0.7, 10, 1, 1, 7),
        (1.1, 100, 1, 1, 110),  # in floats 1.1 * 100 is 110.00000000000001
        (1.1, 100, 2, 4, 55),
        (0.55, 50, 2, 5, 11),
        (2.0, 4096, 2, 64, 256),
        (1e-3, 5, 1, 8, 1),
        (1.0, 0, 2, 4, 0),
        (1.25, 1 << 20, 8, 256, 40960),
    ],
)
def test_expert_capacity(
    capacity_factor: float, num_tokens: int, num_choices: int, num_experts: int, capacity: int
) -> None:
    assert expert_capacity(capacity_factor, 0, num_tokens, num_choices, num_experts) == capacity


def test_the_minimum_holds_where_the_factor_gives_less() -> None:
    assert expert_capacity(1.0, 4, num_tokens=8, num_choices=1, num_experts=8) == 4
    assert expert_capacity(1.0, 4, num_tokens=64, num_choices=1, num_experts=8) == 8
    assert expert_capacity(1.0, 4, num_tokens=0, num_choices=1, num_experts=8) == 4


@NAIVE
@given(st.integers(1, 400), st.integers(0, 300), st.integers(1, 8), st.integers(1, 64))
def test_expert_capacity_is_exact(percent: int, num_tokens: int, num_choices: int, num_experts: int) -> None:
    """Factors are written with two decimals, so C is a ceiling of whole numbers."""
    capacity = expert_capacity(percent / 100, 0, num_tokens, num_choices, num_experts)
    assert capacity == -(-percent * num_tokens * num_choices // (100 * num_experts))


@pytest.mark.parametrize("wrong", [{"train": 0.0}, {"eval": -1.0}, {"minimum": -1}, {"drop": "random"}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        factor(**{"train": 1.0, **wrong})


# ---------------------------------------------------------------------------------------------------------------------
# Places in the queues, and who is dropped


def queue_places(
    expert_ids: Sequence[Sequence[int]], num_choices: int, scores: Sequence[Sequence[float]] | None = None
) -> list[list[int]]:
    """A literal queue: choices line up, and each takes the next place at its expert's counter."""
    line = [(k, t) for k in range(num_choices) for t in range(len(expert_ids))]
    if scores is not None:
        line = sorted(line, key=lambda kt: -scores[kt[1]][kt[0]])  # Python's sort keeps the order of equals
    served: dict[int, int] = {}
    places = [[-1] * num_choices for _ in expert_ids]
    for k, t in line:
        expert = expert_ids[t][k]
        places[t][k] = served.get(expert, 0)
        served[expert] = places[t][k] + 1
    return places


Case = tuple[list[list[int]], list[list[float]], int, int]  # expert_ids, scores of the choices, K, E


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few distinct scores, so that many tie."""
    num_experts = draw(st.integers(1, 5))
    num_choices, num_tokens = draw(st.integers(1, num_experts)), draw(st.integers(0, 8))
    expert_ids = [list(draw(st.permutations(range(num_experts)))[:num_choices]) for _ in range(num_tokens)]
    score = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    scores = [[draw(score) for _ in range(num_choices)] for _ in range(num_tokens)]
    return expert_ids, scores, num_choices, num_experts


def test_first_choices_stand_before_second_choices() -> None:
    place_TK = place_in_expert(torch.tensor([[1, 0], [0, 1], [0, 2]]), num_experts=3)
    assert place_TK.tolist() == [[0, 2], [0, 1], [1, 0]]


def test_larger_scores_stand_first_and_ties_by_position() -> None:
    expert_ids_TK = torch.tensor([[0, 1], [0, 1], [1, 0]])
    scores_TK = torch.tensor([[0.5, 0.3], [0.7, 0.3], [0.3, 0.5]])
    # Expert 0: 0.7 (token 1), then 0.5 twice: token 0's first choice before token 2's second. Expert 1: 0.3 three
    # times: token 2's first choice, then the second choices of tokens 0 and 1.
    assert place_in_expert(expert_ids_TK, 2, scores_TK).tolist() == [[1, 1], [0, 2], [0, 2]]


@NAIVE
@given(cases(), st.booleans())
def test_places_equal_a_literal_queue(case: Case, by_score: bool) -> None:
    expert_ids, scores, num_choices, num_experts = case
    expert_ids_TK = torch.tensor(expert_ids, dtype=torch.int64).view(-1, num_choices)
    scores_TK = torch.tensor(scores, dtype=torch.float64).view(-1, num_choices) if by_score else None
    places = place_in_expert(expert_ids_TK, num_experts, scores_TK)
    assert places.dtype == torch.int64
    assert places.tolist() == queue_places(expert_ids, num_choices, scores if by_score else None)


@NAIVE
@given(cases(), st.sampled_from(["position", "probability"]), st.sampled_from([0.25, 0.5, 0.9, 1.0, 3.0]))
def test_drops_equal_a_literal_queue(case: Case, drop: str, capacity_factor: float) -> None:
    expert_ids, scores, num_choices, num_experts = case
    plan = make_plan(expert_ids, scores, num_choices, num_experts)
    limited = limit_by_factor(factor(capacity_factor, drop=drop), plan, training=True)
    capacity = expert_capacity(capacity_factor, 0, len(expert_ids), num_choices, num_experts)
    places = queue_places(expert_ids, num_choices, scores if drop == "probability" else None)
    assert limited.kept_TK.tolist() == [[place < capacity for place in row] for row in places]


def test_64_equal_choices_with_capacity_8_keep_the_first_8() -> None:
    """Trap 13: a top-k over the 0/1 mask of an expert kept 41..47."""
    plan = make_plan([[0]] * 64, [[0.5]] * 64)
    for drop in ("position", "probability"):
        mask = kept(factor(0.25, drop=drop), plan)
        assert [t for t, row in enumerate(mask) if row[0]] == list(range(8)), drop


def test_drop_by_probability_ranks_by_score_and_not_by_logit() -> None:
    """Trap 15. The logits of make_plan are in the opposite order; 0.001 experts a token were left elsewhere."""
    plan = make_plan([[0]] * 4, [[0.2], [0.4], [0.1], [0.3]])
    assert kept(factor(1.0, drop="probability"), plan) == [[False], [True], [False], [True]]
    assert kept(factor(1.0, drop="position"), plan) == [[True], [True], [False], [False]]


@pytest.mark.parametrize("drop", ["position", "probability"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_capacity_larger_than_the_token_count(drop: str, num_tokens: int) -> None:
    """Trap 14: C = 100 for 1 or 3 tokens crashes elsewhere; here nothing is dropped."""
    plan = make_plan([[0, 1]] * num_tokens, [[0.6, 0.4]] * num_tokens, num_choices=2)
    assert kept(factor(1.0, minimum=100, drop=drop), plan) == [[True, True]] * num_tokens


@pytest.mark.parametrize("drop", ["position", "probability"])
def test_no_tokens(drop: str) -> None:
    nothing = make_plan([], [], num_choices=2, num_experts=4)
    limited = limit_by_factor(factor(1.0, drop=drop), nothing, training=True)
    assert limited.kept_TK.shape == (0, 2)
    assert limited.reason_TK.dtype == torch.uint8


def test_training_and_evaluation_have_their_own_factor() -> None:
    plan = make_plan([[0]] * 4, [[0.9]] * 4)
    config = factor(0.5, eval=1.5)
    assert limit_by_factor(config, plan, training=True).kept_TK.sum() == 1
    assert limit_by_factor(config, plan, training=False).kept_TK.sum() == 3


def test_dropless_keeps_the_plan() -> None:
    plan = make_plan([[0]] * 9, [[0.9]] * 9)
    assert POLICIES["dropless"](DroplessConfig(), plan, training=True) is plan


def test_drops_are_marked_and_change_nothing_else() -> None:
    plan = make_plan([[0, 1]] * 3, [[0.7, 0.3]] * 3, num_choices=2)
    limited = limit_by_factor(factor(0.5), plan, training=True)
    assert limited.reason_TK.tolist() == [[Reason.KEPT] * 2, [Reason.KEPT] * 2, [Reason.DROPPED_CAPACITY] * 2]
    assert limited.weights_TK is plan.weights_TK  # not renormalised after dropping (trap 18)
    assert limited.expert_ids_TK is plan.expert_ids_TK
    assert plan.kept_TK.all()  # the plan that came in is as it was


@NAIVE
@given(cases(), st.sampled_from([0.25, 0.5, 1.0]))
def test_the_ledger_counts_each_choice_once(case: Case, capacity_factor: float) -> None:
    """Trap 15: drops are seen. routed = kept + dropped for each expert, and no expert keeps more than C."""
    expert_ids, scores, num_choices, num_experts = case
    plan = make_plan(expert_ids, scores, num_choices, num_experts)
    stats = count_choices(limit_by_factor(factor(capacity_factor), plan, training=True), RowCounts(), losses={})

    capacity = expert_capacity(capacity_factor, 0, len(expert_ids), num_choices, num_experts)
    routed = [sum(row.count(expert) for row in expert_ids) for expert in range(num_experts)]
    assert stats.routed_E.tolist() == routed
    assert stats.kept_E.tolist() == [min(count, capacity) for count in routed]
    assert stats.dropped_capacity_E.tolist() == [max(count - capacity, 0) for count in routed]
    assert not stats.rerouted_E.any()
    assert not stats.dropped_receive_bound_E.any()
