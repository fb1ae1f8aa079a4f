"""Builds the workloads of `bench equal-capacity`: the dense layer, and the separate parts of the dense and the MoE
layer."""

import time
from functools import partial

import torch
from torch import Tensor

from expert_parallel.bench.scaling import routing_workload
from expert_parallel.bench.timing import Workload, synchronize
from expert_parallel.moe.conservation import count_choices
from expert_parallel.moe.context import StepContext, token_batch
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.experts.fused import saves_outputs
from expert_parallel.moe.experts.grouped import GroupedExperts, choose_backend
from expert_parallel.moe.experts.grouped_gemm import GROUPED_GEMMS
from expert_parallel.moe.experts.kernels import ops_for
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.types import DispatchedTokens
from expert_parallel.nn.ffn import ACTIVATIONS, FFN


class TimedWorkload:
    """Records the seconds of each run of a workload, since `measure` returns only their median and range."""

    def __init__(self, work: Workload, device: torch.device) -> None:
        self.whole, self.device = work, device
        self.seconds: list[float] = []
        self.work = Workload(self.run, work.clear)

    def run(self) -> None:
        start = time.perf_counter()
        self.whole.run()
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)


def dense_workload(dense: FFN, x_TD: Tensor) -> Workload:
    """Returns a workload that runs the dense layer's forward and backward pass."""

    def run() -> None:
        y_TD = dense(x_TD)
        y_TD.backward(torch.ones_like(y_TD))

    return Workload(run, partial(clear_gradients, x_TD, *dense.parameters()))


def dense_parts(dense: FFN, x_TD: Tensor) -> dict[str, Workload]:
    """Returns the parts of the dense layer's forward and backward pass as workloads by name: `products` (six matrix
    products) and `activation`."""
    x_TD = x_TD.detach()
    w_in, w_out = dense.w_in.weight.detach(), dense.w_out.weight.detach()
    activation = ACTIVATIONS[dense.activation]
    h_TF = (x_TD @ w_in.T).requires_grad_()
    a_TF = activation(h_TF).detach()
    dy_TD = torch.ones_like(x_TD)
    da_TF, dh_TF = torch.randn_like(a_TF), torch.randn_like(h_TF)

    def multiply() -> None:
        torch.mm(x_TD, w_in.T)
        torch.mm(a_TF, w_out.T)
        torch.mm(dy_TD, w_out)
        torch.mm(dy_TD.T, a_TF)
        torch.mm(dh_TF, w_in)
        torch.mm(dh_TF.T, x_TD)

    def activate() -> None:
        activation(h_TF).backward(da_TF)

    return {"products": Workload(multiply), "activation": Workload(activate, partial(clear_gradients, h_TF))}


def moe_parts(layer: MoELayer, tokens: DispatchedTokens, x_TD: Tensor) -> dict[str, Workload]:
    """Returns the parts of the MoE layer's forward and backward pass as workloads by name: `products`, `activation`,
    `gathers`, `router` and `sorting`. tokens: the input of the experts."""
    return {
        **expert_parts(layer.experts, tokens),
        "router": routing_workload(layer, x_TD),
        "sorting": sorting_workload(layer, x_TD),
    }


def expert_parts(experts: GroupedExperts, tokens: DispatchedTokens) -> dict[str, Workload]:
    """Returns the operations of moe/experts/fused.py, forward and backward, as three workloads: `products`,
    `activation` and `gathers`.

    Where activations are recomputed, the routing weights are multiplied by the activation's kernels, and else together
    with the gathers of rows, so their cost counts there."""
    products = GROUPED_GEMMS[choose_backend(experts.config, tokens.x_VD.dtype, tokens.x_VD.device, experts.sizes)]
    tokens = experts.pad_for_backend(tokens, products)
    x_VD, weights_R = tokens.x_VD, tokens.weights_R
    row_R, computed_VK = tokens.row_R, tokens.computed_VK
    w_in, w_out = experts.w_in.detach(), experts.w_out.detach()
    activation = experts.config.activation
    ops, keeps = ops_for(x_VD), saves_outputs(x_VD, w_out)
    groups = products.groups(tokens.counts_e)
    x_RD = ops.gather(x_VD, row_R)
    h_RF = products.rows(x_RD, w_in, groups)
    a_RF = ops.activate(h_RF, activation)
    y_RD = products.rows(a_RF, w_out, groups)
    dy_VD = torch.ones_like(x_VD)
    dy_RD, dx_RD = torch.ones_like(x_RD), torch.randn_like(x_RD)
    da_RF, dh_RF = torch.randn_like(a_RF), torch.randn_like(h_RF)
    overwritten_RF = da_RF.clone()

    def multiply() -> None:
        groups = products.groups(tokens.counts_e)
        products.rows(x_RD, w_in, groups)
        products.rows(a_RF, w_out, groups)
        products.rows(dy_RD, w_out.mT, groups)
        products.sums(a_RF, dy_RD, groups)
        products.sums(x_RD, dh_RF, groups)
        products.rows(dh_RF, w_in.mT, groups)

    def activate() -> None:
        if keeps:
            ops.activate(h_RF, activation)
            ops.activation_grad(h_RF, overwritten_RF, activation)
        else:
            ops.activate(h_RF, activation, weights_R)
            ops.activate_backward(h_RF, overwritten_RF, weights_R, activation)

    def move() -> None:
        ops.gather(x_VD, row_R)
        ops.combine(y_RD, computed_VK, *([weights_R] if keeps else []))
        gathered_RD = ops.gather(dy_VD, row_R)
        if keeps:
            ops.row_dots(gathered_RD, y_RD, weights_R.dtype)
            ops.weigh_(gathered_RD, weights_R)
        ops.gather(x_VD, row_R)
        ops.combine(dx_RD, computed_VK)

    def renew() -> None:  # in-place kernels would shrink it every round, down to denormals, which are slow
        overwritten_RF.copy_(da_RF)

    return {"products": Workload(multiply), "activation": Workload(activate, renew), "gathers": Workload(move)}


def sorting_workload(layer: MoELayer, x_TD: Tensor) -> Workload:
    """Returns a workload of what dispatcher and layer do on one rank besides the experts: sorting of row indices, the
    gather of routing weights with its gradient, and the counts for statistics."""
    with torch.no_grad():
        plan = layer.router(x_TD, token_batch(x_TD[None], StepContext(), None))
    x_TD = x_TD.detach()
    plan.weights_TK.requires_grad_()

    def run() -> None:
        pending = layer.dispatcher.dispatch(x_TD, plan, Ledger(), StepContext())
        (chunk,) = pending.receive_chunks()
        weights_R = chunk.tokens.weights_R
        weights_R.backward(torch.ones_like(weights_R))
        count_choices(plan, plan, None)

    return Workload(run, partial(clear_gradients, plan.weights_TK))


def capture_expert_input(layer: MoELayer, x_TD: Tensor) -> DispatchedTokens:
    """Runs one forward pass without a graph, and returns the input of its experts."""
    seen: list[DispatchedTokens] = []
    hook = layer.experts.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        layer(x_TD.detach())
    hook.remove()
    return seen[0]


def clear_gradients(*leaves: Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None
