"""The study: what it plans, trains, resumes and refuses; what it counts, by hand; one whole study at a tiny size."""

import fcntl
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from expert_parallel.bench.timing import Times
from expert_parallel.cli.study import train_all
from expert_parallel.config import load_tree
from expert_parallel.data.batch import micro_batch
from expert_parallel.data.open import open_data
from expert_parallel.study.curves import Curve, read_curve, steps_done
from expert_parallel.study.definition import Study, read_study
from expert_parallel.study.plot import plot
from expert_parallel.study.results import StudyResult, VariantResult, format_study, reached
from expert_parallel.study.runner import StudyProgress, best_rate, done_variants, pending_runs, run_study, target_steps
from expert_parallel.study.step_times import StepTimes
from expert_parallel.training.config import Config
from expert_parallel.training.setup import data_requirements

CONFIG = Path(__file__).parent.parent / "configs" / "study.yaml"
TINY = (
    "base.model.num_layers=2",
    "base.model.d_model=16",
    "base.model.attention={num_heads: 2, head_size: 8}",
    "base.model.ffn.hidden=32",
    "base.training.steps=6",
    "base.training.global_batch=2",
    "base.training.sequence_length=16",
    "base.evaluation={every: 2, sequences: 4}",
    "base.checkpoint.every=2",
    "trial_steps=2",
    "learning_rates=[0.001, 0.003]",
    "seeds=[0, 1]",
    "variants={dense: {}, switch: {claim: 7x, model: {moe_blocks: {kind: every_nth, n: 2}, "
    "moe: {preset: switch, num_experts: 4, experts: {hidden: 32, activation: gelu}}}}}",
)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return f"base.data={{kind: files, paths: {path}, held_out: 0.1}}"


def tiny(tmp_path: Path, *changes: str, only: list[str] | None = None) -> Study:
    return read_study(CONFIG, [*TINY, f"folder={tmp_path / 'study'}", *changes], only)


# ---------------------------------------------------------------------------------------------------------------------
# Curves


@pytest.mark.parametrize(
    ("losses", "loss", "step"),
    [
        ([5.0, 3.0, 2.0, 1.0], 2.0, 20.0),  # at an evaluation
        ([5.0, 3.0, 2.0, 1.0], 2.5, 15.0),  # halfway between two
        ([5.0, 1.9, 2.2, 1.0], 2.0, 20 + 10 * 0.2 / 1.2),  # for good: not the first time
        ([5.0, 3.0, 2.0, 2.1], 2.0, None),  # above at the end
        ([5.0, 3.0, 2.0, 1.0], 6.0, 0.0),  # from the beginning
    ],
)
def test_when_a_loss_is_reached(losses: list[float], loss: float, step: float | None) -> None:
    assert Curve([0, 10, 20, 30], losses).step_reaching(loss) == (step if step is None else pytest.approx(step))


