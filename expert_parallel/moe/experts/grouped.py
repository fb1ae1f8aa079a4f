"""Implements the experts of one rank: feed-forward networks with stacked weights, run on rows grouped by expert.

Plain experts are a single autograd function (fused.py); those with biases, dropout or columns sharded over ranks are
differentiated by autograd, step by step. Both multiply by grouped_gemm.py.
"""

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import AliasChoices, Field
from torch import Tensor, nn

from expert_parallel.moe.dispatch.permute import NO_ROW, gather_rows
from expert_parallel.moe.experts.expert_tensor_parallel import all_gather_by_expert, reduce_scatter_by_expert
from expert_parallel.moe.experts.fused import fused_experts, fused_experts_weighted_input
from expert_parallel.moe.experts.grouped_gemm import GROUPED_GEMMS, GroupedGemm, has_bfloat16_gemm
from expert_parallel.moe.experts.numbered import NumberedExperts
from expert_parallel.moe.experts.replicas import check_own_weights, mean_gradient
from expert_parallel.moe.types import DispatchedTokens
from expert_parallel.nn.ffn import ACTIVATIONS, GATED, Activation, ffn_params, w_in_columns
from expert_parallel.nn.random import dropout, mix
from expert_parallel.parallel.collectives import group_size
from expert_parallel.parallel.sharding import get_tensor_shards, shard_parameter
from expert_parallel.settings import Settings


