"""Routers: which experts each token goes to, and with which weight. x_TD -> RoutingPlan.

This file: what all of them share, top-k and hash. Those with noise stand in `noisy.py`, those that look across
tokens in `across_tokens.py`, the dict of all in `registry.py`. A router owns its parameters and knows nothing of
capacity or losses.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AliasChoices, Field
from torch import Tensor, nn

from expert_parallel.moe.context import TokenBatch, pass_seed
from expert_parallel.moe.types import Outcome, RoutingPlan
from expert_parallel.nn import random
from expert_parallel.nn.random import Stream
from expert_parallel.settings import Settings

Score = Literal["softmax", "sigmoid"]


class RouterSettings(Settings):
    """Is the base class of every router's settings."""

    kind: str

    @property
    def normalizes(self) -> bool:
        """Returns True if a token's weights sum to 1. A registered router may define `normalise` itself."""
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
    """What a router thinks of its tokens. log_scores_TE: log of the scores up to a number of each token's own; a
    softmax over it normalises exactly, without the epsilon that a sum of sigmoids needs and that a router can
    learn to hide under. The rest: see RoutingPlan."""

    logits_TE: Tensor
    log_scores_TE: Tensor
    scores_TE: Tensor
    probabilities_TE: Tensor
    ranking_TE: Tensor


def score_logits(logits_TE: Tensor, score: Score) -> Scores:
    """Ranked by log scores, which stay apart where scores round to equals (sigmoids of logits beyond 17 in float32)."""
    log_scores_TE = logits_TE if score == "softmax" else F.logsigmoid(logits_TE)
    probabilities_TE = log_scores_TE.softmax(-1)
    scores_TE = probabilities_TE if score == "softmax" else logits_TE.sigmoid()
    return Scores(logits_TE, log_scores_TE, scores_TE, probabilities_TE, log_scores_TE.detach())


def stable_topk(ranking_TE: Tensor, k: int) -> Tensor:
    """The k largest, descending, the smaller number first on ties, which topk leaves open; NaN is larger than all."""
    num_experts = ranking_TE.shape[1]
    assert k <= num_experts, (k, num_experts)
    has_numpy = ranking_TE.is_cpu and ranking_TE.dtype in (torch.float32, torch.float64)
    return stable_topk_numpy(ranking_TE, k) if has_numpy and 4 * k <= num_experts else stable_topk_int64(ranking_TE, k)


def stable_topk_numpy(ranking_TE: Tensor, k: int) -> Tensor:
    """`stable_topk` for few of many on the CPU: k times the first largest that is left, by numpy (log in
    moe/MEASUREMENTS.md)."""
    num_tokens, num_experts = ranking_TE.shape
    lowest = torch.finfo(ranking_TE.dtype).min  # so that nothing is as small as what has been taken
    left_TE = ranking_TE.detach().clamp(min=lowest).contiguous().numpy()
    places_TK, start_T = np.empty((num_tokens, k), np.int64), np.arange(num_tokens) * num_experts
    for number in range(k):
        place_T = places_TK[:, number] = left_TE.argmax(1)
        left_TE.ravel()[start_T + place_T] = -np.inf
    return torch.from_numpy(places_TK)


def stable_topk_int64(ranking_TE: Tensor, k: int) -> Tensor:
    """`stable_topk` on any device. float32 numbers become int64 ones of the same order, whose lower half holds the
    expert's number, so that no two are equal and topk is deterministic, without a sort of all experts."""
    if ranking_TE.dtype != torch.float32 or ranking_TE.numel() == 0:
        return ranking_TE.sort(dim=1, descending=True, stable=True).indices[:, :k]
    num_experts = ranking_TE.shape[1]
    bits_TE = (ranking_TE + 0.0).view(torch.int32)  # + 0.0: the negative zero is a zero
    bits_TE = bits_TE.masked_fill(ranking_TE.isnan(), 0x7FC00000)  # first, whatever its sign: as in a sort
    order_TE = (bits_TE ^ (bits_TE >> 31 & 0x7FFFFFFF)).long() << 32
    last_first_E = torch.arange(num_experts - 1, -1, -1, device=ranking_TE.device)
    return num_experts - 1 - (order_TE.bitwise_or_(last_first_E).topk(k, dim=1).values & 0xFFFFFFFF)


