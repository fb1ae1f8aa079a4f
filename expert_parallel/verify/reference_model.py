"""Computes the model's forward pass on one rank in float64, slow and simple: the part of `reference.py` that knows what
the model is.

Written from the formulas, without any parallel code and without code of model/ or the fast MoE layer: plain attention,
plain cross entropy, and the MoE layers of moe/reference. In tensor names B is the number of sequences in a whole
micro-step (over all ranks), V the vocabulary size; the other letters are those of moe/types.py."""

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
from expert_parallel.verify.reference_mtp import has_target, merged_input, tokens_ahead

Parameters = dict[str, Tensor]
# For each rank of one pipeline stage: the sequences of a micro-step that it holds, and their positions (int64).
TokenPartition = list[tuple[Tensor, Tensor]]


@dataclass
class LayerRecord:
    """Accumulates the statistics of one MoE block over the passes of a step.

    losses: by name; mean over micro-steps, before coefficients. routed_E: number of choices of each expert before
    capacity. kept_E: number of choices that each expert computes, including choices rerouted to it. dropped: number of
    choices that no expert computes."""

    losses: dict[str, float] = field(default_factory=dict)
    routed_E: Tensor | None = None
    kept_E: Tensor | None = None
    dropped: int = 0


@dataclass
class PassRecord:
    """Collects what forward passes compute beside their logits.

    outputs: output of each block, (B, S, D), by (micro-step, block). layers: statistics of each MoE block."""

    outputs: dict[tuple[int, int], Tensor]
    layers: dict[int, LayerRecord]

    @classmethod
    def of(cls, model: Any) -> "PassRecord":
        """Returns an empty record for a model, a ModelConfig."""
        return cls({}, {layer: LayerRecord() for layer in model.moe_layers})

    def divide_losses(self, num_passes: int) -> None:
        """Turns the sums of losses over passes into means."""
        for layer in self.layers.values():
            layer.losses = {name: value / num_passes for name, value in layer.losses.items()}


@dataclass
class ForwardResult:
    """Holds the result of a forward pass. auxiliary: the sum over MoE blocks and auxiliary losses of coefficient *
    loss. mtp_logits: those of each depth of multi-token prediction."""

    logits_BSV: Tensor
    auxiliary: Tensor
    mtp_logits: list[Tensor]


def forward(
    model: Any,
    weights: Parameters,
    tokens_BS: Tensor,
    partition: TokenPartition,
    context: StepContext,
    record: PassRecord,
    training: bool,
) -> ForwardResult:
    """Runs the model on one micro-step, and adds outputs, losses and counts to `record`. training: as opposed to
    evaluation, which has no noise and its own capacity."""
    document_BS = torch.zeros_like(tokens_BS) if context.document_BS is None else context.document_BS
    x_BSD = _look_up(model, weights, tokens_BS)
    if model.position.kind == "learned":
        x_BSD = x_BSD + weights["position.weight"][document_positions(document_BS)]
    auxiliary, balance_terms = x_BSD.new_zeros(()), {}

    def run_block(layer: int, x_BSD: Tensor, tokens_BS: Tensor, real_BS: Tensor | None = None) -> Tensor:
        here = _strip_prefix(weights, f"blocks.{layer}.")

        def feed_forward(x: Tensor) -> Tensor:
            nonlocal auxiliary
            if layer not in model.moe_layers:
                return _ffn(model.ffn.activation, _strip_prefix(here, "ffn."), x)
            where = replace(context, layer=layer, mask_BS=real_BS)
            y, loss, balance_terms[layer] = _moe(
                model.moe, _strip_prefix(here, "moe."), x, tokens_BS, partition, where, record, training
            )
            auxiliary = auxiliary + loss
            return y

        def attend(x: Tensor) -> Tensor:
            return attention(model, layer, _strip_prefix(here, "attention."), x, document_BS)

        x_BSD = _add_branch(model, here, "attention", attend, x_BSD, is_moe=False)
        return _add_branch(model, here, "ffn", feed_forward, x_BSD, is_moe=layer in model.moe_layers)

    for layer in range(model.num_layers):
        x_BSD = run_block(layer, x_BSD, tokens_BS)
        record.outputs[context.micro_step, layer] = x_BSD.detach()
    x_BSD = _final_norm(model, weights, x_BSD)
    logits = [_logits(model, weights, x_BSD)]
    for depth in range(1, 1 + (0 if model.mtp is None else model.mtp.depth)):
        layer = model.num_layers + depth - 1
        here = _strip_prefix(weights, f"blocks.{layer}.mtp.")
        ahead_BS = tokens_ahead(tokens_BS, depth)
        norms = [norm_function(model.norm, _strip_prefix(here, f"{of}_norm.")) for of in ("embedding", "hidden")]
        merged = merged_input(here["projection.weight"], norms, _look_up(model, weights, ahead_BS), x_BSD)
        x_BSD = _final_norm(model, here, run_block(layer, merged, ahead_BS, has_target(document_BS, depth)))
        record.outputs[context.micro_step, layer] = x_BSD.detach()
        logits.append(_logits(model, weights, x_BSD))
    if model.moe is not None:
        auxiliary = auxiliary + _pooled_losses(model.moe, balance_terms, record)
    return ForwardResult(logits[0], auxiliary, logits[1:])


