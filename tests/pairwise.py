"""Covers factors pairwise: few cases in which every two values of every two factors meet at least once."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]


def all_cases(factors: Mapping[str, Sequence[Any]], possible: Callable[[Case], bool]) -> list[Case]:
    """The whole product, without the impossible."""
    cases = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    return [case for case in cases if possible(case)]


def pairwise_cases(factors: Mapping[str, Sequence[Any]], possible: Callable[[Case], bool]) -> list[Case]:
    """Greedy: of the possible cases, again and again the one that covers most pairs not yet covered."""
    candidates = all_cases(factors, possible)
    missing = set().union(*(_pairs(case) for case in candidates))
    chosen = []
    while missing:
        best = max(candidates, key=lambda case: len(missing & _pairs(case)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(case: Case) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    items = [(name, repr(value)) for name, value in case.items()]
    return set(combinations(items, 2))
