"""Implements the MoE layer as plainly as possible, by loops over tokens, choices and experts: the reference for tests.

It follows the formulas, on one rank: nothing here imports routers, capacity, dispatch or experts. Only the random
numbers of nn/random.py are those of the layer that it tests. `tokens_by_rank` holds the tokens that each rank of a
layout would have, so that settings which depend on the tokens of one rank (capacity, `scope: rank`) have the same
meaning. The routers are in reference_routing.py, the feed-forward networks in reference_experts.py.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from expert_parallel.moe.context import StepContext
from expert_parallel.moe.reference.reference_experts import shared, weighted_expert
from expert_parallel.moe.reference.reference_routing import (
    DROPPED_CAPACITY,
    DROPPED_RECEIVE_BOUND,
    KEPT,
    NOT_ROUTED,
    REROUTED,
    RankTokens,
    ReferenceBatch,
    ReferenceRouting,
    blocks,
    collect_tokens,
    draw,
    route,
)
from expert_parallel.nn.random import Stream, uniform

__all__ = ["RankTokens", "ReferenceOutput", "reference_layer"]


@dataclass(frozen=True)
class ReferenceOutput:
    """Holds the results of the reference layer. Lists of tensors have one entry for each rank, and T includes padding.

    y: (B, S, D). losses: of the whole micro-step, before coefficients. dropped: bool (T, K), by capacity or receive
    bound. routed_E: the choices of each expert that the router made. outcomes: uint8 (T, K), values of types.Outcome.
    expert_ids: int64 (T, K), after rerouting; 0 for padding, or 0 to E - 1 with expert choice. kept_E: the choices that
    each expert computes.
    """

    y: list[Tensor]
    losses: dict[str, Tensor]
    dropped: list[Tensor]
    routed_E: list[int]
    outcomes: list[Tensor]
    expert_ids: list[Tensor]
    kept_E: list[int]


def reference_layer(
    config: Any,
    parameters: dict[str, Tensor],
    tokens_by_rank: list[Tensor] | list[RankTokens] | list[Tensor | RankTokens],
    training: bool = True,
    context: StepContext = StepContext(),  # noqa: B008
    rank_of_expert: tuple[int, ...] | None = None,
) -> ReferenceOutput:
    """Computes the layer of `config` (a MoEConfig without dropout) on the tokens of all ranks, differentiably.

    parameters: logical name -> tensor, as `logical_parameters` names them: `router.weight`, `router.balance_bias_E`,
    `experts.3.w_in`, `shared_experts.w_in.weight`, ... tokens_by_rank: a tensor is (B, S, D). context: only the keys of
    random numbers are used; its tensors are replaced by those of tokens_by_rank. rank_of_expert: needed for
    receive_bound. Raises a ValueError if that is missing.
    """
    ranks = [entry if isinstance(entry, RankTokens) else RankTokens(entry) for entry in tokens_by_rank]
    batch = collect_tokens(ranks, training, context)
    routing = route(config, parameters, batch)
    ids, outcomes = _apply_capacity(config, routing, batch)
    weights = _weigh(config, routing, ids, outcomes)
    _apply_receive_bound(config, batch, ids, outcomes, rank_of_expert)
    outputs = [_shared_outputs(config, parameters, rank.x_BSD) for rank in ranks]
    num_choices = config.num_experts if config.router.kind == "expert_choice" else config.router.k
    unrouted = torch.arange(num_choices) if config.router.kind == "expert_choice" else torch.zeros(num_choices).long()
    all_ids = [unrouted.repeat(len(rows), 1) for rows in outputs]
    all_outcomes = [torch.full((len(rows), num_choices), NOT_ROUTED, dtype=torch.uint8) for rows in outputs]
    for t, token in enumerate(batch.tokens):
        all_ids[token.rank][token.row] = torch.tensor(ids[t])
        all_outcomes[token.rank][token.row] = torch.tensor(outcomes[t], dtype=torch.uint8)
        for j, expert in enumerate(ids[t]):
            if outcomes[t][j] in (KEPT, REROUTED):
                y = weighted_expert(config, parameters, expert, batch.x_TD[t], weights[t][j])
                outputs[token.rank][token.row] = outputs[token.rank][token.row] + y
    return ReferenceOutput(
        y=[_stack(rows, rank.x_BSD) for rows, rank in zip(outputs, ranks, strict=True)],
        losses=_losses(config, routing, batch),
        dropped=[(outcome == DROPPED_CAPACITY) | (outcome == DROPPED_RECEIVE_BOUND) for outcome in all_outcomes],
        routed_E=_count(config, routing.ids, routing.outcomes, (KEPT,)),
        outcomes=all_outcomes,
        expert_ids=all_ids,
        kept_E=_count(config, ids, outcomes, (KEPT, REROUTED)),
    )


def _shared_outputs(config: Any, parameters: dict[str, Tensor], x_BSD: Tensor) -> list[Tensor]:
    """Returns the output of the shared experts for each token, including padding; zeros without shared experts."""
    rows = x_BSD.reshape(x_BSD.shape[0] * x_BSD.shape[1], x_BSD.shape[2])
    return [torch.zeros_like(x) if config.shared_experts is None else shared(config, parameters, x) for x in rows]


def _stack(rows: list[Tensor], x_BSD: Tensor) -> Tensor:
    """Stacks the rows of one rank to the shape of its input."""
    return torch.stack(rows).view(x_BSD.shape) if rows else x_BSD.clone()


def _count(config: Any, ids: list[list[int]], outcomes: list[list[int]], wanted: tuple[int, ...]) -> list[int]:
    """Counts the choices of each expert whose outcome is one of `wanted`."""
    counts = [0] * config.num_experts
    for ids_K, outcomes_K in zip(ids, outcomes, strict=True):
        for expert, outcome in zip(ids_K, outcomes_K, strict=True):
            counts[expert] += outcome in wanted
    return counts


def _weigh(config: Any, routing: ReferenceRouting, ids: list[list[int]], outcomes: list[list[int]]) -> list[Tensor]:
    """Returns the weights of each token's choices, K of each: scale * score, normalised if the router normalises.

    Hash routing always normalises its equal scores; expert choice never normalises; sparsemixer has weights of its own.
    """
    if routing.weights is not None:
        return routing.weights
    router = config.router
    normalise = router.kind == "hash" or (router.kind != "expert_choice" and router.normalise)
    scale = 1.0 if router.kind == "hash" else router.scale
    weights = []
    for t, row in enumerate(ids):
        weight = torch.stack([routing.scores_TE[t, expert] for expert in row])
        counted = [True for _ in row]
        if config.capacity.kind != "dropless" and config.capacity.renormalise:
            counted = [outcome in (KEPT, REROUTED) for outcome in outcomes[t]]
            weight = torch.where(torch.tensor(counted, device=weight.device), weight, torch.zeros_like(weight))
        if normalise and any(counted):
            weight = weight / weight.sum()
        weights.append(scale * weight)
    return weights


def _apply_capacity(
    config: Any, routing: ReferenceRouting, batch: ReferenceBatch
) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the expert ids and outcomes after capacity, by a loop over each block's queue."""
    ids, outcomes = [list(row) for row in routing.ids], [list(row) for row in routing.outcomes]
    if config.capacity.kind == "dropless":
        return ids, outcomes
    for block in blocks(config.capacity.scope, batch):
        room = [_capacity(config, len(block), batch.training)] * config.num_experts
        overflowing = []
        for t, j in _queue(config, routing, batch, block):
            if room[ids[t][j]] > 0:
                room[ids[t][j]] -= 1
            else:
                outcomes[t][j] = DROPPED_CAPACITY
                overflowing.append((t, j))
        if config.capacity.overflow == "drop":
            continue
        for t, j in overflowing:
            used = {e for e, outcome in zip(routing.ids[t], routing.outcomes[t], strict=True) if outcome != NOT_ROUTED}
            used |= {e for e, outcome in zip(ids[t], outcomes[t], strict=True) if outcome == REROUTED}
            ranking = routing.ranking[t]
            others = [e for e in range(config.num_experts) if e not in used and room[e] > 0 and ranking[e] > -math.inf]
            if others:
                best = min(others, key=lambda e: (-ranking[e], e))
                ids[t][j], outcomes[t][j] = best, REROUTED
                room[best] -= 1
    return ids, outcomes


