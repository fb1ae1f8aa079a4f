"""What each expert of a block was given, in numbers: its tokens, their kinds of characters, and how far the token alone
decides."""

from dataclasses import dataclass

import torch
from torch import Tensor

TOP_TOKENS = 8
MIN_TOKENS = 4  # that a token must occur to be named: fewer say little
SHUFFLES = 10


@dataclass(frozen=True)
class Liked:
    """count: of the expert's computed choices. share: of all of them. lift: share over the token's share of all
    experts' choices."""

    token: int
    count: int
    share: float
    lift: float


@dataclass(frozen=True)
class Specialisation:
    """How far a token's identity decides its first expert. bits: mutual information of the two over the sample.
    chance_bits: what is found with the experts shuffled over the tokens (a small sample of many tokens shows some
    always). entropy_bits: of the first experts. adjusted: (bits - chance) / (entropy - chance), 0: no more than chance,
    1: the token decides (adjusted for chance as in Vinh, Epps and Bailey 2010, by shuffling)."""

    bits: float
    chance_bits: float
    entropy_bits: float
    adjusted: float


@dataclass(frozen=True)
class Habits:
    """Of one block. count: computed choices of each expert. first_count: tokens whose first expert it is. liked: by
    expert. class_share: (experts, classes), rows that sum to 1, 0 for an expert without choices;
    overall_class_share: of all choices."""

    count: list[int]
    first_count: list[int]
    liked: list[list[Liked]]
    class_share: list[list[float]]
    overall_class_share: list[float]
    specialisation: Specialisation


def habits_of(
    tokens_T: Tensor, class_T: Tensor, ids_TK: Tensor, computed_TK: Tensor, first_T: Tensor, sizes: tuple[int, int]
) -> Habits:
    """tokens_T, class_T, first_T (-1: no expert): int64. ids_TK: int64; computed_TK: bool, which of them count. sizes:
    experts, classes."""
    num_experts, num_classes = sizes
    token_N = tokens_T[:, None].expand_as(ids_TK)[computed_TK]
    class_N = class_T[:, None].expand_as(ids_TK)[computed_TK]
    expert_N = ids_TK[computed_TK]
    is_served_T = first_T >= 0

    kinds = torch.bincount(expert_N * num_classes + class_N, minlength=num_experts * num_classes)
    kinds = kinds.view(num_experts, num_classes).double()
    return Habits(
        count=torch.bincount(expert_N, minlength=num_experts).tolist(),
        first_count=torch.bincount(first_T[is_served_T], minlength=num_experts).tolist(),
        liked=_liked(token_N, expert_N, num_experts),
        class_share=(kinds / kinds.sum(1, keepdim=True).clamp(min=1)).tolist(),
        overall_class_share=(kinds.sum(0) / kinds.sum().clamp(min=1)).tolist(),
        specialisation=specialisation(tokens_T[is_served_T], first_T[is_served_T]),
    )


def _liked(token_N: Tensor, expert_N: Tensor, num_experts: int) -> list[list[Liked]]:
    """Those with lift above 1, ordered by count * log(lift): what each adds to the mutual information of the expert's
    tokens. Lift alone would name the rarest."""
    names, token_N = token_N.unique(return_inverse=True)
    pairs, count = (expert_N * len(names) + token_N).unique(return_counts=True)
    expert, token = pairs // max(len(names), 1), pairs % max(len(names), 1)
    of_expert = torch.bincount(expert_N, minlength=num_experts)
    of_token = torch.bincount(token_N, minlength=len(names))
    share = count.double() / of_expert[expert]
    lift = share / (of_token[token].double() / len(token_N))
    gain = count * lift.log()
    liked: list[list[Liked]] = []
    for number in range(num_experts):
        candidates = ((expert == number) & (count >= MIN_TOKENS) & (lift > 1)).nonzero().flatten()
        best = candidates[gain[candidates].argsort(descending=True, stable=True)][:TOP_TOKENS].tolist()
        liked.append([Liked(int(names[token[i]]), int(count[i]), float(share[i]), float(lift[i])) for i in best])
    return liked


def specialisation(tokens_T: Tensor, first_T: Tensor) -> Specialisation:
    """tokens_T, first_T: int64, each token and its first expert."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(first_T), generator=generator) for _ in range(SHUFFLES)]
    bits = mutual_information(tokens_T, first_T)
    chance = sum(mutual_information(tokens_T, first_T[order]) for order in orders) / SHUFFLES
    entropy = entropy_bits(first_T)
    room = entropy - chance
    adjusted = min(max((bits - chance) / room, 0.0), 1.0) if room > 1e-9 else 0.0
    return Specialisation(bits, chance, entropy, adjusted)


def mutual_information(a_T: Tensor, b_T: Tensor) -> float:
    """Bits, from relative frequencies. int64, of any values from 0 on."""
    pair_T = a_T * (int(b_T.max()) + 1 if len(b_T) else 1) + b_T
    return max(entropy_bits(a_T) + entropy_bits(b_T) - entropy_bits(pair_T), 0.0)


def entropy_bits(values_T: Tensor) -> float:
    share = values_T.unique(return_counts=True)[1].double() / max(len(values_T), 1)
    return float(-(share * share.log2()).sum())
