"""Computes the losses that balance the load of the experts, and the bias update that balances it without a loss.

Each loss is a function of a RoutingPlan and returns this rank's SHARE: the shares of all ranks sum to the loss of the
whole micro-step, and so do their gradients. `LOSSES` maps each `kind:` to its function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from expert_parallel.moe.context import TokenBatch
from expert_parallel.moe.dispatch.permute import count_keys
from expert_parallel.moe.routers.variation_losses import (
    ImportanceLossConfig,
    LoadLossConfig,
    importance_loss,
    load_loss,
)
from expert_parallel.moe.types import RoutingPlan
from expert_parallel.parallel.collectives import all_reduce_sum, group_rank, group_size
from expert_parallel.settings import Settings


class BalanceLossConfig(Settings):
    """Adds the load-balancing loss E * sum over experts of f_e * P_e, which is 1 when balanced (Fedus et al. 2021, eq.
    4-6).

    f_e is the share of the choices that fall on expert e, P_e the mean probability of e. `scope: global` equals one
    rank that sees all tokens as one batch. With `data.documents: separate`, `scope: sequence` averages over documents.
    """

    kind: Literal["balance"]
    coefficient: float = Field(default=0.01, gt=0)
    """Multiplies the loss; transformers' Mixtral does not divide by k, so its coefficient is this one / k."""
    scope: Literal["global", "rank", "sequence"] = "global"
    """Averages f and P over the tokens of a micro-step on all ranks (`global`), on each `rank`, or in each `sequence`
    (DeepSeek-V3, eq. 17-20), and then the losses of ranks or sequences."""
    choices: Literal["all", "first"] = "all"
    """Counts all k choices of a token in f (transformers' Mixtral), or the first alone (GShard, DeepSpeed's top-2)."""
    layers: Literal["each", "pooled"] = "each"
    """Computes the loss of each MoE layer by itself, or once from f and P averaged over all MoE layers (transformers'
    load_balancing_loss_func)."""


class ZLossConfig(Settings):
    """Adds the router z-loss, the mean of (log sum exp logits)^2 over the tokens of a micro-step on all ranks (Zoph et
    al. 2022, eq. 5)."""

    kind: Literal["z_loss"]
    coefficient: float = Field(default=0.001, gt=0)
    """Multiplies the loss."""
    scope: ClassVar[Literal["global"]] = "global"  # not a setting: it is a mean over all tokens


LossConfig = Annotated[
    BalanceLossConfig | ZLossConfig | ImportanceLossConfig | LoadLossConfig, Field(discriminator="kind")
]


@dataclass(frozen=True)
class MicroStepCounts:
    """Holds the counts of one micro-step that losses use. They stay on the device, so the host does not wait.

    counts: for each scope, int64 (blocks, 2 E + 1), a block being the tokens over which one loss is computed: the
    number of choices of each expert, the number of first choices of each expert, and the number of tokens, without
    padding. `global` has one block, `rank` one for this rank, `sequence` one for each sequence of which this rank has
    tokens, counted over all ranks that share it. num_blocks: for each scope, the number of blocks of all ranks
    together.
    """

    counts: dict[str, Tensor]
    num_blocks: dict[str, Tensor | int]


def count_documents(plan: RoutingPlan, batch: TokenBatch) -> Tensor:
    """Returns the numbers of choices and first choices of each expert, and of tokens, in this rank's part of each
    sequence, or of each document of packed sequences: int64 (sequences or documents, 2 E + 1)."""
    num_rows = batch.num_sequences
    num_experts = plan.num_experts
    document_T = batch.sequence_T
    if batch.document_T is not None:
        num_rows, document_T = batch.num_documents, batch.document_T

    def count(num_choices: int | None) -> Tensor:
        key_TK = document_T[:, None] * num_experts + plan.expert_ids_TK
        key_TK = key_TK.masked_fill(~plan.routed_TK, num_rows * num_experts)[:, :num_choices]
        counts = count_keys(key_TK.flatten(), num_rows * num_experts + 1)
        return counts[: num_rows * num_experts].view(num_rows, num_experts)

    real_T = torch.ones_like(document_T) if batch.real_T is None else batch.real_T.long()
    tokens_b = torch.zeros(num_rows, dtype=torch.int64, device=real_T.device).index_add(0, document_T, real_T)
    return torch.cat([count(None), count(1), tokens_b[:, None]], dim=1)


def count_micro_step(configs: list[LossConfig], plan: RoutingPlan, batch: TokenBatch) -> MicroStepCounts:
    """Counts choices and tokens of each scope, by one all-reduce of 2 E + 2 numbers over the ranks of the micro-step.

    If sequences are divided over ranks and a loss has scope `sequence`, another all-reduce comes before it: 2 E + 1
    numbers for each sequence, over the ranks that share it. Every rank calls this, also one without tokens.
    """
    mine = count_documents(plan, batch)
    is_divided = group_size(batch.sequence_group) > 1
    needs_sequences = any(isinstance(config, BalanceLossConfig) and config.scope == "sequence" for config in configs)
    whole = all_reduce_sum(mine, batch.sequence_group) if is_divided and needs_sequences else mine
    num_sequences = (whole[:, -1] > 0).sum()  # sequences of padding alone are not counted
    if group_rank(batch.sequence_group) > 0:  # a sequence that is divided over ranks is counted by the first of them
        num_sequences = num_sequences * 0
    of_rank = mine.sum(0)
    total = all_reduce_sum(torch.cat([of_rank, num_sequences[None]]), batch.group)
    return MicroStepCounts(
        counts={"global": total[None, :-1], "rank": of_rank[None], "sequence": whole},
        num_blocks={"global": 1, "rank": group_size(batch.group), "sequence": total[-1].clamp(min=1)},
    )


