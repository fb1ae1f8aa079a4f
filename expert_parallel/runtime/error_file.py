"""Tells torchrun why a rank has failed, and a rank that torchrun has started again that it would fail as before.

torchrun names a file for each process, `.../attempt_<restart>/<local rank>/error.json`, in TORCHELASTIC_ERROR_FILE, and
shows the message that a process leaves there. Nothing here imports torch, so that a restart which can only fail again
takes milliseconds.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "TORCHELASTIC_ERROR_FILE"


def write_error_file(message: str, *, is_permanent: bool) -> None:
    """Leaves the message of the error that ends this process for torchrun; does nothing without torchrun.

    is_permanent: True if the same command would meet the error again.
    """
    if (path := _error_file()) is not None:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        content = {"message": {"message": message, "extraInfo": extra}, "is_permanent": is_permanent}
        with suppress(OSError):  # torchrun then reports the exit code alone
            path.write_text(json.dumps(content), encoding="utf-8")


def repeats_permanent_error() -> bool:
    """Returns True if torchrun has started this process again after a permanent error of the same process, whose
    message is then this process's, too."""
    if (path := _error_file()) is None:
        return False
    for earlier in path.parents[2].glob(f"attempt_*/{path.parent.name}/{path.name}"):
        with suppress(OSError, ValueError):
            text = earlier.read_text(encoding="utf-8")
            if json.loads(text).get("is_permanent"):
                path.write_text(text, encoding="utf-8")
                return True
    return False


def _error_file() -> Path | None:
    """Returns the file that torchrun reads when this process has ended; None without torchrun, or if it keeps none."""
    path = Path(os.environ.get(VARIABLE, ""))
    return path if path.parent.parent.name.startswith("attempt_") else None
