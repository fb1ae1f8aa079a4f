"""Names the usual cause of a difference: by the factor, where there is one, and by what is right and what is wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from expert_parallel.verify.compare import GROUPS, TensorDifference, parameter_group
from expert_parallel.verify.result import LayoutResult

EXACT_TOLERANCE = 1e-6
GRADIENTS = tuple(f"gradient: {group}" for group in GROUPS)
SUMS = (*GRADIENTS, "loss", "balance loss", "gradient norm")  # over ranks and micro-steps
VECTORS = ("bias", "b_in", "b_out")
ONCE = "the loss is divided once, by all tokens of the step, so that every reduction is a sum"
# (column or "" for any, degree, True if the value is too large by this factor) -> the usual cause.
FACTORS: dict[tuple[str, str, bool], str] = {
    ("gradient: experts", "ep", True): (
        "the all-to-all's backward pass has already brought each expert the gradients of its whole expert-parallel "
        f"group; {ONCE}, and that of experts goes over edp alone"
    ),
    ("gradient: experts", "ep", False): f"it is averaged over the expert-parallel group; {ONCE}",
    ("", "ep", True): "each rank of the expert-parallel group adds the whole of it; it must be counted once",
    ("", "ep", False): f"it is averaged over the expert-parallel group; {ONCE}",
    ("", "edp", True): f"the sum over the ranks that hold the same experts is taken twice; {ONCE}",
    ("", "edp", False): f"it is averaged over the ranks that hold the same experts; {ONCE}",
    ("", "etp", True): "each rank of the expert's tensor-parallel group adds the whole of it; one must",
    ("", "etp", False): (
        "each rank of the expert's tensor-parallel group has a part of it, and the sum over etp is missing"
    ),
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
# Degrees that may cause a wrong factor, the most likely first: of experts; of all dense parameters; of some of them.
EXPERT_DEGREES = ("ep", "etp", "edp", "tp", "pp", "micro_steps")
COMMON_DEGREES = ("dp", "cp", "micro_steps", "tp", "pp")
SOME_DEGREES = ("tp", "pp", "dp", "cp", "micro_steps")
# The usual cause by column, where nothing more is known.
HINTS = {
    "initial weights": "they must depend on the seed and the logical name alone",
    "output": "the forward pass differs from here on",
    "balance loss": "f and P must be averaged over all tokens of the loss's scope before they are multiplied",
    **dict.fromkeys(GRADIENTS, "some tokens' parts are missing, or weighted differently"),
    "gradient norm": "the gradients are right, so some are left out or counted twice: experts count, copies do not",
    "moments": "gradients and norm are right, so clipping or the moments' decay rates (betas) differ",
    "update": "gradients and moments are right, so the rate, weight decay, eps or bias correction differ",
    "loaded": "the checkpoint is not what the other layout had: saving or loading mistakes a tensor or its place",
    "generated": "training and evaluation are right, so generation gives the model wrong tokens, positions or masks",
}


@dataclass(frozen=True)
class Evidence:
    """Holds what is known about a difference: the worst of its column, all wrong ones of that column (`found`) and of
    its step (`wrong`), the layout's result, those of all layouts, and the tolerance."""

    worst: TensorDifference
    found: Sequence[TensorDifference]
    wrong: Sequence[TensorDifference]
    result: LayoutResult
    results: Sequence[LayoutResult]
    tolerance: float

    @property
    def precision(self) -> float:
        """Returns how exactly ratios are known."""
        return max(EXACT_TOLERANCE, self.tolerance)

    @property
    def same_step(self) -> list[TensorDifference]:
        """Returns all differences of the step, right ones too."""
        return [d for d in self.result.differences if d.step == self.worst.step]

    def is_right(self, column: str) -> bool:
        """Returns True if nothing of the column is wrong in this step."""
        return all(difference.column != column for difference in self.wrong)

    def is_factor(self, difference: TensorDifference, factor: float) -> bool:
        """Returns True if the tensor is exactly `factor` times what it must be."""
        return difference.residual <= self.precision and abs(difference.ratio / factor - 1) <= self.precision


