"""Stops and resumes runs. After SIGUSR1 on any rank, all ranks save and exit at the end of the step.

On resuming, some settings may differ from those of the checkpoint; others are refused. Batch systems send the signal
before a job's time is up (Slurm: `--signal=USR1@300`). SIGTERM is not handled: launchers send it to the remaining ranks
when one has died, and these cannot save.
"""

import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import TypeAdapter

from expert_parallel.checkpoint.files import Checkpoint
from expert_parallel.checkpoint.load import left_out
from expert_parallel.data.config import DataConfig
from expert_parallel.model.config import ModelConfig
from expert_parallel.moe.config import preset_summary
from expert_parallel.parallel.collectives import any_rank
from expert_parallel.settings import Settings, changed_settings
from expert_parallel.training.config import Config, RunConfig, TrainingConfig, load_config
from expert_parallel.training.dead_settings import dead_settings
from expert_parallel.training.optim import learning_rate

# Settings that determine which data a step sees.
DATA_ORDER_SETTINGS = ("seed", "training.global_batch", "training.sequence_length", "data.held_out")
# Settings that may differ from those that the weights were trained with: no weight changes its meaning.
WEIGHT_INDEPENDENT_SETTINGS = (
    "model.dropout",
    "model.init_std",
    "model.mtp.weight",
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
# Settings that need not agree with the last run's: the folder has several names, and a run adds the digest of its data.
IDENTICAL_SETTINGS = ("run.folder", "data.sha256")


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
    """Raises ValueError if the checkpoint's weights have another meaning in this run's model. A model without
    multi-token prediction may leave out that of the checkpoint."""
    for path, old, new in changed_since_checkpoint(checkpoint, config):
        if path == "model.mtp.depth" and new is None:
            continue
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
    context = {"where": str(checkpoint.path)}
    with suppress(ValueError):  # settings that this version does not know are compared unchanged
        then["model"] = ModelConfig.model_validate(then["model"], context=context).model_dump(mode="json")
    with suppress(ValueError):
        then["run"] = RunConfig.model_validate(then["run"]).model_dump(mode="json")
    with suppress(ValueError):
        data: Settings = TypeAdapter(DataConfig).validate_python(then["data"])
        then["data"] = data.model_dump(mode="json")
    return changed_settings(then, config.model_dump(mode="json"))


def format_changes(
    checkpoint: Checkpoint, config: Config, block: str = "", announced: Sequence[tuple[str, Any, Any]] = ()
) -> str:
    """Returns the settings that have changed since the checkpoint, and what is not loaded from it, as the end of a
    sentence; empty if there is nothing.

    block: the beginning of the paths that count. announced: changes that are left out.
    """
    found = [change for change in changed_since_checkpoint(checkpoint, config) if change not in announced]
    changes = [f"{path} {old!r} -> {new!r}" for path, old, new in found if path.startswith(block)]
    text = f"; changed: {', '.join(changes)}" if changes else ""
    absent = left_out(checkpoint, config.model)
    return text + (f"; left out {len(absent):,} tensors ({absent[0]}, ...), as model.mtp is null" if absent else "")


def settings_of_last_run(folder: Path) -> dict[str, Any] | None:
    """Returns the settings with which a run last ran, from its config.yaml; None if there is none that can be read."""
    with suppress(ValueError):  # of a first run, or of a file that this version does not read: nothing to compare with
        return load_config(folder).model_dump(mode="json") if (folder / "config.yaml").exists() else None
    return None


def notes_at_start(
    config: Config, last: dict[str, Any] | None, checkpoint: Checkpoint | None, *, has_failed: bool = False
) -> Iterator[str]:
    """Yields what a user should know before a run trains, a sentence a line.

    last: see `settings_of_last_run`. checkpoint: the one that the run resumes from. has_failed: True if the run goes on
    after a failure; the changes since then are announced beside it, and the old learning rate is nothing to return to.
    """
    yield from (f"warning: {sentence}" for sentence in dead_settings(config))
    if config.model.moe is not None and (preset := preset_summary(config.model.moe)) is not None:
        yield f"preset {preset}"
    if has_failed:
        return
    if last is not None and (forgotten := _forgotten(config, last, checkpoint)):
        yield "; ".join(forgotten)
    if checkpoint is not None and (jump := rate_jump(checkpoint, config)) is not None:
        yield f"warning: {jump}"


def _forgotten(config: Config, last: dict[str, Any], checkpoint: Checkpoint | None) -> list[str]:
    """Returns the settings that have changed since the last run, but for changes since the checkpoint, which are
    announced when it is loaded."""
    changed = [] if checkpoint is None else changed_since_checkpoint(checkpoint, config)
    announced = [(path, old) for path, old, _ in changed]
    return [
        f"{path} was {then!r} when this run last ran, this command says {now!r}"
        for path, then, now in changed_settings(last, config.model_dump(mode="json"))
        if path not in IDENTICAL_SETTINGS and (path, then) not in announced
    ]


def rate_jump(checkpoint: Checkpoint, config: Config) -> str | None:
    """Returns a sentence if the learning rate of the next step is not the one that the checkpoint's settings give it.

    None if the checkpoint has no settings that this version knows, has trained no step, or has trained all steps.
    """
    step, training = checkpoint.step, config.training
    try:
        then = TrainingConfig.model_validate(checkpoint.config.get("training"))
    except ValueError:
        return None
    before = learning_rate(then.optimizer, then.schedule, step, then.steps)
    now = learning_rate(training.optimizer, training.schedule, step, training.steps)
    if not 0 < step < training.steps or math.isclose(before, now, rel_tol=1e-3):
        return None
    constant = "'training.schedule={kind: constant, warmup_steps: 0}'"
    advice = f"to continue with {before:.4g}, set {constant} training.optimizer.learning_rate={before:.4g}"
    if before == 0:  # after the decay of a whole run
        advice = "a run that may grow needs a schedule without an end, such as training.schedule.kind=constant"
    rates = f"{now:.4g}, the checkpoint's settings have {before:.4g} there"
    return f"the learning rate of step {step + 1} is {rates}: {advice}"


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
