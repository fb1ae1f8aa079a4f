"""Implements the expert-choice and Sinkhorn routers, whose choice for a token depends on the other tokens of a `scope`
(see capacity/token_scope.py)."""

from typing import Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from expert_parallel.moe.capacity.policies import expert_capacity
from expert_parallel.moe.capacity.token_scope import Scope, ScopedTokens, gather_scope
from expert_parallel.moe.context import TokenBatch
from expert_parallel.moe.dispatch.permute import positions_in_queues
from expert_parallel.moe.routers.base import (
    LinearRouter,
    LinearSettings,
    RouterSettings,
    Score,
    Scores,
    score_logits,
)
from expert_parallel.moe.routers.topk import stable_topk
from expert_parallel.moe.types import Outcome, RoutingPlan


class ExpertChoiceConfig(RouterSettings):
    """Lets each expert choose its ceil(factor * T / E) best of the scope's T tokens, with softmax scores as weights
    (Zhou et al. 2022, eq. 1-3).

    All E experts have equal load; a token may get many experts or none. Choices depend on later tokens, so a causal
    model sees the future in training and differs in generation.
    """

    kind: Literal["expert_choice"]
    train: float = Field(default=2.0, gt=0)
    """Sets the factor in training: the mean number of experts of a token."""
    eval: float = Field(default=2.0, gt=0)
    """Sets the factor in evaluation: the mean number of experts of a token."""
    scope: Scope = "rank"
    """Sets the tokens that an expert chooses from: this `rank`'s, each `sequence`'s, or all ranks' (`global`)."""
    scale: float = Field(default=1.0, gt=0)
    """Multiplies every weight by this number."""
    bias: bool = False
    """Adds a learned bias to the router's logits."""
    accept_future_tokens: bool = False
    """Allows this router in a causal model, where the choice of a token depends on later tokens."""

    def num_choices(self, num_experts: int) -> int:
        return num_experts

    def experts_per_token(self, num_experts: int) -> float:
        return self.train

    def refuse(self, num_experts: int) -> None:
        for name, factor in (("train", self.train), ("eval", self.eval)):
            if factor > num_experts:
                raise ValueError(
                    f"router.{name} ({factor}) is larger than num_experts ({num_experts}): every expert would "
                    "take more than all tokens"
                )


