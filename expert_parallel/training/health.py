"""Finds in the metrics of a run what calls for a change of settings: few experts in use, dropped choices, routers
without doubt, spikes of the gradient norm, a loss that rises.

It reads nothing but numbers that are on the host anyway, so it adds no collective and no wait for a device. The same
code reads a run's metrics.jsonl afterwards (report/verdict.py). `health_advice.py` names the settings to try.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from statistics import fmean, median, pstdev
from typing import Annotated, Literal

from pydantic import Field

from expert_parallel.model.config import ModelConfig
from expert_parallel.moe.routers.base import LinearSettings
from expert_parallel.moe.routers.registry import router_settings
from expert_parallel.settings import Settings

Kind = Literal["collapse", "dead", "dropped", "entropy", "gradient_spike", "loss_rise"]

MAX_NAMED = 8  # experts that a sentence lists
# A mean loss must have risen by so many standard errors: in a long run of few tokens a step, chance alone makes the
# lowest of all means 4 too low, and some later one 4 too high.
STANDARD_ERRORS = 10
FIRST_STEP_ERROR = 0.1  # nats a token, the standard error that is assumed of the loss of one step


class HealthConfig(Settings):
    """Sets from which numbers on the metrics of a run are unhealthy, in which case a sentence names what to try.

    Conditions of the routing count after the warm-up of the learning rate (`training.schedule.warmup_steps`), in which
    uneven loads are usual. A run that resumes starts to count anew.
    """

    steps: int = Field(default=20, ge=1)
    """Reports `collapse` and `entropy` after this many steps in a row; also the number of steps of a mean loss, and
    the least number of gradient norms that a median is taken of."""
    calm_steps: int = Field(default=100, ge=1)
    """Ends a condition after this many steps without it; it is reported again if it returns after that."""
    collapse: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Reports a layer whose tokens share few experts: on a scale from 0 (an even load) to 1 (all tokens choose the same
    experts), `load_cv` or the largest `load/<e>` is at least this number; null reports none."""
    dead_steps: Annotated[int, Field(ge=1)] | None = 100
    """Reports an expert that has computed nothing for this many steps in a row; null reports none."""
    dropped: Annotated[float, Field(gt=0, le=1)] | None = 0.2
    """Reports a layer whose `dropped_share` is at least this number in the mean of the last `dropped_steps` steps; null
    reports none."""
    dropped_steps: int = Field(default=100, ge=1)
    """Sets the number of steps of the mean of `dropped`; balancing a new router takes this long."""
    entropy: Annotated[float, Field(gt=0, le=1)] | None = 0.05
    """Reports a layer whose `router_entropy` is at most this number times ln(num_experts); null reports none."""
    gradient_spike: Annotated[float, Field(gt=1)] | None = 10.0
    """Reports a gradient norm that is this many times the median of the steps before it, at most `calm_steps`; null
    reports none."""
    loss_rise: Annotated[float, Field(gt=0)] | None = 0.2
    """Reports a mean loss that is this many nats a token above the lowest one so far; null reports none."""


NOTHING = HealthConfig(collapse=None, dead_steps=None, dropped=None, entropy=None, gradient_spike=None, loss_rise=None)


@dataclass(frozen=True)
class Condition:
    """Holds a condition that one step's metrics meet.

    layer: the number of the MoE block; None: the whole model. severity: larger is worse; comparable within a kind.
    numbers: a clause with the numbers. first_step: from which on the condition holds. hold: the number of steps in a
    row after which it is reported. load_cv: of the layer.
    """

    kind: Kind
    layer: int | None
    severity: float
    numbers: str
    first_step: int
    hold: int = 1
    load_cv: float = 0.0


@dataclass(frozen=True)
class LowestLoss:
    """Holds the lowest mean loss so far, in nats a token, at which step it was reached, and its standard error. In the
    first steps it is the loss of the first one."""

    mean: float
    step: int
    error: float


@dataclass
class HealthEvent:
    """Holds what happened from the first step of a condition to the last one. is_over: True after `calm_steps` steps
    without it. condition: as it was when it was reported, at `reported_step`."""

    condition: Condition
    first_step: int
    last_step: int
    reported_step: int = 0
    is_over: bool = False


