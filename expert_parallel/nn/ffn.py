"""Implements the dense feed-forward network of dense blocks and shared experts, its activations, and `Linear`."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import AliasChoices, Field
from torch import Tensor, nn

from expert_parallel.settings import Settings

Activation = Literal["relu", "gelu", "swiglu", "geglu", "gpt_oss"]


def gpt_oss(x: Tensor) -> Tensor:
    """Computes (up + 1) * gate * sigmoid(1.702 gate) of x = [gate | up], (..., 2F) -> (..., F).

    Clamps gate to at most 7 and up to [-7, 7] first. Source: gpt-oss.
    """
    gate, up = x.chunk(2, -1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


# Applied to the output of the first matrix, (..., w_in_columns). Gated ones take [gate | up] (Shazeer 2020).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "geglu": lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "gpt_oss": gpt_oss,
}
GATED = ("swiglu", "geglu", "gpt_oss")


def w_in_columns(activation: str, hidden: int) -> int:
    """Returns the number of columns of the first matrix: 2 * hidden for gated activations, else hidden."""
    return 2 * hidden if activation in GATED else hidden


def ffn_params(d_model: int, hidden: int, activation: str, bias: bool) -> int:
    """Counts the parameters of a feed-forward network: both matrices (the first includes the gate), and biases."""
    columns = w_in_columns(activation, hidden)
    return d_model * columns + hidden * d_model + (columns + d_model if bias else 0)


class FFNConfig(Settings):
    """Describes a feed-forward network: y = activation(x W_in + b_in) W_out + b_out."""

    hidden: int = Field(ge=1, validation_alias=AliasChoices("hidden", "ffn_hidden_size"))
    """Sets the hidden size: the columns between the two matrices, without those of the gate."""
    activation: Activation = "swiglu"
    """Sets the activation; `swiglu`, `geglu` and `gpt_oss` are gated (Shazeer 2020)."""
    bias: bool = False
    """Adds biases to both matrices."""

    def num_params(self, d_model: int) -> int:
        """Counts the parameters of the network."""
        return ffn_params(d_model, self.hidden, self.activation, self.bias)


class Linear(nn.Linear):
    """Applies a linear layer in its input's dtype, whatever the dtype of the weight.

    (..., in_features) -> (..., out_features). A bfloat16 model keeps float32 weights for the optimizer.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class FFN(nn.Module):
    """Computes activation(x W_in + b_in) W_out + b_out, in the dtype of x. (..., D) -> (..., D).

    gather_sequence: with tensor parallelism, gathers the tokens of all ranks, since each has only some hidden columns.
    """

    def __init__(self, config: FFNConfig, d_model: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.w_in = Linear(d_model, w_in_columns(config.activation, config.hidden), bias=config.bias)
        self.w_out = Linear(config.hidden, d_model, bias=config.bias)
        self.gather_sequence: Callable[[Tensor], Tensor] = identity

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(ACTIVATIONS[self.activation](self.w_in(self.gather_sequence(x))))


def identity(x: Tensor) -> Tensor:
    """Returns x; replaces a collective where there is no other rank."""
    return x
