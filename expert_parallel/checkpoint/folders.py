"""Manages the folders of checkpoints: their names, atomic renames, the link `latest`, and which ones to keep.

checkpoints/step_00000100/     complete: it gets this name only after its manifest is written
            latest             a relative link to the newest checkpoint; it never dangles
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


def parse_step(path: Path) -> int | None:
    """Returns the step in the name of a `step_` folder, or None for any other name."""
    match = re.fullmatch(r"step_(\d+)", path.absolute().name)
    return int(match.group(1)) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Lists the complete checkpoints of a folder for loading, oldest first.

    Raises ValueError if one has lost its manifest: resuming from an older one would silently lose steps.
    """
    for path in folder.glob("step_*"):
        _require_manifest(path)
    return complete_checkpoints(folder)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Lists the checkpoints that have a manifest, oldest first.

    Saving uses it: training does not stop because an old checkpoint is damaged.
    """
    numbered = [(step, path) for path in folder.glob("step_*") if (step := parse_step(path)) is not None]
    return [path for _, path in sorted(numbered) if (path / MANIFEST).is_file()]


def find_checkpoint(path: Path) -> Path:
    """Returns the folder of the checkpoint that a path stands for.

    path: a checkpoint's folder, a link to one, or a folder of checkpoints or a run's folder, of which the newest
    checkpoint is taken. Raises ValueError if there is none, or if one has lost its manifest.
    """
    if (path / MANIFEST).is_file():
        return path.resolve() if path.is_symlink() else path
    _require_manifest(path.resolve())
    for folder in (path, path / "checkpoints"):
        if checkpoints := list_checkpoints(folder):
            return checkpoints[-1]
    raise ValueError(f"{path} holds no checkpoint" if path.is_dir() else f"there is no checkpoint {path}")


def make_partial_folder(final: Path) -> Path:
    """Creates an empty folder next to `final`, under a name that no earlier attempt has used, and returns its path."""
    partial = final.parent / f"{PARTIAL}{final.name}_{secrets.token_hex(4)}"
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, final: Path) -> None:
    """Renames a complete folder to its final name, atomically.

    Raises ValueError if the name is taken: that folder belongs to another run (this one would have resumed from it), or
    has lost its manifest since.
    """
    fsync_folder(partial)
    if os.path.lexists(final):
        raise ValueError(f"{final} exists already")
    partial.rename(final)
    fsync_folder(final.parent)


def update_latest_link(folder: Path) -> None:
    """Makes the link `latest` point to the newest checkpoint, atomically. Call it before older checkpoints are
    removed."""
    latest, newest = folder / LATEST, complete_checkpoints(folder)
    if not newest:
        return
    if latest.is_dir() and not latest.is_symlink():  # a copy of a run made with links followed
        shutil.rmtree(latest.rename(make_partial_folder(latest) / LATEST).parent)
    link = folder / f"{PARTIAL}{LATEST}_{secrets.token_hex(4)}"
    link.symlink_to(newest[-1].name)
    link.replace(latest)
    fsync_folder(folder)


def prune(folder: Path, keep: int, keep_every: int | None) -> None:
    """Removes all checkpoints but the newest `keep` and those whose step is a multiple of `keep_every`."""
    for path in complete_checkpoints(folder)[:-keep]:
        step = parse_step(path)
        assert step is not None, path
        if keep_every is None or step % keep_every:
            removed = path.rename(
                make_partial_folder(path) / path.name
            )  # so that a half-removed one never counts as complete
            shutil.rmtree(removed.parent)


def remove_partial_folders(folder: Path) -> None:
    """Removes the partial folders and links that interrupted saves have left. No save may be in progress."""
    for path in folder.glob(f"{PARTIAL}*"):
        if path.is_symlink():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file atomically: readers see the old content or the new one."""
    draft = path.with_name(f"{path.name}.draft")
    with add_path_to_oserror(path):
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)


@contextmanager
def add_path_to_oserror(path: Path) -> Iterator[None]:
    """Re-raises an OSError of its body with the file's path, which the error of a write to a full disk lacks."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def fsync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that renames survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_manifest(path: Path) -> None:
    """Raises ValueError if a `step_` folder has no manifest.

    A checkpoint gets its name only after its manifest is written, so the manifest was lost. The folder may also have
    been pruned between the two look-ups; hence `lexists`.
    """
    if parse_step(path) is not None and not (path / MANIFEST).is_file() and os.path.lexists(path):
        raise ValueError(f"{path} has no {MANIFEST}: restore it or remove the folder")