class ExpertsConfig(Settings):
    """Describes the routed experts, each activation(x W_in + b_in) W_out + b_out with its own weights."""

    hidden: int = Field(ge=1, validation_alias=AliasChoices("hidden", "ffn_hidden_size"))
    """Sets the width between an expert's two matrices, that of one half for gated activations."""
    activation: Activation = "swiglu"
    """Sets the activation; `swiglu`, `geglu` and `gpt_oss` are gated (Shazeer 2020)."""
    bias: bool = False
    """Adds biases to both matrices of each expert."""
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Sets the dropout probability after the activation (Switch's expert dropout)."""
    output_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Sets the dropout probability after the second matrix."""
    weight_input: bool = False
    """Multiplies the routing weight with the expert's input, and not with its output (Llama 4)."""
    backend: Literal["auto", "loop", "grouped_mm", "bmm"] = "auto"
    """Chooses how experts multiply; `auto` takes bmm for bfloat16 on CPUs that multiply it, else grouped_mm if torch
    supports the dtype and sizes, else a loop over the experts."""

    @property
    def is_plain(self) -> bool:
        """Returns True for experts without biases and dropout, which fused.py can compute."""
        return not (self.bias or self.hidden_dropout or self.output_dropout)

    def num_params(self, d_model: int) -> int:
        """Counts the parameters of one expert."""
        return ffn_params(d_model, self.hidden, self.activation, self.bias)


def supports_grouped_mm(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> bool:
    """Returns True if torch's grouped_mm supports this dtype and these widths of rows.

    It takes bfloat16, on the CPU also float32, and rows of a multiple of 16 bytes.
    """
    fits = all(size * dtype.itemsize % 16 == 0 for size in sizes)
    return fits and dtype in ((torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16))


def choose_backend(config: ExpertsConfig, dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> str:
    """Returns the backend to use: the configured one; for `auto` the fastest (moe/MEASUREMENTS.md, log).

    That is bmm for bfloat16 on a CPU that multiplies it, else grouped_mm if it is supported, else loop.
    """
    if config.backend != "auto":
        return config.backend
    if device.type == "cpu" and dtype == torch.bfloat16 and has_bfloat16_gemm():
        return "bmm"
    return "grouped_mm" if supports_grouped_mm(dtype, device, sizes) else "loop"


class GroupedExperts(NumberedExperts):
    """Holds the experts with the global ids `expert_ids`, in slot order, and computes them.

    w_in: (e, D, F), or (e, D, 2F) = [gate | up] for gated activations. w_out: (e, F, D). b_in, b_out: (e, ...). State
    dicts name each expert by its number (see NumberedExperts). num_experts: the experts of all ranks; None: these are
    all.

    etp_group: the ranks over which F is sharded; they hold the same experts, each with other columns. All parameters
    but b_out are then this rank's shard (see parallel/sharding.py). Raises a ValueError if F cannot be divided evenly.
    ep_group: the ranks that hold other experts.

    `reduction`: "sum" leaves the gradients as MoELayer describes; "mean" divides them by the number of ranks whose rows
    they sum up, and b_out's is whole, too. `compares_ranks`: True until the first forward pass, which raises a
    ValueError if another rank of either group has equal weights (see check_own_weights).
    """

    def __init__(
        self,
        config: ExpertsConfig,
        d_model: int,
        expert_ids: tuple[int, ...],
        etp_group: dist.ProcessGroup | None = None,
        ep_group: dist.ProcessGroup | None = None,
        num_experts: int | None = None,
    ) -> None:
        super().__init__(expert_ids, max(expert_ids) + 1 if num_experts is None else num_experts)
        self.config = config
        self.etp_group = etp_group
        self.ep_group = ep_group
        self.reduction: Literal["sum", "mean"] = "sum"
        self.compares_ranks = self.num_ranks > 1
        num_local = len(expert_ids)
        columns = w_in_columns(config.activation, config.hidden)
        etp = group_size(etp_group)
        if config.hidden % etp:
            raise ValueError(f"model.moe.experts.hidden ({config.hidden}) is not a multiple of parallel.etp ({etp})")
        device = torch.empty(0).device
        with torch.device("meta" if etp > 1 else device):  # unsharded weights never take memory
            self.w_in = nn.Parameter(torch.empty(num_local, d_model, columns))
            self.w_out = nn.Parameter(torch.empty(num_local, config.hidden, d_model))
            self.b_in = nn.Parameter(torch.empty(num_local, columns)) if config.bias else None
            self.b_out = nn.Parameter(torch.empty(num_local, d_model)) if config.bias else None
        self.sizes = (d_model, columns // etp, config.hidden // etp)
        if etp > 1:
            assert etp_group is not None
            gate_and_up = 2 if config.activation in GATED else 1
            shard_parameter(self, "w_in", -1, etp_group, gate_and_up)
            shard_parameter(self, "w_out", -2, etp_group)
            if config.bias:
                shard_parameter(self, "b_in", -1, etp_group, gate_and_up)
            self.to_empty(device=device)

    @property
    def num_ranks(self) -> int:
        """Returns the number of ranks over which the layer's experts are sharded, whole or by columns."""
        return group_size(self.ep_group) * group_size(self.etp_group)

    def forward(self, tokens: DispatchedTokens, dropout_seed: int = 0) -> Tensor:
        """Returns y_VD: for each received row, the sum over its choices of weight * Expert(x), in x's dtype; with
        `weight_input`, of Expert(weight * x).

        Every rank of the etp_group calls this, each with rows of its own. Each rank multiplies the rows of all of them
        with its columns; b_out, output dropout and weights are applied by the rank that owns the rows. Raises a
        ValueError if the configured backend does not support x's dtype or the sizes.
        """
        config, x_VD = self.config, tokens.x_VD
        if self.compares_ranks:  # here, where FSDP2 has gathered its shards
            self.compare_ranks()
        best = choose_backend(config, x_VD.dtype, x_VD.device, self.sizes)
        if best == "grouped_mm" and not supports_grouped_mm(x_VD.dtype, x_VD.device, self.sizes):
            raise ValueError(
                f"model.moe.experts.backend 'grouped_mm' cannot run {x_VD.dtype} of sizes {self.sizes} on "
                f"{x_VD.device.type}: it takes bfloat16, on CPUs also float32, and sizes of a multiple of 16 bytes"
            )
        if config.is_plain and group_size(self.etp_group) == 1:
            tokens = self.pad_for_backend(tokens, GROUPED_GEMMS[best])
            weights = (self.weight("w_in"), self.weight("w_out"))
            fused = fused_experts_weighted_input if config.weight_input else fused_experts
            return fused(tokens, *weights, config.activation, GROUPED_GEMMS[best])
        row_R1 = tokens.row_R[:, None]  # a table of one column, since some may be NO_ROW (see gather_rows)
        x_RD = gather_rows(x_VD, row_R1, tokens.computed_VK)
        y_RD = self._by_autograd(x_RD, tokens.counts_e, tokens.weights_R, GROUPED_GEMMS[best], dropout_seed)
        return gather_rows(y_RD, tokens.computed_VK, row_R1)

    def compare_ranks(self) -> None:
        """Raises a ValueError on all ranks of ep_group, or of etp_group, if two of them have equal weights."""
        weights = (self.w_in, self.w_out)
        check_own_weights(weights, self.ep_group, "ep_group")
        check_own_weights(weights, self.etp_group, "etp_group")
        self.compares_ranks = False

    def weight(self, name: str) -> Tensor:
        """Returns a parameter as the forward pass uses it, with the gradient that `reduction` asks for."""
        weight: Tensor = getattr(self, name)
        if self.reduction == "sum" or self.num_ranks == 1:
            return weight
        # The gradient of a shard has the rows of all ranks of both groups, that of b_out those of one ep_group alone.
        return mean_gradient(weight, self.num_ranks, None if name in get_tensor_shards(self) else self.etp_group)

    def pad_for_backend(self, tokens: DispatchedTokens, gemm: GroupedGemm) -> DispatchedTokens:
        """Pads the experts' rows with zeros to the group sizes that are fastest for this backend."""
        if gemm.pad_group_sizes is None:
            return tokens
        d_model, _, hidden = self.sizes
        return pad_groups(tokens, gemm.pad_group_sizes(tokens.counts_e, d_model * hidden))

    def _by_autograd(self, x_RD: Tensor, counts_e: Tensor, weights_R: Tensor, gemm: GroupedGemm, seed: int) -> Tensor:
        """Computes weight_r * Expert_r(x_r) for each row r, or Expert_r(weight_r * x_r), in x's dtype, step by step
        under autograd."""
        config = self.config
        if config.weight_input:
            x_RD = (x_RD * weights_R[:, None]).to(x_RD.dtype)
        x_GD, gathered_e, gathered = all_gather_by_expert(x_RD, counts_e, self.etp_group)
        groups = gemm.groups(gathered_e)
        b_in, b_out = (self.weight("b_in"), self.weight("b_out")) if config.bias else (None, None)
        hidden = gemm.rows(x_GD, self.weight("w_in").to(x_RD.dtype), groups)
        hidden = ACTIVATIONS[config.activation](_add_bias(hidden, b_in, gathered_e))
        if self.training:
            hidden = dropout(hidden, config.hidden_dropout, mix(seed, 0))
        y_GD = gemm.rows(hidden, self.weight("w_out").to(x_RD.dtype), groups)
        y_RD = _add_bias(reduce_scatter_by_expert(y_GD, gathered), b_out, counts_e)
        if self.training:
            y_RD = dropout(y_RD, config.output_dropout, mix(seed, 1))
        return y_RD if config.weight_input else (y_RD * weights_R[:, None]).to(x_RD.dtype)


def pad_groups(tokens: DispatchedTokens, counts_e: Tensor) -> DispatchedTokens:
    """Returns the same tokens with counts_e rows for each expert to compute: first the rows that it has, then rows of
    zeros.

    counts_e: int64, at least the number of rows that each expert has. On a GPU the host waits.
    """
    added_e = counts_e - tokens.counts_e
    num_rows, total = len(tokens.row_R), int(counts_e.sum())  # the host waits: the total becomes a shape
    if total == num_rows:
        return tokens
    own_R = torch.arange(num_rows, device=counts_e.device)
    place_R = own_R + (added_e.cumsum(0) - added_e).repeat_interleave(tokens.counts_e, output_size=num_rows)
    own_P = place_R.new_full((total,), NO_ROW).scatter_(0, place_R, own_R)
    row_P = place_R.new_full((total,), NO_ROW).scatter_(0, place_R, tokens.row_R)
    computed_VK = torch.cat([place_R, place_R.new_tensor([NO_ROW])])[tokens.computed_VK]  # NO_ROW reads the last entry
    weights_P = gather_rows(tokens.weights_R, own_P[:, None], place_R[:, None])
    return DispatchedTokens(tokens.x_VD, row_P, computed_VK, counts_e, weights_P)


def _add_bias(rows: Tensor, bias_e: Tensor | None, counts_e: Tensor) -> Tensor:
    """Adds to each row the bias of its expert. bias_e: (e, width); None: no bias."""
    if bias_e is None:
        return rows
    return rows + bias_e.to(rows.dtype).repeat_interleave(counts_e, dim=0, output_size=rows.shape[0])
