"""Balance losses, z-loss and the bias update: numbers by hand, the formulas written out, shares that add up; losses of
first choices, pooled over layers, and of padded sequences; the router's entropy.

Several ranks are simulated by splitting one micro-step's tokens: each part computes its share with the totals of all.
"""

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from torch import Tensor
from transformers.models.mixtral import modeling_mixtral
from transformers.models.switch_transformers import modeling_switch_transformers

from expert_parallel.model.parallelize import build_model
from expert_parallel.model.transformer import ModelConfig, Transformer
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.conservation import count_choices
from expert_parallel.moe.context import StepContext, TokenBatch, token_batch
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.routers import losses as balance
from expert_parallel.moe.routers.losses import (
    BalanceLossConfig,
    LossConfig,
    ZLossConfig,
    balance_loss,
    count_micro_step,
    loss_name,
    pool_layers,
    router_losses,
    update_balance_bias,
    z_loss,
)
from expert_parallel.moe.types import Outcome, RoutingPlan
from tests.peers import peers_in_float64
from tests.ranks import run_ranks

SCOPES = ["global", "rank", "sequence"]
Z_LOSS = ZLossConfig(kind="z_loss")


def make_plan(logits_TE: Tensor, k: int = 1, score: str = "softmax") -> RoutingPlan:
    scores_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    probabilities_TE = logits_TE.softmax(-1) if score == "softmax" else F.logsigmoid(logits_TE).softmax(-1)
    expert_ids_TK = logits_TE.detach().topk(k).indices
    outcome_TK = torch.full_like(expert_ids_TK, Outcome.KEPT, dtype=torch.uint8)
    weights_TK = scores_TE.gather(1, expert_ids_TK)
    return RoutingPlan(
        logits_TE, scores_TE, probabilities_TE, expert_ids_TK, weights_TK, outcome_TK, logits_TE.shape[1]
    )


def plan_of_probabilities(*probabilities: list[float]) -> RoutingPlan:
    return make_plan(torch.tensor(probabilities, dtype=torch.float64).log())


def batch_of(plan: RoutingPlan, num_sequences: int = 1, mask_BS: Tensor | None = None) -> TokenBatch:
    """The plan's tokens as so many sequences of equal length. mask_BS: False is padding."""
    length = len(plan.expert_ids_TK) // max(num_sequences, 1)
    return token_batch(torch.empty(num_sequences, length, 1), StepContext(mask_BS=mask_BS), None)


def balance_of(scope: str, **options: str) -> BalanceLossConfig:
    return BalanceLossConfig(kind="balance", **{"scope": scope, **options})


def loss_of(config: LossConfig, plan: RoutingPlan, batch: TokenBatch | None = None) -> Tensor:
    """The loss of one rank that holds the whole micro-step."""
    batch = batch or batch_of(plan)
    function = balance_loss if isinstance(config, BalanceLossConfig) else z_loss
    return function(config, plan, batch, count_micro_step([config], plan, batch))


def loss_alone(plan: RoutingPlan, scope: str = "global", num_sequences: int = 1) -> Tensor:
    return loss_of(balance_of(scope), plan, batch_of(plan, num_sequences))


def shares(plans: list[RoutingPlan], num_sequences: list[int], config: BalanceLossConfig | ZLossConfig) -> list[Tensor]:
    """Each simulated rank's share of the loss, with the totals that the all-reduce would give."""
    batches = [batch_of(plan, n) for plan, n in zip(plans, num_sequences, strict=True)]
    ranks, sent = list(zip(plans, batches, strict=True)), []

    def collect(x: Tensor, group: Any) -> Tensor:
        sent.append(x)
        return x

    with mock.patch.object(balance, "all_reduce_sum", collect):
        for plan, batch in ranks:
            count_micro_step([config], plan, batch)
    with mock.patch.object(balance, "all_reduce_sum", return_value=torch.stack(sent).sum(0)):
        steps = [count_micro_step([config], plan, batch) for plan, batch in ranks]
    function = balance_loss if isinstance(config, BalanceLossConfig) else z_loss
    return [function(config, plan, batch, step) for (plan, batch), step in zip(ranks, steps, strict=True)]


