"""The functions of torch_ops.py, each one launch of a kernel in triton_kernels.py.

What a launch needs are shapes of tensors, never values in them: nothing waits for the GPU, and a CUDA graph can hold
all of it. Empty results launch nothing.
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
    """See torch_ops."""
    out_RD = x_LD.new_empty(len(row_R), x_LD.shape[1])
    if out_RD.numel():
        grid, tile = _cut(out_RD)
        with _on(x_LD):
            kernels.gather[grid](x_LD.contiguous(), row_R.contiguous(), out_RD, *out_RD.shape, *tile)
    return out_RD


weigh_ = torch_ops.weigh_  # one pass as it is


def activate(h_RF2: Tensor, activation: str, weights_R: Tensor | None = None) -> Tensor:
    """See torch_ops."""
    num_rows, hidden = h_RF2.shape[0], h_RF2.shape[1] // w_in_columns(activation, 1)
    a_RF = h_RF2.new_empty(num_rows, hidden)
    if a_RF.numel():
        grid, tile = _cut(a_RF)
        weights = h_RF2 if weights_R is None else weights_R  # a pointer must be there, though nothing is read
        tensors = (h_RF2.contiguous(), weights.contiguous(), a_RF)
        kind = (activation, activation in GATED, weights_R is not None, _wide(h_RF2))
        with _on(h_RF2):
            kernels.activate[grid](*tensors, *a_RF.shape, h_RF2.shape[1], *kind, *tile)
    return a_RF


def activate_backward(h_RF2: Tensor, g_RF: Tensor, weights_R: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """See torch_ops. g_RF is overwritten, with a_RF."""
    a_RF = g_RF.contiguous()  # each value of g is read before one of a takes its place
    dh_RF2 = h_RF2.new_empty(h_RF2.shape)
    if a_RF.numel() == 0:
        return a_RF, dh_RF2, h_RF2.new_zeros(len(g_RF), dtype=wide_dtype(h_RF2.dtype))
    dot_R = h_RF2.new_empty(len(g_RF), dtype=wide_dtype(h_RF2.dtype))
    grid, tile = _cut(a_RF, TILE // 2)  # twice the values live as in a forward pass
    kind = (activation, activation in GATED, _wide(h_RF2))
    tensors = (h_RF2.contiguous(), a_RF, weights_R.contiguous(), a_RF, dh_RF2, dot_R)
    with _on(h_RF2):
        kernels.activate_backward[grid[:1]](*tensors, *a_RF.shape, h_RF2.shape[1], *kind, *tile)
    return a_RF, dh_RF2, dot_R


def combine(y_RD: Tensor, rows_VK: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """See torch_ops."""
    y_VD = y_RD.new_empty(len(rows_VK), y_RD.shape[1])
    if y_VD.numel():
        grid, tile = _cut(y_VD)
        weights = rows_VK if weights_R is None else weights_R  # a pointer must be there, though nothing is read
        inputs = (y_RD.contiguous(), rows_VK.contiguous(), weights.contiguous())
        kind = (rows_VK.shape[1], weights_R is not None, _wide(y_RD))
        with _on(y_RD):
            kernels.combine[grid](*inputs, y_VD, *y_VD.shape, *kind, *tile)
    return y_VD


TILE = 4096  # values of a program


def _cut(out: Tensor, values: int = TILE) -> tuple[tuple[int, int], tuple[int, int]]:
    """(grid, tile): programs and values of each, both (by rows, by columns). Columns first: they lie side by side.

    The tile depends on the columns alone, since each new tile is compiled and the number of rows changes every step.
    """
    num_rows, num_columns = out.shape
    columns = min(1024, max(16, triton.next_power_of_2(num_columns)))
    rows = values // columns
    return (triton.cdiv(num_rows, rows), triton.cdiv(num_columns, columns)), (rows, columns)


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def _wide(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
