"""Computes a whole training step on one rank in float64, slow and simple, which the steps of all layouts are compared
with.

Written from the formulas, without any parallel code and without code of model/, training/ or the fast MoE layer: plain
attention, plain cross entropy, gradients by autograd, AdamW by hand, and the MoE layers of moe/reference. In tensor
names B is the number of sequences in a whole micro-step (over all ranks), G that in a step, V the vocabulary size; the
other letters are those of moe/types.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from expert_parallel.moe.context import StepContext
from expert_parallel.moe.reference.reference_layer import RankTokens, reference_layer
from expert_parallel.moe.reference.reference_routing import NOT_ROUTED, blocks, collect_tokens, route
from expert_parallel.verify.reference_attention import attention, document_positions, linear

Parameters = dict[str, Tensor]
# For each rank of one pipeline stage: the sequences of a micro-step that it holds, and their positions (int64).
TokenPartition = list[tuple[Tensor, Tensor]]


@dataclass
class LayerRecord:
    """Accumulates the statistics of one MoE block over a step.

    losses: by name; mean over micro-steps, before coefficients. routed_E: number of choices of each expert before
    capacity. kept_E: number of choices that each expert computes, including choices rerouted to it. dropped: number of
    choices that no expert computes."""

    losses: dict[str, float] = field(default_factory=dict)
    routed_E: Tensor | None = None
    kept_E: Tensor | None = None
    dropped: int = 0


@dataclass
class ReferenceStep:
    """Holds everything that a reference step computes.

    loss: mean cross entropy, nats per token. grad_norm, gradients: before clipping. weights: after the step. outputs:
    output of each block, (B, S, D), by (micro-step, block). balance_biases: after the step. layers: statistics of each
    MoE block. Gradients, weights and biases are by logical name."""

    loss: float
    grad_norm: float
    gradients: Parameters
    weights: Parameters
    balance_biases: Parameters
    outputs: dict[tuple[int, int], Tensor]
    layers: dict[int, LayerRecord]


def reference_step(
    model: Any,
    training: Any,
    parameters: Parameters,
    sequences_GS: Tensor,
    partition: TokenPartition,
    seed: int,
    separator: int | None = None,
) -> ReferenceStep:
    """Computes the first training step (step 0) of a run. model: a ModelConfig without dropout. training: a
    TrainingConfig.

    parameters: logical name -> float64 weight, including the balance biases (`....router.balance_bias_E`).
    sequences_GS: int64 (global_batch, sequence_length + 1), in global order. partition: which rank holds which tokens
    of a micro-step; only settings with scope `rank` depend on it. seed: of the routers' random numbers. separator: the
    token that ends a document, if attention is confined to documents; else None."""
    biases = {name: value for name, value in parameters.items() if name.endswith("balance_bias_E")}
    weights = {name: p.detach().clone().requires_grad_() for name, p in parameters.items() if name not in biases}
    step = ReferenceStep(0.0, 0.0, {}, {}, {}, {}, {layer: LayerRecord() for layer in model.moe_layers})
    num_targets = sequences_GS.shape[0] * (sequences_GS.shape[1] - 1)
    total = torch.zeros((), dtype=torch.float64)
    for micro_step, sequences_BS in enumerate(sequences_GS.chunk(training.micro_steps)):
        document_BS = None if separator is None else document_ids(sequences_BS[:, :-1], separator)
        context = StepContext(seed=seed, step=0, micro_step=micro_step, document_BS=document_BS)
        passed = _forward(model, {**weights, **biases}, sequences_BS[:, :-1], partition, context, step)
        loss = _cross_entropy(passed.logits_BSV, sequences_BS[:, 1:]).sum() / num_targets
        total = total + loss + passed.auxiliary / training.micro_steps
        step.loss += float(loss.detach())
    grads = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    step.gradients = {
        name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(weights.items(), grads, strict=True)
    }
    step.grad_norm = math.sqrt(sum(float((g * g).sum()) for g in step.gradients.values()))
    step.weights = adamw_step(training, weights, step.gradients, step.grad_norm)
    for name, bias in biases.items():
        routed_E = step.layers[int(name.split(".")[1])].routed_E
        assert routed_E is not None
        load_E = routed_E.to(torch.float64)
        step.balance_biases[name] = bias + model.moe.router.balance_bias_rate * (load_E.mean() - load_E).sign()
    for record in step.layers.values():
        record.losses = {name: value / training.micro_steps for name, value in record.losses.items()}
    return step


def document_ids(tokens_BS: Tensor, separator: int) -> Tensor:
    """Returns the index of each token's document within its row, int64 (B, S): the number of separators before the
    token."""
    found = torch.zeros_like(tokens_BS)
    for b, row in enumerate(tokens_BS.tolist()):
        for s in range(len(row)):
            found[b, s] = row[:s].count(separator)
    return found


def adamw_step(training: Any, weights: Parameters, gradients: Parameters, grad_norm: float) -> Parameters:
    """Returns the weights after the first step of a run: clips the gradients, then applies AdamW (Loshchilov and Hutter
    2017, algorithm 2) with the schedule's first learning rate and no decay of 1-D parameters. grad_norm: norm of all
    gradients."""
    optimizer, limit = training.optimizer, training.clip_norm
    rate = optimizer.learning_rate / max(1, training.schedule.warmup_steps)
    beta1, beta2 = optimizer.betas
    factor = 1.0 if limit is None or grad_norm <= limit else limit / grad_norm
    after = {}
    for name, gradient in gradients.items():
        weight, grad = weights[name].detach(), factor * gradient
        mean, square = (1 - beta1) * grad, (1 - beta2) * grad**2
        direction = (mean / (1 - beta1)) / (torch.sqrt(square / (1 - beta2)) + optimizer.eps)
        decay = optimizer.weight_decay if weight.dim() > 1 else 0.0
        after[name] = weight - rate * decay * weight - rate * direction
    return after


# ------------------------------------------------------------------------------------------------------- forward pass


@dataclass
class ForwardResult:
    """Holds the result of a forward pass. auxiliary: the sum over MoE blocks and auxiliary losses of coefficient *
    loss."""

    logits_BSV: Tensor
    auxiliary: Tensor


def _forward(
    model: Any,
    weights: Parameters,
    tokens_BS: Tensor,
    partition: TokenPartition,
    context: StepContext,
    step: ReferenceStep,
) -> ForwardResult:
    """Runs the model on one micro-step, and writes outputs, losses and counts into `step`."""
    document_BS = torch.zeros_like(tokens_BS) if context.document_BS is None else context.document_BS
    x_BSD = weights["embedding.weight"][tokens_BS]
    if model.position.kind == "learned":
        x_BSD = x_BSD + weights["position.weight"][document_positions(document_BS)]
    auxiliary, balance_terms = x_BSD.new_zeros(()), {}
    for layer in range(model.num_layers):
        here = _strip_prefix(weights, f"blocks.{layer}.")

        def feed_forward(x: Tensor, layer: int = layer, here: Parameters = here) -> Tensor:
            nonlocal auxiliary
            if layer not in model.moe_layers:
                return _ffn(model.ffn.activation, _strip_prefix(here, "ffn."), x)
            where = replace(context, layer=layer)
            y, loss, balance_terms[layer] = _moe(
                model.moe, _strip_prefix(here, "moe."), x, tokens_BS, partition, where, step
            )
            auxiliary = auxiliary + loss
            return y

        def attend(x: Tensor, layer: int = layer, here: Parameters = here) -> Tensor:
            return attention(model, layer, _strip_prefix(here, "attention."), x, document_BS)

        norm1, norm2 = (_norm(model.norm, _strip_prefix(here, f"{name}_norm.")) for name in ("attention", "ffn"))
        if model.norm_placement == "pre":
            x_BSD = x_BSD + attend(norm1(x_BSD))
            x_BSD = x_BSD + feed_forward(norm2(x_BSD))
        else:
            x_BSD = norm1(x_BSD + attend(x_BSD))
            x_BSD = norm2(x_BSD + feed_forward(x_BSD))
        step.outputs[context.micro_step, layer] = x_BSD.detach()
    if model.moe is not None:
        auxiliary = auxiliary + _pooled_losses(model.moe, balance_terms, step)
    if model.norm_placement == "pre":
        x_BSD = _norm(model.norm, _strip_prefix(weights, "final_norm."))(x_BSD)
    table = "embedding.weight" if model.tied_embeddings else "unembedding.weight"
    return ForwardResult(x_BSD @ weights[table].T, auxiliary)


def _strip_prefix(parameters: Parameters, prefix: str) -> Parameters:
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def _norm(config: Any, weights: Parameters) -> Callable[[Tensor], Tensor]:
    def norm(x: Tensor) -> Tensor:
        if config.kind == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + config.eps) * weights["weight"]
        return x + weights["bias"] if config.kind == "layer_norm" else x

    return norm


def _ffn(activation: str, weights: Parameters, x: Tensor) -> Tensor:
    return linear(weights, "w_out", ACTIVATIONS[activation](linear(weights, "w_in", x)))


def _gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))


def _gated(gate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda h: gate(h[..., : h.shape[-1] // 2]) * h[..., h.shape[-1] // 2 :]


def _gpt_oss(h: Tensor) -> Tensor:
    gate, up = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]
    gate, up = torch.clamp(gate, max=7), torch.clamp(up, min=-7, max=7)
    return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda h: torch.clamp(h, min=0),
    "gelu": _gelu,
    "swiglu": _gated(lambda h: h / (1 + torch.exp(-h))),
    "geglu": _gated(_gelu),
    "gpt_oss": _gpt_oss,
}


def _cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Returns -log of the target's probability, (B, S)."""
    chosen = logits_BSV.gather(-1, targets_BS[..., None])[..., 0]
    largest = logits_BSV.detach().amax(-1)
    return largest + torch.log(torch.exp(logits_BSV - largest[..., None]).sum(-1)) - chosen


