"""Starts the command line, as `expert-parallel` or `python -m expert_parallel`; cli/app.py has the commands."""

import os
import sys

from expert_parallel import __version__


def main() -> None:
    """Runs the command line. `--version` is answered before importing the commands, as torch alone takes seconds."""
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
