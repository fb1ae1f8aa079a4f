"""A run's health: each rule over series of metrics, in real training, and on the experts' page; healthy runs stay
silent."""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from expert_parallel.checkpoint.files import list_checkpoints, open_checkpoint
from expert_parallel.cli.app import app
from expert_parallel.model.config import ModelConfig
from expert_parallel.report.verdict import read_verdict
from expert_parallel.training.config import Config, load_config, read_config
from expert_parallel.training.health import HealthConfig, HealthMonitor
from expert_parallel.training.health_advice import health_sentence
from expert_parallel.training.metrics import coefficient_of_variation
from expert_parallel.training.resume import changed_since_checkpoint

EXPERTS, CHOICES, LAYERS = 8, 2, 3
MOST_CV = math.sqrt(3)  # all tokens choose the same 2 of 8 experts: shares 1/2, 1/2, 0, ...: sqrt(8 * 2/4 - 1)
COLLAPSED = {"load_cv": 1.7, "load/0": 0.5, "load/1": 0.5} | {f"load/{expert}": 0.0 for expert in range(2, EXPERTS)}

Metrics = dict[str, float]


def model(**moe: Any) -> dict[str, Any]:
    moe = {"num_experts": EXPERTS, "router": {"kind": "top_k", "k": CHOICES}, "experts": {"hidden": 8}, **moe}
    attention = {"num_heads": 2, "head_size": 8}
    return {"num_layers": LAYERS, "d_model": 16, "init_std": 0.1, "attention": attention, "moe": moe}


def config(training: dict[str, Any] | None = None, **moe: Any) -> Config:
    training = {"steps": 2000, "global_batch": 4, "sequence_length": 32, **(training or {})}
    return read_config({"run": {"folder": "x"}, "model": model(**moe), "training": training}, "test")


def healthy(step: int) -> Metrics:
    """As the quickstart's: 30% dropped in the first steps, 2% after 100; the noise of small batches."""
    noise = random.Random(step)
    share = {"load_cv": 0.15 + math.exp(-step / 40), "dropped_share": 0.01 + 0.3 * math.exp(-step / 30)}
    layer = {**share, "router_entropy": 1.6, **{f"load/{expert}": 1 / EXPERTS for expert in range(EXPERTS)}}
    metrics = {f"moe/layer_{number}/{name}": value for number in range(LAYERS) for name, value in layer.items()}
    loss = 1.4 + 4 * math.exp(-step / 50) + noise.gauss(0, 0.1)
    return {**metrics, "train/loss": loss, "train/grad_norm": 0.5 + 10 / step + abs(noise.gauss(0, 0.3))}


def changed(metrics: Metrics, layer: int, changes: Metrics) -> Metrics:
    return metrics | {f"moe/layer_{layer}/{name}": value for name, value in changes.items()}


