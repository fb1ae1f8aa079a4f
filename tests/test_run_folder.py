"""A run folder has one owner at a time, a copied run trains in its own folder, and no output can end a run."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from expert_parallel.cli.app import app
from expert_parallel.training import run_lock
from expert_parallel.training.config import load_config
from expert_parallel.training.run_lock import FILE, RunLock
from tests.launches import ROOT, environment, small_config


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)


def trained(folder: Path, *overrides: str) -> str:
    """Trains 2 steps in folder/run, in this process. Returns what it printed."""
    result = CliRunner().invoke(
        app, ["train", str(small_config(folder)), "parallel.ep=1", "evaluation.every=10", *overrides]
    )
    assert result.exit_code == 0, result.output
    return result.output


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# One owner


def left_behind(folder: Path, **changes: Any) -> None:
    """The file of an owner that was killed: its process is this one, unless a change says otherwise."""
    lock = RunLock(folder / "other")
    lock.release()
    (folder / FILE).write_text(json.dumps({**lock.owner.model_dump(), **changes}))


def test_a_living_owner_is_named_and_refuses_others(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(ValueError, match=rf"^run.folder: {tmp_path} is being trained by process {lock.owner.pid} on "):
        RunLock(tmp_path)
    lock.release()
    RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_without_content_is_removed(tmp_path: Path) -> None:
    RunLock(tmp_path / "run").release()
    assert not (tmp_path / "run").exists()


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("case", ["ended", "the number is used again"])
def test_an_owner_that_was_killed_is_replaced_at_once(case: str, tmp_path: Path, caplog: Any) -> None:
    left_behind(tmp_path, **({"pid": ended_process()} if case == "ended" else {"process_start": 1}))
    start = time.monotonic()
    lock = RunLock(tmp_path)
    assert time.monotonic() - start < 0.9, "no wait for a sign of life"
    assert "taking over" in caplog.text
    lock.release()


def test_the_owner_on_another_machine_is_watched(tmp_path: Path, caplog: Any) -> None:
    lock = RunLock(tmp_path)
    lock.owner = lock.owner.model_copy(update={"machine": "another", "host": "node7"})
    time.sleep(0.3)  # its next beat writes that
    with pytest.raises(ValueError, match=r"is being trained by process .* on node7, since "):
        RunLock(tmp_path)
    lock.release()
    left_behind(tmp_path, machine="another", host="node7")
    RunLock(tmp_path).release()
    assert "waiting 1 s for a sign of life" in caplog.text
    assert "taking over" in caplog.text


def test_a_damaged_file_is_replaced(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / FILE).write_text("{")
    lock = RunLock(tmp_path)
    assert f"taking over {tmp_path} from a process whose name cannot be read" in caplog.text
    assert json.loads((tmp_path / FILE).read_text())["id"] == lock.owner.id
    lock.release()


def test_an_owner_that_is_still_writing_its_name_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("")
    name = RunLock(tmp_path / "other").owner.model_copy(update={"host": "node7"})
    writing = threading.Timer(0.3, lambda: (tmp_path / FILE).write_text(name.model_dump_json()))
    writing.start()
    with pytest.raises(ValueError, match=r"is being trained by process \d+ on node7, since "):
        RunLock(tmp_path)
    writing.join()


def take_over(folder: Path, start: Any, results: Any) -> None:
    start.wait()
    try:
        RunLock(folder)
    except ValueError:
        results.put("refused")
    else:
        results.put("owner")
    time.sleep(60)  # until all have tried


def test_of_many_that_take_over_at_once_one_wins(tmp_path: Path) -> None:
    left_behind(tmp_path, pid=ended_process())
    fork = multiprocessing.get_context("fork")
    start, results = fork.Event(), fork.Queue()
    processes = [fork.Process(target=take_over, args=(tmp_path, start, results), daemon=True) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.kill()
    assert sorted(found) == ["owner", *["refused"] * 5]


def test_an_owner_that_was_replaced_ends(tmp_path: Path) -> None:
    """As after it was suspended for long: it must not write into the run of the other."""
    code = (
        "import sys, time; from pathlib import Path; from expert_parallel.training import run_lock; "
        "run_lock.BEAT_SECONDS = 0.1; run_lock.RunLock(Path(sys.argv[1])); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / FILE).exists():
        time.sleep(0.05)
    left_behind(tmp_path)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "has taken over" in error


def test_a_second_run_of_the_folder_changes_nothing(tmp_path: Path) -> None:
    trained(tmp_path)
    before = contents(tmp_path / "run")
    assert tmp_path / "run" / FILE not in before
    lock = RunLock(tmp_path / "run")
    refused = CliRunner().invoke(app, ["train", str(tmp_path / "config.yaml"), "parallel.ep=1", "training.steps=4"])
    assert refused.exit_code == 2
    assert "is being trained by process" in refused.stderr
    lock.release()
    assert contents(tmp_path / "run") == before


# ---------------------------------------------------------------------------------------------------------------------
# A copied run


@pytest.mark.parametrize("given", ["the config", "the folder"])
def test_a_copied_run_trains_in_its_own_folder(given: str, tmp_path: Path) -> None:
    trained(tmp_path)
    original, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(original, copy)
    before = contents(original)
    path = copy / "config.yaml" if given == "the config" else copy
    result = CliRunner().invoke(app, ["train", str(path), "training.steps=3"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(
        f"run.folder: {copy}, where this config.yaml and its checkpoints lie, instead of {original}\n"
    )
    assert f"resumed from {copy}/checkpoints/step_00000002" in result.output
    assert contents(original) == before
    assert (copy / "checkpoints" / "step_00000003").is_dir()
    assert load_config(copy / "config.yaml").run.folder == str(copy)


def test_the_command_line_names_another_folder(tmp_path: Path) -> None:
    trained(tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    before = contents(tmp_path / "copy")
    other = f"run.folder={tmp_path / 'third'}"
    result = CliRunner().invoke(app, ["train", str(tmp_path / "copy"), other, "training.steps=1"])
    assert result.exit_code == 0, result.output
    assert "run.folder:" not in result.output
    assert (tmp_path / "third" / "checkpoints" / "step_00000001").is_dir()
    assert contents(tmp_path / "copy") == before


def test_a_folder_without_a_run_is_no_config(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(tmp_path)])
    assert result.exit_code == 2
    assert f"the config file {tmp_path / 'config.yaml'} cannot be read: No such file or directory" in result.stderr


@pytest.mark.parametrize(
    "wrong", ["model.vocab_size=2147483647", "training.global_batch=2147483647", "training.sequence_length=2147483647"]
)
def test_a_number_with_digits_too_many_is_refused_before_anything_is_written(wrong: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(small_config(tmp_path)), "parallel.ep=1", wrong])
    assert result.exit_code == 2
    assert re.search(r"error: a training step needs about [\d,]+ GiB .* machine has \d+ GiB", result.stderr), result
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_that_diverges_is_not_started_again_with_the_same_settings(tmp_path: Path) -> None:
    diverging = ["training.optimizer.learning_rate=1e30", "training.schedule.warmup_steps=0", "training.steps=9"]
    marker = tmp_path / "run" / "failure.json"

    def error(*overrides: str) -> str:
        result = CliRunner().invoke(
            app, ["train", str(small_config(tmp_path)), "parallel.ep=1", *diverging, *overrides]
        )
        assert result.exit_code == 2
        return result.stderr.partition("error: ")[2]

    first = error("run.folder=" + str(tmp_path / "first"))
    assert re.match(r"step \d: the loss is .*; the run stops\n", first), "study/folder.py looks for these words"
    assert "\n  last checkpoint   none has been saved yet\n" in first
    assert "\n  first bad tensor  the gradient of blocks.1.attention." in first
    assert "\n                    training.schedule.warmup_steps=100 (it is 0)\n" in first
    assert "\n  to try            training.optimizer.learning_rate=0.001 (it is 1e+30)\n" in first
    ruined = " ".join(
        error(f"run.folder={tmp_path}/ruined", "checkpoint.every=1", "checkpoint.background=false").split()
    )
    assert "/checkpoints/step_00000001: its weights are as large, so no setting repairs them" in ruined
    assert "begin anew in another run.folder, or remove the checkpoints from step 1 on: the same settings" in ruined
    trained(tmp_path)
    assert f"\n  last checkpoint   {tmp_path}/run/checkpoints/step_00000002\n" in error(), "its weights are sound"
    before = contents(tmp_path / "run")
    refused = error()
    folder = tmp_path / "run"
    assert refused.startswith(f"run.folder: not started, since {folder} has failed before with the same settings\n")
    assert "  step 4: the loss is " in refused
    assert contents(tmp_path / "run") == before
    going_on = trained(tmp_path, "training.steps=3")
    assert re.search(r"going on after the failure at step 4; changed: .*learning_rate 1e\+30 -> 0.0003", going_on)
    assert going_on.count("1e+30") == 1, "it is announced once"
    assert "warning: the learning rate of step" not in going_on
    assert not marker.exists()
    marker.write_text("{")
    assert error() == f"run.folder: {marker} cannot be read; remove it to start the run\n"


# ---------------------------------------------------------------------------------------------------------------------
# Output that cannot be written


@pytest.mark.parametrize("fault", ["encoding", "closed pipe", "full disk"])
def test_no_output_ends_a_run(fault: str, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    command = [sys.executable, "-m", "expert_parallel", "train", str(config), "parallel.ep=1", "evaluation.every=10"]
    if fault == "encoding":  # bytes of a random model that no terminal of this encoding can show
        command += ["run.sample={prompt: '\u00e9', length: 40, temperature: 3.0}"]
        done = subprocess.run(
            command, cwd=ROOT, env={**environment(), "PYTHONIOENCODING": "ascii"}, capture_output=True
        )
        assert b"--- sample" in done.stdout
        assert b"?" in done.stdout
    else:
        reader, writer = os.pipe()
        os.close(reader)
        out = os.fdopen(writer, "wb") if fault == "closed pipe" else open("/dev/full", "wb")  # noqa: SIM115
        with out:
            done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.PIPE)
        assert done.stderr.count(b"stdout cannot be written") == 1, done.stderr
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [("closed pipe", 141, b""), ("full disk", 1, b"error: output cannot be written: No space left on device\n")],
)
def test_a_command_ends_quietly_when_nobody_reads_it(fault: str, code: int, message: bytes) -> None:
    """As other programs do: 128 + SIGPIPE behind `| head`; a sentence, and no traceback, on a full disk."""
    reader, writer = os.pipe()
    os.close(reader)
    out = os.fdopen(writer, "wb") if fault == "closed pipe" else open("/dev/full", "wb")  # noqa: SIM115
    with out:
        command = [sys.executable, "-m", "expert_parallel", "settings", "training.steps"]
        done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (code, message)
