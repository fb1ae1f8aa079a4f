"""Computes statistics of the tokens that each expert of a block received: which ones, their classes of characters, and
how far a token's id alone determines its expert."""

from dataclasses import dataclass

import torch
from torch import Tensor

TOP_TOKENS = 8
MIN_TOKENS = 4  # occurrences of a token that is listed: shares of fewer are noise
SHUFFLES = 10


@dataclass(frozen=True)
class TopToken:
    """Holds a token that an expert receives more often than others do.

    count: how often the expert computed the token. share: count divided by the number of all choices that the expert
    computed. lift: that share divided by the token's share of the choices of all experts.
    """

    token: int
    count: int
    share: float
    lift: float


@dataclass(frozen=True)
class Specialization:
    """Measures how far a token's id determines its first expert (the one with the largest weight), in bits over the
    sample.

    bits: mutual information of token and first expert. chance_bits: the same with the experts shuffled over the tokens,
    which is above 0 in a small sample of many different tokens. entropy_bits: entropy of the first experts. adjusted:
    (bits - chance_bits) / (entropy_bits - chance_bits), from 0 (no more than chance) to 1 (the token determines the
    expert) (Vinh, Epps and Bailey 2010, who compute the chance by a formula instead of shuffling)."""

    bits: float
    chance_bits: float
    entropy_bits: float
    adjusted: float


@dataclass(frozen=True)
class ExpertStats:
    """Holds the statistics of the experts of one transformer block. A choice is a pair of a token and one of its
    experts.

    count: number of choices that each expert computed. first_count: number of tokens for which each expert has the
    largest weight. top_tokens: the most typical tokens of each expert. class_share: (experts, character classes), the
    share of each class in an expert's choices; a row sums to 1, or to 0 if the expert has none. overall_class_share:
    the same over the choices of all experts.
    """

    count: list[int]
    first_count: list[int]
    top_tokens: list[list[TopToken]]
    class_share: list[list[float]]
    overall_class_share: list[float]
    specialization: Specialization


def compute_expert_stats(
    tokens_T: Tensor, class_T: Tensor, ids_TK: Tensor, computed_TK: Tensor, first_T: Tensor, sizes: tuple[int, int]
) -> ExpertStats:
    """Computes the statistics of one block. tokens_T: int64, token ids. class_T: int64, their character classes.
    ids_TK: int64, the experts of each token. computed_TK: bool, the choices to count. first_T: int64, the expert with
    the largest weight, -1: none. sizes: number of (experts, classes)."""
    num_experts, num_classes = sizes
    token_N = tokens_T[:, None].expand_as(ids_TK)[computed_TK]
    class_N = class_T[:, None].expand_as(ids_TK)[computed_TK]
    expert_N = ids_TK[computed_TK]
    is_served_T = first_T >= 0

    kinds = torch.bincount(expert_N * num_classes + class_N, minlength=num_experts * num_classes)
    kinds = kinds.view(num_experts, num_classes).double()
    return ExpertStats(
        count=torch.bincount(expert_N, minlength=num_experts).tolist(),
        first_count=torch.bincount(first_T[is_served_T], minlength=num_experts).tolist(),
        top_tokens=_top_tokens(token_N, expert_N, num_experts),
        class_share=(kinds / kinds.sum(1, keepdim=True).clamp(min=1)).tolist(),
        overall_class_share=(kinds.sum(0) / kinds.sum().clamp(min=1)).tolist(),
        specialization=specialization(tokens_T[is_served_T], first_T[is_served_T]),
    )


def _top_tokens(token_N: Tensor, expert_N: Tensor, num_experts: int) -> list[list[TopToken]]:
    """Returns the tokens with lift above 1 of each expert, ordered by count * log(lift), which is what each adds to the
    mutual information of expert and token. Lift alone would rank the rarest first."""
    names, token_N = token_N.unique(return_inverse=True)
    pairs, count = (expert_N * len(names) + token_N).unique(return_counts=True)
    expert, token = pairs // max(len(names), 1), pairs % max(len(names), 1)
    of_expert = torch.bincount(expert_N, minlength=num_experts)
    of_token = torch.bincount(token_N, minlength=len(names))
    share = count.double() / of_expert[expert]
    lift = share / (of_token[token].double() / len(token_N))
    gain = count * lift.log()
    top_tokens: list[list[TopToken]] = []
    for number in range(num_experts):
        candidates = ((expert == number) & (count >= MIN_TOKENS) & (lift > 1)).nonzero().flatten()
        # All tensors are on the CPU, so reading them waits for no device.
        best = candidates[gain[candidates].argsort(descending=True, stable=True)][:TOP_TOKENS].tolist()
        top_tokens.append(
            [TopToken(int(names[token[i]]), int(count[i]), float(share[i]), float(lift[i])) for i in best]
        )
    return top_tokens


def specialization(tokens_T: Tensor, first_T: Tensor) -> Specialization:
    """Computes the adjusted mutual information of tokens and first experts. tokens_T, first_T: int64, of the same
    tokens."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(first_T), generator=generator) for _ in range(SHUFFLES)]
    bits = mutual_information(tokens_T, first_T)
    chance = sum(mutual_information(tokens_T, first_T[order]) for order in orders) / SHUFFLES
    entropy = entropy_bits(first_T)
    room = entropy - chance
    adjusted = min(max((bits - chance) / room, 0.0), 1.0) if room > 1e-9 else 0.0
    return Specialization(bits, chance, entropy, adjusted)


def mutual_information(a_T: Tensor, b_T: Tensor) -> float:
    """Returns the mutual information of the values in two tensors, in bits, from their relative frequencies. a_T, b_T:
    int64, at least 0."""
    pair_T = a_T * (int(b_T.max()) + 1 if len(b_T) else 1) + b_T
    return max(entropy_bits(a_T) + entropy_bits(b_T) - entropy_bits(pair_T), 0.0)


def entropy_bits(values_T: Tensor) -> float:
    """Returns the entropy of the values' relative frequencies, in bits."""
    share = values_T.unique(return_counts=True)[1].double() / max(len(values_T), 1)
    return float(-(share * share.log2()).sum())
