"""Implements the functions of torch_ops.py on the GPU, each by one launch of a kernel in triton_kernels.py.

A launch depends on the shapes of tensors, never on their values: the host does not wait for the GPU, and CUDA graphs
can capture it. Empty results launch nothing.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from expert_parallel.moe.experts.kernels import torch_ops
from expert_parallel.moe.experts.kernels import triton_kernels as kernels
from expert_parallel.moe.experts.kernels.torch_ops import wide_dtype
from expert_parallel.nn.ffn import GATED, w_in_columns


def gather(x_LD: Tensor, row_R: Tensor) -> Tensor:
    """Gathers rows as torch_ops.gather does."""
    out_RD = x_LD.new_empty(len(row_R), x_LD.shape[1])
    if out_RD.numel():
        grid, tile = _cut(out_RD)
        with _on(x_LD):
            kernels.gather[grid](x_LD.contiguous(), row_R.contiguous(), out_RD, *out_RD.shape, *tile)
    return out_RD


weigh_ = torch_ops.weigh_  # it is one pass over memory already


def row_dots(x_RD: Tensor, y_RD: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes torch_ops.row_dots."""
    dot_R = x_RD.new_zeros(len(x_RD), dtype=dtype)
    if x_RD.numel():
        grid, tile = _cut(x_RD)
        with _on(x_RD):
            kernels.row_dots[grid[:1]](x_RD.contiguous(), y_RD.contiguous(), dot_R, *x_RD.shape, _wide(x_RD), *tile)
    return dot_R


def activate(h_RF2: Tensor, activation: str, weights_R: Tensor | None = None) -> Tensor:
    """Computes torch_ops.activate."""
    num_rows, hidden = h_RF2.shape[0], h_RF2.shape[1] // w_in_columns(activation, 1)
    a_RF = h_RF2.new_empty(num_rows, hidden)
    if a_RF.numel():
        grid, tile = _cut(a_RF)
        weights = h_RF2 if weights_R is None else weights_R  # any pointer: without weights, the kernel does not read it
        tensors = (h_RF2.contiguous(), weights.contiguous(), a_RF)
        kind = (activation, activation in GATED, weights_R is not None, _wide(h_RF2))
        with _on(h_RF2):
            kernels.activate[grid](*tensors, *a_RF.shape, h_RF2.shape[1], *kind, *tile)
    return a_RF


def activate_backward(h_RF2: Tensor, g_RF: Tensor, weights_R: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Computes torch_ops.activate_backward. Overwrites g_RF with a_RF."""
    a_RF = g_RF.contiguous()  # safe: a program reads each value of g before it writes a in its place
    dh_RF2 = h_RF2.new_empty(h_RF2.shape)
    if a_RF.numel() == 0:
        return a_RF, dh_RF2, h_RF2.new_zeros(len(g_RF), dtype=wide_dtype(h_RF2.dtype))
    dot_R = h_RF2.new_empty(len(g_RF), dtype=wide_dtype(h_RF2.dtype))
    grid, tile = _cut(a_RF, TILE // 2)  # half a tile, since about twice as many values are live as in a forward pass
    kind = (activation, activation in GATED, _wide(h_RF2))
    tensors = (h_RF2.contiguous(), a_RF, weights_R.contiguous(), a_RF, dh_RF2, dot_R)
    with _on(h_RF2):
        kernels.activate_backward[grid[:1]](*tensors, *a_RF.shape, h_RF2.shape[1], *kind, *tile)
    return a_RF, dh_RF2, dot_R


def combine(y_RD: Tensor, rows_VK: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """Computes torch_ops.combine."""
    y_VD = y_RD.new_empty(len(rows_VK), y_RD.shape[1])
    if y_VD.numel():
        grid, tile = _cut(y_VD)
        weights = rows_VK if weights_R is None else weights_R  # any pointer, as in `activate`
        inputs = (y_RD.contiguous(), rows_VK.contiguous(), weights.contiguous())
        kind = (rows_VK.shape[1], weights_R is not None, _wide(y_RD))
        with _on(y_RD):
            kernels.combine[grid](*inputs, y_VD, *y_VD.shape, *kind, *tile)
    return y_VD


TILE = 4096  # the number of values that a program computes


def _cut(out: Tensor, values: int = TILE) -> tuple[tuple[int, int], tuple[int, int]]:
    """Divides a matrix into tiles. Returns (grid, tile), both as (rows, columns): the number of tiles, and their sizes.

    A tile is as wide as possible, since a row is contiguous in memory. Its size depends on the number of columns alone:
    each new size is compiled, and the number of rows changes every step.
    """
    num_rows, num_columns = out.shape
    columns = min(1024, max(16, triton.next_power_of_2(num_columns)))
    rows = values // columns
    return (triton.cdiv(num_rows, rows), triton.cdiv(num_columns, columns)), (rows, columns)


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Returns a context with x's device as the current one, on which Triton launches."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def _wide(x: Tensor) -> tl.dtype:
    """Returns Triton's name of `wide_dtype`."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32
