"""Capacity and drops: the numbers of C by hand, who keeps a place against a literal queue in Python, weights after
drops, padding to static shapes, and the bound on what a rank receives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_parallel.moe.capacity import receive_bound
from expert_parallel.moe.capacity.policies import (
    POLICIES,
    AbsoluteConfig,
    DroplessConfig,
    FactorConfig,
    apply_capacity,
    block_capacities,
    expert_capacity,
    queue_capacities,
)
from expert_parallel.moe.capacity.receive_bound import apply_receive_bound, send_quotas
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.conservation import count_choices
from expert_parallel.moe.context import StepContext, TokenBatch, pass_seed, token_batch
from expert_parallel.moe.experts.grouped_gemm import GROUPED_GEMMS
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.types import Outcome, RoutingPlan
from expert_parallel.nn import random
from expert_parallel.nn.random import Stream

NAIVE = settings(max_examples=60, deadline=None, derandomize=True)
PRIORITIES = ["position", "probability", "batch_priority", "random"]
CapacityConfig = FactorConfig | AbsoluteConfig


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
        outcome_TK=torch.full_like(expert_ids_TK, Outcome.KEPT, dtype=torch.uint8),
        num_experts=num_experts,
    )


def batch_of(num_sequences: int, length: int, context: StepContext = StepContext()) -> TokenBatch:  # noqa: B008
    return token_batch(torch.empty(num_sequences, length, 1), context, None)


def factor(train: float, **options: object) -> FactorConfig:
    return FactorConfig(kind="factor", **{"train": train, "minimum": 0, **options})


def absolute(train: int, **options: object) -> AbsoluteConfig:
    return AbsoluteConfig(kind="absolute", **{"train": train, "eval": train, **options})


def kept(config: CapacityConfig, plan: RoutingPlan, training: bool = True, **context: Any) -> list[list[bool]]:
    batch = batch_of(1, len(plan.expert_ids_TK), StepContext(**context))
    limited, _ = apply_capacity(config, plan, batch, training)
    return limited.kept_TK.tolist()


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
    """Of a number, and of several blocks."""
    assert expert_capacity(capacity_factor, 0, num_tokens, num_choices, num_experts) == capacity
    config, sizes = factor(capacity_factor, minimum=0), [num_tokens, 0, num_tokens]
    assert block_capacities(config, sizes, num_choices, num_experts, training=True) == [capacity, 0, capacity]


def test_the_minimum_holds_where_the_factor_gives_less() -> None:
    for num_tokens, capacity in ((8, 4), (64, 8), (0, 4)):
        assert expert_capacity(1.0, 4, num_tokens, num_choices=1, num_experts=8) == capacity
    assert block_capacities(factor(1.0, minimum=4), [8, 64, 0], 1, 8, training=True) == [4, 8, 4]


@NAIVE
@given(st.integers(1, 400), st.lists(st.integers(0, 300), max_size=4), st.integers(1, 8), st.integers(1, 64))
def test_expert_capacity_is_exact(percent: int, sizes: list[int], num_choices: int, num_experts: int) -> None:
    """Factors are written with two decimals, so C is a ceiling of whole numbers."""
    expected = [-(-percent * num_tokens * num_choices // (100 * num_experts)) for num_tokens in sizes]
    assert [expert_capacity(percent / 100, 0, size, num_choices, num_experts) for size in sizes] == expected


@pytest.mark.parametrize("factor", [4 / 3, 0.1 + 0.2, 1.0000000000000002, 1e-20, 1e6])
def test_factors_of_many_digits_do_not_overflow(factor: float) -> None:
    """As a fraction 1.3333333333333333 has 17 digits, and times 65536 tokens more than 63 bits."""
    expected = math.ceil(Fraction(str(factor)) * 65536 * 2 / 8)
    assert abs(expected - factor * 65536 * 2 / 8) <= 1
    assert expert_capacity(factor, 0, 65536, 2, 8) == expected


def test_a_receive_bound_of_many_digits_does_not_overflow() -> None:
    """Each of 2 ranks wants 12288 and 4096: 32768 in all, 16384 a rank; 4/3 of it is 21845.33, of 24576 wanted."""
    allowed = send_quotas(torch.tensor([[12288, 4096]] * 2), 4 / 3)
    assert allowed.tolist() == [[10923, 4096], [10923, 4096]]


def test_absolute_capacity_does_not_ask_for_the_number_of_tokens() -> None:
    config, sizes = absolute(3, eval=5), [1, 64, 0]
    assert block_capacities(config, sizes, 2, 4, training=True) == [3, 3, 3]
    assert block_capacities(config, sizes, 2, 4, training=False) == [5, 5, 5]


@pytest.mark.parametrize("capacities", [[], [4], [4, 4, 4], [1, 0, 5]])
def test_each_queue_has_its_blocks_capacity_and_the_last_none(capacities: list[int]) -> None:
    found = queue_capacities(capacities, 3, torch.device("cpu"))
    assert found.dtype == torch.int64
    assert found.tolist() == [capacity for capacity in capacities for _ in range(3)] + [0]


@pytest.mark.parametrize(
    "wrong", [{"train": 0.0}, {"eval": -1.0}, {"minimum": -1}, {"priority": "score"}, {"drop": "position"}]
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        factor(**{"train": 1.0, **wrong})


@pytest.mark.parametrize("wrong", [{"train": 0}, {"eval": 0}, {"train": 1.5}, {"minimum": 1}])
def test_absolute_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        absolute(**{"train": 1, **wrong})


# ---------------------------------------------------------------------------------------------------------------------
# The queue, walked choice by choice


@dataclass(frozen=True)
class Case:
    """By token and choice: expert, score, whether it was routed. num_sequences sequences of `length` tokens."""

    ids: list[list[int]]
    scores: list[list[float]]
    routed: list[list[bool]]
    real: list[bool]
    num_sequences: int
    length: int
    num_choices: int
    num_experts: int

    @property
    def plan(self) -> RoutingPlan:
        plan = make_plan(self.ids, self.scores, self.num_choices, self.num_experts)
        not_routed_TK = ~torch.tensor(self.routed, dtype=torch.bool).view(-1, self.num_choices)
        return replace(plan, outcome_TK=plan.outcome_TK.masked_fill(not_routed_TK, Outcome.NOT_ROUTED))

    @property
    def context(self) -> StepContext:
        mask_BS = torch.tensor(self.real, dtype=torch.bool).view(self.num_sequences, self.length)
        return StepContext(seed=3, step=1, sequence_index_B=torch.arange(self.num_sequences) + 7, mask_BS=mask_BS)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few distinct scores, so that many tie; some padding, and some choices that were never routed."""
    num_experts = draw(st.integers(1, 4))
    num_choices = draw(st.integers(1, min(num_experts, 3)))
    num_sequences, length = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    ids, scores, routed, real = [], [], [], []
    for _ in range(num_sequences * length):
        ids.append(list(draw(st.permutations(range(num_experts)))[:num_choices]))
        scores.append([draw(st.sampled_from([0.0, 0.25, 0.5])) for _ in range(num_choices)])
        real.append(draw(st.sampled_from([True, True, True, False])))
        routed.append([real[-1] and draw(st.sampled_from([True, True, True, False])) for _ in range(num_choices)])
    return Case(ids, scores, routed, real, num_sequences, length, num_choices, num_experts)


