"""Options of all tests. Hypothesis measures no times: shared machines can be slow."""

import os
import shutil
import tempfile
import time

import pytest
from hypothesis import settings

# Files that take long, longest first. Each runs as a whole on one worker; a long one that began last would be waited
# for by all others.
LONG_FILES = (
    "test_training",
    "test_engine_deepspeed",
    "test_systems",
    "test_command_line",
    "test_dispatch",
    "test_traffic",
    "test_study",
    "test_verify",
    "test_start_faults",
    "test_checkpoint",
    "test_generation",
    "test_attention_layouts",
    "test_kernels",
    "test_interop",
    "test_old_files",
    "test_checkpoint_save",
    "test_scope",
    "test_logging",
    "test_expert_tensor",
    "test_overlap",
    "test_interop_layouts",
)
BEGAN = pytest.StashKey[float]()

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--within", type=float, metavar="SECONDS", help="skip what has not begun by then, and say so")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = time.monotonic()
    if not hasattr(config, "workerinput"):  # the workers of pytest-xdist inherit it
        os.environ["EP_TESTS_SHARED_FOLDER"] = tempfile.mkdtemp(prefix="expert-parallel-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["EP_TESTS_SHARED_FOLDER"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("--within")
    if seconds is not None and time.monotonic() > item.config.stash[BEGAN] + seconds:
        pytest.skip(f"not begun within {seconds:g} s (--within)")