class Router(nn.Module):
    """The frame of every router: score, choose, weigh.

    A router of your own overrides `score`; `choose` where it does not take the k best; `weights`, unless it derives
    from LinearRouter. One line registers it: `ROUTERS["mine"] = MyRouter` (see moe/README.md).

    Config: the class of its settings. When it plays recorded choices back, only `choose` is left out.
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
        """x_TD in router dtype."""
        raise NotImplementedError

    def choose(self, scores: Scores, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """(expert_ids_TK, outcome_TK), without gradient."""
        expert_ids_TK = stable_topk(scores.ranking_TE, self.num_choices)
        return expert_ids_TK, torch.full_like(expert_ids_TK, Outcome.KEPT, dtype=torch.uint8)

    def weights(self, scores: Scores | RoutingPlan, expert_ids_TK: Tensor, counted_TK: Tensor | None) -> Tensor:
        """The factor of each choice's output; where the router normalises, over the counted choices alone."""
        raise NotImplementedError

    def forward(self, x_TD: Tensor, batch: TokenBatch, recorded: tuple[Tensor, Tensor] | None = None) -> RoutingPlan:
        """x_TD: any float dtype; computes in promote_types(float32, x's dtype), also under autocast. recorded: choices
        to take instead. What stands in padded rows does not matter, NaN included."""
        x_TD = x_TD.to(torch.promote_types(torch.float32, x_TD.dtype))
        if batch.real_T is not None:
            x_TD = x_TD.masked_fill(~batch.real_T[:, None], 0)
        with torch.autocast(x_TD.device.type, enabled=False):
            return self._route(x_TD, batch, recorded)

    def _route(self, x_TD: Tensor, batch: TokenBatch, recorded: tuple[Tensor, Tensor] | None) -> RoutingPlan:
        scores = self.score(x_TD, batch)
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
        )


class LinearRouter(Router):
    """Logits x W + b, in router dtype; weights are the chosen experts' scores times `scale`."""

    config: LinearSettings

    def __init__(self, config: Any, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.bias else None

    def logits(self, x_TD: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x_TD.dtype)
        return F.linear(x_TD, self.weight.to(x_TD.dtype), bias)

    def weights(self, scores: Scores | RoutingPlan, expert_ids_TK: Tensor, counted_TK: Tensor | None) -> Tensor:
        if not self.config.normalise:
            return scores.scores_TE.gather(1, expert_ids_TK) * self.config.scale
        assert scores.log_scores_TE is not None
        chosen_TK = scores.log_scores_TE.gather(1, expert_ids_TK)
        if counted_TK is not None:  # a token without any gets weights of 0, not NaN
            lowest = torch.finfo(chosen_TK.dtype).min
            chosen_TK = chosen_TK.masked_fill(~counted_TK, lowest)
            return chosen_TK.softmax(-1).masked_fill(~counted_TK, 0) * self.config.scale
        return chosen_TK.softmax(-1) * self.config.scale


class GroupLimitConfig(Settings):
    """Limits each token to the experts of its best groups; groups on one node or rank bound its traffic."""

    count: int = Field(ge=1)
    """Divides the experts into this many groups of consecutive ones."""
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
    """p = score(x W + b); the k largest of (p + balance bias) are chosen, the smaller expert number first on ties.

    Sources: Shazeer et al. 2017 eq. 3 (without noise); Fedus et al. 2021 eq. 1-2 and appendix C (input jitter);
    Jiang et al. 2024 eq. 2; DeepSeek-V3 2024 eq. 12-16 (sigmoid, balance bias: it moves the choice, never a weight).
    """

    Config = TopKRouterConfig
    config: TopKRouterConfig

    def __init__(self, config: TopKRouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
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
        """The balance bias, and the sum of a group's two best, are defined on scores, not on their logarithms."""
        ranking_TE, on_scores_TE = scores.ranking_TE, scores.scores_TE.detach()
        if self.balance_bias_E is not None:
            ranking_TE = on_scores_TE = on_scores_TE + self.balance_bias_E.to(on_scores_TE.dtype)
        groups = self.config.group_limit
        if groups is None:
            return ranking_TE
        best_TGe = on_scores_TE.unflatten(1, (groups.count, -1)).sort(dim=2, descending=True).values
        group_TG = best_TGe[:, :, :2].sum(2) if groups.score == "top2_sum" else best_TGe[:, :, 0]
        allowed_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, stable_topk(group_TG, groups.limit), True)
        allowed_TE = allowed_TG.repeat_interleave(self.num_experts // groups.count, dim=1)
        return ranking_TE.masked_fill(~allowed_TE, -torch.inf)


class HashConfig(TokenChoiceSettings):
    """Sends each token id to k fixed experts with weights 1 / k, by a hash (Hash Layers, Roller et al. 2021)."""

    kind: Literal["hash"]
    k: int = Field(default=1, ge=1)
    """Sets the number of experts that each token is sent to."""
    seed: int = Field(default=0, ge=0)
    """Seeds the hash."""


class HashRouter(Router):
    Config = HashConfig
    config: HashConfig

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        if batch.ids_T is None:
            raise ValueError("router.kind 'hash' needs the token ids: give StepContext.token_ids_BS")
        flat_TE = x_TD.new_zeros(len(x_TD), self.num_experts)
        # The experts of a token, ranked by their hashes with it: the k first are always different ones.
        ranking_TE = random.uniform(random.mix(self.config.seed), batch.ids_T, self.num_experts)
        return Scores(flat_TE, flat_TE, flat_TE + 1 / self.num_experts, flat_TE + 1 / self.num_experts, ranking_TE)

    def weights(self, scores: Scores | RoutingPlan, expert_ids_TK: Tensor, counted_TK: Tensor | None) -> Tensor:
        counted_TK = torch.ones_like(expert_ids_TK) if counted_TK is None else counted_TK
        return counted_TK.to(scores.scores_TE.dtype) / counted_TK.sum(1, keepdim=True).clamp(min=1)