def configs() -> st.SearchStrategy[CapacityConfig]:
    options = {
        "scope": st.sampled_from(["rank", "sequence"]),
        "priority": st.sampled_from(PRIORITIES),
        "first_choices_first": st.booleans(),
    }
    minimum, factors = st.sampled_from([0, 1]), st.sampled_from([0.25, 0.5, 0.9, 3.0])
    by_factor = st.builds(FactorConfig, kind=st.just("factor"), train=factors, minimum=minimum, **options)
    places = st.sampled_from([1, 2])
    return by_factor | st.builds(AbsoluteConfig, kind=st.just("absolute"), train=places, eval=places, **options)


def walk(config: CapacityConfig, case: Case, training: bool) -> list[list[int]]:
    """Reasons. The choices line up, and each takes a place at its expert while its block has one left there."""
    factor_, reasons = config.train if training else config.eval, []
    lots = random.uniform(pass_seed(case.context, Stream.PRIORITY), batch_of_case(case).index_T, 1)[:, 0]
    line = []
    for t, row in enumerate(case.ids):
        reasons.append([Outcome.KEPT if was_routed else Outcome.NOT_ROUTED for was_routed in case.routed[t]])
        rank_of_token = {"random": float(lots[t]) if training else 0.0, "batch_priority": -max(case.scores[t])}
        for k in range(len(row)):
            place = (rank_of_token.get(config.priority, 0.0), t)
            key: tuple[Any, ...] = (k, *place) if config.first_choices_first else (*place, k)
            key = (-case.scores[t][k], *key) if config.priority == "probability" else key
            line.append((key, t, k))
    taken: dict[tuple[int, int], int] = {}
    for _, t, k in sorted(line):
        block = t // case.length if config.scope == "sequence" else 0
        first, last = (block * case.length, (block + 1) * case.length) if config.scope == "sequence" else (0, None)
        size = sum(case.real[first:last])
        if isinstance(config, AbsoluteConfig):
            capacity = int(factor_)
        else:
            exact = Fraction(str(factor_)) * size * case.num_choices / case.num_experts
            capacity = max(config.minimum, -(-exact.numerator // exact.denominator))
        if case.routed[t][k]:
            queue = (block, case.ids[t][k])
            taken[queue] = taken.get(queue, 0) + 1
            if taken[queue] > capacity:
                reasons[t][k] = Outcome.DROPPED_CAPACITY
    return reasons


def batch_of_case(case: Case) -> TokenBatch:
    return batch_of(case.num_sequences, case.length, case.context)


@pytest.mark.parametrize("priority", PRIORITIES)
@settings(NAIVE, max_examples=50)
@given(cases(), configs(), st.booleans())
def test_drops_equal_a_queue_that_is_walked(priority: str, case: Case, config: CapacityConfig, training: bool) -> None:
    config = config.model_copy(update={"priority": priority})
    limited, most = apply_capacity(config, case.plan, batch_of_case(case), training)
    assert limited.outcome_TK.tolist() == walk(config, case, training)
    assert limited.expert_ids_TK.tolist() == case.plan.expert_ids_TK.tolist()
    assert isinstance(most, int)


@NAIVE
@given(cases(), configs())
def test_the_ledger_counts_each_choice_once(case: Case, config: CapacityConfig) -> None:
    """Trap 15: drops are seen. routed = kept + dropped for each expert; what was not routed is nowhere; no expert keeps
    more than `apply_capacity` says that it takes at most."""
    batch, plan = batch_of_case(case), case.plan
    limited, most = apply_capacity(config, plan, batch, training=True)
    counts = count_choices(plan, limited, batch.real_T)

    routed = [0] * case.num_experts
    for row, was_routed in zip(case.ids, case.routed, strict=True):
        for expert, is_counted in zip(row, was_routed, strict=True):
            routed[expert] += is_counted
    assert counts["routed_E"].tolist() == routed
    assert (counts["kept_E"] + counts["dropped_capacity_E"]).tolist() == routed
    assert bool((counts["kept_E"] <= most).all())
    assert not counts["rerouted_E"].any()
    assert not counts["dropped_receive_bound_E"].any()
    assert int(counts["num_tokens"]) == sum(case.real)
    nobody = [real and not any(row) for real, row in zip(case.real, limited.kept_TK.tolist(), strict=True)]
    assert int(counts["num_tokens_without_expert"]) == sum(nobody)


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def test_first_choices_stand_before_second_choices_unless_tokens_go_one_by_one() -> None:
    """Expert 0 has 2 places for token 0 (second choice), token 1 (first), token 2 (first)."""
    plan = make_plan([[1, 0], [0, 1], [0, 2]], [[0.5, 0.4]] * 3, num_choices=2, num_experts=3)
    assert kept(absolute(2), plan) == [[True, False], [True, True], [True, True]]
    assert kept(absolute(2, first_choices_first=False), plan) == [[True, True], [True, True], [False, True]]


def test_each_priority_keeps_other_choices() -> None:
    """Expert 0, 2 places. Scores of (first, second) choices: tokens (0.5, 0.1), (0.4, 0.35), (0.6, 0.3).

    All first choices are expert 0's in tokens 0 and 1; token 2's is its second choice. Position: first choices 0 and 1.
    Probability: 0.5 and 0.4. Batch priority, token by token: token 2 (0.6) and token 0 (0.5).
    """
    plan = make_plan([[0, 1], [0, 1], [1, 0]], [[0.5, 0.1], [0.4, 0.35], [0.6, 0.3]], num_choices=2)

    def at_expert_0(**options: object) -> list[bool]:
        mask = kept(absolute(2, **options), plan)
        return [mask[0][0], mask[1][0], mask[2][1]]

    assert at_expert_0(priority="position") == [True, True, False]
    assert at_expert_0(priority="probability") == [True, True, False]
    assert at_expert_0(priority="batch_priority", first_choices_first=False) == [True, False, True]
    assert at_expert_0(priority="batch_priority") == [True, True, False]  # first choices still come first


def test_with_probability_the_order_of_choices_only_breaks_ties() -> None:
    """A second choice of 0.4 goes before a first one of 0.3; equals of 0.4 go first choice first."""
    plan = make_plan([[1, 0], [0, 1]], [[0.5, 0.4], [0.3, 0.1]], num_choices=2)
    assert kept(absolute(1, priority="probability"), plan)[0][1]
    tied = make_plan([[1, 0], [0, 1]], [[0.5, 0.4], [0.4, 0.1]], num_choices=2)
    assert kept(absolute(1, priority="probability"), tied) == [[True, False], [True, False]]
    by_token = absolute(1, priority="probability", first_choices_first=False)
    assert kept(by_token, tied) == [[True, True], [False, False]]


def test_each_sequence_has_a_capacity_of_its_own() -> None:
    """Two sequences of 4 tokens, all to expert 0, factor 0.5 and 2 experts: C = 1 for each, 2 for both together."""
    plan = make_plan([[0]] * 8, [[0.5]] * 8)
    limited, most = apply_capacity(factor(0.5, scope="sequence"), plan, batch_of(2, 4), training=True)
    assert limited.kept_TK.flatten().nonzero().flatten().tolist() == [0, 4]
    assert int(most) == 2
    limited, most = apply_capacity(factor(0.5, scope="rank"), plan, batch_of(2, 4), training=True)
    assert limited.kept_TK.flatten().nonzero().flatten().tolist() == [0, 1]
    assert int(most) == 2


def test_64_equal_choices_with_capacity_8_keep_the_first_8() -> None:
    """Trap 13: a top-k over the 0/1 mask of an expert kept 41..47."""
    plan = make_plan([[0]] * 64, [[0.5]] * 64)
    for priority in ("position", "probability", "batch_priority"):
        mask = kept(factor(0.25, priority=priority), plan)
        assert [t for t, row in enumerate(mask) if row[0]] == list(range(8)), priority
    assert sum(row[0] for row in kept(factor(0.25, priority="random"), plan)) == 8


def test_priority_by_probability_ranks_by_score_and_not_by_logit() -> None:
    """Trap 15. The logits of make_plan are in the opposite order; 0.001 experts a token were left elsewhere."""
    plan = make_plan([[0]] * 4, [[0.2], [0.4], [0.1], [0.3]])
    for priority in ("probability", "batch_priority"):
        assert kept(factor(1.0, priority=priority), plan) == [[False], [True], [False], [True]]
    assert kept(factor(1.0, priority="position"), plan) == [[True], [True], [False], [False]]


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_capacity_larger_than_the_token_count(priority: str, num_tokens: int) -> None:
    """Trap 14: C = 100 for 1 or 3 tokens crashes elsewhere; here nothing is dropped."""
    plan = make_plan([[0, 1]] * num_tokens, [[0.6, 0.4]] * num_tokens, num_choices=2)
    for config in (factor(1.0, minimum=100, priority=priority), absolute(100, priority=priority)):
        assert kept(config, plan) == [[True, True]] * num_tokens


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("scope", ["rank", "sequence"])
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (1, 0), (2, 0)])
def test_no_tokens(priority: str, scope: str, shape: tuple[int, int]) -> None:
    nothing = make_plan([], [], num_choices=2, num_experts=4)
    limited, most = apply_capacity(
        factor(1.0, priority=priority, scope=scope), nothing, batch_of(*shape), training=True
    )
    assert limited.kept_TK.shape == (0, 2)
    assert limited.outcome_TK.dtype == torch.uint8
    assert int(most) == 0


