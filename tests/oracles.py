"""What tests with other people's layers as oracles share: theirs and ours on the same weights, compared.

In float64. Sizes are small; names and shapes of their weights are made ours.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SwitchTransformersConfig, T5Config
from transformers.models.switch_transformers import modeling_switch_transformers as switch
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.moe.capacity.policies import apply_capacity
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import StepContext, TokenBatch, pass_seed, token_batch
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.types import RoutingPlan
from expert_parallel.nn import random
from expert_parallel.nn.random import Stream
from tests.peers import peers_in_float64

D_MODEL, HIDDEN = 8, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Any, expected: Any, what: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11, msg=lambda text: f"{what}: {text}")


def batch_of(x_TD: Tensor) -> TokenBatch:
    """One sequence, without a context."""
    return token_batch(x_TD[None], StepContext(), None)


def randomise(module: nn.Module) -> None:
    """Every parameter: vectors (norms, biases) around 1, matrices around 0."""
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed + 100) * 0.4 + float(parameter.dim() == 1)


def make_layer(num_experts: int, *, training: bool = True, **options: Any) -> MoELayer:
    config = MoEConfig.model_validate({"d_model": D_MODEL, "num_experts": num_experts, **options})
    return MoELayer(config).double().train(training)


# ---------------------------------------------------------------------------------------------------------------------
# transformers: blocks with a softmax or sigmoid router and SwiGLU experts

NAMES = {  # part of their name -> part of ours; matrices of experts are stored transposed
    "model.embed_tokens": "embedding",
    "model.layers": "blocks",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.out",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attention_norm",
    "mlp.": "moe.",
    "gate.e_score_correction_bias": "router.balance_bias_E",
    "gate.weight": "router.weight",
    "experts.gate_up_proj": "experts.w_in",
    "experts.down_proj": "experts.w_out",
    "shared_experts.down_proj": "shared_experts.w_out",
    "model.norm": "final_norm",
    "lm_head": "unembedding",
}


def to_ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their state, or their gradients, under our names and in our form."""
    ours = {}
    for name, tensor in theirs.items():
        if "shared_experts.up_proj" in name:
            continue
        if "shared_experts.gate_proj" in name:  # two matrices there, one [gate | up] here
            tensor = torch.cat([tensor, theirs[name.replace("gate_proj", "up_proj")]])
            name = name.replace("gate_proj", "w_in")
        for their_part, own_part in NAMES.items():
            name = name.replace(their_part, own_part)
        ours[name] = tensor.mT if tensor.dim() == 3 else tensor
    return ours


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def compare_blocks(theirs: nn.Module, ours: MoELayer) -> None:
    """Output, input gradient and every parameter's gradient, for 3 sequences of 7 tokens."""
    randomise(theirs)
    ours.load_state_dict(to_ours(theirs.state_dict()))
    x, their_x = draw(3, 7, D_MODEL).requires_grad_(), draw(3, 7, D_MODEL).requires_grad_()
    with peers_in_float64():
        expected = theirs(their_x)
    actual = ours(x)
    close(actual.y, expected)
    assert int(actual.stats.kept_E.sum()) == 3 * 7 * ours.config.router.k
    upstream = draw(3, 7, D_MODEL, seed=1)
    expected.backward(upstream)
    actual.y.backward(upstream)
    close(x.grad, their_x.grad, "input")
    wanted = to_ours(gradients(theirs))
    assert wanted.keys() == gradients(ours).keys()
    for name, gradient in gradients(ours).items():
        close(gradient, wanted[name], name)


def dense(plan: RoutingPlan) -> tuple[Tensor, Tensor]:
    """(weights_TE of kept choices, kept_TE)."""
    nothing_TE = torch.zeros_like(plan.scores_TE)
    kept_TE = nothing_TE.bool().scatter(1, plan.expert_ids_TK, plan.kept_TK)
    return nothing_TE.scatter(1, plan.expert_ids_TK, plan.weights_TK * plan.kept_TK), kept_TE


