"""Gives a run folder one owner at a time: two jobs that train in one folder would mix their metrics and checkpoints.

Rank 0 writes `owner.json`, with its machine, process and start, and a counter that a thread increases every
BEAT_SECONDS. A process that finds the file is refused while the owner lives, and takes over the folder otherwise:

    on the same machine     at once, as the system knows whether the process lives
    on another machine      when the counter has not changed for STALE_SECONDS; no clocks are compared

The folder may lie on a file system that machines share; nothing but creating, reading and replacing files is needed.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

from expert_parallel.runtime.process import Runtime

logger = logging.getLogger(__name__)

FILE = "owner.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 3 * BEAT_SECONDS
UNNAMED = "a process whose name cannot be read"  # an owner.json that is damaged or still being written


class Owner(BaseModel):
    """Identifies the process that trains in a folder.

    id: random. machine: the boot and the process namespace in which `pid` is meant. process_start: when the process
    started, in the system's ticks, as a process number may be used again; None where the system does not tell. since:
    when it took the folder, for people. beats: the counter.
    """

    id: str
    host: str
    machine: str
    pid: int
    process_start: int | None
    since: str
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def own_run_folder(folder: Path, runtime: Runtime) -> Iterator[None]:
    """Owns the run folder inside the context. A collective.

    Raises a UserError on all ranks if a process that lives owns the folder, or if the folder cannot be written.
    """
    lock = runtime.run_on_all_ranks(lambda: RunLock(folder) if runtime.rank == 0 else None)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


class RunLock:
    """Owns a run folder from its creation to `release`.

    Raises a ValueError if a process that lives owns the folder, or if the folder cannot be written. May wait for
    STALE_SECONDS. If another process takes over the folder, since this one was suspended for longer, this process ends.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.owner = _this_process()
        self.is_new = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._take_over()
        except OSError as error:
            raise ValueError(f"run.folder: cannot write to {folder}: {error.strerror or error}") from error
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Removes the file, if it is still this owner's, and a new folder in which nothing else was written."""
        self._released.set()
        self._thread.join()
        if _read(self.path) == self.owner:
            self.path.unlink(missing_ok=True)
        if self.is_new:
            with suppress(OSError):  # the folder is not empty
                self.path.parent.rmdir()

    def _create(self) -> bool:
        """Creates the file. Returns False if there is one, unless it is this owner's."""
        try:
            with self.path.open("x") as file:
                file.write(self.owner.model_dump_json())
        except FileExistsError:
            found = _read(self.path)
            return found is not None and found.id == self.owner.id
        return True

    def _take_over(self) -> None:
        """Replaces the file of an owner that does not live. Raises a ValueError if the owner lives."""
        folder = self.path.parent
        other = _read(self.path)
        if other is not None and other.machine == self.owner.machine:
            is_alive = _start_of(other.pid) == other.process_start
        else:
            logger.warning(
                "run.folder: %s is used by %s; waiting %g s for a sign of life", folder, other or UNNAMED, STALE_SECONDS
            )
            is_alive = self._beats(other)
        found = _read(self.path)
        if is_alive:
            raise ValueError(
                f"run.folder: {folder} is being trained by {found or other or UNNAMED}; choose another run.folder, or "
                "end that run first"
            )
        if found != other:
            return  # it was released, or another process has taken over: look again
        logger.warning("run.folder: taking over %s from %s, which has ended", folder, other or UNNAMED)
        self._replace()
        time.sleep(0.5)  # if two processes took over at the same time, the file is the second's, and the first sees it

    def _beats(self, other: Owner | None) -> bool:
        """Returns True if the file changes within STALE_SECONDS, to the file of any living owner."""
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE_SECONDS / 10))
            if (now := _read(self.path)) != other:
                return now is not None
        return False

    def _beat(self) -> None:
        """Increases the counter until the folder is released. Runs in a thread."""
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):  # a file system that is away for a while; the next beat counts
                found = _read(self.path)
                if found is not None and found.id != self.owner.id:
                    # The other process writes here now: whatever this one still wrote would be mixed with it.
                    print(
                        f"error: run.folder: {found} has taken over {self.path.parent} from this process, which gave "
                        f"no sign of life for {STALE_SECONDS:g} s",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)
                self.owner = self.owner.model_copy(update={"beats": self.owner.beats + 1})
                self._replace()

    def _replace(self) -> None:
        """Writes the file atomically, by a draft of this owner's own, as several may write at the same time."""
        draft = self.path.with_name(f"{FILE}.{self.owner.id}")
        draft.write_text(self.owner.model_dump_json())
        draft.replace(self.path)


def _this_process() -> Owner:
    return Owner(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process_start=_start_of(os.getpid()),
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def _machine() -> str:
    """Returns the host, and on Linux its boot and the process namespace, which differs between containers."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_of(pid: int) -> int | None:
    """Returns when a process started, in ticks since boot; -1 if there is none; None where the system does not tell."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return -1
        except PermissionError:
            pass
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    state, *fields = stat.rpartition(")")[2].split()
    return -1 if state in "ZX" else int(fields[18])  # a zombie has ended


def _read(path: Path) -> Owner | None:
    """Returns the owner in the file; None if there is no file, or one that is damaged or still being written."""
    try:
        return Owner.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError):
        return None
