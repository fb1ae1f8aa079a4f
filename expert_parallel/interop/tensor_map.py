"""Maps logical tensors of our models to tensors of a Hugging Face model, and converts them in both directions.

In this folder `ours` means our logical names, settings and layouts, and `theirs` those of the Hugging Face model.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

TensorFn = Callable[[list[Tensor]], Iterable[Tensor]]
Index = tuple[slice, ...]  # a rectangle: a slice with start and stop for each dimension
Cover = tuple[list[Tensor], int, Index]


@dataclass(frozen=True)
class Transform:
    """Converts tensors between our layout and Hugging Face's, in both directions. Each direction inverts the other, bit
    for bit (except MXFP4, which is only read).

    Tensors taken from a stack are yielded one by one, so that memory never holds the stack twice.

    cover: given their tensors and a rectangle of our tensor number n, returns views of their tensors that suffice for
    it, and where it lies in what `to_ours` makes of these: the number of the tensor there, and the rectangle. The
    default takes the whole tensors.
    """

    to_ours: TensorFn
    to_theirs: TensorFn
    cover: Callable[[list[Tensor], int, Index], Cover] = lambda tensors, number, index: (tensors, number, index)

    def read_part(self, tensors: list[Tensor], number: int, index: Index) -> tuple[Tensor, int]:
        """Returns a rectangle of our tensor `number`, and the bytes of their tensors that it was made from.

        tensors: theirs, such as those of a mapped file, of which only the covered parts are read.
        """
        covered, number, index = self.cover(tensors, number, index)
        ours = next(islice(self.to_ours(covered), number, None))
        return ours[index], sum(tensor.nbytes for tensor in covered)


@dataclass(frozen=True)
class TensorMapping:
    """Maps a template of our logical tensor names to the names in a Hugging Face model. {L} stands for the block's
    index, {E} for the expert's.

    If only our template has {E}, the Hugging Face tensor is one stack of all experts.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Transform


