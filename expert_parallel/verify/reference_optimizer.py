"""Updates the reference's weights by hand, from the formulas: clipping, AdamW with its moments, the learning-rate
schedules and the balance biases. Uses no code of training/."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expert_parallel.verify.reference_model import LayerRecord, Parameters


@dataclass(frozen=True)
class ReferenceState:
    """Holds what a step starts from, by logical name, in float64.

    weights: of all parameters. balance_biases: of the routers (`....router.balance_bias_E`). exp_avg, exp_avg_sq:
    AdamW's moments of the weights. num_updates: how many updates the moments have had."""

    weights: Parameters
    balance_biases: Parameters
    exp_avg: Parameters
    exp_avg_sq: Parameters
    num_updates: int

    @classmethod
    def at_start(cls, parameters: Parameters) -> "ReferenceState":
        """Returns the state before the first step. parameters: weights and balance biases."""
        biases = {name: value for name, value in parameters.items() if name.endswith("balance_bias_E")}
        weights = {name: value.detach() for name, value in parameters.items() if name not in biases}
        zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
        return cls(weights, biases, zeros, dict(zeros), 0)

    @property
    def parameters(self) -> Parameters:
        """Returns the weights and the balance biases."""
        return self.weights | self.balance_biases


def reference_rate(training: Any, step: int) -> float:
    """Returns the learning rate of a step, counted from 0: a linear warm-up that reaches the peak in its last step,
    then the schedule (cosine: Loshchilov and Hutter 2016, eq. 5; inverse square root: Raffel et al. 2019, 3.1.2;
    warmup-stable-decay, linear: Hu et al. 2024, section 4)."""
    schedule, peak = training.schedule, training.optimizer.learning_rate
    warmup = schedule.warmup_steps
    if step < warmup:
        return float(peak * (step + 1) / warmup)
    if schedule.kind == "constant":
        return float(peak)
    if schedule.kind == "inverse_sqrt":
        return float(peak * math.sqrt(warmup) / math.sqrt(step + 1))
    if schedule.kind == "wsd":
        left = max(0, training.steps - step) / max(1, min(schedule.decay_steps, training.steps - warmup))
        return float(peak * (schedule.final_fraction + (1 - schedule.final_fraction) * min(1, left)))
    lowest, progress = schedule.final_fraction * peak, (step - warmup) / max(1, training.steps - warmup)
    return float(lowest + (peak - lowest) * (1 + math.cos(math.pi * min(1, progress))) / 2)


def adamw_step(
    training: Any, state: ReferenceState, gradients: Parameters, grad_norm: float, rate: float
) -> ReferenceState:
    """Returns the state after one update of the weights, with the balance biases unchanged: clips the gradients, then
    applies AdamW (Loshchilov and Hutter 2017, algorithm 2) without decay of 1-D parameters.

    gradients: of some or all weights, before clipping; the result has these alone. grad_norm: norm of all gradients."""
    optimizer, limit = training.optimizer, training.clip_norm
    beta1, beta2 = optimizer.betas
    factor = 1.0 if limit is None or grad_norm <= limit else limit / grad_norm
    updates = state.num_updates + 1
    after: tuple[Parameters, Parameters, Parameters] = ({}, {}, {})
    weights, exp_avg, exp_avg_sq = after
    for name, gradient in gradients.items():
        weight, grad = state.weights[name], factor * gradient
        exp_avg[name] = beta1 * state.exp_avg[name] + (1 - beta1) * grad
        exp_avg_sq[name] = beta2 * state.exp_avg_sq[name] + (1 - beta2) * grad**2
        mean, square = exp_avg[name] / (1 - beta1**updates), exp_avg_sq[name] / (1 - beta2**updates)
        decay = optimizer.weight_decay if weight.dim() > 1 else 0.0
        weights[name] = weight - rate * decay * weight - rate * mean / (torch.sqrt(square) + optimizer.eps)
    return ReferenceState(weights, state.balance_biases, exp_avg, exp_avg_sq, updates)


def update_balance_biases(biases: Parameters, change: float, layers: dict[int, LayerRecord]) -> Parameters:
    """Returns the balance biases after a step: each moves by `change`, up where an expert was chosen less often than
    the mean, and down where more often (DeepSeek-V3 2024, 2.1.2). layers: the counts of the step."""
    after: dict[str, Tensor] = {}
    for name, bias_E in biases.items():
        routed_E = layers[int(name.split(".")[1])].routed_E
        assert routed_E is not None
        load_E = routed_E.to(torch.float64)
        after[name] = bias_E + change * (load_E.mean() - load_E).sign()
    return after
