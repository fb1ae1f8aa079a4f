"""The experts of one rank as one differentiable operation: gather, multiply, activate, multiply, weigh, add up.

Against autograd over the same steps: gathered rows are not kept for the backward pass but gathered again, and as a rule
neither are activations nor outputs: the first product is enough.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expert_parallel.moe.experts.grouped_gemm import GroupedGemm
from expert_parallel.moe.experts.kernels import ops_for
from expert_parallel.moe.types import DispatchedTokens


def fused_experts(tokens: DispatchedTokens, w_in: Tensor, w_out: Tensor, activation: str, gemm: GroupedGemm) -> Tensor:
    """y_VD, in x's dtype: of each arrived row, the sum over its choices of weight * activation(x W_in) W_out.

    w_in: (e, D, F), or (e, D, 2F) = [gate | up] for gated activations. w_out: (e, F, D). Of x's dtype or wider: they
    are cast to it in each pass, so that no copy is kept between them. Autocast has no say in it.
    """
    with torch.autocast(tokens.x_VD.device.type, enabled=False):
        y_VD: Tensor = _FusedExperts.apply(tokens.x_VD, tokens.weights_R, w_in, w_out, tokens, activation, gemm)
    return y_VD


def saves_outputs(x_VD: Tensor, w_out: Tensor) -> bool:
    """Whether activations and outputs are kept, too. On the CPU, where to make an activation again takes some 4 % of a
    layer's time, and where they are few: of wide experts (F >= D), which a token has few of."""
    return x_VD.is_cpu and w_out.shape[1] >= w_out.shape[2]


class _FusedExperts(torch.autograd.Function):
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
        ops, groups, weights_R = ops_for(x_VD), gemm.groups(tokens.counts_e), weights_R.detach()
        ctx.activation, ctx.gemm, ctx.groups = activation, gemm, groups
        h_RF = gemm.rows(ops.gather(x_VD, tokens.row_R), w_in.to(x_VD.dtype), groups)
        saved = (x_VD, weights_R, w_in, w_out, tokens.row_R, tokens.computed_VK, h_RF)
        w_out = w_out.to(x_VD.dtype)
        if not saves_outputs(x_VD, w_out):
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
        """A weight is multiplied in once on the way to dW_out, and once to dh, of which dW_in and dx are made: at the
        narrower of activations and outputs. Large tensors are let go as soon as they have served."""
        x_VD, weights_R, w_in, w_out, row_R, computed_VK, h_RF, *kept = ctx.saved_tensors
        ops, gemm, groups, activation = ops_for(x_VD), ctx.gemm, ctx.groups, ctx.activation
        needs_x, _, needs_in, needs_out = ctx.needs_input_grad[:4]
        dx_VD = dw_in = dw_out = None
        with torch.autocast(x_VD.device.type, enabled=False):
            w_out_T = w_out.to(x_VD.dtype).mT
            dy_RD = ops.gather(dy_VD, row_R)
            if kept:  # the gradient of a weight is <dy, y>
                a_RF, y_RD = kept
                dweights_R = ops.row_dots(dy_RD, y_RD, weights_R.dtype)
                dy_RD = ops.weigh_(dy_RD, weights_R)
                dh_RF = None
                if needs_in or needs_x:
                    dh_RF = ops.activation_grad(h_RF, gemm.rows(dy_RD, w_out_T, groups), activation)
            else:  # the same is <dy W_out^T, a>, and needs no output (SonicMoE, Guo et al. 2025)
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
