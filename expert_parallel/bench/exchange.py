"""Compares gloo and MPI for the all-to-all alone and for whole MoE layers.

Every round times each transport once, and medians are compared, since the speed of a shared machine drifts. Run under
mpirun (torchrun measures gloo alone):

    mpiexec -n 4 python -m expert_parallel bench exchange
"""

import statistics
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import torch
import torch.distributed as dist

from expert_parallel.bench.ledger import LedgerShape
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.layer import MoELayer
from expert_parallel.parallel.collectives import all_to_all_rows
from expert_parallel.runtime.mpi.backend import BACKEND, mpi_version_line, start_mpi
from expert_parallel.runtime.process import Runtime

# Bytes to each rank -> (rows to each rank, width in float32): from counts of tokens to large batches.
SIZES = {"1 KiB": (4, 64), "16 KiB": (16, 256), "256 KiB": (256, 256), "1 MiB": (1024, 256), "4 MiB": (4096, 256)}
# base, fine: as in `bench ledger`. light: wide rows and small experts, so that the exchange dominates.
SHAPES = {
    "base": LedgerShape(4096, 256, 1024, 8, 2),
    "fine": LedgerShape(1024, 256, 128, 64, 8),
    "light": LedgerShape(4096, 1024, 16, 8, 2),
}
MPI_LAUNCHERS = ("openmpi", "mpich")


def bench_exchange(runtime: Runtime, rounds: int) -> dict[str, Any]:
    """Times all-to-alls of several sizes and MoE layers of several shapes over gloo and, under mpirun, MPI. A
    collective of two or more ranks.

    Returns the conditions and, under `exchanges` (by size) and `layers` (by shape), the median, smallest and largest
    milliseconds of each transport on this rank."""
    groups = {"gloo": dist.new_group(backend="gloo", timeout=runtime.timeout)}
    library = ""
    if runtime.launch.launcher in MPI_LAUNCHERS:
        start_mpi(runtime.rank, runtime.world_size)
        library = mpi_version_line()
        groups["mpi"] = dist.new_group(backend=BACKEND, timeout=runtime.timeout)
    exchanges = {
        name: measure(
            {transport: _exchange(group, *size) for transport, group in groups.items()},
            groups["gloo"],
            rounds,
            calls=10,
        )
        for name, size in SIZES.items()
    }
    layers = {
        name: measure({transport: _layer(group, shape) for transport, group in groups.items()}, groups["gloo"], rounds)
        for name, shape in SHAPES.items()
        if runtime.world_size <= shape.num_experts
    }
    return {
        "ranks": runtime.world_size,
        "library": library,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.now().isoformat(timespec="seconds"),
        "rounds": rounds,
        "exchanges": exchanges,
        "layers": layers,
    }


def format_result(result: dict[str, Any]) -> str:
    """Formats the result as a table."""
    ranks = result["ranks"]
    lines = [
        f"{ranks} ranks, CPU, {result['threads']} threads each, torch {result['torch']}, {result['date']}; "
        f"{result['library'] or 'no MPI'}; medians of {result['rounds']} interleaved rounds, [smallest - largest]",
        f"{'all-to-all, to each rank':34}{'MB a rank':>10}{'gloo, ms':>26}{'MPI, ms':>26}{'gloo / MPI':>12}",
    ]
    for name, (rows, width) in SIZES.items():
        lines.append(f"{name:34}{rows * width * 4 * ranks / 1e6:10.2f}" + _columns(result["exchanges"][name]))
    lines.append("MoE layer, forward and backward")
    for name, transports in result["layers"].items():
        shape = SHAPES[name]
        described = f"{name}: d {shape.d_model}, {shape.num_experts} x {shape.hidden}, top-{shape.k}"
        lines.append(f"{described:34}{shape.tokens // ranks * shape.d_model * 4 / 1e6:10.2f}" + _columns(transports))
    return "\n".join(lines)


def measure(
    workloads: dict[str, Callable[[], object]], group: dist.ProcessGroup, rounds: int, calls: int = 1
) -> dict[str, dict[str, float]]:
    """Times each workload once per round, after two rounds of warming up, from a barrier until this rank is done.
    Returns the median, smallest and largest milliseconds of each.

    calls: number of runs in one timing, whose mean counts; more than 1 for short workloads, since ranks leave a barrier
    at different times."""
    times: dict[str, list[float]] = {name: [] for name in workloads}
    for number in range(rounds + 2):
        for name, work in workloads.items():
            dist.barrier(group)
            start = time.perf_counter()
            for _ in range(calls):
                work()
            if number >= 2:
                times[name].append(1000 * (time.perf_counter() - start) / calls)
    return {
        name: {"median": statistics.median(found), "smallest": min(found), "largest": max(found)}
        for name, found in times.items()
    }


def _exchange(group: dist.ProcessGroup, rows: int, width: int) -> Callable[[], object]:
    x, counts = torch.randn(rows * group.size(), width), [rows] * group.size()
    return lambda: all_to_all_rows(x, counts, counts, group)


def _layer(group: dist.ProcessGroup, shape: LedgerShape) -> Callable[[], object]:
    """Returns one step of a layer over the group, with the same weights and tokens for every transport."""
    config = {
        "d_model": shape.d_model,
        "num_experts": shape.num_experts,
        "router": {"k": shape.k},
        "experts": {"hidden": shape.hidden, "activation": "gelu"},
    }
    layer = MoELayer(MoEConfig.model_validate(config), group)
    generator = torch.Generator().manual_seed(group.rank())
    x_TD = torch.randn(shape.tokens // group.size(), shape.d_model, generator=generator, requires_grad=True)

    def step() -> None:
        y_TD = layer(x_TD).y
        y_TD.backward(torch.ones_like(y_TD))

    return step


def _columns(transports: dict[str, dict[str, float]]) -> str:
    shown = [f"{c['median']:9.3f} [{c['smallest']:.3f} - {c['largest']:.3f}]" for c in transports.values()]
    if "mpi" not in transports:
        return f"{shown[0]:>26}  not measured (start with mpirun)"
    return f"{shown[0]:>26}{shown[1]:>26}{transports['gloo']['median'] / transports['mpi']['median']:12.2f}"
