"""Measures a machine's peak rates: matrix products, memory copies, and the cost of an all-to-all between ranks. Its
JSON file is read by `read_machine`.

    expert-parallel bench machine --ranks 2 --json machine.json
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from expert_parallel.bench.timing import Environment, Workload, measure, set_up_environment
from expert_parallel.parallel.collectives import all_to_all_rows
from expert_parallel.runtime.mpi.backend import BACKEND, start_mpi
from expert_parallel.runtime.process import Runtime
from expert_parallel.settings import Settings
from expert_parallel.training.config import DTYPES

# (M, K, N) of products M x K times K x N: squares, then those of one expert in the shapes base and fine-grained (CPU),
# mixtral and qwen3-30b-a3b (GPU).
CPU_MATMULS = [
    (256,) * 3,
    (512,) * 3,
    (1024,) * 3,
    (1024, 256, 1024),
    (1024, 1024, 256),
    (128, 256, 128),
    (128, 128, 256),
]
GPU_MATMULS = [
    *((size,) * 3 for size in (1024, 2048, 4096, 8192)),
    (4096, 4096, 14336),
    (4096, 14336, 4096),
    (2048, 2048, 768),
    (2048, 768, 2048),
]
CPU_COPY, GPU_COPY = 64 << 20, 1 << 30  # bytes, more than the caches hold
EXCHANGES = [
    1 << exponent for exponent in (10, 12, 14, 16, 18, 20, 22, 24)
]  # bytes that a rank sends to all others together
MPI_LAUNCHERS = ("openmpi", "mpich")
ProgressFn = Callable[[str], None]


class MachineTask(Settings):
    """Sets how `bench machine` measures. threads: CPU threads of each rank."""

    rounds: int = 7
    threads: int = 1


class StrictModel(BaseModel):
    """Validates a part of the machine file, and refuses unknown keys."""

    model_config = ConfigDict(extra="forbid")


class MatmulMeasurement(StrictModel):
    """Holds the FLOP/s of the matrix product (M, K) x (K, N) on the slowest rank, while all ranks compute it."""

    m: int = Field(ge=1)
    k: int = Field(ge=1)
    n: int = Field(ge=1)
    flops_per_second: float = Field(gt=0)


class AllToAllMeasurement(StrictModel):
    """Holds the cost of an all-to-all among `ranks`: seconds = alpha + beta * bytes that one rank sends to all others
    together.

    measured: the pairs (bytes, seconds) that alpha and beta were fitted to."""

    transport: str
    ranks: int = Field(ge=2)
    alpha_seconds: float = Field(ge=0)
    beta_seconds_per_byte: float = Field(ge=0)
    measured: list[tuple[int, float]]


class MachineProfile(StrictModel):
    """Holds the content of the machine file.

    products: rates of matrix products, by dtype. copy_bytes_per_second: bytes read plus bytes written, on one rank.
    exchanges: cost of the all-to-all for each transport; empty if one rank was measured."""

    kind: Literal["machine"] = "machine"
    version: Literal[1] = 1
    facts: Environment
    rounds: int
    products: dict[str, list[MatmulMeasurement]]
    copy_bytes_per_second: float = Field(gt=0)
    exchanges: list[AllToAllMeasurement]


def read_machine(path: Path) -> MachineProfile:
    """Reads the speeds of a machine from a file that `bench machine` wrote.

    Raises a ValueError that names the path if the file cannot be read or is something else.
    """
    try:
        return MachineProfile.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the machine file {path} cannot be read: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        text = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            text = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"].lower()]))
        raise ValueError(f"{path} is not a file of `bench machine`: {text}") from None


def machine_task(tree: dict[str, Any], runtime: Runtime, print_progress: ProgressFn) -> dict[str, Any]:
    """Runs the benchmark on every rank. tree: a `MachineTask`. Returns the profile as a tree for JSON."""
    return bench_machine(MachineTask.model_validate(tree), runtime, print_progress).model_dump(mode="json")


def bench_machine(
    task: MachineTask, runtime: Runtime, print_progress: ProgressFn = lambda text: None
) -> MachineProfile:
    """Measures matrix products, copies and all-to-alls, and returns their rates. A collective."""
    facts = set_up_environment(runtime, task.threads)
    device, group = runtime.device, dist.group.WORLD if runtime.world_size > 1 else None
    products = {}
    for name in ("float32", "bfloat16"):
        print_progress(f"products in {name}")
        products[name] = measure_matmuls(DTYPES[name], device, task.rounds, group)
    print_progress("copies")
    size = GPU_COPY if device.type == "cuda" else CPU_COPY
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    copies = measure({"copy": Workload(partial(target.copy_, source))}, device, task.rounds, group)
    exchanges = []
    for transport, carrier in transports(runtime).items():
        print_progress(f"exchanges over {transport}")
        exchanges.append(measure_exchanges(transport, carrier, runtime, task.rounds))
    return MachineProfile(
        facts=facts,
        rounds=task.rounds,
        products=products,
        copy_bytes_per_second=2 * size / copies["copy"].median * 1000,
        exchanges=exchanges,
    )


def measure_matmuls(
    dtype: torch.dtype, device: torch.device, rounds: int, group: dist.ProcessGroup | None
) -> list[MatmulMeasurement]:
    """Returns the FLOP/s of the matrix products listed for this kind of device. A collective. Repeats small products
    within one timing, so that the clock's resolution does not matter."""
    on_gpu = device.type == "cuda"
    sizes = GPU_MATMULS if on_gpu else CPU_MATMULS
    enough = 1e12 if on_gpu else 1e9
    workloads, repeats = {}, []
    for m, k, n in sizes:
        a, b, out = (torch.randn(*size, device=device).to(dtype) for size in ((m, k), (k, n), (m, n)))
        repeats.append(min(1000, max(1, round(enough / (2 * m * k * n)))))
        workloads[f"{m} {k} {n}"] = Workload(partial(_repeat, repeats[-1], a, b, out))
    times = measure(workloads, device, rounds, group)
    return [
        MatmulMeasurement(m=m, k=k, n=n, flops_per_second=repeat * 2 * m * k * n / time.median * 1000)
        for (m, k, n), repeat, time in zip(sizes, repeats, times.values(), strict=True)
    ]


