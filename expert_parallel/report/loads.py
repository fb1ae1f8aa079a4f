"""Reads from metrics.jsonl how a run's tokens were distributed over its experts, averaged over intervals of steps."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = 100  # at most so many

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Loads:
    """Holds means over intervals of training steps, each of which is a column of the page's heat maps.

    first_steps, last_steps: of each interval. share: by MoE block, (intervals, experts), each expert's share of the
    (token, expert) choices that the block computed; NaN if an interval has no logged step. dropped_share, load_cv: by
    MoE block, (intervals), the share of choices that were dropped, and the coefficient of variation of the experts'
    loads. held_out_loss: (step, loss) of the last evaluation; None if there was none."""

    first_steps: list[int]
    last_steps: list[int]
    share: dict[int, NDArray[np.float64]]
    dropped_share: dict[int, NDArray[np.float64]]
    load_cv: dict[int, NDArray[np.float64]]
    held_out_loss: tuple[int, float] | None


def read_loads(path: Path, blocks: list[int], num_experts: int) -> Loads:
    """Reads a run's metrics.jsonl and returns its means over at most `COLUMNS` intervals. Reads the file twice, line by
    line, so that memory does not grow with the run.

    Raises ValueError if the file is missing or damaged, or if it has no training step with the loads of these blocks
    and experts."""
    names = [
        f"moe/layer_{block}/{name}"
        for block in blocks
        for name in (*(f"load/{expert}" for expert in range(num_experts)), "dropped_share", "load_cv")
    ]
    if not path.is_file():
        raise ValueError(f"there is no {path}: a run writes it when it trains, and the loads of its experts are in it")
    held_out_loss, steps = None, []
    for record in read_records(path):
        if "eval/loss" in record:
            held_out_loss = (record["step"], record["eval/loss"])
        if "train/loss" in record:
            steps.append(record["step"])
            if missing := [name for name in names if name not in record]:
                raise ValueError(
                    f"{path}: step {record['step']} has no {missing[0]}; the run's config.yaml has {len(blocks)} MoE "
                    f"blocks of {num_experts} experts"
                )
    if not steps:
        raise ValueError(f"{path} holds no step of training yet: there are no loads to show")

    first, count = steps[0], steps[-1] - steps[0] + 1
    columns = min(COLUMNS, count)
    sums, counts = np.zeros((columns, len(names))), np.zeros((columns, 1))
    for record in read_records(path):
        if "train/loss" in record:
            column = (record["step"] - first) * columns // count
            sums[column] += [record[name] for name in names]
            counts[column] += 1
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    by_block = dict(zip(blocks, np.split(means, len(blocks), axis=1), strict=True))
    begins = [
        first - (-column * count // columns) for column in range(columns + 1)
    ]  # first step of each column, rounded up
    return Loads(
        first_steps=begins[:-1],
        last_steps=[begin - 1 for begin in begins[1:]],
        share={block: values[:, :num_experts] for block, values in by_block.items()},
        dropped_share={block: values[:, num_experts] for block, values in by_block.items()},
        load_cv={block: values[:, num_experts + 1] for block, values in by_block.items()},
        held_out_loss=held_out_loss,
    )


def read_records(path: Path) -> Iterator[Record]:
    """Yields complete lines only: a run that was killed, or is training now, may have left an incomplete one."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
