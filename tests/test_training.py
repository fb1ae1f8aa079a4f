"""Whole training steps on real ranks against one rank with slow, obviously right MoE layers, in float64; and what is
told of a step: the totals of each layer, and the metrics made of them.

Losses over 8 steps (3 in most layouts), the gradient norm, and every parameter's gradient of the first step: for each
layout, with accumulation and recomputation, with weights replicated and sharded. Clipping is at work, so a wrong norm
shows.
"""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from expert_parallel.data.batch import MicroBatch, micro_batch
from expert_parallel.data.sampler import TokenSampler
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.transformer import LanguageModel, ModelConfig
from expert_parallel.moe.conservation import LayerTotals, report_breaches
from expert_parallel.moe.context import RouterReplay, StepContext
from expert_parallel.moe.dispatch.ledger import LedgerBreach, LedgerConfig
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.moe.reference.reference_layer import reference_layer
from expert_parallel.moe.routers.losses import loss_name
from expert_parallel.moe.types import MoEOutput
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.training.config import DTYPES, TrainingConfig
from expert_parallel.training.engines.native import NativeEngine
from expert_parallel.training.grads import clip_gradients
from expert_parallel.training.metrics import coefficient_of_variation, step_metrics
from expert_parallel.training.optim import build_optimizer
from expert_parallel.training.step import StepReport, evaluate, train_step
from tests.layouts import build_on
from tests.pairwise import all_cases
from tests.ranks import run_ranks

STEPS = 8  # in LONG_LAYOUTS: past the warm-up, so that what is wrong by little grows until it shows
FEW_STEPS = 3  # in the others
SEED = 3

MODEL = {
    "vocab_size": 32,
    "num_layers": 3,
    "d_model": 16,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_size": 6},
    "norm_placement": "sandwich",
    "unembedding_bias": True,
    "residual_multiplier": 0.7,
    "logits_divisor": 0.8,
    "ffn": {"hidden": 20},
    "moe_blocks": {"kind": "all_but_first", "k": 1},
    "moe": {
        "num_experts": 8,
        "router": {"k": 2, "balance_bias_rate": 0.001},
        "losses": [
            {"kind": "balance", "coefficient": 0.1},
            {"kind": "balance", "coefficient": 0.1, "scope": "sequence"},
            {"kind": "z_loss", "coefficient": 0.01},
        ],
        "experts": {"hidden": 12, "bias": True},
        "shared_experts": {"hidden": 8},
    },
    "init_std": 0.3,
}

# 6 sequences a micro-step: on 4 ranks they are 2, 2, 1 and 1.
LAYOUTS = [
    {"world": 1, "ep": 1, "data": "replicated", "micro_steps": 1, "recompute": "none"},
    {"world": 2, "ep": 2, "data": "replicated", "micro_steps": 1, "recompute": "none"},
    {"world": 4, "ep": 4, "data": "replicated", "micro_steps": 1, "recompute": "none"},
    {"world": 4, "ep": 2, "data": "replicated", "micro_steps": 1, "recompute": "none"},
    {"world": 1, "ep": 1, "data": "replicated", "micro_steps": 2, "recompute": "block"},
    {"world": 2, "ep": 1, "data": "replicated", "micro_steps": 2, "recompute": "moe"},
    {"world": 2, "ep": 2, "data": "replicated", "micro_steps": 2, "recompute": "block"},
    {"world": 4, "ep": 4, "data": "replicated", "micro_steps": 2, "recompute": "moe"},
    {"world": 4, "ep": 2, "data": "replicated", "micro_steps": 2, "recompute": "block"},
    {"world": 2, "ep": 1, "data": "sharded", "micro_steps": 1, "recompute": "none"},
    {"world": 2, "ep": 2, "data": "sharded", "micro_steps": 2, "recompute": "block"},
    {"world": 4, "ep": 2, "data": "sharded", "micro_steps": 1, "recompute": "none"},
    {"world": 4, "ep": 2, "data": "sharded", "micro_steps": 2, "recompute": "moe"},
    {"world": 4, "ep": 4, "data": "sharded", "micro_steps": 1, "recompute": "none"},
    {"world": 2, "tp": 2, "ep": 2, "data": "replicated", "micro_steps": 1, "recompute": "none"},
    {"world": 4, "tp": 2, "ep": 2, "data": "replicated", "micro_steps": 2, "recompute": "block"},
    {"world": 4, "tp": 4, "ep": 2, "data": "replicated", "micro_steps": 1, "recompute": "none"},
    {"world": 4, "tp": 2, "ep": 4, "data": "sharded", "micro_steps": 2, "recompute": "moe"},
    {"world": 2, "cp": 2, "ep": 2, "data": "replicated", "micro_steps": 1, "recompute": "none"},
    {"world": 4, "cp": 2, "tp": 2, "ep": 4, "data": "sharded", "micro_steps": 1, "recompute": "none"},
    {"world": 4, "pp": 2, "tp": 2, "ep": 2, "data": "replicated", "micro_steps": 2, "recompute": "block"},
    {"world": 4, "pp": 2, "ep": 2, "data": "sharded", "micro_steps": 2, "recompute": "moe"},
    {"world": 4, "tp": 2, "ep": 2, "etp": 2, "data": "replicated", "micro_steps": 1, "recompute": "none"},
    {"world": 4, "ep": 2, "data": {"kind": "sharded", "shards": 2}, "micro_steps": 1, "recompute": "none"},
]
LONG_LAYOUTS = [LAYOUTS[3], LAYOUTS[11]]  # weights replicated and sharded
FACTORS = {
    "world": [1, 2, 4],
    "ep": [1, 2, 4],
    "data": ["replicated", "sharded"],
    "micro_steps": [1, 2],
    "recompute": ["none", "moe", "block"],
}
OTHER_LAYOUTS = [
    *(case for case in all_cases(FACTORS, lambda case: case["ep"] <= case["world"]) if case not in LAYOUTS),
    {"world": 8, "ep": 4, "data": "sharded", "micro_steps": 1, "recompute": "moe"},
    {"world": 8, "ep": 8, "data": "replicated", "micro_steps": 2, "recompute": "block"},
]