def cause_text(evidence: Evidence) -> str:
    """Returns the cause as the end of a sentence, `: ...`; empty if nothing is known."""
    if not evidence.worst.is_present:
        return ""
    for rule in RULES:
        if (text := rule(evidence)) is not None:
            return f": {text}"
    hint = HINTS.get(evidence.worst.column)
    return f": {hint}" if hint else ""


def common_factor(evidence: Evidence) -> float | None:
    """Returns the factor by which every wrong gradient differs, if it is the same in all kinds of parameters."""
    gradients = [d for d in evidence.wrong if d.column in GRADIENTS]
    kinds = {d.column for d in evidence.same_step if d.column in GRADIENTS}
    ratio = evidence.worst.ratio
    if len(kinds) < 2 or {d.column for d in gradients} != kinds:
        return None
    return ratio if all(evidence.is_factor(d, ratio) for d in gradients) else None


def _clipping(evidence: Evidence) -> str | None:
    """Names clipping, where all gradients of a rank have a factor and the norm before clipping is right."""
    factor = common_factor(evidence) if evidence.worst.column in GRADIENTS else None
    if factor is None or not evidence.is_right("gradient norm"):
        return None
    ranks = {d.rank for d in evidence.wrong if d.column in GRADIENTS}
    where = f" of rank {min(ranks)}" if len(ranks) == 1 and evidence.result.world_size > 1 else ""
    return (
        f"every gradient{where} is {factor:.6g} times what it must be, and their norm is right: the factor of clipping "
        "is wrong, or not the same on every rank"
    )


def _degree(evidence: Evidence) -> str | None:
    """Names the parallel degree that the factor is equal to. Where several are, other layouts decide, if they can."""
    worst = evidence.worst
    if worst.column not in SUMS:
        return None
    is_common = common_factor(evidence) is not None
    for power in (1, -1, 2, -2):
        equal = [
            name
            for name in _candidates(evidence, is_common)
            if evidence.is_factor(worst, evidence.result.degrees[name] ** power)
        ]
        names = [name for name in equal if _agrees(evidence, name)] or equal
        if not names:
            continue
        cause = FACTORS.get((worst.column, names[0], power > 0)) or FACTORS["", names[0], power > 0]
        called = " = ".join(f"{'1 / ' * (power < 0)}{name}{'^2' * (abs(power) == 2)}" for name in names)
        how = "exactly" if evidence.tolerance < EXACT_TOLERANCE else "about"
        alike = ", as every gradient is" if is_common else ""
        return f"it is {worst.ratio:.6g} times what it must be{alike}, {how} {called}; {cause}"
    return None


def _candidates(evidence: Evidence, is_common: bool) -> list[str]:
    """Returns the names of the degrees above 1 that may have caused a factor, the most likely first."""
    some = EXPERT_DEGREES if evidence.worst.column == "gradient: experts" else SOME_DEGREES
    order = COMMON_DEGREES if is_common else some
    return [name for name in order if evidence.result.degrees[name] > 1]


def _agrees(evidence: Evidence, name: str) -> bool:
    """Returns True if the tensor is wrong in just those layouts in which the degree is above 1."""
    place = (evidence.worst.name, evidence.worst.step)
    return all(
        difference.passes(evidence.tolerance) == (result.degrees[name] == 1)
        for result in evidence.results
        for difference in result.differences
        if (difference.name, difference.step) == place
    )


def _factor(evidence: Evidence) -> str | None:
    """Names a factor that is no degree: a common one is scale, not missing tokens."""
    worst = evidence.worst
    if worst.residual > evidence.precision or worst.column not in SUMS:
        return None
    text = f"it is {worst.ratio:.6g} times what it must be"
    if common_factor(evidence) is not None:
        return f"{text}, as every gradient and their norm are: a common factor, so the loss is scaled wrongly"
    hint = HINTS.get(worst.column)
    return f"{text}; {hint}" if hint else text


