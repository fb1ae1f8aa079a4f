"""Explains why a run failed and what to try, and keeps a run that would fail in the same way from being started again.

A step whose loss or gradient norm is not finite ends the run. Training is deterministic, so the same settings would end
it at the same step again: rank 0 leaves `failure.json` in the run folder, and a start with the same settings is refused
with the words in it, before any data or model is loaded.
"""

import logging
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pydantic import BaseModel, ValidationError

from expert_parallel.checkpoint.files import list_checkpoints, open_checkpoint
from expert_parallel.checkpoint.folders import write_atomically
from expert_parallel.checkpoint.manifest import WEIGHTS
from expert_parallel.data.batch import MicroBatch
from expert_parallel.model.attention import HeadsConfig
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.moe.context import RouterReplay
from expert_parallel.parallel.collectives import all_gather_text
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.output import print_line
from expert_parallel.runtime.process import CPU, PermanentError, Runtime
from expert_parallel.settings import changed_settings
from expert_parallel.training.config import Config
from expert_parallel.training.engines.engine import Engine
from expert_parallel.training.health_advice import ABSURD_RATE, SAFE_RATE, add_losses
from expert_parallel.training.nonfinite import BadTensor, find_first_bad_tensor, largest_weight
from expert_parallel.training.step import StepReport

logger = logging.getLogger(__name__)

FILE = "failure.json"
IGNORED_SETTINGS = ("run.folder", "data.sha256")  # a copied run fails as well; the digest is filled in by the run
MAX_SETTINGS = 4
LARGE = 1e4  # weights above it are the work of a learning rate that is too high

# Likely causes of an output that is not finite, by a part of its module's name; the first that matches is meant.
CAUSES = {
    "router": "the router's logits have grown until they overflow",
    "attention_output_norm": "the output of attention has grown until its squares overflow",
    "ffn_output_norm": "the output of the feed-forward network or the experts has grown until its squares overflow",
    "attention_norm": "the block's input has grown until its squares overflow",
    "ffn_norm": "the output of attention has grown until its squares overflow",
    "final_norm": "the output of the last block has grown until its squares overflow",
    "attention": "queries and keys have grown until their products overflow",
    "experts": "the hidden activations of an expert have grown until they overflow; gated ones grow by their product",
    "ffn": "the hidden activations have grown until they overflow; gated ones grow by their product",
    "embedding": "rows of the embedding table have grown until they overflow",
    "loss": "the logits have grown until they, or the loss of them, overflow",
}


class Failure(BaseModel):
    """Holds the content of failure.json. step: the number of steps begun. message: what was printed. settings: of the
    run, as given before data was opened."""

    step: int
    message: str
    settings: dict[str, Any]


class Evidence(NamedTuple):
    """Holds what is known of a step that is not finite.

    searched: False if the step could not be run again. bad: the first bad tensor, if one was found. largest: the
    largest absolute value of the weights; largest_name: of the parameter that holds it. ruined_since: the step of the
    oldest of the last checkpoints in which that parameter is above LARGE, too; None if the last one is not.
    """

    searched: bool
    bad: BadTensor | None
    largest: float
    largest_name: str
    ruined_since: int | None = None


def stop_not_finite(
    config: Config,
    runtime: Runtime,
    report: StepReport,
    model: LanguageModel,
    engine: Engine,
    batches: list[MicroBatch],
    mesh: ParallelMesh,
    step: int,
    replay: RouterReplay | None,
) -> NoReturn:
    """Ends the run after a step that is not finite: finds the first bad tensor, leaves failure.json in the run folder,
    and raises PermanentError. Every rank calls it.

    config: with which the run was started. step: counted from 0. batches, replay: of the step.
    """
    bad: BadTensor | None = None
    if engine.skips_bad_updates:
        if runtime.rank == 0:
            logger.warning("step %d is not finite; it is run again to find the first bad tensor", step + 1)
        bad = find_first_bad_tensor(
            model, engine, batches, config.training, mesh, step=step, seed=config.seed, replay=replay
        )
    path = Path(config.run.folder) / FILE
    largest, name = largest_weight(model)
    ruined = runtime.run_on_all_ranks(
        lambda: ruined_since(path.parent, name) if runtime.rank == 0 and largest > LARGE else None
    )
    evidence = Evidence(engine.skips_bad_updates, bad, largest, name, ruined)
    message = not_finite_message(config, step + 1, report, evidence)
    failure = Failure(step=step + 1, message=message, settings=config.model_dump(mode="json"))
    runtime.run_on_all_ranks(
        lambda: write_atomically(path, failure.model_dump_json(indent=1)) if runtime.rank == 0 else None
    )
    raise PermanentError(message)


