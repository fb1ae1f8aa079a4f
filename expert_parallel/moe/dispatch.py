"""Dispatchers: carry each token to the experts of its plan, and bring the outputs back, added up.

A dispatcher is a list of hops (hop.py), and then the sorting of what has arrived by local expert. It owns no parameters
and keeps nothing between calls: what `combine` needs is returned by `dispatch`. `DISPATCHERS` maps each `kind:` to the
function that lists its hops.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from expert_parallel.collectives import Peers, group_rank, group_size
from expert_parallel.mesh import Nodes
from expert_parallel.moe.broadcast import BroadcastHop
from expert_parallel.moe.hop import Hop, HopState, PassKey, RowChoices, agree, choices_of, look_up
from expert_parallel.moe.ledger import Ledger
from expert_parallel.moe.permute import gather_rows, sort_by_expert, sources_table
from expert_parallel.moe.plan import DispatchedTokens, RoutingPlan, StepContext
from expert_parallel.placement import ExpertPlacement
from expert_parallel.settings import Settings


class LocalConfig(Settings):
    """All experts on this rank: no exchange. Outputs are added in choice order."""

    kind: Literal["local"]


class ExchangeSettings(Settings):
    """exchange_dtype: rows travel as the model has them, or as `bfloat16` (half the bytes of float32 experts,
    rounded)."""

    exchange_dtype: Literal["model", "bfloat16"] = "model"


class AllToAllConfig(ExchangeSettings):
    """Variable-size all-to-all over the expert-parallel group.

    `one_row_per: rank`: a token goes to a rank once, whatever its top-k. `choice`: once for each choice: more bytes,
    and outputs bit-equal for every ep over the same tokens (on the CPU, one thread).
    """

    kind: Literal["all_to_all"] = "all_to_all"
    one_row_per: Literal["rank", "choice"] = "rank"


class AllGatherConfig(ExchangeSettings):
    """Every rank gets every token of the group, and returns what its experts made of those that chose them. For small
    groups, or where most tokens go to most ranks anyway (Megatron-Core's allgather dispatcher)."""

    kind: Literal["all_gather"]


class HierarchicalConfig(ExchangeSettings):
    """Two hops: between nodes, to the rank with this one's place; then within that node. A token crosses to a node at
    most once, and to a rank of it at most once (as Tutel's 2D all-to-all and DeepEP do)."""

    kind: Literal["hierarchical"]
    one_row_per: Literal["rank", "choice"] = "rank"


DispatcherConfig = Annotated[
    LocalConfig | AllToAllConfig | AllGatherConfig | HierarchicalConfig, Field(discriminator="kind")
]


def local_hops(config: LocalConfig, placement: ExpertPlacement, group: Any, nodes: Nodes | None) -> list[Hop]:
    if placement.num_ranks > 1:
        raise ValueError(
            f"model.moe.dispatcher.kind 'local' cannot reach the experts of other ranks: parallel.ep is "
            f"{placement.num_ranks}, it must be 1 (or use 'all_to_all')"
        )
    return []


def all_to_all_hops(config: AllToAllConfig, placement: ExpertPlacement, group: Any, nodes: Nodes | None) -> list[Hop]:
    peers = Peers.of(group, nodes.ranks_per_node if nodes else None)
    return [Hop("", peers, placement.rank_of_expert, config.one_row_per == "rank", _dtype(config))]


def all_gather_hops(config: AllGatherConfig, placement: ExpertPlacement, group: Any, nodes: Nodes | None) -> list[Hop]:
    peers = Peers.of(group, nodes.ranks_per_node if nodes else None)
    return [BroadcastHop("", peers, placement.rank_of_expert, True, _dtype(config))]


def hierarchical_hops(
    config: HierarchicalConfig, placement: ExpertPlacement, group: Any, nodes: Nodes | None
) -> list[Hop]:
    if placement.num_ranks == 1:  # a model alone takes the config of any layout
        nodes = Nodes(1, None, None)
    if nodes is None:
        raise ValueError("model.moe.dispatcher.kind 'hierarchical' needs to know the nodes: give the layer `nodes`")
    between, within = Peers.of(nodes.rail_group, nodes.ranks_per_node), Peers.of(nodes.node_group, nodes.ranks_per_node)
    assert between.size * within.size == placement.num_ranks, (between, within, placement)
    merge, dtype = config.one_row_per == "rank", _dtype(config)
    return [
        Hop("between nodes: ", between, [rank // within.size for rank in placement.rank_of_expert], merge, dtype),
        Hop("within the node: ", within, [rank % within.size for rank in placement.rank_of_expert], merge, dtype),
    ]


def _dtype(config: ExchangeSettings) -> torch.dtype | None:
    return None if config.exchange_dtype == "model" else torch.bfloat16


DISPATCHERS: dict[str, Callable[..., list[Hop]]] = {
    "local": local_hops,
    "all_to_all": all_to_all_hops,
    "all_gather": all_gather_hops,
    "hierarchical": hierarchical_hops,
}


@dataclass(frozen=True)
class CombineState:
    """What `combine` needs. row_R: the arrived row behind each computed one; computed_VK: the computed rows of each
    arrived one, in choice order."""

    hops: list[HopState]
    row_R: Tensor
    computed_VK: Tensor


class Dispatcher:
    """group: the ranks over which `placement` spreads the experts; None: all are here. nodes: how they lie on
    machines."""

    def __init__(
        self,
        config: Any,
        placement: ExpertPlacement,
        group: dist.ProcessGroup | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        assert placement.num_ranks == group_size(group), (placement, group_size(group))
        self.peers = Peers.of(group)
        self.hops = DISPATCHERS[config.kind](config, placement, group, nodes)
        self.num_local_experts = len(placement.experts_on(group_rank(group)))
        self.slot_of_expert_E = torch.tensor(placement.slot_of_expert, device="cpu")

    def dispatch(
        self, x_TD: Tensor, plan: RoutingPlan, ledger: Ledger, context: StepContext
    ) -> tuple[DispatchedTokens, CombineState]:
        """Rows for this rank's experts."""
        num_choices = plan.expert_ids_TK.shape[1]
        needs_grad = x_TD.requires_grad and torch.is_grad_enabled()
        key = PassKey(x_TD.shape[1], x_TD.dtype, num_choices, needs_grad, context)
        if len(self.hops) > 1:  # a hop asks its own peers alone: others would wait for a rank that has raised
            agree(key, self.peers, x_TD.device)
        x_VD, choices, states = x_TD, choices_of(plan), []
        for hop in self.hops:
            x_VD, choices, state = hop.send(x_VD, choices, key, ledger)
            states.append(state)
        return self._sort(x_VD, choices, num_choices, states)

    def combine(self, y_RD: Tensor, state: CombineState, ledger: Ledger) -> Tensor:
        """y_TD, in the order of x_TD: the sum of each token's weighted outputs, in a fixed order: choice order within
        a rank, then rank order (hierarchical: the ranks of a node, then nodes); with `one_row_per: choice`, choice
        order."""
        y_VD = gather_rows(y_RD, state.computed_VK, state.row_R)
        for hop, hop_state in zip(reversed(self.hops), reversed(state.hops), strict=True):
            y_VD = hop.back(y_VD, hop_state, ledger)
        return y_VD

    def _sort(
        self, x_VD: Tensor, choices: RowChoices, num_choices: int, states: list[HopState]
    ) -> tuple[DispatchedTokens, CombineState]:
        """Spreads each arrived row over its choices, grouped by local expert."""
        self.slot_of_expert_E = self.slot_of_expert_E.to(x_VD.device)
        order_R, counts_e = sort_by_expert(self.slot_of_expert_E[choices.expert_N], self.num_local_experts)
        place_N = torch.empty_like(order_R)
        place_N[order_R] = torch.arange(len(order_R), device=order_R.device)
        width = min(num_choices, self.num_local_experts)
        computed_VK = look_up(place_N, sources_table(choices.row_N, len(x_VD), width))
        row_R = choices.row_N[order_R]
        tokens = DispatchedTokens(gather_rows(x_VD, row_R, computed_VK), counts_e, choices.weight_N[order_R])
        return tokens, CombineState(states, row_R, computed_VK)