def _capacity(config: Any, num_tokens: int, training: bool) -> int:
    """Returns the capacity of an expert in a block of so many real tokens."""
    setting = config.capacity.train if training else config.capacity.eval
    if config.capacity.kind == "absolute":
        return setting
    ideal = Fraction(str(setting)) * num_tokens * config.router.k / config.num_experts
    return max(config.capacity.minimum, math.ceil(ideal))


def _queue(config: Any, routing: ReferenceRouting, batch: ReferenceBatch, block: list[int]) -> list[tuple[int, int]]:
    """Returns the routed choices of a block as (token, choice), in queue order."""
    capacity, k = config.capacity, config.router.k
    scores = routing.scores_TE.tolist()
    tokens = list(block)
    if capacity.priority == "random" and batch.training:
        numbers = draw(uniform, Stream.PRIORITY, batch, 1).tolist()
        tokens.sort(key=lambda t: numbers[t][0])
    if capacity.priority == "batch_priority":
        tokens.sort(key=lambda t: -max(scores[t][e] for e in routing.ids[t]))
    if capacity.first_choices_first:
        queue = [(t, j) for j in range(k) for t in tokens]
    else:
        queue = [(t, j) for t in tokens for j in range(k)]
    if capacity.priority == "probability":
        queue.sort(key=lambda tj: -scores[tj[0]][routing.ids[tj[0]][tj[1]]])
    return [(t, j) for t, j in queue if routing.outcomes[t][j] != NOT_ROUTED]