def ruined_since(folder: Path, name: str) -> int | None:
    """Returns the step of the first checkpoint from which on all of a run's have a value above LARGE in a parameter;
    None if the last one has not, or cannot be read."""
    first = None
    with suppress(ValueError):  # of a checkpoint that is damaged, or of a model without the parameter
        for path in reversed(list_checkpoints(folder / "checkpoints")):
            checkpoint = open_checkpoint(path)
            tensor = f"{WEIGHTS}/{name}"
            if tensor not in checkpoint.tensors or checkpoint.read(tensor).abs().max().item() <= LARGE:
                break
            first = checkpoint.step
    return first


def refuse_to_repeat(config: Config, runtime: Runtime) -> None:
    """Raises PermanentError on all ranks if the run folder holds the failure of a run with the same settings. Every
    rank calls it."""
    folder, refusal = Path(config.run.folder), ""
    failure = runtime.run_on_all_ranks(lambda: read_failure(folder / FILE) if runtime.rank == 0 else None)
    if failure is not None and not changes_since(failure, config):
        refusal = f"run.folder: not started, since {folder} has failed before with the same settings\n"
        refusal += textwrap.indent(failure.message, "  ")
    if refusal := all_gather_text(refusal, CPU, limit=8000)[0]:
        raise PermanentError(refusal)


def forget_failure(config: Config, runtime: Runtime) -> list[tuple[str, Any, Any]]:
    """Removes the failure of a run with other settings from the run folder, and prints that it goes on. Every rank
    calls it. Returns the settings that have changed on rank 0, and nothing on others."""
    path = Path(config.run.folder) / FILE

    def forget() -> list[tuple[str, Any, Any]]:
        if runtime.rank != 0 or (failure := read_failure(path)) is None:
            return []
        path.unlink()
        changed = changes_since(failure, config)
        changes = ", ".join(f"{name} {old!r} -> {new!r}" for name, old, new in changed)
        print_line(f"run.folder: going on after the failure at step {failure.step}; changed: {changes}")
        return changed

    return runtime.run_on_all_ranks(forget)


def changes_since(failure: Failure, config: Config) -> list[tuple[str, Any, Any]]:
    """Returns the settings that have changed since a failure: (path, old value, new value)."""
    changed = changed_settings(failure.settings, config.model_dump(mode="json"))
    return [change for change in changed if change[0] not in IGNORED_SETTINGS]


def read_failure(path: Path) -> Failure | None:
    """Reads failure.json; None if there is none. Raises ValueError if it is damaged."""
    try:
        return Failure.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError):
        raise ValueError(f"run.folder: {path} cannot be read; remove it to start the run") from None


def not_finite_message(config: Config, step: int, report: StepReport, evidence: Evidence) -> str:
    """Returns what is printed of a step that is not finite: a sentence, then lines that begin with two spaces."""
    folder = Path(config.run.folder)
    saved = list_checkpoints(folder / "checkpoints")
    lines = [f"step {step}: the loss is {report.loss} and the gradient norm {report.grad_norm}; the run stops"]
    lines += _row("first bad tensor", _describe(evidence))
    if evidence.largest_name:  # with ZeRO 3 no rank has weights to look at
        lines += _row("largest weight", f"{evidence.largest:.3g}, in {evidence.largest_name}")
    lines += _row("likely causes", *_causes(evidence))
    settings = [f"{setting} ({remark})" for setting, remark in advice(config, step, evidence.bad)]
    last, to_go_on = str(saved[-1]) if saved else "none has been saved yet", "change a setting"
    if evidence.ruined_since is not None:
        last += ": its weights are as large, so no setting repairs them"
        to_go_on += (
            f", and begin anew in another run.folder, or remove the checkpoints from step {evidence.ruined_since} on"
        )
    else:
        to_go_on += f", or remove {folder / FILE}"
    lines += _row("last checkpoint", last)
    lines += _row("to try", *settings[:MAX_SETTINGS])
    lines += _row("to go on", f"{to_go_on}: the same settings are refused until then")
    return "\n".join(lines)


