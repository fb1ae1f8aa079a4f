"""DeepSpeed as engine against the native one, on real ranks, in float32: losses and norms of 4 to 7 steps with
clipping, gradients of the first, experts that stay apart, checkpoints that go on under the other engine.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expert_parallel.checkpoint.config import CheckpointConfig
from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.checkpoint.save import CheckpointSaver
from expert_parallel.checkpoint.state import rectangles
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.runtime.launchers import Launch
from expert_parallel.runtime.process import Runtime
from expert_parallel.training import loop
from expert_parallel.training.check import format_config_report
from expert_parallel.training.config import DTYPES, Config, TrainingConfig, load_config
from expert_parallel.training.engines.build import ENGINES
from expert_parallel.training.memory import state_memory
from expert_parallel.training.optim import build_optimizer
from expert_parallel.training.step import evaluate, train_step
from tests.launches import small_config, start
from tests.layouts import build_on
from tests.ranks import run_ranks
from tests.test_training import MODEL, batches

SEED, STEPS = 3, 7  # two steps past the warm-up
FEW_STEPS = 4  # in all cases but one
NATIVE = {"kind": "native"}
FURTHER = {"mtp": {"depth": 2}, "tied_embeddings": False}
EP2, EP1, CP2 = {"world": 4, "ep": 2}, {"world": 4}, {"world": 4, "ep": 2, "cp": 2}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"kind": "deepspeed", "zero_stage": stage, **settings}


ENGINE_CASES = {
    "zero 0": (EP2, zero(0)),
    "zero 1": (EP2, zero(1)),
    "zero 2": (EP2, zero(2)),
    "zero 3": (EP1, zero(3)),
    "zero 2, offload": (EP2, zero(2, offload="cpu")),
    "zero 2, ep over all": ({"world": 4, "ep": 4}, zero(2)),
    "zero 1, cp": (CP2, zero(1)),
    "zero 1, further tokens": ({**EP2, "model": FURTHER}, zero(1)),
    "zero 3, further tokens": ({**EP1, "model": FURTHER}, zero(3)),
}


def with_marks(cases: Iterable[str], *full: str) -> list[Any]:
    """The names of all cases; those in `full` only run with --all."""
    return [pytest.param(case, marks=pytest.mark.full) if case in full else case for case in cases]


def training_config(engine: dict[str, Any], **changes: Any) -> TrainingConfig:
    """6 sequences a micro-step: on 4 ranks 2, 2, 1 and 1."""
    settings: dict[str, Any] = {
        "steps": STEPS,
        "global_batch": 12,
        "micro_steps": 2,
        "sequence_length": 8,
        "clip_norm": 0.5,
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"warmup_steps": 5},
        "engine": engine,
    }
    return TrainingConfig.model_validate(settings | changes)


class OneRun:
    """A model on this rank, and the engine that trains it."""

    def __init__(self, rank: int, layout: dict[str, Any], config: TrainingConfig, defect: str = "") -> None:
        world = layout["world"]
        self.config = config
        self.runtime = Runtime(
            Launch("test", rank, world, rank, world), torch.device("cpu"), "gloo", timedelta(seconds=120)
        )
        self.mesh, self.model = build_on(layout, {**MODEL, **layout.get("model", {})}, SEED, DTYPES[config.dtype])
        optimizer = build_optimizer(config.optimizer, self.model, config.trainable)
        with pytest.MonkeyPatch.context() as patch:
            if config.engine.kind == "deepspeed":
                change_engine(patch, defect)
            self.engine = ENGINES[config.engine.kind](self.model, optimizer, self.mesh, self.runtime, config)

    def step(self, step: int) -> tuple[float, float]:
        mine = batches(self.config, step, self.mesh.degrees.dp, self.mesh.dp_rank)
        report = train_step(self.model, self.engine, mine, self.config, self.mesh, step=step, seed=SEED)
        return report.loss, report.grad_norm

    def held_out_loss(self) -> float:
        mine = batches(self.config, 1000, self.mesh.degrees.dp, self.mesh.dp_rank)
        return evaluate(self.model, self.engine, mine, self.mesh, seed=SEED).loss

    def weights(self) -> dict[str, Tensor]:
        """By logical name, what this rank computes with."""
        whole = {logical: logical.parameter.detach() for logical in logical_parameters(self.model)}
        if self.config.engine.kind == "deepspeed":
            from deepspeed.utils import safe_get_full_fp32_param  # what it updates; not read by zero.py

            if self.config.engine.zero_stage > 0:
                whole = {logical: safe_get_full_fp32_param(logical.parameter) for logical in whole}
        return named(whole)

    def gradients(self) -> dict[str, Tensor]:
        """After the last backward pass, before clipping."""
        from deepspeed.utils import safe_get_full_grad

        return named({p: safe_get_full_grad(p.parameter) for p in logical_parameters(self.model)})


def named(whole: dict[Any, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for logical, tensor in whole.items():
        parts = tensor.unbind(0) if logical.is_expert else (tensor,)
        found |= {name: part.clone() for name, part in zip(logical.names, parts, strict=True)}
    return found


def change_engine(patch: pytest.MonkeyPatch, defect: str) -> None:
    """ZeRO-3 gathers the smallest weights, too, as it does those of real models."""
    from expert_parallel.training.engines import deepspeed as engine

    original = engine.deepspeed_config

    def settings(*arguments: Any, **named: Any) -> dict[str, Any]:
        found = original(*arguments, **named)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    patch.setattr(engine, "deepspeed_config", settings)
    if defect == "experts are not marked":
        patch.setattr(engine, "mark_experts", lambda model, *_: engine.TupleOutput(model))


def train(
    rank: int, layout: dict[str, Any], engine: dict[str, Any], steps: int = STEPS, defect: str = ""
) -> dict[str, Any]:
    run = OneRun(rank, layout, training_config(engine), defect)
    seen: dict[str, Any] = {"begin": run.weights()}
    update = run.engine.update

    def look(rate: float) -> float:
        seen["gradients"] = run.gradients()
        return update(rate)

    def look_at_clipped(*_: Any) -> None:
        seen.setdefault("clipped", run.gradients())

    if engine["kind"] == "deepspeed":
        run.engine.update = look  # type: ignore[method-assign]
    else:
        run.engine.optimizer.register_step_pre_hook(look_at_clipped)
    reports = [run.step(0)]
    run.engine.update = update  # type: ignore[method-assign]
    seen["after"] = run.weights()
    reports += [run.step(step) for step in range(1, steps)]
    seen["losses"] = [loss for loss, _ in reports] + [run.held_out_loss()]
    seen["norms"] = [norm for _, norm in reports]
    if "clipped" in seen:
        seen["gradients"] = {name: grad * (seen["norms"][0] / 0.5) for name, grad in seen["clipped"].items()}
    return seen


@cache
def trained(layout: str, engine: str, steps: int) -> list[dict[str, Any]]:
    tree = json.loads(layout)
    return run_ranks(tree["world"], train, tree, json.loads(engine), steps)


def native(layout: dict[str, Any], steps: int = FEW_STEPS) -> list[dict[str, Any]]:
    return trained(json.dumps(layout), json.dumps(NATIVE), steps)


def by_engine(case: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of every rank: by the engine, and by the native one in the same layout."""
    layout, engine = ENGINE_CASES[case]
    steps = STEPS if case == "zero 2" else FEW_STEPS
    return trained(json.dumps(layout), json.dumps(engine), steps), native(layout, steps)


