"""Turns the error of an allocator into one sentence: which rank, in which phase, and which settings would need less."""

import math
import os
import re
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from expert_parallel.config import apply_override
from expert_parallel.model.activation_memory import Device
from expert_parallel.moe.capacity.policies import FactorConfig
from expert_parallel.parallel.degrees import ParallelDegrees
from expert_parallel.runtime.process import OutOfMemory, Runtime
from expert_parallel.training.config import Config, read_config
from expert_parallel.training.memory import GIB, estimate_memory, total_memory
from expert_parallel.training.setup import check_degrees

# The phases of a run by the names of the functions that run them. The outermost one that is in progress counts: a
# forward pass inside `backward` is recomputation, and one inside `evaluate` is evaluation.
PHASES = {
    "set_up_run": "while the model was built",
    "resume": "while the checkpoint was loaded",
    "batches": "while the batch was read",
    "evaluate": "in the evaluation",
    "save": "while a checkpoint was saved",
    "generate_sample": "while the sample was generated",
    "forward": "in the forward pass",
    "forward_one_chunk": "in the forward pass",
    "local_cross_entropy": "in the loss",
    "backward": "in the backward pass",
    "backward_one_chunk": "in the backward pass",
    "update": "in the update of the weights",
}
WORDS = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
UNITS = {"bytes": 1, "kib": 1024, "mib": 1024**2, "gib": GIB}
MAX_SETTINGS = 3
LIBRARIES = GIB // 2  # of Python and torch, which the estimate leaves out
USEFUL = 0.99  # a setting is proposed if the step then needs at most this times the memory


@contextmanager
def explain_out_of_memory(config: Config, runtime: Runtime) -> Iterator[None]:
    """Raises OutOfMemory in place of an allocator's error, on this rank alone."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(out_of_memory_message(config, runtime, error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True for torch's error on GPUs, its error on CPUs, which has no class of its own, and Python's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or WORDS.search(str(error)) is not None


def out_of_memory_message(config: Config, runtime: Runtime, error: BaseException) -> str:
    """Returns the sentence: rank, phase, the memory that there is, the estimate of `check`, and settings to try."""
    degrees = check_degrees(config, runtime.world_size, runtime.launch.local_world_size)
    device: Device = "cuda" if runtime.device.type == "cuda" else "cpu"
    estimate = estimate_memory(config, degrees, device)
    wanted = re.search(r"tried to allocate ([\d.]+) (bytes|\wiB)", str(error), re.IGNORECASE)
    asked = f"{_size(float(wanted[1]) * UNITS[wanted[2].lower()])} more" if wanted is not None else ""
    ranks = runtime.launch.local_world_size
    has, room = f"its GPU has {_size(total_memory(runtime.device))}", float(total_memory(runtime.device))
    if device == "cpu":
        has, room = host_memory(ranks, estimate.total)
    found = list(smaller_settings(config, degrees, estimate.total, device, room))
    settings = [f"{setting} ({_size(needs)})" for setting, needs in found]
    several = "no single setting fits, but together they may: " if found and found[0][1] > room else ""
    return (
        f"rank {runtime.rank} has run out of memory {phase_of(error)}"
        f"{f' when it asked for {asked}' if asked else ''}: {has}, and `expert-parallel check` estimates "
        f"{_size(estimate.total)} for a step of a rank, at its highest in the {estimate.moment}; settings to try, with "
        f"their estimates: {several}{', '.join(settings) or 'none that fit; use more ranks'}"
    )


def host_memory(ranks: int, estimate: float) -> tuple[str, float]:
    """Returns what memory this process may have, as a clause, and the bytes of it that are left for the tensors of one
    rank, if `ranks` ranks share the machine. estimate: the bytes of a rank's tensors, at most."""
    machine = total_memory(torch.device("cpu"))
    of_ranks = f" for {ranks} ranks" if ranks > 1 else ""
    limits = [(f"its machine has {_size(machine)}{of_ranks}", machine / ranks - LIBRARIES)]
    process, _ = resource.getrlimit(resource.RLIMIT_AS)
    if process != resource.RLIM_INFINITY:
        # Address space, of which libraries map more than they use: at least what is neither free nor tensors.
        mapped = 0.0
        with suppress(OSError):  # no Linux
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        room = process - max(LIBRARIES, mapped - estimate)
        limits.append((f"this process may have {_size(process)} (ulimit -v)", room))
    if (group := control_group_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))) < machine:
        limits.append((f"its control group may have {_size(group)}{of_ranks}", group / ranks - LIBRARIES))
    return min(limits, key=lambda limit: limit[1])


def control_group_limit(membership: Path, root: Path) -> float:
    """Returns the bytes of memory that the control groups of this process may have; infinity if they have no limit.

    membership: the file with the process's groups, a line each: `0::/path`, or `5:memory:/path` in version 1. root: the
    folder in which the groups are mounted.
    """
    limits = []
    with suppress(OSError):  # no Linux, or no control groups
        for line in membership.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            is_version_1 = "memory" in controllers.split(",")
            if number != "0" and not is_version_1:
                continue
            top, file = (root / "memory", "memory.limit_in_bytes") if is_version_1 else (root, "memory.max")
            group = top / path.lstrip("/")
            # A container's own group may be mounted as the root, so that its path does not exist.
            for folder in {group, *group.parents, top}:
                if folder.is_relative_to(top) and (folder / file).exists():
                    text = (folder / file).read_text().strip()
                    limits.append(math.inf if text == "max" else float(text))
    return min(limits, default=math.inf)


def phase_of(error: BaseException) -> str:
    """Returns the phase in which an error was raised, read from its traceback so that a step need not keep it."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return next((PHASES[name] for name in names if name in PHASES), "outside of a step")


def smaller_settings(
    config: Config, degrees: ParallelDegrees, total: float, device: Device, room: float = math.inf
) -> list[tuple[str, float]]:
    """Returns up to MAX_SETTINGS settings, as on the command line, that fit the config and the ranks and need less
    memory than `total` bytes, with the bytes that they need. Those that do not change the result come first.

    room: bytes that a step may need. Settings that need more are left out, unless all do.
    """
    found: list[tuple[str, float]] = []
    for alternatives in _candidates(config):
        useful: list[tuple[str, float]] = []
        for override in alternatives:
            tree = config.model_dump(mode="json")
            with suppress(ValueError):  # of a setting that does not fit the others
                apply_override(tree, override, Config)
                changed = read_config(tree, override)
                needs = estimate_memory(changed, check_degrees(changed, degrees.world_size), device).total
                useful += [(override, needs)] if needs <= USEFUL * total else []
                if needs <= min(room, USEFUL * total):
                    break
        found += useful[-1:]
        if sum(needs <= room for _, needs in found) == MAX_SETTINGS:
            break
    return ([entry for entry in found if entry[1] <= room] or found)[:MAX_SETTINGS]


def _candidates(config: Config) -> Iterator[list[str]]:
    """Yields changes of one setting, each as a list of alternatives that need less and less memory."""
    training, parallel = config.training, config.parallel
    per_micro_step = training.global_batch // training.micro_steps
    divisors = [n for n in range(2, per_micro_step + 1) if per_micro_step % n == 0]
    yield [f"training.micro_steps={training.micro_steps * divisor}" for divisor in divisors]
    if training.recompute != "block":
        less = "moe" if training.recompute == "none" and config.model.moe is not None else "block"
        yield [f"training.recompute={less}"]
    if parallel.data.kind == "replicated":
        yield ["parallel.data={kind: sharded}"]
    for degree in ("ep", "pp", "tp", "etp", "cp"):
        yield [f"parallel.{degree}={2 * getattr(parallel, degree)}"]
    if training.dtype == "float32":
        yield ["training.dtype=bfloat16"]
    capacity = None if config.model.moe is None else config.model.moe.capacity
    if isinstance(capacity, FactorConfig) and capacity.train > 1:
        yield ["model.moe.capacity.train=1.0"]
    yield from ([f"training.sequence_length={training.sequence_length // part}"] for part in (2, 4, 8))


def _size(number: float) -> str:
    """Formats bytes: 0.31 MiB, 512 MiB, 1.5 GiB."""
    unit, name = (GIB, "GiB") if number >= GIB else (1024**2, "MiB")
    return f"{number / unit:,.3g} {name}" if number < 1000 * unit else f"{number / unit:,.0f} {name}"
