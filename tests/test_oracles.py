"""Layers and models of others as oracles: the same weights in theirs and in ours, equal outputs and gradients.

transformers: Mixtral (block and whole model), OLMoE, Qwen3-MoE, DeepSeek-V3, Switch. DeepSpeed: its three gates.
From their descriptions: the MoE of the lessons, and the uOmni layer. All in float64.
"""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from expert_parallel.model.transformer import ModelConfig
from expert_parallel.moe.capacity.policies import FactorConfig, apply_capacity, expert_capacity
from expert_parallel.moe.context import pass_seed
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.routers.base import LinearRouter, TopKRouter, TopKRouterConfig
from expert_parallel.moe.routers.losses import BalanceLossConfig, router_losses
from expert_parallel.moe.routers.noisy import GShardConfig, GShardRouter, NoisyTopKConfig, NoisyTopKRouter
from expert_parallel.moe.types import RoutingPlan
from expert_parallel.nn import random
from expert_parallel.nn.random import Stream
from tests.oracles import (
    D_MODEL,
    HIDDEN,
    batch_of,
    close,
    compare_blocks,
    compare_mixtral_models,
    compare_switch_layers,
    compare_with_loops,
    dense,
    draw,
    gradients,
    make_layer,
    randomise,
)
from tests.peers import peers_in_float64

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
from deepspeed.moe import sharded_moe as deepspeed

# ---------------------------------------------------------------------------------------------------------------------
# transformers: blocks with a softmax or sigmoid router and SwiGLU experts


def swiglu_layer(**router: Any) -> MoELayer:
    return make_layer(6, router=router, experts={"hidden": HIDDEN})


def test_mixtral_block() -> None:
    sizes = {"hidden_size": D_MODEL, "intermediate_size": HIDDEN, "num_local_experts": 6, "num_experts_per_tok": 2}
    with peers_in_float64():
        theirs = MixtralSparseMoeBlock(MixtralConfig(**sizes, experts_implementation="eager")).double()
    compare_blocks(theirs, swiglu_layer(k=2))


@pytest.mark.parametrize("normalise", [False, True])
def test_olmoe_block(normalise: bool) -> None:
    """OLMoE's own setting is norm_topk_prob false: the weights are the probabilities among all experts."""
    sizes = {"hidden_size": D_MODEL, "intermediate_size": HIDDEN, "num_experts": 6, "num_experts_per_tok": 3}
    with peers_in_float64():
        config = OlmoeConfig(**sizes, norm_topk_prob=normalise, experts_implementation="eager")
        theirs = OlmoeSparseMoeBlock(config).double()
    compare_blocks(theirs, swiglu_layer(k=3, normalise=normalise))


def test_qwen3_moe_block() -> None:
    sizes = {"hidden_size": D_MODEL, "moe_intermediate_size": HIDDEN, "num_experts": 6, "num_experts_per_tok": 4}
    with peers_in_float64():
        config = Qwen3MoeConfig(**sizes, norm_topk_prob=True, experts_implementation="eager")
        theirs = Qwen3MoeSparseMoeBlock(config).double()
    compare_blocks(theirs, swiglu_layer(k=4))


DEEPSEEK_BIAS_E = torch.tensor([0.3, -0.2, 0.0, 0.1, -0.4, 0.2], dtype=torch.float64)


def deepseek_v3_block(bias_E: Tensor, num_groups: int, group_limit: int) -> DeepseekV3MoE:
    with peers_in_float64():
        config = DeepseekV3Config(
            hidden_size=D_MODEL,
            moe_intermediate_size=HIDDEN,
            n_routed_experts=6,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=num_groups,
            topk_group=group_limit,
            routed_scaling_factor=2.5,
            experts_implementation="eager",
        )
        theirs = DeepseekV3MoE(config).double()
    theirs.gate.e_score_correction_bias.copy_(bias_E)
    return theirs


@pytest.mark.parametrize(("num_groups", "group_limit"), [(1, 1), (3, 2), (2, 1)])
def test_deepseek_v3_block(num_groups: int, group_limit: int) -> None:
    """Sigmoid scores, a bias that moves the choice, weights normalised and scaled, two shared experts in one network, 3
    experts of 6 within the best groups. They add 1e-20 to the sum of the weights."""
    theirs = deepseek_v3_block(DEEPSEEK_BIAS_E, num_groups, group_limit)
    router = {"k": 3, "score": "sigmoid", "scale": 2.5, "balance_bias_rate": 0.001}
    groups = {"group_limit": {"count": num_groups, "limit": group_limit}}
    shared = {"hidden": 2 * HIDDEN}
    ours = make_layer(6, router={**router, **groups}, experts={"hidden": HIDDEN}, shared_experts=shared)
    compare_blocks(theirs, ours)


