"""Every router against its published formula, written out here in loops; what all routers have in common.

Frequencies are deterministic, since every lot is a function of named keys: a bound on chi-square at 1 in 10 000 either
always holds or never. transformers' and DeepSpeed's routers as oracles: test_oracles.py; top-k alone: test_routing.py.
"""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from expert_parallel.moe.capacity.token_scope import gather_scope
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.conservation import count_routed
from expert_parallel.moe.context import RouterReplay, StepContext, TokenBatch, token_batch
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.routers.across_tokens import sinkhorn
from expert_parallel.moe.routers.base import Router, RouterSettings
from expert_parallel.moe.routers.registry import ROUTERS, RouterConfig, build_router
from expert_parallel.moe.types import Outcome, RoutingPlan
from expert_parallel.nn import random
from tests.ranks import run_ranks

D_MODEL, NUM_EXPERTS = 8, 6
CHI_SQUARE = {4: 23.5, 5: 25.7, 19: 50.8}  # degrees of freedom -> exceeded once in 10 000

Config: TypeAdapter[RouterSettings] = TypeAdapter(RouterConfig)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def build(kind: str, dtype: torch.dtype = torch.float64, num_experts: int = NUM_EXPERTS, **options: Any) -> Router:
    """In training, every parameter drawn."""
    router = build_router(Config.validate_python({"kind": kind, **options}), D_MODEL, num_experts).to(dtype)
    for seed, parameter in enumerate(router.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed + 100).to(dtype)
    return router


def from_logits(kind: str, num_experts: int, **options: Any) -> Router:
    """In training, and its logits are its input: the weight is the identity."""
    router = build_router(Config.validate_python({"kind": kind, **options}), num_experts, num_experts).double()
    torch.nn.init.eye_(router.weight)
    return router


def batch_of(x: Tensor, context: StepContext | None = None) -> TokenBatch:
    """x: (T, D) as one sequence, or (B, S, D)."""
    return token_batch(x if x.dim() == 3 else x[None], context or StepContext(), None)


def route(router: Router, x: Tensor, context: StepContext | None = None) -> RoutingPlan:
    plan: RoutingPlan = router(x.flatten(0, -2), batch_of(x, context))
    return plan


def dense(plan: RoutingPlan) -> Tensor:
    """The weight of each (token, expert); 0 where none was chosen."""
    weights_TK = plan.weights_TK * plan.routed_TK
    return torch.zeros_like(plan.scores_TE).scatter(1, plan.expert_ids_TK, weights_TK)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def layer_config(**options: Any) -> MoEConfig:
    blocks = {"d_model": D_MODEL, "num_experts": NUM_EXPERTS, "experts": {"hidden": 8}}
    return MoEConfig.model_validate({**blocks, **options})


# ---------------------------------------------------------------------------------------------------------------------
# Group-limited top-k