@dataclass(frozen=True)
class TensorPair:
    """Pairs our tensors with the Hugging Face tensors that hold the same values, by name: a mapping with its indices
    filled in."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform


def match_tensors(tensor_map: Iterable[TensorMapping], names: Iterable[str], num_experts: int) -> list[TensorPair]:
    """Returns the pairs of a model's tensors and Hugging Face tensors, in which every logical name occurs once.

    names: the model's logical names. Mappings of tensors that the model lacks (such as biases) are ignored. Raises a
    ValueError for a logical tensor without a mapping, since the Hugging Face format has no place for it.
    """
    left = dict.fromkeys(names)
    layers = sorted({int(name.split(".")[1]) for name in left if name.startswith("blocks.")})
    pairs: list[TensorPair] = []
    for mapping in tensor_map:
        for layer in layers if "{L}" in mapping.ours else [0]:
            pairs += [pair for pair in _match_layer(mapping, layer, num_experts) if pair.ours[0] in left]
    for pair in pairs:
        for name in pair.ours:
            assert name in left, f"{name} has two mappings, or the model lacks it"
            del left[name]
    if left:
        raise ValueError(f"the Hugging Face format has no tensor for {next(iter(left))} ({len(left)} such tensors)")
    return pairs


def _match_layer(mapping: TensorMapping, layer: int, num_experts: int) -> Iterator[TensorPair]:
    """Yields the pairs of one block: one for each expert, or a single one if their tensor is a stack."""

    def filled(template: str, expert: int) -> str:
        return template.replace("{L}", str(layer)).replace("{E}", str(expert))

    experts = range(num_experts) if "{E}" in mapping.ours else range(1)
    if any("{E}" in name for name in mapping.theirs) or "{E}" not in mapping.ours:
        for expert in experts:
            yield TensorPair(
                (filled(mapping.ours, expert),),
                tuple(filled(name, expert) for name in mapping.theirs),
                mapping.transform,
            )
    elif num_experts:
        ours = tuple(filled(mapping.ours, expert) for expert in experts)
        yield TensorPair(ours, tuple(filled(name, 0) for name in mapping.theirs), mapping.transform)


# ----------------------------------------------------------------------------------------------------------- transforms


def _transpose(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.mT for tensor in tensors]


def _concatenate(tensors: list[Tensor]) -> list[Tensor]:
    """Concatenates tensors along dimension 0: [gate; up]."""
    return [torch.cat(tensors)]


def _split_halves(tensors: list[Tensor]) -> list[Tensor]:
    return list(tensors[0].chunk(2))


def _cover_same(tensors: list[Tensor], number: int, index: Index) -> Cover:
    return [tensors[0][index]], 0, ()


def _cover_transposed(tensors: list[Tensor], number: int, index: Index) -> Cover:
    return [tensors[0].mT[index].mT], 0, ()


def _cover_concatenated(tensors: list[Tensor], number: int, index: Index) -> Cover:
    """Covers rows of [gate; up]: those of gate, and those of up."""
    rows, *others = index
    half = len(tensors[0])
    gate = tensors[0][(slice(rows.start, min(rows.stop, half)), *others)]
    up = tensors[1][(slice(max(rows.start - half, 0), max(rows.stop - half, 0)), *others)]
    return [gate, up], 0, ()


IDENTITY = Transform(lambda tensors: tensors, lambda tensors: tensors, _cover_same)
TRANSPOSED = Transform(_transpose, _transpose, _cover_transposed)
SINGLE_ROW = Transform(  # ours: (N); theirs: (1, N)
    lambda tensors: [tensors[0][0]],
    lambda tensors: [tensors[0][None]],
    lambda tensors, number, index: ([tensors[0][(slice(None), *index)]], 0, ()),
)
GATE_UP_ROWS = Transform(  # ours: (2F, D) = [gate; up]; theirs: two of (F, D)
    _concatenate, _split_halves, _cover_concatenated
)
GATE_UP_COLUMNS = Transform(  # ours: (D, 2F) = [gate | up]; theirs: two of (F, D)
    lambda tensors: _transpose(_concatenate(tensors)),
    lambda tensors: _split_halves(_transpose(tensors)),
    lambda tensors, number, index: _cover_concatenated(tensors, number, index[::-1]),
)


def _deinterleave(stack_EX2F: Tensor) -> Iterator[Tensor]:
    """Splits (E, ..., 2F) with alternating gate and up columns into E tensors (..., 2F) = [gate | up]."""
    for tensor in stack_EX2F.unbind(0):
        yield torch.cat([tensor[..., ::2], tensor[..., 1::2]], -1)


def _interleave(tensors: list[Tensor]) -> list[Tensor]:
    """Inverts `_deinterleave`."""
    stack = tensors[0].new_empty(len(tensors), *tensors[0].shape)
    for tensor, place in zip(tensors, stack, strict=True):
        place[..., ::2], place[..., 1::2] = tensor.chunk(2, -1)
    return [stack]


def _cover_stacked(tensors: list[Tensor], number: int, index: Index) -> Cover:
    """Covers one tensor of each stack."""
    return [tensor[number : number + 1] for tensor in tensors], 0, index


STACKED = Transform(
    lambda tensors: tensors[0].unbind(0),
    lambda tensors: [torch.stack(tensors)],
    lambda tensors, number, index: ([tensors[0][(slice(number, number + 1), *index)]], 0, ()),
)
STACKED_TRANSPOSED = Transform(
    lambda tensors: (tensor.mT for tensor in tensors[0].unbind(0)),
    lambda tensors: [torch.stack(_transpose(tensors))],
    lambda tensors, number, index: ([tensors[0][(slice(number, number + 1), *index[::-1])]], 0, ()),
)
STACKED_INTERLEAVED = Transform(lambda tensors: _deinterleave(tensors[0]), _interleave, _cover_stacked)


def half_split_rows(period: int, rope_size: int) -> Transform:
    """Returns the transform that reorders rotary rows from interleaved (Hugging Face) to half-split (ours).

    The last `rope_size` of every `period` rows are rotary. Interleaved rows x0, x1, x2, x3, ... rotate as adjacent
    pairs (x0, x1), (x2, x3), ...; half-split rows are ordered x0, x2, ..., x1, x3, ..., as `apply_rope` expects.
    """
    rows = torch.arange(period)
    rotary = rows[period - rope_size :]
    half_split = torch.cat([rows[: period - rope_size], rotary[::2], rotary[1::2]])
    take = partial(_take_rows, order=half_split)
    undo = partial(_take_rows, order=half_split.argsort())
    return Transform(take, undo, partial(_cover_periods, period=period))


def _cover_periods(tensors: list[Tensor], number: int, index: Index, period: int) -> Cover:
    """Covers rows by whole periods."""
    rows, *others = index
    first = rows.start // period * period
    covered = tensors[0][(slice(first, -(-rows.stop // period) * period), *others)]
    return [covered], 0, (slice(rows.start - first, rows.stop - first),)


def _take_rows(tensors: list[Tensor], order: Tensor) -> list[Tensor]:
    """Permutes every len(order) consecutive rows by `order`."""
    return [tensor.unflatten(0, (-1, len(order)))[:, order.to(tensor.device)].flatten(0, 1) for tensor in tensors]


# MXFP4 (Open Compute Project, Microscaling Formats 1.0): 32 values of 4 bits (E2M1) share one scale of 8 bits (E8M0).
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _dequantize_mxfp4(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Dequantizes blocks (E, N, G, 16) and scales (E, N, G), both uint8, to E tensors (32 G, N).

    The low four bits of a byte come first. The result is bfloat16, which represents every MXFP4 value exactly.
    """
    blocks_ENGB, scales_ENG = tensors
    values = torch.tensor(FP4_VALUES, dtype=torch.bfloat16)
    for blocks_NGB, scales_NG in zip(blocks_ENGB, scales_ENG, strict=True):
        codes = torch.stack([blocks_NGB & 15, blocks_NGB >> 4], -1).flatten(-2)
        exponents_NG1 = (scales_NG.to(torch.int32) - 127)[..., None]
        yield torch.ldexp(values[codes.to(torch.int32)], exponents_NG1).to(torch.bfloat16).flatten(-2).mT


def _packed_shapes(tensors: list[Tensor]) -> list[Tensor]:
    """Returns meta tensors with the shapes and dtype of the blocks and scales, to check a folder before it is read.

    Writing is not supported, as quantization would round.
    """
    assert tensors[0].is_meta, "MXFP4 is only read, never written"
    rows, columns = tensors[0].shape
    groups = (len(tensors), columns, rows // 32)
    return [torch.empty(shape, dtype=torch.uint8, device="meta") for shape in ((*groups, 16), groups)]


MXFP4 = Transform(_dequantize_mxfp4, _packed_shapes, _cover_stacked)
MXFP4_INTERLEAVED = Transform(
    lambda tensors: (torch.cat([one[..., ::2], one[..., 1::2]], -1) for one in _dequantize_mxfp4(tensors)),
    _packed_shapes,
    _cover_stacked,
)
