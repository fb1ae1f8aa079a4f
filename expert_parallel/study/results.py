"""Collects the results of a study: losses, the steps, time and FLOPs with which each variant reached the reference's
loss, and a table in Markdown."""

import os
import statistics
from datetime import datetime
from pathlib import Path

import torch
from pydantic import BaseModel

from expert_parallel.study.curves import Curve
from expert_parallel.study.definition import Study
from expert_parallel.study.folder import curve_of, is_done, read_sessions
from expert_parallel.study.step_times import StepTimes


class Speedup(BaseModel):
    """Compares one seed of a variant with the reference's run of that seed.

    step: the step from which on this run's held-out loss stays at or below the final loss of the reference's run; None
    if it does not. steps, time, flops: the steps, time and FLOPs of the whole reference run divided by those of this
    run up to `step`."""

    seed: int
    step: float | None
    steps: float | None = None
    time: float | None = None
    flops: float | None = None


class VariantResult(BaseModel):
    """Holds the results of one variant.

    claim: what its paper claims. flops: per token, forward and backward. trials: (learning rate, held-out loss after
    the trial; None if it diverged). rate: the best learning rate. curves: held-out losses of the full-length runs, in
    the order of the study's seeds. reached: by seed; empty for the reference."""

    name: str
    claim: str
    total_parameters: int
    active_parameters: int
    flops: int
    trials: list[tuple[float, float | None]]
    rate: float
    curves: list[Curve]
    step_time: StepTimes
    reached: list[Speedup]

    @property
    def finals(self) -> list[float]:
        """Returns the final loss of each seed."""
        return [curve.final for curve in self.curves]


class StudyResult(BaseModel):
    """Holds the results of a study. not_measured: variants that were not trained. tokens_of_step: tokens in a training
    step. jobs: number of runs at a time. threads: CPU threads of each. commits: of the sources. hours: duration of all
    executions of the command."""

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
        """Returns the result of the variant of this name."""
        return next(variant for variant in self.variants if variant.name == name)


def collect_results(
    study: Study, rates: dict[str, float], step_times: dict[str, StepTimes], device: str
) -> StudyResult:
    """Reads the results of all runs, which must be done. rates: the best learning rate of each variant. step_times: by
    variant. device: the name of the device that steps were timed on."""
    settings, sessions = study.settings, read_sessions(study.folder)
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
        corpus=read_corpus_line(reference[0].folder),
        held_out_tokens=evaluation.sequences * training.sequence_length,
        hardware=hardware() if device == "cpu" else device,
        threads=settings.threads,
        jobs=settings.jobs,
        torch=torch.__version__,
        commits=sorted({session.commit for session in sessions}),
        hours=sum(session.seconds for session in sessions) / 3600,
        date=datetime.now().date().isoformat(),
    )
    for variant in variants:
        if variant.name != settings.reference:
            variant.reached = [reached(whole, variant, number, seed) for number, seed in enumerate(settings.seeds)]
    return whole


def reached(result: StudyResult, variant: VariantResult, number: int, seed: int) -> Speedup:
    """Compares one seed of a variant with the reference's run of the same seed. number: the seed's index."""
    reference = result.variant(result.reference)
    step = variant.curves[number].step_reaching(reference.curves[number].final)
    if step is None:
        return Speedup(seed=seed, step=None)
    steps = result.steps / max(step, 1.0)  # at least 1: the untrained model may already be better than the reference
    return Speedup(
        seed=seed,
        step=step,
        steps=steps,
        time=steps * variant.step_time.speed,
        flops=steps * reference.flops / variant.flops,
    )


def read_corpus_line(folder: Path) -> str:
    """Returns the description of the data in the log of the run in `folder`, `unknown` if there is none."""
    lines = (folder / "log.txt").read_text(errors="replace").splitlines()
    return next((line.removeprefix("data: ") for line in lines if line.startswith("data: ")), "unknown")


def hardware() -> str:
    """Returns the number and model of the CPU cores."""
    cpus, path = os.cpu_count(), Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{cpus} CPU cores ({names[0] if names else 'unknown processor'})"


# ---------------------------------------------------------------------------------------------------------------------
# Printed text


def format_study(result: StudyResult) -> str:
    """Formats a table in Markdown, and below it the conditions of the measurement."""
    lines = [
        f"Held-out loss after {result.steps:,} steps of {result.tokens_of_step:,} tokens; and the speed-up: steps, "
        f"time and FLOPs of `{result.reference}` divided by those that the variant took to reach the final loss of "
        f"`{result.reference}`, and to stay below it. Mean (smallest to largest) of {len(result.seeds)} seeds.",
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
    """Formats the mean of the values and, if there are several, their range. form: format of a number, such as
    `{:.2f}`."""
    text = form.format(statistics.fmean(values))
    return text if len(values) == 1 else f"{text} ({form.format(min(values))} to {form.format(max(values))})"


def gain(result: StudyResult, variant: VariantResult, what: str) -> str:
    """Formats how many times fewer steps, less time or fewer FLOPs (`what`) the variant needed than the reference."""
    if variant.name == result.reference:
        return "1"
    found = [getattr(one, what) for one in variant.reached]
    values = [value for value in found if value is not None]
    if not values:
        return "not reached"
    missing = f", {len(found) - len(values)} of {len(found)} seeds not reached" if len(values) < len(found) else ""
    return spread(values, "{:.2f}") + missing


def at_edge(variant: VariantResult) -> bool:
    """Returns True if several learning rates were tried and the best was the smallest or largest, so that a better one
    may lie beyond."""
    rates = [rate for rate, _ in variant.trials]
    return len(rates) > 1 and variant.rate in (min(rates), max(rates))


def claim_line(variant: VariantResult) -> str:
    """Formats the claim of the variant's paper, and next to it the mean speedups that were measured."""
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
    """Formats the held-out loss of every trial, by variant and learning rate."""
    return "; ".join(
        f"{variant.name} "
        + ", ".join(f"{rate:g}: {'diverged' if loss is None else f'{loss:.4f}'}" for rate, loss in variant.trials)
        for variant in result.variants
    )