def _repeat(number: int, a: Tensor, b: Tensor, out: Tensor) -> None:
    for _ in range(number):
        torch.mm(a, b, out=out)


def transports(runtime: Runtime) -> dict[str, dist.ProcessGroup]:
    """Returns a process group of all ranks for each available transport: gloo always, MPI if mpirun has started the
    ranks, NCCL between GPUs. Empty on one rank."""
    if runtime.world_size == 1:
        return {}
    found = {"gloo": dist.new_group(backend="gloo", timeout=runtime.timeout)}
    if runtime.launch.launcher in MPI_LAUNCHERS:
        start_mpi(runtime.rank, runtime.world_size)
        found["mpi"] = dist.new_group(backend=BACKEND, timeout=runtime.timeout)
    if runtime.device.type == "cuda":
        found["nccl"] = dist.new_group(backend="nccl", timeout=runtime.timeout)
    return found


def measure_exchanges(transport: str, group: dist.ProcessGroup, runtime: Runtime, rounds: int) -> AllToAllMeasurement:
    """Times all-to-alls of several sizes over the group, and fits alpha and beta to the medians. A collective."""
    ranks = runtime.world_size
    device = runtime.device if transport == "nccl" else torch.device("cpu")
    workloads, calls = {}, []
    for size in EXCHANGES:
        rows = -(-size // (ranks - 1))  # bytes to each other rank, and the same to itself
        x, counts = torch.zeros(rows * ranks, dtype=torch.uint8, device=device), [rows] * ranks
        calls.append(max(1, min(20, (1 << 20) // size)))
        workloads[str(size)] = Workload(partial(_exchange, calls[-1], x, counts, group))
    times = measure(workloads, device, rounds, group)
    seconds = [time.median / 1000 / number for time, number in zip(times.values(), calls, strict=True)]
    measured = list(zip(EXCHANGES, seconds, strict=True))
    alpha, beta = fit_alpha_beta(measured)
    return AllToAllMeasurement(
        transport=transport, ranks=ranks, alpha_seconds=alpha, beta_seconds_per_byte=beta, measured=measured
    )


def _exchange(number: int, x: Tensor, counts: list[int], group: dist.ProcessGroup) -> None:
    for _ in range(number):
        all_to_all_rows(x, counts, counts, group)


def fit_alpha_beta(measured: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fits seconds = alpha + beta * bytes, both at least 0, by least squares of relative errors, so that short
    exchanges weigh as much as long ones. Returns (alpha, beta)."""
    sizes = torch.tensor([float(size) for size, _ in measured], dtype=torch.float64)
    seconds = torch.tensor([time for _, time in measured], dtype=torch.float64)
    columns = torch.stack([1 / seconds, sizes / seconds], 1)
    scale = columns.norm(dim=0)
    solution = torch.linalg.lstsq(columns / scale, torch.ones(len(measured), 1, dtype=torch.float64)).solution
    alpha, beta = (solution[:, 0] / scale).tolist()
    return max(alpha, 0.0), max(beta, 0.0)


def format_machine_profile(result: MachineProfile) -> str:
    """Formats the file's content as text."""
    lines = [str(result.facts), f"medians of {result.rounds} rounds, of the slowest rank, while all work"]
    for dtype, products in result.products.items():
        lines += [
            f"{dtype:10}{f'{p.m} x {p.k} x {p.n}':>22}{p.flops_per_second / 1e9:12,.1f} GFLOP/s" for p in products
        ]
    lines.append(f"copy, read and written {result.copy_bytes_per_second / 1e9:18.1f} GB/s a rank")
    for exchange in result.exchanges:
        rate = 1 / exchange.beta_seconds_per_byte / 1e9 if exchange.beta_seconds_per_byte else float("inf")
        lines.append(
            f"all-to-all, {exchange.transport}, {exchange.ranks} ranks: {1e6 * exchange.alpha_seconds:.0f} us + "
            f"{1e9 * exchange.beta_seconds_per_byte:.3f} ns a byte ({rate:.2f} GB/s sent by a rank)"
        )
    if not result.exchanges:
        lines.append("all-to-all: not measured: an exchange needs two ranks (--ranks 2, or a launcher)")
    return "\n".join(lines)
