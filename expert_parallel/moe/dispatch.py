"""Dispatchers: carry each token to the experts of its plan, and bring the outputs back, added up.

A dispatcher owns no parameters and keeps nothing between calls: what `combine` needs is returned by `dispatch`.
`DISPATCHERS` maps each `kind:` to its class.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.collectives import CommLog, all_to_all_rows, exchange_counts, group_rank, group_size
from expert_parallel.moe.permute import NO_ROW, gather_rows, group_by_rank, sort_by_expert, sources_table
from expert_parallel.moe.plan import DispatchedTokens, RoutingPlan, RowCounts
from expert_parallel.placement import ExpertPlacement
from expert_parallel.settings import Settings


class DispatcherConfig(Settings):
    """`local`: all experts on this rank. `all_to_all`: experts sharded over the expert-parallel group."""

    kind: Literal["local", "all_to_all"] = "all_to_all"


class Dispatcher(Protocol):
    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> tuple[DispatchedTokens, Any]:
        """Rows for this rank's experts, and the private state that `combine` takes; it has `rows: RowCounts`."""

    def combine(self, y_RD: Tensor, state: Any) -> Tensor:
        """y_TD, in the order of x_TD: the sum of each token's weighted outputs, in a fixed order."""


@dataclass(frozen=True)
class LocalState:
    row_TK: Tensor  # the row of each choice, NO_ROW where dropped
    token_R: Tensor  # the token of each row
    rows: RowCounts


class LocalDispatcher:
    """All experts on this rank: no exchange. Outputs are added in choice order."""

    def __init__(self, placement: ExpertPlacement, group: dist.ProcessGroup | None = None) -> None:
        if placement.num_ranks > 1:
            raise ValueError(
                f"model.moe.dispatcher.kind 'local' cannot reach the experts of other ranks: parallel.ep is "
                f"{placement.num_ranks}, it must be 1 (or use 'all_to_all')"
            )
        self.num_experts = placement.num_experts

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> tuple[DispatchedTokens, LocalState]:
        num_tokens, num_choices = plan.expert_ids_TK.shape
        choice_R = plan.kept_TK.flatten().nonzero().squeeze(1)
        order_R, counts_e = sort_by_expert(plan.expert_ids_TK.flatten()[choice_R], self.num_experts)
        choice_R = choice_R[order_R]
        row_TK = choice_R.new_full((num_tokens * num_choices,), NO_ROW)
        row_TK[choice_R] = torch.arange(len(choice_R), device=choice_R.device)
        row_TK = row_TK.view(num_tokens, num_choices)
        token_R = choice_R // num_choices
        x_RD = gather_rows(x_TD, token_R, row_TK)
        tokens = DispatchedTokens(x_RD, counts_e, plan.weights_TK.flatten()[choice_R])
        num_rows = int(plan.kept_TK.any(1).sum())  # as all_to_all counts: a token's choices share one row
        return tokens, LocalState(row_TK, token_R, RowCounts(own=num_rows))

    def combine(self, y_RD: Tensor, state: LocalState) -> Tensor:
        return gather_rows(y_RD, state.row_TK, state.token_R)


@dataclass(frozen=True)
class AllToAllState:
    token_U: Tensor  # the token of each row that travelled
    row_TP: Tensor  # the rows of each token, in rank order
    row_R: Tensor  # the arrived row of each computed row
    computed_VK: Tensor  # the computed rows of each arrived row, in choice order
    send_rows: list[int]
    receive_rows: list[int]
    rows: RowCounts


