"""Describes tensors to MPI as address, count and datatype, without copying or pickling them."""

from collections.abc import Sequence
from functools import cache

import torch
from mpi4py import MPI
from torch import Tensor

# MPI before version 4, and Open MPI 5, count elements with an int. Longer tensors are sent as blocks of elements.
MAX_COUNT = 2**31 - 1

# The MPI datatype of each dtype. MPI has no 2-byte floats: they are sent as bits, and reduced as REDUCE_DTYPES says.
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

# The dtypes in which these are reduced: sums of 2-byte floats are so rounded once, at the end.
REDUCE_DTYPES = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.bool: torch.uint8}


def buffer_spec(x: Tensor, blocks: int = 1) -> list[object]:
    """Returns MPI's description of a contiguous tensor: address, number of elements of one block, and datatype.

    blocks: the number of equal blocks that the tensor consists of (one per rank in an all-to-all). Raises ValueError if
    the number of elements is not a multiple of it.
    """
    count, rest = divmod(x.numel(), blocks)
    if rest:
        raise ValueError(f"a tensor of {x.numel()} elements does not divide over {blocks} ranks")
    if x.numel() > MAX_COUNT:
        return [_buffer(x), 1, contiguous_datatype(count, x.dtype)]
    return [_buffer(x), count, DATATYPES[x.dtype]]  # the count of one block


def rows_buffer_spec(x: Tensor, rows: Sequence[int]) -> list[object]:
    """Returns MPI's description of a contiguous tensor (sum(rows), ...) whose first rows[0] rows belong to rank 0, and
    so on. Raises ValueError if the numbers do not sum to the tensor's number of rows."""
    count, size = x.shape[0], x.numel()
    if sum(rows) != count:
        raise ValueError(f"splits {list(rows)} come to {sum(rows)} rows, the tensor has {count}")
    width = size // max(1, count)
    if size > MAX_COUNT:
        return [_buffer(x), rows, contiguous_datatype(width, x.dtype)]
    return [_buffer(x), [width * rank_rows for rank_rows in rows], DATATYPES[x.dtype]]


@cache
def contiguous_datatype(count: int, dtype: torch.dtype) -> MPI.Datatype:
    """Returns a datatype of `count` consecutive elements, which may be more than an int can count."""
    element = DATATYPES[dtype]
    if count <= MAX_COUNT:
        return element.Create_contiguous(count).Commit()
    whole, rest = divmod(count, MAX_COUNT)
    block = element.Create_contiguous(MAX_COUNT)
    parts = [block.Create_contiguous(whole), element.Create_contiguous(rest)]
    return MPI.Datatype.Create_struct([1, 1], [0, whole * block.Get_extent()[1]], parts).Commit()


def _buffer(x: Tensor) -> MPI.buffer:
    # From the address: this works for every dtype, tensors that require grad, and GPU memory with a CUDA-aware MPI.
    return MPI.buffer.fromaddress(x.data_ptr(), x.nbytes)
