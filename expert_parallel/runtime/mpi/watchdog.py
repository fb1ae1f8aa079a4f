"""A timeout for calls that have none: MPI waits for ever for a rank that does not come."""

import logging
import math
import threading
import time
from collections.abc import Callable

PERIOD_SECONDS = 0.5

logger = logging.getLogger(__name__)


class Watchdog:
    """A thread that looks at the call under way. on_timeout: what ends this process, and so the job."""

    def __init__(self, on_timeout: Callable[[], object]) -> None:
        self.on_timeout, self.deadline, self.call, self.seconds = on_timeout, math.inf, "", 0.0
        threading.Thread(target=self._watch, name="watch MPI", daemon=True).start()

    def watch(self, call: str, seconds: float) -> "Watchdog":
        """For `with`: what is done in it has so many seconds. call: its name, for the message."""
        self.call, self.seconds, self.deadline = call, seconds, time.monotonic() + seconds
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
