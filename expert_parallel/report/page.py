"""Renders the page: one HTML file without scripts or external resources. All text of the run is escaped."""

from html import escape
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from expert_parallel.report.experts import ExpertsReport
from expert_parallel.report.loads import Loads
from expert_parallel.report.page_sample import experts_section, text_section
from expert_parallel.report.style import HEAT, heat, step_ratio, style_sheet
from expert_parallel.report.verdict import Verdict

ROW_PIXELS, MAP_PIXELS = 15, 320  # largest height of an expert's row in a heat map, and of all rows together


def render(report: ExpertsReport) -> str:
    """Returns the whole page as HTML."""
    title = f"What the experts of the run “{escape(report.name)}” learned"
    radios = "".join(
        f'<input type="radio" name="block" class="hidden" id="block{place}"{" checked" if place == 0 else ""}>'
        for place in range(len(report.blocks))
    )
    labels = "".join(f'<label for="block{place}">block {block}</label>' for place, block in enumerate(report.blocks))
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style_sheet(len(report.blocks))}</style></head>
<body><div class="wrap">
{_header(report, title)}
{_loads(report)}
{radios}
<nav class="tabs"><span class="soft">Shown below:</span>{labels}</nav>
<main>
{text_section(report)}
{experts_section(report)}
</main>
<footer>Made by <code>expert-parallel experts</code>. How each number is defined: README.md of
expert_parallel/report.</footer>
</div></body></html>
"""


# -------------------------------------------------------------------------------------------------------------- header


def _header(report: ExpertsReport, title: str) -> str:
    model, moe = report.config.model, report.config.model.moe
    assert moe is not None
    per_token = moe.router.experts_per_token(report.num_experts)
    facts = [
        ("parameters", _short(model.num_params()), f"{_short(model.num_active_params())} active for a token"),
        ("experts in a block", f"{report.num_experts}", f"{per_token:g} for a token, router {moe.router.kind}"),
        ("blocks", f"{model.num_layers}", f"{len(report.blocks)} with experts, width {model.d_model}"),
        ("steps", f"{report.step:,}", f"of {report.config.training.steps:,}"),
    ]
    if report.loads.held_out_loss is not None:
        step, loss = report.loads.held_out_loss
        facts.append(("held-out loss", f"{loss:.4f}", f"nats a token, at step {step:,}"))
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}<small class='soft'>{escape(note)}</small></dd></div>"
        for name, value, note in facts
    )
    return f"""<h1>{title}</h1>
<p class="soft">Text below: {escape(report.source)}</p>
{_verdict(report.verdict)}
<dl class="facts">{tiles}</dl>
<p><b>How to read this page.</b> In each block of this model a router looks at every token and sends it to
{per_token:g} of {report.num_experts} small networks, the experts. First: did the experts share the work evenly while
they learned? Second: who takes which token of a text that the model was not trained on? Third: what does each expert
like, and is it the token itself that decides? Experts have numbers, not meanings, and expert 3 of one block has nothing
to do with expert 3 of another.</p>"""


def _verdict(verdict: Verdict) -> str:
    """Returns the verdict as one line, and a list of the events if there were any."""
    mark = "unhealthy" if verdict.lasting else "healthy"
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in [*verdict.lasting, *verdict.ended])
    events = f"<ul>{items}</ul>" if items else ""
    return f'<div class="verdict {mark}"><b>{escape(verdict.headline)}</b>{events}</div>'


def _short(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


# --------------------------------------------------------------------------------------------------------------- loads


def _loads(report: ExpertsReport) -> str:
    cells = "".join(f'<i class="h{step}" style="grid-row: 1"></i>' for step in range(HEAT))
    marks = "".join(
        f'<b style="grid-row: 2; grid-column: {step + 1}">{_times(step)}</b>'
        for step in (0, 2, 4, 6, 8, 10, 12)  # every factor of sqrt 2
    )
    maps = "".join(_map(block, report.loads, report.num_experts) for block in report.blocks)
    return f"""<section><h2>1. Load: how the work was shared while training</h2>
<p>Each row is an expert, from the first step at the left to the last at the right. Pale: the expert computes its fair
share, 1/{report.num_experts} of the block's choices; orange: more; blue: less. Pale rows are what balancing aims at; a
row that stays blue is an expert that learns little. Point at a row for its numbers.</p>
<div class="scale" role="img" aria-label="colour scale, times the fair share">{cells}{marks}</div>
<small>&nbsp; times the fair share</small>
<div class="maps">{maps}</div></section>"""


def _times(step: int) -> str:
    sign = "≤\u2009" if step == 0 else "≥\u2009" if step == HEAT - 1 else ""
    return f"{sign}{step_ratio(step):.2g}"


def _map(block: int, loads: Loads, num_experts: int) -> str:
    ratio_CE = loads.share[block] * num_experts
    columns, middle = len(ratio_CE), len(ratio_CE) // 2
    row = max(min(ROW_PIXELS, MAP_PIXELS // num_experts), 2)
    labels = "".join(f"<span>{expert}</span>" for expert in range(num_experts)) if row >= 10 else "<span>experts</span>"
    drops, spread = (_ends(values) for values in (loads.dropped_share[block], loads.load_cv[block]))
    rows = "".join(
        f'<rect x="0" y="{expert}" width="{columns}" height="1" fill="transparent">'
        f"<title>{escape(_row_title(expert, ratio_CE[:, expert]))}</title></rect>"
        for expert in range(num_experts)
    )
    axis = "".join(f"<span>{loads.first_steps[c]:,}</span>" for c in sorted({0, middle}))
    return f"""<div class="map"><header><h3>Block {block}</h3>
<small>dropped {drops[0]:.1%} → {drops[1]:.1%} &nbsp; load cv {spread[0]:.2f} → {spread[1]:.2f}</small></header>
<div class="grid"><div class="rows">{labels}</div>
<svg viewBox="0 0 {columns} {num_experts}" preserveAspectRatio="none" height="{row * num_experts}" role="img"
 shape-rendering="crispEdges" aria-label="load of the experts of block {block}">{_cells(ratio_CE)}{rows}</svg>
<div class="axis">{axis}<span>step {loads.last_steps[-1]:,}</span></div></div></div>"""


def _cells(ratio_CE: NDArray[np.float64]) -> str:
    """Draws one path for each colour, of runs of equal cells."""
    runs: dict[int, list[str]] = {}
    for expert, row in enumerate(ratio_CE.T):
        at = 0
        for step, same in groupby(None if np.isnan(ratio) else heat(float(ratio)) for ratio in row):
            width = len(list(same))
            if step is not None:
                runs.setdefault(step, []).append(f"M{at} {expert}h{width}v1h-{width}z")
            at += width
    return "".join(f'<path class="h{step}" d="{"".join(parts)}"/>' for step, parts in sorted(runs.items()))


def _ends(values_C: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the first and the last column."""
    return float(values_C[0]), float(values_C[-1])


def _row_title(expert: int, ratio_C: NDArray[np.float64]) -> str:
    start, end = _ends(ratio_C)
    return (
        f"expert {expert}: {start:.2f} times its fair share at the start, {end:.2f} at the end; "
        f"between {np.nanmin(ratio_C):.2f} and {np.nanmax(ratio_C):.2f}"
    )
