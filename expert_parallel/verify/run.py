"""Verifies layouts on every rank, one after the other: takes training steps in each, and compares them with the
reference; then checks, in a few layouts, what a run does beside training steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from expert_parallel.moe.context import RouterReplay
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import Config
from expert_parallel.training.run import TrainingRun
from expert_parallel.verify import system_under_test
from expert_parallel.verify.compare import (
    TOLERANCES,
    TensorDifference,
    actual_tensors,
    compare,
    coverage,
    gather_divisions,
    gather_json,
)
from expert_parallel.verify.dropout import check_dropout
from expert_parallel.verify.layouts import Layout, check_layout, covering_layouts
from expert_parallel.verify.life_cycle import SavedRun, check_life_cycle, save_run, shared_folder
from expert_parallel.verify.random_numbers import check_random_numbers
from expert_parallel.verify.reference_cache import ReferenceCache, from_rank_0
from expert_parallel.verify.reference_optimizer import reference_rate
from expert_parallel.verify.result import LayoutResult, VerificationSpec
from expert_parallel.verify.system_under_test import Tensors
from expert_parallel.verify.traffic import AxisBytes, measure_step_bytes

ProgressFn = Callable[[str], None]


def verify(
    spec: VerificationSpec, runtime: Runtime, print_progress: ProgressFn = lambda text: None
) -> list[LayoutResult]:
    """Verifies every layout, and returns a result for each. A collective; all ranks get the same results. Raises
    UserError for a layout that does not fit the config or the ranks."""
    for layout in spec.layouts:
        runtime.run_on_all_ranks(lambda layout=layout: check_layout(spec.config, layout, runtime.world_size))  # type: ignore[misc]
    initial = from_rank_0(runtime, lambda: system_under_test.initial_weights(spec.config))
    reference = ReferenceCache(spec.config, runtime, initial, perturb(initial, spec.config.seed))
    chosen = [] if spec.num_steps == 1 else covering_layouts(spec.layouts, runtime.world_size)
    results: dict[Layout, LayoutResult] = {}
    saved: dict[Layout, SavedRun] = {}
    with shared_folder(spec.config, runtime, is_needed=bool(chosen)) as folder:
        for number, layout in enumerate(spec.layouts, start=1):
            print_progress(f"{number} of {len(spec.layouts)}: {layout.name}")
            here = folder / str(number) if layout in chosen else None
            results[layout] = verify_layout(spec, layout, runtime, reference, here, saved)
        for previous, layout in zip([*chosen[-1:], *chosen], chosen, strict=False):
            if previous in saved:
                print_progress(f"checkpoint, evaluation, generation: {layout.name}")
                began = time.perf_counter()
                check_life_cycle(spec, layout, runtime, reference, saved[previous], results[layout])
                results[layout].seconds += time.perf_counter() - began
    results[spec.layouts[0]].dropout += check_random_numbers(spec.config.seed)  # the same in every layout: said once
    return list(results.values())


@dataclass
class _Steps:
    """Holds what the steps of one layout left.

    ledger: the ledger's errors on this rank. replay: the recorded choices of experts. first: the expected tensors of
    the first step. saved: the run after the last step, or why it is not saved."""

    differences: list[TensorDifference] = field(default_factory=list)
    ledger: list[str] = field(default_factory=list)
    replay: RouterReplay = field(default_factory=RouterReplay)
    first: Tensors = field(default_factory=dict)
    degrees: dict[str, int] = field(default_factory=dict)
    saved: SavedRun | str | None = None


def verify_layout(
    spec: VerificationSpec,
    layout: Layout,
    runtime: Runtime,
    reference: ReferenceCache,
    folder: Path | None,
    saved: dict[Layout, SavedRun],
) -> LayoutResult:
    """Takes training steps in the layout, compares them with the reference, and checks dropout masks and, if asked for,
    bytes. A collective.

    folder: where to save the run after the last step, if that is right, for another layout to load; added to `saved`. A
    step in the dtype of training, and the dropout masks of two steps, are then compared, too."""
    began = time.perf_counter()
    config = layout.apply(spec.config)
    sequences_GS = system_under_test.random_sequences(config, spec.num_steps)
    steps = _take_steps(spec, layout, runtime, reference, sequences_GS, folder)
    checks: dict[str, str] = {}
    is_right = all(difference.passes(TOLERANCES["float64"][0]) for difference in steps.differences)
    if isinstance(steps.saved, SavedRun) and is_right:
        saved[layout] = steps.saved
    if spec.dtype != "float64":
        config = system_under_test.with_backend(config, spec.dtype, "auto", runtime)
        steps.differences = _step_in_dtype(config, runtime, reference, sequences_GS, steps)
    elif folder is not None and spec.training_dtype != "float64":
        trained = system_under_test.with_backend(config, spec.training_dtype, spec.experts_backend, runtime)
        by = system_under_test.backend(trained, runtime)
        checks["training dtype"] = f"a step in {spec.training_dtype} with experts by {by}"
        found = _step_in_dtype(trained, runtime, reference, sequences_GS, steps)
        steps.differences += [_in_training_dtype(difference, spec.training_dtype) for difference in found]
    return LayoutResult(
        layout=layout.name,
        differences=steps.differences,
        routed=_sum(steps.first, "choices routed"),
        dropped=_sum(steps.first, "choices dropped"),
        grad_norm=float(steps.first["gradient norm/gradient norm"]),
        ledger=sorted(set(chain.from_iterable(gather_json(steps.ledger)))),
        dropout=check_dropout(layout.apply(spec.config), spec.dropout, runtime, 1 if folder is None else 2),
        backend=system_under_test.backend(config, runtime),
        degrees=steps.degrees,
        seconds=time.perf_counter() - began,
        bytes=_count_bytes(config, runtime, sequences_GS) if spec.bytes else [],
        rates=[reference_rate(config.training, step) for step in range(spec.num_steps + 1)],
        betas=list(config.training.optimizer.betas),
        checks=checks,
        errors=[f"the run cannot be saved: {steps.saved}"] if isinstance(steps.saved, str) else [],
    )


def _take_steps(
    spec: VerificationSpec,
    layout: Layout,
    runtime: Runtime,
    reference: ReferenceCache,
    sequences_GS: Tensor,
    folder: Path | None,
) -> _Steps:
    """Takes the steps of a layout in float64 and compares each with the reference; then saves the run if `folder` is
    given."""
    found, floor = _Steps(), TOLERANCES["float64"][1]
    records = spec.dtype != "float64" or folder is not None  # for a step in a narrower dtype
    config = system_under_test.in_folder(layout.apply(spec.config), folder)
    batch = config.training.global_batch
    with system_under_test.set_up(config, runtime, sequences_GS) as run:
        before, found.differences = _begin(run, reference, floor)
        point = reference.first
        for step in range(spec.num_steps):
            mine = list(run.batches(step))
            divisions = gather_divisions(run, mine)
            sequences = sequences_GS[step * batch : (step + 1) * batch]
            expected, point = reference.step(point, config, sequences, divisions[0], step)
            replay = found.replay if records and step == 0 else None
            captured = system_under_test.capture_step(run, mine, step, replay)
            pairs = actual_tensors(run, captured, before, expected)
            pairs |= coverage(divisions, (batch // len(mine), sequences.shape[1] - 1))
            found.differences += compare(pairs, expected, floor, step)
            found.ledger += captured.ledger_errors
            found.first, before = found.first or expected, captured.weights
        names = ("ep", "etp", "edp", "tp", "cp", "dp", "pp")
        found.degrees = {name: getattr(run.mesh.degrees, name) for name in names} | {"micro_steps": len(mine)}
        if folder is not None:
            found.saved = save_run(run, layout, spec.num_steps, point)
    return found


def _begin(run: TrainingRun, reference: ReferenceCache, floor: float) -> tuple[Tensors, list[TensorDifference]]:
    """Compares the initial weights, and replaces them by those that the reference starts from. Returns these, as far as
    this rank has them, and the differences."""
    mine = system_under_test.read_weights(run.model)
    pairs = {f"initial weights/{name}": (value, reference.initial[name]) for name, value in mine.items()}
    expected = {f"initial weights/{name}": value for name, value in reference.initial.items()}
    system_under_test.write_weights(run.model, reference.start)
    return {name: reference.start[name] for name in mine}, compare(pairs, expected, floor)


def _step_in_dtype(
    config: Config, runtime: Runtime, reference: ReferenceCache, sequences_GS: Tensor, steps: _Steps
) -> list[TensorDifference]:
    """Takes the first step in the config's dtype, a narrower one, and compares it. Replays the float64 step's choices
    of experts, since near ties of scores break differently in the narrower dtype."""
    floor = TOLERANCES[config.training.dtype][1]
    with system_under_test.set_up(config, runtime, sequences_GS) as run:
        before, differences = _begin(run, reference, floor)
        mine = list(run.batches(0))
        captured = system_under_test.capture_step(run, mine, 0, steps.replay)
        pairs = actual_tensors(run, captured, before, steps.first)
        shape = (config.training.global_batch // len(mine), config.training.sequence_length)
        pairs |= coverage(gather_divisions(run, mine), shape)
    steps.ledger += captured.ledger_errors
    return differences + compare(pairs, steps.first, floor)


def _in_training_dtype(difference: TensorDifference, dtype: str) -> TensorDifference:
    """Returns the difference as one of the step in the dtype of training, which has a column of its own."""
    what, _, where = difference.name.partition("/")
    return replace(difference, name=f"training dtype/{what} of {where}", tolerance=TOLERANCES[dtype][0])


def _count_bytes(config: Config, runtime: Runtime, sequences_GS: Tensor) -> list[AxisBytes]:
    """Takes one more step on a new model, and counts what it sends."""
    with system_under_test.set_up(config, runtime, sequences_GS) as run:
        batches = list(run.batches(0))
        return measure_step_bytes(
            run.model, run.engine, batches, config.training, config.parallel, run.mesh, step=0, seed=config.seed
        )


def perturb(initial: Tensors, seed: int) -> Tensors:
    """Returns the weights with noise on 1-D parameters, whose initial 0 or 1 would hide errors in biases and norms."""
    generator = torch.Generator().manual_seed(seed)
    start = {}
    for name, value in initial.items():
        size = 0.01 if name.endswith("balance_bias_E") else 0.2
        noise = size * torch.randn(value.shape, generator=generator)
        start[name] = (value + noise if value.dim() == 1 else value).float().double()  # exact in float32 and wider
    return start


def _sum(expected: Tensors, what: str) -> int:
    """Sums the expected counts whose names end with `what`."""
    return int(sum(float(value.sum()) for name, value in expected.items() if name.endswith(what)))
