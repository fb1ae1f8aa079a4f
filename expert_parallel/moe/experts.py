"""The experts of one rank: feed-forward networks with stacked weights, run on rows that are grouped by expert.

`BACKENDS` maps each `backend:` to its grouped matrix product. A backend sees rows and counts, never tokens or ranks.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from expert_parallel.collectives import group_size
from expert_parallel.moe.expert_tensor import add_up_at_ranks, gather_from_ranks
from expert_parallel.moe.ffn import ACTIVATIONS, GATED, Activation, width_in
from expert_parallel.moe.random import dropout, mix
from expert_parallel.moe.slices import divide
from expert_parallel.settings import Settings


class ExpertsConfig(Settings):
    """Expert_i(x) = activation(x W_in + b_in) W_out + b_out, each with its own weights.

    `backend: auto` takes grouped_mm where torch has it for the dtype and sizes, else the loop.
    """

    hidden: int = Field(ge=1)
    activation: Activation = "swiglu"
    bias: bool = False
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1, description="after the activation (Switch expert dropout)")
    output_dropout: float = Field(default=0.0, ge=0, lt=1, description="after the second matrix")
    backend: Literal["auto", "loop", "grouped_mm"] = "auto"


def loop_matmul(x_RK: Tensor, weight_eKN: Tensor, counts_e: Tensor) -> Tensor:
    """One product an expert. Any dtype. unbind, since indexing would allocate a full gradient for each expert."""
    blocks = x_RK.split(counts_e.tolist())
    return torch.cat([x @ weight for x, weight in zip(blocks, weight_eKN.unbind(0), strict=True)])


def grouped_mm_matmul(x_RK: Tensor, weight_eKN: Tensor, counts_e: Tensor) -> Tensor:
    """torch's grouped product. float32 and bfloat16; on CUDA bfloat16 alone."""
    if x_RK.shape[0] == 0:  # not every device's kernel takes an empty product
        return loop_matmul(x_RK, weight_eKN, counts_e)
    return F.grouped_mm(x_RK, weight_eKN, offs=counts_e.cumsum(0).to(torch.int32))


# kind -> (rows, weights, counts) -> rows: result[r] = x[r] @ weight[expert of row r].
BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "loop": loop_matmul,
    "grouped_mm": grouped_mm_matmul,
}


def choose_backend(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> str:
    """The backend of `auto`: grouped_mm takes no float64, on CUDA no float32, and rows of 16-byte multiples only."""
    fits = all(size * dtype.itemsize % 16 == 0 for size in sizes)
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    return "grouped_mm" if fits and dtype in dtypes else "loop"


class GroupedExperts(nn.Module):
    """The experts with global numbers `expert_ids`, in slot order.

    w_in: (e, D, F), or (e, D, 2F) = [gate | up] for gated activations. w_out: (e, F, D). b_in, b_out: (e, ...).

    etp_group: the ranks over which F is divided; they hold the same experts, other columns. Everything but b_out is
    then this rank's part (see slices.py). ValueError where F cannot be divided.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        d_model: int,
        expert_ids: tuple[int, ...],
        etp_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.config, self.expert_ids, self.etp_group = config, expert_ids, etp_group
        num_local, columns, etp = len(expert_ids), width_in(config.activation, config.hidden), group_size(etp_group)
        if config.hidden % etp:
            raise ValueError(f"model.moe.experts.hidden ({config.hidden}) is not a multiple of parallel.etp ({etp})")
        device = torch.empty(0).device
        with torch.device("meta" if etp > 1 else device):  # the whole experts are never held
            self.w_in = nn.Parameter(torch.empty(num_local, d_model, columns))
            self.w_out = nn.Parameter(torch.empty(num_local, config.hidden, d_model))
            self.b_in = nn.Parameter(torch.empty(num_local, columns)) if config.bias else None
            self.b_out = nn.Parameter(torch.empty(num_local, d_model)) if config.bias else None
        self.sizes = (d_model, columns // etp, config.hidden // etp)
        if etp > 1:
            assert etp_group is not None
            gate_and_up = 2 if config.activation in GATED else 1
            divide(self, "w_in", -1, etp_group, gate_and_up)
            divide(self, "w_out", -2, etp_group)
            if config.bias:
                divide(self, "b_in", -1, etp_group, gate_and_up)
            self.to_empty(device=device)

    def forward(self, x_RD: Tensor, counts_e: Tensor, weights_R: Tensor, dropout_seed: int = 0) -> Tensor:
        """Takes the fields of DispatchedTokens. Returns (R, D) in x's dtype: weight_r * Expert_r(x_r).

        With an etp_group every rank of it calls this, each with rows of its own. The products see the rows of all; bias
        b_out, dropout of outputs and weights are applied once, by the rank whose rows they are.
        """
        config = self.config
        best = choose_backend(x_RD.dtype, x_RD.device, self.sizes)
        if config.backend == "grouped_mm" and best != "grouped_mm":
            raise ValueError(
                f"model.moe.experts.backend 'grouped_mm' cannot run {x_RD.dtype} of sizes {self.sizes} on "
                f"{x_RD.device.type}: no float64, on CUDA bfloat16 alone, rows of 16-byte multiples"
            )
        matmul = BACKENDS[best if config.backend == "auto" else config.backend]
        x_GD, everyones_e, gathered = gather_from_ranks(x_RD, counts_e, self.etp_group)
        hidden = matmul(x_GD, self.w_in.to(x_RD.dtype), everyones_e)
        hidden = ACTIVATIONS[config.activation](_add_bias(hidden, self.b_in, everyones_e))
        if self.training:
            hidden = dropout(hidden, config.hidden_dropout, mix(dropout_seed, 0))
        y_GD = matmul(hidden, self.w_out.to(x_RD.dtype), everyones_e)
        y_RD = _add_bias(add_up_at_ranks(y_GD, gathered), self.b_out, counts_e)
        if self.training:
            y_RD = dropout(y_RD, config.output_dropout, mix(dropout_seed, 1))
        return (y_RD * weights_R[:, None]).to(x_RD.dtype)


def _add_bias(rows: Tensor, bias_e: Tensor | None, counts_e: Tensor) -> Tensor:
    if bias_e is None:
        return rows
    return rows + bias_e.to(rows.dtype).repeat_interleave(counts_e, dim=0, output_size=rows.shape[0])
