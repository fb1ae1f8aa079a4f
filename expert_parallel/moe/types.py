"""Defines the types that the steps of an MoE layer pass to each other, and the legend of shape letters.

A choice is one pair of a token and an expert chosen for it. A name such as `x_TD` ends with its shape, one letter for
each dimension. Capitals are logical sizes, never shards:

    T  tokens on this rank                  D  model width
    K  experts chosen for a token           F  hidden width of an expert
    E  experts in total                     P  ranks of the group that exchanges rows
    e  experts on this rank                 B  sequences on this rank
    N  T * K, the choices of all tokens     S  positions of a sequence
    U  rows that this rank sends, one for each token and destination rank, or one for each choice
    V  rows that this rank receives         R  rows that this rank's experts compute: one for each choice, and padding
    L  rows that enter an exchange          G  tokens of a scope, over all its ranks
    C  chunks that a pass's tokens form     W  words of a message to one rank
    b  blocks: parts of a scope that are decided on separately, each with its own capacity
    Q  queues of choices: one for each block and expert
    M  choices that overflow, or the rows of a result in permute.py
    1  after a letter: one entry more (E1, N1), or a dimension of size 1 (T1, R1)

Local letters: in experts/, weights are (e, K, N) and `F2` is F, or 2 F for gated activations; in the files that compare
ranks, the first of two rank dimensions `SP` is the source.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from expert_parallel.moe.dispatch.checksums import Checksums
from expert_parallel.parallel.collectives import CommLog, LinkClass, Phase, sum_traffic


class Outcome(IntEnum):
    """Lists what can happen to a choice, one pair of a token and an expert chosen for it."""

    KEPT = 0
    REROUTED = 1
    DROPPED_CAPACITY = 2
    DROPPED_RECEIVE_BOUND = 3
    NOT_ROUTED = 4  # padding, a pair that expert choice did not take, or a random second expert that was not drawn


@dataclass(frozen=True)
class LogitNoise:
    """Holds how a router's logits were drawn: logits_TE = clean_logits_TE + std_TE * a standard normal number.

    clean_logits_TE: (T, E) in router dtype. std_TE: the standard deviation, (T, E), or (1, 1) if all are equal.
    """

    clean_logits_TE: Tensor
    std_TE: Tensor


@dataclass(frozen=True)
class RoutingPlan:
    """Holds a router's decision for T tokens: the experts of each token, their weights, and the outcome of each choice.

    logits_TE, scores_TE: in router dtype (float32, or float64 for float64 models). probabilities_TE: the scores of each
    token divided by their sum, for balance losses; equal to the scores for softmax. expert_ids_TK: int64. weights_TK:
    the factor of each chosen expert's output, in router dtype; undefined for dropped choices (see kept_TK).
    `outcome_TK`: uint8, values of `Outcome`. num_experts: E. log_scores_TE: the scores from which weights are
    recomputed after drops (see Scores). ranking_TE: detached, the scores by which rerouting finds the next best expert;
    -inf excludes an expert. all_kept_TK: the object `outcome_TK` itself if the router kept all choices (see
    `is_dropless`). `rows_per_expert`: the number of rows to which the rows of each expert are padded with zeros; None:
    no padding. noise: how the logits were drawn; None if they have no normal noise. lots_TK: uniform random numbers
    that the weights depend on; None if they depend on none.
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
    noise: LogitNoise | None = None
    lots_TK: Tensor | None = None

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
    """Holds the input of this rank's experts: the rows that this rank received, and which local experts compute them.

    x_VD: the received rows. row_R: int64, for each row that an expert computes, the index in x_VD of its input; grouped
    by local expert; NO_ROW for padding. computed_VK: int64, the inverse: for each received row, the indices of the
    computed rows that use it, in choice order; NO_ROW fills the rest. counts_e: int64, the number of rows that each
    local expert computes; they sum to R. weights_R: router dtype, the factor of the expert's output in each computed
    row.
    """

    x_VD: Tensor
    row_R: Tensor
    computed_VK: Tensor
    counts_e: Tensor
    weights_R: Tensor

    @staticmethod
    def from_grouped_rows(x_RD: Tensor, counts_e: Tensor, weights_R: Tensor) -> "DispatchedTokens":
        """Builds DispatchedTokens from rows that are already grouped by expert, each the input of one choice."""
        row_R = torch.arange(len(x_RD), device=x_RD.device)
        return DispatchedTokens(x_RD, row_R, row_R[:, None], counts_e, weights_R)


