"""Implements SparseMixer-v2, the router of GRIN-MoE and Phi-3.5-MoE: it samples two experts one after the other, and
estimates the gradient of the choice. Source: Liu et al. 2024 (arXiv:2409.12136), section 2.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from expert_parallel.moe.context import TokenBatch, pass_seed
from expert_parallel.moe.routers.base import LinearRouter, Scores, TokenChoiceSettings, score_logits
from expert_parallel.moe.routers.topk import stable_topk
from expert_parallel.moe.types import Outcome, RoutingPlan
from expert_parallel.nn import random
from expert_parallel.nn.random import Stream


class SparseMixerConfig(TokenChoiceSettings):
    """Sends each token to two experts, which training samples from the near-best ones (SparseMixer-v2, GRIN-MoE, Liu et
    al. 2024)."""

    kind: Literal["sparsemixer"]
    k: Literal[2] = 2
    """Sets the number of experts that each token is sent to, always 2."""
    margin: float = Field(default=0.01, ge=0)
    """Samples among experts whose logit l is at most 2 * margin * max(|l|, best) below the best one (`jitter_eps`)."""
    bias: bool = False
    """Adds a learned bias to the router's logits."""


class SparseMixerRouter(LinearRouter):
    """Chooses an expert, and a second one among the others. The weight of each is its share of a softmax over the
    experts that were near the best at its choice, so that the two weights do not sum to 1.

    In training both are drawn from these softmaxes, and the weight of an expert that is not the best is its share times
    1/3 with probability 3/4. The gradient of the weight becomes that of the share: this is Heun's third-order rule, by
    which the mean of f'(weight) * share is f(share) - f(0), what the choice of the expert changes, for every cubic f.
    """

    Config = SparseMixerConfig
    config: SparseMixerConfig  # type: ignore[assignment]

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        scores = score_logits(self.logits(x_TD), "softmax")
        if not self.training:
            return scores
        return replace(scores, lots_TK=random.uniform(pass_seed(batch.context, Stream.MIXER_STEP), batch.index_T, 2))

    def choose(self, scores: Scores, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        logits_TE, num_experts = scores.logits_TE, self.num_experts
        noise_T2E = torch.zeros_like(logits_TE).repeat(1, 2)
        if self.training:
            seed = pass_seed(batch.context, Stream.MIXER_CHOICE)
            noise_T2E = random.gumbel(seed, batch.index_T, 2 * num_experts).to(logits_TE.dtype)
        first_noise_TE, second_noise_TE = noise_T2E.split(num_experts, 1)
        first_T1 = stable_topk(self._near_best(logits_TE) + first_noise_TE, 1)
        others_TE = logits_TE.scatter(1, first_T1, -torch.inf)
        second_T1 = stable_topk(self._near_best(others_TE) + second_noise_TE, 1)
        expert_ids_TK = torch.cat([first_T1, second_T1], 1)
        return expert_ids_TK, torch.full_like(expert_ids_TK, Outcome.KEPT, dtype=torch.uint8)

    def weights(self, scores: Scores | RoutingPlan, expert_ids_TK: Tensor, counted_TK: Tensor | None) -> Tensor:
        first_T1, second_T1 = expert_ids_TK.split(1, 1)
        others_TE = scores.logits_TE.scatter(1, first_T1, -torch.inf)
        pairs = ((scores.logits_TE, first_T1), (others_TE, second_T1))
        shares_TK = torch.cat(
            [self._near_best(left_TE, chosen_T1).softmax(-1).gather(1, chosen_T1) for left_TE, chosen_T1 in pairs], 1
        )
        if scores.lots_TK is None:
            return shares_TK
        is_best_TK = torch.cat([left.gather(1, chosen) == left.amax(1, keepdim=True) for left, chosen in pairs], 1)
        steps_TK = torch.full_like(shares_TK, 1 / 3).masked_fill(is_best_TK | (scores.lots_TK >= 0.75), 1)
        # The value is steps * shares, the gradient that of shares alone.
        return shares_TK + ((steps_TK - 1) * shares_TK).detach()

    def _near_best(self, logits_TE: Tensor, chosen_T1: Tensor | None = None) -> Tensor:
        """Returns the logits, with -inf for experts that are too far below the best one. chosen_T1: an expert of each
        token that stays whatever its logit, as one that is replayed with rounded logits must."""
        with torch.no_grad():
            best_T1 = logits_TE.amax(1, keepdim=True)
            is_far_TE = best_T1 - logits_TE > 2 * self.config.margin * torch.maximum(logits_TE.abs(), best_T1)
            is_far_TE |= logits_TE == -torch.inf  # of those the line above has inf > inf
            if chosen_T1 is not None:
                is_far_TE.scatter_(1, chosen_T1, False)
        return logits_TE.masked_fill(is_far_TE, -torch.inf)
