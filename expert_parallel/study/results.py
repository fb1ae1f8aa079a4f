"""What a study found: losses, and what each variant needed to reach the reference's, in figures and in words."""

import os
import statistics
from datetime import datetime
from pathlib import Path

import torch
from pydantic import BaseModel

from expert_parallel.study.curves import Curve
from expert_parallel.study.folder import curve_of, is_done, read_sittings
from expert_parallel.study.plan import Study
from expert_parallel.study.step_times import StepTimes


class Reached(BaseModel):
    """When one seed reached the reference's final loss of the same seed. step: None where it did not. steps, time,
    flops: the reference's, over those that this one needed."""

    seed: int
    step: float | None
    steps: float | None = None
    time: float | None = None
    flops: float | None = None


class VariantResult(BaseModel):
    """trials: (learning rate, held-out loss after the trial; None where it diverged). curves: by seed, in the study's
    order. flops: a token, forward and backward."""

    name: str
    claim: str
    total_parameters: int
    active_parameters: int
    flops: int
    trials: list[tuple[float, float | None]]
    rate: float
    curves: list[Curve]
    step_time: StepTimes
    reached: list[Reached]

    @property
    def finals(self) -> list[float]:
        return [curve.final for curve in self.curves]


class StudyResult(BaseModel):
    """not_measured: variants of the study that were left out. hours: of all sittings."""

    reference: str
    variants: list[VariantResult]
    not_measured: list[str]
    seeds: list[int]
    steps: int
    tokens_of_step: int
    corpus: str
    held_out_tokens: int
    hardware: str
    threads: int
    jobs: int
    torch: str
    commits: list[str]
    hours: float
    date: str

    def variant(self, name: str) -> VariantResult:
        return next(variant for variant in self.variants if variant.name == name)


def gather(study: Study, rates: dict[str, float], step_times: dict[str, StepTimes], device: str) -> StudyResult:
    """rates: the learning rate of each variant; step_times: of each; both hold the study's variants."""
    settings, sittings = study.settings, read_sittings(study.folder)
    reference = study.finals(settings.reference, rates[settings.reference])
    training, evaluation = reference[0].config.training, reference[0].config.evaluation
    variants = []
    for name in study.names:
        trials, runs = study.trials(name), study.finals(name, rates[name])
        model, length = runs[0].config.model, runs[0].config.training.sequence_length
        variants.append(
            VariantResult(
                name=name,
                claim=settings.variants[name].claim,
                total_parameters=model.num_params(),
                active_parameters=model.num_active_params(),
                flops=model.flops_per_token(length),
                trials=[(run.rate, curve_of(run).final if is_done(run) else None) for run in trials],
                rate=rates[name],
                curves=[curve_of(run) for run in runs],
                step_time=step_times[name],
                reached=[],
            )
        )
    whole = StudyResult(
        reference=settings.reference,
        variants=variants,
        not_measured=[name for name in settings.variants if name not in study.names],
        seeds=settings.seeds,
        steps=study.steps,
        tokens_of_step=training.global_batch * training.sequence_length,
        corpus=corpus_of(reference[0].folder),
        held_out_tokens=evaluation.sequences * training.sequence_length,
        hardware=hardware() if device == "cpu" else device,
        threads=settings.threads,
        jobs=settings.jobs,
        torch=torch.__version__,
        commits=sorted({sitting.commit for sitting in sittings}),
        hours=sum(sitting.seconds for sitting in sittings) / 3600,
        date=datetime.now().date().isoformat(),
    )
    for variant in variants:
        if variant.name != settings.reference:
            variant.reached = [reached(whole, variant, number, seed) for number, seed in enumerate(settings.seeds)]
    return whole


def reached(result: StudyResult, variant: VariantResult, number: int, seed: int) -> Reached:
    reference = result.variant(result.reference)
    step = variant.curves[number].reaches(reference.curves[number].final)
    if step is None:
        return Reached(seed=seed, step=None)
    steps = result.steps / max(step, 1.0)  # a reference that is worse than no training is none
    return Reached(
        seed=seed,
        step=step,
        steps=steps,
        time=steps * variant.step_time.speed,
        flops=steps * reference.flops / variant.flops,
    )


