"""Implements dispatchers, which send each token to the experts of its plan and return the sum of their outputs.

A dispatcher is a list of exchanges (all_to_all.py, all_gather.py), through which rows move in chunks (chunk.py); the
last step groups received rows by local expert. It has no parameters and keeps no state between passes. `DISPATCHERS`
maps each `kind:` to the function that builds its exchanges.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from expert_parallel.moe.context import StepContext
from expert_parallel.moe.dispatch.all_gather import AllGatherExchange
from expert_parallel.moe.dispatch.all_to_all import AllToAllExchange
from expert_parallel.moe.dispatch.base import Exchange, Metadata
from expert_parallel.moe.dispatch.chunk import Chunk, chunk_sizes, join, split
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.dispatch.pass_fingerprint import PassFingerprint, check_in_sync
from expert_parallel.moe.dispatch.permute import (
    NO_ROW,
    count_keys,
    gather_rows,
    inverse_permutation,
    padded_positions,
    stable_argsort,
)
from expert_parallel.moe.dispatch.row_index import ChoicesByRow, IndexTable, choices_by_row, row_table, without_dropped
from expert_parallel.moe.types import DispatchedTokens, RoutingPlan
from expert_parallel.parallel.collectives import ExchangeKey, Peers, Phase, group_rank, group_size
from expert_parallel.parallel.mesh import NodeGroups
from expert_parallel.parallel.placement import ExpertPlacement
from expert_parallel.settings import Settings


class LocalConfig(Settings):
    """Keeps all tokens on this rank, which has all experts; outputs are added in the order of the choices."""

    kind: Literal["local"]
    # Not settings of this kind, but the values that the settings of the other kinds have without an exchange.
    exchange_dtype: ClassVar[Literal["model"]] = "model"
    overlap: ClassVar[int] = 1
    one_row_per: ClassVar[Literal["rank"]] = "rank"


class ExchangeSettings(Settings):
    """Is the base class of dispatchers that exchange tokens between ranks."""

    exchange_dtype: Literal["model", "bfloat16"] = "model"
    """Sends rows in the model's dtype, or rounded to bfloat16 (half the bytes of float32)."""
    overlap: int = Field(default=1, ge=1)
    """Splits a pass into this many chunks, so that the exchange of one overlaps the experts' computation of another,
    forward and backward."""


class AllToAllConfig(ExchangeSettings):
    """Sends tokens by a variable-size all-to-all over the expert-parallel group."""

    kind: Literal["all_to_all"] = "all_to_all"
    one_row_per: Literal["rank", "choice"] = "rank"
    """Sends a token once to each rank that has experts of it (`rank`), or once for each choice (`choice`: more bytes,
    and outputs that are bit-equal for every ep on the CPU with one thread)."""


class AllGatherConfig(ExchangeSettings):
    """Sends every token to every rank of the expert-parallel group, for small groups or large k (Megatron-Core's
    allgather dispatcher)."""

    kind: Literal["all_gather"]
    one_row_per: ClassVar[Literal["rank"]] = "rank"  # not a setting of this kind: a rank gets each row once


class HierarchicalConfig(ExchangeSettings):
    """Sends tokens in two steps, first between nodes and then within a node, and at most once to each node (Tutel's 2D
    all-to-all, DeepEP)."""

    kind: Literal["hierarchical"]
    one_row_per: Literal["rank", "choice"] = "rank"
    """Sends a token once to each node and rank that has experts of it (`rank`), or once for each choice (`choice`)."""


DispatcherConfig = Annotated[
    LocalConfig | AllToAllConfig | AllGatherConfig | HierarchicalConfig, Field(discriminator="kind")
]


Exchanges = list[Exchange]


def local_exchanges(config: LocalConfig, placement: ExpertPlacement, group: Any, nodes: NodeGroups | None) -> Exchanges:
    """Returns an empty list, since this rank has all experts. Raises a ValueError if other ranks have experts."""
    if placement.num_ranks > 1:
        raise ValueError(
            f"model.moe.dispatcher.kind 'local' cannot reach the experts of other ranks: parallel.ep is "
            f"{placement.num_ranks}, it must be 1 (or use 'all_to_all')"
        )
    return []


