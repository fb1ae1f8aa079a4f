"""Which of our logical tensors are which of a Hugging Face folder's, and in what form: one table, both directions."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Change = Callable[[list[Tensor]], Iterable[Tensor]]


@dataclass(frozen=True)
class Form:
    """How one side's tensors become the other's. Each way undoes the other, bit for bit. What is made of a stack comes
    one by one, so that no second stack is held."""

    to_ours: Change
    to_theirs: Change


@dataclass(frozen=True)
class Link:
    """Templates of names: {L} is the block's number, {E} the expert's. Where {E} stands on our side alone, theirs is
    one stack of all experts."""

    ours: str
    theirs: tuple[str, ...]
    form: Form


@dataclass(frozen=True)
class Pair:
    """Tensors on our side, and those on theirs that are the same numbers."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form


def pairs_of(links: Iterable[Link], names: Iterable[str], num_experts: int) -> list[Pair]:
    """Every logical name of a model once, each with what it is in theirs.

    names: the model's logical names. A link whose tensors the model does not have (a bias, say) is passed over.
    ValueError for a logical tensor that no link names: their format has no place for it.
    """
    left = dict.fromkeys(names)
    layers = sorted({int(name.split(".")[1]) for name in left if name.startswith("blocks.")})
    pairs: list[Pair] = []
    for link in links:
        for layer in layers if "{L}" in link.ours else [0]:
            pairs += [pair for pair in _pairs_of_layer(link, layer, num_experts) if pair.ours[0] in left]
    for pair in pairs:
        for name in pair.ours:
            assert name in left, f"{name} has two links, or is not of this model"
            del left[name]
    if left:
        raise ValueError(f"their format has no tensor for {next(iter(left))} ({len(left)} such tensors)")
    return pairs


def _pairs_of_layer(link: Link, layer: int, num_experts: int) -> Iterator[Pair]:
    def filled(template: str, expert: int) -> str:
        return template.replace("{L}", str(layer)).replace("{E}", str(expert))

    experts = range(num_experts) if "{E}" in link.ours else range(1)
    if any("{E}" in name for name in link.theirs) or "{E}" not in link.ours:
        for expert in experts:
            yield Pair((filled(link.ours, expert),), tuple(filled(name, expert) for name in link.theirs), link.form)
    elif num_experts:
        ours = tuple(filled(link.ours, expert) for expert in experts)
        yield Pair(ours, tuple(filled(name, 0) for name in link.theirs), link.form)


# ---------------------------------------------------------------------------------------------------------------- forms


def _transposed(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.mT for tensor in tensors]


def _joined(tensors: list[Tensor]) -> list[Tensor]:
    """Rows below each other: [gate; up]."""
    return [torch.cat(tensors)]


def _halves(tensors: list[Tensor]) -> list[Tensor]:
    return list(tensors[0].chunk(2))


SAME = Form(lambda tensors: tensors, lambda tensors: tensors)
TRANSPOSED = Form(_transposed, _transposed)
GATE_UP_ROWS = Form(_joined, _halves)  # ours: (2F, D) = [gate; up], theirs: two of (F, D)
GATE_UP_COLUMNS = Form(  # ours: (D, 2F) = [gate | up], theirs: two of (F, D)
    lambda tensors: _transposed(_joined(tensors)), lambda tensors: _halves(_transposed(tensors))
)


def _apart(stack_EX2F: Tensor) -> Iterator[Tensor]:
    """(E, ..., 2F), gate and up in turn, to E of (..., 2F) = [gate | up]."""
    for tensor in stack_EX2F.unbind(0):
        yield torch.cat([tensor[..., ::2], tensor[..., 1::2]], -1)


def _in_turn(tensors: list[Tensor]) -> list[Tensor]:
    stack = tensors[0].new_empty(len(tensors), *tensors[0].shape)
    for tensor, place in zip(tensors, stack, strict=True):
        place[..., ::2], place[..., 1::2] = tensor.chunk(2, -1)
    return [stack]


STACKED = Form(lambda tensors: tensors[0].unbind(0), lambda tensors: [torch.stack(tensors)])
STACKED_IN_TURN = Form(lambda tensors: _apart(tensors[0]), _in_turn)


def rotary_rows(period: int, rope_size: int) -> Form:
    """Of every `period` rows the last `rope_size` are rotary, in neighbouring pairs in theirs: (x0, x1), (x2, x3), ...;
    ours are half-split: x0, x2, ..., x1, x3, ..."""
    rows = torch.arange(period)
    rotary = rows[period - rope_size :]
    half_split = torch.cat([rows[: period - rope_size], rotary[::2], rotary[1::2]])
    take = partial(_take_rows, order=half_split)
    undo = partial(_take_rows, order=half_split.argsort())
    return Form(take, undo)


def _take_rows(tensors: list[Tensor], order: Tensor) -> list[Tensor]:
    return [tensor.unflatten(0, (-1, len(order)))[:, order.to(tensor.device)].flatten(0, 1) for tensor in tensors]


# MXFP4 (Open Compute Project, Microscaling Formats 1.0): 32 values of 4 bits (E2M1) share one scale of 8 bits (E8M0).
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _unpacked(tensors: list[Tensor]) -> Iterator[Tensor]:
    """blocks (E, N, G, 16) and scales (E, N, G), bytes, to E of (32 G, N) in bfloat16, which holds these exactly. The
    low half of a byte comes first."""
    blocks_ENGB, scales_ENG = tensors
    values = torch.tensor(FP4_VALUES, dtype=torch.bfloat16)
    for blocks_NGB, scales_NG in zip(blocks_ENGB, scales_ENG, strict=True):
        codes = torch.stack([blocks_NGB & 15, blocks_NGB >> 4], -1).flatten(-2)
        exponents_NG1 = (scales_NG.to(torch.int32) - 127)[..., None]
        yield torch.ldexp(values[codes.to(torch.int32)], exponents_NG1).to(torch.bfloat16).flatten(-2).mT


def _packed_shapes(tensors: list[Tensor]) -> list[Tensor]:
    """The shapes alone: packing would round."""
    assert tensors[0].is_meta, "MXFP4 is read, never written"
    rows, columns = tensors[0].shape
    groups = (len(tensors), columns, rows // 32)
    return [torch.empty(*groups, 16, dtype=torch.uint8, device="meta"), torch.empty(groups, device="meta")]


MXFP4 = Form(_unpacked, _packed_shapes)
MXFP4_IN_TURN = Form(
    lambda tensors: (torch.cat([one[..., ::2], one[..., 1::2]], -1) for one in _unpacked(tensors)), _packed_shapes
)
