"""Stopping a run from outside: after SIGUSR1 at any rank, all ranks save and leave at the end of the step.

Batch systems send it before a job's time is up (Slurm: `--signal=USR1@300`). SIGTERM is left alone: launchers send it
to the ranks that are left when one has died, which can save nothing.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from expert_parallel.parallel.collectives import anywhere

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, try again


@dataclass
class StopSignal:
    """received: by this rank. A signal that comes while the ranks still meet counts, too."""

    received: bool = False

    def anywhere(self) -> bool:
        """Whether a rank has received it. Every rank asks, at the same step."""
        return anywhere(self.received)


@contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    stop = StopSignal()

    def receive(number: int, frame: FrameType | None) -> None:
        stop.received = True

    before = signal.signal(signal.SIGUSR1, receive)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGUSR1, before)
