"""Defines in plain torch what the row kernels compute: the fallback on any device, and the reference for triton_ops.py.

The functions have no gradients, and no side effects except those whose names end in an underscore. Values are float32,
bfloat16, float16 or float64; they are computed in promote_types(float32, dtype), called wide here, and rounded once.
Row indices are int64; NO_ROW stands for no row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from expert_parallel.moe.dispatch.permute import NO_ROW
from expert_parallel.nn.ffn import ACTIVATIONS


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which values of `dtype` are computed; it is the router dtype too."""
    return torch.promote_types(torch.float32, dtype)


def gather(x_LD: Tensor, row_R: Tensor) -> Tensor:
    """Returns x_LD[row_R], with zeros where row_R is NO_ROW; (R, D) in x's dtype."""
    if x_LD.shape[0] == 0:
        return x_LD.new_zeros(len(row_R), x_LD.shape[1])
    return x_LD[row_R.clamp(min=0)].masked_fill_((row_R == NO_ROW)[:, None], 0)


def weigh_(x_RD: Tensor, weights_R: Tensor) -> Tensor:
    """Multiplies each row by its weight, in place."""
    return x_RD.mul_(weights_R[:, None])


def row_dots(x_RD: Tensor, y_RD: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the scalar product of each row of x with the same row of y, (R) in `dtype`, the router's."""
    wide = wide_dtype(x_RD.dtype)
    return (x_RD.to(wide) * y_RD.to(wide)).sum(1, dtype=dtype)


def activate(h_RF2: Tensor, activation: str, weights_R: Tensor | None = None) -> Tensor:
    """Returns a_RF: the activation of h, times the weight of each row if given, in h's dtype.

    h_RF2: (R, F), or (R, 2F) = [gate | up] for gated kinds of ffn.ACTIVATIONS.
    """
    a_RF = ACTIVATIONS[activation](h_RF2.to(wide_dtype(h_RF2.dtype)))
    if weights_R is not None:
        a_RF = a_RF * weights_R.to(a_RF.dtype)[:, None]
    return a_RF.to(h_RF2.dtype)


def activate_backward(h_RF2: Tensor, g_RF: Tensor, weights_R: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the backward pass of y_r = weight_r * (activation(h_r) W), and the activation again.

    g_RF: the gradient of activation(h) as if all weights were 1. Returns (a_RF, dh_RF2, dot_R): the activation and the
    gradient of h, both times the weight, in h's dtype; and the sum over F of g * activation, in router dtype. The
    latter is the gradient of the weight, which therefore needs no y (SonicMoE, Guo et al. 2025). Its summands are not
    rounded to h's dtype.
    """
    h, g = h_RF2.to(wide_dtype(h_RF2.dtype)), g_RF.to(wide_dtype(h_RF2.dtype))
    if activation == "relu":
        a, dh = F.relu(h), g.masked_fill(h <= 0, 0)
    elif activation == "gelu":
        a, dh = F.gelu(h), g * _gelu_slope(h)
    else:
        gate, up = h.chunk(2, -1)
        a, slope_gate, slope_up = _gated(gate, up, activation)
        dh = torch.cat([g * slope_gate, g * slope_up], -1)
    weights_R1 = weights_R.to(dh.dtype)[:, None]
    return (a * weights_R1).to(h_RF2.dtype), (dh * weights_R1).to(h_RF2.dtype), (g * a).sum(-1)


def combine(y_RD: Tensor, rows_VK: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """Returns y_VD: for each v, the sum over k of weights_R[r] * y_RD[r] with r = rows_VK[v, k], in the order of k.

    NO_ROW adds nothing. Without weights, rows are summed as they are. The result has y_RD's dtype.
    """
    num_rows, num_choices = rows_VK.shape
    wide = wide_dtype(y_RD.dtype)
    total_VD = y_RD.new_zeros(num_rows, y_RD.shape[1], dtype=wide)
    if y_RD.shape[0] == 0:
        return total_VD.to(y_RD.dtype)
    for k in range(num_choices):
        row_V = rows_VK[:, k].clamp(min=0)
        rows_VD = y_RD[row_V].to(wide)
        if weights_R is not None:
            rows_VD = rows_VD * weights_R[row_V, None].to(wide)
        total_VD += rows_VD.masked_fill_((rows_VK[:, k] == NO_ROW)[:, None], 0)
    return total_VD.to(y_RD.dtype)


def _gated(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the value of a gated activation, its derivative by gate, and its derivative by up."""
    if activation == "swiglu":
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        return silu * up, up * (sigmoid + silu * (1 - sigmoid)), silu
    if activation == "geglu":
        gelu = F.gelu(gate)
        return gelu * up, up * _gelu_slope(gate), gelu
    assert activation == "gpt_oss", activation
    below, inside = gate <= 7, (up >= -7) & (up <= 7)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1
    sigmoid = torch.sigmoid(1.702 * gate)
    glu = gate * sigmoid
    return up * glu, up * (sigmoid + 1.702 * glu * (1 - sigmoid)) * below, glu * inside


def _gelu_slope(x: Tensor) -> Tensor:
    """Returns the derivative of the exact GELU, x * Phi(x)."""
    normal = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return normal + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
