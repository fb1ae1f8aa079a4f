"""Balancing: losses that spread the tokens over the experts, and the bias update that does so without a loss.

Functions of a RoutingPlan. Each returns this rank's SHARE of the loss: the shares of all ranks add up to the loss of
the whole micro-step, and so do their gradients. `LOSSES` maps each `kind:` to its function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from expert_parallel.collectives import all_reduce_sum, group_size
from expert_parallel.moe.plan import RoutingPlan
from expert_parallel.settings import Settings


class BalanceLossConfig(Settings):
    """E * sum over experts of f_e * P_e: 1 when balanced. Fedus et al. 2021, eq. 4-6; for top-k, f is a share of all
    choices, so that 1 stays 1 (transformers' Mixtral counts k times that).

    `scope`: the tokens over which f and P are averaged before they are multiplied. `global`: all ranks' tokens of
    the micro-step, the same as one rank that sees them as one batch. `rank`: each rank's own, then the mean over
    ranks. `sequence`: each sequence's own, then the mean over all sequences (DeepSeek-V3, eq. 17-20).
    """

    kind: Literal["balance"]
    coefficient: float = Field(default=0.01, gt=0)
    scope: Literal["global", "rank", "sequence"] = "global"


class ZLossConfig(Settings):
    """Mean over tokens of (log sum exp logits)^2, over all ranks' tokens of the micro-step. Zoph et al. 2022, eq. 5."""

    kind: Literal["z_loss"]
    coefficient: float = Field(default=0.001, gt=0)


LossConfig = Annotated[BalanceLossConfig | ZLossConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class Tokens:
    """What the losses know of the micro-step beyond this rank's plan.

    group: the ranks whose tokens make up the micro-step, each token counted once. num_sequences: this rank's, of
    equal length. total_tokens, total_sequences, choices_E: sums over the group (tensors; never fetched to the host).
    """

    group: dist.ProcessGroup | None
    num_sequences: int
    total_tokens: Tensor
    total_sequences: Tensor
    choices_E: Tensor


def count_tokens(plan: RoutingPlan, num_sequences: int, group: dist.ProcessGroup | None) -> Tokens:
    """One all-reduce of E + 2 numbers over the group. Unconditional: a rank without tokens takes part."""
    num_experts = plan.num_experts
    choices_E = torch.bincount(plan.expert_ids_TK.flatten(), minlength=num_experts)
    sizes = choices_E.new_tensor([plan.expert_ids_TK.shape[0], num_sequences])
    total = all_reduce_sum(torch.cat([choices_E, sizes]), group).to(plan.logits_TE.dtype)
    return Tokens(group, num_sequences, total[num_experts], total[num_experts + 1], total[:num_experts])


def balance_loss(config: BalanceLossConfig, plan: RoutingPlan, tokens: Tokens) -> Tensor:
    """This rank's share, a scalar in router dtype. f carries no gradient; P is linear in this rank's tokens, so the
    gradient of the share is this rank's part of the gradient of the whole."""
    probabilities_TE = plan.probabilities_TE
    num_experts, num_tokens, num_choices = plan.num_experts, *plan.expert_ids_TK.shape
    if config.scope == "global":
        fraction_E = tokens.choices_E / (tokens.total_tokens * num_choices).clamp(min=1)
        mean_probability_E = probabilities_TE.sum(0) / tokens.total_tokens.clamp(min=1)
        return num_experts * (fraction_E * mean_probability_E).sum()
    per_rank = config.scope == "rank"
    num_blocks = 1 if per_rank else tokens.num_sequences
    total_blocks = group_size(tokens.group) if per_rank else tokens.total_sequences.clamp(min=1)
    block_length = num_tokens // max(num_blocks, 1)
    block_T = torch.arange(num_tokens, device=plan.scores_TE.device) // max(block_length, 1)
    key_TK = block_T[:, None] * num_experts + plan.expert_ids_TK
    choices_bE = torch.bincount(key_TK.flatten(), minlength=num_blocks * num_experts).view(num_blocks, num_experts)
    fraction_bE = choices_bE.to(probabilities_TE.dtype) / max(block_length * num_choices, 1)
    sum_bE = probabilities_TE.view(num_blocks, block_length, num_experts).sum(1)
    return num_experts * (fraction_bE * sum_bE).sum() / max(block_length, 1) / total_blocks


def z_loss(config: ZLossConfig, plan: RoutingPlan, tokens: Tokens) -> Tensor:
    """This rank's share, a scalar in router dtype."""
    return plan.logits_TE.logsumexp(-1).square().sum() / tokens.total_tokens.clamp(min=1)


LOSSES: dict[str, Callable[..., Tensor]] = {"balance": balance_loss, "z_loss": z_loss}


def router_losses(configs: list[LossConfig], plan: RoutingPlan, tokens: Tokens) -> dict[str, Tensor]:
    """Each configured loss's share before its coefficient. Two of one kind are told apart by their scope."""
    return {loss_name(config): LOSSES[config.kind](config, plan, tokens) for config in configs}


def loss_name(config: LossConfig) -> str:
    return f"balance_{config.scope}" if isinstance(config, BalanceLossConfig) else config.kind


@torch.no_grad()
def update_balance_bias(balance_bias_E: Tensor, choices_E: Tensor, rate: float) -> None:
    """b_e += rate * sign(mean load - load_e), in place, once a step. DeepSeek-V3 2024, section 2.1.2.

    choices_E: every choice of the whole step, before drops, summed over micro-steps and data ranks.
    """
    load_E = choices_E.to(torch.float64)
    balance_bias_E += rate * (load_E.mean() - load_E).sign().to(balance_bias_E.dtype)