def all_to_all_exchanges(
    config: AllToAllConfig, placement: ExpertPlacement, group: Any, nodes: NodeGroups | None
) -> Exchanges:
    """Returns a list of one exchange, an all-to-all over the expert-parallel group."""
    peers = Peers.of(group, nodes.ranks_per_node if nodes else None)
    return [AllToAllExchange(peers, placement.rank_of_expert, config.one_row_per == "rank", _dtype(config))]


def all_gather_exchanges(
    config: AllGatherConfig, placement: ExpertPlacement, group: Any, nodes: NodeGroups | None
) -> Exchanges:
    """Returns a list of one exchange, an all-gather over the expert-parallel group."""
    peers = Peers.of(group, nodes.ranks_per_node if nodes else None)
    return [AllGatherExchange(peers, placement.rank_of_expert, True, _dtype(config))]


def hierarchical_exchanges(
    config: HierarchicalConfig, placement: ExpertPlacement, group: Any, nodes: NodeGroups | None
) -> Exchanges:
    """Returns two all-to-all exchanges: one between nodes, among the ranks with the same index in their node; then one
    within the node.

    Raises a ValueError if the nodes are not known.
    """
    if placement.num_ranks == 1:  # a model on one rank accepts the config of any layout
        nodes = NodeGroups(1, None, None)
    if nodes is None:
        raise ValueError("model.moe.dispatcher.kind 'hierarchical' needs the nodes: pass `nodes` to the layer")
    between, within = Peers.of(nodes.rail_group, nodes.ranks_per_node), Peers.of(nodes.node_group, nodes.ranks_per_node)
    assert between.size * within.size == placement.num_ranks, (between, within, placement)
    dedup = config.one_row_per == "rank"
    dtype = _dtype(config)
    node_of_expert = [rank // within.size for rank in placement.rank_of_expert]
    place_of_expert = [rank % within.size for rank in placement.rank_of_expert]  # the index of its rank in the node
    return [
        AllToAllExchange(between, node_of_expert, dedup, dtype, "between nodes"),
        AllToAllExchange(within, place_of_expert, dedup, dtype, "within the node"),
    ]


def _dtype(config: ExchangeSettings) -> torch.dtype | None:
    """Returns the dtype of rows in transit; None: unchanged."""
    return None if config.exchange_dtype == "model" else torch.bfloat16


DISPATCHERS: dict[str, Callable[..., Exchanges]] = {
    "local": local_exchanges,
    "all_to_all": all_to_all_exchanges,
    "all_gather": all_gather_exchanges,
    "hierarchical": hierarchical_exchanges,
}


class Dispatcher:
    """Sends tokens to their experts and returns the outputs, through `exchanges`, one after the other.

    group: the ranks over which `placement` spreads the experts; None: this rank has all experts. nodes: which ranks
    share a machine.
    """

    def __init__(
        self,
        config: Any,
        placement: ExpertPlacement,
        group: dist.ProcessGroup | None = None,
        nodes: NodeGroups | None = None,
    ) -> None:
        assert placement.num_ranks == group_size(group), (placement, group_size(group))
        self.peers = Peers.of(group)
        exchanges = DISPATCHERS[config.kind](config, placement, group, nodes)
        self.exchanges = [exchange for exchange in exchanges if exchange.peers.size > 1]
        self.num_chunks = config.overlap if self.exchanges else 1
        self.expert_ids = placement.experts_on(group_rank(group))
        self.num_experts = placement.num_experts
        self.slot_of_expert_E1 = IndexTable([*placement.slot_of_expert, len(self.expert_ids)])  # last: NO_EXPERT
        self.expert_of_slot_e = IndexTable(self.expert_ids)

    @property
    def index_tables(self) -> list[IndexTable]:
        """Returns the integer tables that dispatch looks up (expert to rank, expert to local slot and back).

        The layer registers them as modules, so that they move to the device of its weights.
        """
        exchanges = (exchange.rank_of_expert_E1 for exchange in self.exchanges)
        return [self.slot_of_expert_E1, self.expert_of_slot_e, *exchanges]

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan, ledger: Ledger, context: StepContext) -> "PendingDispatch":
        """Checks that all ranks are in the same pass, exchanges metadata, and starts sending the first rows.

        The caller runs the experts on each chunk that `receive_chunks` of the result yields, then calls its `combine`.
        Raises a ValueError, on all ranks together, if they are not in the same pass.
        """
        num_choices, sizes = plan.expert_ids_TK.shape[1], chunk_sizes(len(x_TD), self.num_chunks)
        parts = (split(x, sizes) for x in (plan.expert_ids_TK, plan.kept_TK, plan.weights_TK))
        choices = [choices_by_row(*chunk) for chunk in zip(*parts, strict=True)]
        chunks = [Chunk(number, x_LD, self.exchanges, ledger) for number, x_LD in enumerate(split(x_TD, sizes))]
        needs_grad = x_TD.requires_grad and torch.is_grad_enabled()
        fingerprint = PassFingerprint(x_TD.shape[1], x_TD.dtype, num_choices, needs_grad, context)
        pending = PendingDispatch(self, chunks, plan.rows_per_expert, fingerprint, ledger)
        if self.exchanges:
            if len(self.exchanges) > 1:  # an exchange checks its own ranks alone; the others would wait forever
                check_in_sync(fingerprint, self.peers, x_TD.device)
            pending.exchange_metadata(self.exchanges[0], choices)
        else:
            self._count_own_rows(len(x_TD), ledger)
            if plan.rows_per_expert is None and not plan.is_dropless:
                choices = [without_dropped(chunk) for chunk in choices]
            pending.metadata = LocalMetadata(choices)
        chunks[0].advance_dispatch()  # before the metadata of later exchanges is known
        return pending

    def _count_own_rows(self, num_rows: int, ledger: Ledger) -> None:
        """Counts every row as staying on this rank, which has all experts."""
        for phase in (Phase.DISPATCH, Phase.COMBINE):
            ledger.count_rows([num_rows], [num_rows], self.peers, ExchangeKey(phase))

    def group_by_expert(
        self, choices: ChoicesByRow, num_choices: int, rows_per_expert: int | None
    ) -> tuple[DispatchedTokens, Tensor]:
        """Groups the choices of received rows by local expert, before the rows themselves have arrived.

        Returns the DispatchedTokens without rows, and the number of choices of each local expert, int64 (e).
        num_choices: K. `rows_per_expert`: see RoutingPlan.
        """
        num_local = len(self.expert_ids)
        slot_N = self.slot_of_expert_E1(choices.expert_N)
        counts_e = choices_e = count_keys(slot_N, num_local + 1)[:num_local]
        if rows_per_expert is None:
            choice_R = stable_argsort(slot_N, num_local)
            place_N = inverse_permutation(choice_R)
            row_R = choices.row_N.index_select(0, choice_R)
            weights_R = gather_rows(choices.weight_N, choice_R, place_N)
        else:
            counts_e = slot_N.new_full((num_local,), rows_per_expert)
            place_N, choice_R = padded_positions(slot_N, num_local, rows_per_expert)
            row_N1 = torch.cat([choices.row_N, choices.row_N.new_full((1,), NO_ROW)])
            row_R = row_N1[choice_R]  # NO_ROW is -1 and reads the last entry
            weights_R = gather_rows(choices.weight_N, choice_R[:, None], place_N[:, None])
        computed_VK = row_table(choices, place_N, min(num_choices, num_local))
        no_rows_VD = weights_R[:0, None]
        return DispatchedTokens(no_rows_VD, row_R, computed_VK, counts_e, weights_R), choices_e

    def by_global_expert(self, counts_e: Tensor) -> Tensor:
        """Returns the counts of this rank's experts indexed by global expert, int64 (E); 0 for the experts of other
        ranks."""
        expert_e = self.expert_of_slot_e.values_on(counts_e.device)
        return counts_e.new_zeros(self.num_experts).scatter_(0, expert_e, counts_e)