def _apply_receive_bound(
    config: Any,
    batch: ReferenceBatch,
    ids: list[list[int]],
    outcomes: list[list[int]],
    rank_of_expert: tuple[int, ...] | None,
) -> None:
    """Marks choices beyond the receive bound in `outcomes`, in place."""
    if config.capacity.kind != "dropless" or config.capacity.receive_bound is None:
        return
    if rank_of_expert is None:
        raise ValueError("capacity.receive_bound is set: give rank_of_expert, the rank of each expert")
    ranks = range(batch.num_ranks)
    rows: dict[tuple[int, int], list[tuple[int, int]]] = {(s, d): [] for s in ranks for d in ranks}
    kept = [(t, j) for t, row in enumerate(outcomes) for j, outcome in enumerate(row) if outcome in (KEPT, REROUTED)]
    for t, j in sorted(kept, key=lambda tj: (tj[1], tj[0])):
        rows[batch.tokens[t].rank, rank_of_expert[ids[t][j]]].append((t, j))
    limit = math.ceil(Fraction(str(config.capacity.receive_bound)) * len(kept) / len(ranks))
    for d in ranks:
        allowed = _send_quotas([len(rows[s, d]) for s in ranks], limit)
        for s in ranks:
            for t, j in rows[s, d][allowed[s] :]:
                outcomes[t][j] = DROPPED_RECEIVE_BOUND


