"""Limits the choices of each expert to its capacity, and drops or reroutes those that overflow.

A policy is a function from a RoutingPlan to a RoutingPlan; `POLICIES` maps each `kind:` to its own. A dropped choice
adds nothing to its token's output, so the routed experts add nothing to a token whose choices are all dropped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from expert_parallel.moe.capacity.reroute import reroute
from expert_parallel.moe.capacity.token_scope import Scope, ScopedTokens, gather_scope
from expert_parallel.moe.context import TokenBatch, pass_seed
from expert_parallel.moe.dispatch.permute import count_keys, positions_in_queues
from expert_parallel.moe.types import Outcome, RoutingPlan
from expert_parallel.nn import random
from expert_parallel.nn.random import Stream
from expert_parallel.settings import Settings

MAX_FACTOR = 1e6  # beyond the number of experts nothing is dropped; a capacity must fit into an int64


class DroplessConfig(Settings):
    """Sends every choice to its expert, without a capacity (MegaBlocks, Gale et al. 2022)."""

    kind: Literal["dropless"] = "dropless"
    receive_bound: float | None = Field(
        default=None, ge=1, le=MAX_FACTOR, validation_alias=AliasChoices("receive_bound", "max_received_factor")
    )
    """Drops choices beyond ceil(receive_bound * choices of the expert-parallel group / its ranks) on a rank, which
    bounds its memory; null drops nothing."""
    # Not settings of this kind: without a capacity, no tokens share one and no rows are padded to it.
    scope: ClassVar[None] = None
    pad: ClassVar[bool] = False


class CapacitySettings(Settings):
    """Is the base class of limits on the choices of an expert: they form a queue, and overflow beyond its capacity."""

    scope: Scope = "rank"
    """Sets the tokens that share one capacity: this `rank`'s (most systems), each `sequence`'s (transformers' Switch),
    or those of all ranks (`global`: every layout drops the same tokens)."""
    priority: Literal["position", "probability", "batch_priority", "random"] = "position"
    """Orders an expert's queue by token position, by the choice's score (`probability`, Megatron-Core's probs), by the
    token's largest score (`batch_priority`, V-MoE, Riquelme et al. 2021), or at random in training (DeepSpeed's random
    token selection); ties go by position."""
    first_choices_first: bool = True
    """Queues all first choices before all second ones (GShard, Switch, V-MoE), or token by token (DeepSpeed's top-k);
    with `priority: probability` it only breaks ties."""
    overflow: Literal["drop", "reroute"] = "drop"
    """Drops choices beyond capacity, or sends them to the token's next best expert that has room (`reroute`)."""
    renormalise: bool = Field(default=False, validation_alias=AliasChoices("renormalise", "renormalize"))
    """Scales the weights of a token's kept choices to sum to 1 again (DeepSpeed's top-2), or leaves them
    (Megatron-Core)."""
    pad: bool = False
    """Pads each expert's rows with zeros to its capacity, for static shapes."""
    receive_bound: ClassVar[None] = None  # not a setting of these kinds


class FactorConfig(CapacitySettings):
    """Limits each expert to max(minimum, ceil(factor * T * k / E)) choices of a scope's T tokens (GShard, Lepikhin et
    al. 2020; Switch, Fedus et al. 2021, eq. 3)."""

    kind: Literal["factor"]
    train: float = Field(default=1.25, gt=0, le=MAX_FACTOR)
    """Sets the capacity factor in training."""
    eval: float = Field(default=2.0, gt=0, le=MAX_FACTOR)
    """Sets the capacity factor in evaluation."""
    minimum: int = Field(default=4, ge=0)
    """Sets the smallest capacity of an expert, in choices of a scope."""


class AbsoluteConfig(CapacitySettings):
    """Limits each expert to a fixed number of choices of a scope's tokens."""

    kind: Literal["absolute"]
    train: int = Field(ge=1)
    """Sets the capacity in training, in choices of a scope."""
    eval: int = Field(ge=1)
    """Sets the capacity in evaluation, in choices of a scope."""


CapacityConfig = Annotated[DroplessConfig | FactorConfig | AbsoluteConfig, Field(discriminator="kind")]


def expert_capacity(factor: float, minimum: int, num_tokens: int, num_choices: int, num_experts: int) -> int:
    """Returns the capacity of an expert, max(minimum, ceil(factor * T * k / E)), in choices.

    Computed in exact decimal arithmetic: in floats, 1.1 * 100 is more than 110 and its ceiling is 111.
    """
    return max(minimum, math.ceil(Fraction(str(factor)) * num_tokens * num_choices / num_experts))


def block_capacities(
    config: FactorConfig | AbsoluteConfig, sizes: Sequence[int], num_choices: int, num_experts: int, training: bool
) -> list[int]:
    """Returns the capacity of an expert, in choices, for each block of tokens that is decided on by itself. sizes: the
    number of real tokens of each block."""
    if isinstance(config, AbsoluteConfig):
        return [config.train if training else config.eval] * len(sizes)
    factor = config.train if training else config.eval
    return [expert_capacity(factor, config.minimum, size, num_choices, num_experts) for size in sizes]


def keep_all(
    config: DroplessConfig, plan: RoutingPlan, batch: TokenBatch, training: bool
) -> tuple[RoutingPlan, int | None]:
    """Returns the plan unchanged, and None: there is no limit per expert."""
    return plan, None


def apply_capacity(
    config: FactorConfig | AbsoluteConfig, plan: RoutingPlan, batch: TokenBatch, training: bool
) -> tuple[RoutingPlan, int | None]:
    """Marks choices beyond capacity DROPPED_CAPACITY, or REROUTED to another expert. Leaves weights unchanged.

    Also returns the largest number of choices that an expert can get from these tokens, to which `capacity.pad` pads
    its rows: the sum of its capacities in all blocks. Choices of all ranks of the scope queue together, so every rank
    of it calls this.
    """
    columns = [plan.expert_ids_TK.to(torch.int32), plan.outcome_TK]  # int32: half the bytes, if ranks exchange them
    needs_scores = config.priority in ("probability", "batch_priority")
    columns += [plan.scores_TE.gather(1, plan.expert_ids_TK)] if needs_scores else []
    columns += [_ranking(plan)] if config.overflow == "reroute" else []
    view, (ids_GK, outcome_GK, *more) = gather_scope(config.scope, batch, *columns)
    ids_GK, ranking_GE = ids_GK.long(), more[-1] if config.overflow == "reroute" else None
    scores_GK = more[0] if needs_scores else None
    capacities = block_capacities(config, view.sizes, ids_GK.shape[1], plan.num_experts, training)

    routed_GK = outcome_GK != Outcome.NOT_ROUTED
    order_N = queue_order(config, view, scores_GK, routed_GK, batch, training)
    queue_GK = view.block_G[:, None] * plan.num_experts + ids_GK
    num_queues = view.num_blocks * plan.num_experts
    queue_GK = queue_GK.masked_fill(~routed_GK, num_queues)  # an additional queue, of capacity 0
    place_GK = positions_in_queues(queue_GK.flatten(), num_queues + 1, order_N).view_as(queue_GK)
    capacity_Q = queue_capacities(capacities, plan.num_experts, ids_GK.device)
    overflows_GK = routed_GK & (place_GK >= capacity_Q[queue_GK])
    outcome_GK = outcome_GK.masked_fill(overflows_GK, Outcome.DROPPED_CAPACITY)

    if ranking_GE is not None:
        taken_Q = count_keys(queue_GK.masked_fill(overflows_GK, num_queues).flatten(), num_queues + 1)
        room_Q = (capacity_Q - taken_Q)[:num_queues]
        ids_GK, rerouted_GK = reroute(ids_GK, routed_GK, overflows_GK, ranking_GE, view.block_G, room_Q, order_N)
        outcome_GK = outcome_GK.masked_fill(rerouted_GK, Outcome.REROUTED)
    limited = replace(plan, expert_ids_TK=ids_GK[view.local_T], outcome_TK=outcome_GK[view.local_T])
    return limited, sum(capacities)


def queue_capacities(capacities: list[int], num_experts: int, device: torch.device) -> Tensor:
    """Returns the capacity of each queue, int64 (blocks * E + 1): one queue for each block and expert, and a last one
    of capacity 0. Equal capacities are filled in on the device, without a copy from the host."""
    if len(set(capacities)) == 1:
        capacity_Q = torch.full((len(capacities) * num_experts + 1,), capacities[0], device=device)
    else:
        capacity_b = torch.tensor([*capacities, 0], dtype=torch.int64, device=device)
        capacity_Q = capacity_b.repeat_interleave(num_experts)[: len(capacities) * num_experts + 1]
    capacity_Q[-1:].zero_()
    return capacity_Q


def _ranking(plan: RoutingPlan) -> Tensor:
    assert plan.ranking_TE is not None, "the config refuses rerouting for a router without ranking"
    return plan.ranking_TE


def queue_order(
    config: CapacitySettings,
    view: ScopedTokens,
    scores_GK: Tensor | None,
    routed_GK: Tensor,
    batch: TokenBatch,
    training: bool,
) -> Tensor:
    """Returns all choices of the scope in queue order, as flat indices g * K + k; int64 (G * K).

    scores_GK: the scores of the choices, needed by the priorities `batch_priority` and `probability`. Every sort is
    stable, so ties are in order of position.
    """
    num_tokens, num_choices = routed_GK.shape
    token_G = torch.arange(num_tokens, device=routed_GK.device)
    if config.priority == "random" and training:
        seed = pass_seed(batch.context, Stream.PRIORITY)
        token_G = random.uniform(seed, view.index_G, 1)[:, 0].argsort(stable=True)
    if config.priority == "batch_priority":
        assert scores_GK is not None
        token_G = scores_GK.amax(1).argsort(descending=True, stable=True)
    order_GK = token_G[:, None] * num_choices + torch.arange(num_choices, device=token_G.device)
    order_N = (order_GK.T if config.first_choices_first else order_GK).flatten()
    if config.priority == "probability":
        assert scores_GK is not None
        order_N = order_N[scores_GK.flatten()[order_N].argsort(descending=True, stable=True)]
    return order_N


POLICIES: dict[str, Callable[..., tuple[RoutingPlan, int | None]]] = {
    "dropless": keep_all,
    "factor": apply_capacity,
    "absolute": apply_capacity,
}
