"""Defines the types that the steps of an MoE layer pass to each other, and the legend of shape letters.

A name such as `x_TD` ends with its shape, one letter for each dimension. Capitals are logical sizes, never shards:

    T  tokens on this rank                  D  model width
    K  choices of a token                   F  hidden width of an expert
    E  experts in total                     P  ranks of the group that exchanges rows
    e  experts on this rank                 B  sequences on this rank
    N  T * K, the choices of all tokens     S  positions of a sequence
    U  rows that this rank sends, one for each token and destination rank, or one for each choice
    V  rows that this rank receives         R  rows that this rank's experts compute: one for each choice, and padding
    L  rows that enter an exchange          G  tokens of a scope, over all its ranks
    C  chunks of a pass                     W  words of a message to one rank
    b  blocks of a scope, decided apart     Q  queues: one for each block and expert
    M  choices that overflow, or the rows of a result in permute.py
    1  after a letter: one entry more (E1, N1), or a dimension of size 1 (T1, R1)

Local letters: in experts/, weights are (e, K, N) and `F2` is F, or 2 F for gated activations; in the files that compare
ranks, the first of two rank dimensions `SP` is the source.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from expert_parallel.parallel.collectives import CommLog, LinkClass, Phase, sum_traffic


class Outcome(IntEnum):
    """Lists what can happen to a choice."""

    KEPT = 0
    REROUTED = 1
    DROPPED_CAPACITY = 2
    DROPPED_RECEIVE_BOUND = 3
    NOT_ROUTED = 4  # padding, a pair that expert choice did not take, or a random second expert that was not drawn


@dataclass(frozen=True)
class RoutingPlan:
    """Holds a router's decision for T tokens: the experts of each token, their weights, and the outcome of each choice.

    logits_TE, scores_TE: in router dtype (float32, or float64 for float64 models). probabilities_TE: the scores of each
    token divided by their sum, for balance losses; equal to the scores for softmax. expert_ids_TK: int64. weights_TK:
    the factor of each chosen expert's output, in router dtype; undefined for dropped choices (see kept_TK).
    `outcome_TK`: uint8, values of `Outcome`. num_experts: E. log_scores_TE: the scores from which weights are
    recomputed after drops (see Scores). ranking_TE: detached, the scores by which rerouting finds the next best expert;
    -inf excludes an expert. all_kept_TK: the object `outcome_TK` itself if the router kept all choices (see
    `is_dropless`). `rows_per_expert`: the number of rows that each expert computes, padded with zeros; None: no
    padding.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    probabilities_TE: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor
    outcome_TK: Tensor
    num_experts: int
    log_scores_TE: Tensor | None = None
    ranking_TE: Tensor | None = None
    all_kept_TK: Tensor | None = None
    rows_per_expert: int | None = None

    @property
    def is_dropless(self) -> bool:
        """Returns True if nothing can have been dropped. Decided by object identity, so the host does not wait for the
        device; any `replace(outcome_TK=...)` resets it to False."""
        return self.all_kept_TK is self.outcome_TK

    @property
    def kept_TK(self) -> Tensor:
        """Returns a bool mask of the choices that reach an expert."""
        return self.outcome_TK <= Outcome.REROUTED

    @property
    def routed_TK(self) -> Tensor:
        """Returns a bool mask of the choices that the router made."""
        return self.outcome_TK != Outcome.NOT_ROUTED


@dataclass(frozen=True)
class DispatchedTokens:
    """Holds all that an expert backend may see: the rows that this rank received, and which local experts compute them.

    x_VD: the received rows. row_R: int64, the index in x_VD of the input of each computed row, grouped by local expert;
    NO_ROW for padding. computed_VK: int64, its inverse: the computed rows of each received row, in choice order; NO_ROW
    fills the rest. counts_e: int64, computed rows of each local expert; they sum to R. weights_R: router dtype, the
    factor of each expert's output.
    """

    x_VD: Tensor
    row_R: Tensor
    computed_VK: Tensor
    counts_e: Tensor
    weights_R: Tensor

    @staticmethod
    def from_grouped_rows(x_RD: Tensor, counts_e: Tensor, weights_R: Tensor) -> "DispatchedTokens":
        """Builds it from rows that are grouped by expert and serve one choice each."""
        row_R = torch.arange(len(x_RD), device=x_RD.device)
        return DispatchedTokens(x_RD, row_R, row_R[:, None], counts_e, weights_R)


@dataclass(frozen=True)
class RowCounts:
    """Counts rows that crossed between ranks in a forward pass, summed over all hops.

    sent, received: with tokens. returned: with expert outputs. own: rows that stayed on this rank; not part of the
    other three.
    """

    sent: int = 0
    received: int = 0
    returned: int = 0
    own: int = 0

    @staticmethod
    def of(log: CommLog) -> "RowCounts":
        """Reads the rows of the forward pass from a log."""
        others: tuple[LinkClass, ...] = ("node", "network")  # all link classes except "own"
        return RowCounts(
            sent=sum_traffic(log.rows_sent, others, Phase.DISPATCH, is_backward=False),
            received=sum_traffic(log.rows_received, others, Phase.DISPATCH, is_backward=False),
            returned=sum_traffic(log.rows_received, others, Phase.COMBINE, is_backward=False),
            own=sum_traffic(log.rows_sent, ("own",), Phase.DISPATCH, is_backward=False),
        )


@dataclass(frozen=True)
class ExpertCounts:
    """Counts the choices of each expert by outcome, int64 (E).

    routed_E: as the router chose. kept_E, rerouted_E (under the expert that the choice was rerouted to),
    dropped_capacity_E, dropped_receive_bound_E: by outcome. computed_E: choices that an expert computed, counted on the
    rank that holds it.
    """

    routed_E: Tensor
    kept_E: Tensor
    rerouted_E: Tensor
    dropped_capacity_E: Tensor
    dropped_receive_bound_E: Tensor
    computed_E: Tensor

    @property
    def dropped_E(self) -> Tensor:
        """Returns the dropped choices of each expert, int64 (E)."""
        return self.dropped_capacity_E + self.dropped_receive_bound_E


@dataclass(frozen=True)
class LoadStats(ExpertCounts):
    """Reports what happened to this rank's tokens in one forward pass of one layer. Detached; sum over ranks for
    totals.

    computed_E covers this rank's experts alone, indexed by global expert. num_tokens, `num_tokens_without_expert`: real
    tokens, and those that no expert computes. entropy: the sum over real tokens of the entropy of the router's
    probabilities, in nats. rows, log: rows and bytes of the exchange; the backward pass adds its own to `log`.
    gathered_bytes: bytes that scopes wider than this rank sent to others. losses: each loss before its coefficient;
    this rank's share, so that the sum over ranks is the loss.
    """

    num_tokens: Tensor
    num_tokens_without_expert: Tensor
    entropy: Tensor
    rows: RowCounts
    log: CommLog
    gathered_bytes: int = 0
    losses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows_own(self) -> int:
        """Returns the rows that stayed on this rank."""
        return self.rows.own


@dataclass(frozen=True)
class MoEOutput:
    """Holds what `MoELayer.forward` returns.

    y: shape and dtype of the input. losses: named scalars, already multiplied by their coefficients, this rank's share:
    add them to the training loss, and SUM gradients over ranks. stats: see LoadStats. pooled: f and P of the losses
    that are pooled over layers; `losses` has the values that pool this layer alone (see losses.pool_layers).
    """

    y: Tensor
    losses: dict[str, Tensor]
    stats: LoadStats
    pooled: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