def test_a_group_is_scored_by_its_best_expert_or_by_the_sum_of_its_two_best() -> None:
    """Three groups of two. Best experts: 0.9, 0.6, 0.5; sums of two: 1.0, 1.15, 0.7: the first group wins, or the
    second. Within it both experts are taken, the larger first."""
    scores = torch.tensor([[0.1, 0.9, 0.55, 0.6, 0.5, 0.2]], dtype=torch.float64)
    logits = (scores / (1 - scores)).log()
    for score, experts, weights in (("max", [1, 0], [0.9, 0.1]), ("top2_sum", [3, 2], [0.6, 0.55])):
        groups = {"count": 3, "limit": 1, "score": score}
        plan = route(from_logits("top_k", 6, k=2, score="sigmoid", normalise=False, group_limit=groups), logits)
        assert plan.expert_ids_TK.tolist() == [experts]
        assert plan.weights_TK[0].tolist() == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize("score", ["max", "top2_sum"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_group_limited_choices_equal_loops(score: str, kind: str) -> None:
    """Twelve experts in four groups, of which a token may use two."""
    logits_TE = draw(60, 12)
    groups = {"count": 4, "limit": 2, "score": score}
    plan = route(from_logits("top_k", 12, k=4, score=kind, group_limit=groups), logits_TE)
    scores_TE = logits_TE.softmax(-1) if kind == "softmax" else logits_TE.sigmoid()
    for row, experts in zip(scores_TE.tolist(), plan.expert_ids_TK.tolist(), strict=True):
        members = [range(3 * group, 3 * group + 3) for group in range(4)]
        marks = [sorted((row[e] for e in group), reverse=True) for group in members]
        values = [mark[0] if score == "max" else mark[0] + mark[1] for mark in marks]
        allowed = sorted(range(4), key=lambda g: -values[g])[:2]
        candidates = [e for g in allowed for e in members[g]]
        assert experts == sorted(candidates, key=lambda e: -row[e])[:4]


def test_equal_groups_go_to_the_smaller_number() -> None:
    plan = route(from_logits("top_k", 6, k=2, group_limit={"count": 3, "limit": 1}), torch.zeros(2, 6).double())
    assert plan.expert_ids_TK.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("groups", "k", "message"),
    [
        ({"count": 4, "limit": 1}, 2, r"num_experts \(6\) is not a multiple of router\.group_limit\.count \(4\)"),
        ({"count": 3, "limit": 4}, 2, r"group_limit\.limit \(4\) is larger than router\.group_limit\.count \(3\)"),
        ({"count": 3, "limit": 1}, 3, r"router\.k \(3\) is larger than the 2 experts"),
        ({"count": 6, "limit": 3}, 2, r"leaves one expert in a group: use 'max'"),
    ],
)
def test_groups_that_cannot_work_are_refused(groups: dict[str, Any], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_config(router={"kind": "top_k", "k": k, "group_limit": groups})
    assert layer_config(router={"kind": "top_k", "k": 2, "group_limit": {"count": 6, "limit": 3, "score": "max"}})


# ---------------------------------------------------------------------------------------------------------------------
# Noisy top-k


def softmax_of_the_best(h_TE: Tensor, k: int) -> Tensor:
    """Shazeer et al. 2017, eq. 3 and 5: Softmax(KeepTopK(H, k)), where what is not kept is -inf."""
    kept_TE = torch.full_like(h_TE, -torch.inf)
    for t, row in enumerate(h_TE):
        for e in sorted(range(len(row)), key=lambda e: -float(row[e].detach()))[:k]:
            kept_TE[t, e] = h_TE[t, e]
    return kept_TE.softmax(-1)


@pytest.mark.parametrize("k", [2, 3])
def test_noisy_top_k_is_the_formula_of_its_paper(k: int) -> None:
    """H(x)_i = (x W_g)_i + StandardNormal() * Softplus((x W_noise)_i): weights, and the gradients of x, W_g, W_noise.
    The normal numbers are keyed by (seed, step, micro-step, layer, use) and the token's place in the global order."""
    router = build("noisy_top_k", k=k)
    w_gate, w_noise = (draw(NUM_EXPERTS, D_MODEL, seed=seed).requires_grad_() for seed in (100, 101))
    x, own_x = (draw(2, 7, D_MODEL).requires_grad_() for _ in range(2))
    plan = route(router, own_x, StepContext(1, 2, 3, 4, sequence_index_B=torch.tensor([5, 0])))

    places = torch.tensor([sequence * 2**32 + position for sequence in (5, 0) for position in range(7)])
    noise_TE = random.normal(random.mix(1, 2, 3, 4, 1), places, NUM_EXPERTS)
    x_TD = x.flatten(0, 1)
    h_TE = x_TD @ w_gate.T + noise_TE * torch.log1p((x_TD @ w_noise.T).exp())
    expected_TE = softmax_of_the_best(h_TE, k)
    close(dense(plan), expected_TE)
    close(plan.logits_TE, h_TE)

    upstream = draw(14, NUM_EXPERTS, seed=1)
    wanted = torch.autograd.grad(expected_TE, [x, w_gate, w_noise], upstream)
    found = torch.autograd.grad(dense(plan), [own_x, *router.parameters()], upstream)
    assert len(found) == 3
    for own, their in zip(found, wanted, strict=True):
        close(own, their)
        assert float(own.abs().max()) > 1e-3


def test_noisy_top_k_has_no_noise_in_evaluation() -> None:
    """But W_noise keeps a gradient, of zeros, so that every rank has the same ones to add up."""
    router, x_TD = build("noisy_top_k", k=3).eval(), draw(20, D_MODEL)
    plan = route(router, x_TD)
    close(dense(plan), softmax_of_the_best(x_TD @ draw(NUM_EXPERTS, D_MODEL, seed=100).T, 3))
    (plan.weights_TK * draw(20, 3)).sum().backward()
    assert {name: bool(p.grad.any()) for name, p in router.named_parameters() if p.grad is not None} == {
        "weight": True,
        "noise_weight": False,
    }


@pytest.mark.parametrize(("options", "std"), [({}, 1 / NUM_EXPERTS), ({"std": 0.7}, 0.7)])
def test_the_noise_of_v_moe(options: dict[str, Any], std: float) -> None:
    """TOP_k(softmax(W x + eps)), eps ~ N(0, 1 / E^2), not normalised again: Riquelme et al. 2021, eq. 2."""
    router, x_TD = build("noisy_top_k", k=2, noise="normal", normalise=False, **options), draw(20, D_MODEL)
    noise_TE = std * random.normal(random.mix(0, 0, 0, 0, 1), torch.arange(20), NUM_EXPERTS)
    clean_TE = x_TD @ draw(NUM_EXPERTS, D_MODEL, seed=100).T
    for training, logits_TE in ((True, clean_TE + noise_TE), (False, clean_TE)):
        plan = route(router.train(training), x_TD)
        best_T2 = logits_TE.softmax(-1).topk(2)
        assert torch.equal(plan.expert_ids_TK, best_T2.indices)
        close(plan.weights_TK, best_T2.values)


def test_only_normal_noise_takes_a_std() -> None:
    with pytest.raises(ValueError, match=r"router\.std is 0\.5 but router\.noise is 'gumbel'"):
        layer_config(router={"kind": "noisy_top_k", "noise": "gumbel", "std": 0.5})


PROBABILITIES = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1], dtype=torch.float64)


def many_draws(router: Router) -> RoutingPlan:
    """4000 tokens with logits log PROBABILITIES + 3, under ten keys."""
    contexts = [StepContext(seed=s, step=p, layer=y) for s in (1, 2) for p in (0, 7) for y in (0, 3)]
    contexts += [StepContext(seed=3, micro_step=m) for m in (1, 2)]
    plans = [route(router, (PROBABILITIES.log() + 3).expand(400, 5), context) for context in contexts]
    joined = {
        name: torch.cat([getattr(p, name) for p in plans]) for name in ("expert_ids_TK", "weights_TK", "outcome_TK")
    }
    return replace(plans[0], **joined)


