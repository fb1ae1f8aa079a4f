"""A run that fails says where: the first tensor that is not finite, on real ranks in several layouts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from expert_parallel.model.transformer import Block
from expert_parallel.moe.parameters import local_tensor, logical_parameters
from expert_parallel.training.engines.native import NativeEngine
from expert_parallel.training.nonfinite import find_first_bad_tensor
from expert_parallel.training.optim import build_optimizer
from expert_parallel.training.step import train_step
from tests.layouts import build_on
from tests.ranks import run_ranks
from tests.test_training import MODEL, SEED, batches, training_config

PLAIN = {"world": 1, "ep": 1, "data": "replicated", "micro_steps": 1, "recompute": "none"}
TENSOR = {**PLAIN, "world": 4, "tp": 2, "ep": 4, "recompute": "block"}
SHARDED = {**PLAIN, "world": 2, "ep": 2, "data": "sharded", "micro_steps": 2}
PIPELINE = {**PLAIN, "world": 4, "pp": 2, "ep": 2, "micro_steps": 2}


def weight_is_infinite(block: Block) -> None:
    assert block.moe is not None
    local_tensor(block.moe.experts.w_in).detach()[1, 0, 0] = torch.inf


def router_overflows(block: Block) -> None:
    assert block.moe is not None
    local_tensor(block.moe.router.weight).detach().mul_(1e308)


def output_is_nan(block: Block) -> None:
    block.attention.register_forward_hook(lambda module, arguments, output: output * torch.nan)


def gradient_is_nan(block: Block) -> None:
    def poison(module: Any, arguments: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.nan)

    block.attention.register_forward_hook(poison)


def fail(rank: int, layout: dict[str, Any], fault: Callable[[Block], None], where: int, number: int) -> tuple[Any, ...]:
    """Makes two steps, the second with a fault on rank `where` in block `number`. Returns the first bad tensor, whether
    the second step changed a weight or a moment, and whether its report was finite."""
    config = training_config(layout)
    mesh, model = build_on(layout, MODEL, SEED)
    engine = NativeEngine(model, build_optimizer(config.optimizer, model), mesh, config.clip_norm)

    def state() -> dict[str, Tensor]:
        moments = {f"{i} {k}": v for i, s in enumerate(engine.optimizer.state.values()) for k, v in s.items()}
        weights = {logical.names[0]: logical.parameter for logical in logical_parameters(model)}
        buffers = dict(model.named_buffers())
        return {name: local_tensor(x).detach().clone() for name, x in (moments | weights | buffers).items()}

    def make_step(step: int) -> Any:
        own = list(batches(config, step, mesh.degrees.dp, mesh.dp_rank))
        return own, train_step(model, engine, own, config, mesh, step=step, seed=SEED)

    make_step(0)
    if rank == where:
        (block,) = (block for index, block in model.local_blocks() if index == number)
        fault(block)
    before = state()
    own, report = make_step(1)
    unchanged = all(torch.equal(x, before[name]) for name, x in state().items())
    bad = find_first_bad_tensor(model, engine, own, config, mesh, step=1, seed=SEED, replay=None)
    found = None if bad is None else (bad.phase, bad.name, bad.rank, bad.micro_step)
    return found, unchanged, report.is_finite


@pytest.mark.parametrize(
    ("layout", "fault", "where", "number", "expected"),
    [
        (PLAIN, weight_is_infinite, 0, 1, ("weights", "blocks.1.moe.experts.1.w_in", 0, 0)),
        (PLAIN, router_overflows, 0, 2, ("forward", "logits_TE of blocks.2.moe.router", 0, 0)),
        (TENSOR, output_is_nan, 1, 1, ("forward", "blocks.1.attention", 1, 0)),
        (SHARDED, weight_is_infinite, 1, 2, ("weights", "blocks.2.moe.experts.5.w_in", 1, 0)),
        (SHARDED, output_is_nan, 1, 0, ("forward", "blocks.0.attention", 1, 0)),
        (PIPELINE, output_is_nan, 3, 2, ("forward", "blocks.2.attention", 3, 0)),
        (PIPELINE, gradient_is_nan, 1, 1, ("backward", "blocks.1.attention.out.weight", 1, 0)),
    ],
)
def test_the_first_bad_tensor_is_named(
    layout: dict[str, Any], fault: Callable[[Block], None], where: int, number: int, expected: tuple[Any, ...]
) -> None:
    """And the step leaves every weight, moment and balance bias as it was."""
    for found, unchanged, is_finite in run_ranks(layout["world"], fail, layout, fault, where, number):
        assert found == expected
        assert unchanged
        assert not is_finite


def no_fault(block: Block) -> None:
    pass


def test_a_healthy_step_has_no_bad_tensor() -> None:
    for layout in (TENSOR, PIPELINE):
        for found, unchanged, is_finite in run_ranks(4, fail, layout, no_fault, 0, 0):
            assert (found, unchanged, is_finite) == (None, False, True)
