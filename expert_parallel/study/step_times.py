"""How long a step of each variant takes, from trained models side by side in one process: the times of the runs
themselves were taken while others ran, on a machine whose speed may have changed in between."""

import io
from contextlib import redirect_stdout

import torch
from pydantic import BaseModel

from expert_parallel.bench.allocator import keep_freed_memory
from expert_parallel.bench.timing import Times, Work, measure
from expert_parallel.runtime.process import Runtime, distributed
from expert_parallel.study.plan import Run, Study
from expert_parallel.training.loop import set_up
from expert_parallel.training.step import train_step

ROUNDS = 9


class StepTimes(BaseModel):
    """Milliseconds of a training step; the reference's, from the same rounds, beside it."""

    own: Times
    reference: Times

    @property
    def speed(self) -> float:
        """Steps that this one takes in the time of one of the reference."""
        return self.reference.median / self.own.median


def step_times(study: Study, rates: dict[str, float], rounds: int = ROUNDS) -> tuple[dict[str, StepTimes], str]:
    """(times by variant, the device's name). Each variant beside the reference: two models are in memory at a time.
    The runs must be done; their checkpoints are read, and left alone."""
    torch.set_num_threads(study.settings.threads)
    keep_freed_memory()
    name = study.settings.reference
    reference = study.finals(name, rates[name])[0]
    with distributed(reference.config.runtime) as runtime:
        times = {}
        for variant, rate in rates.items():
            runs = {"reference": reference, "own": study.finals(variant, rate)[0]}
            works = {which: _one_step(run, runtime) for which, run in runs.items()}
            times[variant] = StepTimes(**measure(works, runtime.device, rounds))
        device = runtime.device
        return times, torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _one_step(run: Run, runtime: Runtime) -> Work:
    """A run's last step once more, from the weights that it left."""
    with redirect_stdout(io.StringIO()):  # what a run says when it begins
        trained = set_up(run.config, runtime)
        step = trained.resume() - 1
    batches = trained.batches(step)

    def one_step() -> None:
        model, engine, mesh = trained.model, trained.engine, trained.mesh
        train_step(model, engine, batches, run.config.training, mesh, step=step, seed=run.seed)

    return Work(one_step)