def fractions_and_probabilities(
    config: BalanceLossConfig, plan: RoutingPlan, batch: TokenBatch, step: MicroStepCounts
) -> tuple[Tensor, Tensor]:
    """Returns f and P of the balance loss for each block of tokens, (blocks, E) each; the sum of E * f * P over
    experts, blocks and ranks is the loss.

    f: the share of the block's choices that fall on each expert, over all ranks of the block; it has no gradient. P:
    this rank's part of the mean probability of each expert, divided by the number of blocks, so that the gradients of
    the ranks sum to that of the loss.
    """
    num_experts, num_choices = plan.num_experts, plan.expert_ids_TK.shape[1]
    choices_bE, first_bE, tokens_b1 = step.counts[config.scope].split([num_experts, num_experts, 1], dim=1)
    counted_bE, num_counted = (first_bE, 1) if config.choices == "first" else (choices_bE, num_choices)
    probabilities_TE = plan.probabilities_TE
    if batch.real_T is not None:
        probabilities_TE = probabilities_TE * batch.real_T[:, None]
    if config.scope == "sequence" and batch.document_T is not None:
        zeros_bE = probabilities_TE.new_zeros(batch.num_documents, num_experts)
        sum_bE = zeros_bE.index_add(0, batch.document_T, probabilities_TE)
    else:
        num_rows = batch.num_sequences if config.scope == "sequence" else 1
        sum_bE = probabilities_TE.view(num_rows, len(probabilities_TE) // max(num_rows, 1), num_experts).sum(1)
    tokens_b1 = tokens_b1.clamp(min=1).to(sum_bE.dtype)
    return counted_bE / (tokens_b1 * num_counted), sum_bE / tokens_b1 / step.num_blocks[config.scope]


def balance_loss(config: BalanceLossConfig, plan: RoutingPlan, batch: TokenBatch, step: MicroStepCounts) -> Tensor:
    """Returns this rank's share of the balance loss, a scalar in router dtype."""
    fraction_bE, probability_bE = fractions_and_probabilities(config, plan, batch, step)
    return plan.num_experts * (fraction_bE * probability_bE).sum()


def z_loss(config: ZLossConfig, plan: RoutingPlan, batch: TokenBatch, step: MicroStepCounts) -> Tensor:
    """Returns this rank's share of the router z-loss, a scalar in router dtype."""
    squares_T = plan.logits_TE.logsumexp(-1).square()
    if batch.real_T is not None:
        squares_T = squares_T * batch.real_T
    return squares_T.sum() / step.counts["global"][0, -1].clamp(min=1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "balance": balance_loss,
    "z_loss": z_loss,
    "importance": importance_loss,
    "load": load_loss,
}


def router_losses(
    configs: list[LossConfig], plan: RoutingPlan, batch: TokenBatch
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Returns two dicts by name of the loss: this rank's share of each loss, before its coefficient; and (f, P) of each
    loss that is pooled over layers (see `fractions_and_probabilities`)."""
    if not configs:
        return {}, {}
    step = count_micro_step(configs, plan, batch)
    losses = {loss_name(config): LOSSES[config.kind](config, plan, batch, step) for config in configs}
    pooled = [config for config in configs if isinstance(config, BalanceLossConfig) and config.layers == "pooled"]
    return losses, {loss_name(config): fractions_and_probabilities(config, plan, batch, step) for config in pooled}


def pool_layers(pooled: dict[int, dict[str, tuple[Tensor, Tensor]]]) -> dict[int, dict[str, Tensor]]:
    """Returns the part that each layer contributes to the pooled losses, before coefficients, by layer and name of the
    loss.

    pooled: (f, P), by layer and name of the loss. The parts of all layers sum to E * sum over experts of (mean f) *
    (mean P), which is load_balancing_loss_func of transformers.
    """
    parts: dict[int, dict[str, Tensor]] = {layer: {} for layer in pooled}
    for name in next(iter(pooled.values()), {}):
        fraction_bE = torch.stack([terms[name][0] for terms in pooled.values()]).sum(0)
        for layer, terms in pooled.items():
            parts[layer][name] = pooled_part(fraction_bE, terms[name][1], len(pooled))
    return parts


def pooled_part(fraction_bE: Tensor, probability_bE: Tensor, num_layers: int) -> Tensor:
    """Computes E * sum over blocks and experts of (f / layers) * (P / layers).

    fraction_bE: f, summed over all layers. probability_bE: P of one layer, for its part of the loss, or P summed over
    all layers, for the whole loss.
    """
    return fraction_bE.shape[1] * (fraction_bE / num_layers * probability_bE).sum() / num_layers


def loss_name(config: LossConfig) -> str:
    """Returns the name of a loss in metrics; losses of one kind differ in their settings, which the name contains."""
    if not isinstance(config, BalanceLossConfig):
        return config.kind
    first, pooled = config.choices == "first", config.layers == "pooled"
    return f"balance_{config.scope}{'_first' if first else ''}{'_pooled' if pooled else ''}"


@torch.no_grad()
def update_balance_bias(balance_bias_E: Tensor, choices_E: Tensor, rate: float) -> None:
    """Adds rate * sign(mean load - load_e) to the balance bias of each expert, in place. Call it once a step.

    choices_E: the choices of each expert in the whole step, before drops, summed over micro-steps and data ranks.
    Source: DeepSeek-V3 2024, section 2.1.2.
    """
    # float64: exact for counts below 2^53, so that equal loads leave the bias as it is.
    load_E = choices_E.to(torch.float64)
    balance_bias_E += rate * (load_E.mean() - load_E).sign().to(balance_bias_E.dtype)
