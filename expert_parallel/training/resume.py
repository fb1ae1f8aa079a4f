"""How a run stops and goes on: after SIGUSR1 at any rank, all ranks save and leave at the end of the step; later, some
settings may differ from those that the checkpoint was written under, others are refused.

Batch systems send the signal before a job's time is up (Slurm: `--signal=USR1@300`). SIGTERM is left alone:
launchers send it to the ranks that are left when one has died, which can save nothing."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from pydantic import ValidationError

from expert_parallel.checkpoint.files import Checkpoint
from expert_parallel.model.config import ModelConfig
from expert_parallel.parallel.collectives import anywhere
from expert_parallel.settings import changed_settings
from expert_parallel.training.config import Config

# What a run's data position is counted in.
ORDER_OF_DATA = ("seed", "training.global_batch", "training.sequence_length", "data.held_out")
# What may be set otherwise than where the weights were trained: no weight means another thing by it.
FREE_OF_WEIGHTS = (
    "model.dropout",
    "model.init_std",
    "model.moe.preset",
    "model.moe.router.jitter",
    "model.moe.router.balance_bias_rate",
    "model.moe.capacity",
    "model.moe.losses",
    "model.moe.dispatcher",
    "model.moe.ledger",
    "model.moe.experts.backend",
    "model.moe.experts.hidden_dropout",
    "model.moe.experts.output_dropout",
)


def refuse_settings(checkpoint: Checkpoint, config: Config) -> None:
    """ValueError where the run cannot go on from it: another model, another order of data. Weights alone that no step
    has changed (an imported model's) are begun from as from another run's."""
    refuse_model(checkpoint, config)
    if checkpoint.step == 0 and not checkpoint.has_moments:
        return
    for path, old, new in changes_since(checkpoint, config):
        if path.startswith(ORDER_OF_DATA):
            raise ValueError(
                f"{checkpoint.path} is a checkpoint of another order of data: {path} is {old!r} there and {new!r} "
                "here; choose another run.folder, or the same setting"
            )


def refuse_model(checkpoint: Checkpoint, config: Config) -> None:
    """ValueError where its weights mean another thing in this run's model."""
    for path, old, new in changes_since(checkpoint, config):
        if path.startswith("model.") and not path.startswith(FREE_OF_WEIGHTS):
            raise ValueError(
                f"{checkpoint.path} is a checkpoint of another model: {path} is {old!r} there and {new!r} here; choose "
                "another run.folder, or the same setting"
            )


def changes_since(checkpoint: Checkpoint, config: Config) -> list[tuple[str, Any, Any]]:
    """(path, value then, value now). A model setting that did not exist then had its default."""
    then = dict(checkpoint.config)
    with suppress(ValidationError):  # what is not understood any more is shown as it stands
        then["model"] = ModelConfig.model_validate(then["model"]).model_dump(mode="json")
    return changed_settings(then, config.model_dump(mode="json"))


EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, try again


@dataclass
class StopSignal:
    """received: by this rank. A signal that comes while the ranks still meet counts, too."""

    received: bool = False

    def anywhere(self) -> bool:
        """Whether a rank has received it. Every rank asks, at the same step."""
        return anywhere(self.received)


@contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    stop = StopSignal()

    def receive(number: int, frame: FrameType | None) -> None:
        stop.received = True

    before = signal.signal(signal.SIGUSR1, receive)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGUSR1, before)