def test_training_and_evaluation_have_their_own_factor() -> None:
    plan = make_plan([[0]] * 4, [[0.9]] * 4)
    for config in (factor(0.5, eval=1.5), absolute(1, eval=3)):
        assert [sum(row[0] for row in kept(config, plan, training)) for training in (True, False)] == [1, 3]


def test_dropless_keeps_the_plan() -> None:
    plan = make_plan([[0]] * 9, [[0.9]] * 9)
    limited, most = POLICIES["dropless"](DroplessConfig(), plan, batch_of(1, 9), True)
    assert limited is plan
    assert most is None


def test_drops_are_marked_and_change_nothing_else() -> None:
    plan = make_plan([[0, 1]] * 3, [[0.7, 0.3]] * 3, num_choices=2)
    limited, _ = apply_capacity(factor(0.5), plan, batch_of(1, 3), training=True)
    assert limited.outcome_TK.tolist() == [[Outcome.KEPT] * 2, [Outcome.KEPT] * 2, [Outcome.DROPPED_CAPACITY] * 2]
    assert limited.weights_TK is plan.weights_TK  # the layer renormalises, where it is asked to (trap 18)
    assert torch.equal(limited.expert_ids_TK, plan.expert_ids_TK)
    assert plan.kept_TK.all()  # the plan that came in is as it was