def written_out(plan: RoutingPlan, rows: slice) -> float:
    """E * sum over experts of f_e * P_e over these tokens, in loops. Fedus et al. 2021, eq. 4-6."""
    scores, choices = plan.scores_TE[rows].tolist(), plan.expert_ids_TK[rows].tolist()
    total = 0.0
    for expert in range(plan.num_experts):
        f = sum(row.count(expert) for row in choices) / sum(len(row) for row in choices)
        p = sum(row[expert] / sum(row) for row in scores) / len(scores)
        total += f * p
    return plan.num_experts * total


def logits(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64) * 2 + torch.arange(
        num_experts
    )


# ---------------------------------------------------------------------------------------------------------------------
# Values


def test_balance_loss_by_hand() -> None:
    """Three of four tokens choose expert 0: f = (3/4, 1/4), P = (0.5875, 0.4125), 2 * sum = 1.0875."""
    plan = plan_of_probabilities([0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.6, 0.4])
    assert float(loss_alone(plan)) == pytest.approx(1.0875, rel=1e-12)


def test_balance_loss_of_top_2_by_hand() -> None:
    """f counts both choices: (2, 1, 1, 0) of 4; P = (0.35, 0.3, 0.25, 0.1); 4 * (0.175 + 0.075 + 0.0625) = 1.25."""
    probabilities = torch.tensor([[0.4, 0.35, 0.15, 0.1], [0.3, 0.25, 0.35, 0.1]], dtype=torch.float64)
    plan = make_plan(probabilities.log(), k=2)
    assert plan.expert_ids_TK.tolist() == [[0, 1], [2, 0]]
    assert float(loss_alone(plan)) == pytest.approx(1.25, rel=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_perfect_balance_is_1(scope: str, score: str, k: int) -> None:
    """Token t prefers expert t, then t + 1, ...: each expert has k tokens, and the scores go round with them."""
    preference = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    logits_TE = torch.stack([preference.roll(t) for t in range(4)])
    assert float(loss_alone(make_plan(logits_TE, k, score), scope)) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_expert_that_takes_all_is_the_number_of_experts(scope: str, score: str) -> None:
    logits_TE = torch.full((6, 5), -90.0, dtype=torch.float64)
    logits_TE[:, 3] = 90.0
    assert float(loss_alone(make_plan(logits_TE, 1, score), scope, num_sequences=2)) == pytest.approx(5.0, rel=1e-12)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 3])
def test_scopes_are_the_formula_over_their_tokens(score: str, k: int) -> None:
    plan = make_plan(logits(12, 5), k, score)
    whole = written_out(plan, slice(0, 12))
    assert float(loss_alone(plan, "global", num_sequences=3)) == pytest.approx(whole, rel=1e-12)
    assert float(loss_alone(plan, "rank", num_sequences=3)) == pytest.approx(whole, rel=1e-12)
    mean = sum(written_out(plan, slice(4 * b, 4 * b + 4)) for b in range(3)) / 3
    assert float(loss_alone(plan, "sequence", num_sequences=3)) == pytest.approx(mean, rel=1e-12)
    assert mean != pytest.approx(whole, rel=1e-6)


def test_z_loss_by_hand() -> None:
    """log(e^0 + e^0) = log 2 and log(e^1 + e^1) = 1 + log 2."""
    plan = make_plan(torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64))
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert float(loss_of(Z_LOSS, plan)) == pytest.approx(expected)


