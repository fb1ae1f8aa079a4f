"""What a whole checkpoint of a model holds: every name and shape, from the config alone."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from expert_parallel.checkpoint.manifest import MOMENTS, WEIGHTS, Shapes
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.moe.parameters import logical_parameters


def expected_shapes(model: ModelConfig, moments: bool) -> Shapes:
    """By full name, `weights/blocks.3.moe.experts.17.w_in`; with those of the optimizer, or without."""
    whole = build_model(model, device=torch.device("meta"))
    shapes = {f"{WEIGHTS}/{name}": list(bias.shape) for name, bias in balance_biases(whole)}
    parts = (WEIGHTS, *MOMENTS) if moments else (WEIGHTS,)
    for logical in logical_parameters(whole):
        shapes.update({f"{part}/{name}": list(logical.shape) for part in parts for name in logical.names})
    return shapes


def balance_biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that training changes, with the names that they have in the whole model."""
    for part in model if isinstance(model, nn.ModuleList) else [model]:
        yield from ((name, buffer) for name, buffer in part.named_buffers() if name.endswith("balance_bias_E"))