# ---------------------------------------------------------------------------------------------- the same training


@pytest.mark.parametrize("case", with_marks(ENGINE_CASES, "zero 0", "zero 1, further tokens", "zero 3, further tokens"))
def test_losses_are_the_native_engines(case: str) -> None:
    """Of 7 steps with ZeRO 2 (4 otherwise), and of held-out sequences after them. Every step clips."""
    results, expected = by_engine(case)
    assert min(expected[0]["norms"]) > 0.5, "clipping must be at work"
    for result in results:
        assert result["losses"] == pytest.approx(expected[0]["losses"], rel=1e-6)
        assert result["norms"][0] == pytest.approx(expected[0]["norms"][0], rel=1e-6)
        assert result["norms"] == pytest.approx(expected[0]["norms"], rel=1e-4)  # rounding, grown over the steps


@pytest.mark.parametrize("case", with_marks(ENGINE_CASES, "zero 0", "zero 1, further tokens", "zero 3, further tokens"))
def test_gradients_of_the_first_step_are_the_native_engines(case: str) -> None:
    """Parameter by parameter, relative to its largest element."""
    for result, expected in zip(*by_engine(case), strict=True):
        assert result["gradients"].keys() == expected["gradients"].keys()
        for name, grad in result["gradients"].items():
            wanted = expected["gradients"][name]
            assert float((grad - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max()), name


def what_is_wrong_with_experts(results: list[dict[str, Any]], expected: list[dict[str, Any]]) -> set[str]:
    """Each rank must begin with the weights that it was given, bit for bit; replicas must stay equal, bit for bit; and
    no two experts may be equal. After a step, all are what the native engine has made of them."""
    wrong = set()
    for when in ("begin", "after"):
        seen: dict[str, Tensor] = {}
        for result, native_result in zip(results, expected, strict=True):
            for name, weight in result[when].items():
                if not torch.equal(seen.setdefault(name, weight), weight):
                    wrong.add("replicas differ")
                tolerance = 0.0 if when == "begin" else 1e-5
                if not torch.allclose(weight, native_result[when][name], rtol=tolerance, atol=tolerance):
                    wrong.add(f"{when}: another weight")
        matrices = [weight for name, weight in seen.items() if ".experts." in name and name.endswith("w_in")]
        if any(torch.equal(one, other) for one, other in itertools.combinations(matrices, 2)):
            wrong.add(f"{when}: two experts are one")
    return wrong


@pytest.mark.parametrize("case", with_marks(ENGINE_CASES, "zero 0", "zero 1, further tokens", "zero 3, further tokens"))
def test_experts_stay_apart_and_their_replicas_together(case: str) -> None:
    assert not what_is_wrong_with_experts(*by_engine(case))


def test_the_defect_of_experts_that_are_not_marked_is_found() -> None:
    """As DeepSpeed takes our model if nobody tells it: rank 0's experts are everywhere, and averaged."""
    results = run_ranks(4, train, EP2, zero(2), 1, "experts are not marked")
    wrong = what_is_wrong_with_experts(results, native(EP2))
    assert wrong >= {"begin: another weight", "begin: two experts are one", "after: another weight"}


# ------------------------------------------------------------------------------------------------------- checkpoints


def save(run: OneRun, folder: Path, step: int) -> None:
    settings = CheckpointConfig(background=True)
    about: dict[str, Any] = {"config": {"model": MODEL}, "layout": "a test", "print_rank_0": lambda text: None}
    with CheckpointSaver(folder, run.model, run.engine.state, run.mesh, run.runtime, settings, **about) as saver:
        saver.save(step, is_last=True)


def begin(rank: int, layout: dict[str, Any], engine: dict[str, Any], folder: Path) -> None:
    run = OneRun(rank, layout, training_config(engine))
    for step in range(3):
        run.step(step)
    save(run, folder, 3)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any], dict[str, Any]], Path]:
    """The folder of a run that has saved its third step, made once for each layout and engine; nobody changes it."""

    @cache
    def run(layout: str, engine: str) -> Path:
        folder, tree = tmp_path_factory.mktemp("begun"), json.loads(layout)
        run_ranks(tree["world"], begin, tree, json.loads(engine), folder)
        return folder

    return lambda layout, engine: run(json.dumps(layout), json.dumps(engine))