def test_gumbel_choices_are_draws_from_the_softmax_without_replacement() -> None:
    """The first is i with probability p_i, the pair i, j with p_i * p_j / (1 - p_i). Weights are the clean scores."""
    plan = many_draws(from_logits("noisy_top_k", 5, k=2, noise="gumbel", normalise=False))
    first_T, second_T = plan.expert_ids_TK.unbind(1)
    assert chi_square(first_T.bincount(minlength=5), PROBABILITIES) < CHI_SQUARE[4]
    pairs_EE = PROBABILITIES[:, None] * PROBABILITIES / (1 - PROBABILITIES[:, None])
    counts_EE = (first_T * 5 + second_T).bincount(minlength=25).view(5, 5)
    different_EE = ~torch.eye(5, dtype=torch.bool)
    assert int(counts_EE.diag().sum()) == 0
    assert chi_square(counts_EE[different_EE], pairs_EE[different_EE]) < CHI_SQUARE[19]
    close(plan.weights_TK, PROBABILITIES[plan.expert_ids_TK])


# ---------------------------------------------------------------------------------------------------------------------
# GShard


@pytest.mark.parametrize(("threshold", "share"), [(0.5, 0.6), (0.9, 1 / 3), (0.2, 1.0)])
def test_the_second_expert_is_taken_with_probability_g2_over_the_threshold(threshold: float, share: float) -> None:
    """g2 = 0.3 of the two best: min(1, 0.3 / 0.5) = 0.6, 0.3 / 0.9 = 1 / 3, and always from 0.3 on."""
    logits = torch.tensor([0.3, 0.01, 0.7], dtype=torch.float64).log().expand(20000, 3)
    plan = route(from_logits("gshard", 3, threshold=threshold), logits, StepContext(seed=4))
    taken_T = plan.outcome_TK[:, 1] == Outcome.KEPT
    assert abs(float(taken_T.double().mean()) - share) <= 4 * math.sqrt(share * (1 - share) / 20000)
    assert set(plan.outcome_TK[:, 1].tolist()) <= {Outcome.KEPT, Outcome.NOT_ROUTED}
    assert bool((plan.outcome_TK[:, 0] == Outcome.KEPT).all())


def test_gshard_is_algorithm_1_with_the_keyed_lots() -> None:
    """g1 and g2 are normalised before the lot is drawn: who loses the second expert keeps g1 / (g1 + g2)."""
    logits_TE = draw(200, 5)
    plan = route(from_logits("gshard", 5), logits_TE, StepContext(1, 2, 3, 4))
    lots_T = random.uniform(random.mix(1, 2, 3, 4, 2), torch.arange(200), 1)[:, 0].tolist()
    left_out = 0
    for t, (row, lot) in enumerate(zip(logits_TE.softmax(-1).tolist(), lots_T, strict=True)):
        first, second = sorted(range(5), key=lambda e: -row[e])[:2]
        g1, g2 = row[first] / (row[first] + row[second]), row[second] / (row[first] + row[second])
        assert plan.expert_ids_TK[t].tolist() == [first, second]
        assert plan.weights_TK[t].tolist() == pytest.approx([g1, g2], rel=1e-12)
        assert plan.outcome_TK[t].tolist() == [Outcome.KEPT, Outcome.KEPT if 2 * g2 > lot else Outcome.NOT_ROUTED]
        left_out += 2 * g2 <= lot
    assert 20 < left_out < 180


@pytest.mark.parametrize("second", ["proportional", "gumbel"])
def test_gshard_is_never_random_in_evaluation(second: str) -> None:
    """The two best under every key. DeepSpeed's top-2 gate samples there too: its pull request 8620."""
    router, logits_TE = from_logits("gshard", 5, second=second).eval(), draw(200, 5)
    for seed in range(3):
        plan = route(router, logits_TE, StepContext(seed=seed))
        assert torch.equal(plan.expert_ids_TK, logits_TE.topk(2).indices)
        assert bool((plan.outcome_TK == Outcome.KEPT).all())
        close(plan.weights_TK, logits_TE.topk(2).values.softmax(-1))


def test_a_gumbel_second_expert_is_drawn_from_the_softmax_without_the_first() -> None:
    """The first is always expert 0, the largest; the second is j with p_j / (1 - p_0), and always taken."""
    plan = many_draws(from_logits("gshard", 5, second="gumbel"))
    first_T, second_T = plan.expert_ids_TK.unbind(1)
    assert bool((first_T == 0).all())
    assert bool((second_T != 0).all())
    assert bool((plan.outcome_TK == Outcome.KEPT).all())
    counts_E = second_T.bincount(minlength=5)[1:]
    assert chi_square(counts_E, PROBABILITIES[1:] / 0.6) < CHI_SQUARE[4]
    chosen_TK = PROBABILITIES[plan.expert_ids_TK]
    close(plan.weights_TK, chosen_TK / chosen_TK.sum(1, keepdim=True))


def test_a_gumbel_second_expert_differs_from_the_first_whatever_the_logits() -> None:
    plan = route(from_logits("gshard", 4, second="gumbel"), 100 * draw(500, 4))
    assert bool((plan.expert_ids_TK[:, 0] != plan.expert_ids_TK[:, 1]).all())


# ---------------------------------------------------------------------------------------------------------------------
# Expert choice


