"""Runs torchrun, `python -m expert_parallel.runtime.torchrun ARGUMENTS`, so that a rank's own error is the last that is
read: torchrun's traceback and table of failures do not follow it.

Exit code: that of the rank that failed first; 1 if a signal ended it.
"""

import logging
import re
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# The logger of torchrun's lines about ranks that have ended.
LOGGER = "torch.distributed.elastic.multiprocessing.api"


def main() -> None:
    """Runs torchrun with the arguments of the command line."""
    logging.getLogger(LOGGER).addFilter(is_news)
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        if message := closing_message(error):
            print(f"error: {message}", file=sys.stderr)
        sys.exit(max(1, error.get_first_failure()[1].exitcode))


def is_news(record: logging.LogRecord) -> bool:
    """Returns False for torchrun's lines about ranks that have printed their own error, and ranks that it ends for
    that."""
    return re.search(r"failed \(exitcode: [1-9]|closing signal SIGTERM", record.getMessage()) is None


def closing_message(error: ChildFailedError) -> str:
    """Returns what to print last: "" if a rank of this node has printed it already."""
    rank, failure = error.get_first_failure()
    left = failure.error_file_data["message"]
    if isinstance(left, dict):  # the rank has left its error in a file (error_file.py)
        return "" if 0 in error.failures else str(left["message"])  # rank 0 prints what all ranks refuse
    if failure.exitcode >= 0:
        return (
            f"rank {rank} (process {failure.pid}) has ended with exit code {failure.exitcode}; its own error is above"
        )
    name = failure.signal_name()
    hint = (
        ": the kernel does so when memory runs out, which `dmesg` shows" if -failure.exitcode == signal.SIGKILL else ""
    )
    return f"rank {rank} (process {failure.pid}) was ended by {name}{hint}"


if __name__ == "__main__":
    main()
