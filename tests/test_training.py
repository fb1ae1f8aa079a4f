"""Whole training steps on real ranks against one rank with slow, obviously right MoE layers, in float64.

Losses over 20 steps, the gradient norm, and every parameter's gradient of the first step: for each layout, with
accumulation and recomputation, with weights replicated and sharded. Clipping is at work, so a wrong norm shows.
"""

from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from expert_parallel.mesh import ParallelDegrees, ParallelMesh, build_mesh
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.transformer import ModelConfig, Transformer
from expert_parallel.moe.balance import loss_name
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import full_tensor, logical_parameters
from expert_parallel.moe.plan import MoEOutput
from expert_parallel.moe.reference import reference_layer
from expert_parallel.training.data import MicroBatch, TokenSampler, micro_batch
from expert_parallel.training.optim import build_optimizer
from expert_parallel.training.step import DTYPES, LayerReport, TrainingConfig, evaluate, train_step
from tests.pairwise import all_cases
from tests.ranks import run_ranks

STEPS = 20
SEED = 3

MODEL = {
    "vocab_size": 32,
    "num_layers": 3,
    "d_model": 16,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_size": 6},
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
]
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


@cache
def mesh_of(world: int, ep: int) -> ParallelMesh:
    return build_mesh(ParallelDegrees(world, ep=ep), "cpu", timedelta(seconds=30))


def train(rank: int, layout: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """On one rank: the losses, norms and balance losses of every step; the first step's gradients, by logical name."""
    mesh = mesh_of(layout["world"], layout["ep"])
    config = training_config(layout)
    model = build_model(
        ModelConfig.model_validate(MODEL),
        mesh,
        sharded=layout["data"] == "sharded",
        dtype=DTYPES[config.dtype],
        recompute=layout["recompute"],
        seed=SEED,
    )
    return run_steps(model, config, mesh, rank, steps)


def run_steps(model: Transformer, config: TrainingConfig, mesh: ParallelMesh, rank: int, steps: int) -> dict[str, Any]:
    optimizer = build_optimizer(config.optimizer, model)
    grads: dict[str, torch.Tensor] = {}

    def record(*_: Any) -> None:
        if not grads:
            for logical in logical_parameters(model):
                assert logical.parameter.grad is not None
                grads.update(logical.split(full_tensor(logical.parameter.grad).clone()))

    optimizer.register_step_pre_hook(record)
    reports = []
    for step in range(steps):
        mine = batches(config, step, mesh.degrees.dp, rank)
        reports.append(train_step(model, optimizer, mine, config, mesh, step=step, seed=SEED))
    held_out = evaluate(model, batches(config, 1000, mesh.degrees.dp, rank), mesh, seed=SEED)
    return {
        "losses": [report.loss for report in reports] + [held_out.loss],
        "norms": [report.grad_norm for report in reports],
        "moe_losses": [report.layers[layer].losses for report in reports for layer in report.layers],
        "routed": [report.layers[layer].routed_E.tolist() for report in reports for layer in report.layers],
        "grads": grads,
    }


@cache
def slow(micro_steps: int, global_batch: int) -> dict[str, Any]:
    """One rank, with the MoE layers computed by reference.py. In a pool of one, for its process group."""
    return run_ranks(1, train_slowly, {"world": 8 if global_batch % 8 == 0 else 1, "micro_steps": micro_steps})[0]


def train_slowly(rank: int, layout: dict[str, Any]) -> dict[str, Any]:
    config = training_config({**layout, "recompute": "none"})
    model = build_model(ModelConfig.model_validate(MODEL), dtype=torch.float64, seed=SEED)
    for block in model.blocks:
        if block.moe is not None:
            block.moe.forward = SlowLayer(block.moe)  # type: ignore[assignment]
    return run_steps(model, config, mesh_of(1, 1), rank, STEPS)


class SlowLayer:
    """In place of MoELayer.forward."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer, self.fast = layer, layer.forward

    def __call__(self, x: torch.Tensor, context: Any) -> MoEOutput:
        layer, config = self.layer, self.layer.config
        parameters: dict[str, torch.Tensor] = {"router.balance_bias_E": layer.router.balance_bias_E}  # type: ignore[dict-item]
        for logical in logical_parameters(layer):
            parameters.update(logical.split(logical.parameter))
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
    results = run_ranks(layout["world"], train, layout)
    seen = set()
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-9)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-8)
        assert result["routed"] == expected["routed"]
        for actual_losses, expected_losses in zip(result["moe_losses"], expected["moe_losses"], strict=True):
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
    expected = slow(1, 6)["losses"][:5]
    layout = {**LAYOUTS[3], "data": data, "dtype": dtype}
    for result in run_ranks(4, train, layout, 5):
        assert result["losses"][:5] == pytest.approx(expected, rel=tolerance)


def test_loss_falls() -> None:
    losses = slow(1, 6)["losses"]
    assert sum(losses[15:20]) < sum(losses[:5])


@pytest.mark.parametrize("change", [{"kept_E": torch.tensor([3, 3])}, {"rows_received": 4}], ids=["choice", "row"])
def test_a_report_that_does_not_balance_is_refused(change: dict[str, Any]) -> None:
    good = {"routed_E": torch.tensor([3, 4]), "kept_E": torch.tensor([3, 2]), "dropped_E": torch.tensor([0, 2])}
    good |= {"rows_sent": 5, "rows_received": 5, "rows_own": 1, "losses": {}}
    LayerReport(**good)
    with pytest.raises(AssertionError):
        LayerReport(**(good | change))


# --------------------------------------------------------------------- the proofs can fail: defects put in on purpose


def train_with_defect(rank: int, defect: str, layout: dict[str, Any]) -> dict[str, Any]:
    """One step with a known defect of the field patched in (traps 1, 2, 9 and 3)."""
    import expert_parallel.moe.balance as balance
    import expert_parallel.training.step as step

    original = step.reduce_gradients, step.global_norm, balance.all_reduce_sum

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

    def norm_without_experts(model: Any, mesh: Any, *, sharded: bool) -> torch.Tensor:
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
            step.global_norm = norm_without_experts
        if defect == "balance loss of each rank":
            balance.all_reduce_sum = own_counts
        return train(rank, layout, steps=1)
    finally:
        step.reduce_gradients, step.global_norm, balance.all_reduce_sum = original


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