# --------------------------------------------------------------------------------------------------------- MoE blocks


@dataclass
class BalanceTerms:
    """Holds, for balance losses that are pooled over layers, the terms of each group of tokens (by the loss's scope):
    f, the fraction of choices, and P, the mean probability, of each expert. Both (groups, E), by name of the loss."""

    fraction_bE: dict[str, Tensor]
    probability_bE: dict[str, Tensor]


def _moe(
    config: Any,
    weights: Parameters,
    x_BSD: Tensor,
    tokens_BS: Tensor,
    partition: TokenPartition,
    context: StepContext,
    step: ReferenceStep,
) -> tuple[Tensor, Tensor, BalanceTerms]:
    """Runs one MoE block. Returns y, the sum of coefficient * loss over its own losses, and the terms of pooled
    losses."""
    ranks = []
    for sequence_index_B, positions_S in partition:
        here = (sequence_index_B[:, None], positions_S)
        document_BS = None if context.document_BS is None else context.document_BS[here]
        sequences, places = sequence_index_B.tolist(), positions_S.tolist()
        ranks.append(RankTokens(x_BSD[here], sequences, tokens_BS[here], None, places, document_BS))
    output = reference_layer(config, weights, list(ranks), training=True, context=context)
    y_BSD = torch.zeros_like(x_BSD)
    for (sequence_index_B, positions_S), y in zip(partition, output.y, strict=True):
        y_BSD[sequence_index_B[:, None], positions_S] = y

    record = step.layers[context.layer]
    for count, new in (("routed_E", output.routed_E), ("kept_E", output.kept_E)):
        old = getattr(record, count)
        setattr(record, count, torch.tensor(new) if old is None else old + torch.tensor(new))
    record.dropped += sum(int(dropped.sum()) for dropped in output.dropped)
    own = [loss for loss in config.losses if not _is_pooled(loss)]
    for loss in own:
        _add_loss(record, loss, output.losses[_loss_name(loss)])
    total = sum((loss.coefficient * output.losses[_loss_name(loss)] for loss in own), x_BSD.new_zeros(()))
    return y_BSD, total, _balance_terms(config, weights, ranks, context)


