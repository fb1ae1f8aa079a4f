"""The slow, obviously right MoE layer: the oracle of every test. Loops over tokens, choices and experts.

Written from the formulas, on one rank, with no code of the fast layer: nothing here imports routing, capacity,
permute, dispatch, experts or balance. `tokens_by_rank` holds what each rank of a layout would see, so that settings
that look at one rank's tokens (capacity, `scope: rank`) mean the same here as there.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceOutput:
    """y and dropped: one entry a rank: (B, S, D), and a bool (T, K). losses: of the whole micro-step, without their
    coefficients."""

    y: list[Tensor]
    losses: dict[str, Tensor]
    dropped: list[Tensor]
    routed_E: list[int]


def reference_layer(
    config: Any, parameters: dict[str, Tensor], tokens_by_rank: list[Tensor], training: bool = True
) -> ReferenceOutput:
    """The layer of `config` (a MoEConfig without jitter and dropout) on all ranks' tokens.

    parameters: logical name -> tensor, as `logical_parameters` names them: `router.weight`, `router.balance_bias_E`,
    `experts.3.w_in`, `shared_experts.w_in.weight`, ... tokens_by_rank: (B, S, D) each; B may be 0.
    """
    outputs, dropped_by_rank, routing = [], [], []
    for x_BSD in tokens_by_rank:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        logits, scores, choices, weights = _route(config, parameters, x_TD)
        dropped = _drop(config, scores, choices, training)
        rows = []
        for t in range(len(x_TD)):
            y = torch.zeros_like(x_TD[t])
            for k, expert in enumerate(choices[t]):
                if not dropped[t][k]:
                    y = y + weights[t][k] * _expert(config, parameters, f"experts.{expert}.", x_TD[t])
            if config.shared_experts is not None:
                y = y + _shared(config, parameters, x_TD[t])
            rows.append(y)
        outputs.append(torch.stack(rows).view(x_BSD.shape) if rows else x_BSD.clone())
        dropped_by_rank.append(torch.tensor(dropped, dtype=torch.bool).view(len(x_TD), config.router.k))
        routing.append((x_BSD.shape[0], logits, scores, choices))
    routed = [sum(row.count(e) for *_, choices in routing for row in choices) for e in range(config.num_experts)]
    return ReferenceOutput(outputs, _losses(config, routing), dropped_by_rank, routed)


def _route(config: Any, parameters: dict[str, Tensor], x_TD: Tensor) -> tuple[Tensor, Tensor, list[list[int]], Tensor]:
    router = config.router
    logits = x_TD @ parameters["router.weight"].T
    if "router.bias" in parameters:
        logits = logits + parameters["router.bias"]
    if router.score == "softmax":
        exponentials = torch.exp(logits - logits.amax(-1, keepdim=True).detach())
        scores = exponentials / exponentials.sum(-1, keepdim=True)
    else:
        scores = 1 / (1 + torch.exp(-logits))
    choices, weights = [], []
    for t in range(len(x_TD)):
        ranking = scores[t].tolist()
        if "router.balance_bias_E" in parameters:
            ranking = [s + b for s, b in zip(ranking, parameters["router.balance_bias_E"].tolist(), strict=True)]
        best = sorted(range(config.num_experts), key=lambda e: (-ranking[e], e))[: router.k]
        weight = torch.stack([scores[t, e] for e in best])
        if router.normalise:
            weight = weight / weight.sum()
        choices.append(best)
        weights.append(router.scale * weight)
    return logits, scores, choices, torch.stack(weights) if weights else scores.new_zeros(0, router.k)


def _drop(config: Any, scores: Tensor, choices: list[list[int]], training: bool) -> list[list[bool]]:
    num_tokens, k = len(choices), config.router.k
    dropped = [[False] * k for _ in range(num_tokens)]
    if config.capacity.kind == "dropless":
        return dropped
    factor = config.capacity.train if training else config.capacity.eval
    ideal = Fraction(str(factor)) * num_tokens * k / config.num_experts
    capacity = max(config.capacity.minimum, math.ceil(ideal))
    queue = [(j, t) for j in range(k) for t in range(num_tokens)]
    if config.capacity.drop == "probability":
        ranking = scores.tolist()
        queue.sort(key=lambda jt: (-ranking[jt[1]][choices[jt[1]][jt[0]]], jt))
    taken = [0] * config.num_experts
    for j, t in queue:
        expert = choices[t][j]
        dropped[t][j] = taken[expert] >= capacity
        taken[expert] += not dropped[t][j]
    return dropped


def _activate(activation: str, h: Tensor) -> Tensor:
    half = h.shape[-1] // 2
    if activation == "relu":
        return torch.clamp(h, min=0)
    if activation == "gelu":
        return _gelu(h)
    gate, up = h[..., :half], h[..., half:]
    return (gate / (1 + torch.exp(-gate)) if activation == "swiglu" else _gelu(gate)) * up


def _gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))


def _expert(config: Any, parameters: dict[str, Tensor], prefix: str, x_D: Tensor) -> Tensor:
    h = x_D @ parameters[prefix + "w_in"] + parameters.get(prefix + "b_in", 0)
    return _activate(config.experts.activation, h) @ parameters[prefix + "w_out"] + parameters.get(prefix + "b_out", 0)


def _shared(config: Any, parameters: dict[str, Tensor], x_D: Tensor) -> Tensor:
    h = parameters["shared_experts.w_in.weight"] @ x_D + parameters.get("shared_experts.w_in.bias", 0)
    h = _activate(config.shared_experts.activation, h)
    return parameters["shared_experts.w_out.weight"] @ h + parameters.get("shared_experts.w_out.bias", 0)


def _losses(config: Any, routing: list[tuple[int, Tensor, Tensor, list[list[int]]]]) -> dict[str, Tensor]:
    num_tokens = sum(len(choices) for *_, choices in routing)
    losses = {}
    for loss in config.losses:
        if loss.kind == "z_loss":
            squares = [torch.log(torch.exp(logits).sum(-1)) ** 2 for _, logits, _, _ in routing]
            losses["z_loss"] = torch.cat(squares).sum() / max(num_tokens, 1)
            continue
        blocks = []  # (scores, choices) of the tokens over which f and P are averaged
        for num_sequences, _, scores, choices in routing:
            num_blocks = num_sequences if loss.scope == "sequence" else 1
            length = len(choices) // max(num_blocks, 1)
            for start in range(0, num_blocks * length, length) if length else [0] * num_blocks:
                blocks.append((scores[start : start + length], choices[start : start + length]))
        if loss.scope == "global":
            all_choices = [row for *_, choices in routing for row in choices]
            blocks = [(torch.cat([scores for _, _, scores, _ in routing]), all_choices)]
        values = [_switch_loss(config, scores, choices) for scores, choices in blocks]
        losses[f"balance_{loss.scope}"] = torch.stack(values).mean() if values else routing[0][1].sum()
    return losses


def _switch_loss(config: Any, scores: Tensor, choices: list[list[int]]) -> Tensor:
    """E * sum_e f_e * P_e over one block of tokens; 0 for a block without tokens."""
    if not choices:
        return scores.sum()
    probabilities = scores / scores.sum(-1, keepdim=True)
    total = scores.new_zeros(())
    for e in range(config.num_experts):
        fraction = sum(row.count(e) for row in choices) / (len(choices) * config.router.k)
        total = total + fraction * probabilities[:, e].sum() / len(choices)
    return config.num_experts * total