def taken_by_loops(scores_TE: Tensor, blocks: list[list[int]], factor: float) -> Tensor:
    """Bool (T, E): each expert sorts the tokens of a block by score, then position, and takes ceil(factor * T / E)."""
    taken_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    num_experts = scores_TE.shape[1]
    for block in blocks:
        capacity = math.ceil(Fraction(str(factor)) * len(block) / num_experts)
        for expert in range(num_experts):
            for t in sorted(block, key=lambda t: (-scores_TE[t, expert].item(), t))[:capacity]:
                taken_TE[t, expert] = True
    return taken_TE


@st.composite
def masked_logits(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(logits_BSE, mask_BS): few values, so that many are equal; padding anywhere; no tokens at all."""
    shape = (draw(st.integers(0, 3)), draw(st.integers(0, 5)), draw(st.integers(2, 4)))
    cells = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=math.prod(shape), max_size=math.prod(shape)))
    real = draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return torch.tensor(cells, dtype=torch.float64).view(shape), torch.tensor(real, dtype=torch.bool).view(shape[:2])


@given(masked_logits(), st.sampled_from(["rank", "sequence"]), st.sampled_from([0.3, 1.0, 1.5, 2.0]), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_expert_choice_equals_sorting(sight: tuple[Tensor, Tensor], scope: str, factor: float, training: bool) -> None:
    logits_BSE, mask_BS = sight
    num_sequences, length, num_experts = logits_BSE.shape
    factors = {"train": factor, "eval": 1.2} if training else {"train": 1.2, "eval": factor}
    router = from_logits("expert_choice", num_experts, scope=scope, scale=1.5, **factors).train(training)
    plan = route(router, logits_BSE, StepContext(mask_BS=mask_BS))
    real = [t for t in range(num_sequences * length) if mask_BS.flatten()[t]]
    sequences = [[t for t in real if t // length == b] for b in range(num_sequences)]
    taken_TE = taken_by_loops(plan.scores_TE, [real] if scope == "rank" else sequences, factor)
    assert torch.equal(plan.outcome_TK == Outcome.KEPT, taken_TE)
    assert torch.equal(plan.outcome_TK == Outcome.NOT_ROUTED, ~taken_TE)
    assert plan.expert_ids_TK.tolist() == [list(range(num_experts))] * (num_sequences * length)
    close(plan.weights_TK[real], 1.5 * logits_BSE.flatten(0, 1).softmax(-1)[real])


def test_expert_choice_by_hand() -> None:
    """4 tokens, 2 experts. Factor 1: each takes 2; expert 0 likes tokens 3 and 1 best, expert 1 likes 0 and 2, equals.
    Factor 0.5: each takes 1, and of the equals the earlier."""
    scores = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]], dtype=torch.float64)
    plan = route(from_logits("expert_choice", 2, train=1.0), scores.log())
    assert (plan.outcome_TK == Outcome.KEPT).tolist() == [[False, True], [True, False], [False, True], [True, False]]
    plan = route(from_logits("expert_choice", 2, train=0.5), scores.log())
    assert (plan.outcome_TK == Outcome.KEPT).tolist() == [[False, True], [False, False], [False, False], [True, False]]


def test_expert_choice_is_balanced_by_construction() -> None:
    """50 tokens, 6 experts, factor 2: ceil(100 / 6) = 17 each, whatever the logits; tokens get unequal numbers."""
    plan = route(build("expert_choice"), draw(50, D_MODEL) + 3)
    assert count_routed(plan).tolist() == [17] * 6
    assert len(set(plan.kept_TK.sum(1).tolist())) > 2


def test_an_expert_that_may_take_all_tokens_does() -> None:
    """A factor of E; and one token, of which every expert takes ceil(1 / 6) = 1."""
    assert bool(route(build("expert_choice", train=6.0), draw(5, D_MODEL)).kept_TK.all())
    assert bool(route(build("expert_choice", train=1.0), draw(1, D_MODEL)).kept_TK.all())
    with pytest.raises(ValueError, match=r"router\.eval \(6\.5\) is larger than num_experts \(6\)"):
        layer_config(router={"kind": "expert_choice", "eval": 6.5})


# ---------------------------------------------------------------------------------------------------------------------
# Hash


def hash_ids(ids: Tensor, x_TD: Tensor | None = None, context: StepContext | None = None, **options: Any) -> Tensor:
    x_TD = torch.zeros(len(ids), D_MODEL, dtype=torch.float64) if x_TD is None else x_TD
    context = replace(context or StepContext(), token_ids_BS=ids[None])
    return route(build("hash", **options), x_TD, context).expert_ids_TK


def test_a_token_id_has_experts_of_its_own_whatever_else() -> None:
    """Whatever its value, its place, its layer, step and seed of the run, and training or not."""
    ids = torch.tensor([7, 3, 7, 50_000, 3])
    chosen = hash_ids(ids, k=3)
    assert torch.equal(chosen[0], chosen[2])
    assert torch.equal(chosen[1], chosen[4])
    assert not torch.equal(chosen[0], chosen[1])
    elsewhere = StepContext(seed=9, step=8, micro_step=7, layer=6, sequence_index_B=torch.tensor([5]))
    order = torch.tensor([4, 0, 3])
    assert torch.equal(hash_ids(ids[order], draw(3, D_MODEL), elsewhere, k=3), chosen[order])


@pytest.mark.parametrize("k", [1, 2, 6])
def test_hash_choices_are_different_experts_spread_evenly(k: int) -> None:
    """Over 6000 ids: no expert twice for one id, and each choice, the first as the last, falls on all alike."""
    chosen = hash_ids(torch.arange(6000), k=k)
    assert all(len(set(experts)) == k for experts in chosen.tolist())
    for choice in range(k):
        counts = chosen[:, choice].bincount(minlength=6)
        assert chi_square(counts, torch.full((6,), 1 / 6, dtype=torch.float64)) < CHI_SQUARE[5], choice


def test_the_hash_is_the_keyed_numbers_ranked() -> None:
    chosen = hash_ids(torch.tensor([5, 11]), k=4, seed=3)
    numbers = random.uniform(random.mix(3), torch.tensor([5, 11]), NUM_EXPERTS).tolist()
    assert chosen.tolist() == [sorted(range(6), key=lambda e: -row[e])[:4] for row in numbers]


def test_another_seed_is_another_map() -> None:
    """Independent of the first: a share of 1 / 6 of the ids has the same expert in both."""
    ids = torch.arange(6000)
    same = (hash_ids(ids, seed=0) == hash_ids(ids, seed=1)).double().mean()
    assert abs(float(same) - 1 / 6) < 4 * math.sqrt(5 / 36 / 6000)


def test_hash_weights_are_1_over_the_choices_that_count() -> None:
    router = build("hash", k=4)
    plan = route(router, draw(2, D_MODEL), StepContext(token_ids_BS=torch.tensor([[1, 2]])))
    assert plan.weights_TK.tolist() == [[0.25] * 4] * 2
    counted_TK = torch.tensor([[True, False, True, False], [False] * 4])
    assert router.weights(plan, plan.expert_ids_TK, counted_TK).tolist() == [[0.5, 0, 0.5, 0], [0] * 4]


def test_hash_without_token_ids_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'hash' needs the token ids: give StepContext\.token_ids_BS"):
        route(build("hash"), draw(2, D_MODEL))
    layer = MoELayer(layer_config(router={"kind": "hash"})).double()
    with pytest.raises(ValueError, match=r"StepContext\.token_ids_BS is torch.int64 of shape \(1, 3\)"):
        layer(draw(2, D_MODEL), StepContext(token_ids_BS=torch.zeros(1, 3, dtype=torch.int64)))


# ---------------------------------------------------------------------------------------------------------------------
# Sinkhorn


def published_sinkhorn(logits_TE: Tensor, tolerance: float, most: int = 10_000) -> Tensor:
    """Megatron-Core's loop, without the epsilon in its denominators."""
    cost_TE = logits_TE.exp()
    num_tokens, num_experts = cost_TE.shape
    d0, d1 = torch.ones(num_tokens).double(), torch.ones(num_experts).double()
    for _ in range(most):
        d0 = 1 / num_tokens * 1 / torch.sum(d1 * cost_TE, 1)
        d1_old, d1 = d1, 1 / num_experts * 1 / torch.sum(d0[:, None] * cost_TE, 0)
        if float(torch.mean(torch.abs(d1_old - d1))) <= tolerance:
            break
    return d1 * cost_TE * d0[:, None]


def own_sinkhorn(logits_BSE: Tensor, scope: Any, tolerance: float, most: int, mask_BS: Tensor | None = None) -> Tensor:
    batch = batch_of(logits_BSE, StepContext(mask_BS=mask_BS))
    view, (logits_GE,) = gather_scope(scope, batch, logits_BSE.flatten(0, 1))
    return sinkhorn(logits_GE, view, tolerance, most)


def skewed(*shape: int, seed: int = 0) -> Tensor:
    """Logits of which the later experts' are larger: top-k alone would overload them."""
    return draw(*shape, seed=seed) + torch.arange(shape[-1], dtype=torch.float64)


@pytest.mark.parametrize(("tolerance", "most"), [(1e-4, 100), (1e-2, 100), (1e-12, 3), (1e-12, 10_000)])
def test_sinkhorn_is_the_published_loop(tolerance: float, most: int) -> None:
    """Values, and the choices of the router: the k largest of the balanced matrix, weighed by the plain scores."""
    logits_TE = skewed(40, 5)
    expected_TE = published_sinkhorn(logits_TE, tolerance, most)
    close(own_sinkhorn(logits_TE[None], "rank", tolerance, most), expected_TE)
    plan = route(from_logits("sinkhorn", 5, k=2, tolerance=tolerance, max_iterations=most), logits_TE)
    assert torch.equal(plan.expert_ids_TK, expected_TE.topk(2).indices)
    assert not torch.equal(plan.expert_ids_TK, logits_TE.topk(2).indices)
    close(plan.weights_TK, logits_TE.softmax(-1).gather(1, plan.expert_ids_TK))


def test_megatrons_top_1_weighs_by_sigmoids() -> None:
    logits_TE = skewed(40, 5)
    plan = route(from_logits("sinkhorn", 5, score="sigmoid"), logits_TE)
    expected_T1 = published_sinkhorn(logits_TE, 1e-4).argmax(1, keepdim=True)
    assert torch.equal(plan.expert_ids_TK, expected_T1)
    close(plan.weights_TK, logits_TE.gather(1, expected_T1).sigmoid())


def test_a_converged_sinkhorn_has_equal_rows_and_equal_columns() -> None:
    balanced_TE = own_sinkhorn(skewed(40, 5)[None], "rank", 1e-14, 10_000)
    close(balanced_TE.sum(1), torch.full((40,), 1 / 40, dtype=torch.float64))
    close(balanced_TE.sum(0), torch.full((5,), 1 / 5, dtype=torch.float64))


def test_sinkhorn_balances_in_training_and_is_top_k_in_evaluation() -> None:
    """Of 200 tokens, top-1 sends more than half to the last expert of 5; sinkhorn at most 60 to any."""
    router, logits_TE = from_logits("sinkhorn", 5), 2 * skewed(200, 5)
    balanced, plain = route(router, logits_TE), route(router.eval(), logits_TE)
    assert torch.equal(plain.expert_ids_TK[:, 0], logits_TE.argmax(1))
    assert int(count_routed(plain).max()) > 100
    assert int(count_routed(balanced).max()) < 60
    assert int(count_routed(balanced).min()) > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_of_big_logits_stays_finite(dtype: torch.dtype) -> None:
    """exp(500) is infinite in float32, and sums of it in float64; also where all of a column underflows."""
    logits_TE = torch.where(draw(30, 4) > 0, 500.0, -500.0).to(dtype)
    logits_TE[:, 3] = -500
    balanced_TE = own_sinkhorn(logits_TE[None], "rank", 1e-4, 100)
    assert bool(balanced_TE.isfinite().all())
    assert bool((balanced_TE >= 0).all())
    router = from_logits("sinkhorn", 4).to(dtype)
    chosen_T1 = route(router, logits_TE).expert_ids_TK
    has_large_T = (logits_TE > 0).any(1)
    assert bool((logits_TE.gather(1, chosen_T1)[has_large_T] > 0).all())


def test_a_shift_of_a_tokens_logits_changes_nothing() -> None:
    """It cancels in the row's factor; +-500 there would overflow without taking off the row's largest logit."""
    logits_TE = skewed(30, 5)
    shifted_TE = logits_TE + torch.where(draw(30, 1) > 0, 500.0, -500.0)
    torch.testing.assert_close(
        own_sinkhorn(shifted_TE[None], "rank", 1e-9, 1000),
        own_sinkhorn(logits_TE[None], "rank", 1e-9, 1000),
        rtol=1e-9,
        atol=1e-12,
    )


def test_a_sequence_does_not_change_what_becomes_of_another() -> None:
    """Three sequences that stop after different numbers of turns: each as if alone, though a longer run differs."""
    logits_BSE = torch.stack([draw(20, 5), skewed(20, 5, seed=1), 3 * skewed(20, 5, seed=2)])
    together = own_sinkhorn(logits_BSE, "sequence", 0.05, 1000).view(3, 20, 5)
    for sequence, alone_TE in enumerate(logits_BSE):
        close(together[sequence], published_sinkhorn(alone_TE, 0.05))
        assert not torch.allclose(together[sequence], published_sinkhorn(alone_TE, 1e-9), rtol=1e-6)
    router = from_logits("sinkhorn", 5, scope="sequence")
    whole = route(router, logits_BSE).expert_ids_TK
    assert torch.equal(whole, torch.cat([route(router, alone_TE).expert_ids_TK for alone_TE in logits_BSE]))
    assert not torch.equal(whole, route(from_logits("sinkhorn", 5, scope="rank"), logits_BSE).expert_ids_TK)


def test_padding_has_no_part_in_sinkhorn() -> None:
    logits_TE, mask_T = skewed(30, 5), torch.arange(30) % 3 != 1
    logits_TE[~mask_T] *= 10
    found = own_sinkhorn(logits_TE[None], "rank", 1e-6, 1000, mask_T[None])
    close(found[mask_T], published_sinkhorn(logits_TE[mask_T], 1e-6))


# ---------------------------------------------------------------------------------------------------------------------
# What all routers have in common: each of ROUTERS as it comes, and further settings of some

CASES: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in ROUTERS} | {
    "top_k, DeepSeek-V3": {
        "kind": "top_k",
        "k": 3,
        "score": "sigmoid",
        "balance_bias_rate": 0.1,
        "group_limit": {"count": 3, "limit": 2},
    },
    "top_k, all": {"kind": "top_k", "k": 2, "jitter": 0.2, "bias": True, "scale": 1.5},
    "noisy_top_k, normal": {"kind": "noisy_top_k", "noise": "normal", "bias": True},
    "noisy_top_k, gumbel": {"kind": "noisy_top_k", "noise": "gumbel"},
    "gshard, gumbel": {"kind": "gshard", "second": "gumbel"},
    "expert_choice, sequence": {"kind": "expert_choice", "scope": "sequence", "bias": True},
    "hash, 3": {"kind": "hash", "k": 3},
    "sparsemixer": {"kind": "sparsemixer", "margin": 0.6, "bias": True},  # so wide that every expert is near a best one
    "sinkhorn, sequence": {"kind": "sinkhorn", "k": 2, "score": "sigmoid", "scope": "sequence", "bias": True},
}
every_router = pytest.mark.parametrize("case", list(CASES))

