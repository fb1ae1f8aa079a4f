"""What a run's metrics.jsonl says: how far it is, its held-out losses, and when they reached another's."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

END_BYTES = 1 << 23  # more than two lines of thousands of experts in each of many blocks


@dataclass(frozen=True)
class Curve:
    """Held-out losses, nats a token, after so many steps; step 0 is the untrained model."""

    steps: list[int]
    losses: list[float]

    @property
    def last_step(self) -> int:
        return self.steps[-1] if self.steps else -1

    @property
    def final(self) -> float:
        return self.losses[-1]

    def at(self, step: int) -> float:
        return self.losses[self.steps.index(step)]

    def until(self, step: int) -> "Curve":
        kept = [number for number, own in enumerate(self.steps) if own <= step]
        return Curve([self.steps[number] for number in kept], [self.losses[number] for number in kept])

    def reaches(self, loss: float) -> float | None:
        """The step from which on the loss stays at or below this one, on the straight line between two evaluations.
        None where it is above at the end."""
        above = [number for number, own in enumerate(self.losses) if own > loss]
        if not above:
            return float(self.steps[0])
        last = above[-1]
        if last == len(self.losses) - 1:
            return None
        part = (self.losses[last] - loss) / (self.losses[last] - self.losses[last + 1])
        return self.steps[last] + part * (self.steps[last + 1] - self.steps[last])


def read_curve(folder: Path) -> Curve:
    """Of a run's folder; empty before its first evaluation. Half a line at the end, of a run that goes on or was
    killed, does not count. ValueError where a loss is no number."""
    steps, losses = [], []
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if '"eval/loss"' in line and line.endswith("\n"):  # most lines have none, and hundreds of loads
            record = json.loads(line)
            steps.append(record["step"])
            losses.append(record["eval/loss"])
            if not math.isfinite(losses[-1]):
                raise ValueError(f"{path}: the held-out loss of step {steps[-1]} is {losses[-1]}")
    return Curve(steps, losses)


def steps_done(folder: Path) -> int:
    """From the end of the file alone: it is asked for all the time."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - END_BYTES))
        ends = re.findall(rb'\{"step": (\d+),[^\n]*\n', file.read())
    return int(ends[-1]) if ends else 0
