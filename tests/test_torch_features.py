"""The layer under what PyTorch puts around a model: torch.compile, activation checkpointing, autocast; on one rank and
with the experts over two."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expert_parallel import MoEConfig, MoELayer, StepContext
from tests.ranks import run_ranks

SETTINGS: dict[str, dict[str, Any]] = {
    "dropless": {"capacity": {"kind": "dropless"}},
    "capacity, shared experts": {"capacity": {"kind": "factor", "train": 1.0}, "shared_experts": {"hidden": 8}},
    "noise, dropout, biases": {
        "router": {"kind": "noisy_top_k", "k": 2},
        "experts": {"hidden": 12, "bias": True, "output_dropout": 0.25},
    },
}


class Model(nn.Module):
    """Two linear layers around a mixture of experts. Returns the output and the sum of the losses."""

    def __init__(self, group: Any, settings: dict[str, Any], run: Callable[..., Any] | None = None) -> None:
        super().__init__()
        tree = {"d_model": 8, "num_experts": 4, "experts": {"hidden": 12}, **settings}
        losses = [{"kind": "balance"}, {"kind": "z_loss"}]
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)
        self.moe = MoELayer(MoEConfig.model_validate({**tree, "losses": losses}), group)
        self.run = run

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.before(x).relu()
        if self.run is not None:
            y, loss = self.run(self.block, h)
            return self.after(h + y), loss
        moe = self.moe(h, StepContext(seed=3, step=5))
        return self.after(h + moe.y), sum(moe.losses.values())

    def block(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tensors alone: checkpointing with reentrance gives gradients to no others."""
        moe = self.moe(h, StepContext(seed=3, step=5))
        return moe.y, sum(moe.losses.values())


def make(group: Any, settings: dict[str, Any], run: Callable[..., Any] | None = None) -> Model:
    torch.manual_seed(0)
    return Model(group, settings, run).double()


def outcome(model: nn.Module, parameters: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, the losses and every gradient."""
    parameters.zero_grad()
    y, losses = model(x)
    (y.square().mean() + losses).backward()
    grads = {name: parameter.grad for name, parameter in parameters.named_parameters()}
    assert all(grad is not None for grad in grads.values()), grads
    return [y.detach(), losses.detach(), *[grad.clone() for grad in grads.values() if grad is not None]]


KINDS: dict[str, Callable[..., Any]] = {
    "with reentrance": lambda function, x: checkpoint(function, x, use_reentrant=True),
    "without": lambda function, x: checkpoint(function, x, use_reentrant=False),
}


def batch(rank: int, length: int) -> Tensor:
    return torch.randn(3, length, 8, generator=torch.Generator().manual_seed(rank)).double()


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def checkpointed(rank: int) -> dict[str, float]:
    """The largest difference that each kind of checkpointing makes, for each of the settings."""
    found, x = {}, batch(rank, 8)
    for name, settings in SETTINGS.items():
        plain = make(dist.group.WORLD, settings)
        expected = outcome(plain, plain, x)
        for kind, run in KINDS.items():
            model = make(dist.group.WORLD, settings, run)
            found[f"{name}, {kind}"] = difference(outcome(model, model, x), expected)
    return found


def test_checkpointed_the_layer_computes_the_same() -> None:
    for found in run_ranks(2, checkpointed):
        assert len(found) == 2 * len(SETTINGS)
        assert max(found.values()) < 1e-12, found


def compiled(rank: int, name: str) -> tuple[float, int]:
    """The largest difference that torch.compile makes, and the number of graph breaks."""
    plain = make(dist.group.WORLD, SETTINGS[name])
    model = torch.compile(plain, backend="aot_eager")
    outcome(model, plain, batch(rank, 12))  # of another shape first: a graph with fixed shapes would be wrong then
    found, expected = outcome(model, plain, batch(rank, 8)), outcome(plain, plain, batch(rank, 8))
    torch.compiler.reset()
    return difference(found, expected), torch._dynamo.explain(plain)(batch(rank, 8)).graph_break_count


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if "," not in name else ()) for name in SETTINGS]
)
def test_compiled_the_layer_computes_the_same_with_one_graph_break(name: str) -> None:
    for largest, breaks in run_ranks(2, compiled, name):
        assert largest < 1e-12
        assert breaks == 1


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_autocast_chooses_the_dtype_of_experts_and_not_that_of_the_router(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Model(None, settings)
    x = torch.randn(4, 8, 8)
    plain = model.moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.moe(x)
        rows = model.moe(x.bfloat16())
    assert (plain.y.dtype, mixed.y.dtype) == (torch.float32, torch.bfloat16)
    assert all(torch.equal(mixed.losses[name], plain.losses[name]) for name in plain.losses)
    assert torch.equal(mixed.stats.kept_E, plain.stats.kept_E)
    torch.testing.assert_close(mixed.y.float(), plain.y, rtol=0.05, atol=2e-4)
    assert rows.y.dtype == torch.bfloat16
    (mixed.y.float().square().mean() + sum(mixed.losses.values())).backward()
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.moe.parameters()
    )
