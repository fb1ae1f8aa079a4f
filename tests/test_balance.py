"""Balance losses, z-loss and the bias update: numbers by hand, the formulas written out, and shares that add up.

Several ranks are simulated by splitting one micro-step's tokens: each part computes its share with the totals of all.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral import modeling_mixtral
from transformers.models.switch_transformers import modeling_switch_transformers

from expert_parallel.moe import balance
from expert_parallel.moe.balance import (
    BalanceLossConfig,
    Tokens,
    ZLossConfig,
    balance_loss,
    count_tokens,
    loss_name,
    router_losses,
    update_balance_bias,
    z_loss,
)
from expert_parallel.moe.plan import Reason, RoutingPlan

SCOPES = ["global", "rank", "sequence"]


def make_plan(logits_TE: Tensor, k: int = 1, score: str = "softmax") -> RoutingPlan:
    scores_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    probabilities_TE = logits_TE.softmax(-1) if score == "softmax" else F.logsigmoid(logits_TE).softmax(-1)
    expert_ids_TK = logits_TE.detach().topk(k).indices
    reason_TK = torch.full_like(expert_ids_TK, Reason.KEPT, dtype=torch.uint8)
    weights_TK = scores_TE.gather(1, expert_ids_TK)
    return RoutingPlan(logits_TE, scores_TE, probabilities_TE, expert_ids_TK, weights_TK, reason_TK, logits_TE.shape[1])


def plan_of_probabilities(*probabilities: list[float]) -> RoutingPlan:
    return make_plan(torch.tensor(probabilities, dtype=torch.float64).log())


def balance_of(scope: str) -> BalanceLossConfig:
    return BalanceLossConfig(kind="balance", scope=scope)


def loss_alone(plan: RoutingPlan, scope: str = "global", num_sequences: int = 1) -> Tensor:
    """The loss of one rank that holds the whole micro-step."""
    return balance_loss(balance_of(scope), plan, count_tokens(plan, num_sequences, group=None))


def shares(plans: list[RoutingPlan], num_sequences: list[int], config: BalanceLossConfig | ZLossConfig) -> list[Tensor]:
    """Each simulated rank's share of the loss, with the totals that the all-reduce would give."""
    alone = [count_tokens(plan, n, group=None) for plan, n in zip(plans, num_sequences, strict=True)]
    total_tokens, total_sequences, choices_E = (
        torch.stack([getattr(tokens, name) for tokens in alone]).sum(0)
        for name in ("total_tokens", "total_sequences", "choices_E")
    )
    function = balance_loss if isinstance(config, BalanceLossConfig) else z_loss
    return [
        function(config, plan, Tokens(None, n, total_tokens, total_sequences, choices_E))
        for plan, n in zip(plans, num_sequences, strict=True)
    ]


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
    assert float(z_loss(ZLossConfig(kind="z_loss"), plan, count_tokens(plan, 1, None))) == pytest.approx(expected)


def test_z_loss_of_large_logits_is_finite() -> None:
    plan = make_plan(torch.full((3, 4), 1e4))
    loss = z_loss(ZLossConfig(kind="z_loss"), plan, count_tokens(plan, 1, None))
    assert float(loss) == pytest.approx((1e4 + math.log(4)) ** 2, rel=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_no_tokens_cost_nothing(scope: str) -> None:
    for num_sequences in (0, 2):  # a rank without sequences, and sequences without tokens
        logits_TE = torch.zeros(0, 4, requires_grad=True)
        plan = make_plan(logits_TE)
        tokens = count_tokens(plan, num_sequences, group=None)
        loss = balance_loss(balance_of(scope), plan, tokens) + z_loss(ZLossConfig(kind="z_loss"), plan, tokens)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert logits_TE.grad is not None


# ---------------------------------------------------------------------------------------------------------------------
# Shares of ranks


def split(plan_logits: Tensor, sizes: list[int], k: int) -> list[RoutingPlan]:
    return [make_plan(part, k) for part in plan_logits.split(sizes)]


@pytest.mark.parametrize("config", [balance_of("global"), balance_of("sequence"), ZLossConfig(kind="z_loss")])
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


def test_count_tokens() -> None:
    plan = make_plan(torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), k=2)
    tokens = count_tokens(plan, num_sequences=1, group=None)
    assert tokens.choices_E.tolist() == [1, 2, 1]
    assert (float(tokens.total_tokens), float(tokens.total_sequences)) == (2.0, 1.0)


def test_each_loss_has_its_name() -> None:
    plan = make_plan(logits(12, 5), 2)
    configs = [balance_of(scope) for scope in SCOPES] + [ZLossConfig(kind="z_loss")]
    losses = router_losses(configs, plan, count_tokens(plan, 3, None))
    assert list(losses) == ["balance_global", "balance_rank", "balance_sequence", "z_loss"]
    assert [loss_name(config) for config in configs] == list(losses)
    torch.testing.assert_close(losses["balance_sequence"], loss_alone(plan, "sequence", 3))  # without coefficients


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
        return z_loss(ZLossConfig(kind="z_loss"), plan, count_tokens(plan, 1, None))

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
    ours = z_loss(ZLossConfig(kind="z_loss"), plan, count_tokens(plan, 3, None))
    torch.testing.assert_close(theirs, ours, rtol=1e-13, atol=0)


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
