"""Implements the command `expert-parallel verify`: builds what to verify, runs it, and prints the table."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

from expert_parallel.moe.capacity.limit import DroplessConfig
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import Config
from expert_parallel.verify.compare import TOLERANCES, Difference
from expert_parallel.verify.dropout import dropout_of
from expert_parallel.verify.layouts import Layout, accumulations, check_layout, choose_layouts
from expert_parallel.verify.ranks import run_on_ranks
from expert_parallel.verify.run import LayoutResult, Plan, Say, verify
from expert_parallel.verify.shrink_config import Reduced, reduce_config
from expert_parallel.verify.table import make_console, show
from expert_parallel.verify.traffic import AxisBytes, describe

DEFAULT_RANKS = 4
REDUCED_TIMEOUT = timedelta(seconds=120)


def plan_verification(
    config: Config, num_ranks: int, layouts: Sequence[str], dtype: str, full: bool, one_machine: bool = True
) -> tuple[Plan, Reduced]:
    """Returns what to verify, and how the config was shrunk for it.

    Raises ValueError if the config or a layout cannot be verified.
    """
    if dtype not in TOLERANCES:
        raise ValueError(f"--dtype is {dtype!r}, it must be one of {', '.join(TOLERANCES)}")
    named = [Layout.parse(text) for text in layouts]
    reduced = reduce_config(config, num_ranks, full, one_machine)
    for layout in named:
        check_layout(reduced.config, layout, num_ranks)
    micro_steps = (config.training.micro_steps,) if full else accumulations(num_ranks)
    chosen = named or choose_layouts(reduced.config, reduced.own, num_ranks, micro_steps)
    if not chosen:
        raise ValueError(f"no layout of this config fits {num_ranks} ranks")
    if not named and chosen[0] != reduced.own:
        misfit = f"the config's own layout, {reduced.own.name}, does not fit {num_ranks} ranks"
        reduced = replace(reduced, changes=[*reduced.changes, misfit])
    return Plan(reduced.config, chosen, dtype, dropout_of(config)), reduced


def verify_command(
    config: Config,
    runtime: Runtime,
    num_ranks: int | None,
    layouts: Sequence[str],
    dtype: str,
    full: bool,
    say: Say,
    count_bytes: bool = False,
) -> bool:
    """Verifies the layouts, prints the table, and returns True if all compute the same.

    runtime: the ranks of a launcher, each of which calls this, or a single process, which starts `num_ranks` ranks on
    the CPU. count_bytes: also print the bytes that each axis sends. Raises UserError if something cannot be verified,
    RankError if a rank that it started fails.
    """
    alone = runtime.launch.launcher == "none"
    world = runtime.together(lambda: _world(runtime, num_ranks))
    plan, reduced = runtime.together(lambda: plan_verification(config, world, layouts, dtype, full, alone))
    if count_bytes:
        runtime.together(lambda: _refuse_bytes(config))
    plan = replace(plan, bytes=count_bytes)
    if alone:
        timeout = timedelta(seconds=config.runtime.timeout_seconds) if full else REDUCED_TIMEOUT
        trees = run_on_ranks(world, verify_task, _task(plan), say, timeout)
        results = [_result(tree) for tree in trees]
    else:
        results = verify(plan, runtime, say)
    if runtime.rank == 0:
        device = "cpu" if alone else f"{runtime.device.type} ({runtime.backend})"
        report(plan, reduced, results, f"{world} ranks on {device}")
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


def report(plan: Plan, reduced: Reduced, results: list[LayoutResult], ranks: str) -> None:
    """Prints what was changed for the comparison, the table of results, and the verdict."""
    console = make_console()
    tolerance = TOLERANCES[plan.dtype][0]
    for title, changes in (("made smaller", reduced.changes), ("set for the comparison", reduced.settings)):
        if changes:
            console.print(f"{title}: {'; '.join(changes)}", soft_wrap=True, markup=False)
    backends = ", ".join(dict.fromkeys(result.backend for result in results))
    console.print(
        f"{ranks}, {plan.dtype}, experts by {backends}; largest relative difference to one rank with plain code in "
        f"float64, at most {tolerance:g} passes",
        soft_wrap=True,
        markup=False,
    )
    show(results, tolerance, console)
    for result in results:
        if result.bytes:
            console.print(f"{result.layout}: {describe(result.bytes)}\n", soft_wrap=True, markup=False)
    moe = plan.config.model.moe
    has_capacity = moe is not None and not isinstance(moe.capacity, DroplessConfig)
    if has_capacity and not any(result.dropped for result in results):
        console.print("no choice was dropped: model.moe.capacity was not tested", soft_wrap=True)
    wrong = sum(not result.passes(tolerance) for result in results)
    seconds = sum(result.seconds for result in results)
    verdict = f"{wrong} of {len(results)} layouts differ" if wrong else f"all {len(results)} layouts compute the same"
    console.print(f"{verdict} ({seconds:.0f} s)", soft_wrap=True)


def verify_task(task: dict[str, Any], runtime: Runtime, say: Say) -> list[dict[str, Any]]:
    """Verifies on a rank that `verify` has started itself."""
    layouts = [Layout.parse(text) for text in task["layouts"]]
    plan = Plan(Config.model_validate(task["config"]), layouts, task["dtype"], task["dropout"], task["bytes"])
    return [asdict(result) for result in verify(plan, runtime, say)]


def _task(plan: Plan) -> dict[str, Any]:
    names = [layout.name for layout in plan.layouts]
    return {
        "config": plan.config.model_dump(mode="json"),
        "layouts": names,
        "dtype": plan.dtype,
        "dropout": plan.dropout,
        "bytes": plan.bytes,
    }


def _result(tree: dict[str, Any]) -> LayoutResult:
    differences = [Difference(**difference) for difference in tree["differences"]]
    return LayoutResult(**{**tree, "differences": differences, "bytes": [AxisBytes(**axis) for axis in tree["bytes"]]})
