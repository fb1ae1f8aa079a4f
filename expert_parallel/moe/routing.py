"""Routers: which experts each token goes to, and with which weight. x_TD -> RoutingPlan.

`ROUTERS` maps each `kind:` to its class. A router owns its parameters and knows nothing of ranks, capacity or
losses.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from expert_parallel.moe import random
from expert_parallel.moe.plan import Reason, RoutingPlan, StepContext
from expert_parallel.settings import Settings


class TopKRouterConfig(Settings):
    """Token choice: each token takes its k best experts.

    `score: softmax` is Mixtral, OLMoE, GShard and Switch; `sigmoid` is DeepSeek-V3.
    `normalise: true` lets the weights of the chosen experts sum to 1. For softmax scores this is the same as
    taking the softmax after the choice.
    """

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=2, ge=1)
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = Field(default=1.0, gt=0, description="multiplies every weight (DeepSeek-V3: 2.5)")
    bias: bool = Field(default=False, description="a learned bias on the logits")
    jitter: float = Field(
        default=0.0, ge=0, lt=1, description="training: inputs times uniform(1 - jitter, 1 + jitter) (Switch: 0.01)"
    )
    balance_bias_rate: float = Field(
        default=0.0, ge=0, description="step of the selection bias that balances without a loss; 0 = off (DeepSeek-V3)"
    )


class TopKRouter(nn.Module):
    """p = score(x W + b); the k largest of (p + balance bias) are chosen, the smaller expert number first on ties.

    Sources: Shazeer et al. 2017 eq. 3 (without noise); Fedus et al. 2021 eq. 1-2 and appendix C (input jitter);
    Jiang et al. 2024 eq. 2; DeepSeek-V3 2024 eq. 12-16 (sigmoid, balance bias: it moves the choice, never a weight).
    """

    def __init__(self, config: TopKRouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.bias else None
        self.balance_bias_E: Tensor | None
        self.register_buffer("balance_bias_E", torch.zeros(num_experts) if config.balance_bias_rate > 0 else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        """`.to(dtype)` and the like, but the balance bias stays at float32 or wider: bfloat16 swallows its steps."""
        before_E = self.balance_bias_E
        super()._apply(fn, recurse)
        if self.balance_bias_E is not None and self.balance_bias_E.dtype.itemsize < torch.float32.itemsize:
            assert before_E is not None
            self.balance_bias_E = before_E.to(self.balance_bias_E.device)
        return self

    @property
    def num_choices(self) -> int:
        return self.config.k

    def forward(self, x_TD: Tensor, token_index_T: Tensor, context: StepContext) -> RoutingPlan:
        """x_TD: any float dtype; computes in promote_types(float32, x's dtype). token_index_T: int64, global."""
        config = self.config
        dtype = torch.promote_types(torch.float32, x_TD.dtype)
        x_TD = x_TD.to(dtype)
        if config.jitter > 0 and self.training:
            seed = random.mix(context.seed, context.step, context.micro_step, context.layer)
            noise_TD = random.uniform(seed, token_index_T, x_TD.shape[1]).to(dtype)
            x_TD = x_TD * (1 - config.jitter + 2 * config.jitter * noise_TD)
        bias = None if self.bias is None else self.bias.to(dtype)
        logits_TE = F.linear(x_TD, self.weight.to(dtype), bias)
        # A score is exp(log score), up to a factor of the token: a softmax over log scores normalises exactly, without
        # the epsilon that a sum of sigmoids needs and that a router can learn to hide under.
        log_scores_TE = logits_TE if config.score == "softmax" else F.logsigmoid(logits_TE)
        probabilities_TE = log_scores_TE.softmax(-1)
        scores_TE = probabilities_TE if config.score == "softmax" else logits_TE.sigmoid()
        expert_ids_TK = self._choose(log_scores_TE.detach(), scores_TE.detach())
        if config.normalise:
            weights_TK = log_scores_TE.gather(1, expert_ids_TK).softmax(-1)
        else:
            weights_TK = scores_TE.gather(1, expert_ids_TK)
        return RoutingPlan(
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            probabilities_TE=probabilities_TE,
            expert_ids_TK=expert_ids_TK,
            weights_TK=weights_TK * config.scale,
            reason_TK=torch.full_like(expert_ids_TK, Reason.KEPT, dtype=torch.uint8),
            num_experts=self.num_experts,
        )

    def _choose(self, log_scores_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """The k best in descending order. By log scores, which stay apart where scores round to equals (sigmoids of
        logits beyond 17 in float32); the balance bias is defined on scores. A stable sort, since topk leaves open
        which of two equals it takes."""
        ranking_TE = log_scores_TE
        if self.balance_bias_E is not None:
            ranking_TE = scores_TE + self.balance_bias_E.to(scores_TE.dtype)
        return ranking_TE.sort(dim=1, descending=True, stable=True).indices[:, : self.config.k]


RouterConfig = TopKRouterConfig
ROUTERS: dict[str, type[TopKRouter]] = {"top_k": TopKRouter}
