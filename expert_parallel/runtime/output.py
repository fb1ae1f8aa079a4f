"""Prints lines without ever failing, as training must not end because its output cannot be read; and ends the commands
whose only purpose is their output, without a traceback, when nobody can read it."""

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

logger = logging.getLogger(__name__)

READER_GONE = 141  # the exit code of a program that the signal SIGPIPE ended, in a shell: 128 + 13
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def print_line(text: str) -> None:
    """Prints text and a line break to stdout in one write.

    Characters that the encoding of stdout lacks become question marks. If stdout cannot be written, because a pipe was
    closed or a disk is full, a warning is logged once, and this and all later output is discarded.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    line = f"{text}\n".encode(encoding, "replace").decode(encoding)
    try:
        print(line, end="", flush=True)
    except OSError as error:
        logger.warning("stdout cannot be written (%s): the process continues and prints nothing more", error.strerror)
        discard_stdout()


def discard_stdout() -> None:
    """Connects stdout with the null device, also for what is still buffered, which Python writes when it exits."""
    with suppress(OSError):  # a stdout without a file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextmanager
def exit_if_unreadable() -> Iterator[None]:
    """Exits quietly with code 141 if stdout is a closed pipe, and with code 1 and one sentence if a disk is full.

    Characters that the encoding of stdout lacks become question marks. What is buffered is written before leaving, so
    that an error of the last lines is not found after Python's exit code is set.
    """
    with suppress(AttributeError):  # a stdout that is no text file, as in notebooks
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
        sys.exit(READER_GONE)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        discard_stdout()
        print(f"error: {error.filename or 'output'} cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)
