"""Starts the command line, as `expert-parallel` or `python -m expert_parallel`; cli/app.py has the commands."""

import os
import sys

from expert_parallel import __version__
from expert_parallel.runtime.error_file import repeats_permanent_error


def main() -> None:
    """Runs the command line. `--version`, and torchrun's restarts that would fail as before, end before the commands
    are imported, as torch alone takes seconds."""
    if repeats_permanent_error():
        sys.exit(2)  # in silence: the first attempt has printed its error
    if sys.argv[1:] == ["--version"]:
        try:
            print(f"expert-parallel {__version__}", flush=True)
        except BrokenPipeError:  # nobody reads: discard what Python would flush again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    from expert_parallel.cli.app import app

    app()


if __name__ == "__main__":
    main()
