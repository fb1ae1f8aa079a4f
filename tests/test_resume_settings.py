"""What a run that resumes says of its settings: a learning rate that jumps, and overrides that are not given again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from typer.testing import CliRunner

from expert_parallel.checkpoint.files import Checkpoint
from expert_parallel.cli.app import app
from expert_parallel.training.config import Config, load_config
from expert_parallel.training.resume import rate_jump
from tests.launches import ROOT, small_config

QUICKSTART = ROOT / "configs" / "quickstart.yaml"  # cosine to a tenth of 4e-3 over 250 steps, 25 of them warm-up


def checkpoint_of(config: Config, step: int) -> Checkpoint:
    """As much of a checkpoint as `rate_jump` reads."""
    return cast(Checkpoint, SimpleNamespace(step=step, config=config.model_dump(mode="json")))


def jump(step: int, *overrides: str, before: tuple[str, ...] = ()) -> str | None:
    return rate_jump(checkpoint_of(load_config(QUICKSTART, before), step), load_config(QUICKSTART, overrides))


GROWS = "training.steps=600"


def test_a_stretched_cosine_is_announced_with_both_rates() -> None:
    """0.1 + 0.9 (1 + cos(225 pi / 575)) / 2 of 4e-3 is 0.002803 by hand."""
    assert jump(250, GROWS) == (
        "the learning rate of step 251 is 0.002803, the checkpoint's settings have 0.0004 there: to continue with "
        "0.0004, set 'training.schedule={kind: constant, warmup_steps: 0}' training.optimizer.learning_rate=0.0004"
    )


def test_the_advice_continues_without_a_jump() -> None:
    advice = ["training.schedule={kind: constant, warmup_steps: 0}", "training.optimizer.learning_rate=0.0004"]
    assert jump(250, GROWS, *advice) is None


@pytest.mark.parametrize(
    ("step", "overrides", "before", "rates"),
    [
        (100, [], (), None),
        (250, [], (), None),  # nothing is left to do
        (0, ["training.optimizer.learning_rate=1e-3"], (), None),  # an imported model, whose settings nobody chose
        (10, [GROWS], (), None),  # within the warm-up
        (125, [GROWS], (), ("0.003738", "0.002513")),
        (125, ["training.optimizer.learning_rate=1e-3"], (), ("0.0006281", "0.002513")),
        (125, ["training.schedule.warmup_steps=200"], (), ("0.00252", "0.002513")),
        (125, [GROWS, "training.schedule={kind: constant}"], ("training.schedule={kind: constant}",), None),
        (125, [GROWS, "training.schedule={kind: inverse_sqrt}"], ("training.schedule={kind: inverse_sqrt}",), None),
        # from a constant rate into its decay: still at the peak
        (125, [GROWS, "training.schedule={kind: wsd}"], ("training.schedule={kind: constant}",), None),
        (125, ["training.steps=225", "training.schedule={kind: wsd}"], ("training.schedule={kind: constant}",), None),
        (249, [GROWS, "training.schedule={kind: wsd}"], ("training.schedule={kind: wsd}",), ("0.004", "4e-05")),
    ],
)
def test_a_jump_is_announced(
    step: int, overrides: list[str], before: tuple[str, ...], rates: tuple[str, str] | None
) -> None:
    said = jump(step, *overrides, before=before)
    if rates is None:
        assert said is None
    else:
        now, then = rates
        assert said is not None
        assert said.startswith(f"the learning rate of step {step + 1} is {now}, the checkpoint's settings have {then} ")


def test_a_rate_of_zero_is_no_advice() -> None:
    said = jump(250, GROWS, before=("training.schedule={kind: wsd}",))
    assert said is not None
    assert "have 0 there: a run that may grow needs a schedule without an end" in said


def test_settings_that_this_version_does_not_know_are_not_compared() -> None:
    config = load_config(QUICKSTART, [GROWS])
    old: dict[str, Any] = {"training": {"steps": 250, "momentum": 0.9}}
    assert rate_jump(cast(Checkpoint, SimpleNamespace(step=250, config=old)), config) is None


def train(config: Path, *overrides: str) -> list[str]:
    result = CliRunner().invoke(app, ["train", str(config), "parallel.ep=1", *overrides])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_a_run_that_resumes_names_each_change_once(tmp_path: Path) -> None:
    config, run = small_config(tmp_path), tmp_path / "run"
    config.write_text(config.read_text().replace("dtype: float64", "dtype: float64, schedule: {warmup_steps: 1}"))
    assert not [line for line in train(config) if "learning rate" in line or "last ran" in line]

    lines = train(config, "training.steps=4", "run.log_every=3")
    assert [line for line in lines if line.startswith("warning: the learning rate of step 3 is 0.0002325, the ")]
    assert [line for line in lines if line.endswith("; changed: run.log_every 1 -> 3, training.steps 2 -> 4")]
    assert not [line for line in lines if "last ran" in line], "it is the checkpoint that has other settings"

    lines = train(run, "training.steps=5")  # keeps what was overridden
    assert [line for line in lines if line.endswith("; changed: training.steps 4 -> 5")]
    assert load_config(run).run.log_every == 3

    # A run with other settings began, but was killed before its first checkpoint.
    tree = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(tree | {"training": tree["training"] | {"steps": 9}}))
    lines = train(config, "training.steps=5")
    assert "training.steps was 9 when this run last ran, this command says 5" in lines
    assert [line for line in lines if line.endswith("; changed: run.log_every 3 -> 1")]
