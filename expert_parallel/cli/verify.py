"""Implements the command `expert-parallel verify`: builds what to verify, runs it, and prints the table."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from datetime import timedelta
from typing import Any

from expert_parallel.moe.capacity.policies import DroplessConfig
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import Config
from expert_parallel.verify.compare import TOLERANCES, TensorDifference
from expert_parallel.verify.dropout import dropout_probabilities
from expert_parallel.verify.layouts import Layout, check_layout, choose_layouts, micro_step_counts
from expert_parallel.verify.ranks import spawn_ranks
from expert_parallel.verify.result import LayoutResult, VerificationSpec
from expert_parallel.verify.run import ProgressFn, verify
from expert_parallel.verify.shrink_config import ShrunkConfig, shrink_config
from expert_parallel.verify.table import make_console, print_results
from expert_parallel.verify.traffic import AxisBytes, format_axis_bytes

DEFAULT_RANKS = 4
SHRUNK_TIMEOUT = timedelta(seconds=120)


def build_verification_spec(
    config: Config,
    num_ranks: int,
    layouts: Sequence[str],
    dtype: str,
    full: bool,
    one_machine: bool = True,
    quick: bool = True,
) -> tuple[VerificationSpec, ShrunkConfig]:
    """Returns what to verify, and how the config was shrunk for it. one_machine, quick: see `shrink_config`.

    Raises ValueError if the config or a layout cannot be verified.
    """
    if dtype not in TOLERANCES:
        raise ValueError(f"--dtype is {dtype!r}, it must be one of {', '.join(TOLERANCES)}")
    named = list(dict.fromkeys(Layout.parse(text) for text in layouts))
    shrunk = shrink_config(config, num_ranks, full, one_machine, quick)
    for layout in named:
        check_layout(shrunk.config, layout, num_ranks)
    micro_steps = (config.training.micro_steps,) if full else micro_step_counts(num_ranks, quick)
    chosen = named or choose_layouts(shrunk.config, shrunk.own, num_ranks, micro_steps)
    if not chosen:
        raise ValueError(f"no layout of this config fits {num_ranks} ranks")
    if not named and chosen[0] != shrunk.own:
        misfit = f"the config's own layout, {shrunk.own.name}, does not fit {num_ranks} ranks"
        shrunk = replace(shrunk, changes=[*shrunk.changes, misfit])
    moe = config.model.moe
    spec = VerificationSpec(
        shrunk.config,
        chosen,
        dtype,
        dropout_probabilities(config),
        quick=quick,
        training_dtype=config.training.dtype,
        experts_backend="auto" if moe is None else moe.experts.backend,
    )
    return spec, shrunk


def verify_command(
    config: Config,
    runtime: Runtime,
    num_ranks: int | None,
    layouts: Sequence[str],
    dtype: str,
    full: bool,
    print_progress: ProgressFn,
    count_bytes: bool = False,
    quick: bool = False,
) -> bool:
    """Verifies the layouts, prints the table, and returns True if all compute the same.

    runtime: the ranks of a launcher, each of which calls this, or a single process, which starts `num_ranks` ranks on
    the CPU. count_bytes: also print the bytes that each axis sends. quick: one step in each layout, and nothing beside
    training. Raises UserError if something cannot be verified, RankError if a rank that it started fails.
    """
    alone = runtime.launch.launcher == "none"
    world = runtime.run_on_all_ranks(lambda: _world(runtime, num_ranks))
    spec, shrunk = runtime.run_on_all_ranks(
        lambda: build_verification_spec(config, world, layouts, dtype, full, alone, quick)
    )
    if count_bytes:
        runtime.run_on_all_ranks(lambda: _refuse_bytes(config))
    spec = replace(spec, bytes=count_bytes)
    if alone:
        timeout = timedelta(seconds=config.runtime.timeout_seconds) if full else SHRUNK_TIMEOUT
        trees = spawn_ranks(world, verify_task, _task(spec), print_progress, timeout)
        results = [_result(tree) for tree in trees]
    else:
        results = verify(spec, runtime, print_progress)
    if runtime.rank == 0:
        device = "cpu" if alone else f"{runtime.device.type} ({runtime.backend})"
        report(spec, shrunk, results, f"{world} ranks on {device}")
    return all(result.passes(TOLERANCES[dtype][0]) for result in results)


def _world(runtime: Runtime, num_ranks: int | None) -> int:
    if runtime.launch.launcher == "none":
        return num_ranks or DEFAULT_RANKS
    if num_ranks not in (None, runtime.world_size):
        raise ValueError(f"--ranks is {num_ranks} but the launcher has started {runtime.world_size}: leave it out")
    return runtime.world_size


def _refuse_bytes(config: Config) -> None:
    if config.data.documents == "separate":
        raise ValueError(
            "--bytes: data.documents is 'separate': what losses of scope 'sequence' send depends on the number of "
            "documents in a row; the formulas are for data.documents=joined"
        )
    if config.runtime.backend == "mpi":
        raise ValueError("--bytes: runtime.backend is 'mpi', but only collectives of torch.distributed can be counted")


def report(spec: VerificationSpec, shrunk: ShrunkConfig, results: list[LayoutResult], ranks: str) -> None:
    """Prints what was changed for the comparison, the table of results, and the verdict."""
    console = make_console()
    tolerance = TOLERANCES[spec.dtype][0]
    for title, changes in (("made smaller", shrunk.changes), ("set for the comparison", shrunk.settings)):
        if changes:
            console.print(f"{title}: {'; '.join(changes)}", soft_wrap=True, markup=False)
    backends = ", ".join(dict.fromkeys(result.backend for result in results))
    steps = f"{spec.num_steps} step{'s' * (spec.num_steps > 1)}"
    console.print(
        f"{ranks}, {steps} in {spec.dtype}, experts by {backends}; largest relative difference to one rank with plain "
        f"code in float64, at most {tolerance:g} passes",
        soft_wrap=True,
        markup=False,
    )
    print_results(results, tolerance, console)
    for result in results:
        if result.bytes:
            console.print(f"{result.layout}: {format_axis_bytes(result.bytes)}\n", soft_wrap=True, markup=False)
    for result in results:
        if result.checks:
            console.print(f"{result.layout}, beside {steps}: {'; '.join(result.checks.values())}", soft_wrap=True)
    moe = spec.config.model.moe
    has_capacity = moe is not None and not isinstance(moe.capacity, DroplessConfig)
    if has_capacity and not any(result.dropped for result in results):
        console.print("no choice was dropped: model.moe.capacity was not tested", soft_wrap=True)
    wrong = sum(not result.passes(tolerance) for result in results)
    seconds = sum(result.seconds for result in results)
    verdict = f"{wrong} of {len(results)} layouts differ" if wrong else f"all {len(results)} layouts compute the same"
    console.print(f"{verdict} ({seconds:.0f} s)", soft_wrap=True)


def verify_task(task: dict[str, Any], runtime: Runtime, print_progress: ProgressFn) -> list[dict[str, Any]]:
    """Verifies on a rank that `verify` has started itself."""
    config = Config.model_validate(task["config"])
    layouts = [Layout.parse(text) for text in task["layouts"]]
    spec = VerificationSpec(**{**task, "config": config, "layouts": layouts})
    return [asdict(result) for result in verify(spec, runtime, print_progress)]


def _task(spec: VerificationSpec) -> dict[str, Any]:
    named = {field.name: getattr(spec, field.name) for field in fields(spec)}
    config, layouts = spec.config.model_dump(mode="json"), [layout.name for layout in spec.layouts]
    return named | {"config": config, "layouts": layouts}


def _result(tree: dict[str, Any]) -> LayoutResult:
    differences = [TensorDifference(**difference) for difference in tree["differences"]]
    return LayoutResult(**{**tree, "differences": differences, "bytes": [AxisBytes(**axis) for axis in tree["bytes"]]})