class LocalMetadata:
    """Provides the choices of this rank's own tokens, unchanged, on a rank that exchanges no rows."""

    def __init__(self, choices: list[ChoicesByRow]) -> None:
        self.choices = choices

    def wait_for_choices(self) -> list[ChoicesByRow]:
        """Returns the choices of each chunk."""
        return self.choices


class PendingDispatch:
    """Moves the chunks of one pass through dispatch and combine, so that the exchange of one chunk overlaps the
    experts' computation of another.

    With two chunks and one exchange (D: dispatch, C: compute, M: combine; + starts an exchange, - waits for it):

        forward     +D1 -D1 +D2 C1 +M1 -D2 C2 +M2 -M1 -M2     D2 overlaps C1, M1 overlaps C2
        backward    +M2 +M1 -M2 C2 +D2 -M1 C1 -D2 +D1 -D1     M1 overlaps C2, D2 overlaps C1

    `receive_chunks` and `combine` run the forward order. Autograd runs ready nodes in reverse order of creation, hence
    the backward order: each - of the forward pass starts the exchange of gradients, and each + waits for it.
    """

    metadata: Metadata

    def __init__(
        self,
        dispatcher: Dispatcher,
        chunks: list[Chunk],
        rows_per_expert: int | None,
        fingerprint: PassFingerprint,
        ledger: Ledger,
    ) -> None:
        self.dispatcher = dispatcher
        self.chunks = chunks
        self.rows_per_expert = rows_per_expert
        self.fingerprint = fingerprint
        self.ledger = ledger

    def exchange_metadata(self, exchange: Exchange, choices: list[ChoicesByRow]) -> None:
        """Plans the exchange: gives every chunk its route through it, and starts sending the choices of all rows.
        choices: those of each chunk's rows."""
        routes, self.metadata = exchange.plan(choices, self.fingerprint, self.ledger)
        for chunk, route in zip(self.chunks, routes, strict=True):
            chunk.routes.append(route)

    def receive_chunks(self) -> Iterator[Chunk]:
        """Sends the remaining rows, and yields each chunk for the experts once its rows have been received.

        Before each chunk is yielded, every chunk in progress advances by one exchange, the oldest first, and another
        chunk starts, so that rows are in transit while the experts compute. Outputs are waited for only after the
        experts have computed one more chunk.
        """
        self._group_by_expert()
        num_sent = 1
        for number, chunk in enumerate(self.chunks):
            while not chunk.is_dispatched:
                num_sent += 1
                for moving in self.chunks[number:num_sent]:
                    moving.advance_dispatch()
            for returning in self.chunks[: max(number - 1, 0)]:
                returning.advance_combine()
            yield chunk

    def combine(self) -> Tensor:
        """Waits for the outputs of the experts. Returns y_TD, in token order: for each token, the weighted sum of its
        experts' outputs.

        The order of summation is fixed: by choice within a rank (the experts have summed those), then by rank
        (hierarchical: the ranks of a node, then nodes); with `one_row_per: choice`, in the order of the choices only.
        """
        while not all(chunk.is_combined for chunk in self.chunks):
            for chunk in self.chunks:
                chunk.advance_combine()
        return join([chunk.rows for chunk in self.chunks])

    def _group_by_expert(self) -> None:
        """Exchanges the metadata of the later exchanges, and groups the rows that will be received by local expert."""
        for exchange in self.dispatcher.exchanges[1:]:
            self.exchange_metadata(exchange, self.metadata.wait_for_choices())
        choices_per_chunk = []
        for chunk, choices in zip(self.chunks, self.metadata.wait_for_choices(), strict=True):
            num_choices = self.fingerprint.num_choices
            chunk.expert_rows, choices_e = self.dispatcher.group_by_expert(choices, num_choices, self.rows_per_expert)
            choices_per_chunk.append(choices_e)
        self.computed_E = self.dispatcher.by_global_expert(torch.stack(choices_per_chunk).sum(0))
