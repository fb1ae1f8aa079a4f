"""Log records: with the rank in them, where a user sends them; on the terminal, where the command line does."""

import logging
import os
import re
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expert_parallel.cli.app import app
from expert_parallel.cli.options import log_to_stderr
from expert_parallel.runtime.launchers import Launch
from expert_parallel.runtime.process import RankFilter, RuntimeConfig, UserError, distributed, warn_about_restarts
from tests.launches import LAUNCHER_VARIABLES, run_output, small_config, start
from tests.ranks import run_ranks

RESTARTS = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
PACKAGE = logging.getLogger("expert_parallel")


class Kept(logging.Handler):
    """A user's handler: what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(RankFilter())
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def __enter__(self) -> "Kept":
        PACKAGE.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        PACKAGE.removeHandler(self)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(LAUNCHER_VARIABLES):
            monkeypatch.delenv(name)


# ---------------------------------------------------------------------------------------------------------------------
# A user's own handler


def rank_of_a_record(rank: int) -> int | None:
    with Kept() as kept:
        logging.getLogger("expert_parallel.some.module").warning("word")
    return kept.records[0].rank  # type: ignore[attr-defined, no-any-return]


def test_a_record_has_the_rank() -> None:
    assert run_ranks(2, rank_of_a_record) == [0, 1]
    assert rank_of_a_record(0) is None, "torch.distributed does not run here"


def test_before_torch_distributed_runs_the_launchers_rank_is_in_it() -> None:
    with Kept() as kept:
        warn_about_restarts(Launch("torchrun", 0, 2), RESTARTS)
        warn_about_restarts(Launch("torchrun", 1, 2), RESTARTS)  # one rank is enough
    assert [record.rank for record in kept.records] == [0]  # type: ignore[attr-defined]
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in kept.records[0].getMessage()


@pytest.mark.usefixtures("no_launcher")
def test_a_users_handler_is_given_what_the_commands_print(capfd: pytest.CaptureFixture[str]) -> None:
    with Kept() as kept, pytest.raises(UserError), distributed(RuntimeConfig(device="cpu")) as runtime:
        runtime.run_on_all_ranks(lambda: int("x"))
    (record,) = kept.records
    assert (record.name, record.levelno, record.rank) == ("expert_parallel.runtime.process", logging.ERROR, 0)  # type: ignore[attr-defined]
    assert record.getMessage() == "invalid literal for int() with base 10: 'x'"
    assert capfd.readouterr().err == "", "it is where the user wants it, and there alone"


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_what_the_terminal_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """Errors as all commands say them; Python's warnings like our own. Afterwards all is as it was."""
    before = (list(PACKAGE.handlers), PACKAGE.level, warnings.showwarning)
    with log_to_stderr("warning"):
        logging.getLogger("expert_parallel.part").info("not shown")
        logging.getLogger("expert_parallel.part").warning("shown", extra={"rank": 3})
        logging.getLogger("expert_parallel.part").error("one sentence")
        warnings.warn_explicit("of Python", RuntimeWarning, "file.py", 7)
    assert capsys.readouterr().err.splitlines() == [
        "[rank 3] WARNING expert_parallel.part: shown",
        "error: one sentence",
        "WARNING py.warnings: file.py:7: RuntimeWarning: of Python",
    ]
    with log_to_stderr("error"):
        warnings.warn_explicit("of Python", RuntimeWarning, "file.py", 8)
    assert capsys.readouterr().err == ""
    assert (list(PACKAGE.handlers), PACKAGE.level, warnings.showwarning) == before


def test_warnings_that_the_caller_captures_stay_captured() -> None:
    logging.captureWarnings(True)
    captured = warnings.showwarning
    try:
        with log_to_stderr("warning"):
            assert warnings.showwarning is captured
        assert warnings.showwarning is captured
    finally:
        logging.captureWarnings(False)


def test_an_unknown_level_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(small_config(tmp_path)), "--log-level", "loud"])
    assert result.exit_code == 2
    assert "--log-level" in result.stderr


def test_the_level_holds_on_every_rank() -> None:
    output = run_output("torchrun")
    for rank in (0, 1):
        assert output.count(f"[rank {rank}] INFO expert_parallel.runtime.rendezvous: all ranks are here: ") == 1
        assert output.count(f"[rank {rank}] INFO expert_parallel.runtime.process: ready: gloo on cpu\n") == 1


def test_by_default_a_run_prints_its_progress_alone(tmp_path: Path) -> None:
    result = start("alone", "train", small_config(tmp_path), "parallel.ep=1", "training.schedule.warmup_steps=1")
    assert result.returncode == 0, result.output
    begins = [re.split("[ :]", line)[0] for line in result.output.splitlines()]
    assert begins == ["data", "ranks", *["step"] * 5, "saved", "done"], result.output
