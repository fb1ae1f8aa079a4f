"""Reads a run's metrics.jsonl: its progress, its held-out losses, and the step from which on these stay below a given
loss."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

END_BYTES = 1 << 23  # more than two lines, even with thousands of experts in each of many blocks


@dataclass(frozen=True)
class Curve:
    """Holds held-out losses, in nats per token, and the steps after which they were measured; step 0 is the untrained
    model."""

    steps: list[int]
    losses: list[float]

    @property
    def last_step(self) -> int:
        """Returns the last evaluated step, -1 before the first evaluation."""
        return self.steps[-1] if self.steps else -1

    @property
    def final(self) -> float:
        """Returns the last loss."""
        return self.losses[-1]

    def at(self, step: int) -> float:
        """Returns the loss after `step`."""
        return self.losses[self.steps.index(step)]

    def until(self, step: int) -> "Curve":
        """Returns the curve up to and including `step`."""
        kept = [number for number, own in enumerate(self.steps) if own <= step]
        return Curve([self.steps[number] for number in kept], [self.losses[number] for number in kept])

    def step_reaching(self, loss: float) -> float | None:
        """Returns the step from which on the loss stays at or below `loss`, interpolated linearly between two
        evaluations; None if the last loss is above it."""
        above = [number for number, own in enumerate(self.losses) if own > loss]
        if not above:
            return float(self.steps[0])
        last = above[-1]
        if last == len(self.losses) - 1:
            return None
        part = (self.losses[last] - loss) / (self.losses[last] - self.losses[last + 1])
        return self.steps[last] + part * (self.steps[last + 1] - self.steps[last])


def read_curve(folder: Path) -> Curve:
    """Reads the held-out losses of the run in `folder`; the curve is empty before its first evaluation. Raises
    ValueError if a loss is not finite.

    Ignores an incomplete last line, which a run that is training or was killed may leave."""
    steps, losses = [], []
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if '"eval/loss"' in line and line.endswith("\n"):  # skips most lines unparsed: they hold hundreds of loads
            record = json.loads(line)
            steps.append(record["step"])
            losses.append(record["eval/loss"])
            if not math.isfinite(losses[-1]):
                raise ValueError(f"{path}: the held-out loss of step {steps[-1]} is {losses[-1]}")
    return Curve(steps, losses)


def steps_done(folder: Path) -> int:
    """Returns the last step in the metrics.jsonl of the run in `folder`, 0 if there is none. Reads only the end of the
    file, since it is called often."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - END_BYTES))
        ends = re.findall(rb'\{"step": (\d+),[^\n]*\n', file.read())
    return int(ends[-1]) if ends else 0
