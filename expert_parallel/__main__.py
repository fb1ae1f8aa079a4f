"""The entry point of `expert-parallel`, the same as `python -m expert_parallel`; the commands are in cli/app.py."""

import sys

from expert_parallel import __version__


def main() -> None:
    if sys.argv[1:] == ["--version"]:  # answered before the commands are imported: torch alone takes seconds
        print(f"expert-parallel {__version__}")
        return
    from expert_parallel.cli.app import app

    app()


if __name__ == "__main__":
    main()
