"""Tensors as MPI sees them: an address, a count and a datatype. Nothing is copied here and nothing is pickled."""

from collections.abc import Sequence
from functools import cache

import torch
from mpi4py import MPI
from torch import Tensor

# MPI before its version 4 counts with int, and Open MPI 5 still does. What is longer goes as blocks of elements.
MAX_COUNT = 2**31 - 1

# How elements travel. MPI has no 2-byte floats: they travel as bits, and are reduced as in WIDER.
DATATYPES: dict[torch.dtype, MPI.Datatype] = {
    torch.float64: MPI.DOUBLE,
    torch.float32: MPI.FLOAT,
    torch.bfloat16: MPI.UINT16_T,
    torch.float16: MPI.UINT16_T,
    torch.float8_e4m3fn: MPI.UINT8_T,
    torch.float8_e5m2: MPI.UINT8_T,
    torch.int64: MPI.INT64_T,
    torch.int32: MPI.INT32_T,
    torch.int16: MPI.INT16_T,
    torch.int8: MPI.INT8_T,
    torch.uint8: MPI.UINT8_T,
    torch.bool: MPI.UINT8_T,
}

# What these are reduced in. Sums of 2-byte floats are rounded once, at their end.
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.bool: torch.uint8}


def message(x: Tensor, blocks: int = 1) -> list[object]:
    """x: contiguous, any shape. blocks: the equal parts that MPI sees in it, such as one for each rank."""
    count, rest = divmod(x.numel(), blocks)
    if rest:
        raise ValueError(f"a tensor of {x.numel()} elements does not divide over {blocks} ranks")
    if x.numel() > MAX_COUNT:
        return [_buffer(x), 1, contiguous(count, x.dtype)]
    return [_buffer(x), count, DATATYPES[x.dtype]]  # the count of one block


def rows_message(x: Tensor, rows: Sequence[int]) -> list[object]:
    """x: contiguous, (sum(rows), ...): the first rows[0] rows are for, or from, rank 0, and so on."""
    count, size = x.shape[0], x.numel()
    if sum(rows) != count:
        raise ValueError(f"splits {list(rows)} come to {sum(rows)} rows, the tensor has {count}")
    width = size // max(1, count)
    if size > MAX_COUNT:
        return [_buffer(x), rows, contiguous(width, x.dtype)]
    return [_buffer(x), [width * rank_rows for rank_rows in rows], DATATYPES[x.dtype]]


@cache
def contiguous(count: int, dtype: torch.dtype) -> MPI.Datatype:
    """`count` elements as one."""
    element = DATATYPES[dtype]
    if count <= MAX_COUNT:
        return element.Create_contiguous(count).Commit()
    whole, rest = divmod(count, MAX_COUNT)
    block = element.Create_contiguous(MAX_COUNT)
    parts = [block.Create_contiguous(whole), element.Create_contiguous(rest)]
    return MPI.Datatype.Create_struct([1, 1], [0, whole * block.Get_extent()[1]], parts).Commit()


def _buffer(x: Tensor) -> MPI.buffer:
    # By address: takes every dtype and tensors with a gradient, and a GPU's memory where MPI knows it.
    return MPI.buffer.fromaddress(x.data_ptr(), x.nbytes)