def go_on(rank: int, layout: dict[str, Any], engine: dict[str, Any], folder: Path, again: Path) -> list[float]:
    """Losses of 3 more steps. What was loaded is saved once more before them."""
    run = OneRun(rank, layout, training_config(engine))
    load_checkpoint(folder / "step_00000003", run.model, run.engine.state, run.runtime, run.mesh)
    save(run, again, 3)
    return [run.step(step)[0] for step in range(3, 6)]


CHECKPOINT_CASES = {
    "native to zero 0": (EP2, NATIVE, EP2, zero(0)),
    "native to zero 1, other ranks": ({"world": 2}, NATIVE, EP2, zero(1)),
    "native to zero 3": (EP2, NATIVE, EP1, zero(3)),
    "zero 1 to native": (EP2, zero(1), EP2, NATIVE),
    "zero 2, offload, to native": (EP2, zero(2, offload="cpu"), {"world": 2, "ep": 2}, NATIVE),
    "zero 3 to native": (EP1, zero(3), EP2, NATIVE),
    "zero 3 to zero 2": ({"world": 3}, zero(3), EP2, zero(2)),
}


def digests(folder: Path) -> dict[str, str]:
    """Of every weight and moment."""
    manifest = json.loads((folder / "step_00000003" / "manifest.json").read_text())
    return {name: entry["digest"] for name, entry in manifest["tensors"].items()}


@pytest.mark.parametrize("case", with_marks(CHECKPOINT_CASES, "zero 1 to native", "zero 3 to native"))
def test_a_run_goes_on_under_another_engine(
    case: str, begun: Callable[[dict[str, Any], dict[str, Any]], Path], tmp_path: Path
) -> None:
    """By the same files, moments included: the losses are those of an undisturbed run, and what is loaded and saved
    again is bit for bit what it was."""
    first, first_engine, second, second_engine = CHECKPOINT_CASES[case]
    saved = begun(first, first_engine)
    results = run_ranks(second["world"], go_on, second, second_engine, saved, tmp_path)
    for losses in results:
        assert losses == pytest.approx(native(EP2, STEPS)[0]["losses"][3:6], rel=1e-6)
    found = digests(saved)
    assert {name.split("/")[0] for name in found} == {"weights", "exp_avg", "exp_avg_sq"}
    assert digests(tmp_path) == found


