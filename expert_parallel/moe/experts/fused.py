"""Computes the experts of one rank as a single autograd function: gather, multiply, activate, multiply, weight, sum.

Compared with autograd over the same steps it saves memory: the backward pass gathers the rows again, and usually
recomputes activations from the first product, which is all that is saved (see `saves_outputs`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expert_parallel.moe.experts.grouped_gemm import GroupedGemm
from expert_parallel.moe.experts.kernels import ops_for
from expert_parallel.moe.types import DispatchedTokens


def fused_experts(tokens: DispatchedTokens, w_in: Tensor, w_out: Tensor, activation: str, gemm: GroupedGemm) -> Tensor:
    """Returns y_VD: for each received row, the sum over its choices of weight * activation(x W_in) W_out, in x's dtype.

    w_in: (e, D, F), or (e, D, 2F) = [gate | up] for gated activations. w_out: (e, F, D). Both may be wider than x; the
    forward and the backward pass each cast them to x's dtype, so that no copy is kept between the passes. Runs with
    autocast disabled.
    """
    with torch.autocast(tokens.x_VD.device.type, enabled=False):
        y_VD: Tensor = _FusedExperts.apply(tokens.x_VD, tokens.weights_R, w_in, w_out, tokens, activation, gemm)
    return y_VD


def fused_experts_weighted_input(
    tokens: DispatchedTokens, w_in: Tensor, w_out: Tensor, activation: str, gemm: GroupedGemm
) -> Tensor:
    """Returns y_VD: for each received row, the sum over its choices of activation((weight * x) W_in) W_out, in x's
    dtype. Arguments are those of `fused_experts`. Source: Llama 4."""
    with torch.autocast(tokens.x_VD.device.type, enabled=False):
        inputs = (tokens.x_VD, tokens.weights_R, w_in, w_out, tokens, activation, gemm)
        y_VD: Tensor = _FusedExpertsWeightedInput.apply(*inputs)
    return y_VD


def saves_outputs(x_VD: Tensor, w_out: Tensor) -> bool:
    """Returns True if the backward pass uses saved activations and outputs instead of recomputing them.

    That is so on the CPU, where recomputing an activation takes about 4 % of a layer's time, for wide experts (F >= D):
    a token uses few of these, so there is little to save.
    """
    return x_VD.is_cpu and w_out.shape[1] >= w_out.shape[2]


class _FusedExperts(torch.autograd.Function):
    """Implements `fused_experts`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_VD: Tensor,
        weights_R: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        tokens: DispatchedTokens,
        activation: str,
        gemm: GroupedGemm,
    ) -> Tensor:
        ops = ops_for(x_VD)
        groups = gemm.groups(tokens.counts_e)
        weights_R = weights_R.detach()
        ctx.activation = activation
        ctx.gemm = gemm
        ctx.groups = groups
        h_RF = gemm.rows(ops.gather(x_VD, tokens.row_R), w_in.to(x_VD.dtype), groups)
        saved = (x_VD, weights_R, w_in, w_out, tokens.row_R, tokens.computed_VK, h_RF)
        w_out = w_out.to(x_VD.dtype)
        if not saves_outputs(x_VD, w_out):  # weights are applied before W_out: the backward pass then needs no outputs
            ctx.save_for_backward(*saved)
            y_RD = gemm.rows(ops.activate(h_RF, activation, weights_R), w_out, groups)
            return ops.combine(y_RD, tokens.computed_VK)
        a_RF = ops.activate(h_RF, activation)
        y_RD = gemm.rows(a_RF, w_out, groups)
        ctx.save_for_backward(*saved, a_RF, y_RD)
        return ops.combine(y_RD, tokens.computed_VK, weights_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_VD: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients of x, weights, w_in and w_out; large tensors are released after their last use.

        The gradient of a choice's weight is <dy, y> = <dy W_out^T, a>, with dy the gradient of its token's output. Each
        choice's weight is applied once on the way to dW_out and once on the way to dh, from which dW_in and dx follow:
        to rows of outputs if those are saved, else to rows of activations.
        """
        x_VD, weights_R, w_in, w_out, row_R, computed_VK, h_RF, *saved = ctx.saved_tensors
        ops = ops_for(x_VD)
        gemm = ctx.gemm
        groups = ctx.groups
        activation = ctx.activation
        needs_x, _, needs_in, needs_out = ctx.needs_input_grad[:4]
        dx_VD = dw_in = dw_out = None
        with torch.autocast(x_VD.device.type, enabled=False):
            w_out_T = w_out.to(x_VD.dtype).mT
            dy_RD = ops.gather(dy_VD, row_R)
            if saved:
                a_RF, y_RD = saved
                dweights_R = ops.row_dots(dy_RD, y_RD, weights_R.dtype)
                dy_RD = ops.weigh_(dy_RD, weights_R)
                dh_RF = None
                if needs_in or needs_x:
                    dh_RF = ops.activation_grad(h_RF, gemm.rows(dy_RD, w_out_T, groups), activation)
            else:  # <dy W_out^T, a> needs no output (SonicMoE, Guo et al. 2025)
                g_RF = gemm.rows(dy_RD, w_out_T, groups)
                a_RF, dh_RF, dweights_R = ops.activate_backward(h_RF, g_RF, weights_R, activation)
                del g_RF
            if needs_out:
                dw_out = gemm.sums(a_RF, dy_RD, groups).to(w_out.dtype)
            del a_RF, dy_RD
            if needs_in:
                dw_in = gemm.sums(ops.gather(x_VD, row_R), dh_RF, groups).to(w_in.dtype)
            if needs_x:
                dx_RD = gemm.rows(dh_RF, w_in.to(x_VD.dtype).mT, groups)
                del dh_RF
                dx_VD = ops.combine(dx_RD, computed_VK)
        return dx_VD, dweights_R, dw_in, dw_out, None, None, None


class _FusedExpertsWeightedInput(torch.autograd.Function):
    """Implements `fused_experts_weighted_input`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_VD: Tensor,
        weights_R: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        tokens: DispatchedTokens,
        activation: str,
        gemm: GroupedGemm,
    ) -> Tensor:
        ops = ops_for(x_VD)
        groups = gemm.groups(tokens.counts_e)
        weights_R = weights_R.detach()
        ctx.activation = activation
        ctx.gemm = gemm
        ctx.groups = groups
        x_RD = ops.weigh_(ops.gather(x_VD, tokens.row_R), weights_R)
        h_RF = gemm.rows(x_RD, w_in.to(x_VD.dtype), groups)
        ctx.save_for_backward(x_VD, weights_R, w_in, w_out, tokens.row_R, tokens.computed_VK, h_RF)
        y_RD = gemm.rows(ops.activate(h_RF, activation), w_out.to(x_VD.dtype), groups)
        return ops.combine(y_RD, tokens.computed_VK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_VD: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients of x, weights, w_in and w_out; large tensors are released after their last use.

        With u = weight * x, the input of W_in, and its gradient du: that of the weight is <du, x>, that of x is
        weight * du.
        """
        x_VD, weights_R, w_in, w_out, row_R, computed_VK, h_RF = ctx.saved_tensors
        ops = ops_for(x_VD)
        gemm, groups = ctx.gemm, ctx.groups
        needs_x, needs_weights, needs_in, needs_out = ctx.needs_input_grad[:4]
        dx_VD = dweights_R = dw_in = dw_out = None
        with torch.autocast(x_VD.device.type, enabled=False):
            dy_RD = ops.gather(dy_VD, row_R)
            g_RF = gemm.rows(dy_RD, w_out.to(x_VD.dtype).mT, groups)
            a_RF, dh_RF, _ = ops.activate_backward(h_RF, g_RF, torch.ones_like(weights_R), ctx.activation)
            del g_RF
            if needs_out:
                dw_out = gemm.sums(a_RF, dy_RD, groups).to(w_out.dtype)
            del a_RF, dy_RD
            x_RD = ops.gather(x_VD, row_R)
            if needs_x or needs_weights:
                du_RD = gemm.rows(dh_RF, w_in.to(x_VD.dtype).mT, groups)
                dweights_R = ops.row_dots(du_RD, x_RD, weights_R.dtype)
                dx_VD = ops.combine(du_RD, computed_VK, weights_R)
                del du_RD
            if needs_in:
                dw_in = gemm.sums(ops.weigh_(x_RD, weights_R), dh_RF, groups).to(w_in.dtype)
        return dx_VD, dweights_R, dw_in, dw_out, None, None, None
