"""Checks, in a layout, what a run does beside training steps: it loads the checkpoint that another layout saved,
evaluates, goes on training, and generates tokens. All through the functions that training uses."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from expert_parallel.checkpoint.folders import step_folder
from expert_parallel.checkpoint.manifest import WEIGHTS
from expert_parallel.model.generation import generate
from expert_parallel.moe.routers.across_tokens import ExpertChoiceConfig
from expert_parallel.parallel.collectives import all_gather_text
from expert_parallel.runtime.process import CPU, Runtime, UserError
from expert_parallel.training.config import Config
from expert_parallel.training.run import TrainingRun
from expert_parallel.training.step import reshard_parameters
from expert_parallel.verify import system_under_test
from expert_parallel.verify.compare import (
    TOLERANCES,
    Pairs,
    TensorDifference,
    actual_tensors,
    compare,
    gather_divisions,
    gather_json,
    layer_tensors,
    loss_tensors,
    union_of_ranks,
)
from expert_parallel.verify.dropout import with_probabilities
from expert_parallel.verify.layouts import Layout
from expert_parallel.verify.reference_cache import ReferenceCache, ReferencePoint
from expert_parallel.verify.result import LayoutResult, VerificationSpec
from expert_parallel.verify.system_under_test import Tensors

FLOOR = TOLERANCES["float64"][1]
NUM_TOKENS = 4  # to generate
EXACT = 0.0


@dataclass(frozen=True)
class SavedRun:
    """Holds what a layout saved. layout: its name. path: of the checkpoint. tensors: of all ranks, `weights/...`,
    `exp_avg/...` and `exp_avg_sq/...` by logical name. point: the reference's state after the same steps."""

    layout: str
    path: Path
    tensors: Tensors
    point: ReferencePoint


@contextmanager
def shared_folder(config: Config, runtime: Runtime, *, is_needed: bool) -> Iterator[Path]:
    """Creates a temporary folder that all ranks can read, and removes it afterwards: on one machine anywhere, on
    several beside `run.folder`. A collective; if it is not needed, nothing is created."""

    def create() -> str:
        if runtime.rank > 0 or not is_needed:
            return ""
        if runtime.launch.local_world_size == runtime.world_size:
            return tempfile.mkdtemp(prefix="verify-")
        beside = Path(config.run.folder).absolute().parent
        beside.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="verify-", dir=beside)

    folder = all_gather_text(runtime.run_on_all_ranks(create), CPU)[0]
    try:
        yield Path(folder)
    finally:
        if runtime.rank == 0 and folder:
            shutil.rmtree(folder, ignore_errors=True)


def save_run(run: TrainingRun, layout: Layout, num_steps: int, point: ReferencePoint) -> SavedRun | str:
    """Saves a run in a layout after `num_steps` steps. Returns what was saved, or why nothing was. A collective."""
    tensors = union_of_ranks(_training_state(run))
    try:
        with run.open_saver() as saver:
            saver.save(num_steps, is_last=True)
    except UserError as error:
        return str(error)
    return SavedRun(layout.name, step_folder(run.folder / "checkpoints", num_steps), tensors, point)


def check_life_cycle(
    spec: VerificationSpec,
    layout: Layout,
    runtime: Runtime,
    reference: ReferenceCache,
    saved: SavedRun,
    result: LayoutResult,
) -> None:
    """Resumes the saved run in the layout, and adds to its result what differs: what was loaded, an evaluation, the
    next step, and, with dropout set, which neither may apply, another evaluation and generated tokens. A collective."""
    config, done = layout.apply(spec.config), spec.num_steps
    held_out = system_under_test.held_out_sequences(config)
    sequences_GS = system_under_test.random_sequences(config, done + 1)
    with system_under_test.set_up(config, runtime, sequences_GS, held_out, [saved.path]) as run:
        try:
            steps_done = run.resume()
        except UserError as error:
            result.errors.append(f"the checkpoint of another layout cannot be loaded: {error}")
            return
        assert steps_done == done, (steps_done, done)
        result.differences += _compare_loaded(run, saved, result)
        result.differences += _compare_evaluation(run, reference, saved.point, "evaluation")
        result.differences += _compare_next_step(run, done, reference, saved.point, result)
    config = with_probabilities(config, spec.dropout)
    with system_under_test.set_up(config, runtime, sequences_GS, held_out, [saved.path]) as run:
        run.resume()
        result.differences += _compare_evaluation(run, reference, saved.point, "evaluation with dropout set")
        result.checks |= {
            "loaded": f"the checkpoint of {saved.layout} loaded and continued",
            "evaluation": "an evaluation",
        }
        moe = config.model.moe
        if moe is None or not isinstance(moe.router, ExpertChoiceConfig):  # whose choices depend on other sequences
            result.differences += _compare_generation(run, reference, saved.point)
            result.checks["generated"] = f"{NUM_TOKENS} tokens generated with and without cache"


