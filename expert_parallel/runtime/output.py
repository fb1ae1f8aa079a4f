"""Prints lines without ever failing, as training must not end because its output cannot be read."""

import logging
import os
import sys
from contextlib import suppress

logger = logging.getLogger(__name__)


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
        _discard_stdout()


def _discard_stdout() -> None:
    """Connects stdout with the null device, also for what is still buffered, which Python writes when it exits."""
    with suppress(OSError):  # a stdout without a file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
