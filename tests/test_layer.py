"""The MoE layer as a module in a user's hands: what it refuses, copies, and does beside what test_dispatch.py
compares."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import RouterReplay, StepContext
from expert_parallel.moe.layer import MoELayer
from expert_parallel.parallel.placement import ExpertPlacement
from tests.ranks import run_ranks


def make_layer(group: Any = None, **settings: Any) -> MoELayer:
    tree = {"d_model": 8, "num_experts": 4, "router": {"k": 2}, "experts": {"hidden": 6}, **settings}
    return MoELayer(MoEConfig.model_validate(tree), group)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(2, 3, 8, dtype=torch.int64), "torch.int64 of shape (2, 3, 8)"),
        (torch.zeros(8), "torch.float32 of shape (8,)"),
        (torch.zeros(1, 2, 3, 8), "torch.float32 of shape (1, 2, 3, 8)"),
        (torch.zeros(2, 3, 9), "torch.float32 of shape (2, 3, 9)"),
    ],
)
def test_input_of_another_shape_is_refused(x: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match="takes floating-point input of shape") as error:
        make_layer()(x)
    assert str(error.value).endswith(f"the input is {said}")
    assert "(B, S, 8) or (T, 8)" in str(error.value)


def test_positions_of_another_shape_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"StepContext.positions_S is torch.int64 of shape .4,., the layer's input needs"
    ):
        make_layer()(torch.zeros(2, 3, 8), StepContext(positions_S=torch.arange(4)))


def test_positions_are_part_of_whose_choices_are_played_back() -> None:
    layer, x_TD, replay = make_layer(), draw(3, 8), RouterReplay()
    layer(x_TD, StepContext(positions_S=torch.tensor([4, 0, 2]), replay=replay))
    assert replay.recorded[0, 0, 0].index_T.tolist() == [4, 0, 2]
    with pytest.raises(
        ValueError, match=r"was recorded for other tokens: it has 3, this pass has 3, or their .* positions differ"
    ):
        layer(x_TD, StepContext(positions_S=torch.tensor([4, 0, 1]), replay=replay))


def test_a_placement_that_does_not_fit_is_refused() -> None:
    config = make_layer().config
    with pytest.raises(
        ValueError, match=r"spreads 3 experts over 1 ranks as .3.; num_experts is 4, the group has 1 ranks"
    ):
        MoELayer(config, placement=ExpertPlacement((0, 0, 0), 1))


LOSSES = [{"kind": "balance"}, {"kind": "balance", "scope": "sequence"}, {"kind": "z_loss"}]


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("capacity", [{"kind": "dropless"}, {"kind": "factor", "overflow": "reroute", "minimum": 0}])
def test_what_stands_in_padding_does_not_matter(garbage: float, capacity: dict[str, Any]) -> None:
    """Attention over rows of padding alone leaves NaN there."""
    layer, mask_BS = (
        make_layer(losses=LOSSES, capacity=capacity),
        torch.tensor([[True] * 4, [True, True, False, False]]),
    )
    clean = draw(2, 4, 8)
    dirty = clean.masked_fill(~mask_BS[:, :, None], garbage).requires_grad_()
    context = StepContext(mask_BS=mask_BS)
    ours, theirs = layer(dirty, context), layer(clean, context)
    assert torch.equal(ours.y[mask_BS], theirs.y[mask_BS])
    assert {n: v.item() for n, v in ours.losses.items()} == {n: v.item() for n, v in theirs.losses.items()}
    assert ours.stats.entropy == theirs.stats.entropy
    (ours.y[mask_BS].sum() + sum(ours.losses.values())).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    assert dirty.grad is not None
    assert bool(dirty.grad.isfinite().all())


def test_a_sequence_of_padding_alone_is_none() -> None:
    layer, x_BSD = make_layer(losses=LOSSES), draw(2, 4, 8)
    mask_BS = torch.tensor([[True] * 4, [False] * 4])
    padded, alone = layer(x_BSD, StepContext(mask_BS=mask_BS)), layer(x_BSD[:1])
    assert {n: v.item() for n, v in padded.losses.items()} == pytest.approx(
        {n: v.item() for n, v in alone.losses.items()}
    )


def test_the_router_stays_in_float32_under_autocast() -> None:
    layer, x_TD = make_layer(losses=LOSSES), draw(64, 8)
    plain = layer(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x_TD)
    assert all(value.dtype == torch.float32 for value in mixed.losses.values())
    assert {n: v.item() for n, v in mixed.losses.items()} == {n: v.item() for n, v in plain.losses.items()}
    assert torch.equal(mixed.stats.routed_E, plain.stats.routed_E)


def run_copy(rank: int) -> tuple[bool, bool]:
    layer = make_layer(dist.group.WORLD)
    average = copy.deepcopy(layer)
    x_TD = draw(6, 8, seed=rank)
    same = torch.equal(average(x_TD).y, layer(x_TD).y)
    with torch.no_grad():
        average.experts.w_out.zero_()
    return same, bool(layer(x_TD).y.abs().sum() > 0) and not bool(average(x_TD).y.any())


def test_a_layer_can_be_copied() -> None:
    """For averages of weights: they are the copy's own, the process groups are shared."""
    assert run_ranks(2, run_copy) == [(True, True)] * 2


def run_second_derivative(rank: int) -> str:
    layer, x_TD = make_layer(dist.group.WORLD), draw(6, 8, seed=rank).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x_TD).y.square().sum(), x_TD, create_graph=True)
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_second_derivatives_through_ranks_are_refused() -> None:
    """An exchange's backward pass has none of its own: without the error they would be wrong in silence."""
    assert all("once_differentiable" in text for text in run_ranks(2, run_second_derivative))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: MoELayer({"d_model": 8}), "the config is a dict: give MoEConfig.model_validate({...})"),  # type: ignore[arg-type]
        (lambda: make_layer("world"), "ep_group is a str: give a torch.distributed.ProcessGroup, or None"),
        (
            lambda: make_layer()(torch.zeros(2, 8), torch.ones(2)),
            "the context is a Tensor: give a StepContext",
        ),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_another_type_are_refused(build: Callable[[], Any], said: str) -> None:
    with pytest.raises(TypeError) as error:
        build()
    assert str(error.value).startswith(said)


def test_weights_are_drawn_again_from_the_seed() -> None:
    """After to_empty, as users of the meta device do, and also the balance bias."""
    layer = MoELayer(make_layer(router={"k": 2, "balance_bias_rate": 0.1}).config, seed=7)
    first = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.to_empty(device="cpu")
    for value in layer.state_dict().values():
        value.fill_(3)
    layer.reset_parameters()
    assert all(torch.equal(value, first[name]) for name, value in layer.state_dict().items())
