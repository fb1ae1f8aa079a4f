"""Stops and resumes runs. After SIGUSR1 on any rank, all ranks save and exit at the end of the step.

On resuming, some settings may differ from those of the checkpoint; others are refused. Batch systems send the signal
before a job's time is up (Slurm: `--signal=USR1@300`). SIGTERM is not handled: launchers send it to the remaining ranks
when one has died, and these cannot save.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from expert_parallel.checkpoint.files import Checkpoint
from expert_parallel.data.config import DataConfig
from expert_parallel.model.config import ModelConfig
from expert_parallel.parallel.collectives import any_rank
from expert_parallel.settings import Settings, changed_settings
from expert_parallel.training.config import Config, RunConfig

# Settings that determine which data a step sees.
DATA_ORDER_SETTINGS = ("seed", "training.global_batch", "training.sequence_length", "data.held_out")
# Settings that may differ from those that the weights were trained with: no weight changes its meaning.
WEIGHT_INDEPENDENT_SETTINGS = (
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


def check_can_resume(checkpoint: Checkpoint, config: Config) -> None:
    """Raises ValueError if the run cannot resume from the checkpoint: another model, or another order of data.

    A checkpoint of step 0 without moments (an imported model) only provides weights, so the order of data does not
    matter.
    """
    check_same_model(checkpoint, config)
    if checkpoint.step == 0 and not checkpoint.has_moments:
        return
    for path, old, new in changed_since_checkpoint(checkpoint, config):
        if path.startswith(DATA_ORDER_SETTINGS):
            raise ValueError(
                f"{checkpoint.path} was trained on another order of data: {path} is {old!r} there and {new!r} "
                "here; choose another run.folder, or the same setting"
            )


def check_same_model(checkpoint: Checkpoint, config: Config) -> None:
    """Raises ValueError if the checkpoint's weights have another meaning in this run's model."""
    for path, old, new in changed_since_checkpoint(checkpoint, config):
        if path.startswith("model.") and not path.startswith(WEIGHT_INDEPENDENT_SETTINGS):
            raise ValueError(
                f"{checkpoint.path} is a checkpoint of another model: {path} is {old!r} there and {new!r} here; choose "
                "another run.folder, or the same setting"
            )


def changed_since_checkpoint(checkpoint: Checkpoint, config: Config) -> list[tuple[str, Any, Any]]:
    """Returns the settings that have changed since the checkpoint was written: (path, old value, new value).

    A setting of the model, of the data or of `run` that did not exist when it was written counts as its default.
    """
    then = dict(checkpoint.config)
    with suppress(ValidationError):  # settings that this version does not know are compared unchanged
        then["model"] = ModelConfig.model_validate(then["model"]).model_dump(mode="json")
    with suppress(ValidationError):
        then["run"] = RunConfig.model_validate(then["run"]).model_dump(mode="json")
    with suppress(ValidationError):
        data: Settings = TypeAdapter(DataConfig).validate_python(then["data"])
        then["data"] = data.model_dump(mode="json")
    return changed_settings(then, config.model_dump(mode="json"))


EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, try again


@dataclass
class StopSignal:
    """Holds whether this rank has received SIGUSR1; it counts even while the ranks are still starting."""

    received: bool = False

    def any_rank(self) -> bool:
        """Returns True if any rank has received the signal. It is a collective: every rank calls it at the same
        step."""
        return any_rank(self.received)


@contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    """Handles SIGUSR1 inside the context: its arrival is recorded in the StopSignal that is yielded."""
    stop = StopSignal()

    def receive(number: int, frame: FrameType | None) -> None:
        stop.received = True

    before = signal.signal(signal.SIGUSR1, receive)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGUSR1, before)