X_BSD = draw(4, 5, D_MODEL)
IDS_BS = torch.randint(0, 50, (4, 5), generator=torch.Generator().manual_seed(0))
EXACT = ("expert_ids_TK", "outcome_TK", "weights_TK", "logits_TE", "scores_TE", "probabilities_TE", "ranking_TE")


def context_of(sequences: list[int], **more: Any) -> StepContext:
    ids_BS = IDS_BS[sequences]
    index_B = torch.tensor(sequences, dtype=torch.int64)
    return StepContext(1, 2, 3, 4, sequence_index_B=index_B, token_ids_BS=ids_BS, **more)


def sequence_scope(case: str) -> dict[str, Any]:
    """Without a decision over all of a rank's tokens, which another batch would change."""
    options = CASES[case]
    return (
        {**options, "scope": "sequence"} if "scope" in type(Config.validate_python(options)).model_fields else options
    )


@every_router
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_every_plan_has_its_shapes_and_dtypes(case: str, training: bool, dtype: torch.dtype, wide: torch.dtype) -> None:
    router = build(**CASES[case], dtype=wide).train(training)
    plan = route(router, X_BSD.to(dtype), context_of([0, 1, 2, 3]))
    num_choices = router.num_choices
    for name in ("logits_TE", "scores_TE", "probabilities_TE", "log_scores_TE", "ranking_TE"):
        assert getattr(plan, name).shape == (20, NUM_EXPERTS), name
    for name in ("expert_ids_TK", "weights_TK", "outcome_TK"):
        assert getattr(plan, name).shape == (20, num_choices), name
    for name in ("logits_TE", "scores_TE", "probabilities_TE", "log_scores_TE", "weights_TK"):
        assert getattr(plan, name).dtype == wide, name
        assert bool(getattr(plan, name).isfinite().all()), name
    assert (plan.expert_ids_TK.dtype, plan.outcome_TK.dtype) == (torch.int64, torch.uint8)
    assert plan.num_experts == NUM_EXPERTS
    assert all(len(set(experts)) == num_choices for experts in plan.expert_ids_TK.tolist())
    assert 0 <= int(plan.expert_ids_TK.min()) <= int(plan.expert_ids_TK.max()) < NUM_EXPERTS
    torch.testing.assert_close(plan.probabilities_TE.sum(1), torch.ones(20, dtype=wide))
    assert plan.ranking_TE is not None
    assert not plan.ranking_TE.requires_grad


