"""The types that travel through an MoE layer, and the one legend of shape letters.

Shape letters (capitals are logical sizes, never a sharding):

    T  tokens on this rank               D  model width
    K  choices of a token                F  hidden width of an expert
    E  experts in all                    P  ranks of the expert-parallel group
    e  experts on this rank              N  = T * K choices of this rank's tokens
    B  sequences on this rank            S  tokens of a sequence
    U  rows that travel: one for each token and destination rank
    V  rows that arrive on this rank     R  rows that this rank's experts compute (one for each choice)
"""

from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor


class Reason(IntEnum):
    """What became of a choice."""

    KEPT = 0
    REROUTED = 1
    DROPPED_CAPACITY = 2
    DROPPED_RECEIVE_BOUND = 3


@dataclass(frozen=True)
class StepContext:
    """Where in the training run a forward pass stands: the key of all randomness, so that none is stored.

    `sequence_index_B` (int64) is each sequence's index in the global batch of the micro-step; None counts this
    rank's own sequences from 0. `coordinate` tells data ranks apart for dropout.
    """

    seed: int = 0
    step: int = 0
    micro_step: int = 0
    layer: int = 0
    coordinate: int = 0
    sequence_index_B: Tensor | None = None


@dataclass(frozen=True)
class RoutingPlan:
    """A router's decision for T tokens: who goes where, with which weight, and what became of it.

    logits_TE, scores_TE: router dtype (float32, or float64 for float64 models). probabilities_TE: the scores of each
    token divided by their sum, for balance losses; softmax scores themselves. weights_TK: the factor of each chosen
    expert's output, same dtype. expert_ids_TK: int64. reason_TK: uint8, values of `Reason`.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    probabilities_TE: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor
    reason_TK: Tensor
    num_experts: int

    @property
    def kept_TK(self) -> Tensor:
        """Bool: the choices that reach an expert."""
        return self.reason_TK <= Reason.REROUTED


@dataclass(frozen=True)
class DispatchedTokens:
    """All that an expert backend may see.

    x_RD: rows sorted by local expert. counts_e: int64, rows of each local expert, sum = R.
    weights_R: router dtype; the experts multiply their outputs by it.
    """

    x_RD: Tensor
    counts_e: Tensor
    weights_R: Tensor


@dataclass(frozen=True)
class RowCounts:
    """Rows that crossed between ranks: one for each token and destination rank. `own` stayed on this rank and
    is not part of the other three."""

    sent: int = 0
    received: int = 0
    returned: int = 0
    own: int = 0


@dataclass(frozen=True)
class LoadStats:
    """What happened in one forward pass of one layer to this rank's tokens. Detached; sum over ranks for totals.

    routed_E, kept_E, rerouted_E, dropped_capacity_E, dropped_receive_bound_E: int64 choices per expert.
    losses: each loss before its coefficient; this rank's share, so that the sum over ranks is the loss.
    """

    routed_E: Tensor
    kept_E: Tensor
    rerouted_E: Tensor
    dropped_capacity_E: Tensor
    dropped_receive_bound_E: Tensor
    rows: RowCounts
    losses: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MoEOutput:
    """What `MoELayer.forward` returns.

    y: shape and dtype of the input. losses: named scalars, already times their coefficients, this rank's share:
    add them to the training loss, and SUM gradients over ranks. stats: see LoadStats.
    """

    y: Tensor
    losses: dict[str, Tensor]
    stats: LoadStats


def count_choices(plan: RoutingPlan, rows: RowCounts, losses: dict[str, Tensor]) -> LoadStats:
    """The ledger of one layer: each choice of `plan` counted once, under its expert and its reason."""
    num_experts = plan.num_experts
    key = plan.reason_TK.long() * num_experts + plan.expert_ids_TK
    counts = torch.bincount(key.flatten(), minlength=len(Reason) * num_experts).view(len(Reason), num_experts)
    return LoadStats(
        routed_E=counts.sum(0),
        kept_E=counts[Reason.KEPT],
        rerouted_E=counts[Reason.REROUTED],
        dropped_capacity_E=counts[Reason.DROPPED_CAPACITY],
        dropped_receive_bound_E=counts[Reason.DROPPED_RECEIVE_BOUND],
        rows=rows,
        losses={name: value.detach() for name, value in losses.items()},
    )
