"""Defines the interface of routers, which choose the experts and weights of each token, and the top-k and hash routers.

A router owns its parameters and does not depend on capacity or losses. `noisy.py` has the routers that use random
numbers, `across_tokens.py` those whose choice for a token depends on other tokens, and `registry.py` the dict of all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import AliasChoices, Field
from torch import Tensor, nn

from expert_parallel.moe.context import TokenBatch, pass_seed
from expert_parallel.moe.routers.topk import stable_topk
from expert_parallel.moe.types import LogitNoise, Outcome, RoutingPlan
from expert_parallel.nn import random
from expert_parallel.nn.random import Stream
from expert_parallel.settings import MAX_SEED, Settings

Score = Literal["softmax", "sigmoid"]


class RouterSettings(Settings):
    """Is the base class of the settings of all routers."""

    kind: str

    @property
    def normalizes(self) -> bool:
        """Returns True if a token's weights sum to 1. A registered router may have a field `normalise` of its own."""
        return getattr(self, "normalise", False)

    def num_choices(self, num_experts: int) -> int:
        """Returns K, the number of choices of each token in the router's plans."""
        raise NotImplementedError

    def experts_per_token(self, num_experts: int) -> float:
        """Returns the mean number of experts of a token in training, before drops."""
        return self.num_choices(num_experts)

    def refuse(self, num_experts: int) -> None:
        """Raises a ValueError if these settings cannot work with this many experts."""


class TokenChoiceSettings(RouterSettings):
    """Is the base class of routers that choose k experts for each token."""

    k: int = Field(default=2, ge=1)
    """Sets the number of experts that each token is sent to."""

    def num_choices(self, num_experts: int) -> int:
        return self.k

    def refuse(self, num_experts: int) -> None:
        if self.k > num_experts:
            raise ValueError(f"router.k ({self.k}) is larger than num_experts ({num_experts})")
        if self.k == 1 and self.normalizes:
            raise ValueError(
                "router.normalise is true with router.k = 1: the only weight would always be 1 and the router would "
                "never learn; set router.normalise to false"
            )


class LinearSettings(TokenChoiceSettings):
    """Is the base class of routers whose logits are a learned linear function of the token."""

    normalise: bool = Field(default=True, validation_alias=AliasChoices("normalise", "normalize"))
    """Divides each token's weights by their sum, so that they sum to 1 (for softmax scores: softmax after top-k)."""
    scale: float = Field(default=1.0, gt=0)
    """Multiplies every weight by this number (DeepSeek-V3: 2.5)."""
    bias: bool = False
    """Adds a learned bias to the router's logits."""


@dataclass(frozen=True)
class Scores:
    """Holds a router's scores of all experts for T tokens, in router dtype.

    log_scores_TE: the logarithms of the scores, up to a constant for each token. Weights are normalised by a softmax
    over them, which is exact: dividing by a sum of sigmoids needs an epsilon, which distorts weights if all scores are
    tiny. The other fields are those of RoutingPlan.
    """

    logits_TE: Tensor
    log_scores_TE: Tensor
    scores_TE: Tensor
    probabilities_TE: Tensor
    ranking_TE: Tensor
    noise: LogitNoise | None = None
    lots_TK: Tensor | None = None


def score_logits(logits_TE: Tensor, score: Score) -> Scores:
    """Computes the scores of router logits by softmax or sigmoid.

    The ranking is by log scores, which still differ where the scores round to the same number (sigmoids of logits
    above 17 in float32).
    """
    log_scores_TE = logits_TE if score == "softmax" else F.logsigmoid(logits_TE)
    probabilities_TE = log_scores_TE.softmax(-1)
    scores_TE = probabilities_TE if score == "softmax" else logits_TE.sigmoid()
    return Scores(logits_TE, log_scores_TE, scores_TE, probabilities_TE, log_scores_TE.detach())