@every_router
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_every_router_takes_no_tokens(case: str, training: bool, shape: tuple[int, int]) -> None:
    router = build(**CASES[case]).train(training)
    context = StepContext(token_ids_BS=torch.zeros(shape, dtype=torch.int64))
    plan = route(router, torch.zeros(*shape, D_MODEL, dtype=torch.float64), context)
    assert plan.expert_ids_TK.shape == plan.weights_TK.shape == plan.outcome_TK.shape == (0, router.num_choices)
    assert plan.logits_TE.shape == plan.scores_TE.shape == plan.probabilities_TE.shape == (0, NUM_EXPERTS)


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_padding_is_not_routed_and_changes_nothing_for_the_others(case: str, training: bool) -> None:
    """The last two tokens of each sequence are padding: the others' plan is that of the shorter sequences."""
    router = build(**CASES[case]).train(training)
    mask_BS = torch.tensor([True, True, True, False, False]).expand(4, 5)
    padded = route(router, X_BSD, context_of([0, 1, 2, 3], mask_BS=mask_BS))
    short = replace(context_of([0, 1, 2, 3]), token_ids_BS=IDS_BS[:, :3])
    expected, real_T = route(router, X_BSD[:, :3], short), mask_BS.flatten()
    assert bool((padded.outcome_TK[~real_T] == Outcome.NOT_ROUTED).all())
    assert torch.equal(padded.expert_ids_TK[real_T], expected.expert_ids_TK)
    assert torch.equal(padded.outcome_TK[real_T], expected.outcome_TK)
    close(padded.weights_TK[real_T], expected.weights_TK)
    assert bool(padded.weights_TK.isfinite().all())


