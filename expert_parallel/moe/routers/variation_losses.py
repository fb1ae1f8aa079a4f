"""Computes the balance losses of Shazeer et al. 2017 and of V-MoE: the squared coefficient of variation of the experts'
importance and of their load.

The squared coefficient of variation of a vector is its variance (over the E experts) divided by the square of its mean:
0 if all experts are equal, E - 1 if one expert has everything.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from expert_parallel.moe.context import TokenBatch
from expert_parallel.moe.types import LogitNoise, RoutingPlan
from expert_parallel.parallel.collectives import all_reduce_sum, group_size
from expert_parallel.settings import Settings


class ImportanceLossConfig(Settings):
    """Adds the squared coefficient of variation of the experts' importance, over a micro-step on all ranks (Shazeer et
    al. 2017, eq. 6-7)."""

    kind: Literal["importance"]
    coefficient: float = Field(default=0.1, gt=0)
    """Multiplies the loss."""
    of: Literal["weights", "probabilities"] = "weights"
    """Takes as an expert's importance the sum of its weights in the tokens that chose it (`weights`, Shazeer et al.
    2017), or the sum of its probabilities without noise in all tokens (`probabilities`, V-MoE, Riquelme et al.
    2021)."""
    scope: ClassVar[Literal["global"]] = "global"  # not a setting: it is computed over all tokens


class LoadLossConfig(Settings):
    """Adds the squared coefficient of variation of the experts' load, over a micro-step on all ranks (Shazeer et al.
    2017, eq. 8-11).

    The load of an expert is the sum over tokens of the probability that it is among the token's k experts if its noise
    is drawn again; it needs `noisy_top_k`. In evaluation, which has no noise, it is the number of tokens that chose it.
    """

    kind: Literal["load"]
    coefficient: float = Field(default=0.1, gt=0)
    """Multiplies the loss."""
    threshold: Literal["others", "all"] = "others"
    """Compares an expert with the k-th largest noisy logit of the other experts (`others`, Shazeer et al. 2017, eq. 8),
    or of all experts (`all`, V-MoE, Riquelme et al. 2021)."""
    scope: ClassVar[Literal["global"]] = "global"  # not a setting: it is computed over all tokens


def importance_loss(config: ImportanceLossConfig, plan: RoutingPlan, batch: TokenBatch, step: Any) -> Tensor:
    """Returns this rank's share of the importance loss, a scalar in router dtype."""
    if config.of == "weights":
        weights_TK = plan.weights_TK.masked_fill(~plan.routed_TK, 0)
        zeros_E = weights_TK.new_zeros(plan.num_experts)
        importance_E = zeros_E.index_add(0, plan.expert_ids_TK.flatten(), weights_TK.flatten())
    else:
        probabilities_TE = plan.probabilities_TE if plan.noise is None else plan.noise.clean_logits_TE.softmax(-1)
        importance_E = _without_padding(probabilities_TE, batch).sum(0)
    return _squared_variation(importance_E, batch)


def load_loss(config: LoadLossConfig, plan: RoutingPlan, batch: TokenBatch, step: Any) -> Tensor:
    """Returns this rank's share of the load loss, a scalar in router dtype."""
    if plan.noise is None:
        choices_TK = plan.routed_TK.to(plan.logits_TE.dtype)
        zeros_E = choices_TK.new_zeros(plan.num_experts)
        # Added with a factor of 0, so that the loss has a gradient (of zeros) here as in training.
        load_E = zeros_E.index_add(0, plan.expert_ids_TK.flatten(), choices_TK.flatten()) + 0 * plan.logits_TE.sum(0)
    else:
        k = plan.expert_ids_TK.shape[1]
        load_E = _without_padding(_probability_among_best(config, plan.logits_TE, plan.noise, k), batch).sum(0)
    return _squared_variation(load_E, batch)


def _probability_among_best(config: LoadLossConfig, logits_TE: Tensor, noise: LogitNoise, k: int) -> Tensor:
    """Returns (T, E): the probability that an expert is among the k best of a token if its own noise is drawn again."""
    best_TK = logits_TE.topk(k + 1, dim=1).values  # one more than k: without itself, a chosen expert competes with it
    threshold_TE = best_TK[:, k - 1, None].expand_as(logits_TE)
    if config.threshold == "others":
        threshold_TE = torch.where(logits_TE >= threshold_TE, best_TK[:, k, None], threshold_TE)
    return torch.special.ndtr((noise.clean_logits_TE - threshold_TE) / noise.std_TE)


def _without_padding(x_TE: Tensor, batch: TokenBatch) -> Tensor:
    return x_TE if batch.real_T is None else x_TE.masked_fill(~batch.real_T[:, None], 0)


def _squared_variation(mine_E: Tensor, batch: TokenBatch) -> Tensor:
    """Returns this rank's share of the squared coefficient of variation of the sum of all ranks' `mine_E`.

    One all-reduce of E numbers. The value is divided evenly among the ranks. The gradient is that of the whole loss
    with respect to this rank's numbers, so that the gradients of all ranks sum to it.
    """
    total_E = all_reduce_sum(mine_E.detach(), batch.group)
    num_experts, sum_, squares = len(total_E), total_E.sum(), total_E.square().sum()
    sum_ = torch.where(sum_ > 0, sum_, 1)  # 0 in a micro-step of padding alone, whose loss is 0
    value = (num_experts * squares / sum_**2 - 1).clamp(min=0)
    gradient_E = 2 * num_experts / sum_**2 * (total_E - squares / sum_)
    # Its value is 0 up to rounding, and is removed: the loss does not change if all numbers grow by the same factor.
    gradient_only = (gradient_E * mine_E).sum()
    return value / group_size(batch.group) + gradient_only - gradient_only.detach()