def begin_from_weights(rank: int, engine: dict[str, Any], folder: Path) -> list[float]:
    """As `checkpoint.start_from` does."""
    layout = EP1 if engine.get("zero_stage") == 3 else EP2
    run = OneRun(rank, layout, training_config(engine))
    path = folder / "step_00000003"
    load_checkpoint(path, run.model, run.engine.state, run.runtime, run.mesh, model_only=True)
    return [run.step(step)[0] for step in range(3)]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_begins_with_the_weights_of_another(
    stage: int, begun: Callable[[dict[str, Any], dict[str, Any]], Path]
) -> None:
    """The copies that ZeRO updates follow those that were loaded."""
    saved = begun(EP2, NATIVE)
    expected = run_ranks(4, begin_from_weights, NATIVE, saved)[0]
    assert run_ranks(4, begin_from_weights, zero(stage), saved)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(7,), (4, 3), (3, 1, 5), (2, 3, 4), (1, 6)], ids=str)
def test_a_range_is_cut_into_rectangles(shape: tuple[int, ...]) -> None:
    """Every range of every shape: in order, each element once, few rectangles."""
    whole = torch.arange(math.prod(shape)).view(shape)
    for begin, end in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        found = []
        cuts = list(rectangles(shape, begin, end))
        for place, extent in cuts:
            part = whole
            for dim, (first, size) in enumerate(zip(place, extent, strict=True)):
                part = part.narrow(dim, first, size)
            assert part.numel() > 0
            found += part.flatten().tolist()
        assert found == list(range(begin, end))
        assert len(cuts) <= 2 * len(shape) - 1


# ------------------------------------------------------------------------------- chosen experts, recomputation, dtypes

CHOSEN = {"kind": "experts", "experts": [1, 5], "router": "chosen"}
VARIANTS = {
    "frozen, zero 0": (EP2, zero(0), {"trainable": CHOSEN}),
    "frozen, zero 2": (EP2, zero(2), {"trainable": CHOSEN}),
    "frozen, zero 3": (EP1, zero(3), {"trainable": CHOSEN}),
    "recomputed, zero 2": (EP2, zero(2), {"recompute": "moe"}),
    "recomputed, zero 3": (EP1, zero(3), {"recompute": "block"}),
    "no clipping, zero 1": (EP2, zero(1), {"clip_norm": None, "micro_steps": 1}),
    "bfloat16, zero 1": (EP2, zero(1), {"dtype": "bfloat16"}),
}


def train_variant(
    rank: int, layout: dict[str, Any], engine: dict[str, Any], changes: dict[str, Any], folder: Path
) -> tuple[list[tuple[float, float]], dict[str, Tensor], dict[str, Tensor]]:
    """From a checkpoint with moments: losses and norms of 3 steps; weights before and after."""
    run = OneRun(rank, layout, training_config(engine, **changes))
    load_checkpoint(folder / "step_00000003", run.model, run.engine.state, run.runtime, run.mesh)
    before = run.weights()
    reports = [run.step(step) for step in range(3, 6)]
    return reports, before, run.weights()


@pytest.mark.parametrize("case", with_marks(VARIANTS, "frozen, zero 0", "recomputed, zero 2"))
def test_other_settings_do_what_they_do_natively(
    case: str, begun: Callable[[dict[str, Any], dict[str, Any]], Path]
) -> None:
    """With momentum and decay; what is frozen stays bit for bit."""
    layout, engine, changes = VARIANTS[case]
    # Weights that differ in their last bits may round to neighbouring bfloat16 numbers: on a processor without bfloat16
    # products that is 2e-5 of the third step's norm, and up to 3.4e-5 of a weight after it.
    norm_tolerance, weight_tolerance = (1e-4, 1e-4) if changes.get("dtype") == "bfloat16" else (1e-5, 1e-6)
    saved = begun(EP2, NATIVE)
    natively = run_ranks(4, train_variant, layout, NATIVE, changes, saved)
    results = run_ranks(4, train_variant, layout, engine, changes, saved)
    for (reports, before, after), (expected, _, wanted) in zip(results, natively, strict=True):
        for (loss, norm), (expected_loss, expected_norm) in zip(reports, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert norm == pytest.approx(expected_norm, rel=norm_tolerance)
        for name, weight in after.items():
            torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=weight_tolerance)
            is_chosen = ".experts.1." in name or ".experts.5." in name or ".router." in name
            assert torch.equal(weight, before[name]) == ("trainable" in changes and not is_chosen), name


