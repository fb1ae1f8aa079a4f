"""Implements the routers that use random numbers in training: noisy top-k, and GShard's random second expert.

Each random number is a function of named keys (see nn/random.py), so every layout and every rerun draws the same.
"""

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from expert_parallel.moe.context import TokenBatch, pass_seed
from expert_parallel.moe.routers.base import LinearRouter, LinearSettings, Scores, score_logits
from expert_parallel.moe.routers.topk import stable_topk
from expert_parallel.moe.types import LogitNoise, Outcome
from expert_parallel.nn import random
from expert_parallel.nn.random import Stream


class NoisyTopKConfig(LinearSettings):
    """Sends each token to the k experts with the largest logits, to which training adds noise."""

    kind: Literal["noisy_top_k"]
    noise: Literal["learned", "normal", "gumbel"] = "learned"
    """Adds N(0, 1) * softplus(x W_noise) (`learned`, Shazeer et al. 2017, eq. 4) or N(0, std^2) (`normal`, V-MoE,
    Riquelme et al. 2021) to the logits; `gumbel` changes the choice but no weight (DeepSpeed's RSample)."""
    std: float | None = Field(default=None, gt=0)
    """Sets the standard deviation of `noise: normal`; null is 1 / num_experts."""

    def refuse(self, num_experts: int) -> None:
        super().refuse(num_experts)
        if self.std is not None and self.noise != "normal":
            raise ValueError(f"router.std is {self.std} but router.noise is {self.noise!r}: only 'normal' takes it")


class NoisyTopKRouter(LinearRouter):
    """Chooses the k largest of H(x) = x W + noise; the scores are softmax(H). Shazeer et al. 2017, eq. 3-5.

    Gumbel noise changes only which experts are chosen: the scores are then softmax(x W).
    """

    Config = NoisyTopKConfig
    config: NoisyTopKConfig

    def __init__(self, config: NoisyTopKConfig, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.noise_weight = nn.Parameter(torch.empty(num_experts, d_model)) if config.noise == "learned" else None

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        logits_TE = self.logits(x_TD)
        # Computed in evaluation too, so that W_noise has a gradient in every pass (of zeros, in evaluation).
        spread_TE = None if self.noise_weight is None else F.softplus(F.linear(x_TD, self.noise_weight.to(x_TD.dtype)))
        if not self.training:
            return score_logits(logits_TE if spread_TE is None else logits_TE + 0 * spread_TE, "softmax")
        seed = pass_seed(batch.context, Stream.NOISE)
        if self.config.noise == "gumbel":
            noise_TE = random.gumbel(seed, batch.index_T, self.num_experts).to(x_TD.dtype)
            scores = score_logits(logits_TE, "softmax")
            return replace(scores, ranking_TE=scores.ranking_TE + noise_TE)
        noise_TE = random.normal(seed, batch.index_T, self.num_experts).to(x_TD.dtype)
        if spread_TE is None:
            spread_TE = logits_TE.new_full((1, 1), 1 / self.num_experts if self.config.std is None else self.config.std)
        scores = score_logits(logits_TE + noise_TE * spread_TE, "softmax")
        return replace(scores, noise=LogitNoise(logits_TE, spread_TE))


class GShardConfig(LinearSettings):
    """Sends each token to its two best experts, and in training chooses the second one at random (GShard, Lepikhin et
    al. 2020, algorithm 1)."""

    kind: Literal["gshard"]
    k: Literal[2] = 2
    """Sets the number of experts that each token is sent to, always 2."""
    second: Literal["proportional", "gumbel"] = "proportional"
    """Uses the second expert with probability min(1, g2 / threshold), g2 being its share of the two weights
    (`proportional`), or draws it from the other experts' softmax (`gumbel`, DeepSpeed's top2_2nd_expert_sampling)."""
    threshold: float = Field(default=0.5, gt=0, le=1)
    """Sets the share of the weights from which `second: proportional` always uses the second expert (GShard: 0.5, Mesh
    TensorFlow: 0.2)."""


class GShardRouter(LinearRouter):
    """Chooses the best expert of each token, and a second one at random. A second choice that is not drawn is
    NOT_ROUTED. Source: Lepikhin et al. 2020, algorithm 1."""

    Config = GShardConfig
    config: GShardConfig

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        scores = score_logits(self.logits(x_TD), "softmax")
        if not self.training or self.config.second != "gumbel":
            return scores
        seed = pass_seed(batch.context, Stream.SECOND_EXPERT)
        noise_TE = random.gumbel(seed, batch.index_T, self.num_experts).to(x_TD.dtype)
        return replace(scores, ranking_TE=scores.ranking_TE + noise_TE)

    def choose(self, scores: Scores, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        first_T1 = stable_topk(scores.log_scores_TE, 1)
        second_T1 = stable_topk(scores.ranking_TE.scatter(1, first_T1, -torch.inf), 1)
        expert_ids_TK = torch.cat([first_T1, second_T1], dim=1)
        outcome_TK = torch.full_like(expert_ids_TK, Outcome.KEPT, dtype=torch.uint8)
        if not self.training or self.config.second != "proportional":
            return expert_ids_TK, outcome_TK
        seed = pass_seed(batch.context, Stream.SECOND_EXPERT)
        g2_T = scores.log_scores_TE.gather(1, expert_ids_TK).softmax(-1)[:, 1]
        taken_T = random.uniform(seed, batch.index_T, 1)[:, 0] < g2_T.double() / self.config.threshold
        outcome_TK[:, 1] = torch.where(taken_T, Outcome.KEPT, Outcome.NOT_ROUTED).to(torch.uint8)
        return expert_ids_TK, outcome_TK
