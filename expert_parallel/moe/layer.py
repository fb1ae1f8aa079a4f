"""Implements the mixture-of-experts layer: route, apply capacity, dispatch, compute, combine."""

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from expert_parallel.moe.capacity.policies import POLICIES, CapacitySettings, DroplessConfig
from expert_parallel.moe.capacity.receive_bound import apply_receive_bound
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.conservation import count_choices
from expert_parallel.moe.context import (
    RecordedChoices,
    StepContext,
    TokenBatch,
    dropout_seed,
    find_recorded,
    token_batch,
)
from expert_parallel.moe.dispatch.dispatcher import Dispatcher
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.dispatch.row_index import IndexTable
from expert_parallel.moe.experts.ddp import active_ddp, check_ddp
from expert_parallel.moe.experts.grouped import GroupedExperts
from expert_parallel.moe.parameters import init_parameters
from expert_parallel.moe.routers.losses import loss_name, router_losses
from expert_parallel.moe.routers.registry import build_router
from expert_parallel.moe.types import LoadStats, MoEOutput, RoutingPlan, RowCounts
from expert_parallel.nn.ffn import FFN, Linear
from expert_parallel.parallel.collectives import Peers, all_reduce_sum, group_rank, group_size
from expert_parallel.parallel.mesh import NodeGroups
from expert_parallel.parallel.placement import ExpertPlacement

INIT_STD = 0.02  # of the initial weights of a layer that is used alone