def _send_quotas(sent: list[int], limit: int) -> list[int]:
    """Returns how many of its rows each source may send to one destination that receives at most `limit`."""
    total = sum(sent)
    if total <= limit:
        return sent
    allowed = [limit * count // total for count in sent]
    rest, s = limit - sum(allowed), 0
    while rest > 0:
        if allowed[s] < sent[s]:
            allowed[s] += 1
            rest -= 1
        s = (s + 1) % len(sent)
    return allowed


def _losses(config: Any, routing: ReferenceRouting, batch: ReferenceBatch) -> dict[str, Tensor]:
    """Returns the losses of the whole micro-step by name, before coefficients."""
    losses = {}
    for loss in config.losses:
        if loss.kind == "z_loss":
            largest = routing.logits_TE.detach().amax(-1)
            log_sums = largest + torch.log(torch.exp(routing.logits_TE - largest[:, None]).sum(-1))
            losses["z_loss"] = (log_sums**2).sum() / max(len(batch.tokens), 1)
            continue
        if loss.kind in ("importance", "load"):
            amounts = _importance if loss.kind == "importance" else _load
            losses[loss.kind] = _squared_variation(amounts(config, loss, routing), routing)
            continue
        counted = blocks("document" if loss.scope == "sequence" else loss.scope, batch)
        values = [_switch_loss(config, loss, routing, block) for block in counted]
        name = f"balance_{loss.scope}" + ("_first" if loss.choices == "first" else "")
        name += "_pooled" if loss.layers == "pooled" else ""
        losses[name] = torch.stack(values).mean() if values else routing.scores_TE[:0].sum()
    return losses


def _switch_loss(config: Any, loss: Any, routing: ReferenceRouting, block: list[int]) -> Tensor:
    """Computes E * sum over experts of f_e * P_e for one block of tokens; 0 for a block without tokens (Fedus et al.
    2021, eq. 4-6)."""
    if not block:
        return routing.scores_TE[:0].sum()
    probabilities = [routing.scores_TE[t] / routing.scores_TE[t].sum() for t in block]
    counted = 1 if loss.choices == "first" else len(routing.ids[block[0]])
    total = routing.scores_TE.new_zeros(())
    for e in range(config.num_experts):
        chosen = 0
        for t in block:
            for j in range(counted):
                chosen += routing.ids[t][j] == e and routing.outcomes[t][j] != NOT_ROUTED
        mean = torch.stack([row[e] for row in probabilities]).sum() / len(block)
        total = total + chosen / (len(block) * counted) * mean
    return config.num_experts * total


def _importance(config: Any, loss: Any, routing: ReferenceRouting) -> list[Tensor]:
    """Returns the importance of each expert (Shazeer et al. 2017, eq. 6; Riquelme et al. 2021)."""
    importance = [routing.scores_TE.new_zeros(()) for _ in range(config.num_experts)]
    weights = _weigh(config, routing, routing.ids, [[KEPT] * len(row) for row in routing.ids])  # before any drops
    for t, row in enumerate(routing.ids):
        if loss.of == "weights":
            for j, expert in enumerate(row):
                if routing.outcomes[t][j] != NOT_ROUTED:
                    importance[expert] = importance[expert] + weights[t][j]
        else:
            scores = routing.scores_TE[t] if routing.clean_TE is None else torch.exp(routing.clean_TE[t])
            importance = [one + scores[e] / scores.sum() for e, one in enumerate(importance)]
    return importance


def _load(config: Any, loss: Any, routing: ReferenceRouting) -> list[Tensor]:
    """Returns the load of each expert (Shazeer et al. 2017, eq. 8-10; Riquelme et al. 2021); without noise, its number
    of choices."""
    load = [routing.scores_TE.new_zeros(()) for _ in range(config.num_experts)]
    for t, row in enumerate(routing.ids):
        for e in range(config.num_experts):
            if routing.clean_TE is None or routing.spread_TE is None:
                load[e] = load[e] + float(e in row)
                continue
            rivals = [i for i in range(config.num_experts) if i != e or loss.threshold == "all"]
            threshold = torch.stack([routing.logits_TE[t, i] for i in rivals]).sort(descending=True)[0][len(row) - 1]
            z = (routing.clean_TE[t, e] - threshold) / routing.spread_TE[t, e]
            load[e] = load[e] + (1 + torch.erf(z / math.sqrt(2))) / 2
    return load


def _squared_variation(amounts: list[Tensor], routing: ReferenceRouting) -> Tensor:
    """Computes the variance of the amounts, divided by the square of their mean; 0 without tokens."""
    if not routing.ids:
        return routing.scores_TE[:0].sum()
    mean = torch.stack(amounts).mean()
    return torch.stack([(amount - mean) ** 2 for amount in amounts]).mean() / mean**2
