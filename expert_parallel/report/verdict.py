"""Judges a run's health from its metrics.jsonl, with the rules by which the run itself prints sentences while it trains
(training/health.py)."""

from dataclasses import dataclass
from pathlib import Path

from expert_parallel.report.loads import read_records
from expert_parallel.training.config import Config
from expert_parallel.training.health import HealthMonitor
from expert_parallel.training.health_advice import health_sentence


@dataclass(frozen=True)
class Verdict:
    """Holds what was unhealthy in the steps that metrics.jsonl has.

    first_step, last_step: of training. recent_steps: `run.health.calm_steps`, or all steps if they are fewer: an event
    is over after so many without it. lasting, ended: sentences on events that are not over, and on those that are.
    is_judged: False if `run.health` is null.
    """

    first_step: int
    last_step: int
    recent_steps: int
    lasting: list[str]
    ended: list[str]
    is_judged: bool

    @property
    def headline(self) -> str:
        """Returns the verdict in one sentence."""
        steps = f"steps {self.first_step:,} to {self.last_step:,}"
        if not self.is_judged:
            return f"The health of {steps} is not judged, as run.health is null."
        if self.lasting:
            return f"Unhealthy in the last {self.recent_steps:,} steps."
        if self.ended:
            return f"Healthy in the last {self.recent_steps:,} steps, but not before."
        return f"Healthy: {steps} meet none of the conditions of run.health."


def read_verdict(path: Path, config: Config) -> Verdict:
    """Reads a run's metrics.jsonl, which holds at least one step of training, and judges it by `run.health`.

    A run that was resumed was judged in parts while it trained, and is judged as a whole here.
    """
    monitor = HealthMonitor(config.run.health, config.model, config.training.schedule.warmup_steps)
    steps = []
    for record in read_records(path):
        if "train/loss" in record:
            steps.append(record["step"])
            monitor.observe(record["step"], record)
    monitor.report_rest(steps[-1])
    lasting: list[str] = []
    ended: list[str] = []
    for events in monitor.reports:
        sentence = f"Step {events[0].reported_step:,}: {health_sentence(events, config)}"
        group = ended if all(event.is_over for event in events) else lasting
        group.append(f"{sentence}. This was so up to step {max(event.last_step for event in events):,}.")
    recent_steps = min(monitor.config.calm_steps, len(steps))
    return Verdict(steps[0], steps[-1], recent_steps, lasting, ended, is_judged=config.run.health is not None)