def _left_over(evidence: Evidence) -> str | None:
    """Names gradients that were not cleared: the first step and the outputs of this one are right."""
    if evidence.worst.step == 0 or evidence.worst.column not in GRADIENTS:
        return None
    return (
        f"step {evidence.worst.step} and the outputs of this step are right, so gradients of the step before are still "
        "in it: they were not set to zero"
    )


def _router_alone(evidence: Evidence) -> str | None:
    """Names the weights of choices, if the backward pass goes wrong first in a router, whose block's experts are
    right."""
    if evidence.worst.column != "gradient: router":
        return None
    block = max(_block(d.name) for d in evidence.found)
    wrong = [d for d in evidence.wrong if d.column in GRADIENTS and d.column != evidence.worst.column]
    if any(_block(d.name) > block or (_block(d.name) == block and ".moe." in d.name) for d in wrong):
        return None
    return (
        f"the backward pass goes wrong first in block {block}, where the experts' gradients are right: the weights of "
        "some choices, or a loss, have another gradient or none"
    )


def _block(name: str) -> int:
    """Returns the number of the block that a parameter belongs to; -1 for the embedding and the last norm."""
    return int(name.partition("blocks.")[2].partition(".")[0] or -1)


def _step_dependent(evidence: Evidence) -> str | None:
    """Names what depends on the step's number, if the first outputs that differ are of a later step."""
    if evidence.worst.step == 0 or evidence.worst.column not in ("output", "dropped"):
        return None
    return (
        f"step {evidence.worst.step} and its update are right, so what depends on the step is wrong: random numbers "
        "(noise) that are the same in every step, or other tokens"
    )


def _capacity(evidence: Evidence) -> str | None:
    """Names capacity, if the router's choices of the first block that differs are right."""
    if evidence.worst.column not in ("output", "dropped"):
        return None
    counts = [d for d in evidence.wrong if d.column == "dropped"]
    block = evidence.worst.name.rpartition("block ")[2].split(",")[0]
    here = {d.name.rpartition("choices ")[2]: d for d in counts if d.name.startswith(f"dropped/block {block}, ")}
    if "routed" in here:
        return "the router chooses other experts, or counts other tokens"
    if not here:
        is_moe = any(d.name.startswith(f"dropped/block {block}, ") for d in evidence.same_step)
        text = "the forward pass differs from here on; the router's choices and the capacity are right here, so "
        return f"{text}attention, weights of choices, dispatch, grouped products or combine differ" if is_moe else None
    dropped = here.get("dropped")
    if dropped is None:
        return "the router's choices are right, but other ones of them are kept: the order of the queue differs"
    if dropped.ratio > 1:
        return (
            "the router's choices are right, but too many are dropped: the capacity is too small, such as one that is "
            "rounded down or counts fewer tokens"
        )
    return (
        "the router's choices are right, but too few are dropped: the capacity is too large, such as the sum of "
        "capacities of parts that are each rounded up, one that counts more tokens, or the evaluation factor"
    )


def _betas(evidence: Evidence) -> str | None:
    """Names decay rates of the moments: after the first step a moment is (1 - beta) * gradient."""
    betas, step = evidence.result.betas, evidence.worst.step
    if evidence.worst.column != "moments" or step > 0 or len(betas) < 2:
        return None
    used = {}
    for moment, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True):
        mine = [d for d in evidence.same_step if d.name.startswith(f"{moment}/") and d.residual <= evidence.precision]
        ratios = {round(d.ratio, 6) for d in mine}
        if len(ratios) != 1:
            return None
        used[moment] = 1 - ratios.pop() * (1 - beta)
    are_swapped = all(abs(a - b) < 1e-4 for a, b in zip(used.values(), reversed(betas), strict=True))
    text = f"gradients are right; the moments decay with {used['exp_avg']:.4g} and {used['exp_avg_sq']:.4g} instead of"
    return f"{text} {betas[0]:g} and {betas[1]:g}" + ": the betas are swapped" * are_swapped


