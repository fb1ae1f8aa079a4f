"""Adds a timeout to MPI calls, which have none: they wait for a missing rank for ever."""

import logging
import math
import threading
import time
from collections.abc import Callable

PERIOD_SECONDS = 0.5

logger = logging.getLogger(__name__)


class Watchdog:
    """Watches, from a thread, whether the MPI call in progress exceeds its time. on_timeout: called once if it does; it
    must end the process."""

    def __init__(self, on_timeout: Callable[[], object]) -> None:
        self.on_timeout = on_timeout
        self.deadline = math.inf
        self.call = ""
        self.seconds = 0.0
        threading.Thread(target=self._watch, name="watch MPI", daemon=True).start()

    def watch(self, call: str, seconds: float) -> "Watchdog":
        """Returns a context manager whose body must end within `seconds`. call: its name, for the message."""
        self.call = call
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.deadline = math.inf

    def _watch(self) -> None:
        while time.monotonic() < self.deadline:
            time.sleep(PERIOD_SECONDS)
        logger.critical(
            "%s was not done within %g s (runtime.timeout_seconds): another rank hangs, or does something else",
            self.call,
            self.seconds,
        )
        self.on_timeout()
