"""The mixture-of-experts layer: route, limit, dispatch, compute, combine."""

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expert_parallel.moe.capacity.limit import POLICIES, DroplessConfig, LimitSettings
from expert_parallel.moe.capacity.receive_bound import limit_received
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.conservation import count_choices
from expert_parallel.moe.context import Choices, StepContext, TokenBatch, dropout_seed, find_recorded, token_batch
from expert_parallel.moe.dispatch.dispatcher import Dispatcher
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.dispatch.row_index import IndexTable
from expert_parallel.moe.experts.grouped import GroupedExperts
from expert_parallel.moe.parameters import init_parameters
from expert_parallel.moe.routers.losses import loss_name, router_losses
from expert_parallel.moe.routers.registry import build_router
from expert_parallel.moe.types import LoadStats, MoEOutput, RoutingPlan, RowCounts
from expert_parallel.nn.ffn import FFN
from expert_parallel.parallel.collectives import Peers, all_reduce_sum, group_rank, group_size
from expert_parallel.parallel.mesh import Nodes
from expert_parallel.parallel.placement import ExpertPlacement


class MoELayer(nn.Module):
    """y = sum over the chosen experts of weight_i * Expert_i(x) (+ shared experts), with the experts sharded over
    `group`.

    group: the expert-parallel ranks; None = this rank holds every expert.
    data_group: all ranks whose tokens make up a micro-step, for balance losses and decisions over all of them; default:
    `group`. placement: which rank holds which expert; default: contiguous. nodes: how `group` lies on machines.
    sequence_group: the ranks among which each sequence's tokens are divided; default: this rank has them whole (see
    StepContext.positions_S). etp_group: the ranks among which the hidden columns of the experts are divided.

    seed: initial weights are a function of it and of each weight's name; give each layer of a model one of its own.

    Weights are float32 (or what `.double()`, `.bfloat16()` make of them); the layer computes in its input's dtype,
    the router in promote_types(float32, that).

    After the backward pass the gradients of router and shared experts are this rank's part: SUM them over the ranks of
    data_group. Gradients of experts are complete over `group`, and for what etp_group divides over that too, since the
    rows of all their ranks were computed here; b_out, which etp_group does not divide, is to be summed over it. Where
    other ranks hold copies of these experts, SUM over those.
    """

    def __init__(
        self,
        config: MoEConfig,
        group: dist.ProcessGroup | None = None,
        data_group: dist.ProcessGroup | None = None,
        placement: ExpertPlacement | None = None,
        seed: int = 0,
        nodes: Nodes | None = None,
        *,
        sequence_group: dist.ProcessGroup | None = None,
        etp_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if config.d_model is None:
            raise ValueError("d_model is not set: a layer that is used alone needs it")
        placement = placement or ExpertPlacement.contiguous(config.num_experts, group_size(group))
        sizes = [len(placement.experts_on(rank)) for rank in range(placement.num_ranks)]
        if (placement.num_experts, placement.num_ranks) != (config.num_experts, group_size(group)) or 0 in sizes:
            raise ValueError(
                f"placement spreads {placement.num_experts} experts over {placement.num_ranks} ranks as {sizes}; "
                f"there are {config.num_experts} (num_experts) and {group_size(group)} ranks, each needs one or more"
            )
        self.config, self.group, self.placement = config, group, placement
        self.data_group = data_group if data_group is not None else group
        self.sequence_group, self.etp_group = sequence_group, etp_group
        sharers, data_ranks = set(Peers.of(sequence_group).ranks), set(Peers.of(self.data_group).ranks)
        if not sharers <= data_ranks:
            raise ValueError(
                f"sequence_group has the ranks {sorted(sharers)}, data_group {sorted(data_ranks)}: those whose tokens "
                "make up a micro-step include those that share its sequences"
            )
        # For capacity.pad with scope `sequence`: of the ranks of `group` that share a sequence, the first counts it.
        self.counts_sequences = min(sharers & set(Peers.of(group).ranks)) == Peers.of(None).ranks[0]
        self.router = build_router(config.router, config.d_model, config.num_experts)
        self.dispatcher = Dispatcher(config.dispatcher, placement, group, nodes)
        self.experts = GroupedExperts(
            config.experts, config.d_model, placement.experts_on(group_rank(group)), etp_group
        )
        self.rank_of_expert_E = IndexTable(placement.rank_of_expert)
        self.index_tables = nn.ModuleList(self.dispatcher.index_tables)
        self.shared_experts = FFN(config.shared_experts, config.d_model) if config.shared_experts else None
        if not self.experts.w_in.is_meta:
            init_parameters(self, seed, std=lambda name: 0.02)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MoELayer":
        """Weights are copied, process groups are shared: they cannot be."""
        groups = (self.group, self.data_group, self.sequence_group, self.etp_group)
        memo |= {id(group): group for group in groups}
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def forward(self, x: Tensor, context: StepContext | None = None) -> MoEOutput:
        """Routes, limits, dispatches, computes and combines.

        x: (B, S, D), or (T, D) as one sequence. Every rank of the group calls it; B and S may differ, even be 0.

        ValueError for input of another shape, and on all ranks together where they are not in the same pass. One that a
        single rank raises (its own input is wrong) leaves the others waiting: let it end the process.
        """
        context = context or StepContext()
        x_BSD = self._checked(x)
        x_TD = x_BSD.flatten(0, 1)
        batch = token_batch(x_BSD, context, self.data_group, self.sequence_group)
        ledger = Ledger(self.config.ledger, context.layer, context.step)

        recorded = find_recorded(batch, self.router.num_choices)
        routed = self.router(x_TD, batch, recorded and recorded.routed)
        plan = self._limit(routed, batch, recorded)
        losses, pooled = router_losses(self.config.losses, routed, batch)

        in_flight = self.dispatcher.send(x_TD, plan, ledger, context)
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_TD)  # while the first rows travel
        for chunk in in_flight.arriving():
            chunk.send_back(self.experts(chunk.tokens, dropout_seed=dropout_seed(context) + chunk.number))
        y_TD = in_flight.returned()
        if shared_TD is not None:
            y_TD = y_TD + shared_TD

        weighted = {loss_name(c): c.coefficient * losses[loss_name(c)] for c in self.config.losses}
        stats = LoadStats(
            **count_choices(routed, plan, batch.real_T),
            computed_E=in_flight.computed_E,
            rows=RowCounts.of(ledger.log),
            log=ledger.log,
            gathered_bytes=batch.scope_bytes.sent,
            losses={name: value.detach() for name, value in losses.items()},
        )
        return MoEOutput(y_TD.view(x.shape), weighted, stats, pooled)

    def _checked(self, x: Tensor) -> Tensor:
        """Returns the input as (B, S, D). ValueError where it is of another shape."""
        if not x.is_floating_point() or x.dim() not in (2, 3) or x.shape[-1] != self.config.d_model:
            raise ValueError(
                f"the layer takes floating-point input of shape (B, S, {self.config.d_model}) or (T, "
                f"{self.config.d_model}), d_model last; it was given {x.dtype} of shape {tuple(x.shape)}"
            )
        return x if x.dim() == 3 else x[None]

    def _limit(self, routed: RoutingPlan, batch: TokenBatch, recorded: Choices | None) -> RoutingPlan:
        """Returns the plan as capacity leaves it, or as it was recorded; records it where the context has a replay.

        Weights are computed again for what is left, where it may be other choices than the router made. Under a replay
        that is always done, so that a pass and its repetition compute the same.
        """
        replay = batch.context.replay
        if recorded is None:
            with torch.no_grad():
                limited = self._apply_capacity(routed, batch)
            plan = replace(
                routed,
                expert_ids_TK=limited.expert_ids_TK,
                reason_TK=limited.reason_TK,
                padded_rows=limited.padded_rows,
            )
            if replay is not None:
                replay.record(batch.context, Choices.of(batch.index_T, routed, plan))
        else:
            plan = recorded.put_into(routed)
        capacity = self.config.capacity
        renormalise = isinstance(capacity, LimitSettings) and capacity.renormalise
        reroutes = isinstance(capacity, LimitSettings) and capacity.overflow == "reroute"
        if not (renormalise or reroutes or replay is not None):
            return plan
        counted_TK = plan.kept_TK if renormalise else None
        return replace(plan, weights_TK=self.router.weights(plan, plan.expert_ids_TK, counted_TK))

    def _apply_capacity(self, routed: RoutingPlan, batch: TokenBatch) -> RoutingPlan:
        """Returns the plan with what has no room dropped or rerouted. Without gradients."""
        capacity = self.config.capacity
        if batch.context.dropless:
            return routed
        plan, most = POLICIES[capacity.kind](capacity, routed, batch, self.training)
        if isinstance(capacity, DroplessConfig):
            if capacity.receive_bound is None:
                return plan
            rank_TK = self.rank_of_expert_E(plan.expert_ids_TK)
            return limit_received(capacity.receive_bound, plan, rank_TK, self.group)
        if not capacity.pad:
            return plan
        assert most is not None
        if capacity.scope == "global" or group_size(self.group) == 1:
            return replace(plan, padded_rows=most)
        counts = capacity.scope != "sequence" or self.counts_sequences
        total = all_reduce_sum(batch.index_T.new_tensor(most if counts else 0), self.group)
        return replace(plan, padded_rows=int(total))
