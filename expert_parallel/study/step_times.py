"""Times a training step of each variant in turn with the reference's, in one process and from trained weights. The
times that the runs logged cannot be compared, since other runs were training at the same time."""

import io
from contextlib import redirect_stdout

import torch
from pydantic import BaseModel

from expert_parallel.bench.allocator import keep_freed_memory
from expert_parallel.bench.timing import Times, Workload, measure
from expert_parallel.runtime.process import Runtime, distributed
from expert_parallel.study.definition import Study, StudyRun
from expert_parallel.training.run import set_up_run
from expert_parallel.training.step import train_step

ROUNDS = 9


class StepTimes(BaseModel):
    """Holds the milliseconds of a training step of one variant (`own`) and of the reference, from the same rounds."""

    own: Times
    reference: Times

    @property
    def speed(self) -> float:
        """Returns the median time of the reference's step divided by that of the variant's step."""
        return self.reference.median / self.own.median


def step_times(study: Study, rates: dict[str, float], rounds: int = ROUNDS) -> tuple[dict[str, StepTimes], str]:
    """Returns the times of a training step by variant, and the device's name. Each variant is timed together with the
    reference, so that only two models are in memory at a time.

    rates: learning rate of each variant's full-length runs, which must be done. Their checkpoints are read and not
    changed."""
    torch.set_num_threads(study.settings.threads)
    keep_freed_memory()
    name = study.settings.reference
    reference = study.finals(name, rates[name])[0]
    with distributed(reference.config.runtime) as runtime:
        times = {}
        for variant, rate in rates.items():
            runs = {"reference": reference, "own": study.finals(variant, rate)[0]}
            workloads = {which: _one_step(run, runtime) for which, run in runs.items()}
            times[variant] = StepTimes(**measure(workloads, runtime.device, rounds))
        device = runtime.device
        return times, torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _one_step(run: StudyRun, runtime: Runtime) -> Workload:
    """Returns a workload that repeats a run's last step, from its final weights."""
    with redirect_stdout(io.StringIO()):  # hides what a run prints at its start
        trained = set_up_run(run.config, runtime)
        step = trained.resume() - 1
    batches = trained.batches(step)

    def one_step() -> None:
        training = run.config.training
        train_step(trained.model, trained.engine, batches, training, trained.mesh, step=step, seed=run.seed)

    return Workload(one_step)