@every_router
def test_in_training_a_gradient_reaches_every_parameter(case: str) -> None:
    router = build(**CASES[case])
    plan = route(router, X_BSD, context_of([0, 1, 2, 3]))
    parameters = dict(router.named_parameters())
    if CASES[case]["kind"] == "hash":
        assert not parameters
        assert not plan.weights_TK.requires_grad
        return
    (plan.weights_TK * plan.routed_TK * draw(*plan.weights_TK.shape, seed=1)).sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad.abs() > 1e-6).any(-1).all()), name  # of every expert


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_the_same_pass_twice_gives_the_same_bits(case: str, training: bool) -> None:
    router = build(**CASES[case]).train(training)
    first = route(router, X_BSD, context_of([0, 1, 2, 3]))
    torch.rand(1)  # no generator's state has a part in it
    second = route(router, X_BSD, context_of([0, 1, 2, 3]))
    for name in EXACT:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@every_router
def test_only_lots_differ_between_steps_and_only_in_training(case: str) -> None:
    router, later = build(**CASES[case]), replace(context_of([0, 1, 2, 3]), step=9)
    draws_lots = CASES[case]["kind"] in ("noisy_top_k", "gshard", "sparsemixer") or "jitter" in CASES[case]
    for training in (True, False):
        now, then = (route(router.train(training), X_BSD, c) for c in (context_of([0, 1, 2, 3]), later))
        same = all(torch.equal(getattr(now, name), getattr(then, name)) for name in EXACT)
        assert same is not (draws_lots and training)


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_a_token_is_routed_alike_in_another_batch(case: str, training: bool) -> None:
    """Sequences 0 to 3 on one rank; 3 and 1 on one, 0 and 2 on another, whose coordinates differ."""
    router = build(**sequence_scope(case)).train(training)
    whole = route(router, X_BSD, context_of([0, 1, 2, 3]))
    for coordinate, sequences in enumerate([[3, 1], [0, 2]]):
        part = route(router, X_BSD[sequences], context_of(sequences, coordinate=coordinate))
        rows_T = torch.tensor([sequence * 5 + position for sequence in sequences for position in range(5)])
        assert torch.equal(part.expert_ids_TK, whole.expert_ids_TK[rows_T])
        assert torch.equal(part.outcome_TK, whole.outcome_TK[rows_T])
        close(part.weights_TK, whole.weights_TK[rows_T])