@pytest.mark.parametrize(("num_groups", "group_limit"), [(1, 1), (3, 2), (2, 1)])
def test_deepseek_v3_choices_follow_the_bias_and_the_groups(num_groups: int, group_limit: int) -> None:
    """The chosen experts and their weights; the bias and the group limit of this test change some choices."""
    theirs, x_TD = deepseek_v3_block(DEEPSEEK_BIAS_E, num_groups, group_limit), draw(40, D_MODEL)
    randomise(theirs)
    options = {"k": 3, "score": "sigmoid", "scale": 2.5, "balance_bias_rate": 0.001}
    groups = {"count": num_groups, "limit": group_limit}
    state = {"weight": theirs.gate.weight.data, "balance_bias_E": DEEPSEEK_BIAS_E}
    router = TopKRouter(TopKRouterConfig.model_validate({**options, "group_limit": groups}), D_MODEL, 6).double()
    router.load_state_dict(state)
    with peers_in_float64():
        _, their_weights_TK, their_ids_TK = theirs.gate(x_TD)
    plan = router(x_TD, batch_of(x_TD))
    expected = torch.zeros(40, 6, dtype=torch.float64).scatter(1, their_ids_TK, their_weights_TK)
    close(dense(plan)[0], expected)  # their k choices come in no order

    free = TopKRouter(TopKRouterConfig.model_validate(options), D_MODEL, 6).double()
    free.load_state_dict(state)
    assert torch.equal(dense(free(x_TD, batch_of(x_TD)))[1], expected > 0) is (num_groups == group_limit)
    assert router.balance_bias_E is not None
    router.balance_bias_E.zero_()
    assert not torch.equal(dense(router(x_TD, batch_of(x_TD)))[1], expected > 0)


# ---------------------------------------------------------------------------------------------------------------------
# transformers: the whole of Mixtral


def test_mixtral_model() -> None:
    """Two blocks with grouped heads of a free size, RoPE, RMSNorm: logits, cross entropy, every gradient."""
    with peers_in_float64():
        config = MixtralConfig(
            vocab_size=19,
            hidden_size=D_MODEL,
            intermediate_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            num_local_experts=4,
            num_experts_per_tok=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            attn_implementation="eager",
            experts_implementation="eager",
        )
        theirs = MixtralForCausalLM(config).double()
    own_config = {
        "vocab_size": 19,
        "num_layers": 2,
        "d_model": D_MODEL,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_size": 6},
        "moe": {"num_experts": 4, "router": {"k": 2}, "experts": {"hidden": HIDDEN}},
        "position": {"kind": "rope", "theta": 1e6},
        "tied_embeddings": False,
    }
    compare_mixtral_models(theirs, ModelConfig.model_validate(own_config))


# ---------------------------------------------------------------------------------------------------------------------
# transformers: Switch


@pytest.mark.parametrize(
    ("num_sequences", "capacity", "limits"),
    [
        (1, 4, {"kind": "factor", "train": 0.6, "minimum": 0}),
        (1, 1, {"kind": "factor", "train": 0.1, "minimum": 0}),
        (1, 24, {"kind": "factor", "train": 4.0, "minimum": 0}),
        (3, 4, {"kind": "factor", "train": 0.6, "minimum": 0, "scope": "sequence"}),
        (3, 5, {"kind": "absolute", "train": 5, "eval": 24, "scope": "sequence"}),
    ],
)
def test_switch_layer(num_sequences: int, capacity: int, limits: dict[str, Any]) -> None:
    """Sequences of 24 tokens and 4 experts: drops, probabilities, losses, output, gradients."""
    num_tokens, num_experts = 24, 4
    if limits["kind"] == "factor":
        assert expert_capacity(limits["train"], 0, num_tokens, 1, num_experts) == capacity
    ours = make_layer(
        num_experts,
        router={"k": 1, "normalise": False},
        capacity=limits,
        losses=[{"kind": "balance", "scope": "sequence"}, {"kind": "z_loss"}],
        experts={"hidden": HIDDEN, "activation": "relu"},
    )
    dropped = compare_switch_layers(ours, capacity, num_sequences, num_tokens)
    assert (dropped > 0) is (capacity < 24)


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed 0.19.8: its gates return (loss, weights_TEC, kept_TEC, choices_E), with C the place in the expert's buffer


def own_gate(logits_TE: Tensor, k: int, factor: float, normalise: bool = True, **capacity: Any) -> RoutingPlan:
    config = TopKRouterConfig(k=k, normalise=normalise)
    return gate(TopKRouter(config, logits_TE.shape[1], logits_TE.shape[1]), logits_TE, factor, **capacity)


