"""Defines the page's style: one style sheet, light and dark, with rules that select a block without any script."""

from collections.abc import Sequence
from math import log2

# A heat map has colour steps of a factor 2^(1/4) each; the middle one is the fair share.
STEPS_FROM_FAIR = 6
HEAT = 2 * STEPS_FROM_FAIR + 1

# Background colours that colour-blind readers can distinguish: Paul Tol's light scheme, the palest for most tokens.
LIGHT = ("#99ddff", "#eedd88", "#ffaabb", "#77aadd", "#bbcc33", "#ee8866", "#44bb99", "#aaaa00")
DARK = ("#25607d", "#6f6021", "#87435a", "#33568c", "#5b6a12", "#9a4c2e", "#17705a", "#4c4c10")
NUM_COLORS = len(LIGHT)  # one more, grey, is for all other experts

BASE = """
:root { color-scheme: light dark; --page: #ffffff; --panel: #f6f7f9; --ink: #1c2024; --soft: #5d6672; --line: #dde1e6;
  --accent: #2a5db0; --low: #2166ac; --mid: #f1f1ef; --high: #c2510c; --other: #d5d8dc; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --panel: #1d2126; --ink: #e8eaed; --soft: #a0a8b2;
  --line: #343a42; --accent: #8ab4f8; --low: #4a9bea; --mid: #2b2f35; --high: #f28c3c; --other: #454b53; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
.wrap { max-width: 1240px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; line-height: 1.25; } h2 { font-size: 19px; margin: 38px 0 4px; }
h3 { font-size: 15px; margin: 0; } p { margin: 4px 0 12px; max-width: 92ch; } small, .soft { color: var(--soft); }
.verdict { border-left: 4px solid var(--low); padding: 4px 14px; margin: 14px 0; max-width: 110ch; }
.verdict.unhealthy { border-color: var(--high); } .verdict ul { margin: 4px 0; padding-left: 20px; font-size: 13.5px; }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; padding: 0; }
.facts div { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; }
.facts dt { color: var(--soft); font-size: 12.5px; } .facts dd { margin: 0; font-size: 18px; font-weight: 600; }
.facts small { display: block; font-weight: 400; font-size: 12.5px; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 18px 28px; margin-top: 12px; }
.map header { display: flex; justify-content: space-between; align-items: baseline; gap: 12px; }
.map .grid { display: grid; grid-template-columns: auto 1fr; column-gap: 6px; }
.map .rows { display: flex; flex-direction: column; padding: 1px 0; font-size: 11px; line-height: 1;
  color: var(--soft); }
.map .rows span { flex: 1; display: flex; align-items: center; justify-content: flex-end; min-height: 0; }
.map svg { width: 100%; display: block; border: 1px solid var(--line); border-radius: 3px; }
.map .axis { grid-column: 2; display: flex; justify-content: space-between; font-size: 11px; color: var(--soft); }
.scale { display: inline-grid; grid-auto-flow: column; grid-auto-columns: 30px; font-size: 11px; color: var(--soft); }
.scale i { height: 12px; } .scale b { font-weight: 400; text-align: center; white-space: nowrap; }
.hidden { position: fixed; top: 0; left: 0; opacity: 0; pointer-events: none; }
.tabs { position: sticky; top: 0; z-index: 2; background: var(--page); padding: 10px 0; display: flex; flex-wrap: wrap;
  gap: 6px; align-items: center; border-bottom: 1px solid var(--line); margin-top: 30px; }
.tabs label { padding: 3px 12px; border: 1px solid var(--line); border-radius: 999px; cursor: pointer; }
.tabs label:hover { border-color: var(--accent); }
.only { display: none; }
.legend { display: flex; flex-wrap: wrap; gap: 6px; margin: 8px 0 12px; font-size: 13px; }
.legend span { border-radius: 5px; padding: 1px 9px; cursor: default; }
.text { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; max-height: 660px; overflow: auto;
  font: 13.5px/1.62 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.text pre { margin: 0; padding: 9px 14px; font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.text pre + pre { border-top: 1px dashed var(--line); }
.text span { padding: 1px 0; } .text i { font-style: normal; opacity: .38; } .words span { margin-right: 1px; }
.taste { width: 100%; border-collapse: separate; border-spacing: 0 3px; font-size: 13.5px; }
.taste th { font-weight: 500; color: var(--soft); font-size: 12px; text-align: center; padding: 2px 6px; }
.taste th.left, .taste td.left { text-align: left; } .taste td { padding: 3px 6px; text-align: center; }
.taste tr.all td { color: var(--soft); border-bottom: 1px solid var(--line); }
.taste .kind { font-variant-numeric: tabular-nums; min-width: 54px; } .scroll { overflow-x: auto; }
.chip { display: inline-block; border-radius: 5px; padding: 0 8px; white-space: nowrap; color: var(--ink); }
.bar { display: inline-block; height: 9px; background: var(--accent); border-radius: 2px; opacity: .75; }
.word { display: inline-block; margin: 1px 10px 1px 0; white-space: nowrap; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; padding: 0 5px;
  background: var(--panel); border: 1px solid var(--line); border-radius: 4px; } .word small { margin-left: 3px; }
.decides { display: grid; grid-template-columns: auto minmax(80px, 320px) auto; gap: 4px 12px; align-items: center;
  width: fit-content; margin: 8px 0 4px; }
.decides .track { background: var(--panel); border: 1px solid var(--line); border-radius: 3px; width: 320px; }
.decides .bar { display: block; } .decides label { cursor: pointer; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
@media (max-width: 560px) { .maps { grid-template-columns: 1fr; } .decides .track { width: 120px; } }
@media print { .text { max-height: none; } .tabs { position: static; } }
"""


