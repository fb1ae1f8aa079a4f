"""The layer in one function against the slow reference and against MoELayer, in float64: values and every gradient."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.moe.reference.minimal import moe_layer
from expert_parallel.moe.reference.reference_layer import reference_layer

T, D, E, F, K = 48, 6, 5, 7, 2


def config_of(capacity: int | None) -> MoEConfig:
    limit = {"kind": "dropless"} if capacity is None else {"kind": "absolute", "train": capacity, "eval": capacity}
    return MoEConfig.model_validate(
        {
            "d_model": D,
            "num_experts": E,
            "router": {"kind": "top_k", "k": K},
            "capacity": limit,
            "experts": {"hidden": F, "activation": "gelu"},
            "dispatcher": {"kind": "local"},
        }
    )


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def value_and_gradients(y_TD: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """y, and the gradients of the sum of y times fixed numbers."""
    return [y_TD, *torch.autograd.grad((y_TD * draw(T, D, seed=4).detach()).sum(), leaves)]


@pytest.mark.parametrize("capacity", [None, 18], ids=["dropless", "capacity"])
def test_the_function_is_the_layer(capacity: int | None) -> None:
    config, x_TD = config_of(capacity), draw(T, D, seed=0)
    leaves = [x_TD, draw(E, D, seed=1), draw(E, D, F, seed=2), draw(E, F, D, seed=3)]
    found = value_and_gradients(moe_layer(*leaves, k=K, capacity=capacity), leaves)

    _, router_ED, w_in_EDF, w_out_EFD = leaves
    parameters = {"router.weight": router_ED}
    for expert in range(E):
        parameters |= {f"experts.{expert}.w_in": w_in_EDF[expert], f"experts.{expert}.w_out": w_out_EFD[expert]}
    reference = reference_layer(config, parameters, [x_TD[None]])
    dropped = float(reference.dropped[0].double().mean())
    assert dropped == 0 if capacity is None else 0.05 < dropped < 0.3
    expected = value_and_gradients(reference.y[0][0], leaves)

    layer = MoELayer(config).double()
    for logical in logical_parameters(layer):
        logical.fill(logical.parameter, [parameters[name].detach() for name in logical.names])
    output = layer(x_TD)
    assert int(output.stats.dropped_E.sum()) == int(reference.dropped[0].sum())
    by_layer = value_and_gradients(output.y, [x_TD, layer.router.weight, layer.experts.w_in, layer.experts.w_out])

    for mine, slow, fast in zip(found, expected, by_layer, strict=True):
        torch.testing.assert_close(mine, slow, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(mine, fast, rtol=1e-11, atol=1e-11)
        assert mine.abs().max() > 1e-3