class Router(nn.Module):
    """Is the base class of all routers: `forward` scores the experts, chooses some, and computes their weights.

    A subclass defines `score`; `choose` if it does not take the k best; `weights`, unless it derives from
    LinearRouter; and Config, the class of its settings. It is registered by one line, `ROUTERS["mine"] = MyRouter`
    (see moe/README.md). When recorded choices are replayed, `choose` is not called.
    """

    Config: ClassVar[type[RouterSettings]]

    def __init__(self, config: RouterSettings, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts

    @property
    def num_choices(self) -> int:
        return self.config.num_choices(self.num_experts)

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        """Computes the scores of all experts for each token. x_TD: in router dtype."""
        raise NotImplementedError

    def choose(self, scores: Scores, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Returns (expert_ids_TK, outcome_TK): int64, and uint8 with values of Outcome. Runs without gradient."""
        expert_ids_TK = stable_topk(scores.ranking_TE, self.num_choices)
        return expert_ids_TK, torch.full_like(expert_ids_TK, Outcome.KEPT, dtype=torch.uint8)

    def weights(self, scores: Scores | RoutingPlan, expert_ids_TK: Tensor, counted_TK: Tensor | None) -> Tensor:
        """Returns the factor of each choice's output, (T, K) in router dtype.

        counted_TK: bool, the choices over which the weights of a token sum to 1 if the router normalises; None: all.
        """
        raise NotImplementedError

    def forward(self, x_TD: Tensor, batch: TokenBatch, recorded: tuple[Tensor, Tensor] | None = None) -> RoutingPlan:
        """Routes the tokens of x_TD, which has any float dtype.

        Computes in promote_types(float32, x's dtype), also under autocast: in 16 bits, logits that differ would often
        round to ties. recorded: (expert_ids_TK, outcome_TK) to use instead of the router's own choice. Padded rows may
        contain anything, including NaN.
        """
        x_TD = x_TD.to(torch.promote_types(torch.float32, x_TD.dtype))
        if batch.real_T is not None:
            x_TD = x_TD.masked_fill(~batch.real_T[:, None], 0)  # 0 * NaN would be NaN in the router's gradient
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._route(x_TD, batch, recorded)

    def _route(self, x_TD: Tensor, batch: TokenBatch, recorded: tuple[Tensor, Tensor] | None) -> RoutingPlan:
        scores = self.score(x_TD, batch)
        # The default `choose` keeps every choice, which is thus known without a look at the tensor.
        keeps_all = recorded is None and getattr(self.choose, "__func__", None) is Router.choose
        if recorded is None:
            with torch.no_grad():
                recorded = self.choose(scores, batch)
        expert_ids_TK, outcome_TK = recorded
        if batch.real_T is not None:
            outcome_TK = outcome_TK.masked_fill(~batch.real_T[:, None], Outcome.NOT_ROUTED)
        return RoutingPlan(
            logits_TE=scores.logits_TE,
            scores_TE=scores.scores_TE,
            probabilities_TE=scores.probabilities_TE,
            expert_ids_TK=expert_ids_TK,
            weights_TK=self.weights(scores, expert_ids_TK, None),
            outcome_TK=outcome_TK,
            num_experts=self.num_experts,
            log_scores_TE=scores.log_scores_TE,
            ranking_TE=scores.ranking_TE,
            all_kept_TK=outcome_TK if keeps_all and batch.real_T is None else None,
            noise=scores.noise,
            lots_TK=scores.lots_TK,
        )


class LinearRouter(Router):
    """Is the base class of routers with logits x W + b, in router dtype. The weights of a token are the scores of its
    experts, normalised if the settings say so, times `scale`."""

    config: LinearSettings

    def __init__(self, config: Any, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.bias else None

    def logits(self, x_TD: Tensor) -> Tensor:
        """Computes x W + b in x's dtype, to which the parameters are cast."""
        bias = None if self.bias is None else self.bias.to(x_TD.dtype)
        return F.linear(x_TD, self.weight.to(x_TD.dtype), bias)

    def weights(self, scores: Scores | RoutingPlan, expert_ids_TK: Tensor, counted_TK: Tensor | None) -> Tensor:
        if not self.config.normalise:
            return scores.scores_TE.gather(1, expert_ids_TK) * self.config.scale
        assert scores.log_scores_TE is not None
        chosen_TK = scores.log_scores_TE.gather(1, expert_ids_TK)
        if counted_TK is not None:
            # The lowest finite number, not -inf, so that a token without counted choices gets weights of 0, not NaN.
            lowest = torch.finfo(chosen_TK.dtype).min
            chosen_TK = chosen_TK.masked_fill(~counted_TK, lowest)
            return chosen_TK.softmax(-1).masked_fill(~counted_TK, 0) * self.config.scale
        return chosen_TK.softmax(-1) * self.config.scale


class GroupLimitConfig(Settings):
    """Limits each token to experts of its best groups; if a group lies on one node or rank, this limits how many of
    these the token is sent to."""

    count: int = Field(ge=1)
    """Divides the experts into this many groups, each of consecutive experts."""
    limit: int = Field(ge=1)
    """Sets the number of groups that a token may choose experts from."""
    score: Literal["top2_sum", "max"] = "top2_sum"
    """Scores a group by the sum of its two best experts (DeepSeek-V3), or by its best one (DeepSeek-V2)."""


class TopKRouterConfig(LinearSettings):
    """Sends each token to the k experts with the largest scores."""

    kind: Literal["top_k"] = "top_k"
    score: Score = "softmax"
    """Turns logits into scores: `softmax` (Mixtral, OLMoE, GShard, Switch), or `sigmoid` (DeepSeek-V3)."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Multiplies the router's inputs by uniform(1 - jitter, 1 + jitter) in training (Switch: 0.01)."""
    balance_bias_rate: float = Field(default=0.0, ge=0)
    """Sets the step of the selection bias that balances without a loss (DeepSeek-V3: 0.001); 0 has no such bias."""
    group_limit: GroupLimitConfig | None = None
    """Limits each token to its best groups of experts; null sets no limit."""

    def refuse(self, num_experts: int) -> None:
        super().refuse(num_experts)
        groups = self.group_limit
        if groups is None:
            return
        if num_experts % groups.count:
            raise ValueError(
                f"num_experts ({num_experts}) is not a multiple of router.group_limit.count ({groups.count})"
            )
        size = num_experts // groups.count
        if groups.limit > groups.count:
            raise ValueError(
                f"router.group_limit.limit ({groups.limit}) is larger than router.group_limit.count ({groups.count})"
            )
        if self.k > groups.limit * size:
            raise ValueError(
                f"router.k ({self.k}) is larger than the {groups.limit * size} experts of router.group_limit.limit "
                f"({groups.limit}) groups"
            )
        if groups.score == "top2_sum" and size < 2:
            raise ValueError(
                f"router.group_limit.score is 'top2_sum' but router.group_limit.count ({groups.count}) leaves one "
                "expert in a group: use 'max'"
            )


class TopKRouter(LinearRouter):
    """Chooses the k experts with the largest score(x W + b) + balance bias; on ties, the smaller expert id comes first.

    The balance bias changes which experts are chosen, but never a weight. Sources: Shazeer et al. 2017, eq. 3 (without
    noise); Fedus et al. 2021, eq. 1-2 and appendix C (input jitter); Jiang et al. 2024, eq. 2; DeepSeek-V3 2024, eq.
    12-16 (sigmoid, balance bias).
    """

    Config = TopKRouterConfig
    config: TopKRouterConfig

    def __init__(self, config: TopKRouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.balance_bias_E: Tensor | None
        self.register_buffer("balance_bias_E", torch.zeros(num_experts) if config.balance_bias_rate > 0 else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        """Applies `.to(...)` and its like, but keeps the balance bias in float32 or wider: in bfloat16, its steps would
        round to nothing."""
        before_E = self.balance_bias_E
        super()._apply(fn, recurse)
        if self.balance_bias_E is not None and self.balance_bias_E.dtype.itemsize < torch.float32.itemsize:
            assert before_E is not None
            self.balance_bias_E = before_E.to(self.balance_bias_E.device)
        return self

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        jitter = self.config.jitter
        if jitter > 0 and self.training:
            seed = pass_seed(batch.context, Stream.JITTER)
            noise_TD = random.uniform(seed, batch.index_T, x_TD.shape[1]).to(x_TD.dtype)
            x_TD = x_TD * (1 - jitter + 2 * jitter * noise_TD)
        scores = score_logits(self.logits(x_TD), self.config.score)
        if self.balance_bias_E is None and self.config.group_limit is None:
            return scores
        return replace(scores, ranking_TE=self._ranking(scores))

    @torch.no_grad()
    def _ranking(self, scores: Scores) -> Tensor:
        """Returns the ranking with the balance bias and the group limit, -inf for experts outside the allowed groups.

        Both are defined on scores, not on their logarithms.
        """
        ranking_TE = scores.ranking_TE
        scores_TE = scores.scores_TE.detach()
        if self.balance_bias_E is not None:
            ranking_TE = scores_TE = scores_TE + self.balance_bias_E.to(scores_TE.dtype)
        groups = self.config.group_limit
        if groups is None:
            return ranking_TE
        best_TGe = scores_TE.unflatten(1, (groups.count, -1)).sort(dim=2, descending=True).values
        group_TG = best_TGe[:, :, :2].sum(2) if groups.score == "top2_sum" else best_TGe[:, :, 0]
        allowed_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, stable_topk(group_TG, groups.limit), True)
        allowed_TE = allowed_TG.repeat_interleave(self.num_experts // groups.count, dim=1)
        return ranking_TE.masked_fill(~allowed_TE, -torch.inf)


class HashConfig(TokenChoiceSettings):
    """Sends each token id to k fixed experts with weights 1 / k, by a hash (Hash Layers, Roller et al. 2021)."""

    kind: Literal["hash"]
    k: int = Field(default=1, ge=1)
    """Sets the number of experts that each token is sent to."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seeds the hash."""


class HashRouter(Router):
    """Chooses the experts of a token by a hash of its token id. It has no parameters."""

    Config = HashConfig
    config: HashConfig

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        if batch.ids_T is None:
            raise ValueError("router.kind 'hash' needs the token ids: give StepContext.token_ids_BS")
        flat_TE = x_TD.new_zeros(len(x_TD), self.num_experts)
        # Ranks a token's experts by a hash of the token id and the expert, so that its k experts are always distinct.
        ranking_TE = random.uniform(random.mix(self.config.seed), batch.ids_T, self.num_experts)
        return Scores(flat_TE, flat_TE, flat_TE + 1 / self.num_experts, flat_TE + 1 / self.num_experts, ranking_TE)

    def weights(self, scores: Scores | RoutingPlan, expert_ids_TK: Tensor, counted_TK: Tensor | None) -> Tensor:
        counted_TK = torch.ones_like(expert_ids_TK) if counted_TK is None else counted_TK
        return counted_TK.to(scores.scores_TE.dtype) / counted_TK.sum(1, keepdim=True).clamp(min=1)