def test_what_is_not_routed_takes_no_place() -> None:
    """Two places at expert 0. Tokens 0 and 2 did not take it: 1 and 3 have them, 4 is dropped."""
    plan = make_plan([[0]] * 5, [[0.5]] * 5)
    not_routed_TK = torch.tensor([[True], [False], [True], [False], [False]])
    plan = replace(plan, outcome_TK=plan.outcome_TK.masked_fill(not_routed_TK, Outcome.NOT_ROUTED))
    limited, _ = apply_capacity(absolute(2), plan, batch_of(1, 5), training=True)
    unrouted, dropped = int(Outcome.NOT_ROUTED), int(Outcome.DROPPED_CAPACITY)
    assert limited.outcome_TK.flatten().tolist() == [unrouted, 0, unrouted, 0, dropped]


def test_padding_does_not_raise_the_capacity() -> None:
    """4 of 8 tokens are real: with factor 1 and 2 experts C is 2, not 4."""
    plan = make_plan([[0]] * 8, [[0.5]] * 8)
    mask_BS = torch.tensor([[False, True] * 4])
    plan = replace(plan, outcome_TK=plan.outcome_TK.masked_fill(~mask_BS.view(8, 1), Outcome.NOT_ROUTED))
    limited, _ = apply_capacity(factor(1.0), plan, batch_of(1, 8, StepContext(mask_BS=mask_BS)), training=True)
    assert limited.kept_TK.flatten().nonzero().flatten().tolist() == [1, 3]


