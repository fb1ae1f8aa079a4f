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
from expert_parallel.moe.plan import RoutingPlan, TokenBatch, count_routed
from expert_parallel.settings import Settings


class BalanceLossConfig(Settings):
    """E * sum over experts of f_e * P_e: 1 when balanced. f_e: share of the choices that fall on expert e; P_e: mean
    probability of e. Fedus et al. 2021, eq. 4-6.

    `scope`: the tokens over which f and P are averaged before they are multiplied. `global`: all ranks' tokens of
    the micro-step, the same as one rank that sees them as one batch. `rank`: each rank's own, then the mean over
    ranks. `sequence`: each sequence's own, then the mean over all sequences (DeepSeek-V3, eq. 17-20).

    `choices`: f counts `all` k choices of a token (transformers' Mixtral, which does not divide by k: its coefficient
    is ours / k), or the `first` alone (GShard, DeepSpeed's top-2).

    `layers`: `each` MoE layer its own f * P, or `pooled`: f and P are averaged over all MoE layers of the model before
    they are multiplied (transformers' load_balancing_loss_func). A pooled loss is the sum of its layers' parts.
    """

    kind: Literal["balance"]
    coefficient: float = Field(default=0.01, gt=0)
    scope: Literal["global", "rank", "sequence"] = "global"
    choices: Literal["all", "first"] = "all"
    layers: Literal["each", "pooled"] = "each"


class ZLossConfig(Settings):
    """Mean over tokens of (log sum exp logits)^2, over all ranks' tokens of the micro-step. Zoph et al. 2022, eq. 5."""

    kind: Literal["z_loss"]
    coefficient: float = Field(default=0.001, gt=0)


