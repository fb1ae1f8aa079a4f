"""How long a step of each variant takes, from trained models side by side in one process: the times of the runs
themselves were taken while others ran, on a machine whose speed may have changed in between."""

import io
from contextlib import redirect_stdout

import torch

from expert_parallel.allocator import keep_freed_memory
from expert_parallel.bench.timing import Times, Work, measure
from expert_parallel.runtime import Runtime, RuntimeConfig, distributed
from expert_parallel.study.plan import Run, Study
from expert_parallel.training.loop import set_up
from expert_parallel.training.step import train_step

ROUNDS = 9


def step_times(study: Study, rates: dict[str, float], rounds: int = ROUNDS) -> tuple[dict[str, Times], str]:
    """(milliseconds of a training step by variant, the device's name). The runs must be done; their checkpoints are
    read, and left alone."""
    torch.set_num_threads(study.settings.threads)
    keep_freed_memory()
    with distributed(RuntimeConfig()) as runtime:
        works = {name: _one_step(study.finals(name, rate)[0], runtime) for name, rate in rates.items()}
        times = measure(works, runtime.device, rounds)
        return times, torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "cpu"


def _one_step(run: Run, runtime: Runtime) -> Work:
    """A run's last step once more, from the weights that it left."""
    with redirect_stdout(io.StringIO()):  # what a run says when it begins
        trained = set_up(run.config, runtime)
        step = trained.resume() - 1
    batches = trained.batches(step)

    def one_step() -> None:
        model, optimizer, mesh = trained.model, trained.optimizer, trained.mesh
        train_step(model, optimizer, batches, run.config.training, mesh, step=step, seed=run.seed)

    return Work(one_step)
