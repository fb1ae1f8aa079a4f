"""Covers factors pairwise: few cases in which every two values of every two factors meet at least once."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, islice, product
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, str], tuple[str, str]]


def all_cases(factors: Mapping[str, Sequence[Any]], possible: Callable[[Case], bool]) -> list[Case]:
    """The whole product, without the impossible."""
    cases = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return [case for case in cases if possible(case)]


def pairwise_cases(
    factors: Mapping[str, Sequence[Any]],
    possible: Callable[[Case], bool],
    cost: Callable[[Case], float] = lambda case: 0.0,
) -> list[Case]:
    """Every pair that a possible case has stands in one of these. Greedy: where the product is small, again and again
    the case that covers most pairs not yet covered; else, for one pair after the other, the best of some cases with
    it. Of those that cover as many pairs, the one that costs least."""
    if math.prod(map(len, factors.values())) <= 5000:
        return _from_the_product(factors, possible, cost)
    covered: set[Pair] = set()
    chosen = []
    for (one, values), (two, others) in combinations(factors.items(), 2):
        for value, other in product(values, others):
            if ((one, repr(value)), (two, repr(other))) in covered:
                continue
            candidates = _some_cases({**factors, one: [value], two: [other]}, possible)
            best = max(candidates, key=lambda case: (len(_pairs(case) - covered), -cost(case)), default=None)
            if best is not None:
                chosen.append(best)
                covered |= _pairs(best)
    return chosen


def _from_the_product(
    factors: Mapping[str, Sequence[Any]], possible: Callable[[Case], bool], cost: Callable[[Case], float]
) -> list[Case]:
    candidates = all_cases(factors, possible)
    missing: set[Pair] = set().union(*(_pairs(case) for case in candidates))
    chosen = []
    while missing:
        best = max(candidates, key=lambda case: (len(missing & _pairs(case)), -cost(case)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _some_cases(factors: Mapping[str, Sequence[Any]], possible: Callable[[Case], bool]) -> list[Case]:
    """The possible ones of 60 drawn by lot, always the same; if there are none, the first possible of all, if any
    is."""
    lot = random.Random(0)
    drawn = [{name: lot.choice(values) for name, values in factors.items()} for _ in range(60)]
    found = [case for case in drawn if possible(case)]
    every = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return found or list(islice(filter(possible, every), 1))


def _pairs(case: Case) -> set[Pair]:
    items = [(name, repr(value)) for name, value in case.items()]
    return set(combinations(items, 2))
