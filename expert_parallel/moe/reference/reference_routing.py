"""Implements the routers of the reference layer (see reference_layer.py), by one token, expert or block at a time.

They share no code with the tested layer except its random numbers (nn/random.py), on which both must agree; tests check
the distributions and independence of these by themselves. Padding is removed first:
T counts the real tokens of all ranks, in the order of the ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from expert_parallel.moe.context import StepContext, pass_seed
from expert_parallel.nn.random import Stream, gumbel, mix, normal, uniform

KEPT, REROUTED, DROPPED_CAPACITY, DROPPED_RECEIVE_BOUND, NOT_ROUTED = range(5)


@dataclass(frozen=True)
class RankTokens:
    """Holds the tokens of one rank of a layout.

    x_BSD: B may be 0. sequence_index: the index of each sequence in the micro-step's global batch; None: 0, 1, ...
    token_ids_BS: for hash routing. mask_BS: bool, False for padding. positions_S: the positions of the tokens in their
    sequences, if sequences are divided over ranks: parts with the same sequence_index then belong to one sequence;
    None: sequences are whole. document_BS: int64, the number of each token's document in its sequence; None: sequences
    are not packed.
    """

    x_BSD: Tensor
    sequence_index: list[int] | None = None
    token_ids_BS: Tensor | None = None
    mask_BS: Tensor | None = None
    positions_S: list[int] | None = None
    document_BS: Tensor | None = None


@dataclass(frozen=True)
class ReferenceToken:
    """Describes a real token.

    row: the token's index among the tokens of its rank, including padding. sequence: the number of its sequence,
    counted over the ranks in their order. index: the token's place in the global order (see TokenBatch). document: the
    number of its document in the sequence.
    """

    rank: int
    row: int
    sequence: int
    index: int
    token_id: int | None
    document: int = 0


@dataclass(frozen=True)
class ReferenceBatch:
    """Holds the real tokens of all ranks, and the keys of random numbers."""

    tokens: list[ReferenceToken]
    x_TD: Tensor
    num_ranks: int
    num_sequences: int
    training: bool
    context: StepContext


@dataclass(frozen=True)
class ReferenceRouting:
    """Holds the reference router's decision for T tokens.

    ids, outcomes: T lists of K, the expert id and the outcome of each choice. ranking: T lists of E; rerouting prefers
    larger values, and -inf excludes an expert. clean_TE, spread_TE: the logits without noise, and the standard
    deviation of their normal noise; None without such noise. weights: T tensors (K), those of the choices;
    None if they follow from the scores.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    ids: list[list[int]]
    outcomes: list[list[int]]
    ranking: list[list[float]]
    clean_TE: Tensor | None = None
    spread_TE: Tensor | None = None
    weights: list[Tensor] | None = None


def collect_tokens(ranks: list[RankTokens], training: bool, context: StepContext) -> ReferenceBatch:
    """Lists the real tokens of all ranks, in the order of the ranks."""
    tokens, rows = [], []
    numbers: dict[tuple[str, int, int], int] = {}  # the number of each sequence
    for rank, given in enumerate(ranks):
        num_here, length, _ = given.x_BSD.shape
        indices = list(range(num_here)) if given.sequence_index is None else given.sequence_index
        positions = list(range(length)) if given.positions_S is None else given.positions_S
        for b in range(num_here):
            key = ("divided", 0, indices[b]) if given.positions_S is not None else ("whole", rank, b)
            sequence = numbers.setdefault(key, len(numbers))
            for s in range(length):
                if given.mask_BS is not None and not bool(given.mask_BS[b, s]):
                    continue
                token_id = None if given.token_ids_BS is None else int(given.token_ids_BS[b, s])
                document = 0 if given.document_BS is None else int(given.document_BS[b, s])
                index = indices[b] * 2**32 + positions[s]
                tokens.append(ReferenceToken(rank, b * length + s, sequence, index, token_id, document))
                rows.append(given.x_BSD[b, s])
    nothing = ranks[0].x_BSD.reshape(-1, ranks[0].x_BSD.shape[-1])[:0]
    x_TD = torch.stack(rows) if rows else nothing
    return ReferenceBatch(tokens, x_TD, len(ranks), len(numbers), training, context)