class MoELayer(nn.Module):
    """Computes y = sum over the chosen experts of weight_i * Expert_i(x) (+ shared experts), with the experts sharded
    over `ep_group`.

    `ep_group`: the expert-parallel ranks; None: this rank holds every expert. data_group: all ranks whose tokens make
    up a micro-step, for balance losses and scopes; default: `ep_group`. placement: which rank holds which expert;
    default: contiguous. nodes: which ranks of `ep_group` share a machine. sequence_group: the ranks over which each
    sequence is divided; default: every sequence is whole on its rank (see StepContext.positions_S). etp_group: the
    ranks over which the hidden columns of each expert are sharded. seed: initial weights are a function of it and of
    each weight's name; give each layer of a model a different one.

    Weights are float32 (or what `.double()`, `.bfloat16()` make of them). The layer computes in its input's dtype, or
    under autocast in the dtype of autocast, as linear layers do; the router computes in promote_types(float32, the
    input's dtype), also under autocast. `torch.compile` compiles what is around the layer, with one graph break for
    each layer, and leaves the layer as it is.

    After the backward pass the gradients of the router and of shared experts are this rank's part: SUM them over
    data_group. Expert gradients are already summed over `ep_group`, since their ranks' rows were computed here, and
    those of ETP-sharded weights over etp_group too. b_out is replicated over etp_group: SUM its gradient over that
    group. Where other ranks hold copies of these experts, SUM over those as well. `prepare_data_parallel` (see
    moe/data_parallel.py) changes all this to means, for DistributedDataParallel and its kin.
    """

    def __init__(
        self,
        config: MoEConfig,
        ep_group: dist.ProcessGroup | None = None,
        data_group: dist.ProcessGroup | None = None,
        placement: ExpertPlacement | None = None,
        seed: int = 0,
        nodes: NodeGroups | None = None,
        *,
        sequence_group: dist.ProcessGroup | None = None,
        etp_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        groups = {"ep_group": ep_group, "data_group": data_group, "sequence_group": sequence_group}
        check_arguments(config, groups | {"etp_group": etp_group})
        assert config.d_model is not None
        placement = placement or ExpertPlacement.contiguous(config.num_experts, group_size(ep_group))
        check_placement(placement, config.num_experts, group_size(ep_group))
        self.config = config
        self.seed = seed
        self.ep_group = ep_group
        self.placement = placement
        self.data_group = data_group if data_group is not None else ep_group
        self.sequence_group = sequence_group
        self.etp_group = etp_group
        sequence_ranks, data_ranks = set(Peers.of(sequence_group).ranks), set(Peers.of(self.data_group).ranks)
        if not sequence_ranks <= data_ranks:
            raise ValueError(
                f"sequence_group has the ranks {sorted(sequence_ranks)} and data_group has {sorted(data_ranks)}: every "
                "rank of sequence_group must be in data_group"
            )
        # With capacity.pad and scope `sequence`, one rank of the EP group counts the capacity of each divided sequence.
        (my_rank,) = Peers.of(None).ranks
        self.is_first_of_sequence_group = min(sequence_ranks & set(Peers.of(ep_group).ranks)) == my_rank
        self.router = build_router(config.router, config.d_model, config.num_experts)
        self.dispatcher = Dispatcher(config.dispatcher, placement, ep_group, nodes)
        self.experts = GroupedExperts(
            config.experts,
            config.d_model,
            placement.experts_on(group_rank(ep_group)),
            etp_group,
            ep_group,
            num_experts=config.num_experts,
        )
        self.expert_data_group: dist.ProcessGroup | None = None
        self.syncs_experts = True  # False within DDP's no_sync
        self._mark_experts()
        self.rank_of_expert_E = IndexTable(placement.rank_of_expert)
        self.index_tables = nn.ModuleList(self.dispatcher.index_tables)
        self.shared_experts = FFN(config.shared_experts, config.d_model) if config.shared_experts else None
        self.shared_expert_gate = Linear(config.d_model, 1, bias=False) if config.shared_expert_gate else None
        if not self.experts.w_in.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial weights again, as after `to_empty`: a function of the layer's seed and each weight's name,
        and not of torch's random state. The balance bias becomes 0."""
        init_parameters(self, self.seed, std=lambda name: INIT_STD)
        if (bias_E := getattr(self.router, "balance_bias_E", None)) is not None:
            bias_E.zero_()

    def __deepcopy__(self, memo: dict[int, Any]) -> "MoELayer":
        """Copies the weights and shares the process groups, which cannot be copied."""
        groups = (self.ep_group, self.data_group, self.sequence_group, self.etp_group, self.expert_data_group)
        memo |= {id(group): group for group in groups}
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        copied._mark_experts()  # copies of parameters have neither the attributes nor the hooks of the originals
        if self.experts.reduction == "mean":
            copied._register_average()
        return copied

    def use_mean_reduction(self, expert_data_group: dist.ProcessGroup | None) -> None:
        """Fits the layer to a loss that is a mean on each rank and to gradients that are averaged over ranks.

        The losses of the layer are then multiplied by the number of ranks of data_group, the gradients of experts
        divided by the number of ranks whose rows they sum up, and averaged over `expert_data_group`, the ranks that
        hold copies of them. Users call `prepare_data_parallel`.
        """
        if self.experts.reduction == "sum":
            self.experts.reduction = "mean"
            self._register_average()
        self.expert_data_group = expert_data_group

    def _mark_experts(self) -> None:
        """Sets `allreduce = False`, by which DeepSpeed knows experts, on weights that are this rank's alone."""
        for parameter in self.experts.parameters() if self.experts.num_ranks > 1 else ():
            parameter.allreduce = False  # type: ignore[attr-defined]

    def _register_average(self) -> None:
        for parameter in self.experts.parameters():
            is_trained = parameter.requires_grad
            parameter.requires_grad_(True)  # or torch refuses the hook; a frozen weight may be trained later
            parameter.register_post_accumulate_grad_hook(self._average_gradient)
            parameter.requires_grad_(is_trained)

    def _average_gradient(self, parameter: Tensor) -> None:
        """Averages an expert weight's gradient, with all that it has accumulated, over expert_data_group."""
        if self.syncs_experts and group_size(self.expert_data_group) > 1:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=self.expert_data_group)
            parameter.grad /= group_size(self.expert_data_group)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what pickle stores. Raises a TypeError if the layer has process groups, which cannot be pickled."""
        if any(group is not None for group in (self.ep_group, self.data_group, self.sequence_group, self.etp_group)):
            raise TypeError(
                "a MoELayer with process groups cannot be pickled: save layer.state_dict() and build the layer again"
            )
        return self.__dict__.copy()

    @torch.compiler.disable(reason="the numbers of rows that ranks exchange become shapes")
    def forward(self, x: Tensor, context: StepContext | None = None) -> MoEOutput:
        """Routes the tokens, applies capacity, dispatches them to their experts, computes and combines. Returns the
        output, the auxiliary losses and the counts.

        x: (B, S, D), or (T, D) as one sequence. Every rank of the layer's groups calls it; B and S may differ between
        ranks and be 0.

        Raises a ValueError for input of another shape, and on all ranks together if they are not in the same pass. An
        error on one rank alone (its own input is wrong) leaves the others waiting, so it must end the process.
        """
        if (ddp := active_ddp()) is not None:
            self._follow_ddp(ddp)
        context = StepContext() if context is None else context
        x_BSD = self._check_input(x, context)
        x_TD = x_BSD.flatten(0, 1)
        batch = token_batch(x_BSD, context, self.data_group, self.sequence_group)
        ledger = Ledger(self.config.ledger, context.layer, context.step, micro_step=context.micro_step)

        recorded = find_recorded(batch, self.router.num_choices)
        routed = self.router(x_TD, batch, recorded and recorded.routed)
        plan = self._plan_with_capacity(routed, batch, recorded)
        losses, pooled = router_losses(self.config.losses, routed, batch)

        x_TD = cast_for_autocast(x_TD)
        pending = self.dispatcher.dispatch(x_TD, plan, ledger, context)
        # Shared experts run while the first exchange is in progress.
        shared_TD = self._shared_output(x_TD)
        for chunk in pending.receive_chunks():
            chunk.start_combine(self.experts(chunk.tokens, dropout_seed=dropout_seed(context) + chunk.number))
        y_TD = pending.combine()
        if shared_TD is not None:
            y_TD = y_TD + shared_TD

        # With a mean over ranks to come, each rank's share counts as often as there are ranks.
        factor = group_size(self.data_group) if self.experts.reduction == "mean" else 1
        weighted = {loss_name(c): factor * c.coefficient * losses[loss_name(c)] for c in self.config.losses}
        if factor > 1:
            pooled = {name: (fraction, factor * probability) for name, (fraction, probability) in pooled.items()}
        stats = LoadStats(
            **count_choices(routed, plan, batch.real_T),
            computed_E=pending.computed_E,
            rows=RowCounts.of(ledger.log),
            log=ledger.log,
            checksums=ledger.checksums,
            gathered_bytes=batch.scope_bytes.sent,
            losses={name: value.detach() for name, value in losses.items()},
        )
        return MoEOutput(y_TD.view(x.shape), weighted, stats, pooled)

    def _shared_output(self, x_TD: Tensor) -> Tensor | None:
        """Returns the output of the shared experts, times their gate if there is one; None without shared experts."""
        if self.shared_experts is None:
            return None
        y_TD: Tensor = self.shared_experts(x_TD)
        return y_TD if self.shared_expert_gate is None else self.shared_expert_gate(x_TD).sigmoid() * y_TD

    def _follow_ddp(self, ddp: DistributedDataParallel) -> None:
        """Leaves out averages within DDP's no_sync. Raises a ValueError, on all ranks, if this DDP would give wrong
        gradients; checked once for each DDP object."""
        if torch.is_grad_enabled():  # as DDP decides; so recomputation, which runs outside of DDP's forward, has no say
            self.syncs_experts = ddp.require_backward_grad_sync
        checked: set[int] = vars(ddp).setdefault("checked_moe_layers", set())
        if id(self) not in checked:
            num_loss_ranks = group_size(self.data_group) if self.config.losses else 0
            check_ddp(ddp, self.experts, group_size(self.expert_data_group), num_loss_ranks)
            checked.add(id(self))

    def _check_input(self, x: Tensor, context: StepContext) -> Tensor:
        """Returns the input as (B, S, D). Raises a ValueError if it has another shape, and a TypeError if the context
        is something else."""
        if not isinstance(context, StepContext):
            raise TypeError(f"the context is a {type(context).__name__}: give a StepContext, such as (mask_BS=mask)")
        if not x.is_floating_point() or x.dim() not in (2, 3) or x.shape[-1] != self.config.d_model:
            raise ValueError(
                f"the layer takes floating-point input of shape (B, S, {self.config.d_model}) or (T, "
                f"{self.config.d_model}), d_model last; the input is {x.dtype} of shape {tuple(x.shape)}"
            )
        return x if x.dim() == 3 else x[None]

    def _plan_with_capacity(
        self, routed: RoutingPlan, batch: TokenBatch, recorded: RecordedChoices | None
    ) -> RoutingPlan:
        """Returns the plan after capacity, or the recorded one. Records it if the context has a replay.

        Weights are recomputed for the remaining choices if these can differ from the router's. Under a replay they
        always are, so that a pass and its repetition run the same operations.
        """
        replay = batch.context.replay
        if recorded is None:
            with torch.no_grad():  # decisions have no gradient; weights are recomputed below, with one
                limited = self._apply_capacity(routed, batch)
            plan = replace(
                routed,
                expert_ids_TK=limited.expert_ids_TK,
                outcome_TK=limited.outcome_TK,
                rows_per_expert=limited.rows_per_expert,
            )
            if replay is not None:
                replay.record(batch.context, RecordedChoices.of(batch.index_T, routed, plan))
        else:
            plan = recorded.apply_to(routed)
        capacity = self.config.capacity
        renormalise = isinstance(capacity, CapacitySettings) and capacity.renormalise
        reroutes = isinstance(capacity, CapacitySettings) and capacity.overflow == "reroute"
        if not (renormalise or reroutes or replay is not None):
            return plan
        counted_TK = plan.kept_TK if renormalise else None
        return replace(plan, weights_TK=self.router.weights(plan, plan.expert_ids_TK, counted_TK))

    def _apply_capacity(self, routed: RoutingPlan, batch: TokenBatch) -> RoutingPlan:
        """Returns the plan with overflowing choices dropped or rerouted. Without gradients."""
        capacity = self.config.capacity
        if batch.context.dropless:
            return routed
        plan, rows_per_expert = POLICIES[capacity.kind](capacity, routed, batch, self.training)
        if isinstance(capacity, DroplessConfig):
            if capacity.receive_bound is None:
                return plan
            rank_TK = self.rank_of_expert_E(plan.expert_ids_TK)
            return apply_receive_bound(capacity.receive_bound, plan, rank_TK, self.ep_group)
        if not capacity.pad:
            return plan
        assert rows_per_expert is not None
        if capacity.scope == "global" or group_size(self.ep_group) == 1:
            return replace(plan, rows_per_expert=rows_per_expert)
        own_rows = rows_per_expert if capacity.scope != "sequence" or self.is_first_of_sequence_group else 0
        total = all_reduce_sum(batch.index_T.new_tensor(own_rows), self.ep_group)
        return replace(plan, rows_per_expert=int(total))  # the host waits: the number becomes a shape


def cast_for_autocast(x: Tensor) -> Tensor:
    """Returns x in the dtype of autocast if autocast is enabled for its device, else x itself. As for torch's own
    operators, float64 stays."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def check_arguments(config: Any, groups: dict[str, Any]) -> None:
    """Raises a TypeError, which says what to pass, if the config or a group is of another type, and a ValueError if the
    config has no width."""
    if not isinstance(config, MoEConfig):
        raise TypeError(f"the config is a {type(config).__name__}: give MoEConfig.model_validate({{...}})")
    if config.d_model is None:
        raise ValueError("d_model is not set: a layer that is used alone needs it")
    for name, group in groups.items():
        if isinstance(group, DeviceMesh):
            raise TypeError(f"{name} is a DeviceMesh: give the group of one of its dimensions, mesh['ep'].get_group()")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"{name} is a {type(group).__name__}: give a torch.distributed.ProcessGroup, or None")


def check_placement(placement: ExpertPlacement, num_experts: int, num_ranks: int) -> None:
    """Raises a ValueError if a placement is of other experts or ranks, or leaves a rank without experts."""
    sizes = [len(placement.experts_on(rank)) for rank in range(placement.num_ranks)]
    if (placement.num_experts, placement.num_ranks) != (num_experts, num_ranks) or 0 in sizes:
        raise ValueError(
            f"placement spreads {placement.num_experts} experts over {placement.num_ranks} ranks as {sizes}; "
            f"num_experts is {num_experts}, the group has {num_ranks} ranks, and each rank needs at least one expert"
        )