def _training_state(run: TrainingRun) -> Tensors:
    """Returns weights, balance biases and moments as far as this rank has them, named as in a checkpoint."""
    parts = {WEIGHTS: system_under_test.read_weights(run.model), **system_under_test.read_moments(run)}
    return {f"{part}/{name}": value for part, held in parts.items() for name, value in held.items()}


def _compare_loaded(run: TrainingRun, saved: SavedRun, result: LayoutResult) -> list[TensorDifference]:
    """Compares what this layout has loaded with what the other one had: every bit. A tensor that holds another one's
    values is an error of the result."""
    mine = _training_state(run)
    exchanged = [
        f"loaded: {name} holds what {other} had: tensors are exchanged in saving or loading"
        for name, value in mine.items()
        if not torch.equal(value, saved.tensors[name])
        for other, wanted in saved.tensors.items()
        if wanted.shape == value.shape and torch.equal(value, wanted)
    ]
    result.errors += sorted({sentence for rank in gather_json(exchanged[:2]) for sentence in rank})
    expected = {f"loaded/{name}": value for name, value in saved.tensors.items()}
    pairs = {f"loaded/{name}": (value, saved.tensors[name]) for name, value in mine.items()}
    return compare(pairs, expected, FLOOR, tolerance=EXACT)


def _compare_evaluation(
    run: TrainingRun, reference: ReferenceCache, point: ReferencePoint, what: str
) -> list[TensorDifference]:
    """Evaluates, and compares loss, balance losses and counts."""
    mine = run.held_out_batches()
    batches = run.held_out.tokens.split(run.config.training.global_batch // run.config.training.micro_steps)
    wanted = reference.evaluation(point, run.config, batches, gather_divisions(run, mine))
    with system_under_test.collecting_ledger_errors([]):
        report = run.held_out_report()
    found = loss_tensors(report.loss, report.mtp_losses) | layer_tensors(report.layers)
    names = {name: f"evaluation/{what}: {name.replace('/loss', '').replace('/', ' of ')}" for name in wanted}
    pairs: Pairs = {names[name]: (found[name], value) for name, value in wanted.items()}
    return compare(pairs, {names[name]: value for name, value in wanted.items()}, FLOOR)


def _compare_next_step(
    run: TrainingRun, step: int, reference: ReferenceCache, point: ReferencePoint, result: LayoutResult
) -> list[TensorDifference]:
    """Takes the step after those of the checkpoint, and compares it as every other."""
    batch = run.config.training.global_batch
    mine = list(run.batches(step))
    sequences = run.sampler.sequences(step * batch, batch).tokens
    expected, _ = reference.step(point, run.config, sequences, gather_divisions(run, mine)[0], step)
    before = system_under_test.read_weights(run.model)
    captured = system_under_test.capture_step(run, mine, step)
    return compare(actual_tensors(run, captured, before, expected), expected, FLOOR, step)


def _compare_generation(run: TrainingRun, reference: ReferenceCache, point: ReferencePoint) -> list[TensorDifference]:
    """Continues prompts of different lengths by the most probable tokens, with and without the cache of keys and
    values, and compares the tokens."""
    window = run.config.training.sequence_length
    prompts = [row[: 1 + number % (window - NUM_TOKENS)] for number, row in enumerate(run.held_out.tokens.tolist())]
    expected = reference.generation(point, run.config, prompts, NUM_TOKENS)
    pairs: Pairs = {}
    for use_cache in (True, False):
        texts = generate(run.model, prompts, num_tokens=NUM_TOKENS, window=window, mesh=run.mesh, use_cache=use_cache)
        reshard_parameters(run.model)
        tokens = torch.tensor([token for text in texts for token in text], dtype=torch.float64)
        pairs[f"generated/tokens {'with' if use_cache else 'without'} cache"] = (tokens, expected)
    return compare(pairs, dict.fromkeys(pairs, expected), FLOOR, tolerance=EXACT)
