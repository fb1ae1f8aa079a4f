"""The mixture-of-experts layer: route, limit, dispatch, compute, combine."""

from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from expert_parallel.collectives import group_rank, group_size
from expert_parallel.moe import random
from expert_parallel.moe.balance import LossConfig, count_tokens, loss_name, router_losses
from expert_parallel.moe.capacity import POLICIES, CapacityConfig, DroplessConfig
from expert_parallel.moe.dispatch import DISPATCHERS, Dispatcher, DispatcherConfig
from expert_parallel.moe.experts import ExpertsConfig, GroupedExperts
from expert_parallel.moe.ffn import FFN, FFNConfig
from expert_parallel.moe.parameters import init_parameters
from expert_parallel.moe.plan import MoEOutput, RoutingPlan, StepContext, count_choices
from expert_parallel.moe.routing import ROUTERS, RouterConfig
from expert_parallel.placement import ExpertPlacement
from expert_parallel.settings import Settings


class MoEConfig(Settings):
    """One MoE layer. `d_model` is set here for a layer that is used alone; in a model it comes from `model.d_model`."""

    d_model: Annotated[int, Field(ge=1)] | None = None
    num_experts: int = Field(ge=1)
    router: RouterConfig = RouterConfig()
    capacity: CapacityConfig = DroplessConfig()
    losses: list[LossConfig] = Field(default_factory=list)
    experts: ExpertsConfig
    shared_experts: FFNConfig | None = None
    dispatcher: DispatcherConfig = DispatcherConfig()

    @model_validator(mode="after")
    def _refuse_what_cannot_work(self) -> "MoEConfig":
        k = self.router.k
        if k > self.num_experts:
            raise ValueError(f"router.k ({k}) is larger than num_experts ({self.num_experts})")
        if k == 1 and self.router.normalise:
            raise ValueError(
                "router.normalise is true with router.k = 1: the only weight would always be 1 and the router would "
                "never learn; set router.normalise to false"
            )
        names = [loss_name(loss) for loss in self.losses]
        if len(set(names)) < len(names):
            raise ValueError(f"losses: each kind and scope may stand once, found {', '.join(names)}")
        return self


class MoELayer(nn.Module):
    """y = sum over the chosen experts of weight_i * Expert_i(x) (+ shared experts), with the experts sharded over
    `group`.

    group: the expert-parallel ranks; None = this rank holds every expert.
    data_group: all ranks whose tokens make up a micro-step, for balance losses over all of them; default: `group`.
    placement: which rank holds which expert; default: contiguous.

    seed: initial weights are a function of it and of each weight's name; give each layer of a model one of its own.

    Weights are float32 (or what `.double()`, `.bfloat16()` make of them); the layer computes in its input's dtype,
    the router in promote_types(float32, that). Gradients of router and shared experts are this rank's part: SUM
    them over the data ranks. Gradients of experts already hold every token of the group.
    """

    def __init__(
        self,
        config: MoEConfig,
        group: dist.ProcessGroup | None = None,
        data_group: dist.ProcessGroup | None = None,
        placement: ExpertPlacement | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if config.d_model is None:
            raise ValueError("d_model is not set: a layer that is used alone needs it")
        placement = placement or ExpertPlacement.contiguous(config.num_experts, group_size(group))
        self.config = config
        self.data_group = data_group if data_group is not None else group
        self.router = ROUTERS[config.router.kind](config.router, config.d_model, config.num_experts)
        self.dispatcher: Dispatcher = DISPATCHERS[config.dispatcher.kind](placement, group)
        self.experts = GroupedExperts(config.experts, config.d_model, placement.experts_on(group_rank(group)))
        self.shared_experts = FFN(config.shared_experts, config.d_model) if config.shared_experts else None
        if not self.router.weight.is_meta:
            init_parameters(self, seed, std=lambda name: 0.02)

    def forward(self, x: Tensor, context: StepContext | None = None) -> MoEOutput:
        """x: (B, S, D), or (T, D) as one sequence. Every rank of the group calls it; B and S may differ, even be 0."""
        context = context or StepContext()
        x_BSD = x if x.dim() == 3 else x[None]
        x_TD = x_BSD.flatten(0, 1)

        plan = self.router(x_TD, token_index(x_BSD, context), context)
        losses = self._losses(plan, num_sequences=x_BSD.shape[0])
        plan = POLICIES[self.config.capacity.kind](self.config.capacity, plan, self.training)
        tokens, state = self.dispatcher.dispatch(x_TD, plan)
        y_RD = self.experts(tokens.x_RD, tokens.counts_e, tokens.weights_R, dropout_seed=dropout_seed(context))
        y_TD = self.dispatcher.combine(y_RD, state)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)

        weighted = {loss_name(c): c.coefficient * losses[loss_name(c)] for c in self.config.losses}
        return MoEOutput(y_TD.view(x.shape), weighted, count_choices(plan, state.rows, losses))

    def _losses(self, plan: RoutingPlan, num_sequences: int) -> dict[str, Tensor]:
        if not self.config.losses:
            return {}
        tokens = count_tokens(plan, num_sequences, self.data_group)
        return router_losses(self.config.losses, plan, tokens)


def token_index(x_BSD: Tensor, context: StepContext) -> Tensor:
    """Global index of each token in the micro-step: (index of its sequence) * S + position. int64 (T)."""
    num_sequences, length, _ = x_BSD.shape
    sequence_B = context.sequence_index_B
    if sequence_B is None:
        sequence_B = torch.arange(num_sequences, device=x_BSD.device)
    return (sequence_B[:, None] * length + torch.arange(length, device=x_BSD.device)).flatten()


def dropout_seed(context: StepContext) -> int:
    return random.mix(context.seed, context.step, context.micro_step, context.layer, context.coordinate)