def _learning_rate(evidence: Evidence) -> str | None:
    """Names the schedule, if the rate or every update has the factor of another step's rate."""
    column, step, rates = evidence.worst.column, evidence.worst.step, evidence.result.rates
    if column not in ("learning rate", "update") or step >= len(rates):
        return None
    ratio = evidence.worst.ratio
    updates = [d for d in evidence.same_step if d.column == column and "balance_bias" not in d.name]
    exact = [d for d in updates if d.residual <= evidence.precision]  # others are nothing but rounding
    is_wrong = [not d.passes(evidence.tolerance) for d in updates]
    if 2 * sum(is_wrong) < len(updates) or any(abs(d.ratio - ratio) > evidence.precision for d in exact):
        return None
    if any(not d.passes(evidence.tolerance) and d not in exact for d in updates):
        return None
    for other, rate in enumerate(rates):
        if other != step and abs(ratio * rates[step] / rate - 1) <= evidence.precision:
            late = f"{abs(step - other)} steps" if abs(step - other) > 1 else "one step"
            how = "late" if other < step else "early"
            return f"the learning rate is that of step {other + 1}: the schedule is {late} {how}"
    if abs(ratio) <= evidence.precision:
        return "the learning rate is 0: the schedule is one step late"
    return f"the learning rate is {ratio:.6g} times what it must be: the schedule is wrong"


def _update_kinds(evidence: Evidence) -> str | None:
    """Names what differs between parameters whose updates are right and those whose are wrong."""
    if evidence.worst.column != "update":
        return None
    if all("balance_bias" in d.name for d in evidence.found):
        return "the router's balance bias must follow the choices counted over all ranks and micro-steps"
    updates = [d for d in evidence.same_step if d.column == "update" and "balance_bias" not in d.name]
    wrong = {_is_vector(d.name) for d in evidence.found}
    right = {_is_vector(d.name) for d in updates if d.passes(evidence.tolerance)}
    if wrong == {True} and False in right:
        return "gradients and moments are right, and so are updates of matrices: norms and biases have no weight decay"
    if wrong == {False} and True in right:
        return "gradients and moments are right, and so are updates of norms and biases: the weight decay is wrong"
    return None


def _is_vector(name: str) -> bool:
    return parameter_group(name) == "norm" or name.endswith(VECTORS)


def _loss_kinds(evidence: Evidence) -> str | None:
    if evidence.worst.column == "balance loss" and evidence.worst.name.endswith("z_loss"):
        return "it must be averaged over the tokens of all ranks"
    return None


def _beside_training(evidence: Evidence) -> str | None:
    """Names causes in what is checked beside training steps in float64."""
    column = evidence.worst.column
    if column == "training dtype":
        used = evidence.result.checks.get(column, "another dtype")
        return f"the step in float64 is right, so the experts' grouped product or a cast is wrong ({used})"
    if column == "generated" and len(evidence.found) == 1:
        if evidence.found[0].name.endswith("with cache"):
            return "only generation with the cache is wrong: its keys, values or positions"
        return "only generation without the cache is wrong: its windows or positions"
    if column != "evaluation":
        return None
    if all("with dropout set" in d.name for d in evidence.found):
        return "evaluation is right without dropout: it applies dropout, so the model is left in training mode"
    if any("choices dropped" in d.name for d in evidence.found):
        return (
            "evaluation drops other choices: it must take the evaluation's capacity (model.moe.capacity.eval), not the "
            "training factor, and no noise; the model may be left in training mode"
        )
    return "the model may be left in training mode, or be given other tokens"


RULES: tuple[Callable[[Evidence], str | None], ...] = (
    _beside_training,
    _clipping,
    _degree,
    _left_over,
    _router_alone,
    _step_dependent,
    _capacity,
    _betas,
    _update_kinds,
    _learning_rate,
    _loss_kinds,
    _factor,
)
