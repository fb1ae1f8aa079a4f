"""Options of all tests. Hypothesis measures no times: shared machines can be slow."""

import time

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--within", type=float, metavar="SECONDS", help="skip what has not begun by then, and say so")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("--within")
    if seconds is not None and time.monotonic() > item.config.stash[BEGAN] + seconds:
        pytest.skip(f"not begun within {seconds:g} s (--within)")


BEGAN = pytest.StashKey[float]()