def gate(router: LinearRouter, logits_TE: Tensor, factor: float, **capacity: Any) -> RoutingPlan:
    """The router on these logits, then capacity. `renormalise` as the layer does it."""
    nn.init.eye_(router.double().weight)
    batch = batch_of(logits_TE)
    config = FactorConfig(kind="factor", train=factor, minimum=0, **capacity)
    plan, _ = apply_capacity(config, router(logits_TE, batch), batch, training=True)
    if not config.renormalise:
        return plan
    return replace(plan, weights_TK=router.weights(plan, plan.expert_ids_TK, plan.kept_TK))


def own_balance_loss(plan: RoutingPlan, choices: str = "all") -> Tensor:
    losses, _ = router_losses([BalanceLossConfig(kind="balance", choices=choices)], plan, batch_of(plan.logits_TE))
    (loss,) = losses.values()
    return loss


def skewed_logits(num_tokens: int = 40, num_experts: int = 5) -> Tensor:
    return draw(num_tokens, num_experts) + torch.arange(num_experts, dtype=torch.float64) / 2


def test_deepspeed_capacity() -> None:
    """Theirs is a ceiling in float32: equal to ours, or 1 more where float32 is above the exact number."""
    more = 0
    for num_tokens in range(1, 80):
        for num_experts in (2, 3, 5, 8):
            for percent in (25, 60, 100, 120, 125, 200):
                gates = torch.empty(num_tokens, num_experts)
                theirs = int(deepspeed._capacity(gates, torch.tensor(percent / 100), torch.tensor(0)))
                ours = expert_capacity(percent / 100, 0, num_tokens, 1, num_experts)
                assert theirs - ours in (0, 1), (num_tokens, num_experts, percent)
                more += theirs - ours
    assert more > 0  # 25 tokens, 2 experts, 1.2: they say 16, and 25 / 2 * 1.2 is 15
    assert int(deepspeed._capacity(torch.empty(8, 4), torch.tensor(1.0), torch.tensor(4))) == 4
    assert expert_capacity(1.0, 4, 8, 1, 4) == 4


