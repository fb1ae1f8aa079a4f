"""Manages a study's folder: tells which of its runs are done, locks it against a second study, and records how long
each execution of the command (session) took."""

import fcntl
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from expert_parallel.checkpoint.files import list_checkpoints
from expert_parallel.checkpoint.folders import write_atomically
from expert_parallel.settings import changed_settings
from expert_parallel.study.curves import Curve, read_curve
from expert_parallel.study.definition import Study, StudyRun
from expert_parallel.training.config import Config, load_config

# Settings of a run that may differ from the study's, since no loss depends on them.
IGNORED_SETTINGS = ("training.steps", "data.sha256", "data.end_id", "run.log_every", "checkpoint.")


def is_done(run: StudyRun) -> bool:
    """Returns True if metrics.jsonl has every evaluation up to the run's number of steps, and a checkpoint of that step
    or a later one exists."""
    checkpoints = list_checkpoints(run.folder / "checkpoints")
    if not checkpoints or int(checkpoints[-1].name.rpartition("_")[2]) < run.steps:
        return False
    return set(range(0, run.steps + 1, run.config.evaluation.every)) <= set(read_curve(run.folder).steps)


def has_diverged(run: StudyRun) -> bool:
    """Returns True if the run's log ends with the error that training raises when the loss is not finite. Training is
    deterministic, so repeating the run would not help."""
    return re.match(r"error: step \d+: the loss is ", last_log_line(run.folder)) is not None


def curve_of(run: StudyRun) -> Curve:
    """Returns the held-out losses of the run up to its number of steps."""
    return read_curve(run.folder).until(run.steps)


def loss_of(run: StudyRun) -> float:
    """Returns the held-out loss after the run's number of steps."""
    return read_curve(run.folder).at(run.steps)


def last_log_line(folder: Path) -> str:
    """Returns the last line of the log of the run in `folder` that is not indented, as details of an error are,
    followed by the log's path."""
    path = folder / "log.txt"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    lines = [line for line in lines if line.strip() and not line.startswith(" ")]
    return f"{lines[-1].strip() if lines else 'the log is empty'} ({path})"


def check_existing_runs(study: Study) -> None:
    """Raises ValueError if a folder that this study would use holds a run with other settings, or if runs had different
    data."""
    for run in study.all_runs():
        then = saved_config(run)
        if then is None:
            continue
        changes = changed_settings(then.model_dump(mode="json"), run.config.model_dump(mode="json"))
        if others := [change for change in changes if not change[0].startswith(IGNORED_SETTINGS)]:
            setting, old, new = others[0]
            raise ValueError(
                f"{run.folder} holds a run of another study: {setting} is {old!r} there and {new!r} here; choose "
                "another folder, or remove that run"
            )
    find_data_digest(study)


def find_data_digest(study: Study) -> str | None:
    """Returns the SHA-256 of the data that the study's runs were trained on; None before the first run. Raises
    ValueError if the runs' data differ."""
    found = {config.data.sha256: run.folder for run in study.all_runs() if (config := saved_config(run)) is not None}
    found.pop(None, None)
    if len(found) > 1:
        (one, here), (other, there) = list(found.items())[:2]
        raise ValueError(
            f"the text has changed between runs of this study: data.sha256 is {one} in {here} and {other} in {there}"
        )
    return next(iter(found), None)


def saved_config(run: StudyRun) -> Config | None:
    """Returns the config in the run's folder, None where there is none."""
    path = run.folder / "config.yaml"
    return load_config(path) if path.exists() else None


@contextmanager
def lock_folder(folder: Path) -> Iterator[int]:
    """Locks a folder in the body of a `with` statement, and yields the lock's file descriptor, for training processes
    to inherit: the lock is held as long as one of them lives, even after this process. Raises ValueError if another
    process holds it."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another study, or a run that outlived one, holds the lock of {folder}") from None
        yield file.fileno()


# ---------------------------------------------------------------------------------------------------------------------
# Sessions


class Session(BaseModel):
    """Records one execution of `expert-parallel study`. began: seconds since 1970. seconds: its duration. commit: of
    the sources."""

    began: float
    seconds: float
    commit: str


Sessions = TypeAdapter(list[Session])


def read_sessions(folder: Path) -> list[Session]:
    """Reads all executions recorded in the folder. Raises ValueError if the file is damaged."""
    path = folder / "sittings.json"
    try:
        return Sessions.validate_json(path.read_bytes()) if path.exists() else []
    except ValidationError as error:
        raise ValueError(
            f"{path} is damaged ({error.error_count()} errors); remove it: it is only used to count hours"
        ) from None


@contextmanager
def session(folder: Path) -> Iterator[Callable[[], None]]:
    """Records the duration and commit of this execution in the folder when the body of the `with` statement ends.
    Yields a function that records the duration so far, to be called now and then in case the process is killed."""
    earlier, begin = read_sessions(folder), time.time()
    commit = find_commit()

    def note() -> None:
        now = Session(began=begin, seconds=time.time() - begin, commit=commit)
        write_atomically(folder / "sittings.json", Sessions.dump_json([*earlier, now], indent=1).decode() + "\n")

    try:
        yield note
    finally:
        note()


def find_commit() -> str:
    """Returns the commit of this package's sources, 'unknown' where they are no git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
