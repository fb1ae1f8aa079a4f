"""The reference step that `verify` compares every layout with, itself compared with what is not ours: transformers'
Mixtral, torch's own attention, norms, cross entropy, clipping and AdamW; and with the product on one rank.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expert_parallel.model.parallelize import build_model
from expert_parallel.model.transformer import ModelConfig
from expert_parallel.training.config import Config, TrainingConfig
from expert_parallel.verify import reference_model as slow
from expert_parallel.verify import system_under_test
from expert_parallel.verify.compare import actual_tensors, expected_tensors
from expert_parallel.verify.reference import ReferenceStep, reference_step
from expert_parallel.verify.reference_attention import attention
from expert_parallel.verify.reference_model import TokenPartition
from expert_parallel.verify.reference_optimizer import ReferenceState, adamw_step, reference_rate
from expert_parallel.verify.run import perturb
from tests.peers import peers_in_float64
from tests.ranks import run_ranks
from tests.test_mixtral import MIXTRAL, logical_tensors
from tests.test_verify import config_of, runtime_of

SEED = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(num_sequences: int, length: int) -> TokenPartition:
    return [(torch.arange(num_sequences), torch.arange(length))]


def training_of(**settings: Any) -> TrainingConfig:
    tree = {"steps": 10, "global_batch": 6, "sequence_length": 8, "clip_norm": 0.1, "schedule": {"warmup_steps": 4}}
    return TrainingConfig.model_validate({**tree, **settings})


# --------------------------------------------------------------------------------------------------- part by part


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_attention_is_torch_s(heads: int, kv_heads: int) -> None:
    """Without rotation: learned positions."""
    settings = {"num_heads": heads, "num_kv_heads": kv_heads, "head_size": 6, "bias": True}
    position = {"kind": "learned", "max_length": 9}
    tree = {"num_layers": 1, "d_model": 10, "attention": settings, "ffn": {"hidden": 4}, "position": position}
    model = ModelConfig.model_validate(tree)
    sizes = {"query": (24, 10), "key": (6 * kv_heads, 10), "value": (6 * kv_heads, 10), "out": (10, 24)}
    weights = {f"{name}.weight": draw(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    weights |= {f"{name}.bias": draw(size[0], seed=9 + i) for i, (name, size) in enumerate(sizes.items())}
    x_BSD = draw(3, 7, 10)
    query, key, value = (
        F.linear(x_BSD, weights[f"{name}.weight"], weights[f"{name}.bias"]).unflatten(-1, (-1, 6)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    expected = F.linear(attended.transpose(1, 2).flatten(2), weights["out.weight"], weights["out.bias"])
    torch.testing.assert_close(attention(model, 0, weights, x_BSD), expected, rtol=1e-12, atol=1e-12)


def test_norms_activations_and_cross_entropy_are_torch_s() -> None:
    x, weight, bias = draw(5, 8), draw(8, seed=1), draw(8, seed=2)
    config = ModelConfig.model_validate(
        {"num_layers": 1, "d_model": 8, "attention": {"num_heads": 1, "head_size": 8}, "ffn": {"hidden": 4}}
    ).norm.model_copy(update={"eps": 0.01})
    rms = slow.norm_function(config, {"weight": weight})(x)
    layer = slow.norm_function(config.model_copy(update={"kind": "layer_norm"}), {"weight": weight, "bias": bias})(x)
    torch.testing.assert_close(rms, F.rms_norm(x, (8,), weight, 0.01), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer, F.layer_norm(x, (8,), weight, bias, 0.01), rtol=1e-12, atol=1e-12)

    gate, up = x.chunk(2, -1)
    by_torch = {"relu": F.relu(x), "gelu": F.gelu(x), "swiglu": F.silu(gate) * up, "geglu": F.gelu(gate) * up}
    for name, expected in by_torch.items():
        torch.testing.assert_close(slow.ACTIVATIONS[name](x), expected, rtol=1e-12, atol=1e-12)

    targets = torch.tensor([[0, 7, 3, 3, 1]])
    expected = F.cross_entropy(x, targets[0], reduction="none")[None]
    torch.testing.assert_close(slow.cross_entropy(x[None], targets), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [None, 0.5, 1e9])
def test_updates_are_torch_s_adamw_after_torch_s_clipping(limit: float | None) -> None:
    """Three, during the warm-up, with other gradients each, and without decay of vectors."""
    optimizer = {"learning_rate": 0.1, "betas": [0.6, 0.9], "eps": 0.01, "weight_decay": 0.3}
    training = training_of(optimizer=optimizer, clip_norm=limit)
    state = ReferenceState.at_start({"matrix": draw(4, 3), "vector": draw(5, seed=1)})
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in state.weights.items()}
    groups = [
        {"params": [parameters["matrix"]], "weight_decay": 0.3},
        {"params": [parameters["vector"]], "weight_decay": 0.0},
    ]
    torch_s = torch.optim.AdamW(groups, lr=0.1, betas=(0.6, 0.9), eps=0.01)
    for step in range(3):
        gradients = {"matrix": draw(4, 3, seed=10 + step), "vector": draw(5, seed=20 + step)}
        norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), limit)
        for group in torch_s.param_groups:
            group["lr"] = 0.1 * (step + 1) / 4
        torch_s.step()
        state = adamw_step(training, state, gradients, norm, reference_rate(training, step))
        for name, parameter in parameters.items():
            close = {"rtol": 1e-5, "atol": 1e-7}  # clip_grad_norm_ adds 1e-6 to the norm
            torch.testing.assert_close(state.weights[name], parameter.detach(), **close)
            torch.testing.assert_close(state.exp_avg[name], torch_s.state[parameter]["exp_avg"], **close)
            torch.testing.assert_close(state.exp_avg_sq[name], torch_s.state[parameter]["exp_avg_sq"], **close)


def test_rates_by_hand() -> None:
    """A warm-up of 2 steps to 0.1, then half a cosine down to a tenth of it over 2 more steps, or 1 / sqrt."""

    def rates(kind: str) -> list[float]:
        training = training_of(
            steps=4, optimizer={"learning_rate": 0.1}, schedule={"kind": kind, "warmup_steps": 2}, clip_norm=None
        )
        return [reference_rate(training, step) for step in range(5)]

    assert rates("constant") == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1])
    assert rates("cosine") == pytest.approx([0.05, 0.1, 0.1, 0.055, 0.01])
    assert rates("wsd") == pytest.approx([0.05, 0.1, 0.1, 0.05, 0.0])  # decays from the end of the warm-up on
    assert rates("inverse_sqrt") == pytest.approx([0.05, 0.1, 0.1 * (2 / 3) ** 0.5, 0.1 / 2**0.5, 0.1 * 0.4**0.5])


# ------------------------------------------------------------------------------------------------------ the whole


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_a_step_is_that_of_transformers_mixtral(micro_steps: int) -> None:
    """Loss, pooled balance loss, gradients and their norm. Accumulated: the mean of its losses over halves."""
    from transformers import MixtralConfig, MixtralForCausalLM

    with peers_in_float64():
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        config = MixtralConfig(**MIXTRAL, **eager, output_router_logits=True, router_aux_loss_coef=0.02)
        theirs = MixtralForCausalLM(config).to(torch.float64)
        for number, parameter in enumerate(theirs.parameters()):
            parameter.data = 0.3 * draw(*parameter.shape, seed=number) + float(parameter.dim() == 1)
        sequences_GS = torch.randint(0, 32, (6, 9), generator=torch.Generator().manual_seed(0))
        total, cross_entropy = torch.zeros(()), 0.0
        for part_BS in sequences_GS.chunk(micro_steps):
            targets_BS = part_BS[:, 1:].contiguous()
            output = theirs(part_BS[:, :-1], labels=targets_BS, shift_labels=targets_BS)
            total = total + output.loss / micro_steps
            cross_entropy += float((output.loss - 0.02 * output.aux_loss).detach()) / micro_steps
        total.backward()
    parameters = {name: p.detach() for name, p in theirs.named_parameters()}
    gradients = logical_tensors({name: p.grad for name, p in theirs.named_parameters()})

    moe = {
        "num_experts": 4,
        "router": {"k": 2},
        "losses": [{"kind": "balance", "layers": "pooled", "coefficient": 0.04}],  # theirs does not divide by k
        "experts": {"hidden": 12},
    }
    model = ModelConfig.model_validate(
        {
            "vocab_size": 32,
            "num_layers": 3,
            "d_model": 16,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_size": 6},
            "norm": {"eps": 1e-3},
            "position": {"kind": "rope", "theta": 500.0},
            "tied_embeddings": False,
            "moe": moe,
        }
    )
    partition = whole(6 // micro_steps, 8)
    training = training_of(micro_steps=micro_steps)
    state = ReferenceState.at_start(logical_tensors(parameters))
    ours = reference_step(model, training, state, sequences_GS, partition, SEED)
    assert ours.loss == pytest.approx(cross_entropy, rel=1e-10)
    assert set(ours.gradients) == set(gradients)
    for name, expected in gradients.items():
        torch.testing.assert_close(ours.gradients[name], expected, rtol=1e-9, atol=1e-11)
    norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    assert ours.grad_norm == pytest.approx(norm, rel=1e-10)


LAYER_NORM = {
    "norm": {"kind": "layer_norm"},
    "norm_placement": "post",
    "position": {"kind": "learned", "max_length": 9},
}
FACTORS = {"embedding_multiplier": 1.5, "residual_multiplier": 0.7, "logits_divisor": 3.0, "unembedding_bias": True}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "biases, drops, balance biases": ({}, {}),
    "post-norm, learned positions, untied": ({**LAYER_NORM, "tied_embeddings": False, "unembedding_bias": True}, {}),
    "branch norms, multipliers": ({"norm_placement": "branch", **FACTORS}, {}),
    "sandwich norms": ({"norm_placement": "sandwich"}, {}),
    "shared experts, sigmoid, groups": (
        {"moe_output_norm": True, "moe_blocks": {"kind": "every_nth", "n": 2}},
        {
            "num_experts": 8,
            "router": {"score": "sigmoid", "group_limit": {"count": 4, "limit": 2}, "balance_bias_rate": 0.1},
            "capacity": {"kind": "dropless"},
            "losses": [{"kind": "balance", "scope": "sequence"}],
            "shared_experts": {"hidden": 8},
        },
    ),
    "noise, rerouting, pooled first choices": (
        {},
        {
            "router": {"kind": "noisy_top_k", "k": 2},
            "capacity": {"kind": "factor", "train": 0.9, "minimum": 0, "overflow": "reroute", "scope": "sequence"},
            "losses": [
                {"kind": "balance", "layers": "pooled", "choices": "first"},
                {"kind": "balance", "scope": "sequence", "layers": "pooled"},
            ],
        },
    ),
    "hash": ({}, {"router": {"kind": "hash", "k": 2}, "losses": []}),
    "jitter, absolute, pad": (
        {},
        {"router": {"k": 2, "jitter": 0.1}, "capacity": {"kind": "absolute", "train": 9, "eval": 9, "pad": True}},
    ),
}


def take_a_step(rank: int, tree: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference between the product alone and the reference in two steps, by what is compared."""
    config = Config.model_validate(tree)
    initial = system_under_test.initial_weights(config)
    start = perturb(initial, config.seed)
    training, sequences_GS = config.training, system_under_test.random_sequences(config, num_steps=2)
    partition = whole(training.global_batch // training.micro_steps, training.sequence_length)
    state = ReferenceState.at_start(start)
    found: list[tuple[str, tuple[Tensor, Tensor]]] = []
    with system_under_test.set_up(config, runtime_of(rank, 1), sequences_GS) as run:
        system_under_test.write_weights(run.model, start)
        before = start
        for number, sequences in enumerate(sequences_GS.chunk(2)):
            step = reference_step(config.model, training, state, sequences, partition, config.seed, number)
            expected, state = expected_tensors(step, state), step.after
            captured = system_under_test.capture_step(run, list(run.batches(number)), number)
            pairs = actual_tensors(run, captured, before, expected)
            assert set(pairs) == set(expected)
            found, before = [*found, *pairs.items()], captured.weights
    worst: dict[str, float] = {}
    for name, (actual, wanted) in found:
        what = name.partition("/")[0]
        difference = float((actual - wanted).abs().max()) / max(1e-4, float(wanted.abs().max()))
        worst[what] = max(worst.get(what, 0.0), difference)
    return worst


@pytest.mark.parametrize("case", MODELS)
def test_a_step_is_the_product_s_on_one_rank(case: str) -> None:
    model, moe = MODELS[case]
    training = {**training_of(micro_steps=2).model_dump(mode="json"), "dtype": "float64"}
    config = config_of({"init_std": 0.3, **model}, moe, training=training)
    (worst,) = run_ranks(1, take_a_step, config.model_dump(mode="json"))
    assert max(worst.values()) < 1e-9, worst
    assert {"loss", "output", "gradient", "gradient norm", "update", "exp_avg", "exp_avg_sq", "dropped"} <= set(worst)


def reference_of(config: Config, partition: TokenPartition) -> ReferenceStep:
    model = build_model(config.model, dtype=torch.float64, seed=SEED)
    sequences_GS = system_under_test.random_sequences(config)
    state = ReferenceState.at_start(system_under_test.read_weights(model))
    return reference_step(config.model, config.training, state, sequences_GS, partition, SEED)


DIVIDED: TokenPartition = [
    (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 6, 7])),
    (torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3, 4, 5])),
    (torch.tensor([4, 5]), torch.arange(8)),
]


def test_how_tokens_are_divided_matters_to_scope_rank_alone() -> None:
    for scope, is_alike in (("global", True), ("sequence", True), ("rank", False)):
        capacity = {"kind": "factor", "train": 1.0, "minimum": 0, "scope": scope}
        losses = [{"kind": "balance", "scope": scope, "coefficient": 0.1}]
        config = config_of({"init_std": 0.3}, {"capacity": capacity, "losses": losses}, training=training_of())
        one, three = reference_of(config, whole(6, 8)), reference_of(config, DIVIDED)
        assert one.layers[1].dropped > 0
        assert (one.grad_norm == pytest.approx(three.grad_norm, rel=1e-12)) == is_alike, scope
        assert (one.layers[1].losses == pytest.approx(three.layers[1].losses, rel=1e-12)) == is_alike, scope
