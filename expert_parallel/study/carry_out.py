"""Training the runs of a study, some at a time, each in a process of its own, until all are done.

What is done is read from the runs' folders, so a study that was stopped goes on where it was; a run that was stopped
goes on from its newest checkpoint.
"""

import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from expert_parallel.checkpoint.config import changed_settings
from expert_parallel.checkpoint.files import list_checkpoints
from expert_parallel.config import dump_config, load_config
from expert_parallel.study.curves import Curve, read_curve, steps_done
from expert_parallel.study.plan import Run, Study

POLL_SECONDS = 2.0
FREE = ("training.steps", "data.sha256", "data.end_id")  # what a run's own config may say otherwise than the study's
# As launch/train.sh has them: the C library keeps blocks that are freed, instead of faulting them in again and again.
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_=1073741824", "MALLOC_TRIM_THRESHOLD_=1073741824", "MALLOC_TOP_PAD_=67108864")


@dataclass(frozen=True)
class Job:
    run: Run
    process: subprocess.Popen[bytes]


@dataclass
class Progress:
    """done, total: steps of all runs; first: those that were done when this sitting began, `seconds` ago."""

    total: int
    done: int = 0
    first: int = 0
    seconds: float = 0.0
    jobs: list[Job] = field(default_factory=list)

    def __str__(self) -> str:
        rate = (self.done - self.first) / self.seconds if self.seconds > 0 else 0.0
        left = f"about {(self.total - self.done) / rate / 60:.0f} min left" if rate > 0 else "time left not known yet"
        lines = [f"{self.done:,} of {self.total:,} steps, {self.done / self.total:.0%}; {left}"]
        for job in self.jobs:
            done, curve = steps_done(job.run.folder), read_curve(job.run.folder)
            loss = f", held-out loss {curve.final:.4f}" if curve.steps else ""
            lines.append(f"  {job.run}: step {done} of {job.run.steps}{loss}")
        return "\n".join(lines)


def carry_out(study: Study, say: Callable[[str], None], show: Callable[[str], None]) -> dict[str, float]:
    """Trains what is left to train; returns the learning rate of each variant. show: how far it is, every POLL_SECONDS.
    ValueError where a folder holds another study's run, where another process works in it, or where a run fails that
    the study cannot do without."""
    refuse_others(study)
    study.folder.mkdir(parents=True, exist_ok=True)
    failed: set[Path] = set()
    with only_one(study.folder) as lock, sitting(study.folder) as note_time:
        begin, jobs = time.perf_counter(), list[Job]()
        first, waiting = _steps(study, failed)[0], left_to_do(study, failed)
        try:
            while jobs or waiting:
                free = study.settings.jobs - len(jobs)
                jobs, waiting = [*jobs, *(start(run, study, lock) for run in waiting[:free])], waiting[free:]
                done, total = _steps(study, failed)
                show(str(Progress(total, done, first, time.perf_counter() - begin, jobs)))
                time.sleep(POLL_SECONDS)
                for job in [job for job in jobs if job.process.poll() is not None]:
                    jobs.remove(job)
                    note_time()
                    if job.process.returncode == 0:
                        say(f"done: {job.run}, {job.run.steps} steps, held-out loss {_loss(job.run):.4f}")
                    else:
                        failed.add(job.run.folder)
                        say(f"failed: {job.run}: {last_words(job.run.folder)}")
                    running = {job.run.folder for job in jobs}
                    waiting = [run for run in left_to_do(study, failed) if run.folder not in running]
        finally:
            stop(jobs)
    return {name: best_rate(study, name, failed) for name in study.names}


def left_to_do(study: Study, failed: set[Path]) -> list[Run]:
    """Trials first; the long runs of a variant once all of its trials are done. ValueError where a long run, or every
    trial of a variant, has failed."""
    trials, finals = list[Run](), list[Run]()
    for name in study.names:
        open_trials = [run for run in study.trials(name) if not is_done(run) and run.folder not in failed]
        if open_trials:
            trials += open_trials
            continue
        long_runs = study.finals(name, best_rate(study, name, failed))
        for run in long_runs:
            if run.folder in failed:
                raise ValueError(f"{run} has failed: {last_words(run.folder)}")
        finals += [run for run in long_runs if not is_done(run)]
    return trials + finals