class AllToAllDispatcher:
    """Variable-size all-to-all over the expert-parallel group, on any torch.distributed backend.

    A token goes to a rank once, whatever its top-k: choices on the same rank share one row, and their weighted
    outputs come back as one row. Beside each row travel its number of choices (4 bytes) and for each choice the
    expert's slot (4 bytes) and the weight (4 bytes, 8 in float64). Outputs are added in choice order within a
    rank, then in rank order.
    """

    def __init__(
        self, placement: ExpertPlacement, group: dist.ProcessGroup | None = None, log: CommLog | None = None
    ) -> None:
        assert placement.num_ranks == group_size(group), (placement, group_size(group))
        self.placement, self.group, self.log = placement, group, log
        self.rank = group_rank(group)
        self.num_local_experts = len(placement.experts_on(self.rank))

    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> tuple[DispatchedTokens, AllToAllState]:
        num_tokens, num_choices = plan.expert_ids_TK.shape
        num_ranks, device = self.placement.num_ranks, x_TD.device
        rank_of_expert_E = torch.tensor(self.placement.rank_of_expert, device=device)
        slot_of_expert_E = torch.tensor(self.placement.slot_of_expert, device=device, dtype=torch.int32)

        # Group this rank's choices into rows, and tell each rank how many rows and choices will come.
        order = group_by_rank(plan.expert_ids_TK, plan.kept_TK, rank_of_expert_E)
        rows_P = torch.bincount(order.rank_U, minlength=num_ranks)
        choices_P = torch.bincount(order.rank_U[order.row_N], minlength=num_ranks)
        sent_P2 = torch.stack([rows_P, choices_P], dim=1)
        received_P2 = exchange_counts(sent_P2, self.group)
        (send_rows, send_choices), (receive_rows, receive_choices) = torch.stack([sent_P2, received_P2]).mT.tolist()

        # Exchange the rows, and what belongs to them.
        row_TP = sources_table(order.token_U, num_tokens, min(num_choices, num_ranks))
        x_UD = gather_rows(x_TD, order.token_U, row_TP)
        num_choices_U = torch.bincount(order.row_N, minlength=len(order.token_U)).to(torch.int32)
        slot_N = slot_of_expert_E[order.expert_N]
        weights_N = plan.weights_TK.flatten()[order.choice_N]
        x_VD = self._exchange(x_UD, send_rows, receive_rows, "rows")
        num_choices_V = self._exchange(num_choices_U, send_rows, receive_rows, "metadata")
        slot_R = self._exchange(slot_N, send_choices, receive_choices, "metadata")
        weights_R = self._exchange(weights_N, send_choices, receive_choices, "metadata")

        # Spread each arrived row over its choices, and sort the choices by local expert.
        num_arrived, num_computed = sum(receive_rows), sum(receive_choices)
        arrived = torch.arange(num_arrived, device=device)
        row_R = arrived.repeat_interleave(num_choices_V, output_size=num_computed)  # in order of arrival
        order_R, counts_e = sort_by_expert(slot_R, self.num_local_experts)
        place_R = torch.empty_like(order_R)
        place_R[order_R] = torch.arange(num_computed, device=device)
        choice_VK = sources_table(row_R, num_arrived, min(num_choices, self.num_local_experts))
        computed_VK = _look_up(place_R, choice_VK)
        row_R = row_R[order_R]
        x_RD = gather_rows(x_VD, row_R, computed_VK)

        own = send_rows[self.rank]
        num_sent = sum(send_rows) - own
        rows = RowCounts(sent=num_sent, received=num_arrived - own, returned=num_sent, own=own)
        state = AllToAllState(order.token_U, row_TP, row_R, computed_VK, send_rows, receive_rows, rows)
        return DispatchedTokens(x_RD, counts_e, weights_R[order_R]), state

    def combine(self, y_RD: Tensor, state: AllToAllState) -> Tensor:
        y_VD = gather_rows(y_RD, state.computed_VK, state.row_R)
        y_UD = self._exchange(y_VD, state.receive_rows, state.send_rows, "rows back")
        return gather_rows(y_UD, state.row_TP, state.token_U)

    def _exchange(self, x: Tensor, send: list[int], receive: list[int], purpose: str) -> Tensor:
        return all_to_all_rows(x, send, receive, self.group, self.log, purpose)


def _look_up(values: Tensor, table: Tensor) -> Tensor:
    """values[table], with NO_ROW left as it is."""
    if len(values) == 0:
        return table
    return torch.where(table == NO_ROW, NO_ROW, values[table.clamp(min=0)])


DISPATCHERS: dict[str, type[LocalDispatcher] | type[AllToAllDispatcher]] = {
    "local": LocalDispatcher,
    "all_to_all": AllToAllDispatcher,
}