def reports(
    steps: int, change: Any, settings: dict[str, Any] | None = None, of: dict[str, Any] | None = None, warmup: int = 0
) -> list[tuple[int, str, list[int | None]]]:
    """(step, kind, layers) of each report, with the metrics that `change` makes of healthy ones."""
    monitor = HealthMonitor(HealthConfig(**(settings or {})), ModelConfig.model_validate(model(**(of or {}))), warmup)
    return [
        (step, events[0].condition.kind, [event.condition.layer for event in events])
        for step in range(1, steps + 1)
        for events in monitor.observe(step, change(step, healthy(step)))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The rules


def test_a_healthy_run_is_silent() -> None:
    assert reports(600, lambda step, metrics: metrics) == []


def test_the_largest_load_cv_is_that_of_the_same_experts_for_all() -> None:
    """sqrt(E - 1), the usual bound, is out of reach with two choices: no share of it would be found."""
    loads = torch.tensor([500, 500, 0, 0, 0, 0, 0, 0])
    assert coefficient_of_variation(loads) == pytest.approx(MOST_CV)
    at_79, at_81 = ({"load_cv": share * MOST_CV} for share in (0.79, 0.81))
    assert reports(50, lambda step, metrics: changed(metrics, 1, at_79)) == []
    assert reports(50, lambda step, metrics: changed(metrics, 1, at_81)) == [(20, "collapse", [1])]


def test_one_expert_with_a_choice_of_nearly_every_token_is_a_collapse() -> None:
    """Whose layer's load cv is small: 7/8 x 0.45 from an even share of 1/8 to the largest, 1/2."""
    loads = {"load/3": 0.45} | {f"load/{e}": 0.55 / 7 for e in range(EXPERTS) if e != 3}
    cv = coefficient_of_variation(torch.tensor(list(loads.values())))
    assert cv < 0.8 * MOST_CV
    assert reports(50, lambda step, metrics: changed(metrics, 2, {**loads, "load_cv": cv})) == [(20, "collapse", [2])]


def test_an_expert_without_tokens_is_dead_if_it_stays_the_same_one() -> None:
    """Few tokens in a step leave out some expert in each step, and another one in the next."""
    one = reports(300, lambda step, metrics: changed(metrics, 0, {"load/5": 0.0}))
    assert one == [(100, "dead", [0])]
    assert reports(300, lambda step, metrics: changed(metrics, 0, {f"load/{step % EXPERTS}": 0.0})) == []


def test_drops_count_after_the_warm_up_and_in_the_mean() -> None:
    def dropped(step: int, metrics: Metrics) -> Metrics:
        return changed(metrics, 1, {"dropped_share": 0.25})

    assert reports(400, dropped) == [(100, "dropped", [1])]
    assert reports(400, dropped, warmup=150) == [(250, "dropped", [1])]
    often = reports(400, lambda step, metrics: changed(metrics, 1, {"dropped_share": 0.1 if step % 3 else 0.65}))
    assert often == [(100, "dropped", [1])], "28 % in the mean, though two of three steps are below 20 %"
    assert reports(400, lambda step, metrics: dropped(step, metrics) if step % 2 else metrics) == []


@pytest.mark.parametrize(
    ("router", "found"),
    [
        ({"kind": "top_k", "k": 2}, [(20, "entropy", [0])]),
        ({"kind": "hash", "k": 2}, []),
        ({"kind": "expert_choice", "accept_future_tokens": True}, []),
    ],
)
def test_entropy_is_judged_where_tokens_choose_by_probability(router: dict[str, Any], found: list[Any]) -> None:
    low = {"router_entropy": 0.04 * math.log(EXPERTS)}
    assert reports(50, lambda step, metrics: changed(metrics, 0, low), of={"router": router}) == found


def test_spikes_of_the_gradient_norm_are_one_event_until_they_stop() -> None:
    def spikes(step: int, metrics: Metrics) -> Metrics:
        norms = {150: 0.01} | dict.fromkeys((10, 200, 230, 290, 500), 30.0)  # the step after a small one is no spike
        return metrics | ({"train/grad_norm": norms[step]} if step in norms else {})

    assert reports(600, spikes) == [(200, "gradient_spike", [None]), (500, "gradient_spike", [None])]


def test_a_loss_that_rises_is_told_from_noise() -> None:
    def rising(step: int, metrics: Metrics) -> Metrics:
        return metrics | {"train/loss": metrics["train/loss"] + max(step - 300, 0) * 0.01}

    def noisy(step: int, metrics: Metrics) -> Metrics:
        return metrics | {"train/loss": 2.0 + random.Random(step).gauss(0, 0.4)}

    def exploding(step: int, metrics: Metrics) -> Metrics:
        return metrics | {"train/loss": 5.5 if step == 1 else 30 / step**0.3}

    ((step, kind, _),) = reports(600, rising)
    assert kind == "loss_rise"
    assert 315 < step < 345, "0.2 above a mean of 20 steps, 10 steps late"
    assert reports(2000, noisy) == []
    assert reports(60, exploding) == [(20, "loss_rise", [None])], "also where the first step was the lowest"


def test_an_event_is_reported_once_and_again_when_it_returns() -> None:
    def change(step: int, metrics: Metrics) -> Metrics:
        return changed(metrics, 1, COLLAPSED) if step <= 150 or 180 <= step < 220 or step >= 400 else metrics

    assert reports(600, change) == [(20, "collapse", [1]), (419, "collapse", [1])], "drops and dead ones are the same"


def test_layers_that_follow_soon_share_a_report() -> None:
    def change(step: int, metrics: Metrics) -> Metrics:
        for layer, begin in ((2, 1), (0, 5), (1, 15)):
            metrics = changed(metrics, layer, COLLAPSED) if step >= begin else metrics
        return metrics

    assert reports(200, change) == [(20, "collapse", [2]), (40, "collapse", [0, 1])]


@pytest.mark.parametrize("name", ["collapse", "dead_steps", "dropped", "entropy", "gradient_spike", "loss_rise"])
def test_each_rule_can_be_turned_off(name: str) -> None:
    def change(step: int, metrics: Metrics) -> Metrics:
        metrics = changed(changed(metrics, 0, COLLAPSED), 1, {"dropped_share": 0.5, "router_entropy": 0.0})
        dead = changed(metrics, 2, {"load/0": 0.0})
        return dead | {"train/grad_norm": 99.0 if step == 99 else 1.0, "train/loss": 1.0 + step / 100}

    kinds = {kind for _, kind, _ in reports(150, change)}
    assert kinds == {"collapse", "dead", "dropped", "entropy", "gradient_spike", "loss_rise"}
    assert {kind for _, kind, _ in reports(150, change, {name: None})} == kinds - {name.removesuffix("_steps")}


def test_null_turns_all_off() -> None:
    monitor = HealthMonitor(None, ModelConfig.model_validate(model()), 0)
    assert [monitor.observe(step, changed(healthy(step), 0, COLLAPSED)) for step in range(1, 50)] == [[]] * 49


# ---------------------------------------------------------------------------------------------------------------------
# The settings to try


def sentence(given: Config, steps: int = 150, **changes: float) -> str:
    monitor = HealthMonitor(HealthConfig(), given.model, 0)
    for step in range(1, steps + 1):
        for events in monitor.observe(step, changed(healthy(step), 1, changes)):
            return health_sentence(events, given)
    raise AssertionError("nothing was found")


def test_a_sentence_has_the_layer_the_step_the_numbers_and_the_setting() -> None:
    given = config(losses=[{"kind": "z_loss"}, {"kind": "balance", "coefficient": 0.01}])
    assert sentence(given, **COLLAPSED, dropped_share=0.6) == (
        "most tokens have chosen the same experts in layer 1 since step 1 (load cv 1.70 of at most 1.73; expert 0 "
        "computed 50.0% of all choices, and an even share is 12.5%; 60.0% were dropped). "
        "model.moe.losses[1].coefficient is 0.01: try 0.1, with 'model.moe.losses=[{kind: z_loss}, {kind: balance, "
        "coefficient: 0.1}]'; or model.moe.router.jitter is 0: try 0.01"
    )


FACTOR = {"kind": "factor", "train": 1.25, "eval": 2.0}
BALANCE = {"kind": "balance", "coefficient": 0.001}
EVEN, UNEVEN = {"load_cv": 0.3}, {"load_cv": 1.2}
DROPPED, LOW_ENTROPY = {"dropped_share": 0.4}, {"router_entropy": 0.0}


@pytest.mark.parametrize(
    ("moe", "training", "changes", "advice"),
    [
        ({}, {}, COLLAPSED, "no balance loss: set 'model.moe.losses=[{kind: balance, coefficient: 0.01}]'; or"),
        ({"losses": [BALANCE]}, {}, COLLAPSED, "model.moe.losses[0].coefficient is 0.001: try 0.01"),
        (
            {"router": {"kind": "top_k", "k": 2, "balance_bias_rate": 0.001}},
            {},
            COLLAPSED,
            "model.moe.router.balance_bias_rate is 0.001: try 0.01",
        ),
        (
            {"losses": [{"kind": "balance", "coefficient": 1.0}], "router": {"k": 2, "jitter": 0.01}},
            {},
            COLLAPSED,
            "training.optimizer.learning_rate is 0.0003: try 0.00015",
        ),
        ({"router": {"kind": "hash", "k": 2, "seed": 3}}, {}, COLLAPSED, "model.moe.router.seed is 3: try another one"),
        (
            {},
            {"routing": {"kind": "play", "folder": "record"}},
            COLLAPSED,
            "training.routing.kind is 'play', so the choices are those of the record",
        ),
        (
            {},
            {"trainable": {"kind": "experts", "experts": [1]}},
            COLLAPSED,
            "training.trainable.router is 'frozen': try 'chosen'",
        ),
        ({"capacity": FACTOR}, {}, DROPPED, "model.moe.capacity.train is 1.25: try 1.88"),
        ({"capacity": {**FACTOR, "train": 0.5}}, {}, DROPPED, "model.moe.capacity.train is 0.5: try 1.25"),
        (
            {"capacity": {"kind": "absolute", "train": 999, "eval": 999}},
            {},
            DROPPED,
            "model.moe.capacity.train is 999: try 1499",
        ),
        (
            {"capacity": {"kind": "dropless", "receive_bound": 1.2}},
            {},
            DROPPED,
            "model.moe.capacity.receive_bound is 1.2: try 1.8",
        ),
        (
            {"losses": [BALANCE]},
            {},
            LOW_ENTROPY,
            "set 'model.moe.losses=[{kind: balance, coefficient: 0.001}, {kind: z_loss, coefficient: 0.001}]'",
        ),
        ({}, {}, LOW_ENTROPY | EVEN, "). model.moe.losses has no z-loss: set 'model.moe.losses=[{kind: z_loss, "),
        ({}, {}, LOW_ENTROPY | UNEVEN, "). model.moe.losses has no balance loss and no z-loss: set '"),
        ({"capacity": FACTOR}, {}, DROPPED | UNEVEN, "). model.moe.losses has no balance loss: set '"),
        (
            {"capacity": FACTOR},
            {},
            DROPPED | EVEN,
            "). model.moe.capacity.train is 1.25: try 1.88; or model.moe.losses",
        ),
        (
            {"losses": [{"kind": "z_loss", "coefficient": 0.001}]},
            {},
            LOW_ENTROPY,
            "model.moe.losses[0].coefficient is 0.001: try 0.01",
        ),
        ({}, {"optimizer": {"learning_rate": 0.5}}, LOW_ENTROPY, "training.optimizer.learning_rate is 0.5: try 0.001"),
    ],
)
def test_the_setting_fits_the_config(
    moe: dict[str, Any], training: dict[str, Any], changes: Metrics, advice: str
) -> None:
    found = sentence(config(training, **moe), **changes)
    assert advice in found
    assert found.count("learning_rate") <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Real runs


def trained(folder: Path, *overrides: str) -> list[str]:
    """The lines on health of a small run, without warm-up and clipping."""
    data = {"kind": "files", "paths": [argparse.__file__]}
    training = {"steps": 12, "global_batch": 4, "sequence_length": 32, "clip_norm": None, "dtype": "float64"}
    training["schedule"] = {"kind": "constant", "warmup_steps": 0}
    tree = {"model": model(capacity=FACTOR), "training": training, "data": data, "run": {"folder": str(folder)}}
    (folder.parent / "config.yaml").write_text(yaml.safe_dump(tree))
    result = CliRunner().invoke(app, ["train", str(folder.parent / "config.yaml"), *overrides])
    assert result.exit_code == 0, (result.output, result.exception)
    return [line for line in result.stdout.splitlines() if line.startswith("health: ")]


def contains(lines: list[str], *parts: str) -> bool:
    return any(all(part in line for part in parts) for line in lines)


def test_routers_that_collapse(tmp_path: Path) -> None:
    """And the page of the experts says the same as the run."""
    run = tmp_path / "run"
    router = ["model.moe.router.k=1", "model.moe.router.normalise=false", "training.optimizer.learning_rate=0.1"]
    shorter = ["run.health.steps=3", "run.health.dropped_steps=3"]
    lines = trained(run, *shorter, *router)
    advice = "training.optimizer.learning_rate is 0.1: try 0.001"
    assert contains(lines, "most tokens have chosen the same experts in layer", "of at most 2.65", advice)
    drops = trained(tmp_path / "drops", *shorter, *router, "run.health.collapse=null")
    assert contains(drops, "many choices have been dropped in layer", "model.moe.capacity.train is 1.25: try 1.88")

    result = CliRunner().invoke(app, ["experts", str(run), "--json", str(tmp_path / "numbers.json")])
    assert result.exit_code == 0, result.output
    health = json.loads((tmp_path / "numbers.json").read_text())["health"]
    shown = {text.split(". This was so")[0] for text in health["lasting"] + health["ended"]}
    assert {line.removeprefix("health: ").replace("step", "Step", 1) for line in lines} <= shown
    page = (run / "experts.html").read_text()
    assert '<div class="verdict unhealthy"><b>Unhealthy in the last 12 steps.</b><ul><li>Step ' in page


def test_a_rate_that_is_far_too_high(tmp_path: Path) -> None:
    """The first update alone multiplies the gradient norm by over 10 and raises the loss by over 1."""
    overrides = ["run.health.steps=1", "training.steps=6", "training.optimizer.learning_rate=1"]
    lines = trained(tmp_path / "run", *overrides)
    advice = "training.optimizer.learning_rate is 1: try 0.001"
    assert contains(lines, "the gradient norm of step ", " times ", advice, "training.clip_norm is null: try 1")
    assert contains(lines, "the loss has risen since step ", advice)
    assert contains(lines, "routers have put nearly all weight on one expert in layer", advice, "kind: z_loss")
    assert trained(tmp_path / "silent", *overrides, "run.health=null") == []


def test_the_verdict_tells_what_lasts_from_what_is_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def verdict(change: Any, given: Config) -> Any:
        records = [{"step": step, **change(step, healthy(step))} for step in range(1, 301)]
        path.write_text("".join(json.dumps(record) + "\n" for record in [{"step": 0, "eval/loss": 5.0}, *records]))
        return read_verdict(path, given)

    given = config({"schedule": {"warmup_steps": 0}})
    good = verdict(lambda step, metrics: metrics, given)
    assert good.headline == "Healthy: steps 1 to 300 meet none of the conditions of run.health."
    early = verdict(lambda step, metrics: changed(metrics, 0, COLLAPSED) if step < 50 else metrics, given)
    assert early.headline == "Healthy in the last 100 steps, but not before."
    assert early.ended[0].startswith("Step 20: most tokens have chosen the same experts in layer 0 since step 1 (")
    assert early.ended[0].endswith(". This was so up to step 49.")
    late = verdict(lambda step, metrics: changed(metrics, 0, COLLAPSED) if step > 250 else metrics, given)
    assert (late.headline, len(late.lasting)) == ("Unhealthy in the last 100 steps.", 1)
    off = given.model_copy(update={"run": given.run.model_copy(update={"health": None})})
    assert "not judged" in verdict(lambda step, metrics: changed(metrics, 0, COLLAPSED), off).headline


def test_a_checkpoint_without_thresholds_was_trained_with_the_defaults() -> None:
    """Resuming a run of 0.1.0 does not announce each threshold as changed."""
    run = Path(__file__).parent / "fixtures" / "0.1.0-9121ce5" / "run"
    checkpoint = open_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    assert "health" not in checkpoint.config["run"]
    given = load_config(run, ["run.health.dropped=0.5"])
    changes = [change for change in changed_since_checkpoint(checkpoint, given) if "health" in change[0]]
    assert changes == [("run.health.dropped", 0.2, 0.5)]
