"""The hop of the all-gather dispatcher: every rank gets every row and takes those that chose its experts."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expert_parallel.collectives import all_gather_rows
from expert_parallel.moe.hop import Hop, HopState, PassKey, RowChoices, refuse_disagreement
from expert_parallel.moe.ledger import Ledger
from expert_parallel.moe.permute import NO_ROW, sum_rows


class BroadcastHop(Hop):
    """Rows and choices are gathered, with no counts beforehand but each rank's number of tokens. What an all-to-all
    would have brought is then taken from them, so that the way back, and the backward pass, are the all-to-all's."""

    def send(
        self, x_LD: Tensor, choices: RowChoices, key: PassKey, ledger: Ledger
    ) -> tuple[Tensor, RowChoices, HopState]:
        travel, peers = self._plan(x_LD, choices, key), self.peers
        words = torch.tensor([[len(x_LD), *key.words]], dtype=torch.int32, device=x_LD.device)
        table_P3 = all_gather_rows(words, [1] * peers.size, peers.group).tolist()
        for link in peers.links:
            ledger.log.bytes_sent["counts", link] += words.numel() * words.element_size()
        refuse_disagreement([row[1:] for row in table_P3], key, peers)
        lengths = [row[0] for row in table_P3]

        # Everybody's choices, as a table with a column for each: the expert, or NO_ROW.
        place_N = torch.arange(len(choices.row_N), device=x_LD.device)
        first_L = torch.searchsorted(choices.row_N, torch.arange(len(x_LD), device=x_LD.device))
        column_N = place_N - first_L[choices.row_N]
        expert_LK = choices.row_N.new_full((len(x_LD), key.num_choices), NO_ROW, dtype=torch.int32)
        expert_LK[choices.row_N, column_N] = choices.expert_N.to(torch.int32)
        weight_LK = choices.weight_N.new_zeros(len(x_LD), key.num_choices)
        weight_LK[choices.row_N, column_N] = choices.weight_N.detach()
        expert_GK, weight_GK = (self._gather(values, lengths, ledger) for values in (expert_LK, weight_LK))

        # Of these the ones for this rank, in the order in which an all-to-all would have brought them.
        rank_GK = torch.where(expert_GK == NO_ROW, NO_ROW, self.rank_of_expert_E[expert_GK.clamp(min=0).long()])
        here_GK = rank_GK == peers.me
        row_V = here_GK.any(1).nonzero().squeeze(1)
        row_N, column_N = here_GK[row_V].nonzero().unbind(1)
        source_G = torch.arange(peers.size, device=x_LD.device).repeat_interleave(
            torch.tensor(lengths, device=x_LD.device)
        )
        receive = torch.bincount(source_G[row_V], minlength=peers.size).tolist()
        receive_choices = torch.bincount(source_G[row_V][row_N], minlength=peers.size).tolist()
        send, send_choices = travel.rows_P.tolist(), travel.choices_P.tolist()

        ledger.count_rows(f"{self.name}dispatch", send, receive, peers)
        x_VD = _TakeRows.apply(self._narrow(x_LD), row_V, travel.rows_L, ledger, lengths, send, receive, self)
        weight_N = _TakeChoices.apply(
            choices.weight_N[travel.choice_N],
            weight_GK[row_V[row_N], column_N],
            ledger,
            send_choices,
            receive_choices,
            self,
        )
        arrived = RowChoices(row_N, expert_GK[row_V[row_N], column_N].long(), weight_N)
        return x_VD.to(x_LD.dtype), arrived, HopState(travel, send, receive)

    def _gather(self, values: Tensor, lengths: list[int], ledger: Ledger) -> Tensor:
        for link in self.peers.links:
            ledger.log.bytes_sent["metadata", link] += values.numel() * values.element_size()
        return all_gather_rows(values, lengths, self.peers.group)


class _TakeRows(torch.autograd.Function):
    """Forward: all ranks' rows are gathered, those of row_V taken. Backward: their gradients return by all-to-all."""

    @staticmethod
    def forward(
        ctx: Any,
        x_LD: Tensor,
        row_V: Tensor,
        rows_L: Tensor,
        ledger: Ledger,
        lengths: Any,
        send: Any,
        receive: Any,
        hop: Hop,
    ) -> Tensor:
        ctx.save_for_backward(rows_L)
        ctx.arguments = (ledger, send, receive, hop)
        return ledger.broadcast(x_LD, lengths, hop.peers, f"{hop.name}dispatch")[row_V]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_VD: Tensor) -> tuple[Tensor | None, ...]:
        (rows_L,) = ctx.saved_tensors
        ledger, send, receive, hop = ctx.arguments
        grad_UD = ledger.carry(grad_VD, receive, send, hop.peers, f"{hop.name}dispatch backward", True)
        return sum_rows(grad_UD, rows_L), *[None] * 7


class _TakeChoices(torch.autograd.Function):
    """Forward: the gathered weights. Backward: their gradients return to the choices, by all-to-all."""

    @staticmethod
    def forward(
        ctx: Any, weight_N: Tensor, taken_N: Tensor, ledger: Ledger, send: Any, receive: Any, hop: Hop
    ) -> Tensor:
        ctx.arguments = (ledger, send, receive, hop)
        return taken_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        ledger, send, receive, hop = ctx.arguments
        return ledger.carry(grad_N, receive, send, hop.peers, "metadata backward", False), *[None] * 5
