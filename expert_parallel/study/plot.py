"""Plots a study: held-out loss over steps, over time, and over operations."""

import statistics
from pathlib import Path

from expert_parallel.study.results import StudyResult, VariantResult

# The colours of Okabe and Ito, distinct for most colour-blind readers; the reference is black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#7A7A7A")


def plot(result: StudyResult, path: Path) -> None:
    """Writes a PNG. Lines are means over seeds, bands reach from the smallest to the largest, and the dashed line is
    the reference's final loss. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    reference = result.variant(result.reference)
    tokens = result.tokens_of_step
    # Each variant was timed together with the reference; the machine's speed may have drifted between variants.
    usual = statistics.median(variant.step_time.reference.median for variant in result.variants) / 60_000
    panels = (
        ("steps", lambda variant: 1.0),
        ("minutes of training, alone on the machine", lambda variant: usual / variant.step_time.speed),
        ("operations (PFLOP)", lambda variant: variant.flops * tokens / 1e15),
    )
    colors = dict(zip((v.name for v in result.variants if v is not reference), COLORS * 9, strict=False))
    first = result.steps // 5  # the steep beginning would compress the rest of the plot
    for axis, (label, unit) in zip(axes, panels, strict=True):
        for variant in result.variants:
            color, scale = colors.get(variant.name, "black"), unit(variant)
            steps, rows = _from(variant, first)
            xs = [step * scale for step in steps]
            axis.plot(xs, [sum(row) / len(row) for row in rows], color=color, label=variant.name, linewidth=1.6)
            axis.fill_between(xs, [min(r) for r in rows], [max(r) for r in rows], color=color, alpha=0.15, linewidth=0)
        axis.axhline(sum(reference.finals) / len(reference.finals), color="black", linestyle="--", linewidth=0.8)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out loss (nats a token)")
    axes[0].legend(frameon=False)
    seeds = f"{len(result.seeds)} seeds" if len(result.seeds) > 1 else "one seed"
    figure.suptitle(
        f"Equal operations a token: {', '.join(v.name for v in result.variants)} "
        f"({seeds}, mean and range; dashed: {result.reference} after {result.steps:,} steps)",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def _from(variant: VariantResult, first: int) -> tuple[list[int], list[list[float]]]:
    """Returns the steps from `first` on, and the losses of all seeds at each."""
    steps = [step for step in variant.curves[0].steps if step >= first]
    return steps, [[curve.at(step) for curve in variant.curves] for step in steps]