class ExpertChoiceRouter(LinearRouter):
    """Lets each expert choose its best tokens; on ties, the earlier token.

    Its plans have K = E: choice e of a token is expert e, and NOT_ROUTED if the expert did not choose the token.
    """

    Config = ExpertChoiceConfig
    config: ExpertChoiceConfig  # type: ignore[assignment]  # weighs by itself, so needs no `normalise`

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        return score_logits(self.logits(x_TD), "softmax")

    def weights(self, scores: Scores | RoutingPlan, expert_ids_TK: Tensor, counted_TK: Tensor | None) -> Tensor:
        return scores.scores_TE.gather(1, expert_ids_TK) * self.config.scale

    def choose(self, scores: Scores, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        view, (scores_GE,) = gather_scope(self.config.scope, batch, scores.scores_TE)
        factor = self.config.train if self.training else self.config.eval
        capacities = [expert_capacity(factor, 0, size, 1, self.num_experts) for size in view.sizes]
        capacity_b = torch.tensor(capacities, dtype=torch.int64, device=scores_GE.device)
        taken_GE = _best_tokens(scores_GE, view, capacity_b)
        outcome_TK = torch.where(taken_GE, Outcome.KEPT, Outcome.NOT_ROUTED).to(torch.uint8)[view.local_T]
        ids_E = torch.arange(self.num_experts, device=outcome_TK.device)
        return ids_E.expand(outcome_TK.shape).contiguous(), outcome_TK


def _best_tokens(scores_GE: Tensor, view: ScopedTokens, capacity_b: Tensor) -> Tensor:
    """Returns a bool mask (G, E) of the capacity_b[block] largest scores of each expert in each block; on ties, earlier
    tokens come first."""
    num_tokens, num_experts = scores_GE.shape
    block_G = torch.where(view.real_G, view.block_G, view.num_blocks)  # padding: an additional block of capacity 0
    queue_GE = block_G[:, None] * num_experts + torch.arange(num_experts, device=scores_GE.device)
    order_N = scores_GE.flatten().argsort(descending=True, stable=True)
    place_N = positions_in_queues(queue_GE.flatten(), (view.num_blocks + 1) * num_experts, order_N)
    capacity_b = torch.cat([capacity_b, capacity_b.new_zeros(1)])
    return place_N.view(num_tokens, num_experts) < capacity_b[block_G][:, None]


class SinkhornConfig(LinearSettings):
    """Sends each token to k experts, in training by logits that Sinkhorn's algorithm has balanced over the experts
    (S-BASE, Clark et al. 2022; Megatron-Core's sinkhorn).

    Evaluation takes the k largest logits. Rows and columns of exp(logits) are normalized in turn.
    """

    kind: Literal["sinkhorn"]
    k: int = Field(default=1, ge=1)
    """Sets the number of experts that each token is sent to."""
    score: Score = "softmax"
    """Turns logits into the chosen experts' weights: `softmax` (S-BASE), or `sigmoid` (Megatron-Core, k = 1)."""
    normalise: bool = Field(default=False, validation_alias=AliasChoices("normalise", "normalize"))
    """Divides each token's weights by their sum, so that they sum to 1."""
    scope: Scope = "rank"
    """Sets the tokens that are balanced together: this `rank`'s, each `sequence`'s, or all ranks' (`global`)."""
    tolerance: float = Field(default=1e-4, gt=0)
    """Stops the iteration when the columns' factors change by less than this on average."""
    max_iterations: int = Field(default=100, ge=1)
    """Stops the iteration after this many rounds."""


class SinkhornRouter(LinearRouter):
    """Chooses the k experts of each token by balanced logits in training, and by the logits in evaluation. The weights
    come from the logits in both, so the balancing has no gradient."""

    Config = SinkhornConfig
    config: SinkhornConfig

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        return score_logits(self.logits(x_TD), self.config.score)

    def choose(self, scores: Scores, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        if not self.training:
            return super().choose(scores, batch)
        view, (logits_GE,) = gather_scope(self.config.scope, batch, scores.logits_TE)
        balanced_GE = sinkhorn(logits_GE, view, self.config.tolerance, self.config.max_iterations)
        expert_ids_TK = stable_topk(balanced_GE[view.local_T], self.config.k)
        return expert_ids_TK, torch.full_like(expert_ids_TK, Outcome.KEPT, dtype=torch.uint8)


def sinkhorn(logits_GE: Tensor, view: ScopedTokens, tolerance: float, max_iterations: int) -> Tensor:
    """Scales the rows and columns of exp(logits) so that, in each block of T real tokens, every row sums to 1 / T and
    every column to 1 / E. Returns (G, E) in router dtype; rows of padding are 0.

    Source: Clark et al. 2022 (S-BASE), with the stopping rule of Megatron-Core. The largest logit of each row is
    subtracted first, so that exp cannot overflow; it cancels in the factor of the row.
    """
    if logits_GE.numel() == 0:
        return logits_GE
    cost_GE = (logits_GE - logits_GE.amax(-1, keepdim=True)).exp() * view.real_G[:, None]
    cost_bSE = cost_GE.view(view.num_blocks, -1, logits_GE.shape[1])
    num_tokens_b = logits_GE.new_tensor(view.sizes).clamp(min=1).view(-1, 1, 1)
    num_experts = logits_GE.shape[1]
    tiny = torch.finfo(cost_bSE.dtype).tiny  # sums of 0, as of padding, have a finite inverse
    row_bS1 = torch.ones_like(cost_bSE[:, :, :1])
    column_b1E = torch.ones_like(cost_bSE[:, :1])
    done_b = torch.zeros_like(num_tokens_b, dtype=torch.bool)
    for _ in range(max_iterations):
        # A block that has converged is not changed any more, so its result does not depend on the other blocks.
        row_bS1 = torch.where(
            done_b, row_bS1, 1 / (num_tokens_b * (cost_bSE * column_b1E).sum(2, True).clamp(min=tiny))
        )
        before_b1E = column_b1E
        column_b1E = torch.where(
            done_b, before_b1E, 1 / (num_experts * (cost_bSE * row_bS1).sum(1, True).clamp(min=tiny))
        )
        done_b = (column_b1E - before_b1E).abs().mean(2, True) <= tolerance
        if bool(done_b.all()):  # the host waits once a round
            break
    return (cost_bSE * row_bS1 * column_b1E).view_as(logits_GE)
