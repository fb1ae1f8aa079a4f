"""Locates weights and moments in memory for saving and loading: as whole local tensors, or (ZeRO) as ranges of
flattened ones.

`expected_shapes` returns the names and shapes of all tensors of a complete checkpoint, from the config alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from expert_parallel.checkpoint.manifest import MOMENTS, WEIGHTS, Shapes
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.moe.parameters import LogicalParameter, local_tensor, logical_parameters

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]  # start, shape


@dataclass(frozen=True)
class FlatRange:
    """Describes the range of a parameter's flattened local tensor that this rank holds: `length` elements from `start`
    on, which no other rank holds.

    shape: the shape of the whole local tensor, before it was flattened.
    """

    start: int
    length: int
    shape: tuple[int, ...]


class TrainingState(Protocol):
    """Gives access to an engine's weights and optimizer state. The argument part is `weights`, `exp_avg` or
    `exp_avg_sq`."""

    def flat_range(self, part: str, parameter: nn.Parameter) -> FlatRange | None:
        """Returns the range of the flattened tensor that this rank stores (ZeRO), or None if it stores the whole local
        tensor."""
        ...

    def tensor(self, part: str, parameter: nn.Parameter) -> Tensor:
        """Returns the tensor itself, not a copy: in the parameter's local shape, or 1-D if this rank stores a flat
        range of it."""
        ...

    def init_moments(self, step: int) -> None:
        """Creates zero moments for loading to fill, with the optimizer's step count set to `step`."""
        ...

    def finish_loading(self) -> None:
        """Updates copies of the weights; called after loading has filled the weights, and the moments if there are
        any."""
        ...


class TorchState:
    """Implements TrainingState for a torch optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def flat_range(self, part: str, parameter: nn.Parameter) -> FlatRange | None:
        return None

    def tensor(self, part: str, parameter: nn.Parameter) -> Tensor:
        return local_tensor(parameter if part == WEIGHTS else self.optimizer.state[parameter][part]).detach()

    def init_moments(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                state["step"] = torch.tensor(float(step), device=parameter.device)  # a fused AdamW counts on the device
                state.update({moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS})

    def finish_loading(self) -> None:
        pass


def range_shards(
    logical: LogicalParameter, values: Tensor, found: FlatRange
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Yields the rectangular parts of logical tensors that make up a flat range: (logical name, start in the logical
    tensor, view of `values`).

    values: the elements of the range, 1-D. found: the range. It does for ZeRO what `pieces` of moe/parameters.py does
    for whole local tensors. Only data-parallel ranks may shard the parameter.
    """
    assert logical.tensor_shard is None, logical.names
    shape = found.shape[1:] if logical.is_expert else found.shape
    size = math.prod(shape)
    for number, name in enumerate(logical.names):
        begin = max(found.start - number * size, 0)
        end = min(found.start + found.length - number * size, size)
        for start, extent in rectangles(shape, begin, end):
            first = number * size + flat_index(start, shape) - found.start
            yield name, start, values[first : first + math.prod(extent)].view(extent)


def rectangles(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Rectangle]:
    """Splits the elements begin to end - 1 of a flattened tensor of `shape` into rectangles, (start, shape) each: the
    end of a row, whole rows, and the start of a row.

    >>> list(rectangles((4, 3), 2, 10))
    [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    """
    if begin >= end:
        return
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row  # whole rows
    yield from _rectangles_in_row(shape, begin, min(end, first * row))
    if first < last:
        yield (first, *([0] * (len(shape) - 1))), (last - first, *shape[1:])
    yield from _rectangles_in_row(shape, max(begin, first * row, last * row), end)


def _rectangles_in_row(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Rectangle]:
    number, row = begin // math.prod(shape[1:]), math.prod(shape[1:])
    for start, extent in rectangles(shape[1:], begin - number * row, end - number * row):
        yield (number, *start), (1, *extent)


def flat_index(place: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Returns the row-major index of a position in a tensor of `shape`."""
    index = 0
    for at, size in zip(place, shape, strict=True):
        index = index * size + at
    return index


def expected_shapes(model: ModelConfig, moments: bool) -> Shapes:
    """Returns the shape of every tensor by full name, such as `weights/blocks.3.moe.experts.17.w_in`.

    moments: True includes the optimizer's moments.
    """
    whole = build_model(model, device=torch.device("meta"))
    shapes = {f"{WEIGHTS}/{name}": list(bias.shape) for name, bias in balance_biases(whole)}
    parts = (WEIGHTS, *MOMENTS) if moments else (WEIGHTS,)
    for logical in logical_parameters(whole):
        shapes.update({f"{part}/{name}": list(logical.shape) for part in parts for name in logical.names})
    return shapes


def balance_biases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name in the whole model, tensor) for each buffer that training changes: the balance biases of routers."""
    for part in model if isinstance(model, nn.ModuleList) else [model]:
        yield from ((name, buffer) for name, buffer in part.named_buffers() if name.endswith("balance_bias_E"))