# ---------------------------------------------------------------------------------------------------------------------
# transformers: Switch. Its capacity is an absolute number for each sequence; its bound counts places from 1. Two ways
# of its own: in float32 its jitter is written into the tokens, so that the experts see it too; and it has no gated
# experts, for which T5's stand in.


def switch_layer_like(config: MoEConfig, capacity: int) -> nn.Module:
    """Theirs, with the experts of this config."""
    gated = config.experts.activation == "geglu"
    sizes = {"d_model": config.d_model, "d_ff": config.experts.hidden, "dropout_rate": 0.0}
    with peers_in_float64():
        layer = switch.SwitchTransformersSparseMLP(
            SwitchTransformersConfig(
                **sizes, num_experts=config.num_experts, expert_capacity=capacity, router_jitter_noise=0.0
            )
        )
        for name in layer.experts if gated else ():
            layer.experts[name] = T5DenseGatedActDense(T5Config(**sizes, dense_act_fn="gelu", is_gated_act=True))
        return layer.double()


def switch_expert(expert: nn.Module, attribute: str) -> tuple[Tensor, Tensor]:
    """w_in (D, F or 2F) and w_out (F, D) of one of theirs: the values, or the gradients (zeros without tokens)."""

    def get(linear: nn.Linear) -> Tensor:
        value = getattr(linear.weight, attribute)
        return (torch.zeros_like(linear.weight) if value is None else value).T

    first = [expert.wi] if hasattr(expert, "wi") else [expert.wi_0, expert.wi_1]
    return torch.cat([get(linear) for linear in first], 1), get(expert.wo)


def compare_switch_layers(ours: MoELayer, capacity: int, num_sequences: int, num_tokens: int) -> int:
    """Choices, probabilities, drops, losses, output, gradients, of random weights. Returns how many were dropped.

    Ours in training, with capacity and losses of the sequences; with jitter theirs routes the same jittered tokens."""
    config, d_model = ours.config, ours.config.d_model
    assert d_model is not None
    theirs = switch_layer_like(config, capacity)
    randomise(theirs)
    their_experts = [theirs.experts[f"expert_{i}"] for i in range(config.num_experts)]
    ours.router.weight.data = theirs.router.classifier.weight.data
    w_in, w_out = zip(*(switch_expert(expert, "data") for expert in their_experts), strict=True)
    ours.experts.w_in.data, ours.experts.w_out.data = torch.stack(w_in), torch.stack(w_out)

    x, their_x = (draw(num_sequences, num_tokens, d_model).requires_grad_() for _ in range(2))
    x_TD, batch = x.flatten(0, 1), token_batch(x, StepContext(), None)
    if config.router.jitter:
        lots_TD = random.uniform(pass_seed(batch.context, Stream.JITTER), batch.index_T, d_model)
        noise = (1 + config.router.jitter * (2 * lots_TD - 1)).view_as(x)
        theirs.router.register_forward_pre_hook(lambda _, tokens: (tokens[0] * noise,))
    with peers_in_float64():
        kept_BTE, probability_BT1, logits_BTE = theirs.router(their_x)
        expected = theirs(their_x)
        choice_BT = logits_BTE.argmax(-1)
        their_losses = {
            "balance": switch.load_balancing_loss_func(logits_BTE.softmax(-1), choice_BT),
            "z_loss": switch.router_z_loss_func(logits_BTE),
        }
    plan = ours.router(x_TD, batch)
    close(plan.logits_TE, logits_BTE.flatten(0, 1), "logits")
    close(plan.weights_TK, probability_BT1.flatten(0, 1), "probabilities")
    assert torch.equal(plan.expert_ids_TK[:, 0], choice_BT.flatten())
    plan, _ = apply_capacity(config.capacity, plan, batch, training=True)
    assert torch.equal(dense(plan)[1], kept_BTE.flatten(0, 1).bool())

    actual = ours(x)
    close(actual.y, expected, "output")
    assert bool((actual.y.flatten(0, 1)[~plan.kept_TK[:, 0]] == 0).all())  # the residual alone carries a dropped token
    upstream = draw(num_sequences, num_tokens, d_model, seed=1)
    their_total, total = (expected * upstream).sum(), (actual.y * upstream).sum()
    assert len(config.losses) == len(actual.losses)
    for loss, (name, value) in zip(config.losses, actual.losses.items(), strict=True):
        close(value, loss.coefficient * their_losses[loss.kind], name)
        their_total, total = their_total + loss.coefficient * their_losses[loss.kind], total + value
    their_total.backward()
    total.backward()
    close(x.grad, their_x.grad, "input")
    close(ours.router.weight.grad, theirs.router.classifier.weight.grad, "router")
    w_in, w_out = zip(*(switch_expert(expert, "grad") for expert in their_experts), strict=True)
    close(ours.experts.w_in.grad, torch.stack(w_in), "w_in")
    close(ours.experts.w_out.grad, torch.stack(w_out), "w_out")
    return int((~plan.kept_TK).sum())