# ---------------------------------------------------------------------------------------------------------------------
# By lot


def test_lots_fall_evenly_over_the_tokens() -> None:
    """8 tokens for 4 places, 400 steps: each keeps 200 of them, give or take 10 (one sigma); keys, so no chance."""
    plan = make_plan([[0]] * 8, [[0.5]] * 8)
    config = absolute(4, priority="random")
    times = torch.zeros(8, dtype=torch.int64)
    for step in range(400):
        mask = kept(config, plan, step=step)
        assert sum(row[0] for row in mask) == 4
        times += torch.tensor(mask)[:, 0]
    assert int(times.min()) > 160
    assert int(times.max()) < 240


def test_a_lot_is_a_function_of_the_pass_and_of_the_token() -> None:
    plan, config = make_plan([[0]] * 32, [[0.5]] * 32), absolute(16, priority="random")
    first = kept(config, plan, seed=1)
    assert kept(config, plan, seed=1) == first
    assert kept(config, plan, seed=1, coordinate=5) == first  # the same on every rank
    for name in ("seed", "step", "micro_step", "layer"):
        assert kept(config, plan, **{"seed": 1, name: 2}) != first, name
    assert kept(config, plan, seed=1, sequence_index_B=torch.tensor([9])) != first


def test_a_token_has_one_lot_for_all_its_choices() -> None:
    """Two experts with 16 places each for 32 tokens that choose both: who has one has both."""
    plan = make_plan([[0, 1]] * 32, [[0.6, 0.4]] * 32, num_choices=2)
    mask = kept(absolute(16, priority="random"), plan)
    assert all(first == second for first, second in mask)
    assert sum(first for first, _ in mask) == 16


def test_no_lots_are_drawn_in_evaluation() -> None:
    plan, config = make_plan([[0]] * 32, [[0.5]] * 32), absolute(5, priority="random")
    assert kept(config, plan, training=False) == kept(absolute(5), plan)
    assert kept(config, plan, training=True) != kept(absolute(5), plan)


# ---------------------------------------------------------------------------------------------------------------------
# In the layer: a layer whose outputs are the weights


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighing_layer(num_experts: int = 3, **settings_: Any) -> MoELayer:
    """Reads log probabilities: expert e's logit is x_e. Each expert puts out 1 at its own place, so that y_e is the
    weight of expert e."""
    tree = {
        "d_model": num_experts,
        "num_experts": num_experts,
        "router": {"k": 2},
        "experts": {"hidden": 1, "activation": "relu", "bias": True},
        **settings_,
    }
    layer = MoELayer(MoEConfig.model_validate(tree)).double()
    for parameter in layer.experts.parameters():
        parameter.data.zero_()
    layer.router.weight.data = torch.eye(num_experts, dtype=torch.float64)
    assert layer.experts.b_out is not None
    layer.experts.b_out.data = torch.eye(num_experts, dtype=torch.float64)
    return layer


PROBABILITIES = torch.tensor(
    [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.5, 0.1, 0.4], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]], dtype=torch.float64
)