def test_deepspeed_top_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random token selection keeps the tokens with the largest numbers: with falling ones it drops by position."""
    logits_TE = skewed_logits()
    falling = {logits_TE.device: lambda shape: torch.linspace(1, 0.5, shape[0], dtype=torch.float64)[:, None]}
    monkeypatch.setattr(deepspeed, "exp_selection_uniform_map", falling)
    with peers_in_float64():
        loss, weights_TEC, kept_TEC, choices_E = deepspeed.top1gating(logits_TE, 0.75, 0)
    plan = own_gate(logits_TE, k=1, factor=0.75, normalise=False)
    weights_TE, kept_TE = dense(plan)
    assert 0.05 < float((~plan.kept_TK).double().mean()) < 0.5
    assert torch.equal(kept_TE, kept_TEC.any(-1))
    close(weights_TE, weights_TEC.sum(-1))
    close(own_balance_loss(plan), loss)
    assert torch.equal(plan.expert_ids_TK.flatten().bincount(minlength=5), choices_E)


def test_deepspeed_top_1_without_random_selection_keeps_arbitrary_tokens() -> None:
    """Trap 13, and so only the numbers kept are compared: it takes a top-k over a 0/1 mask."""
    logits_TE = skewed_logits(64, 4)
    with peers_in_float64():
        _, _, kept_TEC, _ = deepspeed.top1gating(logits_TE, 0.75, 0, use_rts=False)
    plan = own_gate(logits_TE, k=1, factor=0.75, normalise=False)
    assert torch.equal(dense(plan)[1].sum(0), kept_TEC.any(-1).sum(0))
    chosen, kept = (plan.expert_ids_TK[:, 0] == 3).nonzero(), dense(plan)[1][:, 3].nonzero()
    assert 0 < len(kept) < len(chosen)
    assert torch.equal(kept, chosen[: len(kept)])  # ours are the first


def test_deepspeed_top_2() -> None:
    """GShard's gate: the same choices, places, drops; the loss over first choices; weights that are divided by what is
    left after dropping if `renormalise` asks for it, and that else stay as they were (trap 18)."""
    logits_TE = skewed_logits()
    with peers_in_float64():
        loss, weights_TEC, kept_TEC, choices_E = deepspeed.top2gating(
            logits_TE.clone(), 0.75, 0, top2_2nd_expert_sampling=False
        )
    plan = own_gate(logits_TE, k=2, factor=0.75)
    weights_TE, kept_TE = dense(plan)
    assert 0.05 < float((~plan.kept_TK).double().mean()) < 0.5
    assert bool((plan.kept_TK.sum(1) == 1).any())  # tokens that lost one of their two
    assert torch.equal(kept_TE, kept_TEC.any(-1))
    close(weights_TE / weights_TE.sum(1, keepdim=True).clamp(min=1e-300), weights_TEC.sum(-1))
    renormalised = own_gate(logits_TE, k=2, factor=0.75, renormalise=True)
    close(dense(renormalised)[0], weights_TEC.sum(-1))
    assert torch.equal(plan.expert_ids_TK.flatten().bincount(minlength=5), choices_E)
    close(own_balance_loss(plan, choices="first"), loss)
    close(own_balance_loss(own_gate(logits_TE, k=1, factor=1.0, normalise=False)), loss)


def test_deepspeed_rsample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-1 of noisy logits, weighed by the clean ones, with our Gumbel numbers in the place of theirs."""
    logits_TE = skewed_logits()
    batch = batch_of(logits_TE)
    noise_TE = random.gumbel(pass_seed(batch.context, Stream.NOISE), batch.index_T, 5)
    monkeypatch.setattr(deepspeed, "gumbel_rsample", lambda shape, device: noise_TE)
    falling = {logits_TE.device: lambda shape: torch.linspace(1, 0.5, shape[0], dtype=torch.float64)[:, None]}
    monkeypatch.setattr(deepspeed, "exp_selection_uniform_map", falling)
    with peers_in_float64():
        loss, weights_TEC, kept_TEC, choices_E = deepspeed.top1gating(logits_TE, 0.75, 0, noisy_gate_policy="RSample")
    config = NoisyTopKConfig(kind="noisy_top_k", k=1, noise="gumbel", normalise=False)
    plan = gate(NoisyTopKRouter(config, 5, 5), logits_TE, 0.75)
    assert not torch.equal(plan.expert_ids_TK[:, 0], logits_TE.argmax(1))
    weights_TE, kept_TE = dense(plan)
    assert 0.05 < float((~plan.kept_TK).double().mean()) < 0.5
    assert torch.equal(kept_TE, kept_TEC.any(-1))
    close(weights_TE, weights_TEC.sum(-1))
    close(own_balance_loss(plan), loss)
    assert torch.equal(plan.expert_ids_TK.flatten().bincount(minlength=5), choices_E)