# ---------------------------------------------------------------------------------------------------------------------
# From a description


def uomni_layer(x_TD: Tensor, router_ED: Tensor, w_in_EDF: Tensor, w_out_EFD: Tensor) -> Tensor:
    """Softmax over all experts, then top-2, renormalised; a loop over slots and experts with masks; no biases."""
    probabilities = (x_TD @ router_ED.T).softmax(-1)
    weights, chosen = probabilities.topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    y_TD = torch.zeros_like(x_TD)
    for slot in range(2):
        for expert in range(len(w_in_EDF)):
            mask = chosen[:, slot] == expert
            output = F.gelu(x_TD[mask] @ w_in_EDF[expert]) @ w_out_EFD[expert]
            y_TD = y_TD.index_put((mask,), y_TD[mask] + weights[mask, slot, None] * output)
    return y_TD


def compare_with_loops(ours: MoELayer) -> None:
    """Ours, top-2 with GELU and without biases, against `uomni_layer`: 40 tokens, output and every gradient."""
    for parameter in ours.parameters():
        parameter.data *= 3
    parameters = [ours.router.weight, ours.experts.w_in, ours.experts.w_out]
    assert len(parameters) == len(list(ours.parameters()))
    x, upstream = draw(40, parameters[0].shape[1]).requires_grad_(), draw(40, parameters[0].shape[1], seed=1)
    expected, actual = uomni_layer(x, *parameters), ours(x).y
    close(actual, expected)
    wanted = torch.autograd.grad(expected, [x, *parameters], upstream)
    found = torch.autograd.grad(actual, [x, *parameters], upstream)
    for name, own, their in zip(["input", "router", "w_in", "w_out"], found, wanted, strict=True):
        close(own, their, name)


def compare_mixtral_models(theirs: nn.Module, config: ModelConfig, weight_factor: float = 1.0) -> None:
    """Logits, the loss with all balance losses, every gradient; of random weights, matrices times `weight_factor`."""
    randomise(theirs)
    for parameter in theirs.parameters():
        parameter.data *= weight_factor if parameter.dim() > 1 else 1.0
    ours = build_model(config, dtype=torch.float64)
    ours.load_state_dict(to_ours(theirs.state_dict()))
    tokens_BS = torch.randint(0, config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    with peers_in_float64():
        expected = theirs(tokens_BS, labels=tokens_BS)
    output = ours(tokens_BS, StepContext())
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    for losses in output.losses.values():
        loss = loss + sum(losses.values())
    close(output.logits, expected.logits, "logits")
    close(loss, expected.loss, "loss")
    expected.loss.backward()
    loss.backward()
    wanted = to_ours(gradients(theirs))
    assert wanted.keys() == gradients(ours).keys()
    for name, gradient in gradients(ours).items():
        close(gradient, wanted[name], name)
        assert bool(gradient.abs().max() > 1e-6), name  # compared numbers that are not all 0