def best_rate(study: Study, name: str, failed: set[Path]) -> float:
    """That of the lowest held-out loss after `trial_steps`; ValueError where no trial has come so far."""
    losses = {run.rate: _loss(run) for run in study.trials(name) if run.folder not in failed}
    if not losses:
        trial = study.trials(name)[0]
        raise ValueError(f"all learning rates of {name} have failed, the first so: {last_words(trial.folder)}")
    return min(losses, key=lambda rate: losses[rate])


def is_done(run: Run) -> bool:
    """Whether it was evaluated after its steps, and saved then or later."""
    checkpoints = list_checkpoints(run.folder / "checkpoints")
    return run.steps in read_curve(run.folder).steps and bool(checkpoints) and _step_of(checkpoints[-1]) >= run.steps


def curve_of(run: Run) -> Curve:
    return read_curve(run.folder).until(run.steps)


def _loss(run: Run) -> float:
    return read_curve(run.folder).at(run.steps)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("_")[2])


def _steps(study: Study, failed: set[Path]) -> tuple[int, int]:
    """(done, in all). Before a variant's rate is known, its long runs are counted as if it were the first."""
    done = total = 0
    for name in study.names:
        trials = study.trials(name)
        known = all(is_done(run) or run.folder in failed for run in trials)
        longest = study.finals(name, best_rate(study, name, failed) if known else trials[0].rate)
        steps = {run.folder: run.steps for run in [*trials, *longest] if run.folder not in failed}
        total += sum(steps.values())
        done += sum(min(steps_done(folder), wanted) for folder, wanted in steps.items())
    return done, total


# ---------------------------------------------------------------------------------------------------------------------
# One run


def start(run: Run, study: Study, lock: int) -> Job:
    """`expert-parallel train` in a session of its own: an interrupt from the terminal is the study's to pass on."""
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "study.yaml"
    path.write_text(dump_config(run.config))
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


def stop(jobs: list[Job]) -> None:
    """Each saves at the end of its step, and leaves."""
    for job in jobs:
        if job.process.poll() is None:
            job.process.send_signal(signal.SIGUSR1)
    for job in jobs:
        try:
            job.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


def last_words(folder: Path) -> str:
    """Of a run that has failed."""
    path = folder / "log.txt"
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
    return f"{lines[-1].strip() if lines else 'it said nothing'} ({path})"


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def refuse_others(study: Study) -> None:
    """ValueError where a run's folder holds one with other settings: its losses would be of another study."""
    for name in study.names:
        for rate in study.settings.learning_rates:
            for run in study.finals(name, rate):
                if not (path := run.folder / "config.yaml").exists():
                    continue
                then, now = load_config(path).model_dump(mode="json"), run.config.model_dump(mode="json")
                others = [change for change in changed_settings(then, now) if change[0] not in FREE]
                if others:
                    setting, old, new = others[0]
                    raise ValueError(
                        f"{run.folder} holds a run of another study: {setting} is {old!r} there and {new!r} here; "
                        "choose another folder, or remove that run"
                    )


@contextmanager
def only_one(folder: Path) -> Iterator[int]:
    """The lock of a folder, which the runs inherit: it is held as long as one of them lives, whatever becomes of us."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another study, or a run that one has left behind, works in {folder}") from None
        yield file.fileno()


class Sitting(BaseModel):
    """began: seconds since 1970."""

    began: float
    seconds: float
    commit: str


Sittings = TypeAdapter(list[Sitting])


def read_sittings(folder: Path) -> list[Sitting]:
    path = folder / "sittings.json"
    return Sittings.validate_json(path.read_bytes()) if path.exists() else []


@contextmanager
def sitting(folder: Path) -> Iterator[Callable[[], None]]:
    """Notes how long this sitting takes and of which commit it is, in a file that keeps those of before; call what it
    yields now and then, for a sitting that is cut off."""
    before, begin, commit = read_sittings(folder), time.time(), find_commit()

    def note() -> None:
        now = Sitting(began=begin, seconds=time.time() - begin, commit=commit)
        (folder / "sittings.json").write_bytes(Sittings.dump_json([*before, now], indent=1) + b"\n")

    try:
        yield note
    finally:
        note()


def find_commit() -> str:
    """Of this package's sources; 'unknown' where they are no git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