class HealthMonitor:
    """Turns the metrics of steps, given one after the other, into events. `reports` holds all groups of events that
    `observe` has returned.

    config: None finds nothing. warmup_steps: the number of first steps in which the routing is not judged.
    """

    def __init__(self, config: HealthConfig | None, model: ModelConfig, warmup_steps: int) -> None:
        self.config = NOTHING if config is None else config
        self.layers = model.moe_layers
        self.warmup_steps = warmup_steps
        self.reports: list[list[HealthEvent]] = []
        if model.moe is not None:
            router = router_settings(model.moe.router)
            self.num_experts, self.num_choices = model.moe.num_experts, router.num_choices(model.moe.num_experts)
            # Hash routers have a constant entropy. Under expert choice a token may have any number of experts, and a
            # low entropy of its scores leaves no expert unused.
            self.has_entropy = isinstance(router, LinearSettings) and model.moe.num_experts > 1
            # Names of metrics are made once, since a large model has thousands of them in each step.
            self.load_names = {
                layer: [f"moe/layer_{layer}/load/{expert}" for expert in range(self.num_experts)]
                for layer in self.layers
            }
            self.idle_steps = {layer: [0] * self.num_experts for layer in self.layers}
            self.dropped_shares = {layer: deque[float](maxlen=self.config.dropped_steps) for layer in self.layers}
        self.norms: deque[float] = deque(maxlen=self.config.calm_steps)
        self.losses: deque[float] = deque(maxlen=self.config.steps)
        self.lowest: LowestLoss | None = None
        self._held: Counter[tuple[Kind, int | None]] = Counter()
        self._open: dict[tuple[Kind, int | None], HealthEvent] = {}
        self._unreported: list[HealthEvent] = []
        self._reported_at: dict[Kind, int] = {}

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[list[HealthEvent]]:
        """Reads the metrics of a training step (see `step_metrics`) and returns the events to report now, in groups of
        one kind.

        An event is returned once. Layers that meet a condition within `steps` steps of a report of its kind share the
        next report, so that a model of many layers has few.
        """
        found = {(condition.kind, condition.layer): condition for condition in self._conditions(step, metrics)}
        self._held = Counter({key: self._held[key] + 1 for key in found})
        for key, condition in found.items():
            if key in self._open:
                self._open[key].last_step = step
            elif self._held[key] >= condition.hold and not self._follows_collapse(condition):
                first_step = min(condition.first_step, step - self._held[key] + 1)
                self._open[key] = HealthEvent(condition, first_step, step)
                self._unreported.append(self._open[key])
        for key, event in list(self._open.items()):
            if step - event.last_step >= self.config.calm_steps:
                self._open.pop(key).is_over = True
        return self._due(step, self.config.steps)

    def report_rest(self, step: int) -> list[list[HealthEvent]]:
        """Returns the events that wait for the next report of their kind. step: the last one."""
        return self._due(step, 0)

    def _due(self, step: int, pause: int) -> list[list[HealthEvent]]:
        due = []
        for kind in dict.fromkeys(event.condition.kind for event in self._unreported):
            if step - self._reported_at.get(kind, -pause) >= pause:
                due.append([event for event in self._unreported if event.condition.kind == kind])
                self._unreported = [event for event in self._unreported if event.condition.kind != kind]
                self._reported_at[kind] = step
        for event in chain(*due):
            event.reported_step = step
        self.reports += due
        return due

    def _follows_collapse(self, condition: Condition) -> bool:
        """Returns True for drops and dead experts of a layer whose collapse is reported: they are the same event."""
        return condition.kind in ("dead", "dropped") and ("collapse", condition.layer) in self._open

    def _conditions(self, step: int, metrics: Mapping[str, float]) -> Iterator[Condition]:
        if step > self.warmup_steps:
            for layer in self.layers:
                loads = [metrics[name] for name in self.load_names[layer]]
                values = {name: metrics[f"moe/layer_{layer}/{name}"] for name in ("load_cv", "dropped_share")}
                yield from self._collapse(step, layer, loads, **values)
                yield from self._dead(step, layer, loads)
                yield from self._dropped(step, layer, **values)
                yield from self._entropy(step, layer, metrics[f"moe/layer_{layer}/router_entropy"], values["load_cv"])
        yield from self._gradient_spike(step, metrics["train/grad_norm"])
        yield from self._loss_rise(step, metrics["train/loss"])

    def _collapse(
        self, step: int, layer: int, loads: list[float], load_cv: float, dropped_share: float
    ) -> Iterator[Condition]:
        if self.config.collapse is None or self.num_choices >= self.num_experts:
            return
        # A token has k different experts, so its k choices cannot all be of one: sqrt(E - 1) is the maximum of k = 1.
        most_cv = math.sqrt(self.num_experts / self.num_choices - 1)
        fair, most = 1 / self.num_experts, 1 / self.num_choices
        largest = max(loads)
        unevenness = max(load_cv / most_cv, (largest - fair) / (most - fair))
        if unevenness >= self.config.collapse:
            numbers = (
                f"load cv {load_cv:.2f} of at most {most_cv:.2f}; expert {loads.index(largest)} computed {largest:.1%} "
                f"of all choices, and an even share is {fair:.1%}"
            )
            numbers += f"; {dropped_share:.1%} were dropped" if dropped_share > 0 else ""
            yield Condition("collapse", layer, unevenness, numbers, step, self.config.steps)

    def _dead(self, step: int, layer: int, loads: list[float]) -> Iterator[Condition]:
        if self.config.dead_steps is None:
            return
        # Counted for each expert: with few tokens in a step, some expert has none in every step, and each time another.
        idle_steps = self.idle_steps[layer]
        if min(loads) > 0 and not any(idle_steps):
            return
        self.idle_steps[layer] = idle_steps = [
            idle + 1 if load == 0 else 0 for idle, load in zip(idle_steps, loads, strict=True)
        ]
        dead = [expert for expert, idle in enumerate(idle_steps) if idle >= self.config.dead_steps]
        if dead:
            names = ", ".join(map(str, dead[:MAX_NAMED])) + (", ..." if len(dead) > MAX_NAMED else "")
            numbers = f"{len(dead)} of {self.num_experts} experts, number{'s' if len(dead) > 1 else ''} {names}"
            yield Condition("dead", layer, len(dead), numbers, step - max(idle_steps) + 1)

    def _dropped(self, step: int, layer: int, load_cv: float, dropped_share: float) -> Iterator[Condition]:
        shares, num_steps = self.dropped_shares[layer], self.config.dropped_steps
        shares.append(dropped_share)
        if self.config.dropped is None or len(shares) < num_steps:
            return
        mean = fmean(shares)  # not each step: the share of small batches goes up and down
        if mean >= self.config.dropped:
            numbers = f"{mean:.1%}" if num_steps == 1 else f"mean of {num_steps} steps: {mean:.1%}"
            numbers += f"; load cv {load_cv:.2f}"
            yield Condition("dropped", layer, mean, numbers, step - num_steps + 1, load_cv=load_cv)

    def _entropy(self, step: int, layer: int, entropy: float, load_cv: float) -> Iterator[Condition]:
        if self.config.entropy is None or not self.has_entropy:
            return
        most = math.log(self.num_experts)
        if entropy <= self.config.entropy * most:
            numbers = f"entropy {entropy:.3f} nats of at most {most:.2f}; load cv {load_cv:.2f}"
            yield Condition("entropy", layer, -entropy, numbers, step, self.config.steps, load_cv)

    def _gradient_spike(self, step: int, norm: float) -> Iterator[Condition]:
        if self.config.gradient_spike is not None and len(self.norms) >= min(self.config.steps, self.config.calm_steps):
            usual = median(self.norms)
            if usual > 0 and norm >= self.config.gradient_spike * usual:
                numbers = f"{norm:.3g}, {norm / usual:.0f} times {usual:.3g}, the median of the steps before it"
                yield Condition("gradient_spike", None, norm / usual, numbers, step)
        self.norms.append(norm)

    def _loss_rise(self, step: int, loss: float) -> Iterator[Condition]:
        self.losses.append(loss)
        if self.lowest is None:
            self.lowest = LowestLoss(loss, step, FIRST_STEP_ERROR)
        if self.config.loss_rise is None or len(self.losses) < self.config.steps:
            return
        mean, lowest = fmean(self.losses), self.lowest
        if mean - lowest.mean >= max(self.config.loss_rise, STANDARD_ERRORS * lowest.error):
            numbers = (
                f"mean of {len(self.losses)} steps: {mean:.3f} nats a token, {mean - lowest.mean:.2f} above the "
                f"lowest, {lowest.mean:.3f} at step {lowest.step}"
            )
            yield Condition("loss_rise", None, mean - lowest.mean, numbers, lowest.step + 1)
        elif mean < lowest.mean or lowest.error == FIRST_STEP_ERROR:
            self.lowest = LowestLoss(mean, step, pstdev(self.losses) / math.sqrt(len(self.losses)))


