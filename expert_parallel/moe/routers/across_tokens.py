"""Routers that look across tokens: expert choice and Sinkhorn. Both take a `scope` (see
moe/capacity/token_scope.py)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from expert_parallel.moe.capacity.limit import expert_capacity
from expert_parallel.moe.capacity.token_scope import Scope, View, look_across
from expert_parallel.moe.context import TokenBatch
from expert_parallel.moe.dispatch.permute import places_in_queues
from expert_parallel.moe.routers.base import (
    LinearRouter,
    LinearSettings,
    RouterSettings,
    Score,
    Scores,
    best,
    score_logits,
)
from expert_parallel.moe.types import Reason, RoutingPlan


class ExpertChoiceConfig(RouterSettings):
    """Each expert takes its C = ceil(factor * T / E) best tokens of the scope, so the load is equal by construction;
    a token may get many experts or none. Zhou et al. 2022, eq. 1-3: weights are softmax scores over the experts.

    Whether a token is taken depends on the tokens after it: a causal model sees the future, in training, and
    differs in generation. Refused in this project's decoder unless `accept_future_tokens` is true.
    """

    kind: Literal["expert_choice"]
    train: float = Field(default=2.0, gt=0, description="the factor: experts of a token, on average")
    eval: float = Field(default=2.0, gt=0)
    scope: Scope = "rank"
    scale: float = Field(default=1.0, gt=0)
    bias: bool = False
    accept_future_tokens: bool = False

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
    """K = E: choice e of a token is expert e; those not taken are NOT_ROUTED. Ties go to the earlier token."""

    Config = ExpertChoiceConfig
    config: ExpertChoiceConfig  # type: ignore[assignment]  # weighs by itself, so needs no `normalise`

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        return score_logits(self.logits(x_TD), "softmax")

    def weights(self, scores: Scores | RoutingPlan, expert_ids_TK: Tensor, counted_TK: Tensor | None) -> Tensor:
        return scores.scores_TE.gather(1, expert_ids_TK) * self.config.scale

    def choose(self, scores: Scores, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        view, (scores_GE,) = look_across(self.config.scope, batch, scores.scores_TE)
        factor = self.config.train if self.training else self.config.eval
        capacities = [expert_capacity(factor, 0, size, 1, self.num_experts) for size in view.sizes]
        capacity_b = torch.tensor(capacities, dtype=torch.int64, device=scores_GE.device)
        taken_GE = _best_tokens(scores_GE, view, capacity_b)
        reason_TK = torch.where(taken_GE, Reason.KEPT, Reason.NOT_ROUTED).to(torch.uint8)[view.mine_T]
        ids_E = torch.arange(self.num_experts, device=reason_TK.device)
        return ids_E.expand(reason_TK.shape).contiguous(), reason_TK


def _best_tokens(scores_GE: Tensor, view: View, capacity_b: Tensor) -> Tensor:
    """Bool: the capacity_b[block] largest of each (block, expert), earlier tokens first on ties."""
    num_tokens, num_experts = scores_GE.shape
    block_G = torch.where(view.real_G, view.block_G, view.num_blocks)  # padding queues apart, where nothing is taken
    queue_GE = block_G[:, None] * num_experts + torch.arange(num_experts, device=scores_GE.device)
    order_N = scores_GE.flatten().argsort(descending=True, stable=True)
    place_N = places_in_queues(queue_GE.flatten(), (view.num_blocks + 1) * num_experts, order_N)
    capacity_b = torch.cat([capacity_b, capacity_b.new_zeros(1)])
    return place_N.view(num_tokens, num_experts) < capacity_b[block_G][:, None]


class SinkhornConfig(LinearSettings):
    """In training the choice is the k largest of a doubly normalised matrix, which spreads the tokens over the experts
    (S-BASE, Clark et al. 2022; Megatron-Core's sinkhorn); in evaluation the k largest logits. Weights are the chosen
    experts' scores: S-BASE softmax, Megatron-Core sigmoid for k = 1.

    Rows and columns are normalised in turn until the columns' factors change by `tolerance` on average, or
    `max_iterations` times.
    """

    kind: Literal["sinkhorn"]
    k: int = Field(default=1, ge=1)
    score: Score = "softmax"
    normalise: bool = False
    scope: Scope = "rank"
    tolerance: float = Field(default=1e-4, gt=0)
    max_iterations: int = Field(default=100, ge=1)


class SinkhornRouter(LinearRouter):
    Config = SinkhornConfig
    config: SinkhornConfig

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        return score_logits(self.logits(x_TD), self.config.score)

    def choose(self, scores: Scores, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        if not self.training:
            return super().choose(scores, batch)
        view, (logits_GE,) = look_across(self.config.scope, batch, scores.logits_TE)
        balanced_GE = sinkhorn(logits_GE, view, self.config.tolerance, self.config.max_iterations)
        expert_ids_TK = best(balanced_GE[view.mine_T], self.config.k)
        return expert_ids_TK, torch.full_like(expert_ids_TK, Reason.KEPT, dtype=torch.uint8)


def sinkhorn(logits_GE: Tensor, view: View, tolerance: float, max_iterations: int) -> Tensor:
    """exp(logits) scaled so that, in each block, every row sums to 1 / T and every column to 1 / E. (G, E).

    A row's largest logit is taken off first: it cancels in the row's factor, and exp cannot overflow.
    """
    if logits_GE.numel() == 0:
        return logits_GE
    cost_GE = (logits_GE - logits_GE.amax(-1, keepdim=True)).exp() * view.real_G[:, None]
    cost_bSE = cost_GE.view(view.num_blocks, -1, logits_GE.shape[1])
    num_tokens_b, num_experts = logits_GE.new_tensor(view.sizes).clamp(min=1).view(-1, 1, 1), logits_GE.shape[1]
    tiny = torch.finfo(cost_bSE.dtype).tiny
    row_bS1, column_b1E = torch.ones_like(cost_bSE[:, :, :1]), torch.ones_like(cost_bSE[:, :1])
    done_b = torch.zeros_like(num_tokens_b, dtype=torch.bool)
    for _ in range(max_iterations):
        # A block that is done stays as it is: what becomes of it does not depend on the others.
        row_bS1 = torch.where(
            done_b, row_bS1, 1 / (num_tokens_b * (cost_bSE * column_b1E).sum(2, True).clamp(min=tiny))
        )
        before_b1E = column_b1E
        column_b1E = torch.where(
            done_b, before_b1E, 1 / (num_experts * (cost_bSE * row_bS1).sum(1, True).clamp(min=tiny))
        )
        done_b = (column_b1E - before_b1E).abs().mean(2, True) <= tolerance
        if bool(done_b.all()):
            break
    return (cost_bSE * row_bS1 * column_b1E).view_as(logits_GE)