@dataclass(frozen=True)
class RowCounts:
    """Counts the rows that this rank exchanged with other ranks in one forward pass, summed over all hops.

    sent, received: rows of tokens, in dispatch. returned: rows of expert outputs that came back to this rank, in
    combine. own: rows that stayed on this rank in dispatch; not part of the other three.
    """

    sent: int = 0
    received: int = 0
    returned: int = 0
    own: int = 0

    @staticmethod
    def of(log: CommLog) -> "RowCounts":
        """Builds the counts from the communication log of one pass; rows of its backward pass are not counted."""
        others: tuple[LinkClass, ...] = ("node", "network")  # all link classes except "own"
        return RowCounts(
            sent=sum_traffic(log.rows_sent, others, Phase.DISPATCH, is_backward=False),
            received=sum_traffic(log.rows_received, others, Phase.DISPATCH, is_backward=False),
            returned=sum_traffic(log.rows_received, others, Phase.COMBINE, is_backward=False),
            own=sum_traffic(log.rows_sent, ("own",), Phase.DISPATCH, is_backward=False),
        )


@dataclass(frozen=True)
class ExpertCounts:
    """Counts, for each of the E experts, the choices (pairs of a token and an expert) by outcome. Fields are int64 (E).

    routed_E: choices that the router made. kept_E: those that stayed with the router's expert. rerouted_E: those that
    were rerouted to this expert. dropped_capacity_E, dropped_receive_bound_E: those that were dropped, by reason.
    computed_E: choices that the expert did compute, counted on the rank that holds it.
    """

    routed_E: Tensor
    kept_E: Tensor
    rerouted_E: Tensor
    dropped_capacity_E: Tensor
    dropped_receive_bound_E: Tensor
    computed_E: Tensor

    @property
    def dropped_E(self) -> Tensor:
        """Returns the number of dropped choices of each expert, int64 (E)."""
        return self.dropped_capacity_E + self.dropped_receive_bound_E


@dataclass(frozen=True)
class LoadStats(ExpertCounts):
    """Reports what happened to this rank's tokens in one forward pass of one layer. Detached; sum over ranks for
    totals.

    computed_E counts for this rank's experts only, indexed by global expert id; it is 0 for all others. num_tokens: the
    number of real tokens (without padding); `num_tokens_without_expert`: how many of them no routed expert computes.
    entropy: the sum over real tokens of the entropy of the router's probabilities, in nats. rows: numbers of rows
    exchanged. log: rows and bytes exchanged, by exchange and link class; the backward pass adds its rows and bytes.
    gathered_bytes: bytes that this rank sent to gather the tokens of scopes wider than one rank. losses: this rank's
    share of each loss, before its coefficient; the sum over ranks is the loss. checksums: of what was sent and of what
    arrived; the backward pass adds its own.
    """

    num_tokens: Tensor
    num_tokens_without_expert: Tensor
    entropy: Tensor
    rows: RowCounts
    log: CommLog
    gathered_bytes: int = 0
    losses: dict[str, Tensor] = field(default_factory=dict)
    checksums: Checksums = field(default_factory=Checksums)

    @property
    def rows_own(self) -> int:
        """Returns the number of rows that stayed on this rank in dispatch."""
        return self.rows.own


@dataclass(frozen=True)
class MoEOutput:
    """Holds what `MoELayer.forward` returns.

    y: shape and dtype of the input. losses: this rank's share of each auxiliary loss, scalars already multiplied by
    their coefficients: add them to the training loss, and SUM gradients over ranks (after `prepare_data_parallel` they
    are multiplied by the number of ranks: average them). stats: see LoadStats. pooled: for each balance loss that is
    computed once for all layers (`layers: pooled`), its f and P in this layer (see losses.pool_layers); `losses` has
    the value of such a loss if this were the only layer.
    """

    y: Tensor
    losses: dict[str, Tensor]
    stats: LoadStats
    pooled: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
