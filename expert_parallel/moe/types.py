"""The types that travel through an MoE layer, and the one legend of shape letters.

Shape letters (capitals are logical sizes, never a sharding):

    T  tokens on this rank               D  model width
    K  choices of a token                F  hidden width of an expert
    E  experts in all                    P  ranks of the expert-parallel group
    e  experts on this rank              N  = T * K choices of this rank's tokens
    B  sequences on this rank            S  tokens of a sequence
    U  rows that travel: one for each token and destination rank, or for each choice
    V  rows that arrive on this rank     R  rows that this rank's experts compute: one for each choice, and padding
    L  rows that an exchange starts from G  tokens of a scope, on all its ranks
"""

from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from expert_parallel.parallel.collectives import CommLog, Link, Phase, total_of


class Reason(IntEnum):
    """What became of a choice."""

    KEPT = 0
    REROUTED = 1
    DROPPED_CAPACITY = 2
    DROPPED_RECEIVE_BOUND = 3
    NOT_ROUTED = 4  # never wanted: padding, a pair that expert choice left out, a random second expert not taken


@dataclass(frozen=True)
class RoutingPlan:
    """A router's decision for T tokens: who goes where, with which weight, and what became of it.

    logits_TE, scores_TE: router dtype (float32, or float64 for float64 models). probabilities_TE: the scores of each
    token divided by their sum, for balance losses; softmax scores themselves. weights_TK: the factor of each chosen
    expert's output, same dtype; of a dropped choice it means nothing (see kept_TK). expert_ids_TK: int64. reason_TK:
    uint8, values of `Reason`. log_scores_TE: what weights are computed from again, after drops (see Scores).
    ranking_TE: what a next best expert is found by, largest first (detached; -inf: not to be chosen); needed for
    rerouting alone. all_kept_TK: reason_TK itself, where its router has kept all choices: see is_whole. padded_rows:
    how many rows each expert computes, zeros behind those that arrive; None: as many as arrive.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    probabilities_TE: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor
    reason_TK: Tensor
    num_experts: int
    log_scores_TE: Tensor | None = None
    ranking_TE: Tensor | None = None
    all_kept_TK: Tensor | None = None
    padded_rows: int | None = None

    @property
    def is_whole(self) -> bool:
        """True if nothing can have been dropped. Decided by object identity, so the host does not wait for the device;
        any `replace(reason_TK=...)` resets it to False."""
        return self.all_kept_TK is self.reason_TK

    @property
    def kept_TK(self) -> Tensor:
        """Bool: the choices that reach an expert."""
        return self.reason_TK <= Reason.REROUTED

    @property
    def routed_TK(self) -> Tensor:
        """Bool: the choices that the router made."""
        return self.reason_TK != Reason.NOT_ROUTED


@dataclass(frozen=True)
class DispatchedTokens:
    """All that an expert backend may see: rows that arrived, and the choices among this rank's experts that they serve.

    x_VD: the rows. row_R: int64, the arrived row behind each computed one, grouped by local expert; NO_ROW where
    experts are padded, to capacity or to their neighbours' loads. computed_VK: its inverse: the computed rows of each
    arrived one, in choice order, NO_ROW where there is none. counts_e: int64, computed rows of each local expert, sum =
    R. weights_R: router dtype; what each expert's output is multiplied by.
    """

    x_VD: Tensor
    row_R: Tensor
    computed_VK: Tensor
    counts_e: Tensor
    weights_R: Tensor

    @staticmethod
    def of_rows(x_RD: Tensor, counts_e: Tensor, weights_R: Tensor) -> "DispatchedTokens":
        """Each row serves one choice, and they are grouped by expert already."""
        row_R = torch.arange(len(x_RD), device=x_RD.device)
        return DispatchedTokens(x_RD, row_R, row_R[:, None], counts_e, weights_R)


@dataclass(frozen=True)
class RowCounts:
    """Rows that crossed between ranks in a forward pass, over all hops: sent and received with tokens, returned with
    outputs. `own` stayed on this rank and is not part of the other three."""

    sent: int = 0
    received: int = 0
    returned: int = 0
    own: int = 0

    @staticmethod
    def of(log: CommLog) -> "RowCounts":
        """Reads the forward pass's rows off a log."""
        others: tuple[Link, ...] = ("node", "network")
        return RowCounts(
            sent=total_of(log.rows_sent, others, Phase.DISPATCH, is_backward=False),
            received=total_of(log.rows_received, others, Phase.DISPATCH, is_backward=False),
            returned=total_of(log.rows_received, others, Phase.COMBINE, is_backward=False),
            own=total_of(log.rows_sent, ("own",), Phase.DISPATCH, is_backward=False),
        )


@dataclass(frozen=True)
class ExpertCounts:
    """Counts the choices of each expert, int64 (E): how many it was routed, and what became of them.

    routed_E: as the router chose. kept_E, rerouted_E (under the expert found), dropped_capacity_E,
    dropped_receive_bound_E: by outcome. computed_E: choices that arrived for an expert to compute,
    counted on its rank.
    """

    routed_E: Tensor
    kept_E: Tensor
    rerouted_E: Tensor
    dropped_capacity_E: Tensor
    dropped_receive_bound_E: Tensor
    computed_E: Tensor

    @property
    def dropped_E(self) -> Tensor:
        return self.dropped_capacity_E + self.dropped_receive_bound_E


@dataclass(frozen=True)
class LoadStats(ExpertCounts):
    """Reports what happened in one forward pass of one layer to this rank's tokens. Detached; sum over ranks for
    totals. computed_E: of this rank's experts, by global expert.

    num_tokens, num_unserved: real tokens, and those that no expert computes. entropy: sum over real tokens of the
    entropy of the router's probabilities, nats. rows, log: rows and bytes of the exchange; `log` gains those of the
    backward pass. gathered_bytes: what scopes beyond this rank sent to others. losses: each loss before its
    coefficient; this rank's share, so that the sum over ranks is the loss.
    """

    num_tokens: Tensor
    num_unserved: Tensor
    entropy: Tensor
    rows: RowCounts
    log: CommLog
    gathered_bytes: int = 0
    losses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows_own(self) -> int:
        return self.rows.own


@dataclass(frozen=True)
class MoEOutput:
    """What `MoELayer.forward` returns.

    y: shape and dtype of the input. losses: named scalars, already times their coefficients, this rank's share: add
    them to the training loss, and SUM gradients over ranks. stats: see LoadStats. pooled: f and P of the losses that
    are pooled over layers; for this layer alone they are in `losses` (see losses.pool_layers).
    """

    y: Tensor
    losses: dict[str, Tensor]
    stats: LoadStats
    pooled: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