def style_sheet(num_blocks: int) -> str:
    """Returns the style sheet for so many MoE blocks."""
    return "\n".join([BASE, *_heat_rules(), *_slot_rules(), *(_block_rules(place) for place in range(num_blocks))])


def heat(ratio: float) -> int:
    """Returns the colour step, 0 to HEAT - 1, of an expert's share that is `ratio` times an equal share."""
    if ratio <= 0:
        return 0
    return min(max(round(4 * log2(ratio)) + STEPS_FROM_FAIR, 0), HEAT - 1)


def step_ratio(step: int) -> float:
    """Returns the ratio in the middle of a colour step."""
    return float(2 ** ((step - STEPS_FROM_FAIR) / 4))


def _heat_rules() -> list[str]:
    """Returns rules for the colour steps. h: fills of the heat maps. t: weaker ones, for cells with numbers in them."""
    rules = []
    for step in range(HEAT):
        end = "--low" if step < STEPS_FROM_FAIR else "--high"
        far = abs(step - STEPS_FROM_FAIR) / STEPS_FROM_FAIR
        mixed, weak = (f"color-mix(in oklab, var({end}) {most * far:.0f}%, var(--mid))" for most in (100, 48))
        rules.append(f".h{step} {{ fill: {mixed}; background: {mixed}; }} .t{step} {{ background: {weak}; }}")
    return rules


def _slot_rules() -> list[str]:
    """Returns rules for the colours of experts."""

    def variables(colors: Sequence[str]) -> str:
        return " ".join(f"--s{slot}: {color};" for slot, color in enumerate(colors))

    chips = " ".join(f".s{slot} {{ background: var(--s{slot}); }}" for slot in range(NUM_COLORS))
    return [
        f":root {{ {variables(LIGHT)} --s{NUM_COLORS}: var(--other); }}",
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}",
        f"{chips} .s{NUM_COLORS} {{ background: var(--other); }}",
    ]


def _block_rules(place: int) -> str:
    """Returns rules that apply while the block of this index is selected: its parts are shown, each token has the
    colour of its expert, and pointing at an expert in the legend fades the others' tokens."""
    chosen, name = f"#block{place}:checked ~", f"b{place}"
    rules = [
        f"{chosen} main .only.{name} {{ display: block; }}",
        f'{chosen} .tabs label[for="block{place}"] {{ background: var(--accent); color: var(--page); }}',
        f'#block{place}:focus-visible ~ .tabs label[for="block{place}"] {{ outline: 2px solid var(--ink); }}',
        f"{chosen} main .text .{name}-none {{ text-decoration: line-through; }}",
        f"{chosen} main .text .{name}-part {{ text-decoration: underline dotted 2px; }}",
    ]
    for slot in range(NUM_COLORS + 1):
        rules.append(f"{chosen} main .text .{name}-{slot} {{ background: var(--s{slot}); }}")
        pointed = f"{chosen} main:has(.{name} .legend .s{slot}:hover)"
        rules.append(f"{pointed} .text span:not(.{name}-{slot}) {{ background: none; opacity: .45; }}")
    return "\n".join(rules)
