"""Checkpoint folders on disk: their names, how one becomes whole at a stroke, `latest`, and which of them stay.

checkpoints/step_00000100/     whole: it has a manifest from the moment that it has its name
            latest             a relative link to the newest; it never dangles
            partial_...        being written or removed: never taken for a checkpoint
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"
LATEST = "latest"
PARTIAL = "partial_"


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """The number in the name of a `step_` folder; None: another name."""
    match = re.fullmatch(r"step_(\d+)", path.absolute().name)
    return int(match.group(1)) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first, for whoever loads. ValueError where one has lost its manifest: to go on from an older one would be
    to lose steps in silence."""
    for path in folder.glob("step_*"):
        _refuse_lost(path)
    return whole_checkpoints(folder)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Those with a manifest, oldest first, for whoever saves: training does not stop for the loss of an old one."""
    numbered = [(step, path) for path in folder.glob("step_*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(numbered) if (path / MANIFEST).is_file()]


def find_checkpoint(path: Path) -> Path:
    """path: of a checkpoint, of a link to one, of a folder of checkpoints (then its newest) or of a run. ValueError if
    there is none, or one has lost its manifest."""
    if (path / MANIFEST).is_file():
        return path.resolve() if path.is_symlink() else path
    _refuse_lost(path.resolve())
    for folder in (path, path / "checkpoints"):
        if checkpoints := list_checkpoints(folder):
            return checkpoints[-1]
    raise ValueError(f"{path} holds no checkpoint" if path.is_dir() else f"there is no checkpoint {path}")


def new_partial(final: Path) -> Path:
    """An empty folder beside `final`, under a name that no earlier attempt has had."""
    partial = final.parent / f"{PARTIAL}{final.name}_{secrets.token_hex(4)}"
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, final: Path) -> None:
    """Gives a folder that is complete its name, by an atomic rename. ValueError where the name is taken: what stands
    there is not of this run, which would have gone on from it, or has lost its manifest since."""
    sync(partial)
    if os.path.lexists(final):
        raise ValueError(f"{final} exists already")
    partial.rename(final)
    sync(final.parent)


def point_to_newest(folder: Path) -> None:
    """Lets `latest` point to the newest, at a stroke. Called before others are removed."""
    latest, newest = folder / LATEST, whole_checkpoints(folder)
    if not newest:
        return
    if latest.is_dir() and not latest.is_symlink():  # a copy of a run whose links were followed
        shutil.rmtree(latest.rename(new_partial(latest) / LATEST).parent)
    link = folder / f"{PARTIAL}{LATEST}_{secrets.token_hex(4)}"
    link.symlink_to(newest[-1].name)
    link.replace(latest)
    sync(folder)


def prune(folder: Path, keep: int, keep_every: int | None) -> None:
    """Removes all but the newest `keep` and those whose step is a multiple of `keep_every`."""
    for path in whole_checkpoints(folder)[:-keep]:
        step = step_of(path)
        assert step is not None, path
        if keep_every is None or step % keep_every:
            doomed = path.rename(new_partial(path) / path.name)  # at no moment is half of it taken for whole
            shutil.rmtree(doomed.parent)


def remove_partial(folder: Path) -> None:
    """What earlier attempts left behind. Nobody may be writing."""
    for path in folder.glob(f"{PARTIAL}*"):
        if path.is_symlink():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """A small file, there whole or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    with naming(path):
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk is noticed by a write that knows no name: its OSError gets that of the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_lost(path: Path) -> None:
    """Ours have a manifest before they have their name, so it was there. A run may be removing old ones right now: they
    are gone at a stroke, hence the second look."""
    if step_of(path) is not None and not (path / MANIFEST).is_file() and os.path.lexists(path):
        raise ValueError(f"{path} has no {MANIFEST}: restore it or remove the folder")
