"""Measures time and memory of workloads under the same settings for all. Every round runs each of them once, since the
speed of a shared machine drifts."""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from expert_parallel.bench.allocator import keep_freed_memory
from expert_parallel.parallel.collectives import group_size
from expert_parallel.runtime.process import Runtime

WARM_UP_ROUNDS = 2  # rounds


@dataclass(frozen=True)
class Workload:
    """Pairs `run`, which is timed, with `clear`, which is called after it outside the timing and removes what it
    leaves, such as gradients."""

    run: Callable[[], object]
    clear: Callable[[], None] = lambda: None


class Times(BaseModel):
    """Holds the milliseconds of a workload over the rounds; the time of a round is that of its slowest rank."""

    median: float
    smallest: float
    largest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.smallest:.2f} - {self.largest:.2f}]"


def measure(
    workloads: dict[str, Workload], device: torch.device, rounds: int, group: dist.ProcessGroup | None = None
) -> dict[str, Times]:
    """Times each workload once per round, after `WARM_UP_ROUNDS`. A timing lasts from a barrier until this rank and its
    device are done; the slowest rank counts. Returns the times by name.

    group: all ranks of the world, which pass the same names and get the same times; None: only this process."""
    seconds = torch.zeros(rounds, len(workloads), dtype=torch.float64)
    barrier = torch.zeros(1)
    for number in range(-WARM_UP_ROUNDS, rounds):
        for column, work in enumerate(workloads.values()):
            synchronize(device)
            if group is not None:
                dist.all_reduce(barrier)  # a barrier that every CPU backend supports
            start = time.perf_counter()
            work.run()
            synchronize(device)
            end = time.perf_counter()
            if number >= 0:
                seconds[number, column] = end - start
            work.clear()
    if group is not None:
        dist.all_reduce(seconds, dist.ReduceOp.MAX)  # a CPU tensor, so over the world's CPU backend
    columns = (1000 * seconds).T.tolist()
    return {
        name: Times(median=statistics.median(column), smallest=min(column), largest=max(column))
        for name, column in zip(workloads, columns, strict=True)
    }


def synchronize(device: torch.device) -> None:
    """Waits for all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory(BaseModel):
    """Holds the peak memory of one step, in bytes beyond those that were allocated before it. total: all of it.
    activations: without the gradients of weights."""

    total: int
    activations: int


def peak_memory(
    run: Callable[[], object], gradients: Callable[[], Iterable[Tensor]], device: torch.device
) -> PeakMemory:
    """Measures the peak memory of one step. gradients: called after the step, returns the gradients of the weights;
    none of them may exist before.

    Uses the allocations that torch's profiler records, on the CPU and on GPUs; what libraries allocate themselves
    (scratch of oneDNN, workspaces of cuBLAS after the first use) is not included."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with tempfile.TemporaryDirectory() as folder:
        with _silence_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
            synchronize(device)
        left = {gradient.untyped_storage().data_ptr(): gradient.untyped_storage().nbytes() for gradient in gradients()}
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kind = 1 if on_gpu else 0
    changes = sorted(
        (event["ts"], number, event["args"]["Addr"], event["args"]["Bytes"])
        for number, event in enumerate(events)
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == kind
    )
    kept = {  # index of the allocation -> bytes; the last one at a gradient's address is the gradient's
        max(number for _, number, address, size in changes if address == pointer and size > 0): size
        for pointer, size in left.items()
        if any(address == pointer and size > 0 for _, _, address, size in changes)
    }
    total = weights = highest = highest_activations = 0
    allocated: dict[int, int] = {}  # address -> bytes
    for _, number, address, size in changes:
        if size > 0:
            allocated[address] = size
        elif address not in allocated:
            continue  # allocated before the step
        else:
            size = -allocated.pop(address)
        total += size
        weights += kept.get(number, 0)
        highest, highest_activations = max(highest, total), max(highest_activations, total - weights)
    if on_gpu:  # the usual figure, which counts whole blocks of the caching allocator
        highest = torch.cuda.max_memory_allocated(device) - before
    return PeakMemory(total=highest, activations=highest_activations)


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Silences stderr: the profiler's C++ library prints a line at each start and stop, at no level that can be set."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def max_over_ranks(values: list[float], group: dist.ProcessGroup | None) -> list[float]:
    """Returns, for each value, its maximum over the ranks of the group. A collective."""
    if group_size(group) == 1:
        return values
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


class Environment(BaseModel):
    """Holds the conditions of a measurement. device: that of rank 0. transport: torch.distributed's backend. threads:
    CPU threads of each rank. allocator: a description."""

    ranks: int
    device: str
    transport: str
    threads: int
    torch: str
    allocator: str
    date: str

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks on {self.device} ({self.transport}), {self.threads} threads each, torch {self.torch}, "
            f"{self.date}; {self.allocator}"
        )


def set_up_environment(runtime: Runtime, threads: int) -> Environment:
    """Sets the number of CPU threads and makes the allocator keep freed memory, for all workloads. Returns the
    conditions."""
    torch.set_num_threads(threads)
    on_gpu = runtime.device.type == "cuda"
    return Environment(
        ranks=runtime.world_size,
        device=torch.cuda.get_device_name(runtime.device) if on_gpu else "cpu",
        transport=runtime.backend,
        threads=threads,
        torch=torch.__version__,
        allocator=keep_freed_memory() + (", on the GPU torch's caching allocator" if on_gpu else ""),
        date=datetime.now().isoformat(timespec="seconds"),
    )
