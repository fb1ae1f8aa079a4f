"""Writes sentences for a layout that differs: which tensor, by how much, by which factor, and the usual cause."""

from collections.abc import Sequence

from expert_parallel.verify.causes import GRADIENTS, Evidence, cause_text, common_factor
from expert_parallel.verify.compare import TensorDifference
from expert_parallel.verify.result import LayoutResult

MAX_ERRORS = 4
# Columns in the order of a step: later ones differ because earlier ones do.
STEP_ORDER = (
    ("initial weights",),
    ("output", "dropped"),
    ("loss", "balance loss"),
    GRADIENTS,
    ("gradient norm",),
    ("learning rate", "moments"),
    ("update",),
)
# What is checked after the steps, in this order; the step that follows a checkpoint is between the last two.
AFTER_STEPS = ("training dtype", "loaded", "evaluation", "generated")


def explain(result: LayoutResult, tolerance: float, results: Sequence[LayoutResult] = ()) -> list[str]:
    """Returns sentences on what differs in a layout: for the earliest part of the first step that differs, the worst
    tensor of each column; then the names of what differs later as a consequence, and all other errors.

    results: of all layouts, which may tell equal degrees apart."""
    wrong = result.wrong(tolerance)
    sentences: list[str] = []
    causes: set[str] = set()
    if wrong:
        stage = min(_stage(difference, result) for difference in wrong)
        now = [difference for difference in wrong if _stage(difference, result) == stage]
        by_column: dict[str, list[TensorDifference]] = {}
        for difference in now:
            by_column.setdefault(difference.column, []).append(difference)
        for column, found in by_column.items():
            step = [difference for difference in wrong if difference.step == found[0].step]
            evidence = Evidence(_worst(column, found), found, step, result, results, tolerance)
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            cause = cause_text(evidence)
            sentences.append(f"{_difference_text(evidence.worst)}{more}{'' if cause in causes else cause}")
            causes.add(cause)
            if column in GRADIENTS and common_factor(evidence) is not None:
                break  # the other kinds of parameters have the same factor
        later = dict.fromkeys(d.column for d in wrong if d.column not in by_column and _stage(d, result) > stage)
        if later:
            sentences.append(f"later quantities differ as a consequence: {', '.join(later)}")
    return sentences + result.ledger[:MAX_ERRORS] + result.errors[:MAX_ERRORS] + result.dropout


def _stage(difference: TensorDifference, result: LayoutResult) -> tuple[int, int]:
    """Returns a key that orders differences by when they arise."""
    done = max(1, len(result.rates) - 1)
    if difference.column in AFTER_STEPS:
        return (done + (difference.column == "generated"), AFTER_STEPS.index(difference.column) - len(AFTER_STEPS))
    return difference.step, next(i for i, part in enumerate(STEP_ORDER) if difference.column in part)


def _worst(column: str, found: list[TensorDifference]) -> TensorDifference:
    """Returns the difference to name: the first in the forward pass, else the largest."""
    if column in ("output", "dropped", "evaluation"):
        return found[0]
    return max(found, key=lambda difference: (not difference.is_present, difference.relative))


def _difference_text(difference: TensorDifference) -> str:
    what, _, where = difference.name.partition("/")
    name = where if where == what or what in AFTER_STEPS else f"{what} of {where}"
    if what in ("training dtype", "loaded"):
        name = f"{what}: {where}"
    step = f"step {difference.step + 1}: " if difference.step > 0 else ""
    if not difference.is_present:
        return f"{step}{name}: no rank has it"
    return f"{step}{name} differs by {difference.relative:.1e} (rank {difference.rank})"
