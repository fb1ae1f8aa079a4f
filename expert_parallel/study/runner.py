"""Trains the runs of a study, several at a time, each in a process of its own, until all are done.

The runs' folders tell which runs are done, so a study that was stopped continues with the others, and a run that was
stopped continues from its newest checkpoint."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from expert_parallel.study.curves import read_curve, steps_done
from expert_parallel.study.definition import Study, StudyRun
from expert_parallel.study.folder import (
    check_existing_runs,
    find_data_digest,
    has_diverged,
    is_done,
    last_log_line,
    lock_folder,
    loss_of,
    session,
)
from expert_parallel.training.config import dump_config
from expert_parallel.training.resume import EXIT_CODE as STOPPED

POLL_SECONDS = 1.0
SAVE_SECONDS = 600  # time that a run has to save when the study is stopped
# As in launch/train.sh: glibc keeps freed blocks, since page faults on new ones are slow.
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_=1073741824", "MALLOC_TRIM_THRESHOLD_=1073741824", "MALLOC_TOP_PAD_=67108864")

ProgressFn = Callable[[str], None]
ShowFn = Callable[[Callable[[], str]], None]


@dataclass(frozen=True)
class Job:
    """Pairs a run with the process that trains it."""

    run: StudyRun
    process: subprocess.Popen[bytes]


@dataclass
class StudyProgress:
    """Computes how many of the study's steps are done. wanted: number of steps to train, by folder of a run. began,
    first: time (monotonic seconds) and number of steps done when this execution began. jobs: the runs in training."""

    began: float
    wanted: dict[Path, int]
    first: int = 0
    jobs: list[Job] = field(default_factory=list)

    def done(self) -> int:
        """Returns the number of steps done, over all runs."""
        return sum(min(steps_done(folder), wanted) for folder, wanted in self.wanted.items())

    def text(self) -> str:
        """Formats the progress, the estimated time left, and a line for each running job."""
        done, total = self.done(), sum(self.wanted.values())
        seconds = time.monotonic() - self.began
        rate = (done - self.first) / seconds if seconds > 0 else 0.0
        left = f"about {(total - done) / rate / 60:.0f} min left" if rate > 0 else "time left not known yet"
        lines = [f"{done:,} of {total:,} steps, {done / total:.0%}; {left}"]
        for job in self.jobs:
            curve = read_curve(job.run.folder)
            loss = f", held-out loss {curve.final:.4f}" if curve.steps else ""
            lines.append(f"  {job.run}: step {steps_done(job.run.folder)} of {job.run.steps}{loss}")
        return "\n".join(lines)


def run_study(study: Study, print_progress: ProgressFn, show: ShowFn) -> dict[str, float]:
    """Trains all runs that are not done yet, and returns the best learning rate of each variant.

    show: is called every POLL_SECONDS with a function that formats the progress. Raises ValueError if a folder holds a
    run of another study, if another process holds the lock, if a run fails, or if all trials of a variant or a
    full-length run diverge."""
    check_existing_runs(study)
    study.folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(study.folder) as lock, session(study.folder) as note_time:
        progress, waiting = StudyProgress(time.monotonic(), target_steps(study)), pending_runs(study)
        progress.first, jobs = progress.done(), progress.jobs
        try:
            while jobs or waiting:
                while waiting and len(jobs) < study.settings.jobs:
                    jobs.append(start_job(waiting.pop(0), study, lock))
                show(progress.text)
                time.sleep(POLL_SECONDS)
                for job in [job for job in jobs if job.process.poll() is not None]:
                    jobs.remove(job)
                    note_time()
                    print_progress(end_message(job))
                    running = {job.run.folder for job in jobs}
                    waiting = [run for run in pending_runs(study) if run.folder not in running]
                    progress.wanted = target_steps(study)
        finally:
            stop_jobs(jobs, print_progress)
    return {name: best_rate(study, name) for name in study.names}


def end_message(job: Job) -> str:
    """Returns a sentence about how a run ended: done, stopped, or diverged. Raises ValueError if it failed for another
    reason, such as disk, memory or a signal."""
    run, code = job.run, job.process.returncode
    if code == 0 and is_done(run):
        return f"done: {run}, {run.steps} steps, held-out loss {loss_of(run):.4f}"
    if code == STOPPED:
        return f"stopped by a signal, continues: {run}"
    if code == 0:
        raise ValueError(f"{run} ended without all of its evaluations in metrics.jsonl: remove {run.folder}")
    if has_diverged(run):
        return f"diverged: {run}: {last_log_line(run.folder)}"
    raise ValueError(f"{run} has failed with exit code {code}: {last_log_line(run.folder)}")


def pending_runs(study: Study) -> list[StudyRun]:
    """Returns the runs to train: trials first, and a variant's full-length runs at its best learning rate once its
    trials are done.

    Raises ValueError if a full-length run, or every trial of a variant, has diverged."""
    trials, finals = list[StudyRun](), list[StudyRun]()
    for name in study.names:
        open_trials = [run for run in study.trials(name) if not is_done(run) and not has_diverged(run)]
        if open_trials:
            trials += open_trials
            continue
        long_runs = [run for run in study.finals(name, best_rate(study, name)) if not is_done(run)]
        for run in long_runs:
            if has_diverged(run):
                raise ValueError(
                    f"{run} has diverged after a trial that had not: {last_log_line(run.folder)}; leave its rate out "
                    "of learning_rates, or the variant out with --only"
                )
        finals += long_runs
    return trials + finals


def best_rate(study: Study, name: str) -> float:
    """Returns the learning rate of the variant `name` with the lowest held-out loss after `trial_steps`. Raises
    ValueError if all trials have diverged."""
    losses = {run.rate: loss_of(run) for run in study.trials(name) if is_done(run)}
    if not losses:
        first = study.trials(name)[0]
        raise ValueError(f"all learning rates of {name} have diverged, the first with: {last_log_line(first.folder)}")
    return min(losses, key=lambda rate: losses[rate])


def target_steps(study: Study) -> dict[Path, int]:
    """Returns the number of steps to train, by folder of a run. Until a variant's best learning rate is known, its
    full-length runs are counted at the first learning rate."""
    wanted: dict[Path, int] = {}
    for name in study.names:
        trials = [run for run in study.trials(name) if not has_diverged(run)]
        known = bool(trials) and all(is_done(run) for run in trials)
        rate = best_rate(study, name) if known else study.settings.learning_rates[0]
        wanted |= {run.folder: run.steps for run in [*trials, *study.finals(name, rate)]}
    return wanted


def done_variants(study: Study) -> list[str]:
    """Returns the variants that are trained to the end, in this session or an earlier one, in the study's order."""
    names = []
    for name in study.settings.variants:
        trials = study.trials(name)
        if all(is_done(run) or has_diverged(run) for run in trials) and any(is_done(run) for run in trials):
            names += [name] if all(map(is_done, study.finals(name, best_rate(study, name)))) else []
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def start_job(run: StudyRun, study: Study, lock: int) -> Job:
    """Starts `expert-parallel train` for a run, in a process session of its own, so that an interrupt from the terminal
    reaches only this process, which then stops the runs itself.

    The run's config has the SHA-256 of the data that earlier runs used, so that training refuses other data."""
    run.folder.mkdir(parents=True, exist_ok=True)
    data = run.config.data.model_copy(update={"sha256": run.config.data.sha256 or find_data_digest(study)})
    path = run.folder / "study.yaml"
    path.write_text(dump_config(run.config.model_copy(update={"data": data})))
    settings = [f"OMP_NUM_THREADS={study.settings.threads}", *ALLOCATOR]
    with (run.folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            ["env", *settings, sys.executable, "-m", "expert_parallel", "train", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
    return Job(run, process)


def stop_jobs(jobs: list[Job], print_progress: ProgressFn) -> None:
    """Asks all jobs to save at the end of their step and exit, and waits for them."""
    alive = [job for job in jobs if job.process.poll() is None]
    if alive:
        print_progress(f"stopping: {len(alive)} runs save and exit")
    for job in alive:
        job.process.send_signal(signal.SIGUSR1)
    for job in alive:
        try:
            job.process.wait(timeout=SAVE_SECONDS)
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()
