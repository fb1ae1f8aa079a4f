"""Renders the page's sections on the sample: its text coloured by expert, and what each expert prefers."""

from collections.abc import Iterator
from html import escape

from expert_parallel.moe.types import Outcome
from expert_parallel.report.experts import ExpertsReport
from expert_parallel.report.sample import SampleRouting
from expert_parallel.report.specialization import ExpertStats, TopToken
from expert_parallel.report.style import NUM_COLORS, STEPS_FROM_FAIR, heat
from expert_parallel.report.token_text import CHARACTER_CLASSES, VISIBLE, TokenText

MAX_ENTRIES = 40_000  # choices in the tooltips of the text
MIN_TOKENS_SHOWN = 512  # tokens that are shown whatever their number of choices
CLASS_HELP = {
    "letters": "lower case, and letters that have no case",
    "spaces": "blanks within a line",
    "indentation": "blanks at the start of a line",
    "other": "control characters, and bytes that are not text",
}


# ---------------------------------------------------------------------------------------------------------------- text


def text_section(report: ExpertsReport) -> str:
    """Renders the first tokens of the sample, each in the colour of the expert with the largest weight for it."""
    whole = report.sample.num_tokens
    choices = sum(routing.ids_TK.shape[1] for routing in report.sample.routing.values())
    shown = min(max(MAX_ENTRIES // choices, MIN_TOKENS_SHOWN), whole)
    slots = [_slots(report.expert_stats[block]) for block in report.blocks]
    marks = _marks(report, slots, shown)
    rows, begin = [], 0
    for sequence in report.token_texts:
        spans = []
        for piece in sequence:
            if begin + piece.num_tokens <= shown:
                spans.append(_span(piece, marks[begin : begin + piece.num_tokens]))
            begin += piece.num_tokens
        if spans:
            rows.append(f"<pre>{''.join(spans)}</pre>")
    legends = "".join(_legend(place, report, slots[place]) for place in range(len(report.blocks)))
    first = f"the first {shown:,} of {whole:,}" if shown < whole else f"all {whole:,}"
    has_words = any(len(piece.text) > 1 for sequence in report.token_texts for piece in sequence)
    return f"""<section><h2>2. A text, and the experts of its tokens</h2>
<p>Each token has the colour of its first expert: of those that computed it, the one with the largest weight. Point at
a token for all of them, in every block; point at an expert in the legend to see its tokens alone. Shown are {first}
tokens of the sample, on which the loss is {report.sample.loss:.4f} nats a token.
<u style="text-decoration: underline dotted 2px">Dotted</u>: a choice was dropped, its expert was full.
<s>Struck</s>: no expert computed the token. A dashed line parts one piece of text from the next.</p>
{legends}<div class="text{" words" if has_words else ""}">{"".join(rows)}</div></section>"""


def _slots(expert_stats: ExpertStats) -> list[int]:
    """Returns the colour index of each expert, the most used first. Experts beyond the number of colours share one,
    grey."""
    order = sorted(range(len(expert_stats.first_count)), key=lambda expert: -expert_stats.first_count[expert])
    return [min(order.index(expert), NUM_COLORS) for expert in range(len(order))]


def _legend(place: int, report: ExpertsReport, slots: list[int]) -> str:
    expert_stats = report.expert_stats[report.blocks[place]]
    total = max(sum(expert_stats.first_count), 1)
    shares = [count / total for count in expert_stats.first_count]
    chips = [
        f'<span class="s{slot}">expert {slots.index(slot)} &nbsp;{shares[slots.index(slot)]:.0%}</span>'
        for slot in range(NUM_COLORS)
        if slot in slots
    ]
    if NUM_COLORS in slots:
        rest = sum(share for share, slot in zip(shares, slots, strict=True) if slot == NUM_COLORS)
        chips.append(f'<span class="s{NUM_COLORS}">{slots.count(NUM_COLORS)} more &nbsp;{rest:.0%}</span>')
    return f'<div class="only b{place}"><div class="legend">{"".join(chips)}</div></div>'


Mark = tuple[list[str], list[str]]  # (CSS classes of a token, a line of its tooltip for each block)


def _marks(report: ExpertsReport, slots: list[list[int]], count: int) -> list[Mark]:
    """Returns the CSS classes and tooltip lines of the first `count` tokens."""
    marks: list[Mark] = [([], []) for _ in range(count)]
    for place, block in enumerate(report.blocks):
        routing = report.sample.routing[block]
        first, dropped = routing.first_T.tolist(), routing.dropped_TK.any(1).tolist()
        for token, line in enumerate(_choices(routing, count)):
            names, lines = marks[token]
            if first[token] < 0:
                names.append(f"b{place}-none")
            else:
                names.append(f"b{place}-{slots[place][first[token]]}")
                if dropped[token]:
                    names.append(f"b{place}-part")
            lines.append(f"block {block}: {line}")
    return marks


def _choices(routing: SampleRouting, count: int) -> Iterator[str]:
    """Yields each token's choices as text, such as `expert 3 0.61, expert 1 0.39, expert 5 dropped`, largest weight
    first."""
    columns = (routing.ids_TK[:count], routing.weights_TK[:count], routing.outcome_TK[:count])
    for row in zip(*(values.tolist() for values in columns), strict=True):
        parts = []
        for expert, weight, reason in sorted(zip(*row, strict=True), key=lambda choice: -choice[1]):
            if reason <= Outcome.REROUTED:
                parts.append(f"expert {expert} {weight:.2f}" + (" (rerouted)" if reason == Outcome.REROUTED else ""))
            elif reason != Outcome.NOT_ROUTED:
                parts.append(f"expert {expert} dropped")
        yield ", ".join(parts) or "no expert"


def _span(piece: TokenText, marks: list[Mark]) -> str:
    """Renders a text of one or several tokens, coloured by the first of them."""
    title = "\n".join("\n".join(lines) for _, lines in marks)
    shown = "".join(_letter(letter) for letter in piece.text)
    return f'<span class="{" ".join(marks[0][0])}" title="{escape(title)}">{shown}</span>'


def _letter(letter: str) -> str:
    """Renders one character; line ends and other control characters become visible and keep their effect."""
    if letter == "\n" or letter == "\t":
        return f"<i>{VISIBLE[letter]}</i>{letter}"
    if letter in VISIBLE and letter != " ":
        return f"<i>{VISIBLE[letter]}</i>"
    return escape(letter) if letter.isprintable() else f"<i>\\x{ord(letter):02x}</i>"


# -------------------------------------------------------------------------------------------------------------- habits


def experts_section(report: ExpertsReport) -> str:
    """Renders the section on what each expert receives more often than others do, and how far a token alone decides its
    expert."""
    bars = "".join(_decides(place, report) for place in range(len(report.blocks)))
    tables = "".join(
        f'<div class="only b{place} scroll">{_table(report, place)}</div>' for place in range(len(report.blocks))
    )
    return f"""<section><h2>3. What each expert likes</h2>
<p><b>How far the token alone decides its first expert</b>: 0% if tokens go to experts as by lot, whatever they are;
100% if each kind of token always goes to the same one. What is left is up to the words around it. Counted over all
{report.sample.num_tokens:,} tokens of the sample.</p>
<div class="decides">{bars}</div>
{tables}</section>"""


def _decides(place: int, report: ExpertsReport) -> str:
    found = report.expert_stats[report.blocks[place]].specialization
    return f"""<label for="block{place}">block {report.blocks[place]}</label>
<div class="track"><span class="bar" style="width: {found.adjusted:.1%}"></span></div>
<span><b>{found.adjusted:.0%}</b> <small>{found.bits:.2f} of {found.entropy_bits:.2f} bits, {found.chance_bits:.2f} by
chance</small></span>"""


def _table(report: ExpertsReport, place: int) -> str:
    expert_stats = report.expert_stats[report.blocks[place]]
    slots = _slots(expert_stats)
    there = [kind for kind, share in enumerate(expert_stats.overall_class_share) if share > 0]
    heads = "".join(
        f'<th title="{CLASS_HELP.get(CHARACTER_CLASSES[kind], "")}">{CHARACTER_CLASSES[kind]}</th>' for kind in there
    )
    overall = "".join(f'<td class="kind">{_percent(expert_stats.overall_class_share[kind])}</td>' for kind in there)
    rows = "".join(_row(report, expert_stats, expert, slots[expert]) for expert in range(report.num_experts))
    return f"""<h3 style="margin-top: 18px">Block {report.blocks[place]}: what its experts were given</h3>
<p class="soft">Tokens that an expert takes more often than the others do: their share of its work, and how many times
their share of all work that is. Then its work by kind of character: orange where there is more of a kind than in all of
the text, blue where there is less.</p>
<table class="taste"><thead><tr><th class="left">expert</th><th class="left">share of the work</th>
<th class="left">tokens it likes</th>{heads}</tr></thead><tbody>
<tr class="all"><td class="left">all</td><td></td><td></td>{overall}</tr>{rows}</tbody></table>"""


def _row(report: ExpertsReport, expert_stats: ExpertStats, expert: int, slot: int) -> str:
    share = expert_stats.count[expert] / max(sum(expert_stats.count), 1)
    kinds = []
    for here, overall in zip(expert_stats.class_share[expert], expert_stats.overall_class_share, strict=True):
        if overall == 0:
            continue
        step = heat(here / overall) if expert_stats.count[expert] else STEPS_FROM_FAIR
        kinds.append(f'<td class="kind t{step}">{_percent(here)}</td>')
    top_tokens = (
        "".join(_word(report, token) for token in expert_stats.top_tokens[expert]) or '<small class="soft">none</small>'
    )
    width = min(share * report.num_experts, 4) * 28
    return (
        f'<tr><td class="left"><span class="chip s{slot}">{expert}</span></td><td class="left" style="white-space: '
        f'nowrap"><span class="bar" style="width: {width:.0f}px"></span> {share:.1%}</td>'
        f'<td class="left">{top_tokens}</td>{"".join(kinds)}</tr>'
    )


def _word(report: ExpertsReport, top_tokens: TopToken) -> str:
    title = escape(
        f"token {top_tokens.token}: {top_tokens.count} of this expert's choices, {top_tokens.lift:.2f} times its share"
    )
    shares = f"<small>{_percent(top_tokens.share)} &times;{top_tokens.lift:.1f}</small>"
    return f'<span class="word" title="{title}"><code>{escape(report.names[top_tokens.token])}</code>{shares}</span>'


def _percent(share: float) -> str:
    return "&ndash;" if share == 0 else "&lt;1%" if share < 0.005 else f"{share:.0%}"
