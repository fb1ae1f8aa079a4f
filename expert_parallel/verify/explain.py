"""Writes sentences for a layout that differs: which tensor, by how much, by which factor, and the usual cause."""

from expert_parallel.verify.compare import GROUPS, TensorDifference
from expert_parallel.verify.run import LayoutResult

EXACT_TOLERANCE = 1e-6
MAX_LEDGER_ERRORS = 4
GRADIENTS = tuple(f"gradient: {group}" for group in GROUPS)
# Columns in the order of a step: later ones differ because earlier ones do.
STEP_ORDER = (
    ("initial weights",),
    ("output", "dropped"),
    ("loss", "balance loss"),
    GRADIENTS,
    ("gradient norm",),
    ("update",),
)
ONCE = "the loss is divided once, by all tokens of the step, so that every reduction is a sum"
# (column or "" for any, degree, True if the value is too large by this factor) -> the usual cause.
CAUSES: dict[tuple[str, str, bool], str] = {
    (
        "gradient: experts",
        "ep",
        True,
    ): "the all-to-all's backward pass has already brought each expert the gradients of "
    f"its whole expert-parallel group; {ONCE}, and that of experts goes over edp alone",
    ("gradient: experts", "ep", False): f"it is averaged over the expert-parallel group; {ONCE}",
    ("gradient: experts", "edp", True): f"the sum over the ranks that hold the same experts is taken twice; {ONCE}",
    ("gradient: experts", "edp", False): f"it is averaged over the ranks that hold the same experts; {ONCE}",
    (
        "gradient: experts",
        "etp",
        True,
    ): "each rank of the expert's tensor-parallel group adds the whole of it; one must",
    (
        "gradient: experts",
        "etp",
        False,
    ): "each rank of the expert's tensor-parallel group has a part of it, and the sum over etp is missing",
    ("", "dp", True): f"each data rank divides by its own tokens, or the sum over dp is taken twice; {ONCE}",
    ("", "dp", False): f"it is averaged over the data ranks; {ONCE}",
    ("", "cp", True): "each context rank adds the whole of it; each must add its own tokens' part alone",
    ("", "cp", False): f"it is averaged over the context ranks, or the sum over cp is missing; {ONCE}",
    ("", "tp", True): "each tensor-parallel rank adds the whole of it; it must be counted once",
    ("", "tp", False): "each tensor-parallel rank has a part of it, and the sum over tp is missing",
    ("", "pp", True): "each pipeline stage adds it; it must be counted once",
    ("", "pp", False): "the sum over pipeline stages is missing",
    ("", "micro_steps", True): f"each micro-step is divided by its own tokens alone; {ONCE}",
    ("", "micro_steps", False): f"it is divided by the number of micro-steps twice; {ONCE}",
}
# The usual cause by column, where no degree explains the factor.
HINTS = {
    "initial weights": "they must depend on the seed and the logical name alone",
    "output": "the forward pass differs from here on",
    "dropped": "the router chooses other experts, or capacity counts other tokens",
    "balance loss": "f and P must be averaged over all tokens of the loss's scope before they are multiplied",
    **dict.fromkeys(GRADIENTS, "some tokens' parts are missing, or weighted differently"),
    "gradient norm": "the gradients are right, so some are left out or counted twice: experts count, copies do not",
    "update": "gradients and norm are right, so clipping, weight decay, rate or optimizer differ",
}


def explain(result: LayoutResult, tolerance: float) -> list[str]:
    """Returns sentences on what differs in a layout: for the earliest part of the step that differs, the worst tensor
    of each column; then the names of later columns that differ as a consequence, and the errors of ledger and
    dropout."""
    by_column: dict[str, list[TensorDifference]] = {}
    for difference in result.wrong(tolerance):
        by_column.setdefault(difference.column, []).append(difference)
    first = next(
        ([column for column in part if column in by_column] for part in STEP_ORDER if by_column.keys() & part), []
    )
    sentences = []
    for column in first:
        found = by_column.pop(column)
        worst = (
            found[0] if column in ("output", "dropped") else max(found, key=lambda d: (not d.is_present, d.relative))
        )
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        sentences.append(f"{_difference_text(worst)}{more}{_cause_text(worst, result.degrees, tolerance)}")
    if by_column:
        sentences.append(f"later quantities differ as a consequence: {', '.join(by_column)}")
    return sentences + result.ledger[:MAX_LEDGER_ERRORS] + result.dropout


def _difference_text(difference: TensorDifference) -> str:
    what, _, where = difference.name.partition("/")
    name = where if where == what else f"{what} of {where}"
    if not difference.is_present:
        return f"{name}: no rank has it"
    return f"{name} differs by {difference.relative:.1e} (rank {difference.rank})"


def _cause_text(difference: TensorDifference, degrees: dict[str, int], tolerance: float) -> str:
    if not difference.is_present:
        return ""
    hint = f": {HINTS[difference.column]}" if difference.column in HINTS else ""
    if difference.residual > max(EXACT_TOLERANCE, tolerance):
        return hint
    for power in (1, -1, 2, -2):
        names = [
            name
            for name in _candidate_degrees(difference.column, degrees)
            if _near(difference, degrees[name] ** power, tolerance)
        ]
        if names:
            cause = CAUSES.get((difference.column, names[0], power > 0)) or CAUSES["", names[0], power > 0]
            called = " = ".join(f"{'1 / ' * (power < 0)}{name}{'^2' * (abs(power) == 2)}" for name in names)
            how = "exactly" if tolerance < EXACT_TOLERANCE else "about"
            return f": it is {difference.ratio:.6g} times what it must be, {how} {called}; {cause}"
    return f": it is {difference.ratio:.6g} times what it must be" + hint.replace(": ", "; ", 1)


def _candidate_degrees(column: str, degrees: dict[str, int]) -> list[str]:
    """Returns the names of the degrees above 1 that may have caused a wrong factor in this column, the most likely
    first."""
    dense = ("dp", "cp", "tp", "pp", "micro_steps")
    experts = ("ep", "etp", "edp", "pp", "micro_steps")
    order = experts if column == "gradient: experts" else dense
    return [name for name in order if degrees[name] > 1]


def _near(difference: TensorDifference, factor: float, tolerance: float) -> bool:
    return abs(difference.ratio / factor - 1) <= max(EXACT_TOLERANCE, tolerance)