def training_config(layout: dict[str, Any]) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "steps": STEPS,
            "global_batch": (8 if layout["world"] == 8 else 6) * layout["micro_steps"],
            "micro_steps": layout["micro_steps"],
            "sequence_length": 8,
            "dtype": layout.get("dtype", "float64"),
            "recompute": layout["recompute"],
            "clip_norm": 0.5,
            "optimizer": {"learning_rate": 0.01},
            "schedule": {"warmup_steps": 5},
        }
    )


def sampler() -> TokenSampler:
    tokens = torch.randint(0, 32, (2000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return TokenSampler(tokens, 8, SEED)


def batches(config: TrainingConfig, step: int, num_ranks: int, rank: int) -> Iterator[MicroBatch]:
    for number in range(config.micro_steps):
        yield micro_batch(
            sampler(),
            step=step,
            global_batch=config.global_batch,
            num_micro_steps=config.micro_steps,
            micro_step=number,
            num_ranks=num_ranks,
            rank=rank,
        )


def train(rank: int, layout: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """On one rank: the losses, norms and balance losses of every step; the first step's gradients, by logical name.
    After all steps, the loss of held-out sequences too."""
    config = training_config(layout)
    mesh, model = build_on(layout, {**MODEL, **layout.get("model", {})}, SEED, DTYPES[config.dtype])
    return run_steps(model, config, mesh, steps)


def run_steps(model: LanguageModel, config: TrainingConfig, mesh: ParallelMesh, steps: int) -> dict[str, Any]:
    optimizer = build_optimizer(config.optimizer, model)
    engine = NativeEngine(model, optimizer, mesh, config.clip_norm)
    grads: dict[str, torch.Tensor] = {}

    def record(*_: Any) -> None:
        if not grads:
            for logical in logical_parameters(model):
                assert logical.parameter.grad is not None
                grads.update(logical.whole(logical.parameter.grad.clone()))

    optimizer.register_step_pre_hook(record)
    reports = []
    for step in range(steps):
        mine = batches(config, step, mesh.degrees.dp, mesh.dp_rank)
        reports.append(train_step(model, engine, mine, config, mesh, step=step, seed=SEED))
    losses = [report.loss for report in reports]
    if steps == STEPS:
        held_out = batches(config, 1000, mesh.degrees.dp, mesh.dp_rank)
        losses.append(evaluate(model, engine, held_out, mesh, seed=SEED).loss)
    return {
        "losses": losses,
        "norms": [report.grad_norm for report in reports],
        "moe_losses": [report.layers[layer].losses for report in reports for layer in report.layers],
        "routed": [report.layers[layer].routed_E.tolist() for report in reports for layer in report.layers],
        "grads": grads,
    }


@cache
def slow(micro_steps: int, global_batch: int) -> dict[str, Any]:
    """One rank, with the MoE layers of moe/reference/reference_layer.py. In a pool of one, for its process group."""
    layout = {"world": 8 if global_batch % 8 == 0 else 1, "micro_steps": micro_steps}
    return run_ranks(1, train_slowly, layout, STEPS if global_batch == 6 else FEW_STEPS)[0]


def train_slowly(rank: int, layout: dict[str, Any], steps: int) -> dict[str, Any]:
    config = training_config({**layout, "recompute": "none"})
    model = build_model(ModelConfig.model_validate(MODEL), dtype=torch.float64, seed=SEED)
    for block in model.blocks:
        if block.moe is not None:
            block.moe.forward = SlowLayer(block.moe)  # type: ignore[assignment]
    return run_steps(model, config, build_on({"world": 1}, MODEL, SEED)[0], steps)


class SlowLayer:
    """In place of MoELayer.forward."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer, self.fast = layer, layer.forward

    def __call__(self, x: torch.Tensor, context: Any) -> MoEOutput:
        layer, config = self.layer, self.layer.config
        parameters: dict[str, torch.Tensor] = {"router.balance_bias_E": layer.router.balance_bias_E}  # type: ignore[dict-item]
        for logical in logical_parameters(layer):
            parameters.update(logical.whole(logical.parameter))
        reference = reference_layer(config, parameters, [x])
        with torch.no_grad():
            stats = self.fast(x, context).stats
        assert stats.routed_E.tolist() == reference.routed_E
        losses = {loss_name(loss): loss.coefficient * reference.losses[loss_name(loss)] for loss in config.losses}
        stats.losses.update({name: value.detach() for name, value in reference.losses.items()})
        return MoEOutput(reference.y[0], losses, stats)


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.full) for layout in OTHER_LAYOUTS)],
    ids=lambda layout: "-".join(map(str, layout.values())),
)
def test_every_layout_trains_the_same_model(layout: dict[str, Any]) -> None:
    expected = slow(layout["micro_steps"], training_config(layout).global_batch)
    assert sum(norm > 0.5 for norm in expected["norms"]) >= 3, "clipping must be at work"
    steps = STEPS if layout in LONG_LAYOUTS else FEW_STEPS
    results = run_ranks(layout["world"], train, layout, steps)
    seen = set()
    for result in results:
        assert result["losses"][:steps] == pytest.approx(expected["losses"][:steps], rel=1e-9)
        if steps == STEPS:  # and of held-out sequences, after it
            assert result["losses"][-1] == pytest.approx(expected["losses"][-1], rel=1e-9)
        assert result["norms"] == pytest.approx(expected["norms"][:steps], rel=1e-8)
        moe_losses = expected["moe_losses"][: len(result["moe_losses"])]
        assert result["routed"] == expected["routed"][: len(result["routed"])]
        assert len(result["routed"]) == steps * 2
        for actual_losses, expected_losses in zip(result["moe_losses"], moe_losses, strict=True):
            assert actual_losses == pytest.approx(expected_losses, rel=1e-9)
        for name, grad in result["grads"].items():
            torch.testing.assert_close(
                grad, expected["grads"][name], rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
        seen |= set(result["grads"])
    assert seen == set(expected["grads"])


@pytest.mark.parametrize("data", ["replicated", "sharded"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_lower_precision_stays_near(dtype: str, tolerance: float, data: str) -> None:
    """The grouped_mm backend, on its way through a whole step. Routing differs where scores nearly tie."""
    expected = slow(1, 6)["losses"][:FEW_STEPS]
    layout = {**LAYOUTS[3], "data": data, "dtype": dtype}
    for result in run_ranks(4, train, layout, FEW_STEPS):
        assert result["losses"] == pytest.approx(expected, rel=tolerance)


def test_a_norm_below_the_limit_scales_nothing() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[0.3, 0.4]])
    clip_gradients(layer, torch.tensor(0.5, dtype=torch.float64), 1.0)
    assert layer.weight.grad.tolist() == torch.tensor([[0.3, 0.4]]).tolist()
    clip_gradients(layer, torch.tensor(0.5, dtype=torch.float64), 0.25)
    assert layer.weight.grad.tolist() == torch.tensor([[0.15, 0.2]]).tolist()


def test_loss_falls() -> None:
    losses = slow(1, 6)["losses"]
    assert sum(losses[5:8]) < sum(losses[:3])


# ------------------------------------------------------------------------------------------- what is told of a step


def layer_totals(**changes: Any) -> LayerTotals:
    """Two experts, 7 choices of 4 tokens: expert 0 has 3, expert 1 two of 4; 6 rows travelled with tokens."""
    rows = dict.fromkeys(("dispatch", "combine", "combine backward", "dispatch backward"), 6)
    nothing = torch.tensor([0, 0])
    totals = LayerTotals(
        routed_E=torch.tensor([3, 4]),
        kept_E=torch.tensor([3, 2]),
        rerouted_E=nothing,
        dropped_capacity_E=torch.tensor([0, 2]),
        dropped_receive_bound_E=nothing,
        computed_E=torch.tensor([3, 2]),
        num_tokens=4,
        num_tokens_without_expert=1,
        entropy=2.0,
        gathered_bytes=5,
        rows_own=1,
        rows_sent=rows,
        rows_received=dict(rows),
        rows_moved={"node": 12, "network": 8},
        bytes_sent={"node": 120, "network": 80},
        losses={"balance_global": 1.5, "balance_rank": 2.5, "z_loss": 3.0},
    )
    return replace(totals, **changes)


BREACHES = {
    "a choice is lost": ({"kept_E": torch.tensor([2, 2])}, "7 choices were routed, 6 kept, rerouted or dropped"),
    "a choice is not computed": (
        {"computed_E": torch.tensor([3, 1])},
        "expert 1 was to compute 2 choices and computed 1",
    ),
    "a row is lost": (
        {"rows_received": {**layer_totals().rows_received, "combine": 5}},
        "combine: 6 rows were sent, 5 received",
    ),
    "a row does not return": (
        {name: {**layer_totals().rows_sent, "combine": 5} for name in ("rows_sent", "rows_received")},
        "combine: 5 rows were sent, but 6 with tokens",
    ),
}


@pytest.mark.parametrize("case", BREACHES)
def test_totals_that_do_not_balance_are_refused(case: str) -> None:
    changes, words = BREACHES[case]
    report_breaches(layer_totals(), LedgerConfig(), layer=3, step=4)
    wrong = layer_totals(**changes)
    with pytest.raises(LedgerBreach, match=f"layer 3, step 4, {words}"):
        report_breaches(wrong, LedgerConfig(), layer=3, step=4)
    with pytest.warns(RuntimeWarning, match=words):
        report_breaches(wrong, LedgerConfig(breach="warn"), layer=3, step=4)


def test_a_pooled_loss_is_shown_whole() -> None:
    """Two layers' parts, 0.6 and 0.4, are a loss of 1: shown times 2 a layer, so that their mean is the loss."""
    layers = {i: layer_totals(losses={"balance_global_pooled": part}) for i, part in ((1, 0.6), (5, 0.4))}
    metrics = step_metrics(StepReport(1.25, 4, layers, 0.5, 0.01), "train")
    assert metrics["moe/balance_loss"] == metrics["moe/balance_global_pooled"] == pytest.approx(1.0)
    assert metrics["moe/layer_1/balance_loss"] == pytest.approx(1.2)


def test_metrics_by_hand() -> None:
    """Layer 1: 2 of 7 choices dropped, loads 3 and 4 (std 0.5, mean 3.5), 1 of 4 tokens unserved, entropy 2 / 4.

    Layer 5: expert 1 is dead, its 4 choices are expert 0's by rerouting; all else is the same but for the losses.
    """
    second = layer_totals(
        routed_E=torch.tensor([7, 0]),
        kept_E=torch.tensor([3, 0]),
        rerouted_E=torch.tensor([2, 0]),
        dropped_capacity_E=torch.tensor([0, 0]),
        dropped_receive_bound_E=torch.tensor([2, 0]),
        losses={"balance_global": 2.5, "balance_rank": 3.5, "z_loss": 5.0},
    )
    metrics = step_metrics(StepReport(1.25, 4, {1: layer_totals(), 5: second}, 0.5, 0.01), "train")
    expected = {
        "dropped_share": 2 / 7,
        "dropped_receive_bound_share": 0.0,
        "rerouted_share": 0.0,
        "unserved_share": 0.25,
        "load_cv": 0.5 / 3.5,
        "dead_expert_share": 0.0,
        "router_entropy": 0.5,
        "rows_in_node": 12,
        "rows_between_nodes": 8,
        "bytes_in_node": 120,
        "bytes_between_nodes": 80,
        "bytes_gathered": 5,
        "balance_loss": 2.0,
        "balance_global": 1.5,
        "balance_rank": 2.5,
        "z_loss": 3.0,
    }
    loads = {"load/0": 0.6, "load/1": 0.4}
    changed = {"dropped_receive_bound_share": 2 / 7, "rerouted_share": 2 / 7, "load_cv": 1.0, "dead_expert_share": 0.5}
    changed |= {"balance_loss": 3.0, "balance_global": 2.5, "balance_rank": 3.5, "z_loss": 5.0}
    other = {**expected, **changed}
    wanted = {"train/loss": 1.25, "train/grad_norm": 0.5, "train/learning_rate": 0.01}
    wanted |= {f"moe/layer_1/{name}": value for name, value in (expected | loads).items()}
    wanted |= {f"moe/layer_5/{name}": value for name, value in (other | {"load/0": 1.0, "load/1": 0.0}).items()}
    wanted |= {f"moe/{name}": (expected[name] + other[name]) / 2 for name in expected}
    assert metrics == pytest.approx(wanted, rel=1e-12)

    held_out = step_metrics(StepReport(1.25, 4, {1: layer_totals(), 5: second}), "eval")
    assert set(held_out) == {"eval/loss"} | {f"eval/{name}" for name in metrics if name.startswith("moe/")}
    assert step_metrics(StepReport(1.25, 4, {}), "eval") == {"eval/loss": 1.25}


def test_the_variation_of_loads_by_hand() -> None:
    assert coefficient_of_variation(torch.tensor([5, 5, 5])) == 0.0
    assert coefficient_of_variation(torch.tensor([9, 0, 0])) == pytest.approx(math.sqrt(2), rel=1e-12)
    assert coefficient_of_variation(torch.tensor([0, 0])) == 0.0


def totals_of(rank: int, layout: dict[str, Any], moe: dict[str, Any]) -> dict[str, Any]:
    """The totals of one training step's layers, of held-out passes before and after it, and of the same step told
    again without any evaluation."""
    config = training_config(layout)
    reports = []
    for with_evaluation in (True, False):
        tree = {**MODEL, "moe": {**MODEL["moe"], **moe}}  # type: ignore[dict-item]
        mesh, model = build_on(layout, tree, SEED)
        engine = NativeEngine(model, build_optimizer(config.optimizer, model), mesh, config.clip_norm)
        if with_evaluation:
            held_out = batches(config, 1000, mesh.degrees.dp, mesh.dp_rank)
            reports.append(evaluate(model, engine, held_out, mesh, seed=SEED))
        mine = batches(config, 0, mesh.degrees.dp, mesh.dp_rank)
        reports.append(train_step(model, engine, mine, config, mesh, step=0, seed=SEED))
    names = ("before", "step", "alone")
    return {
        name: [plainly(part) for part in report.layers.values()] for name, report in zip(names, reports, strict=True)
    }


def plainly(totals: LayerTotals) -> dict[str, Any]:
    values = {field.name: getattr(totals, field.name) for field in fields(totals)}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def assert_same_totals(actual: list[dict[str, Any]], expected: list[dict[str, Any]], but_for: tuple[str, ...]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        for name in ours.keys() - set(but_for):
            if name in ("entropy", "losses"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name
            else:
                assert ours[name] == theirs[name], name


DROPS = {"capacity": {"kind": "factor", "train": 0.9, "eval": 0.9, "minimum": 0, "overflow": "reroute"}}
LAYOUT = {"world": 2, "ep": 2, "data": "replicated", "micro_steps": 2, "recompute": "none"}


@pytest.mark.parametrize("recompute", ["moe", "block"])
@pytest.mark.parametrize("moe", [{}, DROPS], ids=["dropless", "reroute"])
def test_recomputation_changes_no_total(recompute: str, moe: dict[str, Any]) -> None:
    """Trap 10: choices, rows and bytes, forward and backward, are counted once, whatever is computed twice."""
    (expected, _), (actual, _) = (run_ranks(2, totals_of, {**LAYOUT, "recompute": r}, moe) for r in ("none", recompute))
    assert_same_totals(actual["step"], expected["step"], but_for=())
    for totals in actual["step"]:
        assert sum(totals["routed_E"]) == 2 * totals["num_tokens"] == 2 * 12 * 8
        assert totals["rows_sent"]["dispatch backward"] == totals["rows_sent"]["dispatch"] > 0


def test_micro_steps_change_no_total_but_the_losses_of_all_tokens() -> None:
    """12 sequences, in one micro-step or in two. A balance loss over all tokens is another over half of them; those of
    each sequence or token are the same on average."""
    whole = {**LAYOUT, "world": 1, "ep": 1}
    config = training_config(whole)
    assert config.global_batch == 12
    (halves,) = run_ranks(1, totals_of, whole, {})
    (once,) = run_ranks(1, totals_in_one_micro_step, whole)
    but_for = ("losses", "rows_sent", "rows_received", "rows_own", "bytes_sent")
    assert_same_totals(once, halves["step"], but_for)
    for one, two in zip(once, halves["step"], strict=True):
        assert one["rows_sent"] == two["rows_sent"]
        assert one["rows_own"] == two["rows_own"]
        for name in ("balance_sequence", "z_loss"):
            assert one["losses"][name] == pytest.approx(two["losses"][name], rel=1e-12)
        assert one["losses"]["balance_global"] != pytest.approx(two["losses"]["balance_global"], rel=1e-4)


def totals_in_one_micro_step(rank: int, layout: dict[str, Any]) -> list[dict[str, Any]]:
    config = training_config(layout).model_copy(update={"micro_steps": 1})
    mesh, model = build_on({"world": 1}, MODEL, SEED)
    engine = NativeEngine(model, build_optimizer(config.optimizer, model), mesh, config.clip_norm)
    report = train_step(model, engine, batches(config, 0, 1, rank), config, mesh, step=0, seed=SEED)
    return [plainly(part) for part in report.layers.values()]


@pytest.mark.parametrize("moe", [{}, DROPS], ids=["dropless", "reroute"])
def test_evaluation_adds_nothing_to_the_totals_of_training(moe: dict[str, Any]) -> None:
    """And has no backward pass of its own; every rank has the totals of all."""
    results = run_ranks(2, totals_of, LAYOUT, moe)
    assert results[0] == results[1]
    result = results[0]
    assert_same_totals(result["step"], result["alone"], but_for=())
    for before in result["before"]:
        assert before["num_tokens"] == 12 * 8
        assert before["rows_sent"]["dispatch"] == before["rows_sent"]["combine"] > 0
        assert before["rows_sent"]["dispatch backward"] == before["rows_sent"]["combine backward"] == 0


def test_the_totals_of_two_ranks_are_those_of_one() -> None:
    """But for what crosses between them."""
    (one,) = run_ranks(1, totals_of, {**LAYOUT, "world": 1, "ep": 1}, {})
    two = run_ranks(2, totals_of, LAYOUT, {})[0]
    moved = ("rows_sent", "rows_received", "rows_own", "rows_moved", "bytes_sent", "gathered_bytes")
    for name in ("before", "step"):
        assert_same_totals(two[name], one[name], but_for=moved)
        for ours, theirs in zip(two[name], one[name], strict=True):
            assert sum(theirs["rows_moved"].values()) == 0
            assert ours["rows_moved"]["node"] > 0
            assert ours["rows_own"] < ours["rows_sent"]["dispatch"]


# -------------------------------------------------------------------------------------------- choices played back


@pytest.mark.parametrize("moe", [{}, DROPS], ids=["dropless", "reroute"])
@pytest.mark.parametrize("recompute", ["none", "moe", "block"])
def test_a_whole_model_plays_recorded_choices_back(moe: dict[str, Any], recompute: str) -> None:
    """Its routers have changed since: the choices, and what became of them, are the recorded ones; the weights, and so
    the logits, are the changed routers', which have gradients. Another step records its own."""
    tree = {**MODEL, "moe": {**MODEL["moe"], **moe}}  # type: ignore[dict-item]
    model = build_model(ModelConfig.model_validate(tree), dtype=torch.float64, recompute=recompute, seed=SEED)
    tokens_BS = torch.randint(0, 32, (3, 8), generator=torch.Generator().manual_seed(0))
    replay = RouterReplay()
    context = StepContext(step=5, micro_step=1, replay=replay)
    first = model(tokens_BS, context)
    assert list(replay.recorded) == [(5, 1, 1), (5, 1, 2)]
    again = model(tokens_BS, context)
    assert torch.equal(again.logits, first.logits)

    for seed, layer in enumerate((1, 2)):
        weight = model.blocks[layer].moe.router.weight
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype)
    recorded = dict(replay.recorded)
    own, played = model(tokens_BS, replace(context, replay=None)), model(tokens_BS, context)
    assert replay.recorded == recorded
    for layer, stats in first.stats.items():
        for name in (
            "routed_E",
            "kept_E",
            "rerouted_E",
            "dropped_capacity_E",
            "computed_E",
            "num_tokens_without_expert",
        ):
            assert torch.equal(getattr(played.stats[layer], name), getattr(stats, name)), name
        assert not torch.equal(own.stats[layer].routed_E, stats.routed_E)
    assert not torch.allclose(played.logits, first.logits)
    assert not torch.allclose(played.logits, own.logits)
    played.logits.square().mean().backward()
    for layer in (1, 2):
        grad = model.blocks[layer].moe.router.weight.grad
        assert grad is not None
        assert bool(grad.any())

    model(tokens_BS, replace(context, step=6))
    assert list(replay.recorded) == [(5, 1, 1), (5, 1, 2), (6, 1, 1), (6, 1, 2)]


# --------------------------------------------------------------------- the proofs can fail: defects put in on purpose


def train_with_defect(rank: int, defect: str, layout: dict[str, Any]) -> dict[str, Any]:
    """One step with a known defect of the field patched in (traps 1, 2, 9 and 3)."""
    import expert_parallel.moe.routers.losses as balance
    import expert_parallel.training.engines.native as step

    original = step.reduce_gradients, step.global_grad_norm, balance.all_reduce_sum

    def expert_gradients_divided(model: Any, mesh: Any, *, sharded: bool) -> None:
        original[0](model, mesh, sharded=sharded)
        for logical in logical_parameters(model):
            if logical.is_expert:
                logical.parameter.grad /= mesh.degrees.ep

    def router_not_reduced(model: Any, mesh: Any, *, sharded: bool) -> None:
        routers = [p.parameter for p in logical_parameters(model) if "router" in p.names[0]]
        own = [parameter.grad.clone() for parameter in routers]
        original[0](model, mesh, sharded=sharded)
        for parameter, grad in zip(routers, own, strict=True):
            parameter.grad.copy_(grad)

    def norm_without_experts(model: Any, mesh: Any) -> torch.Tensor:
        grads = [p.parameter.grad for p in logical_parameters(model) if not p.is_expert]
        return torch.stack([grad.norm() for grad in grads]).norm().double()

    def own_counts(x: torch.Tensor, group: Any) -> torch.Tensor:
        return x * dist.get_world_size(group)

    try:
        if defect == "expert gradients divided by ep":
            step.reduce_gradients = expert_gradients_divided
        if defect == "router gradient not reduced":
            step.reduce_gradients = router_not_reduced
        if defect == "norm without experts":
            step.global_grad_norm = norm_without_experts
        if defect == "balance loss of each rank":
            balance.all_reduce_sum = own_counts
        return train(rank, layout, steps=1)
    finally:
        step.reduce_gradients, step.global_grad_norm, balance.all_reduce_sum = original


DEFECTS = {
    "none": None,
    "expert gradients divided by ep": "experts",
    "router gradient not reduced": "router",
    "norm without experts": "norm",
    "balance loss of each rank": "router",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found_where_it_is(defect: str) -> None:
    layout = LAYOUTS[3]
    expected = slow(1, 6)
    result = run_ranks(layout["world"], train_with_defect, defect, layout)[1]
    wrong = set()
    for name, grad in result["grads"].items():
        scaled, right = grad / result["norms"][0], expected["grads"][name] / expected["norms"][0]
        if not torch.allclose(scaled, right, rtol=1e-9, atol=1e-12):
            wrong.add("router" if "router" in name else "experts" if ".moe.experts." in name else "dense")
    norm_is_wrong = result["norms"][0] != pytest.approx(expected["norms"][0], rel=1e-9)
    found = DEFECTS[defect]
    if found is None:
        assert not wrong
        assert not norm_is_wrong
    else:
        assert norm_is_wrong
        assert found == "norm" or found in wrong
