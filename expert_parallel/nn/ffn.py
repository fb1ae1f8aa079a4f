"""The dense feed-forward network (shared experts, dense blocks), the activations, and Linear in the input's dtype."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import AliasChoices, Field
from torch import Tensor, nn

from expert_parallel.settings import Settings

Activation = Literal["relu", "gelu", "swiglu", "geglu", "gpt_oss"]


def gpt_oss(x: Tensor) -> Tensor:
    """(up + 1) * gate * sigmoid(1.702 gate), of a gate of at most 7 and an up of -7 to 7: gpt-oss."""
    gate, up = x.chunk(2, -1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


# kind -> function of the first matrix's output. The gated ones take [gate | up] side by side (Shazeer 2020).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "geglu": lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "gpt_oss": gpt_oss,
}
GATED = ("swiglu", "geglu", "gpt_oss")


def w_in_columns(activation: str, hidden: int) -> int:
    """Columns of the first matrix: twice the hidden size where a gate stands beside it."""
    return 2 * hidden if activation in GATED else hidden


def ffn_params(d_model: int, hidden: int, activation: str, bias: bool) -> int:
    """Counts the parameters of one feed-forward network: both matrices (the first with the gate), and both biases."""
    columns = w_in_columns(activation, hidden)
    return d_model * columns + hidden * d_model + (columns + d_model if bias else 0)


class FFNConfig(Settings):
    """Describes a feed-forward network: y = activation(x W_in + b_in) W_out + b_out."""

    hidden: int = Field(ge=1, validation_alias=AliasChoices("hidden", "ffn_hidden_size"))
    """Sets the width between the two matrices, that of one half for gated activations."""
    activation: Activation = "swiglu"
    """Sets the activation; `swiglu`, `geglu` and `gpt_oss` are gated (Shazeer 2020)."""
    bias: bool = False
    """Adds biases to both matrices."""

    def num_params(self, d_model: int) -> int:
        return ffn_params(d_model, self.hidden, self.activation, self.bias)


class Linear(nn.Linear):
    """Computes in its input's dtype, whatever dtype the weight is kept in (float32 for a bfloat16 model)."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class FFN(nn.Module):
    """Dense feed-forward network. (..., D) -> (..., D). gather_sequence: where tensor parallel divides the hidden
    columns, this rank's tokens -> those of all its ranks."""

    def __init__(self, config: FFNConfig, d_model: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.w_in = Linear(d_model, w_in_columns(config.activation, config.hidden), bias=config.bias)
        self.w_out = Linear(config.hidden, d_model, bias=config.bias)
        self.gather_sequence: Callable[[Tensor], Tensor] = identity

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(ACTIVATIONS[self.activation](self.w_in(self.gather_sequence(x))))


def identity(x: Tensor) -> Tensor:
    """Stands for a collective where a rank is alone."""
    return x
