"""Prints the table of differences, and a sentence for each column in which a layout differs."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from expert_parallel.verify.compare import GROUPS, TensorDifference
from expert_parallel.verify.explain import explain
from expert_parallel.verify.result import LayoutResult

# Column of a difference -> its title.
TITLES = {
    "loss": "loss",
    "output": "outputs",
    **{f"gradient: {group}": f"gradient {group}" for group in GROUPS},
    "gradient norm": "gradient norm",
    "learning rate": "learning rate",
    "moments": "moments",
    "update": "weights after step",
    "initial weights": "initial weights",
    "balance loss": "balance losses",
    "training dtype": "training dtype",
    "loaded": "checkpoint loaded",
    "evaluation": "evaluation",
    "generated": "generated tokens",
}


def print_results(results: Sequence[LayoutResult], tolerance: float, console: Console) -> None:
    """Prints a table with one line per layout and the largest relative difference in each column (`-` where the layout
    was not checked), then sentences on what differs.

    In a terminal too narrow for the table, layouts are numbered and the columns are split over several tables."""
    columns = _columns(results, tolerance)
    names = [result.layout for result in results]
    if not _fits(_table(names, columns), console):
        numbers = [str(number) for number in range(1, len(names) + 1)]
        for number, name in zip(numbers, names, strict=True):
            console.print(Text(f"{number:>3}  {name}"), soft_wrap=True)
        names = numbers
    while columns:
        count = len(columns)
        while count > 1 and not _fits(_table(names, columns[:count]), console):
            count -= 1
        console.print(_table(names, columns[:count]))
        columns = columns[count:]
    for result in results:
        if sentences := explain(result, tolerance, results):
            console.print(Text(result.layout, "bold"), soft_wrap=True)
        for sentence in sentences:
            console.print(Text(f"  {sentence}"), soft_wrap=True)


def make_console() -> Console:
    """Returns a console as wide as the terminal, or as wide as the text if the output goes into a file or pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=1000)


def _fits(table: Table, console: Console) -> bool:
    return Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width


def _table(names: Sequence[str], columns: Sequence[tuple[str, list[Text]]]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("layout", no_wrap=True)
    for title, _ in columns:
        table.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True, vertical="bottom")
    for row, name in enumerate(names):
        table.add_row(name, *(cells[row] for _, cells in columns))
    return table


def _columns(results: Sequence[LayoutResult], tolerance: float) -> list[tuple[str, list[Text]]]:
    found = {column for result in results for column in (d.column for d in result.differences)}
    columns = [
        (title, [_worst([d for d in result.differences if d.column == column], tolerance) for result in results])
        for column, title in TITLES.items()
        if column in found
    ]
    if "dropped" in found:
        columns.append(("dropped tokens", [_dropped(result, tolerance) for result in results]))
    columns.append(("ledger", [_verdict(not result.ledger, "BREACH") for result in results]))
    columns.append(("dropout", [_verdict(not result.dropout, "WRONG") for result in results]))
    columns.append(("verdict", [_verdict(result.passes(tolerance), "DIFFERS") for result in results]))
    return columns


def _worst(differences: list[TensorDifference], tolerance: float) -> Text:
    if not differences:
        return Text("-")
    if any(not d.is_present for d in differences):
        return Text("missing", "bold red")
    worst = max(d.relative for d in differences)
    is_right = all(d.passes(tolerance) for d in differences)
    return Text("0" if worst == 0 else f"{worst:.0e}", "" if is_right else "bold red")


def _dropped(result: LayoutResult, tolerance: float) -> Text:
    right = all(d.passes(tolerance) for d in result.differences if d.column == "dropped")
    share = f"{100 * result.dropped / max(1, result.routed):.0f} %"
    return Text(share if right else f"not {share}", "" if right else "bold red")


def _verdict(right: bool, otherwise: str) -> Text:
    return Text("ok", "green") if right else Text(otherwise, "bold red")