def test_z_loss_of_large_logits_is_finite() -> None:
    plan = make_plan(torch.full((3, 4), 1e4))
    loss = loss_of(Z_LOSS, plan)
    assert float(loss) == pytest.approx((1e4 + math.log(4)) ** 2, rel=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_no_tokens_cost_nothing(scope: str) -> None:
    for num_sequences in (0, 2):  # a rank without sequences, and sequences without tokens
        logits_TE = torch.zeros(0, 4, requires_grad=True)
        plan = make_plan(logits_TE)
        batch = batch_of(plan, num_sequences)
        loss = loss_of(balance_of(scope), plan, batch) + loss_of(Z_LOSS, plan, batch)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert logits_TE.grad is not None


# ---------------------------------------------------------------------------------------------------------------------
# Shares of ranks


def split(plan_logits: Tensor, sizes: list[int], k: int) -> list[RoutingPlan]:
    return [make_plan(part, k) for part in plan_logits.split(sizes)]


@pytest.mark.parametrize(
    "config",
    [balance_of("global"), balance_of("sequence"), balance_of("global", choices="first"), Z_LOSS],
    ids=loss_name,
)
@pytest.mark.parametrize("sequences", [[2, 1, 1], [4, 0, 0], [0, 1, 3]])
def test_shares_of_ranks_add_up_to_the_loss_of_one_rank(
    config: BalanceLossConfig | ZLossConfig, sequences: list[int]
) -> None:
    """Values and gradients, with unequal ranks and ranks without tokens (sequences of 3 tokens)."""
    together, apart = logits(12, 5).requires_grad_(), logits(12, 5).requires_grad_()
    (whole,) = shares([make_plan(together, 2)], [4], config)
    parts = shares(split(apart, [3 * n for n in sequences], 2), sequences, config)
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-13, atol=0)
    whole.backward()
    torch.stack(parts).sum().backward()
    torch.testing.assert_close(apart.grad, together.grad, rtol=1e-12, atol=1e-15)


def run_divided_sequences(rank: int, choices: str) -> tuple[float, Tensor]:
    """Three sequences of 4 tokens: rank 0 has the first token of each, rank 1 the last three; the third is padding
    alone, and so is rank 0's part of the second."""
    positions_S = torch.tensor([[0], [1, 2, 3]][rank])
    mask_BS = torch.tensor([[True] * 4, [False, True, True, True], [False] * 4])[:, positions_S]
    mine_BSE = logits(12, 5).view(3, 4, 5)[:, positions_S].requires_grad_()
    plan = make_plan(mine_BSE.flatten(0, 1), 2)
    plan = replace(plan, outcome_TK=plan.outcome_TK.masked_fill(~mask_BS.view(-1, 1), Outcome.NOT_ROUTED))
    context = StepContext(mask_BS=mask_BS, positions_S=positions_S)
    batch = token_batch(mine_BSE, context, dist.group.WORLD, dist.group.WORLD)
    share = loss_of(balance_of("sequence", choices=choices), plan, batch)
    share.backward()
    assert mine_BSE.grad is not None
    return float(share.detach()), mine_BSE.grad


@pytest.mark.parametrize("choices", ["all", "first"])
def test_shares_of_ranks_that_divide_sequences_add_up(choices: str) -> None:
    """To the mean over the two sequences that are not padding alone, each counted once; gradients too."""
    (first, first_grad), (second, second_grad) = run_ranks(2, run_divided_sequences, choices)
    together_TE = logits(12, 5).requires_grad_()
    num_counted = 1 if choices == "first" else 2
    losses = []
    for rows in (slice(0, 4), slice(5, 8)):  # the formula, written out
        probabilities_TE, ids_TK = together_TE[rows].softmax(-1), together_TE[rows].topk(num_counted).indices
        f_E = torch.stack([(ids_TK == expert).double().mean() for expert in range(5)])
        losses.append(5 * (f_E * probabilities_TE.mean(0)).sum())
    loss = torch.stack(losses).mean()
    assert first + second == pytest.approx(float(loss.detach()), rel=1e-12)
    loss.backward()
    gradient_BSE = torch.cat([first_grad, second_grad], dim=1)
    torch.testing.assert_close(gradient_BSE.flatten(0, 1), together_TE.grad, rtol=1e-12, atol=1e-15)


