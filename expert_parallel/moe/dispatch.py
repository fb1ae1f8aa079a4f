"""Dispatchers: carry each token to the experts of its plan, and bring the outputs back, added up.

A dispatcher is a list of hops (hop.py), through which the rows go in chunks (passage.py), and the sorting of what has
arrived by local expert. It owns no parameters and keeps nothing between calls. `DISPATCHERS` maps each `kind:` to the
function that lists its hops.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from expert_parallel.collectives import Peers, group_rank, group_size
from expert_parallel.mesh import Nodes
from expert_parallel.moe.broadcast import BroadcastHop
from expert_parallel.moe.hop import Hop, PassKey, agree
from expert_parallel.moe.ledger import Ledger
from expert_parallel.moe.passage import Passage, chunk_sizes, finish, split
from expert_parallel.moe.permute import NO_ROW, count_keys, gather_rows, inverse, padded_places, stable_argsort
from expert_parallel.moe.plan import DispatchedTokens, RoutingPlan, StepContext
from expert_parallel.moe.travel import RowChoices, choices_of, row_table, without_nowhere
from expert_parallel.placement import ExpertPlacement
from expert_parallel.settings import Settings


class LocalConfig(Settings):
    """All experts on this rank: no exchange. Outputs are added in choice order."""

    kind: Literal["local"]
    # Not settings of this kind: the values that those of the other kinds would have without an exchange.
    exchange_dtype: ClassVar[Literal["model"]] = "model"
    overlap: ClassVar[int] = 1
    one_row_per: ClassVar[Literal["rank"]] = "rank"


class ExchangeSettings(Settings):
    """exchange_dtype: rows travel as the model has them, or as `bfloat16` (half the bytes of float32 experts, rounded).

    overlap: a pass's tokens travel in this many chunks, each while the experts compute another, forward and backward.
    1: all at once. More pays where the exchange is slow beside the experts.
    """

    exchange_dtype: Literal["model", "bfloat16"] = "model"
    overlap: int = Field(default=1, ge=1)


class AllToAllConfig(ExchangeSettings):
    """Variable-size all-to-all over the expert-parallel group.

    `one_row_per: rank`: a token goes to a rank once, whatever its top-k. `choice`: once for each choice: more bytes,
    and outputs bit-equal for every ep over the same tokens (on the CPU, one thread; see moe/README.md).
    """

    kind: Literal["all_to_all"] = "all_to_all"
    one_row_per: Literal["rank", "choice"] = "rank"


class AllGatherConfig(ExchangeSettings):
    """Every rank gets every token of the group, and returns what its experts made of those that chose them. For small
    groups, or where most tokens go to most ranks anyway (Megatron-Core's allgather dispatcher)."""

    kind: Literal["all_gather"]
    one_row_per: ClassVar[Literal["rank"]] = "rank"  # not a setting of this kind: a rank gets each row once


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


# What this rank's experts make of the rows of a chunk: (tokens, number of the chunk) -> y_VD.
Compute = Callable[[DispatchedTokens, int], Tensor]


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
        hops = DISPATCHERS[config.kind](config, placement, group, nodes)
        self.hops = [hop for hop in hops if hop.peers.size > 1]
        self.num_chunks = config.overlap if self.hops else 1
        self.num_local_experts = len(placement.experts_on(group_rank(group)))
        # With a slot behind the local ones, for NOWHERE.
        self.slot_of_expert_E1 = torch.tensor([*placement.slot_of_expert, self.num_local_experts], device="cpu")

    def carry(
        self,
        x_TD: Tensor,
        plan: RoutingPlan,
        ledger: Ledger,
        context: StepContext,
        compute: Compute,
        beside: Callable[[], Tensor] | None = None,
        padded_rows: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(y_TD, served_e): dispatch, compute and combine; and how many choices each local expert served.

        y_TD, in the order of x_TD: the sum of each token's weighted outputs, in a fixed order: choice order within
        a rank (the experts have added those up), then rank order (hierarchical: the ranks of a node, then nodes); with
        `one_row_per: choice`, choice order. beside: what is computed while the first rows travel; it is added.
        padded_rows: what each expert computes, padded with zeros; None: what has come to it.
        """
        num_choices, sizes = plan.expert_ids_TK.shape[1], chunk_sizes(len(x_TD), self.num_chunks)
        parts = (plan.expert_ids_TK, plan.kept_TK, plan.weights_TK)
        chunks = [choices_of(*part) for part in zip(*(split(x, sizes) for x in parts), strict=True)]
        passages = [Passage(x_LD, self.hops, ledger) for x_LD in split(x_TD, sizes)]
        if self.hops:
            needs_grad = x_TD.requires_grad and torch.is_grad_enabled()
            key = PassKey(x_TD.shape[1], x_TD.dtype, num_choices, needs_grad, context)
            chunks, y_beside = self._plan(passages, chunks, key, ledger, beside)
        else:
            self._count_stay(chunks, ledger)
            y_beside = beside and beside()
        if padded_rows is None and not self.hops and not plan.is_whole:  # what has come by a hop goes somewhere
            chunks = [without_nowhere(choices) for choices in chunks]
        sorting = [self._sort(choices, num_choices, padded_rows) for choices in chunks]
        for number, passage in enumerate(passages):
            passage.serve = partial(_serve, compute, sorting[number][0], number)
        y_TD, served_e = finish(passages), torch.stack([served_e for _, served_e in sorting]).sum(0)
        return y_TD if y_beside is None else y_TD + y_beside, served_e

    def _plan(
        self,
        passages: Sequence[Passage],
        chunks: list[RowChoices],
        key: PassKey,
        ledger: Ledger,
        beside: Callable[[], Tensor] | None,
    ) -> tuple[list[RowChoices], Tensor | None]:
        """The choices of each chunk that this rank's experts serve, and what `beside` has computed. All legs of the
        passages are then known, and the first has begun."""
        if len(self.hops) > 1:  # a hop asks its own peers alone: others would wait for a rank that has raised
            agree(key, self.peers, passages[0].x_LD.device)
        y_beside = None
        for hop in self.hops:
            legs, learn = hop.plan(chunks, key, ledger)
            for passage, leg in zip(passages, legs, strict=True):
                passage.legs.append(leg)
            if hop is self.hops[0]:  # its rows need not wait for the rest
                next(passages[0].steps)
                y_beside = beside and beside()
            chunks = learn()
        return chunks, y_beside

    def _count_stay(self, chunks: Sequence[RowChoices], ledger: Ledger) -> None:
        """All experts are here: all rows are this rank's own."""
        for purpose in ("dispatch", "combine"):
            num_rows = [sum(choices.num_rows for choices in chunks)]
            ledger.count_rows(purpose, num_rows, num_rows, self.peers)

    def _sort(self, choices: RowChoices, num_choices: int, padded_rows: int | None) -> tuple[DispatchedTokens, Tensor]:
        """Which arrived row each local expert computes for which choice; without the rows, which have yet to come. And
        how many choices each serves."""
        self.slot_of_expert_E1 = self.slot_of_expert_E1.to(choices.expert_N.device)
        num_local = self.num_local_experts
        slot_N = self.slot_of_expert_E1[choices.expert_N]
        counts_e = served_e = count_keys(slot_N, num_local + 1)[:num_local]
        if padded_rows is None:
            choice_R = stable_argsort(slot_N, num_local)
            place_N = inverse(choice_R)
            row_R = choices.row_N.index_select(0, choice_R)
            weights_R = gather_rows(choices.weight_N, choice_R, place_N)
        else:
            counts_e = slot_N.new_full((num_local,), padded_rows)
            place_N, choice_R = padded_places(slot_N, num_local, padded_rows)
            row_N1 = torch.cat([choices.row_N, choices.row_N.new_full((1,), NO_ROW)])
            row_R = row_N1[choice_R]  # NO_ROW takes the last
            weights_R = gather_rows(choices.weight_N, choice_R[:, None], place_N[:, None])
        computed_VK = row_table(choices, place_N, min(num_choices, num_local))
        return DispatchedTokens(weights_R[:0, None], row_R, computed_VK, counts_e, weights_R), served_e


def _serve(compute: Compute, tokens: DispatchedTokens, number: int, x_VD: Tensor) -> Tensor:
    return compute(replace(tokens, x_VD=x_VD), number)
