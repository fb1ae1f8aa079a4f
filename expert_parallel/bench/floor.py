"""Measures a lower bound on a layer's time: the matrix products of its experts alone, on rows and outputs that already
exist in memory.

A layer that computes in the same precision with torch's own products can be faster only by using larger products."""

import torch
from torch import Tensor

from expert_parallel.bench.peers.implementation import Case
from expert_parallel.bench.shapes import num_matrices
from expert_parallel.parallel.collectives import group_rank
from expert_parallel.parallel.placement import ExpertPlacement


class Floor:
    """Runs the matrix products of the experts' forward and backward passes under balanced routing: each expert has T *
    K / E rows (rounded up for the first experts, down for the others), and each of its matrices takes part in three
    products. With several ranks, runs the products of this rank's experts."""

    def __init__(self, case: Case) -> None:
        shape = case.shape
        experts = ExpertPlacement.contiguous(shape.num_experts, case.ranks).experts_on(group_rank(case.group))
        small, larger = divmod(shape.tokens * shape.k, shape.num_experts)
        self.rows_e = [small + (expert < larger) for expert in experts]
        rows = sum(self.rows_e)
        d_model, hidden = shape.d_model, shape.hidden
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []  # (a, b, out) of out = a @ b

        def new(*size: int) -> Tensor:
            return torch.randn(*size, dtype=case.dtype, device=case.device)

        inputs = [
            (new(len(self.rows_e), d_model, hidden), new(rows, hidden))
            for _ in range(num_matrices(case.activation) - 1)
        ]
        x_RD, dx_RD = new(rows, d_model), new(rows, d_model)
        y_RD, dy_RD = new(rows, d_model), new(rows, d_model)
        dh_RF = new(rows, hidden)
        w_out_eFD = new(len(self.rows_e), hidden, d_model)
        gradients = [torch.empty_like(w_eDF) for w_eDF, _ in inputs]
        dw_out_eFD = torch.empty_like(w_out_eFD)
        start = 0
        for e, count in enumerate(self.rows_e):
            own = slice(start, start + count)
            start += count
            for w_eDF, h_RF in inputs:
                self.products.append((x_RD[own], w_eDF[e], h_RF[own]))
            h_RF = inputs[0][1]
            self.products.append((h_RF[own], w_out_eFD[e], y_RD[own]))
            self.products.append((dy_RD[own], w_out_eFD[e].T, dh_RF[own]))
            self.products.append((h_RF[own].T, dy_RD[own], dw_out_eFD[e]))
            for (w_eDF, _), dw_eDF in zip(inputs, gradients, strict=True):
                self.products.append((dh_RF[own], w_eDF[e].T, dx_RD[own]))
                self.products.append((x_RD[own].T, dh_RF[own], dw_eDF[e]))

    def run(self) -> None:
        for a, b, out in self.products:
            torch.mm(a, b, out=out)

    @property
    def flops(self) -> int:
        """Returns the FLOPs of one `run` on this rank."""
        return sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in self.products)
