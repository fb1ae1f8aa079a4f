"""Capacity: how many choices an expert takes, and which are dropped beyond. RoutingPlan -> RoutingPlan.

`POLICIES` maps each `kind:` to its function. A dropped choice adds nothing; a token whose choices are all
dropped passes by the residual alone.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from expert_parallel.moe.plan import Reason, RoutingPlan
from expert_parallel.settings import Settings


class DroplessConfig(Settings):
    """Every choice reaches its expert (MegaBlocks; Gale et al. 2022)."""

    kind: Literal["dropless"] = "dropless"


class FactorConfig(Settings):
    """Each expert takes at most C = max(minimum, ceil(factor * T * k / E)) of this rank's T tokens' choices
    (GShard, Lepikhin et al. 2020; Switch, Fedus et al. 2021, eq. 3).

    `drop: position` keeps first choices before second choices, and earlier tokens before later ones.
    `drop: probability` keeps the choices with the largest scores, ties by position.
    """

    kind: Literal["factor"]
    train: float = Field(default=1.25, gt=0)
    eval: float = Field(default=2.0, gt=0)
    minimum: int = Field(default=4, ge=0)
    drop: Literal["position", "probability"] = "position"


CapacityConfig = Annotated[DroplessConfig | FactorConfig, Field(discriminator="kind")]


def expert_capacity(factor: float, minimum: int, num_tokens: int, num_choices: int, num_experts: int) -> int:
    """C, in exact decimal arithmetic: in floats 1.1 * 100 is more than 110, and its ceiling 111."""
    return max(minimum, math.ceil(Fraction(str(factor)) * num_tokens * num_choices / num_experts))


def keep_all(config: DroplessConfig, plan: RoutingPlan, training: bool) -> RoutingPlan:
    return plan


def limit_by_factor(config: FactorConfig, plan: RoutingPlan, training: bool) -> RoutingPlan:
    """Marks the choices beyond each expert's capacity DROPPED_CAPACITY."""
    factor = config.train if training else config.eval
    num_tokens, num_choices = plan.expert_ids_TK.shape
    capacity = expert_capacity(factor, config.minimum, num_tokens, num_choices, plan.num_experts)
    scores_TK = plan.scores_TE.detach().gather(1, plan.expert_ids_TK) if config.drop == "probability" else None
    beyond_TK = place_in_expert(plan.expert_ids_TK, plan.num_experts, scores_TK) >= capacity
    return replace(plan, reason_TK=plan.reason_TK.masked_fill(beyond_TK, Reason.DROPPED_CAPACITY))


def place_in_expert(expert_ids_TK: Tensor, num_experts: int, scores_TK: Tensor | None = None) -> Tensor:
    """The place, 0 first, of each choice in the queue of its expert; int64 (T, K).

    Order: by scores_TK, the largest first, where given; equal ones, or all, by choice, then by token. Counted with
    stable sorts: a top-k over a 0/1 mask would keep arbitrary tokens.
    """
    expert_N = expert_ids_TK.T.flatten()  # all first choices, then all second choices
    order_N = torch.arange(len(expert_N), device=expert_N.device)
    if scores_TK is not None:
        order_N = scores_TK.T.flatten().argsort(descending=True, stable=True)
    order_N = order_N[expert_N[order_N].argsort(stable=True)]
    counts_E = torch.bincount(expert_N, minlength=num_experts)
    start_E = counts_E.cumsum(0) - counts_E
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device) - start_E[expert_N[order_N]]
    return place_N.view(expert_ids_TK.T.shape).T


POLICIES: dict[str, Callable[..., RoutingPlan]] = {"dropless": keep_all, "factor": limit_by_factor}
