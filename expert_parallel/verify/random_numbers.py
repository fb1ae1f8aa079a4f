"""Checks random numbers by themselves, since the reference draws its noise by the same functions: they must fill their
distribution, and differ between steps, micro-steps and layers."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from expert_parallel.moe import context
from expert_parallel.moe.context import StepContext
from expert_parallel.nn import random
from expert_parallel.nn.random import Stream

NUM_ROWS = 2048
NUM_COLUMNS = 8
NUM_PARTS = 8  # of a distribution, which must have equal shares of the numbers
SIGMAS = 6.0  # a right share is further away from its mean once in 10^9 draws
PROBABILITY = 0.25  # of dropout

# Name -> (function of nn/random.py, its distribution function, which makes the numbers uniform again).
DISTRIBUTIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "uniform": ("uniform", lambda x: x),
    "normal": ("normal", lambda x: 0.5 * (1 + torch.erf(x / 2**0.5))),
    "Gumbel": ("gumbel", lambda x: torch.exp(-torch.exp(-x))),
}


def check_random_numbers(seed: int) -> list[str]:
    """Returns each error as a sentence. seed: of the run."""
    return [*_check_seeds(StepContext(seed=seed)), *_check_distributions(seed), *_check_dropout(seed)]


def _check_seeds(start: StepContext) -> list[str]:
    """Checks that each part of the key changes the seed."""
    later = {
        "step": replace(start, step=1),
        "micro-step": replace(start, micro_step=1),
        "layer": replace(start, layer=1),
    }
    found = []
    for what, key in later.items():
        if any(context.pass_seed(start, stream) == context.pass_seed(key, stream) for stream in Stream):
            found.append(f"the router's noise is the same in every {what}: the {what} is missing in its seed")
        if context.dropout_seed(start) == context.dropout_seed(key):
            found.append(f"dropout is the same in every {what}: the {what} is missing in its seed")
    if context.dropout_seed(start) == context.dropout_seed(replace(start, coordinate=1)):
        found.append("dropout is the same on every rank: the rank's coordinate is missing in its seed")
    if len({context.pass_seed(start, stream) for stream in Stream}) < len(Stream):
        found.append("two uses of random numbers share a seed: the stream is missing in it")
    return found


def _check_distributions(seed: int) -> list[str]:
    """Checks that equal parts of each distribution have equal shares of the numbers, and that seeds change them."""
    rows_T, found = torch.arange(NUM_ROWS), []
    for name, (function, cumulative) in DISTRIBUTIONS.items():
        numbers = getattr(random, function)(random.mix(seed, 0), rows_T, NUM_COLUMNS)
        share = cumulative(numbers.double()).flatten()
        part = (share.nan_to_num(-1) * NUM_PARTS).floor().clamp(-1, NUM_PARTS).long() + 1
        shares = torch.bincount(part, minlength=NUM_PARTS + 2).double() / share.numel()
        wanted = torch.tensor([0.0, *[1 / NUM_PARTS] * NUM_PARTS, 0.0]).double()
        if _is_far(shares, wanted, share.numel()):
            half = float(shares[1 : 1 + NUM_PARTS // 2].sum())
            found.append(
                f"{name} random numbers do not fill their range evenly: {100 * half:.0f} % of them lie in the lower "
                "half of the distribution, 50 % must"
            )
        if torch.equal(numbers, getattr(random, function)(random.mix(seed, 1), rows_T, NUM_COLUMNS)):
            found.append(f"{name} random numbers do not depend on the seed: they are the same in every step")
    return found


def _check_dropout(seed: int) -> list[str]:
    """Checks the share of zeros, and the values of the others."""
    after = random.dropout(torch.ones(NUM_ROWS, NUM_COLUMNS).double(), PROBABILITY, random.mix(seed, 0))
    found, share = [], (after == 0).double().mean()
    if _is_far(share[None], torch.tensor([PROBABILITY]).double(), after.numel()):
        found.append(
            f"dropout of {PROBABILITY:.0%} drops {float(share):.0%} of the numbers: its random numbers do not "
            "fill their range"
        )
    kept = after[after != 0]
    if not torch.allclose(kept, torch.ones_like(kept) / (1 - PROBABILITY)):
        found.append("dropout must divide the numbers that it keeps by 1 - probability")
    return found


def _is_far(shares: Tensor, wanted: Tensor, count: int) -> bool:
    """Returns True if a share of `count` draws cannot have the wanted probability."""
    return bool(((shares - wanted).abs() > SIGMAS * (wanted * (1 - wanted) / count).sqrt()).any())