def _loss_name(loss: Any) -> str:
    if loss.kind != "balance":
        return str(loss.kind)
    return f"balance_{loss.scope}" + "_first" * (loss.choices == "first") + "_pooled" * (loss.layers == "pooled")


def _is_pooled(loss: Any) -> bool:
    return bool(loss.kind == "balance" and loss.layers == "pooled")


def _add_loss(record: LayerRecord, loss: Any, value: Tensor) -> None:
    record.losses[_loss_name(loss)] = record.losses.get(_loss_name(loss), 0.0) + float(value.detach())


def _balance_terms(config: Any, weights: Parameters, ranks: list[RankTokens], context: StepContext) -> BalanceTerms:
    """Routes once more for the pooled losses, since `reference_layer` does not return its probabilities."""
    terms = BalanceTerms({}, {})
    pooled = [loss for loss in config.losses if _is_pooled(loss)]
    if not pooled:
        return terms
    batch = collect_tokens(ranks, True, context)
    routing = route(config, weights, batch)
    probability_TE = routing.scores_TE / routing.scores_TE.sum(-1, keepdim=True)
    for loss in pooled:
        fractions, probabilities = [], []
        for block in blocks("document" if loss.scope == "sequence" else loss.scope, batch):
            counted = 1 if loss.choices == "first" else config.router.k
            count_E, total = probability_TE.new_zeros(config.num_experts), max(1, len(block))
            for t in block:
                for expert, outcome in zip(routing.ids[t][:counted], routing.outcomes[t], strict=False):
                    count_E[expert] += outcome != NOT_ROUTED
            fractions.append(count_E / (total * counted))
            probabilities.append(probability_TE[block].sum(0) / total)
        terms.fraction_bE[_loss_name(loss)] = torch.stack(fractions)
        terms.probability_bE[_loss_name(loss)] = torch.stack(probabilities)
    return terms


def _pooled_losses(config: Any, balance_terms: dict[int, BalanceTerms], step: ReferenceStep) -> Tensor:
    """Returns the sum of coefficient * E * mean over blocks of sum_e f_e P_e, with f and P averaged over the layers
    first."""
    total = torch.zeros((), dtype=torch.float64)
    for loss in config.losses:
        if not _is_pooled(loss):
            continue
        name = _loss_name(loss)
        fraction_bE = torch.stack([terms.fraction_bE[name] for terms in balance_terms.values()]).mean(0)
        for layer, terms in balance_terms.items():
            probability_bE = terms.probability_bE[name] / len(balance_terms)
            part = config.num_experts * (fraction_bE * probability_bE).sum(1).mean()
            _add_loss(step.layers[layer], loss, part)
            total = total + loss.coefficient * part
    return total