def test_the_mean_over_ranks_is_not_the_loss_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 9. Two ranks, each with an expert of its own: out of balance apart, balanced together."""
    monkeypatch.setattr(balance, "group_size", lambda group: 2)
    plans = [plan_of_probabilities([1 - 1e-12, 1e-12]), plan_of_probabilities([1e-12, 1 - 1e-12])]
    rank = torch.stack(shares(plans, [1, 1], balance_of("rank")))
    together = torch.stack(shares(plans, [1, 1], balance_of("global")))
    assert rank.tolist() == pytest.approx([1.0, 1.0])  # each half of its own loss, 2
    assert float(rank.sum()) == pytest.approx(2.0)
    assert float(together.sum()) == pytest.approx(1.0)


def test_the_global_loss_does_not_know_how_tokens_are_batched() -> None:
    """Any number of sequences, in any order."""
    logits_TE = logits(12, 5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    expected = loss_alone(make_plan(logits_TE, 2), "global", num_sequences=1)
    for num_sequences in (2, 3, 12):
        loss = loss_alone(make_plan(logits_TE[order], 2), "global", num_sequences)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)


def test_the_sequence_loss_does_not_know_how_sequences_are_batched() -> None:
    logits_TE = logits(12, 5)
    together = loss_alone(make_plan(logits_TE, 2), "sequence", num_sequences=3)
    alone = [loss_alone(make_plan(part, 2), "sequence", num_sequences=1) for part in logits_TE.split(4)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-13, atol=0)


def test_count_micro_step() -> None:
    """Choices of all k, first choices, tokens; and neither padding nor what was not routed."""
    plan = make_plan(torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), k=2)
    step = count_micro_step([], plan, batch_of(plan))
    assert all(counts.tolist() == [[1, 2, 1, 1, 0, 1, 2]] for counts in step.counts.values())
    step = count_micro_step([], plan, batch_of(plan, 2))
    assert step.counts["sequence"].tolist() == [[1, 1, 0, 1, 0, 0, 1], [0, 1, 1, 0, 0, 1, 1]]
    assert (step.num_blocks["global"], step.num_blocks["rank"], int(step.num_blocks["sequence"])) == (1, 1, 2)
    masked = replace(plan, outcome_TK=torch.tensor([[0, 0], [4, 4]], dtype=torch.uint8))
    step = count_micro_step([], masked, batch_of(plan, 2, torch.tensor([[True], [False]])))
    assert step.counts["global"].tolist() == [[1, 1, 0, 1, 0, 0, 1]]
    assert int(step.num_blocks["sequence"]) == 1  # the other is padding alone


def test_each_loss_has_its_name() -> None:
    plan = make_plan(logits(12, 5), 2)
    configs = [balance_of(scope) for scope in SCOPES] + [Z_LOSS]
    losses, pooled = router_losses(configs, plan, batch_of(plan, 3))
    assert list(losses) == ["balance_global", "balance_rank", "balance_sequence", "z_loss"]
    assert [loss_name(config) for config in configs] == list(losses)
    assert pooled == {}
    torch.testing.assert_close(losses["balance_sequence"], loss_alone(plan, "sequence", 3))  # without coefficients
    every = [balance_of("rank", choices=c, layers=n) for c in ("all", "first") for n in ("each", "pooled")]
    names = ["balance_rank", "balance_rank_pooled", "balance_rank_first", "balance_rank_first_pooled"]
    assert list(map(loss_name, every)) == names
    assert list(router_losses(every, plan, batch_of(plan))[1]) == names[1::2]


def test_no_loss_asks_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "all_reduce_sum", lambda x, group: pytest.fail("a collective"))
    plan = make_plan(logits(12, 5))
    assert router_losses([], plan, batch_of(plan)) == ({}, {})


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradient_goes_through_P_with_f_held(scope: str, score: str) -> None:
    """Against finite differences: the choices, and so f, stay as they are within the step."""
    assert torch.autograd.gradcheck(
        lambda logits_TE: loss_alone(make_plan(logits_TE, 2, score), scope, num_sequences=2),
        logits(6, 4).requires_grad_(),
    )


def test_gradient_of_the_z_loss() -> None:
    def loss(logits_TE: Tensor) -> Tensor:
        plan = make_plan(logits_TE)
        return loss_of(Z_LOSS, plan)

    assert torch.autograd.gradcheck(loss, logits(6, 4).requires_grad_())


def test_gradient_takes_tokens_away_from_the_full_expert() -> None:
    logits_TE = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    loss_alone(make_plan(logits_TE)).backward()
    assert logits_TE.grad is not None
    assert bool((logits_TE.grad[:, 0] > 0).all())  # descent lowers the logit of expert 0
    assert bool((logits_TE.grad[:, 1] < 0).all())


@pytest.mark.parametrize("level", [-50.0, -87.0, -100.0, -200.0, -1000.0])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_sigmoid_loss_of_very_negative_logits_is_finite(scope: str, level: float) -> None:
    """float32: sigmoid(-104) is 0, and so is the sum that the loss divides by."""
    logits_TE = (level + torch.tensor([[1.0, 0.0], [0.0, -1.0]])).requires_grad_()
    loss = loss_alone(make_plan(logits_TE, 1, "sigmoid"), scope)
    loss.backward()
    assert logits_TE.grad is not None
    assert bool(logits_TE.grad.isfinite().all())
    assert math.isfinite(float(loss.detach()))


@pytest.mark.parametrize(
    "level",
    [-20.0, -80.0, -100.0, -1000.0],
)
def test_a_sigmoid_router_cannot_sink_out_of_the_loss(level: float) -> None:
    """Trap 12: sigmoid(x) is exp(x) down there, so lowering all logits changes no share, nor may it the loss."""
    base = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -1.0], [0.0, 0.5, 0.0]])
    loss = loss_alone(make_plan(base + level, 1, "sigmoid"))
    assert float(loss) == pytest.approx(float(loss_alone(make_plan(base, 1, "softmax"))), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# transformers' losses


@pytest.mark.parametrize("k", [1, 2, 3])
def test_mixtral_counts_k_times_our_loss(k: int) -> None:
    """Its f is a share of tokens and adds up to k; ours is a share of choices and adds up to 1.

    For one layer, that is: over several, it averages f and P over the layers before it multiplies them.
    """
    logits_TE = logits(12, 5)
    theirs = modeling_mixtral.load_balancing_loss_func((logits_TE,), num_experts=5, top_k=k)
    ours = loss_alone(make_plan(logits_TE, k))
    torch.testing.assert_close(theirs.double(), k * ours, rtol=1e-6, atol=0)  # theirs is taken in float32


def test_switch_has_our_loss_of_each_sequence() -> None:
    logits_TE = logits(12, 5)
    plan = make_plan(logits_TE)
    theirs = modeling_switch_transformers.load_balancing_loss_func(
        plan.scores_TE.view(3, 4, 5), plan.expert_ids_TK.view(3, 4)
    )
    torch.testing.assert_close(theirs, loss_alone(plan, "sequence", num_sequences=3), rtol=1e-6, atol=0)


def test_switch_has_our_z_loss() -> None:
    logits_TE = logits(12, 5)
    plan = make_plan(logits_TE)
    theirs = modeling_switch_transformers.router_z_loss_func(logits_TE.view(3, 4, 5))
    ours = loss_of(Z_LOSS, plan, batch_of(plan, 3))
    torch.testing.assert_close(theirs, ours, rtol=1e-13, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# First choices


def test_the_loss_of_first_choices_by_hand() -> None:
    """First choices 0, 2: f = (1/2, 0, 1/2, 0); P = (0.35, 0.3, 0.25, 0.1); 4 * (0.175 + 0.125) = 1.2."""
    probabilities = torch.tensor([[0.4, 0.35, 0.15, 0.1], [0.3, 0.25, 0.35, 0.1]], dtype=torch.float64)
    plan = make_plan(probabilities.log(), k=2)
    for scope in SCOPES:
        assert float(loss_of(balance_of(scope, choices="first"), plan)) == pytest.approx(1.2, rel=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
def test_first_choices_of_top_1_are_all_choices(scope: str) -> None:
    plan = make_plan(logits(12, 5))
    first = loss_of(balance_of(scope, choices="first"), plan, batch_of(plan, 3))
    torch.testing.assert_close(first, loss_alone(plan, scope, 3), rtol=1e-13, atol=0)


def test_deepspeed_top_2_has_our_loss_of_first_choices() -> None:
    """It takes the mean over experts of P * f, times E twice: E * sum, which is ours. Value and gradient."""
    ours, theirs = logits(12, 5).requires_grad_(), logits(12, 5).requires_grad_()
    with peers_in_float64():
        expected, *_ = sharded_moe.top2gating(theirs, 1.0, 0, top2_2nd_expert_sampling=False)
    actual = loss_of(balance_of("global", choices="first"), make_plan(ours, 2))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert float(actual.detach()) != pytest.approx(float(loss_alone(make_plan(logits(12, 5), 2))), rel=1e-3)
    actual.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# Pooled over layers

POOLED = balance_of("global", layers="pooled")


def pooled_loss(layers: list[Tensor], k: int, mask_BS: Tensor | None = None) -> Tensor:
    """Of plans with these logits (T, E), one a layer."""
    terms = {}
    for number, logits_TE in enumerate(layers):
        plan = make_plan(logits_TE, k)
        if mask_BS is not None:
            unrouted_TK = ~mask_BS.flatten()[:, None]
            plan = replace(plan, outcome_TK=plan.outcome_TK.masked_fill(unrouted_TK, Outcome.NOT_ROUTED))
        _, terms[number] = router_losses([POOLED], plan, batch_of(plan, 3, mask_BS))
    return torch.stack([parts["balance_global_pooled"] for parts in pool_layers(terms).values()]).sum()


def test_a_pooled_loss_by_hand() -> None:
    """Layer 0 sends both tokens to expert 0, layer 1 both to expert 1, with the mirrored P: (0.75, 0.25).

    Pooled f = P = (1/2, 1/2): 2 * (1/4 + 1/4) = 1, balanced. Each for itself: 2 * 0.75 = 1.5.
    """
    layers = [torch.tensor([row] * 2, dtype=torch.float64).log() for row in ([0.75, 0.25], [0.25, 0.75])]
    plans = [make_plan(layer) for layer in layers]
    terms = {3 * n: router_losses([POOLED], plan, batch_of(plan))[1] for n, plan in enumerate(plans)}
    parts = pool_layers(terms)
    assert list(parts) == [0, 3], "by number of the layer"
    assert [float(part["balance_global_pooled"]) for part in parts.values()] == pytest.approx([0.5, 0.5], rel=1e-12)
    assert [float(loss_of(POOLED, plan)) for plan in plans] == pytest.approx([1.5, 1.5], rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_a_pooled_loss_is_transformers_load_balancing_loss(k: int, masked: bool) -> None:
    """Three layers, value and gradient. Theirs counts k times: its f adds up to k."""
    mask_BS = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool) if masked else None
    ours, theirs = ([logits(12, 5, seed).requires_grad_() for seed in range(3)] for _ in range(2))
    with peers_in_float64():
        attention_mask = None if mask_BS is None else mask_BS.long()
        expected = modeling_mixtral.load_balancing_loss_func(tuple(theirs), 5, k, attention_mask)
        expected.backward()
    actual = k * pooled_loss(ours, k, mask_BS)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    actual.backward()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-14)
    each = sum(float(loss_alone(make_plan(layer.detach(), k))) for layer in ours) / 3
    assert float(actual.detach()) != pytest.approx(k * each, rel=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("choices", ["all", "first"])
def test_a_pooled_loss_of_one_layer_is_its_own(scope: str, choices: str) -> None:
    config, plan = balance_of(scope, choices=choices, layers="pooled"), make_plan(logits(12, 5), 2)
    losses, terms = router_losses([config], plan, batch_of(plan, 3))
    (part,) = pool_layers({7: terms})[7].values()
    torch.testing.assert_close(part, losses[loss_name(config)], rtol=1e-13, atol=0)
    torch.testing.assert_close(part, loss_of(config, plan, batch_of(plan, 3)), rtol=1e-13, atol=0)


def test_nothing_to_pool() -> None:
    assert pool_layers({}) == {}
    assert pool_layers({1: {}, 3: {}}) == {1: {}, 3: {}}


def make_model(losses: list[dict[str, Any]]) -> Transformer:
    tree = {
        "vocab_size": 32,
        "num_layers": 3,
        "d_model": 8,
        "attention": {"num_heads": 2, "head_size": 4},
        "moe": {"num_experts": 5, "router": {"k": 2}, "losses": losses, "experts": {"hidden": 4}},
        "init_std": 0.5,
    }
    return build_model(ModelConfig.model_validate(tree), dtype=torch.float64, seed=1)


def test_a_models_pooled_loss_is_transformers_function_of_its_logits() -> None:
    """Three MoE blocks: the sum over blocks of the parts, times the coefficient, and the gradient of each router."""
    model = make_model([{"kind": "balance", "coefficient": 0.5, "layers": "pooled"}, {"kind": "z_loss"}])
    collected: list[Tensor] = []
    routers = [block.moe.router for block in model.blocks]
    for router in routers:
        router.register_forward_hook(lambda module, inputs, plan: collected.append(plan.logits_TE))
    mask_BS = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    tokens_BS = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    output = model(tokens_BS, StepContext(mask_BS=mask_BS))
    actual = torch.stack([losses["balance_global_pooled"] for losses in output.losses.values()]).sum()
    with peers_in_float64():
        theirs = modeling_mixtral.load_balancing_loss_func(tuple(collected), 5, 2, mask_BS.long())
    torch.testing.assert_close(actual, 0.5 * theirs / 2, rtol=1e-12, atol=0)

    weights = [router.weight for router in routers]
    own = torch.autograd.grad(actual, weights, retain_graph=True)
    torch.testing.assert_close(own, torch.autograd.grad(0.25 * theirs, weights), rtol=1e-10, atol=1e-14)
    reported = sum(float(stats.losses["balance_global_pooled"]) for stats in output.stats.values())
    assert reported == pytest.approx(float(theirs) / 2, rel=1e-12), "before the coefficient"
    assert [list(losses) for losses in output.losses.values()] == [["balance_global_pooled", "z_loss"]] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Padding, and the entropy


@pytest.mark.parametrize(
    "config", [*(balance_of(scope, choices=c) for scope in SCOPES for c in ("all", "first")), Z_LOSS], ids=loss_name
)
def test_padding_is_in_no_loss(config: BalanceLossConfig | ZLossConfig) -> None:
    """Two sequences cut to 4 and 2 of 4 tokens: the loss of the cut ones, and no gradient for padding."""
    mask_BS = torch.tensor([[True] * 4, [True, False, False, True]])
    padded, cut = logits(8, 5).requires_grad_(), logits(8, 5)[mask_BS.flatten()].requires_grad_()
    plan = make_plan(padded, 2)
    unrouted_TK = ~mask_BS.flatten()[:, None]
    plan = replace(plan, outcome_TK=plan.outcome_TK.masked_fill(unrouted_TK, Outcome.NOT_ROUTED))
    actual = loss_of(config, plan, batch_of(plan, 2, mask_BS))
    if isinstance(config, BalanceLossConfig) and config.scope == "sequence":
        halves = [make_plan(part, 2) for part in cut.split([4, 2])]
        expected = torch.stack([loss_of(config, half) for half in halves]).mean()
    else:
        expected = loss_of(config, make_plan(cut, 2))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    (own,), (other,) = torch.autograd.grad(actual, [padded]), torch.autograd.grad(expected, [cut])
    torch.testing.assert_close(own[mask_BS.flatten()], other, rtol=1e-12, atol=1e-15)
    assert not own[~mask_BS.flatten()].any()


@pytest.mark.parametrize("scope", SCOPES)
def test_a_layers_losses_leave_padding_out(scope: str) -> None:
    """The same through a layer, whatever the padded tokens hold."""
    losses = [{"kind": "balance", "scope": scope}, {"kind": "balance", "scope": scope, "choices": "first"}]
    tree = {"d_model": 6, "num_experts": 4, "losses": [*losses, {"kind": "z_loss"}], "experts": {"hidden": 4}}
    layer = MoELayer(MoEConfig.model_validate(tree)).double()
    layer.router.weight.data *= 50
    mask_BS, x_BSD = torch.tensor([[True] * 5 + [False] * 2]), logits(7, 6)[None]
    expected = layer(x_BSD[:, :5], StepContext()).losses
    for filling in (0.0, 99.0):
        filled = x_BSD.masked_fill(~mask_BS[..., None], filling)
        torch.testing.assert_close(layer(filled, StepContext(mask_BS=mask_BS)).losses, expected, rtol=1e-12, atol=0)


def test_a_micro_step_of_padding_alone_costs_nothing() -> None:
    mask_BS, logits_TE = torch.zeros(2, 3, dtype=torch.bool), logits(6, 5).requires_grad_()
    plan = replace(make_plan(logits_TE), outcome_TK=torch.full((6, 1), Outcome.NOT_ROUTED, dtype=torch.uint8))
    losses = [loss_of(config, plan, batch_of(plan, 2, mask_BS)) for config in (*map(balance_of, SCOPES), Z_LOSS)]
    assert [float(loss.detach()) for loss in losses] == [0.0] * 4
    torch.stack(losses).sum().backward()
    assert logits_TE.grad is not None
    assert not logits_TE.grad.any()


def test_the_routers_entropy_by_hand() -> None:
    """Sum over real tokens of -p log p: (1/2, 1/4, 1/4) has 1.5 log 2, (1/2, 1/2, 0) log 2; the third is padding."""
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    plan = make_plan(probabilities.log())
    counts = count_choices(plan, plan, torch.tensor([True, True, False]))
    assert float(counts["entropy"]) == pytest.approx(2.5 * math.log(2), rel=1e-12)
    assert int(counts["num_tokens"]) == 2
    sigmoid = make_plan(torch.zeros(4, 8, dtype=torch.float64), score="sigmoid")  # scores of 1/2, shares of 1/8
    assert float(count_choices(sigmoid, sigmoid, None)["entropy"]) == pytest.approx(4 * math.log(8), rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Bias update


def test_update_balance_bias_by_hand() -> None:
    """Mean load 5: the full expert goes down by the rate, the empty ones up, the one at the mean stays."""
    bias_E = torch.tensor([0.5, 0.0, -0.25, 0.0], dtype=torch.float64)
    update_balance_bias(bias_E, torch.tensor([12, 2, 5, 1]), rate=0.125)
    assert bias_E.tolist() == [0.375, 0.125, -0.25, 0.125]


def test_update_balance_bias_of_equal_or_no_load_changes_nothing() -> None:
    bias_E = torch.tensor([0.5, -0.5])
    for load in ([3, 3], [0, 0]):
        update_balance_bias(bias_E, torch.tensor(load), rate=0.1)
    assert bias_E.tolist() == [0.5, -0.5]


def test_update_balance_bias_sees_a_difference_of_one_in_a_large_load() -> None:
    """2^24 + 1 is no float32 number."""
    bias_E = torch.zeros(2)
    update_balance_bias(bias_E, torch.tensor([2**24 + 1, 2**24]), rate=1.0)
    assert bias_E.tolist() == [-1.0, 1.0]


def test_repeated_updates_balance_a_skewed_router() -> None:
    """DeepSeek-V3's use of it: expert 3 is most tokens' favourite until its bias has sunk."""
    scores_TE = logits(200, 4).sigmoid()
    bias_E = torch.zeros(4, dtype=torch.float64)
    for _ in range(400):
        choices_E = (scores_TE + bias_E).topk(1).indices.flatten().bincount(minlength=4)
        update_balance_bias(bias_E, choices_E, rate=0.002)
    assert int(scores_TE.topk(1).indices.flatten().bincount(minlength=4)[3]) > 100
    assert int(choices_E.max()) <= 60