def _look_up(model: Any, weights: Parameters, tokens_BS: Tensor) -> Tensor:
    return weights["embedding.weight"][tokens_BS] * model.embedding_multiplier


def _final_norm(model: Any, weights: Parameters, x_BSD: Tensor) -> Tensor:
    if model.norm_placement == "post":
        return x_BSD
    return norm_function(model.norm, _strip_prefix(weights, "final_norm."))(x_BSD)


def _logits(model: Any, weights: Parameters, x_BSD: Tensor) -> Tensor:
    table = "embedding.weight" if model.tied_embeddings else "unembedding.weight"
    logits_BSV = x_BSD @ weights[table].T
    if model.unembedding_bias:
        logits_BSV = logits_BSV + weights["unembedding_bias"]
    return logits_BSV / model.logits_divisor


def _strip_prefix(parameters: Parameters, prefix: str) -> Parameters:
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def _add_branch(
    model: Any, weights: Parameters, name: str, branch: Callable[[Tensor], Tensor], x: Tensor, is_moe: bool
) -> Tensor:
    """Returns the residual stream after the half of a block that is called `name`: post-norm (1706.03762), pre-norm
    (2002.04745), norms of the branch (OLMo 2, 2501.00656), before and behind it (Swin v2 and Sandwich-LN, 2105.13290),
    or pre-norm with one more norm behind the experts (A.X-K1)."""

    def norm(kind: str) -> Callable[[Tensor], Tensor]:
        return norm_function(model.norm, _strip_prefix(weights, f"{name}_{kind}."))

    placement, factor = model.norm_placement, model.residual_multiplier
    if placement == "post":
        return norm("norm")(x + factor * branch(x))
    if placement == "branch":
        return x + factor * norm("output_norm")(branch(x))
    y = branch(norm("norm")(x))
    if placement == "sandwich" or (is_moe and model.moe_output_norm):
        y = norm("output_norm")(y)
    return x + factor * y


def norm_function(config: Any, weights: Parameters) -> Callable[[Tensor], Tensor]:
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


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
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
    record: PassRecord,
    training: bool,
) -> tuple[Tensor, Tensor, BalanceTerms]:
    """Runs one MoE block. Returns y, the sum of coefficient * loss over its own losses, and the terms of pooled
    losses."""
    ranks = []
    for sequence_index_B, positions_S in partition:
        here = (sequence_index_B[:, None], positions_S)
        mask_BS, document_BS = (None if t is None else t[here] for t in (context.mask_BS, context.document_BS))
        sequences, places = sequence_index_B.tolist(), positions_S.tolist()
        ranks.append(RankTokens(x_BSD[here], sequences, tokens_BS[here], mask_BS, places, document_BS))
    output = reference_layer(config, weights, list(ranks), training=training, context=context)
    y_BSD = torch.zeros_like(x_BSD)
    for (sequence_index_B, positions_S), y in zip(partition, output.y, strict=True):
        y_BSD[sequence_index_B[:, None], positions_S] = y

    layer = record.layers[context.layer]
    for count, new in (("routed_E", output.routed_E), ("kept_E", output.kept_E)):
        old = getattr(layer, count)
        setattr(layer, count, torch.tensor(new) if old is None else old + torch.tensor(new))
    layer.dropped += sum(int(dropped.sum()) for dropped in output.dropped)
    own = [loss for loss in config.losses if not _is_pooled(loss)]
    for loss in own:
        _add_loss(layer, loss, output.losses[_loss_name(loss)])
    total = sum((loss.coefficient * output.losses[_loss_name(loss)] for loss in own), x_BSD.new_zeros(()))
    return y_BSD, total, _balance_terms(config, weights, ranks, context, training)


def _loss_name(loss: Any) -> str:
    if loss.kind != "balance":
        return str(loss.kind)
    return f"balance_{loss.scope}" + "_first" * (loss.choices == "first") + "_pooled" * (loss.layers == "pooled")


def _is_pooled(loss: Any) -> bool:
    return bool(loss.kind == "balance" and loss.layers == "pooled")


def _add_loss(layer: LayerRecord, loss: Any, value: Tensor) -> None:
    layer.losses[_loss_name(loss)] = layer.losses.get(_loss_name(loss), 0.0) + float(value.detach())


def _balance_terms(
    config: Any, weights: Parameters, ranks: list[RankTokens], context: StepContext, training: bool
) -> BalanceTerms:
    """Routes once more for the pooled losses, since `reference_layer` does not return its probabilities."""
    terms = BalanceTerms({}, {})
    pooled = [loss for loss in config.losses if _is_pooled(loss)]
    if not pooled:
        return terms
    batch = collect_tokens(ranks, training, context)
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


def _pooled_losses(config: Any, balance_terms: dict[int, BalanceTerms], record: PassRecord) -> Tensor:
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
            _add_loss(record.layers[layer], loss, part)
            total = total + loss.coefficient * part
    return total