LossConfig = Annotated[BalanceLossConfig | ZLossConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class MicroStep:
    """What the losses know of the micro-step beyond this rank's plan: sums over `group`, the ranks whose tokens make
    it up, in router dtype; never fetched to the host. Padding does not count. choices_E, first_E: choices of all k,
    and first choices."""

    group: dist.ProcessGroup | None
    total_tokens: Tensor
    total_sequences: Tensor
    choices_E: Tensor
    first_E: Tensor


def count_micro_step(plan: RoutingPlan, batch: TokenBatch) -> MicroStep:
    """One all-reduce of 2 E + 2 numbers over the group. Unconditional: a rank without tokens takes part."""
    num_experts = plan.num_experts
    choices_E, first_E = count_routed(plan), count_routed(plan, num_choices=1)
    num_tokens = len(plan.expert_ids_TK)
    sizes = choices_E.new_tensor([num_tokens, batch.num_sequences if num_tokens else 0])
    if batch.real_T is not None and num_tokens:  # a sequence of padding alone is none
        sizes = torch.stack([batch.real_T.sum(), batch.real_T.view(batch.num_sequences, -1).any(1).sum()])
    total = all_reduce_sum(torch.cat([choices_E, first_E, sizes]), batch.group).to(plan.logits_TE.dtype)
    choices_E, first_E, sizes = total.split([num_experts, num_experts, 2])
    return MicroStep(batch.group, sizes[0], sizes[1], choices_E, first_E)


def fractions_and_probabilities(
    config: BalanceLossConfig, plan: RoutingPlan, batch: TokenBatch, step: MicroStep
) -> tuple[Tensor, Tensor]:
    """f and P of each block of tokens, (blocks, E): the sum of E * f * P over all ranks is the loss. f carries no
    gradient and is the block's; P is this rank's part of it, so that the gradient of a share is a part of the
    whole's."""
    num_experts, num_tokens = plan.num_experts, len(plan.expert_ids_TK)
    num_counted = 1 if config.choices == "first" else plan.expert_ids_TK.shape[1]
    probabilities_TE = plan.probabilities_TE
    if batch.real_T is not None:
        probabilities_TE = probabilities_TE * batch.real_T[:, None]
    if config.scope == "global":
        counts_E = step.first_E if config.choices == "first" else step.choices_E
        total = step.total_tokens.clamp(min=1)
        return (counts_E / (total * num_counted))[None], (probabilities_TE.sum(0) / total)[None]
    per_rank = config.scope == "rank"
    num_blocks = 1 if per_rank else batch.num_sequences
    total_blocks = group_size(step.group) if per_rank else step.total_sequences.clamp(min=1)
    real_T = torch.ones_like(batch.index_T) if batch.real_T is None else batch.real_T.long()
    block_T = torch.zeros_like(batch.sequence_T) if per_rank else batch.sequence_T
    size_b = torch.zeros(num_blocks, dtype=torch.int64, device=real_T.device).index_add(0, block_T, real_T).clamp(min=1)
    ids_TK = plan.expert_ids_TK + block_T[:, None] * num_experts
    ids_TK = ids_TK.masked_fill(~plan.routed_TK, num_blocks * num_experts)[:, :num_counted]
    counts = torch.bincount(ids_TK.flatten(), minlength=num_blocks * num_experts + 1)[: num_blocks * num_experts]
    fraction_bE = counts.view(num_blocks, num_experts).to(probabilities_TE.dtype) / (size_b * num_counted)[:, None]
    sum_bE = probabilities_TE.view(num_blocks, num_tokens // max(num_blocks, 1), num_experts).sum(1)
    return fraction_bE, sum_bE / size_b[:, None] / total_blocks


def balance_loss(config: BalanceLossConfig, plan: RoutingPlan, batch: TokenBatch, step: MicroStep) -> Tensor:
    """This rank's share, a scalar in router dtype."""
    fraction_bE, probability_bE = fractions_and_probabilities(config, plan, batch, step)
    return plan.num_experts * (fraction_bE * probability_bE).sum()


def z_loss(config: ZLossConfig, plan: RoutingPlan, batch: TokenBatch, step: MicroStep) -> Tensor:
    """This rank's share, a scalar in router dtype."""
    squares_T = plan.logits_TE.logsumexp(-1).square()
    if batch.real_T is not None:
        squares_T = squares_T * batch.real_T
    return squares_T.sum() / step.total_tokens.clamp(min=1)


LOSSES: dict[str, Callable[..., Tensor]] = {"balance": balance_loss, "z_loss": z_loss}


def router_losses(
    configs: list[LossConfig], plan: RoutingPlan, batch: TokenBatch
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Each configured loss's share before its coefficient, by name; and f and P of those that are pooled over
    layers."""
    if not configs:
        return {}, {}
    step = count_micro_step(plan, batch)
    losses = {loss_name(config): LOSSES[config.kind](config, plan, batch, step) for config in configs}
    pooled = [config for config in configs if isinstance(config, BalanceLossConfig) and config.layers == "pooled"]
    return losses, {loss_name(config): fractions_and_probabilities(config, plan, batch, step) for config in pooled}


def pool_layers(pooled: dict[int, dict[str, tuple[Tensor, Tensor]]]) -> dict[int, dict[str, Tensor]]:
    """Each layer's part of the pooled losses, before coefficients: E * sum of (mean over layers of f) * P / layers. The
    sum over layers is E * mean f * mean P, transformers' load_balancing_loss_func. pooled: by layer and loss."""
    parts: dict[int, dict[str, Tensor]] = {layer: {} for layer in pooled}
    for name in next(iter(pooled.values()), {}):
        fraction_bE = torch.stack([terms[name][0] for terms in pooled.values()]).mean(0)
        for layer, terms in pooled.items():
            parts[layer][name] = fraction_bE.shape[1] * (fraction_bE * terms[name][1]).sum() / len(pooled)
    return parts


def loss_name(config: LossConfig) -> str:
    """Two losses of one kind are told apart by their settings."""
    if not isinstance(config, BalanceLossConfig):
        return config.kind
    first, pooled = config.choices == "first", config.layers == "pooled"
    return f"balance_{config.scope}{'_first' if first else ''}{'_pooled' if pooled else ''}"


@torch.no_grad()
def update_balance_bias(balance_bias_E: Tensor, choices_E: Tensor, rate: float) -> None:
    """b_e += rate * sign(mean load - load_e), in place, once a step. DeepSeek-V3 2024, section 2.1.2.

    choices_E: every choice of the whole step, before drops, summed over micro-steps and data ranks.
    """
    load_E = choices_E.to(torch.float64)
    balance_bias_E += rate * (load_E.mean() - load_E).sign().to(balance_bias_E.dtype)