def test_renormalised_weights_by_hand() -> None:
    """Two places an expert, first choices first, as DeepSpeed's top-2 gate divides by what was kept.

    First choices 0, 0, 0, 1, 0: tokens 0 and 1 take expert 0's places, tokens 2 and 4 find none. Second choices 1, 1,
    2, 2, 1: token 3 holds a place of expert 1, token 0 takes the other, 1 and 4 find none; 2 and 3 have expert 2.
    Token 0: 0.6 and 0.3 -> 2/3 and 1/3. Token 1: expert 0 alone -> 1. Token 2: expert 2 alone -> 1. Token 3: 0.5 and
    0.3 -> 5/8 and 3/8. Token 4: nothing, so its residual alone.
    """
    capacity = {"kind": "absolute", "train": 2, "eval": 2, "renormalise": True}
    x_TD = PROBABILITIES.log().requires_grad_()
    output = weighing_layer(capacity=capacity)(x_TD)
    expected = [[2 / 3, 1 / 3, 0], [1, 0, 0], [0, 0, 1], [0, 5 / 8, 3 / 8], [0, 0, 0]]
    torch.testing.assert_close(output.y, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    assert int(output.stats.num_tokens_without_expert) == 1

    (output.y * torch.arange(3)).sum().backward()
    assert x_TD.grad is not None
    assert bool(x_TD.grad.isfinite().all())
    assert bool((x_TD.grad[[0, 3]] != 0).any(1).all())
    # A weight of 1, alone or of nothing kept, hangs on no logit.
    torch.testing.assert_close(x_TD.grad[[1, 2, 4]], torch.zeros(3, 3, dtype=torch.float64), rtol=0, atol=1e-15)


def test_a_router_weighs_nothing_where_nothing_counts() -> None:
    """The choices that do not count weigh 0, and no gradient is NaN on its way, also where a token has none that do."""
    router = weighing_layer().router
    x_TD = PROBABILITIES[:3].log().requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        plan = router(x_TD, batch_of(1, 3))
        counted_TK = torch.tensor([[True, True], [False, True], [False, False]])
        weights_TK = router.weights(plan, plan.expert_ids_TK, counted_TK)
        weights_TK.square().sum().backward()
    expected = torch.tensor([[2 / 3, 1 / 3], [0, 1], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(weights_TK, expected, rtol=1e-12, atol=0)


def test_without_renormalising_weights_stay_as_they_were() -> None:
    """The same drops; each weight is its share of its token's two: 0.5 / 0.9 and 0.4 / 0.9 in tokens 1 and 2."""
    layer = weighing_layer(capacity={"kind": "absolute", "train": 2, "eval": 2})
    expected = [[2 / 3, 1 / 3, 0], [5 / 9, 0, 0], [0, 0, 4 / 9], [0, 5 / 8, 3 / 8], [0, 0, 0]]
    actual = layer(PROBABILITIES.log()).y
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("level", [0.0, -200.0, 200.0])
@pytest.mark.parametrize("capacity_factor", [0.1, 0.25])
def test_renormalised_weights_sum_to_the_scale_or_to_nothing(score: str, level: float, capacity_factor: float) -> None:
    """Also where the scores round to 0 or to 1 (logits near 200 and -200), in float32; gradients stay finite."""
    router = {"k": 3, "score": score, "scale": 2.5}
    capacity = {"kind": "factor", "train": capacity_factor, "minimum": 0, "renormalise": True}
    layer = weighing_layer(6, router=router, capacity=capacity).float()
    x_TD = (draw(24, 6).float() * 2 + level).requires_grad_()
    output = layer(x_TD)
    total_T, kept_T = output.y.detach().sum(1), (output.y.detach() != 0).any(1)
    assert 0 < int(output.stats.num_tokens_without_expert) == int((~kept_T).sum())
    torch.testing.assert_close(total_T, 2.5 * kept_T.float(), rtol=1e-5, atol=1e-5)
    output.y.square().sum().backward()
    assert x_TD.grad is not None
    assert bool(x_TD.grad.isfinite().all())


def test_a_rerouted_choice_has_its_new_experts_weight() -> None:
    """One place an expert: token 0 fills experts 0 and 1, which token 1 chose too. Its first choice finds expert 2
    (0.2), its second expert 3 (0.1): weights 0.2 / 0.3 and 0.1 / 0.3."""
    probabilities = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    capacity = {"kind": "absolute", "train": 1, "eval": 1, "overflow": "reroute"}
    expected = torch.tensor([[5 / 8, 3 / 8, 0, 0], [0, 0, 2 / 3, 1 / 3]], dtype=torch.float64)
    for renormalise in (False, True):
        output = weighing_layer(4, capacity={**capacity, "renormalise": renormalise})(probabilities.log())
        torch.testing.assert_close(output.y, expected, rtol=1e-12, atol=1e-15)
        assert output.stats.rerouted_E.tolist() == [0, 0, 1, 1]
        assert output.stats.kept_E.tolist() == [1, 1, 0, 0]
        assert output.stats.routed_E.tolist() == [2, 2, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Padding of sequences


def random_layer(capacity: dict[str, Any], activation: str = "swiglu", backend: str = "loop") -> MoELayer:
    tree = {
        "d_model": 8,
        "num_experts": 4,
        "router": {"k": 2},
        "capacity": capacity,
        "losses": [{"kind": "balance", "scope": "sequence"}, {"kind": "z_loss"}],
        "experts": {"hidden": 16, "activation": activation, "bias": True, "backend": backend},
    }
    layer = MoELayer(MoEConfig.model_validate(tree)).double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed + 10) * 0.5
    return layer


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("scope", ["rank", "sequence"])
def test_masked_tokens_are_as_good_as_not_there(scope: str, priority: str) -> None:
    """Two sequences of 5, the last 2 of the second padding: outputs and the input's gradient are those of the second
    cut to length (scope `sequence`), or of one sequence of all 8 tokens (`rank`)."""
    capacity = {"kind": "factor", "train": 0.7, "minimum": 0, "scope": scope, "priority": priority}
    layer, x_BSD = random_layer(capacity), draw(2, 5, 8)
    mask_BS = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    context = StepContext(seed=4, mask_BS=mask_BS)

    padded = x_BSD.clone().requires_grad_()
    output = layer(padded, context)
    output.y.square().sum().backward()
    assert padded.grad is not None
    assert not output.y[~mask_BS].any()
    assert not padded.grad[~mask_BS].any()
    other = x_BSD.masked_fill(~mask_BS[..., None], 99.0)
    assert torch.equal(layer(other, context).y, output.y)
    assert float(output.stats.dropped_capacity_E.sum()) > 0
    assert int(output.stats.num_tokens) == 8
    assert int(output.stats.routed_E.sum()) == 16

    if scope == "sequence":
        cut = x_BSD[1:, :3].clone().requires_grad_()
        expected = layer(cut, StepContext(seed=4, sequence_index_B=torch.tensor([1])))
        actual_y, actual_grad = output.y[1:, :3], padded.grad[1:, :3]
    elif priority == "random":
        return  # in one sequence the tokens would have other lots: proven with the queue above
    else:
        cut = x_BSD[mask_BS][None].clone().requires_grad_()
        expected = layer(cut, StepContext(seed=4))
        actual_y, actual_grad = output.y[mask_BS][None], padded.grad[mask_BS][None]
    expected.y.square().sum().backward()
    torch.testing.assert_close(actual_y, expected.y, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(actual_grad, cut.grad, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# Padding of experts


PADDED = {
    "drops": {"kind": "factor", "train": 0.6, "minimum": 0},
    "room to spare": {"kind": "factor", "train": 3.0},
    "by sequence": {"kind": "factor", "train": 0.8, "minimum": 0, "scope": "sequence"},
    "rerouted": {"kind": "absolute", "train": 5, "eval": 5, "overflow": "reroute"},
}


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu", "geglu"])
@pytest.mark.parametrize("capacity", PADDED.values(), ids=PADDED)
def test_padded_experts_compute_the_same(capacity: dict[str, Any], activation: str) -> None:
    """Outputs and every gradient. With a bias an empty row is not zero behind the expert: it must come from nowhere."""
    results = []
    for pad in (False, True):
        layer, x_BSD = random_layer({**capacity, "pad": pad}, activation), draw(2, 5, 8).requires_grad_()
        output = layer(x_BSD, StepContext())
        (output.y.square().sum() + sum(output.losses.values())).backward()
        tensors = [output.y, x_BSD.grad, *(parameter.grad for parameter in layer.parameters())]
        assert all(tensor is not None for tensor in tensors)
        results.append((tensors, output.stats))
    for actual, expected in zip(results[1][0], results[0][0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(results[1][1].computed_E, results[0][1].computed_E), "empty rows are no work done"


@pytest.mark.parametrize(
    ("capacity", "rows"),
    [
        ({"kind": "factor", "train": 0.6, "minimum": 0}, 3),  # ceil(0.6 * 10 * 2 / 4)
        ({"kind": "factor", "train": 1.0, "minimum": 7}, 7),
        ({"kind": "factor", "train": 1.0, "minimum": 0, "scope": "sequence"}, 6),  # 2 * ceil(1.0 * 5 * 2 / 4)
        ({"kind": "absolute", "train": 4, "eval": 4}, 4),
        ({"kind": "absolute", "train": 4, "eval": 4, "scope": "sequence"}, 8),
    ],
)
def test_a_padded_expert_sees_static_shapes(
    capacity: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the data: 4 experts of `rows` rows each, in both products."""
    seen = []

    def record(x_RK: Tensor, weight_eKN: Tensor, sizes: list[int]) -> Tensor:
        seen.append((len(x_RK), sizes))
        return plain.rows(x_RK, weight_eKN, sizes)

    plain = GROUPED_GEMMS["loop"]
    monkeypatch.setitem(GROUPED_GEMMS, "loop", replace(plain, rows=record))
    layer = random_layer({**capacity, "pad": True})
    loads = [layer(draw(2, 5, 8, seed=seed)).stats.computed_E.tolist() for seed in range(4)]
    assert seen == [(4 * rows, [rows] * 4)] * 8
    assert len(set(map(tuple, loads))) > 1, "the data differ"


# ---------------------------------------------------------------------------------------------------------------------
# The bound on what a rank receives


@NAIVE
@given(st.data(), st.integers(1, 4), st.sampled_from([1.0, 1.1, 1.25, 2.0, 3.7]))
def test_allowances(data: st.DataObject, num_ranks: int, bound: float) -> None:
    """No rank is sent more than ceil(bound * N / P), nor more than is wanted; what fits is sent whole; what does not
    fit is cut to the bound exactly, each source's share within one of its part."""
    row = st.lists(st.integers(0, 12), min_size=num_ranks, max_size=num_ranks)
    wanted = data.draw(st.lists(row, min_size=num_ranks, max_size=num_ranks))
    allowed = send_quotas(torch.tensor(wanted), bound).tolist()
    most = -(-Fraction(str(bound)) * sum(map(sum, wanted)) // num_ranks)
    for rank in range(num_ranks):
        asked, given_ = [row[rank] for row in wanted], [row[rank] for row in allowed]
        assert sum(given_) == min(sum(asked), most)
        assert all(0 <= few <= many for few, many in zip(given_, asked, strict=True))
        if sum(asked) <= most:
            assert given_ == asked
        else:
            shares = [most * count // sum(asked) for count in asked]
            assert all(few - share in (0, 1) for few, share in zip(given_, shares, strict=True))


def test_allowances_by_hand() -> None:
    """20 choices, 2 ranks, bound 1: 10 a rank. Rank 0 is wanted by 9 + 5: 10 * 9 // 14 = 6 and 10 * 5 // 14 = 3, and
    the one left over goes to the first source. Rank 1 is wanted by 1 + 5: all fit."""
    assert send_quotas(torch.tensor([[9, 1], [5, 5]]), 1.0).tolist() == [[7, 1], [3, 5]]
    assert send_quotas(torch.tensor([[9, 1], [5, 5]]), 1.25).tolist() == [[9, 1], [4, 5]]  # 12 of 14
    assert send_quotas(torch.tensor([[9, 1], [5, 5]]), 1.4).tolist() == [[9, 1], [5, 5]]
    # A source that wants nothing is given nothing of what is left over.
    assert send_quotas(torch.tensor([[0, 0, 0], [8, 0, 0], [7, 0, 0]]), 1.0)[:, 0].tolist() == [0, 3, 2]


def test_beyond_the_bound_first_choices_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 2, with experts 0, 1 on rank 0. It wants 5 places there and may have 3 of the bound's 10: the first
    choices of tokens 0 and 2, then the second choice of token 0; tokens 1 and 3 lose their second choices."""
    others = torch.tensor([9, 1])
    monkeypatch.setattr(receive_bound, "group_size", lambda group: 2)
    monkeypatch.setattr(receive_bound, "group_rank", lambda group: 1)
    monkeypatch.setattr(receive_bound, "all_gather_rows", lambda x, counts, group: torch.cat([others[None], x]))
    plan = make_plan([[0, 1], [2, 0], [1, 2], [3, 1], [2, 3]], [[0.6, 0.4]] * 5, num_choices=2, num_experts=4)
    limited = apply_receive_bound(1.0, plan, torch.tensor([0, 0, 1, 1])[plan.expert_ids_TK], group=None)
    beyond = limited.outcome_TK == Outcome.DROPPED_RECEIVE_BOUND
    assert beyond.nonzero().tolist() == [[1, 1], [3, 1]]
    assert int(limited.kept_TK.sum()) == 8


def test_one_rank_alone_is_never_bound() -> None:
    plan = make_plan([[0]] * 9, [[0.9]] * 9)
    assert apply_receive_bound(1.0, plan, torch.zeros_like(plan.expert_ids_TK), group=None).kept_TK.all()
