"""Computes the feed-forward networks of the reference layer (see reference_layer.py) on one token at a time, from their
formulas."""

import math
from typing import Any

import torch
from torch import Tensor


def _activate(activation: str, h: Tensor) -> Tensor:
    """Applies an activation of ffn.ACTIVATIONS, written out; gated kinds halve the last dimension."""
    half = h.shape[-1] // 2
    if activation == "relu":
        return torch.clamp(h, min=0)
    if activation == "gelu":
        return _gelu(h)
    gate, up = h[..., :half], h[..., half:]
    if activation == "gpt_oss":
        gate, up = torch.clamp(gate, max=7), torch.clamp(up, min=-7, max=7)
        return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
    return (gate / (1 + torch.exp(-gate)) if activation == "swiglu" else _gelu(gate)) * up


def _gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))


def _expert(config: Any, parameters: dict[str, Tensor], prefix: str, x_D: Tensor) -> Tensor:
    """Computes one expert on one token."""
    h = x_D @ parameters[prefix + "w_in"] + parameters.get(prefix + "b_in", 0)
    return _activate(config.experts.activation, h) @ parameters[prefix + "w_out"] + parameters.get(prefix + "b_out", 0)


def weighted_expert(config: Any, parameters: dict[str, Tensor], number: int, x_D: Tensor, weight: Tensor) -> Tensor:
    """Computes weight * Expert(x), or with `weight_input` Expert(weight * x) (Llama 4)."""
    prefix = f"experts.{number}."
    if config.experts.weight_input:
        return _expert(config, parameters, prefix, weight * x_D)
    return weight * _expert(config, parameters, prefix, x_D)


def shared(config: Any, parameters: dict[str, Tensor], x_D: Tensor) -> Tensor:
    """Computes the shared experts on one token, times sigmoid(x w) with a gate (Qwen2-MoE)."""
    h = parameters["shared_experts.w_in.weight"] @ x_D + parameters.get("shared_experts.w_in.bias", 0)
    h = _activate(config.shared_experts.activation, h)
    y = parameters["shared_experts.w_out.weight"] @ h + parameters.get("shared_experts.w_out.bias", 0)
    if not config.shared_expert_gate:
        return y
    return y / (1 + torch.exp(-parameters["shared_expert_gate.weight"] @ x_D))