def describe(events: list[HealthEvent]) -> str:
    """Returns what a group of events of one kind is: its layers, its first step, and the numbers of the worst layer."""
    worst = max((event.condition for event in events), key=lambda condition: condition.severity)
    since = f"since step {min(event.first_step for event in events)}"
    layers = _ranges(event.condition.layer for event in events if event.condition.layer is not None)
    where = f"in layer{'s' if len(events) > 1 else ''} {layers} {since}"
    numbers = f"({f'layer {worst.layer}: ' if len(events) > 1 else ''}{worst.numbers})"
    sentences: dict[Kind, str] = {
        "collapse": f"most tokens have chosen the same experts {where} {numbers}",
        "dead": f"experts have computed nothing {where} {numbers}",
        "dropped": f"many choices have been dropped {where} {numbers}",
        "entropy": f"routers have put nearly all weight on one expert {where} {numbers}",
        "gradient_spike": f"the gradient norm of step {worst.first_step} is {worst.numbers}",
        "loss_rise": f"the loss has risen {since} {numbers}",
    }
    return sentences[worst.kind]


def _ranges(numbers: Iterable[int]) -> str:
    """Returns numbers as `0, 4-7, 9`."""
    parts = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        values = [number for _, number in run]
        parts.append(f"{values[0]}" if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return ", ".join(parts)