# -------------------------------------------------------------------------------------------------- what is refused

TREE: dict[str, Any] = {
    "run": {"folder": "runs/x"},
    "model": {**MODEL, "vocab_size": 256},
    "training": {"steps": 1, "global_batch": 4, "sequence_length": 8, "engine": zero(1)},
}
# A block's changes, and what the refusal says.
REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("training", {"dtype": "float64"}, "training.dtype is 'float64': DeepSpeed reduces gradients in float32"),
    (
        "training",
        {"engine": zero(0, offload="cpu")},
        "training.engine.zero_stage is 0: DeepSpeed offloads only what ZeRO",
    ),
    ("training", {"engine": zero(4)}, "input should be 0, 1, 2 or 3"),
    ("parallel", {"tp": 2}, "training.engine.kind is 'deepspeed' but parallel.tp is 2"),
    ("parallel", {"pp": 2}, "training.engine.kind is 'deepspeed' but parallel.pp is 2"),
    ("parallel", {"etp": 2}, "training.engine.kind is 'deepspeed' but parallel.etp is 2"),
    ("parallel", {"data": {"kind": "sharded"}}, "parallel.data.kind is 'sharded': set it to 'replicated'"),
]
ZERO_3_REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("parallel", {"ep": 2}, "training.engine.zero_stage is 3 but parallel.ep is 2"),
    ("run", {"folder": "x", "sample": {"prompt": "a"}}, "training.engine.zero_stage is 3 but run.sample is given"),
]


@pytest.mark.parametrize(
    ("stage", "block", "changes", "words"),
    [*((1, *case) for case in REFUSALS), *((3, *case) for case in ZERO_3_REFUSALS)],
)
def test_what_it_cannot_do_is_refused(stage: int, block: str, changes: dict[str, Any], words: str) -> None:
    training = {**TREE["training"], "engine": zero(stage)}
    tree = {**TREE, "training": training}
    Config.model_validate(tree)
    with pytest.raises(ValueError, match=words):
        Config.model_validate({**tree, block: {**tree.get(block, {}), **changes}})


def test_check_names_the_engine_and_its_memory() -> None:
    """Of 4 ranks with ep 2, dense weights are shared by 4, experts by 2; with ZeRO 2 a rank keeps a weight, and of
    gradient, updated weight and two moments its share."""
    parallel = {"ep": 2}

    def config(engine: dict[str, Any]) -> Config:
        return Config.model_validate({**TREE, "parallel": parallel, "training": {**TREE["training"], "engine": engine}})

    text = format_config_report(config(zero(2)), 4)
    assert "edp 2, ep 2, etp 1, replicated, DeepSpeed ZeRO 2\n" in text
    counts = config(NATIVE).model.parameter_counts()
    degrees = config(NATIVE).parallel.degrees(4)
    assert state_memory(config(zero(2)), degrees).state == 4 * (counts.dense * 2 + counts.experts // 2 * 3)
    assert state_memory(config(zero(0)), degrees) == state_memory(config(NATIVE), degrees)


# ---------------------------------------------------------------------------------------------- by the command line


def losses_of(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines[1:]]


def train_natively(rank: int, path: Path, overrides: list[str], steps: list[int]) -> None:
    """As a user who starts it several times would."""
    runtime = Runtime(Launch("test", rank, 2, rank, 2), torch.device("cpu"), "gloo", timedelta(seconds=120))
    for number in steps:
        loop.train(load_config(path, [*overrides, f"training.steps={number}"]), runtime)


@pytest.mark.system
def test_runs_under_its_own_launcher_and_goes_on_natively(tmp_path: Path) -> None:
    """Two steps by DeepSpeed under the deepspeed launcher, two more by the native engine: as if that had made all."""
    for name in ("mixed", "native"):
        (tmp_path / name).mkdir()
    mixed, alone = (small_config(tmp_path / name) for name in ("mixed", "native"))
    settings = ["training.dtype=float32", "training.schedule.warmup_steps=0"]
    engine = ["training.engine.kind=deepspeed", "training.engine.zero_stage=2"]
    result = start("deepspeed", "train", mixed, *settings, *engine)
    assert result.returncode == 0, result.output
    assert "etp 1, replicated, DeepSpeed ZeRO 2\n" in result.output
    run_ranks(2, train_natively, mixed, settings, [4])
    run_ranks(2, train_natively, alone, settings, [2, 4])
    assert losses_of(tmp_path / "mixed") == pytest.approx(losses_of(tmp_path / "native"), rel=1e-6)