def _describe(evidence: Evidence) -> str:
    """Returns what the search has found."""
    bad = evidence.bad
    if not evidence.searched:
        return "not searched for: training.engine.zero_stage is 3, so no rank has whole weights to look at"
    if bad is None:
        return "none: all weights, outputs, and gradients that ranks keep were finite when the step was run again"
    where = f"{bad} of micro-step {bad.micro_step}" if bad.phase == "forward" else str(bad)
    text = f"{where}, on rank {bad.rank}"
    if bad.num_nan + bad.num_inf == 0:
        return f"{text}: its {bad.size:,} values are finite, their norm is not"
    kinds = [f"{number:,} {kind}" for number, kind in ((bad.num_nan, "NaN"), (bad.num_inf, "infinite")) if number]
    given = [("input", bad.largest_input), ("weight", bad.largest_weight)]
    known = [f"its largest {name} is {value:.3g}" for name, value in given if value is not None]
    return "; ".join([f"{text}: {' and '.join(kinds)} of {bad.size:,} values", *known])


def _causes(evidence: Evidence) -> Iterator[str]:
    """Yields sentences about what is likely to have caused it."""
    bad = evidence.bad
    if evidence.largest > LARGE:
        verb = "is" if evidence.ruined_since is None else "is, or was,"  # with which the checkpoint was trained
        yield f"training.optimizer.learning_rate {verb} too high: the weights have grown"
    if not evidence.searched:
        yield "a learning rate that is too high for this batch and warm-up, or a device or a link that makes errors"
    elif bad is None:
        yield "a gradient, or the sum of gradients over ranks, has overflowed, or a device or a link has made an error"
    elif bad.phase == "weights":
        yield "the update before this step has overflowed, or the weights that the run was started from are damaged"
    elif bad.phase == "backward":
        yield "all outputs are finite: a derivative has overflowed, of a loss or of a norm of very small values"
    else:
        yield next((cause for part, cause in CAUSES.items() if part in bad.name), "activations have grown too large")


def advice(config: Config, step: int, bad: BadTensor | None) -> Iterator[tuple[str, str]]:
    """Yields (setting as on the command line, remark), the most promising first; none of them is in force already."""
    training, model, name = config.training, config.model, bad.name if bad is not None else ""
    rate, schedule, clip_norm = training.optimizer.learning_rate, training.schedule, training.clip_norm
    lower = SAFE_RATE if rate >= ABSURD_RATE else rate / 3
    yield f"training.optimizer.learning_rate={lower:.2g}", f"it is {rate:g}"
    if clip_norm is None:
        yield "training.clip_norm=1.0", "gradients are not clipped"
    if ".router" in name and model.moe is not None and not any(loss.kind == "z_loss" for loss in model.moe.losses):
        yield add_losses(model.moe, {"kind": "z_loss"}), "adds the router z-loss"
    if step <= 2 * schedule.warmup_steps or schedule.warmup_steps == 0:
        yield f"training.schedule.warmup_steps={max(100, 4 * schedule.warmup_steps)}", f"it is {schedule.warmup_steps}"
    attention = model.attention
    if ".attention" in name and isinstance(attention, HeadsConfig) and attention.qk_norm is None:
        yield "'model.attention.qk_norm={kind: per_head}'", "changes the model, so for a new run"
    if training.dtype == "bfloat16":
        yield "training.dtype=float32", "it is bfloat16"
    if model.moe is not None and model.moe.dispatcher.exchange_dtype == "bfloat16":
        yield "model.moe.dispatcher.exchange_dtype=model", "it is bfloat16"
    if clip_norm is not None:
        yield f"training.clip_norm={clip_norm / 3:.2g}", f"it is {clip_norm:g}"


def _row(label: str, *sentences: str) -> list[str]:
    """Returns the lines of a labelled row, each sentence on lines of its own."""
    lines: list[str] = []
    for sentence in sentences:
        first = f"  {label if not lines else '':<18}"
        lines += textwrap.wrap(
            sentence,
            118,
            initial_indent=first,
            subsequent_indent=" " * 22,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines
