"""Turns the error of an allocator into one sentence: which rank, in which phase, and which settings would need less."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

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
    has = f"its GPU has {_size(total_memory(runtime.device))}"
    if device == "cpu":
        has = f"its machine has {_size(total_memory(runtime.device))}" + (f" for {ranks} ranks" if ranks > 1 else "")
    settings = [
        f"{setting} ({_size(needs)})" for setting, needs in smaller_settings(config, degrees, estimate.total, device)
    ]
    return (
        f"rank {runtime.rank} has run out of memory {phase_of(error)}"
        f"{f' when it asked for {asked}' if asked else ''}: {has}, and `expert-parallel check` estimates "
        f"{_size(estimate.total)} for a step of a rank, at its highest in the {estimate.moment}; settings to try, with "
        f"their estimates: {', '.join(settings) or 'none that fit; use more ranks'}"
    )


def phase_of(error: BaseException) -> str:
    """Returns the phase in which an error was raised, read from its traceback so that a step need not keep it."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return next((PHASES[name] for name in names if name in PHASES), "outside of a step")


def smaller_settings(
    config: Config, degrees: ParallelDegrees, total: float, device: Device
) -> Iterator[tuple[str, float]]:
    """Yields up to MAX_SETTINGS settings, as on the command line, that fit the config and the ranks and need less
    memory than `total` bytes, with the bytes that they need. Those that do not change the result come first."""
    found = 0
    for override in _candidates(config):
        tree = config.model_dump(mode="json")
        try:
            apply_override(tree, override, Config)
            changed = read_config(tree, override)
            needs = estimate_memory(changed, check_degrees(changed, degrees.world_size), device).total
        except ValueError:  # it does not fit
            continue
        if needs <= USEFUL * total:
            yield override, needs
            found += 1
        if found == MAX_SETTINGS:
            return


def _candidates(config: Config) -> Iterator[str]:
    training, parallel = config.training, config.parallel
    per_micro_step = training.global_batch // training.micro_steps
    divisor = next((n for n in range(2, per_micro_step + 1) if per_micro_step % n == 0), None)
    if divisor is not None:
        yield f"training.micro_steps={training.micro_steps * divisor}"
    if training.recompute != "block":
        less = "moe" if training.recompute == "none" and config.model.moe is not None else "block"
        yield f"training.recompute={less}"
    if parallel.data.kind == "replicated":
        yield "parallel.data={kind: sharded}"
    for degree in ("ep", "pp", "tp", "etp", "cp"):
        yield f"parallel.{degree}={2 * getattr(parallel, degree)}"
    if training.dtype == "float32":
        yield "training.dtype=bfloat16"
    capacity = None if config.model.moe is None else config.model.moe.capacity
    if isinstance(capacity, FactorConfig) and capacity.train > 1:
        yield "model.moe.capacity.train=1.0"
    for part in (2, 4, 8):
        yield f"training.sequence_length={training.sequence_length // part}"


def _size(number: float) -> str:
    """Formats bytes: 0.31 MiB, 512 MiB, 1.5 GiB."""
    unit, name = (GIB, "GiB") if number >= GIB else (1024**2, "MiB")
    return f"{number / unit:,.3g} {name}" if number < 1000 * unit else f"{number / unit:,.0f} {name}"
