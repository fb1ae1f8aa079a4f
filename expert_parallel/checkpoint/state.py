"""Where training has its weights and moments in memory, for saving and loading: whole tensors of a rank, or ranges
of flattened ones (ZeRO); and which names and shapes a whole checkpoint has, from the config alone."""

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

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins, its shape


@dataclass(frozen=True)
class Range:
    """Consecutive elements of a parameter's tensor on this rank, flattened: `length` from `start` on. shape: of the
    whole. No other rank has them."""

    start: int
    length: int
    shape: tuple[int, ...]


class TrainingState(Protocol):
    """part: `weights` or a moment."""

    def range_of(self, part: str, parameter: nn.Parameter) -> Range | None:
        """What of it is here; None: all, as on every rank that holds the parameter."""
        ...

    def tensor(self, part: str, parameter: nn.Parameter) -> Tensor:
        """Its memory: of the parameter's shape on this rank, or 1-dimensional if it is a range."""
        ...

    def make_moments(self, step: int) -> None:
        """All zero, as after so many steps, to be filled."""
        ...

    def finish(self) -> None:
        """Called when weights, and moments if there are such, have been filled."""
        ...


class TorchState:
    """Of a torch optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def range_of(self, part: str, parameter: nn.Parameter) -> Range | None:
        return None

    def tensor(self, part: str, parameter: nn.Parameter) -> Tensor:
        return local_tensor(parameter if part == WEIGHTS else self.optimizer.state[parameter][part]).detach()

    def make_moments(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                state["step"] = torch.tensor(float(step), device=parameter.device)  # where a fused update counts
                state.update({moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS})

    def finish(self) -> None:
        pass


def range_pieces(
    logical: LogicalParameter, values: Tensor, found: Range
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """As `pieces` of parameters.py, of a range: (logical name, where it begins there, view of `values`), a rectangle
    each. Nothing but data ranks divides the parameter."""
    assert logical.slice is None, logical.names
    shape = found.shape[1:] if logical.is_expert else found.shape
    size = math.prod(shape)
    for number, name in enumerate(logical.names):
        begin = max(found.start - number * size, 0)
        end = min(found.start + found.length - number * size, size)
        for start, extent in rectangles(shape, begin, end):
            first = number * size + flat_index(start, shape) - found.start
            yield name, start, values[first : first + math.prod(extent)].view(extent)


def rectangles(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Rectangle]:
    """Elements begin to end of a flattened tensor, in order: the end of a row, whole rows, the beginning of a row.

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
    yield from _in_row(shape, begin, min(end, first * row))
    if first < last:
        yield (first, *([0] * (len(shape) - 1))), (last - first, *shape[1:])
    yield from _in_row(shape, max(begin, first * row, last * row), end)


def _in_row(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Rectangle]:
    number, row = begin // math.prod(shape[1:]), math.prod(shape[1:])
    for start, extent in rectangles(shape[1:], begin - number * row, end - number * row):
        yield (number, *start), (1, *extent)


def flat_index(place: tuple[int, ...], shape: tuple[int, ...]) -> int:
    index = 0
    for at, size in zip(place, shape, strict=True):
        index = index * size + at
    return index


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