def test_half_a_line_of_a_run_that_goes_on_does_not_count(tmp_path: Path) -> None:
    lines = [{"step": 0, "eval/loss": 5.0}, {"step": 1, "train/loss": 4.0}, {"step": 2, "eval/loss": 3.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "eval/loss": 2')
    assert read_curve(tmp_path) == Curve([0, 2], [5.0, 3.0])
    assert steps_done(tmp_path) == 2
    assert steps_done(tmp_path / "none") == 0


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def flops_of(config: Config) -> int:
    return config.model.flops_per_token(config.training.sequence_length)


def test_flops_of_a_token_by_hand(tmp_path: Path) -> None:
    """d 16, 2 blocks, vocabulary 256 (tied): attention 4 * 16 * 16, feed-forward 2 * 16 * 32, norms 2 * 16 a block and
    16 at the end. The router of 4 experts is 4 * 16."""
    study = tiny(tmp_path)
    dense, switch = (flops_of(study.trials(name)[0].config) for name in ("dense", "switch"))
    weights = 2 * (4 * 16 * 16 + 2 * 16 * 32 + 2 * 16) + 16 + 256 * 16
    attention = (
        3 * (2 * 2 * 8) * 2 * 16
    )  # three passes; scores and sums, 2 heads of 8; 2 operations for half of 16; blocks
    assert dense == 6 * weights + attention
    assert switch == dense + 6 * 4 * 16


def test_the_measured_study_has_the_sizes_of_its_config() -> None:
    study = read_study(CONFIG, [], None)
    measured = json.loads((CONFIG.parents[1] / "expert_parallel/study/measured/results.json").read_text())
    for variant in measured["variants"]:
        config = study.trials(variant["name"])[0].config
        sizes = (config.model.num_params(), config.model.num_active_params(), flops_of(config))
        assert sizes == (variant["total_parameters"], variant["active_parameters"], variant["flops"])


def test_variants_of_the_committed_study_need_as_many_operations() -> None:
    study = read_study(CONFIG, [], None)
    flops = {name: flops_of(study.trials(name)[0].config) for name in study.names}
    assert all(1 <= own / flops["dense"] < 1.02 for own in flops.values())  # the routers'
    assert len(study.settings.seeds) >= 3


def test_all_variants_of_a_seed_see_the_same_data(tmp_path: Path, corpus: str) -> None:
    study = tiny(tmp_path, corpus)

    def first_batch(variant: str, seed: int) -> torch.Tensor:
        config = study.run(variant, 0.001, seed, 6).config
        sampler = open_data(config.data, data_requirements(config)).sampler
        batch = micro_batch(sampler, step=0, global_batch=2, num_micro_steps=1, micro_step=0, num_ranks=1, rank=0)
        return batch.inputs_BS

    assert torch.equal(first_batch("dense", 0), first_batch("switch", 0))
    assert not torch.equal(first_batch("dense", 0), first_batch("dense", 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["reference=sparse"], "reference is 'sparse', it must be one of dense, switch"),
        (["seeds=[1, 1]"], r"seeds lists a value twice: \[1, 1\]"),
        (["base.training.schedule={kind: cosine}"], "base.training.schedule.kind is 'cosine'"),
        (["base.training.schedule={kind: wsd}"], "base.training.schedule.kind is 'wsd'"),
        (["trial_steps=3"], r"trial_steps \(3\) must be a multiple of base.evaluation.every \(2\)"),
        (["trial_steps=8"], r"trial_steps \(8\) is more than base.training.steps \(6\)"),
        (["base.training={global_batch: 2}"], "base, with variants.dense: training.steps is missing"),
        (["base.training=null"], "base, with variants.dense: training"),
        (["base.run={folder: here}"], "base.run.folder is given, but runs lie below"),
        (["run={folder: here}"], r"study.yaml: unknown setting run$"),
        (["base.seed=5"], "base.seed is given, but the study has `seeds`"),
        (["base.training.optimizer.learning_rate=0.1"], "base.training.optimizer.learning_rate is given, but"),
        (["base.checkpoint.start_from=runs/x"], "base.checkpoint.start_from is given, but"),
        (["variants.switch.model.moe.num_experts=0"], "base, with variants.switch: model.moe.num_experts: .*found 0"),
        (["variants.dense.modle={}"], "unknown setting variants.dense.modle"),
        (["variants={dense: {}, ../x: {}}"], "'../x' names a folder"),
    ],
)
def test_a_study_that_cannot_work_is_refused(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, *changes)


def test_an_unknown_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no variant 'glam', there are dense, switch"):
        tiny(tmp_path, only=["glam"])


# ---------------------------------------------------------------------------------------------------------------------
# What is left to do


def write_run(folder: Path, losses: dict[int, float]) -> None:
    """As a run that has been trained and saved. losses: at least those of each second step."""
    (folder / "checkpoints" / f"step_{max(losses):08d}").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / f"step_{max(losses):08d}" / "manifest.json").touch()
    lines = [json.dumps({"step": step, "eval/loss": loss}) for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_long_runs_come_after_all_trials_of_a_variant_with_its_best_rate(tmp_path: Path) -> None:
    study = tiny(tmp_path)
    low, high = study.trials("dense")
    assert [str(run) for run in pending_runs(study)] == [
        "dense, learning rate 0.001, seed 0",
        "dense, learning rate 0.003, seed 0",
        "switch, learning rate 0.001, seed 0",
        "switch, learning rate 0.003, seed 0",
    ]
    assert sum(target_steps(study).values()) == 2 * (6 + 6 + 2)
    write_run(low.folder, {0: 5.0, 2: 3.0})
    write_run(high.folder, {0: 5.0, 2: 2.0})
    left = pending_runs(study)
    assert [(run.variant, run.rate, run.seed, run.steps) for run in left] == [
        ("switch", 0.001, 0, 2),
        ("switch", 0.003, 0, 2),
        ("dense", 0.003, 0, 6),
        ("dense", 0.003, 1, 6),
    ]
    assert left[2].folder == high.folder  # the trial goes on
    assert done_variants(study) == []
    for run in study.finals("dense", 0.003):
        write_run(run.folder, {0: 5.0, 2: 2.0, 4: 1.5, 6: 1.0})
    assert done_variants(study) == ["dense"]
    assert not [run for run in pending_runs(study) if run.variant == "dense"]


def test_a_run_without_one_of_its_evaluations_is_not_done(tmp_path: Path) -> None:
    study = tiny(tmp_path)
    for run in study.trials("dense"):
        write_run(run.folder, {2: 2.0})
    assert [run.variant for run in pending_runs(study)] == ["dense", "dense", "switch", "switch"]


def test_a_rate_that_diverged_is_out_and_a_variant_without_any_is_refused(tmp_path: Path) -> None:
    study = tiny(tmp_path)
    low, high = study.trials("dense")
    write_run(low.folder, {0: 5.0, 2: 3.0})
    diverge(high.folder)
    assert best_rate(study, "dense") == 0.001
    assert [run.seed for run in pending_runs(study) if run.variant == "dense"] == [0, 1]
    diverge(study.finals("dense", 0.001)[1].folder)
    with pytest.raises(ValueError, match="seed 1 has diverged after a trial that had not"):
        pending_runs(study)
    for run in study.trials("switch"):
        diverge(run.folder)
    with pytest.raises(ValueError, match="all learning rates of switch have diverged, the first with: error: step 1"):
        best_rate(study, "switch")


def diverge(folder: Path) -> None:
    folder.mkdir(parents=True)
    error = "error: step 1: the loss is nan and the gradient norm nan; the run stops\n  to try  x\n"
    (folder / "log.txt").write_text(f"step 0\n{error}")


@pytest.mark.full
def test_what_diverges_says_so_in_the_words_that_are_looked_for(tmp_path: Path, corpus: str) -> None:
    """The sentence of the training loop, from a rate that no model survives; the study ends with it."""
    study = tiny(tmp_path, corpus, "learning_rates=[1e30]", "base.training.clip_norm=null", "jobs=2")
    said: list[str] = []
    with pytest.raises(
        ValueError,
        match=r"all learning rates of (dense|switch) have diverged, the first with: error: step \d: the loss",
    ):
        run_study(study, said.append, lambda text: None)
    assert any(text.startswith("diverged: ") for text in said)


def test_a_text_that_changed_between_runs_is_refused(tmp_path: Path) -> None:
    study = tiny(tmp_path)
    for run, digest in zip(study.finals("dense", 0.001), ("aa" * 32, "bb" * 32), strict=True):
        run.folder.mkdir(parents=True)
        tree = run.config.model_dump(mode="json")
        (run.folder / "config.yaml").write_text(json.dumps(tree | {"data": tree["data"] | {"sha256": digest}}))
    with pytest.raises(ValueError, match="the text has changed between runs of this study"):
        run_study(study, print, print)


def test_progress_tells_the_time_left(tmp_path: Path) -> None:
    write_run(tmp_path / "one", {0: 5.0, 30: 4.0})
    progress = StudyProgress(time.monotonic() - 60, {tmp_path / "one": 40, tmp_path / "two": 50}, first=0)
    assert progress.text() == "30 of 90 steps, 33%; about 2 min left"
    progress.first = 30
    assert progress.text().endswith("time left not known yet")


def test_a_terminal_shows_brackets_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed runs say has paths in brackets, which a terminal's library would take for its own marks."""
    words = "RuntimeError: [/pytorch/gloo/pair.cc:534] [bold] reset"

    def carry(study: Study, say: Any, show: Any) -> None:
        say(words)
        show(lambda: words)

    monkeypatch.setattr("expert_parallel.cli.study.run_study", carry)
    file = io.StringIO()
    train_all(tiny(tmp_path), Console(file=file, force_terminal=True, markup=False, highlight=False, width=100))
    assert file.getvalue().count(words) >= 2


def test_the_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    study = tiny(tmp_path)
    run = study.finals("switch", 0.003)[1]
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(json.dumps(run.config.model_dump(mode="json") | {"seed": 7}))
    with pytest.raises(ValueError, match="holds a run of another study: seed is 7 there and 1 here"):
        run_study(study, print, print)


def test_two_studies_do_not_work_in_one_folder(tmp_path: Path) -> None:
    study = tiny(tmp_path)
    study.folder.mkdir()
    with (study.folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another study, or a run that outlived one, holds the lock"):
            run_study(study, print, print)


# ---------------------------------------------------------------------------------------------------------------------
# Results


def always(milliseconds: float) -> Times:
    return Times(median=milliseconds, smallest=milliseconds, largest=milliseconds)


def variant(name: str, milliseconds: float, flops: int, *losses: list[float], **more: Any) -> VariantResult:
    return VariantResult(
        name=name,
        claim=more.get("claim", ""),
        total_parameters=2_000_000,
        active_parameters=1_000_000,
        flops=flops,
        trials=[(0.001, 3.0), (0.003, 2.5), (0.01, None)],
        rate=0.003,
        curves=[Curve([0, 10, 20, 30, 40], one) for one in losses],
        step_time=StepTimes(own=always(milliseconds), reference=always(100.0)),
        reached=[],
    )


def made_up() -> StudyResult:
    dense = variant("dense", 100.0, 100, [5, 4, 3, 2.5, 2.0], [5, 4, 3, 2.5, 1.0])
    sparse = variant("sparse", 125.0, 110, [5, 3, 2.0, 1.5, 1.2], [5, 3, 2.0, 1.5, 1.2], claim="paper: 7x")
    result = StudyResult(
        reference="dense",
        variants=[dense, sparse],
        not_measured=["wide"],
        seeds=[0, 1],
        steps=40,
        tokens_of_step=32,
        corpus="text",
        held_out_tokens=64,
        hardware="a machine",
        threads=1,
        jobs=2,
        torch="2",
        commits=["abc"],
        hours=0.5,
        date="2026-11-22",
    )
    sparse.reached = [reached(result, sparse, number, seed) for number, seed in enumerate(result.seeds)]
    return result


def test_gains_by_hand() -> None:
    """The first seed comes down to 2.0 at step 20 of 40: twice as fast in steps, 2 * 100 / 125 in time, 2 * 100 / 110
    in operations. The second does not come down to 1.0."""
    first, second = made_up().variant("sparse").reached
    assert (first.step, first.steps) == (20.0, 2.0)
    assert first.time == pytest.approx(1.6)
    assert first.flops == pytest.approx(200 / 110)
    assert second.step is None
    assert second.steps is None


def test_the_table_says_what_was_not_reached_and_not_measured() -> None:
    text = format_study(made_up())
    (row,) = [line for line in text.splitlines() if line.startswith("| sparse")]
    assert row.endswith(
        "| 0.003 | 1.2000 (1.2000 to 1.2000) | 2.00, 1 of 2 seeds not reached | 1.60, 1 of 2 seeds not reached "
        "| 1.82, 1 of 2 seeds not reached |"
    )
    assert "| wide | not measured |" in text
    assert "paper: 7x; here 2.00x fewer steps, 0.55 of the FLOPs (1 of 2 seeds reached it)" in text
    assert "0.01: diverged" in text
    assert StudyResult.model_validate_json(made_up().model_dump_json()) == made_up()


def test_a_learning_rate_at_the_edge_is_marked() -> None:
    result = made_up()
    assert "the edge" not in format_study(result)
    result.variants[0].rate = 0.01
    assert "0.01 (the edge)" in format_study(result)


def test_the_picture(tmp_path: Path) -> None:
    plot(made_up(), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------------------
# A whole one


def test_a_study_that_is_stopped_goes_on_and_ends(tmp_path: Path, corpus: str) -> None:
    folder = tmp_path / "study"
    path = tmp_path / "study.json"  # which is YAML, too
    overrides = [*TINY, corpus, f"folder={folder}", "learning_rates=[0.003]", "trial_steps=6", "seeds=[0]"]
    path.write_text(json.dumps(load_tree(CONFIG, [*overrides, "variants.switch.claim=stopped once"])))
    command = [sys.executable, "-m", "expert_parallel", "study", str(path)]

    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    limit = time.monotonic() + 300
    while not list(folder.glob("dense/*/*/metrics.jsonl")) and first.poll() is None and time.monotonic() < limit:
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=300)
    assert first.returncode not in (0, 2)
    assert not (folder / "results.json").exists()
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no run is left behind

    second = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stderr
    result = StudyResult.model_validate_json((folder / "results.json").read_text())
    assert [len(one.curves) for one in result.variants] == [1, 1]
    assert all(curve.steps == [0, 2, 4, 6] for one in result.variants for curve in one.curves)
    assert result.variant("switch").reached
    assert "stopped once" in (folder / "table.md").read_text()
    assert (folder / "loss.png").exists()
    assert len(json.loads((folder / "sittings.json").read_text())) == 2
    losses = [json.loads(line)["step"] for line in next(folder.glob("dense/*/seed_0/metrics.jsonl")).open()]
    assert losses == list(range(7))  # each step once, the stop in between or not