def choices_on_rank(rank: int, options: dict[str, Any], parts: list[list[int]]) -> tuple[list[Any], list[Any]]:
    sequences = parts[rank]
    context = context_of(sequences, coordinate=rank)
    batch = token_batch(X_BSD[sequences], context, dist.group.WORLD)
    plan = build(**options)(X_BSD[sequences].flatten(0, 1), batch)
    return plan.expert_ids_TK.tolist(), plan.outcome_TK.tolist()


@pytest.mark.parametrize("kind", ["expert_choice", "sinkhorn"])
@pytest.mark.parametrize("parts", [[[3, 1], [0, 2]], [[1, 0, 3, 2], []]])
def test_the_ranks_decide_over_all_tokens_as_one_would(kind: str, parts: list[list[int]]) -> None:
    """Scope `global`, on two real ranks, one of which may have no tokens."""
    options = {"kind": kind, "scope": "global"}
    whole = route(build(**options), X_BSD, context_of([0, 1, 2, 3]))
    for sequences, (ids, reasons) in zip(parts, run_ranks(2, choices_on_rank, options, parts), strict=True):
        rows = [sequence * 5 + position for sequence in sequences for position in range(5)]
        assert ids == whole.expert_ids_TK[rows].tolist()
        assert reasons == whole.outcome_TK[rows].tolist()


@every_router
def test_recorded_choices_are_taken_and_weighed_anew(case: str) -> None:
    """Played back to a router whose logits have changed: the old choices, their new scores, and gradients."""
    router, context = build(**CASES[case]), context_of([0, 1, 2, 3])
    first = route(router, X_BSD, context)
    for parameter in router.parameters():
        parameter.data *= -0.7
    free = route(router, X_BSD, context)
    played = router(X_BSD.flatten(0, 1), batch_of(X_BSD, context), (first.expert_ids_TK, first.outcome_TK))
    assert torch.equal(played.expert_ids_TK, first.expert_ids_TK)
    assert torch.equal(played.outcome_TK, first.outcome_TK)
    if CASES[case]["kind"] == "hash":
        return
    assert not (torch.equal(free.expert_ids_TK, first.expert_ids_TK) and torch.equal(free.outcome_TK, first.outcome_TK))
    close(played.logits_TE, free.logits_TE)
    if CASES[case]["kind"] != "sparsemixer":  # whose weights are shares of other softmaxes
        check_weights(case, played, free, first)
    (played.weights_TK * draw(*played.weights_TK.shape)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in router.parameters())


def check_weights(case: str, played: RoutingPlan, free: RoutingPlan, first: RoutingPlan) -> None:
    scores_TK = free.scores_TE.gather(1, first.expert_ids_TK)
    options = Config.validate_python(CASES[case])
    if getattr(options, "normalise", False):
        scores_TK = scores_TK / scores_TK.sum(1, keepdim=True)
    close(played.weights_TK, scores_TK * getattr(options, "scale", 1.0))


@every_router
def test_a_replay_gives_a_layer_its_choices_again(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the layer dispatches, in a second pass with other parameters, and in a pass of another step, which chooses
    for itself and is recorded too."""
    layer = MoELayer(layer_config(router=CASES[case])).double()
    layer.router = build(**CASES[case])
    plans: list[RoutingPlan] = []
    dispatch = layer.dispatcher.dispatch

    def seen(x_TD: Tensor, plan: RoutingPlan, *rest: Any) -> Any:
        plans.append(plan)
        return dispatch(x_TD, plan, *rest)

    monkeypatch.setattr(layer.dispatcher, dispatch.__name__, seen)
    context = context_of([0, 1, 2, 3], replay=RouterReplay())
    layer(X_BSD, context)
    for parameter in layer.router.parameters():
        parameter.data *= -0.7
    output = layer(X_BSD, context)
    layer(X_BSD, replace(context, step=9))
    layer(X_BSD, replace(context, replay=None))
    first, again, other, free = plans
    assert torch.equal(again.expert_ids_TK, first.expert_ids_TK)
    assert torch.equal(again.outcome_TK, first.outcome_TK)
    assert torch.equal(output.stats.routed_E, count_routed(first))
    recorded = (first.expert_ids_TK, first.outcome_TK)
    played = layer.router(X_BSD.flatten(0, 1), batch_of(X_BSD, context), recorded)
    assert torch.equal(again.weights_TK, played.weights_TK)
    assert set(context.replay.recorded) == {(2, 3, 4), (9, 3, 4)}
    if CASES[case]["kind"] == "hash":
        return
    for chosen_anew in (other, free):
        choices = (chosen_anew.expert_ids_TK, chosen_anew.outcome_TK)
        assert not all(torch.equal(a, b) for a, b in zip(choices, (first.expert_ids_TK, first.outcome_TK), strict=True))
    (output.y * draw(*output.y.shape)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.router.parameters())


@every_router
def test_a_layer_with_every_router_learns(case: str) -> None:
    """Ten steps towards a target of its own kind lower the loss, in training mode."""
    layer = MoELayer(layer_config(router=CASES[case]), seed=1).double()
    target = 0.3 * draw(4, 5, D_MODEL, seed=2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for step in range(10):
        output = layer(X_BSD, replace(context_of([0, 1, 2, 3]), step=step))
        loss = (output.y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
