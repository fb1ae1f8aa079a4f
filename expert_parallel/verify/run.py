"""Verifies layouts on every rank, one after the other: takes a training step in each, and compares it with the
reference."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from expert_parallel.moe.context import RouterReplay
from expert_parallel.moe.routers.across_tokens import ExpertChoiceConfig, SinkhornConfig
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import Config
from expert_parallel.verify import system_under_test
from expert_parallel.verify.compare import (
    TOLERANCES,
    Pairs,
    TensorDifference,
    actual_tensors,
    broadcast_tensors,
    compare,
    coverage,
    expected_tensors,
    gather_json,
)
from expert_parallel.verify.dropout import check_dropout
from expert_parallel.verify.layouts import Layout, check_layout
from expert_parallel.verify.reference import TokenPartition, reference_step
from expert_parallel.verify.system_under_test import Tensors
from expert_parallel.verify.traffic import AxisBytes, measure_step_bytes

ProgressFn = Callable[[str], None]


@dataclass(frozen=True)
class VerificationSpec:
    """Describes what to verify.

    config: the shrunk config, in float64. dtype: compute dtype of the compared step. dropout: probabilities to check
    masks with, by path of the setting. bytes: True also measures the bytes that each parallel axis sends."""

    config: Config
    layouts: list[Layout]
    dtype: str = "float64"
    dropout: dict[str, float] = field(default_factory=dict)
    bytes: bool = False


@dataclass(frozen=True)
class LayoutResult:
    """Holds the outcome of one layout.

    differences: of each tensor, on the rank where it is largest. routed, dropped: number of (token, expert) choices in
    the step. grad_norm: the reference's. ledger, dropout: errors, as sentences. backend: of the experts' matrix
    products. degrees: parallel degrees and number of micro-steps, one of which may explain a wrong factor. bytes: those
    of each axis; empty if not measured."""

    layout: str
    differences: list[TensorDifference]
    routed: int
    dropped: int
    grad_norm: float
    ledger: list[str]
    dropout: list[str]
    backend: str
    degrees: dict[str, int]
    seconds: float
    bytes: list[AxisBytes] = field(default_factory=list)

    def wrong(self, tolerance: float) -> list[TensorDifference]:
        """Returns the differences above the tolerance, and those of tensors that no rank has."""
        return [d for d in self.differences if not d.is_present or not d.relative <= tolerance]

    def passes(self, tolerance: float) -> bool:
        """Returns True if no tensor differs, ledger and dropout have no errors, and all bytes match the formulas."""
        counts_match = all(axis.matches for axis in self.bytes)
        return not self.wrong(tolerance) and not self.ledger and not self.dropout and counts_match


@dataclass
class ReferenceCache:
    """Computes the reference step on rank 0 and broadcasts it; layouts with the same reference share one computation.

    config: the one that is verified. initial: weights as one rank initialises them. start: weights that the step starts
    from."""

    config: Config
    runtime: Runtime
    initial: Tensors
    start: Tensors
    cache: dict[tuple[int, str], Tensors] = field(default_factory=dict)

    def step(self, config: Config, sequences_GS: Tensor, division: TokenPartition) -> Tensors:
        """Returns the expected tensors of step 0, by name. A collective.

        sequences_GS: tokens of the step, int64. division: the tokens of each rank in a micro-step, on which settings
        with scope `rank` depend."""
        training = config.training
        if not _has_rank_scope(config):
            size = len(sequences_GS) // training.micro_steps
            division = [(torch.arange(size), torch.arange(sequences_GS.shape[1] - 1))]

        def compute() -> Tensors:
            separator = system_under_test.separator(config)
            step = reference_step(config.model, training, self.start, sequences_GS, division, config.seed, separator)
            return expected_tensors(step, self.initial, self.start)

        key = (training.micro_steps, repr([[numbers.tolist() for numbers in place] for place in division]))
        if key not in self.cache:
            self.cache[key] = _from_rank_0(self.runtime, compute)
        return self.cache[key]


def verify(
    spec: VerificationSpec, runtime: Runtime, print_progress: ProgressFn = lambda text: None
) -> list[LayoutResult]:
    """Verifies every layout, and returns a result for each. A collective; all ranks get the same results. Raises
    UserError for a layout that does not fit the config or the ranks."""
    for layout in spec.layouts:
        runtime.run_on_all_ranks(lambda layout=layout: check_layout(spec.config, layout, runtime.world_size))  # type: ignore[misc]
    initial = _from_rank_0(runtime, lambda: system_under_test.initial_weights(spec.config))
    reference = ReferenceCache(spec.config, runtime, initial, perturb(initial, spec.config.seed))
    results: list[LayoutResult] = []
    for number, layout in enumerate(spec.layouts, start=1):
        print_progress(f"{number} of {len(spec.layouts)}: {layout.name}")
        results.append(verify_layout(spec, layout, runtime, reference))
    return results


def verify_layout(spec: VerificationSpec, layout: Layout, runtime: Runtime, reference: ReferenceCache) -> LayoutResult:
    """Takes one training step in the layout, compares it with the reference, and checks dropout masks and, if asked
    for, bytes. A collective."""
    began = time.perf_counter()
    config = layout.apply(spec.config)
    sequences_GS = system_under_test.random_sequences(config)
    replay = None if spec.dtype == "float64" else RouterReplay()
    with system_under_test.set_up(config, runtime, sequences_GS) as run:
        mine, degrees = list(run.batches(0)), run.mesh.degrees
        divisions = _gather_divisions(run, mine)
        expected = reference.step(config, sequences_GS, divisions[0])
        pairs, ledger_errors = _compare_step(run, mine, replay, reference, expected)
    if spec.dtype != "float64":
        # Replays the float64 step's choices, since near ties of scores break differently in a narrower dtype.
        config = config.model_copy(update={"training": config.training.model_copy(update={"dtype": spec.dtype})})
        with system_under_test.set_up(config, runtime, sequences_GS) as run:
            pairs, ledger_errors = _compare_step(run, mine, replay, reference, expected)
    counted = _count_bytes(config, runtime, sequences_GS) if spec.bytes else []
    pairs |= coverage(divisions, (len(sequences_GS) // len(mine), sequences_GS.shape[1] - 1))
    return LayoutResult(
        layout=layout.name,
        differences=compare(pairs, expected, TOLERANCES[spec.dtype][1]),
        routed=_sum(expected, "choices routed"),
        dropped=_sum(expected, "choices dropped"),
        grad_norm=float(expected["gradient norm/gradient norm"]),
        ledger=sorted(set(chain.from_iterable(gather_json(ledger_errors)))),
        dropout=check_dropout(layout.apply(spec.config), spec.dropout, runtime),
        backend=system_under_test.backend(config, runtime),
        degrees={name: getattr(degrees, name) for name in ("ep", "etp", "edp", "tp", "cp", "dp", "pp")}
        | {"micro_steps": len(mine)},
        seconds=time.perf_counter() - began,
        bytes=counted,
    )


def _compare_step(
    run: system_under_test.TrainingRun,
    mine: list[system_under_test.MicroBatch],
    replay: RouterReplay | None,
    reference: ReferenceCache,
    expected: Tensors,
) -> tuple[Pairs, list[str]]:
    """Takes a step from the reference's start. Returns this rank's tensors with the expected ones, and the ledger's
    errors."""
    before = system_under_test.read_weights(run.model)
    system_under_test.write_weights(run.model, reference.start)
    captured = system_under_test.capture_step(run, mine, replay)
    return actual_tensors(run, captured, before, reference.start, expected), captured.ledger_errors


def _count_bytes(config: Config, runtime: Runtime, sequences_GS: Tensor) -> list[AxisBytes]:
    """Takes one more step on a new model, and counts what it sends."""
    with system_under_test.set_up(config, runtime, sequences_GS) as run:
        batches = list(run.batches(0))
        return measure_step_bytes(
            run.model, run.engine, batches, config.training, config.parallel, run.mesh, step=0, seed=config.seed
        )


def _from_rank_0(runtime: Runtime, compute: Callable[[], Tensors]) -> Tensors:
    return broadcast_tensors(compute() if runtime.rank == 0 else None)


def perturb(initial: Tensors, seed: int) -> Tensors:
    """Returns the weights with noise on 1-D parameters, whose initial 0 or 1 would hide errors in biases and norms."""
    generator = torch.Generator().manual_seed(seed)
    start = {}
    for name, value in initial.items():
        size = 0.01 if name.endswith("balance_bias_E") else 0.2
        noise = size * torch.randn(value.shape, generator=generator)
        start[name] = (value + noise if value.dim() == 1 else value).float().double()  # exact in float32 and wider
    return start


def _gather_divisions(
    run: system_under_test.TrainingRun, mine: list[system_under_test.MicroBatch]
) -> list[TokenPartition]:
    """Returns, for each micro-step, the sequences and positions of every rank of the first pipeline stage. A
    collective."""
    token_indices = [[numbers.tolist() for numbers in place] for place in system_under_test.token_indices(run, mine)]
    everyone = gather_json({"stage": run.mesh.pp_rank, "places": token_indices})
    first = [rank["places"] for rank in everyone if rank["stage"] == 0]
    return [
        [(torch.tensor(rank[m][0], dtype=torch.int64), torch.tensor(rank[m][1])) for rank in first]
        for m in range(len(mine))
    ]


def _has_rank_scope(config: Config) -> bool:
    """Returns True if a setting has scope `rank`, so that the reference depends on which rank holds which token."""
    moe = config.model.moe
    if moe is None:
        return False
    scopes = [block.scope for block in (moe.capacity, *moe.losses)]
    if isinstance(moe.router, ExpertChoiceConfig | SinkhornConfig):
        scopes.append(moe.router.scope)
    return "rank" in scopes


def _sum(expected: Tensors, what: str) -> int:
    """Sums the expected counts whose names end with `what`."""
    return int(sum(float(value.sum()) for name, value in expected.items() if name.endswith(what)))