def blocks(scope: str, batch: ReferenceBatch) -> list[list[int]]:
    """Returns, for each block of tokens that are decided on together in this scope, the indices of these tokens.

    Tokens are in the order of the block, which may be empty. The scope `document` is that of losses of scope
    `sequence`.
    """
    everyone = range(len(batch.tokens))
    if scope == "document":  # documents without real tokens are left out
        places = sorted({(token.sequence, token.document) for token in batch.tokens})
        return [[t for t in everyone if (batch.tokens[t].sequence, batch.tokens[t].document) == p] for p in places]
    if scope == "global":
        return [sorted(everyone, key=lambda t: batch.tokens[t].index)]
    if scope == "rank":
        return [[t for t in everyone if batch.tokens[t].rank == rank] for rank in range(batch.num_ranks)]
    sequences: list[list[int]] = [[] for _ in range(batch.num_sequences)]
    for t in sorted(everyone, key=lambda t: batch.tokens[t].index):
        sequences[batch.tokens[t].sequence].append(t)
    return sequences


def draw(numbers: Callable[[int, Tensor, int], Tensor], stream: Stream, batch: ReferenceBatch, width: int) -> Tensor:
    """Draws the random numbers (T, width) of one stream by a function of nn/random.py."""
    index_T = torch.tensor([token.index for token in batch.tokens], dtype=torch.int64, device=batch.x_TD.device)
    return numbers(pass_seed(batch.context, stream), index_T, width)


def best_indices(values: list[float], count: int) -> list[int]:
    """Returns the indices of the `count` largest values, in descending order; equal values in order of index."""
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:count]


def route(config: Any, parameters: dict[str, Tensor], batch: ReferenceBatch) -> ReferenceRouting:
    """Routes all tokens by the router of `config`."""
    return ROUTERS[config.router.kind](config, parameters, batch)