def corpus_of(folder: Path) -> str:
    """As the run itself said it."""
    lines = (folder / "log.txt").read_text(errors="replace").splitlines()
    return next((line.removeprefix("data: ") for line in lines if line.startswith("data: ")), "unknown")


def hardware() -> str:
    cpus, path = os.cpu_count(), Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{cpus} CPU cores ({names[0] if names else 'unknown processor'})"


# ---------------------------------------------------------------------------------------------------------------------
# In words


def describe(result: StudyResult) -> str:
    """A table in Markdown, and what it stands on."""
    lines = [
        f"Held-out loss after {result.steps:,} steps of {result.tokens_of_step:,} tokens; and what "
        f"`{result.reference}` needed over what the variant needed to come down, for good, to the loss that "
        f"`{result.reference}` ended with: mean (smallest to largest) of {len(result.seeds)} seeds.",
        "",
        "| variant | parameters, for a token | FLOPs a token | learning rate | held-out loss | fewer steps | less time "
        "| fewer FLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in result.variants:
        cells = [
            f"{variant.name}",
            f"{variant.total_parameters / 1e6:.2f} M, {variant.active_parameters / 1e6:.2f} M",
            f"{variant.flops / 1e6:.2f} M",
            f"{variant.rate:g}{' (the edge)' if at_edge(variant) else ''}",
            spread(variant.finals, "{:.4f}"),
            *(gain(result, variant, what) for what in ("steps", "time", "flops")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | not measured | | | | | | |" for name in result.not_measured]
    lines += [
        "",
        *(f"- {variant.name}: {claim_line(variant)}" for variant in result.variants if variant.claim),
        f"- learning rates tried with one seed, loss after the trial: {trials_line(result)}",
        "- a step in ms, in turn with the reference's in one process, [smallest - largest]: "
        + "; ".join(
            f"{variant.name} {variant.step_time.own} beside {variant.step_time.reference}"
            for variant in result.variants
            if variant.name != result.reference
        ),
        f"- corpus: {result.corpus}; the loss is that of the same {result.held_out_tokens:,} held-out tokens (at most) "
        "for all",
        f"- {result.hardware}, {result.jobs} runs at a time of {result.threads} thread(s), torch {result.torch}, "
        f"{result.hours:.1f} hours in all, {result.date}, commit {', '.join(result.commits)}",
    ]
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """mean (smallest to largest)"""
    text = form.format(statistics.fmean(values))
    return text if len(values) == 1 else f"{text} ({form.format(min(values))} to {form.format(max(values))})"


def gain(result: StudyResult, variant: VariantResult, what: str) -> str:
    if variant.name == result.reference:
        return "1"
    found = [getattr(one, what) for one in variant.reached]
    values = [value for value in found if value is not None]
    if not values:
        return "not reached"
    missing = f", {len(found) - len(values)} of {len(found)} seeds not reached" if len(values) < len(found) else ""
    return spread(values, "{:.2f}") + missing


def at_edge(variant: VariantResult) -> bool:
    """Whether the best of several learning rates was the smallest or the largest: a better one may lie beyond."""
    rates = [rate for rate, _ in variant.trials]
    return len(rates) > 1 and variant.rate in (min(rates), max(rates))


def claim_line(variant: VariantResult) -> str:
    """The paper's claim beside what was found."""
    steps = [one.steps for one in variant.reached if one.steps is not None]
    flops = [one.flops for one in variant.reached if one.flops is not None]
    if not steps:
        return f"{variant.claim}; here: not reached"
    some = f" ({len(steps)} of {len(variant.reached)} seeds reached it)"
    return (
        f"{variant.claim}; here {statistics.fmean(steps):.2f}x fewer steps, {1 / statistics.fmean(flops):.2f} of the "
        f"FLOPs{some if len(steps) < len(variant.reached) else ''}"
    )


def trials_line(result: StudyResult) -> str:
    return "; ".join(
        f"{variant.name} "
        + ", ".join(f"{rate:g}: {'diverged' if loss is None else f'{loss:.4f}'}" for rate, loss in variant.trials)
        for variant in result.variants
    )
