"""A sentence for each column in which a layout differs: which tensor, by how much, and what usually causes it."""

from expert_parallel.verify.compare import Difference
from expert_parallel.verify.run import LayoutResult

EXACT = 1e-6

ONCE = "the loss is divided once, by all tokens of the step, so that every reduction is a sum"
# (column, degree, whether the number is too large by it) -> the usual cause. Column "": any.
CAUSES: dict[tuple[str, str, bool], str] = {
    (
        "gradient: experts",
        "ep",
        True,
    ): "the all-to-all's backward pass has already brought each expert the gradients of "
    f"its whole expert-parallel group; {ONCE}, and that of experts goes over edp alone",
    ("gradient: experts", "ep", False): f"it is averaged over the expert-parallel group; {ONCE}",
    ("gradient: experts", "edp", False): f"it is averaged over the ranks that hold the same experts; {ONCE}",
    ("gradient: experts", "etp", True): "each rank of the expert's tensor-parallel group adds the whole of it; one may",
    ("", "dp", True): f"each data rank divides by its own tokens, or the sum over dp is made twice; {ONCE}",
    ("", "dp", False): f"it is averaged over the data ranks; {ONCE}",
    ("", "cp", True): "each context rank adds the whole of it; each may add its own tokens' part alone",
    ("", "cp", False): f"it is averaged over the context ranks, or the sum over cp is missing; {ONCE}",
    ("", "tp", True): "each tensor-parallel rank adds the whole of it; it is to be counted once",
    ("", "tp", False): "each tensor-parallel rank has a part of it, and the sum over tp is missing",
    ("", "pp", True): "each pipeline stage adds it; it is to be counted once",
    ("", "pp", False): "the sum over pipeline stages is missing",
    ("", "micro_steps", True): f"each micro-step is divided by its own tokens alone; {ONCE}",
    ("", "micro_steps", False): f"it is divided by the number of micro-steps once too often; {ONCE}",
}
# Where no degree explains it: what the column says by itself.
HINTS = {
    "output": "the forward pass differs from here on",
    "gradient norm": "each shard of each parameter is to be counted once: experts too, copies not",
    "update": "clipping, the optimizer's groups or its rate differ, if the gradients do not",
    "initial weights": "they are to be a function of the seed and the logical name alone",
    "balance loss": "f and P are to be averaged over all tokens of the loss's scope before they are multiplied",
    "dropped": "capacity is counted over other tokens, or in another order",
}


def explain(result: LayoutResult, tolerance: float) -> list[str]:
    """One sentence a column, for its worst tensor; and those of dropout."""
    by_column: dict[str, list[Difference]] = {}
    for difference in result.wrong(tolerance):
        by_column.setdefault(difference.column, []).append(difference)
    sentences = []
    for column, found in by_column.items():
        first = column in ("output", "dropped")  # what comes later follows from it
        worst = found[0] if first else max(found, key=lambda d: (not d.held, d.relative))
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        sentences.append(f"{_what(worst)}{more}{_why(worst, result.degrees, tolerance)}")
    return sentences + [f"dropout: {sentence}" for sentence in result.dropout]


def _what(difference: Difference) -> str:
    what, _, where = difference.name.partition("/")
    name = where if where == what else f"{what} of {where}" if what in ("gradient", "update") else f"{what}, {where}"
    if not difference.held:
        return f"{name}: no rank has it"
    return f"{name} differs by {difference.relative:.1e} (rank {difference.rank})"


def _why(difference: Difference, degrees: dict[str, int], tolerance: float) -> str:
    if not difference.held:
        return ""
    hint = HINTS.get(difference.column)
    if not difference.spread <= max(EXACT, tolerance):
        return f": {hint}" if hint else ", by no fixed factor"
    for power in (1, -1, 2, -2, 0.5, -0.5):
        names = [n for n, size in degrees.items() if size > 1 and _near(difference.ratio, size**power, tolerance)]
        if names:
            causes = [CAUSES.get((column, name, power > 0)) for name in names for column in (difference.column, "")]
            cause = next((cause for cause in causes if cause), hint)
            called = " = ".join(f"{_power(name, power)}" for name in names)
            return f": it is {difference.ratio:.6g} times what it must be, exactly {called}" + (
                f"; {cause}" if cause else ""
            )
    return f": it is {difference.ratio:.6g} times what it must be" + (f"; {hint}" if hint else "")


def _near(ratio: float, target: float, tolerance: float) -> bool:
    return abs(ratio / target - 1) <= max(EXACT, tolerance)


def _power(name: str, power: float) -> str:
    return {1: name, -1: f"1 / {name}", 2: f"{name}^2", -2: f"1 / {name}^2", 0.5: f"sqrt({name})"}.get(
        power, f"1 / sqrt({name})"
    )
