"""Manages a study's folder: which of its runs are done, a lock against a second study, and the time that all sessions
took."""

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
    """Returns True if the run has every evaluation up to its number of steps, and a checkpoint of that step or a later
    one."""
    checkpoints = list_checkpoints(run.folder / "checkpoints")
    if not checkpoints or int(checkpoints[-1].name.rpartition("_")[2]) < run.steps:
        return False
    return set(range(0, run.steps + 1, run.config.evaluation.every)) <= set(read_curve(run.folder).steps)


def has_diverged(run: StudyRun) -> bool:
    """Returns True if the run's log ends with a loss that is not finite (training/loop.py), which a repetition would
    give again."""
    return re.match(r"error: step \d+: the loss is ", last_log_line(run.folder)) is not None


def curve_of(run: StudyRun) -> Curve:
    """Returns the run's held-out losses up to its number of steps."""
    return read_curve(run.folder).until(run.steps)


def loss_of(run: StudyRun) -> float:
    """Returns the held-out loss after the run's number of steps."""
    return read_curve(run.folder).at(run.steps)


def last_log_line(folder: Path) -> str:
    """Returns the last line of a run's log, with the log's path."""
    path = folder / "log.txt"
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
    return f"{lines[-1].strip() if lines else 'the log is empty'} ({path})"


def check_existing_runs(study: Study) -> None:
    """Raises ValueError where a run's folder holds a run with other settings or other data."""
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
    """Returns the digest of the data that the runs were trained on, None before the first. Raises ValueError where they
    differ."""
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
    """Locks a folder and yields the lock's file descriptor, for the runs to inherit: the lock is held as long as one of
    them lives, even after this process. Raises ValueError where another process holds it."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another study, or a run that outlived one, holds the lock of {folder}") from None
        yield file.fileno()


# ---------------------------------------------------------------------------------------------------------------------
# Sessions


class Session(BaseModel):
    """Holds one session of the command. began: seconds since 1970."""

    began: float
    seconds: float
    commit: str


Sessions = TypeAdapter(list[Session])


def read_sessions(folder: Path) -> list[Session]:
    """Reads all sessions of the folder. Raises ValueError where the file is damaged."""
    path = folder / "sittings.json"
    try:
        return Sessions.validate_json(path.read_bytes()) if path.exists() else []
    except ValidationError as error:
        raise ValueError(
            f"{path} is damaged ({error.error_count()} errors); remove it: it is only used to count hours"
        ) from None


@contextmanager
def session(folder: Path) -> Iterator[Callable[[], None]]:
    """Appends this session's duration and commit to the folder's file at the end. Yields a function that writes them so
    far, to be called now and then in case the session is killed."""
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
