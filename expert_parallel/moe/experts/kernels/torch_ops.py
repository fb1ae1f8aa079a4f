"""What the kernels compute, in plain torch: the fallback on any device, and what triton_ops.py is tested against.

The functions know no autograd, and are pure, but for those whose names end in an underscore. Values are float32,
bfloat16, float16 or float64; they are computed in promote_types(float32, dtype), called wide here, and rounded once.
Row numbers are int64; NO_ROW names no row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from expert_parallel.moe.dispatch.permute import NO_ROW
from expert_parallel.nn.ffn import ACTIVATIONS


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of `dtype` are computed in; the router's dtype as well."""
    return torch.promote_types(torch.float32, dtype)


def gather(x_LD: Tensor, row_R: Tensor) -> Tensor:
    """x_LD[row_R], zeros where row_R is NO_ROW."""
    if x_LD.shape[0] == 0:
        return x_LD.new_zeros(len(row_R), x_LD.shape[1])
    return x_LD[row_R.clamp(min=0)].masked_fill_((row_R == NO_ROW)[:, None], 0)


def weigh_(x_RD: Tensor, weights_R: Tensor) -> Tensor:
    """Multiplies each row by its weight, in place."""
    return x_RD.mul_(weights_R[:, None])


def activate(h_RF2: Tensor, activation: str, weights_R: Tensor | None = None) -> Tensor:
    """a_RF, the activation of h, times each row's weight if given. h_RF2: (R, F), or (R, 2F) = [gate | up] for gated
    kinds of ffn.ACTIVATIONS."""
    a_RF = ACTIVATIONS[activation](h_RF2.to(wide_dtype(h_RF2.dtype)))
    if weights_R is not None:
        a_RF = a_RF * weights_R.to(a_RF.dtype)[:, None]
    return a_RF.to(h_RF2.dtype)


def activate_backward(h_RF2: Tensor, g_RF: Tensor, weights_R: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(a_RF, dh_RF2, dot_R) where y_r = weight_r * (activation(h_r) W), and g_RF is the gradient of the activation for
    weights of 1: the activation computed again and the gradient of h, both times the weight, and sum over F of
    g * activation.

    dot_R: router dtype. It is the gradient of the weight, which so needs no y. Source: SonicMoE (Guo et al. 2025). What
    is summed is not rounded to h's dtype before.
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
    """y_VD: y_V = sum over k, in the order of k, of weights_R[r] * y_RD[r] with r = rows_VK[v, k]; without weights, of
    rows.

    NO_ROW adds nothing. Returns (V, D) in y_RD's dtype.
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
    """(value, its derivative by gate, its derivative by up)."""
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
    normal = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return normal + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