def _logits(parameters: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    logits = x_TD @ parameters["router.weight"].T
    return logits + parameters["router.bias"] if "router.bias" in parameters else logits


def _softmax(logits: Tensor) -> Tensor:
    exponentials = torch.exp(logits - logits.amax(-1, keepdim=True).detach())
    return exponentials / exponentials.sum(-1, keepdim=True)


def _score(score: str, logits: Tensor) -> Tensor:
    return _softmax(logits) if score == "softmax" else 1 / (1 + torch.exp(-logits))


def _take_best(logits: Tensor, scores: Tensor, ranking: list[list[float]], k: int) -> ReferenceRouting:
    """Chooses the k best experts of each token by the ranking."""
    ids = [best_indices(row, k) for row in ranking]
    return ReferenceRouting(logits, scores, ids, [[KEPT] * k for _ in ids], ranking)


def _top_k(config: Any, parameters: dict[str, Tensor], batch: ReferenceBatch) -> ReferenceRouting:
    """Implements `top_k`: Jiang et al. 2024, eq. 2; Fedus et al. 2021 (jitter); DeepSeek-V3 2024, eq. 12-16."""
    router, x_TD = config.router, batch.x_TD
    if batch.training and router.jitter > 0:
        u_TD = draw(uniform, Stream.JITTER, batch, x_TD.shape[-1])
        x_TD = x_TD * (1 - router.jitter + 2 * router.jitter * u_TD).to(x_TD.dtype)
    logits = _logits(parameters, x_TD)
    scores = _score(router.score, logits)
    ranking = scores.tolist()
    if "router.balance_bias_E" in parameters:
        bias = parameters["router.balance_bias_E"].tolist()
        ranking = [[s + b for s, b in zip(row, bias, strict=True)] for row in ranking]
    if router.group_limit is not None:
        ranking = [_within_groups(router.group_limit, row) for row in ranking]
    return _take_best(logits, scores, ranking, router.k)


def _within_groups(limits: Any, row: list[float]) -> list[float]:
    """Sets the values of all experts outside the token's best groups to -inf."""
    size = len(row) // limits.count
    groups = [row[g * size : (g + 1) * size] for g in range(limits.count)]
    group_scores = [max(group) if limits.score == "max" else sum(sorted(group)[-2:]) for group in groups]
    allowed = best_indices(group_scores, limits.limit)
    return [value if e // size in allowed else -math.inf for e, value in enumerate(row)]


def _noisy_top_k(config: Any, parameters: dict[str, Tensor], batch: ReferenceBatch) -> ReferenceRouting:
    """Implements `noisy_top_k`: Shazeer et al. 2017, eq. 3-5; Riquelme et al. 2021."""
    router = config.router
    logits = _logits(parameters, batch.x_TD)
    ranked = logits
    if batch.training:
        numbers = gumbel if router.noise == "gumbel" else normal
        noise = draw(numbers, Stream.NOISE, batch, config.num_experts).to(logits.dtype)
        if router.noise == "gumbel":
            ranked = logits + noise
        else:
            spread = torch.full_like(logits, 1 / config.num_experts if router.std is None else router.std)
            if router.noise == "learned":
                raw = batch.x_TD @ parameters["router.noise_weight"].T
                spread = torch.logaddexp(raw, torch.zeros_like(raw))  # softplus
            ranked = logits + noise * spread
            routing = _take_best(ranked, _softmax(ranked), ranked.tolist(), router.k)
            return replace(routing, clean_TE=logits, spread_TE=spread)
    return _take_best(logits, _softmax(logits), ranked.tolist(), router.k)


def _gshard(config: Any, parameters: dict[str, Tensor], batch: ReferenceBatch) -> ReferenceRouting:
    """Implements `gshard`: Lepikhin et al. 2020, algorithm 1."""
    router, num_experts = config.router, config.num_experts
    logits = _logits(parameters, batch.x_TD)
    scores = _softmax(logits)
    clean = logits.tolist()  # without noise
    values = scores.tolist()
    ranking = clean
    ids, outcomes = [], []
    if batch.training and router.second == "gumbel":
        ranking = (logits + draw(gumbel, Stream.SECOND_EXPERT, batch, num_experts).to(logits.dtype)).tolist()
    numbers = draw(uniform, Stream.SECOND_EXPERT, batch, 1).tolist()
    for t in range(len(batch.tokens)):
        first = best_indices(clean[t], 1)[0]
        second = next(e for e in best_indices(ranking[t], num_experts) if e != first)
        outcome = KEPT
        if batch.training and router.second == "proportional":
            share = values[t][second] / (values[t][first] + values[t][second])
            outcome = KEPT if numbers[t][0] < share / router.threshold else NOT_ROUTED
        ids.append([first, second])
        outcomes.append([KEPT, outcome])
    return ReferenceRouting(logits, scores, ids, outcomes, ranking)


def _hash(config: Any, parameters: dict[str, Tensor], batch: ReferenceBatch) -> ReferenceRouting:
    """Chooses experts by a hash of the token id. All scores are equal, so the normalised weights are 1 / k."""
    ids_T = torch.tensor([token.token_id for token in batch.tokens], dtype=torch.int64, device=batch.x_TD.device)
    ranking = uniform(mix(config.router.seed), ids_T, config.num_experts).tolist()
    logits = batch.x_TD.new_zeros(len(ids_T), config.num_experts)
    return _take_best(logits, _softmax(logits), ranking, config.router.k)


def _expert_choice(config: Any, parameters: dict[str, Tensor], batch: ReferenceBatch) -> ReferenceRouting:
    """Implements `expert_choice`: Zhou et al. 2022, eq. 1-3."""
    router, num_experts = config.router, config.num_experts
    logits = _logits(parameters, batch.x_TD)
    scores = _softmax(logits)
    ranking = scores.tolist()
    outcomes = [[NOT_ROUTED] * num_experts for _ in batch.tokens]
    factor = Fraction(str(router.train if batch.training else router.eval))
    for block in blocks(router.scope, batch):
        capacity = math.ceil(factor * len(block) / num_experts)
        for e in range(num_experts):
            column = [ranking[t][e] for t in block]
            for place in best_indices(column, capacity):
                outcomes[block[place]][e] = KEPT
    return ReferenceRouting(logits, scores, [list(range(num_experts)) for _ in batch.tokens], outcomes, ranking)


def _sinkhorn(config: Any, parameters: dict[str, Tensor], batch: ReferenceBatch) -> ReferenceRouting:
    """Implements `sinkhorn`: Clark et al. 2022 (S-BASE)."""
    router = config.router
    logits = _logits(parameters, batch.x_TD)
    scores = _score(router.score, logits)
    ranking = logits.tolist()
    routing = _take_best(logits, scores, ranking, router.k)
    if batch.training:
        for block in blocks(router.scope, batch):
            balanced = _sinkhorn_block(router, [ranking[t] for t in block]) if block else []
            for t, row in zip(block, balanced, strict=True):
                routing.ids[t][:] = best_indices(row, router.k)
    return routing


def _sinkhorn_block(router: Any, logits: list[list[float]]) -> list[list[float]]:
    """Balances the logits of one block by the loop of Megatron-Core's sinkhorn."""
    rows, columns = range(len(logits)), range(len(logits[0]))
    cost = [[math.exp(value - max(row)) for value in row] for row in logits]
    d1 = [1.0 for _ in columns]
    for _ in range(router.max_iterations):
        d0 = [1 / (len(rows) * sum(d1[e] * cost[t][e] for e in columns)) for t in rows]
        d1_new = [1 / (len(columns) * sum(d0[t] * cost[t][e] for t in rows)) for e in columns]
        change = sum(abs(new - old) for new, old in zip(d1_new, d1, strict=True)) / len(columns)
        d1 = d1_new
        if change <= router.tolerance:
            break
    return [[d1[e] * cost[t][e] * d0[t] for e in columns] for t in rows]


def _sparsemixer(config: Any, parameters: dict[str, Tensor], batch: ReferenceBatch) -> ReferenceRouting:
    """Implements `sparsemixer`: Liu et al. 2024 (GRIN), section 2."""
    logits, num_experts = _logits(parameters, batch.x_TD), config.num_experts
    noise = draw(gumbel, Stream.MIXER_CHOICE, batch, 2 * num_experts).to(logits.dtype).tolist()
    lots = draw(uniform, Stream.MIXER_STEP, batch, 2).tolist()
    ids, weights = [], []
    for t, row in enumerate(logits.tolist()):
        chosen: list[int] = []
        of_token = []
        for j in range(2):
            left = [e for e in range(num_experts) if e not in chosen]
            best = max(row[e] for e in left)
            near = [e for e in left if best - row[e] <= 2 * config.router.margin * max(abs(row[e]), best)]
            added = noise[t][j * num_experts :] if batch.training else [0.0] * num_experts
            expert = min(near, key=lambda e: (-row[e] - added[e], e))
            share = _softmax(logits[t, near])[near.index(expert)]
            if batch.training and row[expert] < best and lots[t][j] < 0.75:
                share = share - 2 / 3 * share.detach()  # a third of it, with the gradient of all of it
            chosen.append(expert)
            of_token.append(share)
        ids.append(chosen)
        weights.append(torch.stack(of_token))
    outcomes = [[KEPT] * 2 for _ in ids]
    return ReferenceRouting(logits, _softmax(logits), ids, outcomes, logits.tolist(), weights=weights)


ROUTERS: dict[str, Callable[[Any, dict[str, Tensor], ReferenceBatch], ReferenceRouting]] = {
    "top_k": _top_k,
    "noisy_top_k": _noisy_top_k,
    "gshard": _gshard,
    "hash": _hash,
    "expert_choice": _expert_choice,
    "sinkhorn": _sinkhorn,
    "sparsemixer": _sparsemixer,
}
