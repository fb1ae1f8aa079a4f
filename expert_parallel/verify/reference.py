"""Computes training steps, an evaluation and generated tokens on one rank in float64, slow and simple, which all
layouts are compared with.

Written from the formulas, without any parallel code and without code of model/, training/ or the fast MoE layer. The
model is in `reference_model.py`, the optimizer in `reference_optimizer.py`; gradients are autograd's. In tensor names B
is the number of sequences in a whole micro-step (over all ranks), G that in a step, V the vocabulary size; the other
letters are those of moe/types.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from expert_parallel.moe.capacity.policies import DroplessConfig
from expert_parallel.moe.context import StepContext
from expert_parallel.verify.reference_model import (
    LayerRecord,
    Parameters,
    PassRecord,
    TokenPartition,
    cross_entropy,
    forward,
)
from expert_parallel.verify.reference_mtp import FurtherTokens
from expert_parallel.verify.reference_optimizer import (
    ReferenceState,
    adamw_step,
    reference_rate,
    update_balance_biases,
)


@dataclass
class ReferenceStep:
    """Holds everything that a reference step computes.

    loss: mean cross entropy, nats per token. mtp_losses: that of each depth of multi-token prediction. rate: the
    learning rate. grad_norm, gradients: before clipping, by logical name. outputs: output of each block, (B, S, D), by
    (micro-step, block). layers: statistics of each MoE block. after: the state that the step leaves behind."""

    loss: float
    mtp_losses: list[float]
    rate: float
    grad_norm: float
    gradients: Parameters
    outputs: dict[tuple[int, int], Tensor]
    layers: dict[int, LayerRecord]
    after: ReferenceState


def reference_step(
    model: Any,
    training: Any,
    state: ReferenceState,
    sequences_GS: Tensor,
    partition: TokenPartition,
    seed: int,
    step: int = 0,
    separator: int | None = None,
) -> ReferenceStep:
    """Computes one training step. model: a ModelConfig without dropout. training: a TrainingConfig.

    state: what the step starts from. sequences_GS: int64 (global_batch, sequence_length + 1), in global order.
    partition: which rank holds which tokens of a micro-step; only settings with scope `rank` depend on it. seed: of the
    routers' random numbers. step: its number, counted from 0. separator: the token that ends a document, if attention
    is confined to documents; else None."""
    weights = {name: value.detach().clone().requires_grad_() for name, value in state.weights.items()}
    record, loss = PassRecord.of(model), 0.0
    num_targets = sequences_GS.shape[0] * (sequences_GS.shape[1] - 1)
    total = torch.zeros((), dtype=torch.float64)
    further = FurtherTokens.of(model)
    for micro_step, sequences_BS in enumerate(sequences_GS.chunk(training.micro_steps)):
        context = _context(sequences_BS, seed, step, micro_step, separator)
        parameters = {**weights, **state.balance_biases}
        passed = forward(model, parameters, sequences_BS[:, :-1], partition, context, record, training=True)
        mean = cross_entropy(passed.logits_BSV, sequences_BS[:, 1:]).sum() / num_targets
        total = total + mean + passed.auxiliary / training.micro_steps
        loss += float(mean.detach())
        further.add(passed.mtp_logits, sequences_BS[:, 1:], context.document_BS)
    total = total + further.weighted(model)
    found = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(weights.items(), found, strict=True)
    }
    grad_norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
    rate = reference_rate(training, step)
    after = adamw_step(training, state, gradients, grad_norm, rate)
    if state.balance_biases:
        moved = update_balance_biases(state.balance_biases, model.moe.router.balance_bias_rate, record.layers)
        after = replace(after, balance_biases=moved)
    record.divide_losses(training.micro_steps)
    return ReferenceStep(loss, further.means(), rate, grad_norm, gradients, record.outputs, record.layers, after)


@torch.no_grad()
def reference_evaluation(
    model: Any,
    parameters: Parameters,
    batches: Sequence[tuple[Tensor, TokenPartition]],
    seed: int,
    separator: int | None = None,
) -> tuple[list[float], dict[int, LayerRecord]]:
    """Returns the mean cross entropies of held-out sequences in nats per token, first of the next token, then of each
    depth of multi-token prediction, and the statistics of each MoE block.

    batches: of each pass, the sequences, int64 (B, S + 1), and which rank holds which tokens; see `reference_step`."""
    record, total, num_tokens, further = PassRecord.of(model), 0.0, 0, FurtherTokens.of(model)
    for number, (sequences_BS, partition) in enumerate(batches):
        context = _context(sequences_BS, seed, 0, number, separator)
        passed = forward(model, parameters, sequences_BS[:, :-1], partition, context, record, training=False)
        total += float(cross_entropy(passed.logits_BSV, sequences_BS[:, 1:]).sum())
        num_tokens += sequences_BS[:, 1:].numel()
        further.add(passed.mtp_logits, sequences_BS[:, 1:], context.document_BS)
    record.divide_losses(len(batches))
    return [total / num_tokens, *further.means()], record.layers


@torch.no_grad()
def reference_generation(
    model: Any, parameters: Parameters, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
    """Returns each prompt followed by the `num_tokens` most probable tokens, each of which the whole model computes
    anew from all tokens before it, without capacity."""
    model = model.model_copy(update={"mtp": None})
    if model.moe is not None:
        model = model.model_copy(update={"moe": model.moe.model_copy(update={"capacity": DroplessConfig()})})
    texts = [list(prompt) for prompt in prompts]
    for tokens in texts:
        for _ in range(num_tokens):
            tokens_BS = torch.tensor([tokens])
            partition = [(torch.arange(1), torch.arange(len(tokens)))]
            record = PassRecord.of(model)
            passed = forward(model, parameters, tokens_BS, partition, StepContext(), record, training=False)
            tokens.append(int(passed.logits_BSV[0, -1].argmax()))
    return texts


def _context(sequences_BS: Tensor, seed: int, step: int, micro_step: int, separator: int | None) -> StepContext:
    document_BS = None if separator is None else document_ids(sequences_BS[:, :-1], separator)
    return StepContext(seed=seed, step=step, micro_step=micro_step, document_BS=document_BS)


def document_ids(tokens_BS: Tensor, separator: int) -> Tensor:
    """Returns the index of each token's document within its row, int64 (B, S): the number of separators before the
    token."""
    found = torch.zeros_like(tokens_BS)
    for b, row in enumerate(tokens_BS.tolist()):
        for s in range(len(row)):
            found[b, s] = row[:s].count(separator)
    return found