def test_deepspeed_top_2_with_a_sampled_second_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default: first choices by clean logits, second ones by noisy logits, weights of what is left sum to 1."""
    logits_TE = skewed_logits()
    batch = batch_of(logits_TE)
    noise_TE = random.gumbel(pass_seed(batch.context, Stream.SECOND_EXPERT), batch.index_T, 5)
    monkeypatch.setattr(deepspeed, "gumbel_rsample", lambda shape, device: noise_TE)
    with peers_in_float64():
        loss, weights_TEC, kept_TEC, choices_E = deepspeed.top2gating(logits_TE.clone(), 0.75, 0)
    plan = gate(GShardRouter(GShardConfig(kind="gshard", second="gumbel"), 5, 5), logits_TE, 0.75, renormalise=True)
    assert not torch.equal(plan.expert_ids_TK[:, 1], logits_TE.argsort(1, descending=True)[:, 1])
    weights_TE, kept_TE = dense(plan)
    assert bool((plan.kept_TK.sum(1) == 1).any())  # tokens that lost one of their two
    assert torch.equal(kept_TE, kept_TEC.any(-1))
    close(weights_TE, weights_TEC.sum(-1))
    close(own_balance_loss(plan, choices="first"), loss)
    assert torch.equal(plan.expert_ids_TK.flatten().bincount(minlength=5), choices_E)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_deepspeed_top_k_by_probability(k: int) -> None:
    """The same choices, drops, and loss over all choices. It too divides by the weights left after dropping."""
    logits_TE = skewed_logits()
    with peers_in_float64():
        loss, weights_TEC, kept_TEC, choices_E = deepspeed.topkgating(logits_TE, k, 0.75, 0)
    plan = own_gate(logits_TE, k=k, factor=0.75, priority="probability", normalise=False)
    weights_TE, kept_TE = dense(plan)
    assert 0.05 < float((~plan.kept_TK).double().mean()) < 0.5
    assert torch.equal(kept_TE, kept_TEC.any(-1))
    close(weights_TE / weights_TE.sum(1, keepdim=True).clamp(min=1e-300), weights_TEC.sum(-1))
    if k > 1:  # a single weight would be 1 and is refused
        renormalised = own_gate(logits_TE, k=k, factor=0.75, priority="probability", renormalise=True)
        close(dense(renormalised)[0], weights_TEC.sum(-1))
    assert torch.equal(plan.expert_ids_TK.flatten().bincount(minlength=5), choices_E)
    close(own_balance_loss(plan), loss)


def test_deepspeed_top_k_by_position_stands_in_token_order() -> None:
    """It lets an early token's second choice go before a later one's first: our `first_choices_first: false`."""
    logits_TE = skewed_logits()
    with peers_in_float64():
        _, _, kept_1_TEC, _ = deepspeed.topkgating(logits_TE, 1, 0.75, 0, drop_policy="position")
        _, weights_TEC, kept_2_TEC, _ = deepspeed.topkgating(logits_TE, 2, 0.75, 0, drop_policy="position")
    assert torch.equal(dense(own_gate(logits_TE, 1, 0.75, normalise=False))[1], kept_1_TEC.any(-1))
    in_token_order = own_gate(logits_TE, 2, 0.75, first_choices_first=False, renormalise=True)
    assert torch.equal(dense(in_token_order)[1], kept_2_TEC.any(-1))
    close(dense(in_token_order)[0], weights_TEC.sum(-1))
    plan = own_gate(logits_TE, 2, 0.75)
    kept_TE = dense(plan)[1]
    assert torch.equal(kept_TE.sum(0), kept_2_TEC.any(-1).sum(0))
    first_TE = F.one_hot(plan.expert_ids_TK[:, 0], 5).bool()
    assert int((kept_TE & first_TE).sum()) > int((kept_2_TEC.any(-1) & first_TE).sum())


# ---------------------------------------------------------------------------------------------------------------------
# From their descriptions


class LessonMoE(nn.Module):
    """Output = sum over the chosen experts of gate_i * Expert_i(x); unchosen experts are not run.

    Expert = Linear(d, c * d), ReLU, Linear(c * d, d), Dropout. Gates: softmax of the chosen logits.
    """

    def __init__(self, d: int, c: int, num_experts: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.gate = nn.Linear(d, num_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, c * d), nn.ReLU(), nn.Linear(c * d, d), nn.Dropout(0.0))
            for _ in range(num_experts)
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        rows = []
        for x in x_TD:
            logits, chosen = self.gate(x).topk(self.k)
            gates = logits.softmax(-1)
            rows.append(sum(gate * self.experts[int(i)](x) for gate, i in zip(gates, chosen, strict=True)))
        return torch.stack(rows)


def test_the_moe_of_the_lessons() -> None:
    theirs = LessonMoE(D_MODEL, c=4, num_experts=8, k=2).double()
    randomise(theirs)
    ours = make_layer(
        8,
        router={"k": 2, "bias": True},
        experts={"hidden": 4 * D_MODEL, "activation": "relu", "bias": True},
    )
    first = [expert[0] for expert in theirs.experts]
    second = [expert[2] for expert in theirs.experts]

    def joined(attribute: str) -> dict[str, Tensor]:
        """Their values, or their gradients, under our names."""

        def get(parameter: nn.Parameter) -> Tensor:
            value = getattr(parameter, attribute)
            return torch.zeros_like(parameter) if value is None else value  # unchosen experts were not run

        return {
            "router.weight": get(theirs.gate.weight),
            "router.bias": get(theirs.gate.bias),
            "experts.w_in": torch.stack([get(linear.weight).T for linear in first]),
            "experts.b_in": torch.stack([get(linear.bias) for linear in first]),
            "experts.w_out": torch.stack([get(linear.weight).T for linear in second]),
            "experts.b_out": torch.stack([get(linear.bias) for linear in second]),
        }

    ours.load_state_dict(joined("data"))
    x, their_x = (draw(20, D_MODEL).requires_grad_() for _ in range(2))
    upstream = draw(20, D_MODEL, seed=1)
    expected, actual = theirs(their_x), ours(x).y
    close(actual, expected)
    expected.backward(upstream)
    actual.backward(upstream)
    close(x.grad, their_x.grad, "input")
    for name, gradient in gradients(ours).items():
        close(gradient, joined("grad")[name], name)


def test_the_uomni_layer() -> None:
    """At its own size: d = 256, 8 experts of hidden size 4d / 8."""
    d = 256
    ours = make_layer(8, d_model=d, router={"k": 2}, experts={"hidden": 4 * d // 8, "activation": "gelu"})
    assert sum(p.numel() for p in ours.experts.parameters()) == 2 * d * 4 * d  # as many as the dense layer's
    compare_with_loops(ours)
