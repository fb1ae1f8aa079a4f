"""Implements the row kernels on the CPU by torch operations that write into given memory, on blocks of rows that fit
the caches.

torch_ops.py defines what each function computes. `activation_grad`, which only this file has, is a part of
`activate_backward`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from expert_parallel.moe.dispatch.permute import NO_ROW, sum_rows
from expert_parallel.moe.experts.kernels import torch_ops

aten = torch.ops.aten
BLOCK_ELEMENTS = 2**18  # so that the three or four blocks that one step touches fit a core's second-level cache


def gather(x_LD: Tensor, row_R: Tensor) -> Tensor:
    """Gathers rows as torch_ops.gather does."""
    absent_N = (row_R == NO_ROW).nonzero().squeeze(1)  # on the CPU: nothing to wait for
    if len(absent_N) == 0:
        return x_LD.index_select(0, row_R)
    if len(x_LD) == 0:
        return x_LD.new_zeros(len(row_R), x_LD.shape[1])
    return x_LD.index_select(0, row_R.clamp(min=0)).index_fill_(0, absent_N, 0)


def weigh_(x_RD: Tensor, weights_R: Tensor) -> Tensor:
    """Multiplies each row by its weight in place, in the wider of both dtypes; rounds once."""
    return _weighed(x_RD, weights_R, x_RD)


def row_dots(x_RD: Tensor, y_RD: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes torch_ops.row_dots, but rounds products to x's dtype before it sums them in `dtype`."""
    return torch.cat([(x * y).sum(1, dtype=dtype) for x, y in _blocks(x_RD, y_RD)])


def combine(y_RD: Tensor, rows_VK: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """Computes torch_ops.combine, but rounds each weighted row to y's dtype before the sum. Rows from other ranks
    arrive rounded too, so the summands have the same bits on every layout."""
    if weights_R is not None:
        y_RD = _weighed(y_RD, weights_R, torch.empty_like(y_RD))
    return sum_rows(y_RD, rows_VK)


def activate(h_RF2: Tensor, activation: str, weights_R: Tensor | None = None) -> Tensor:
    """Computes torch_ops.activate, with intermediate results in h's dtype."""
    if activation in ("swiglu", "geglu"):
        gate_RF, up_RF = h_RF2.chunk(2, 1)
        a_RF = (F.silu(gate_RF) if activation == "swiglu" else F.gelu(gate_RF)).mul_(up_RF)
    elif activation in ("gelu", "relu"):
        a_RF = F.gelu(h_RF2) if activation == "gelu" else F.relu(h_RF2)
    else:
        return torch_ops.activate(h_RF2, activation, weights_R)
    return a_RF if weights_R is None else weigh_(a_RF, weights_R)


def activate_backward(h_RF2: Tensor, g_RF: Tensor, weights_R: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Computes torch_ops.activate_backward. Overwrites g_RF."""
    a_RF = activate(h_RF2, activation)
    dot_R = row_dots(g_RF, a_RF, weights_R.dtype)
    return weigh_(a_RF, weights_R), activation_grad(h_RF2, weigh_(g_RF, weights_R), activation), dot_R


def activation_grad(h_RF2: Tensor, g_RF: Tensor, activation: str) -> Tensor:
    """Returns the gradient of h. g_RF: the gradient of the activation; overwritten, by the result if there is no
    gate."""
    if activation == "gelu":
        return aten.gelu_backward.grad_input(g_RF, h_RF2, grad_input=g_RF)
    if activation == "relu":
        return aten.threshold_backward.grad_input(g_RF, h_RF2, 0, grad_input=g_RF)
    if activation not in ("swiglu", "geglu"):
        return torch_ops.activate_backward(h_RF2, g_RF, torch.ones_like(g_RF[:, 0]), activation)[1]
    dh_RF2 = torch.empty_like(h_RF2)
    forward, backward = (aten.silu, aten.silu_backward) if activation == "swiglu" else (aten.gelu, aten.gelu_backward)
    for h, g, dh in _blocks(h_RF2, g_RF, dh_RF2):
        (gate, up), (dgate, dup) = h.chunk(2, 1), dh.chunk(2, 1)
        forward.out(gate, out=dup).mul_(g)
        backward.grad_input(g.mul_(up), gate, grad_input=dgate)
    return dh_RF2


def _weighed(x_RD: Tensor, weights_R: Tensor, out_RD: Tensor) -> Tensor:
    """Writes each row times its weight to out_RD, rounded once to x's dtype, and returns out_RD."""
    if x_RD.dtype == weights_R.dtype:
        return torch.mul(x_RD, weights_R[:, None], out=out_RD)
    wide = torch.promote_types(x_RD.dtype, weights_R.dtype)
    # In blocks, since torch.mul would convert all of x at once.
    for x, weights_R1, out in _blocks(x_RD, weights_R[:, None], out_RD):
        out.copy_(x.to(wide, copy=True).mul_(weights_R1))
    return out_RD


def _blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields successive blocks of the same rows of all matrices, small enough for the caches."""
    rows = max(1, BLOCK_ELEMENTS // max(1, matrices[0].shape[1]))
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)
