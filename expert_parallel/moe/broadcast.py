"""The hop of the all-gather dispatcher: every rank gets every row and takes those that chose its experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_parallel.collectives import Wait, all_gather_rows
from expert_parallel.moe.hop import Hop, Leg, PassKey, by_chunk, by_peer, departing, refuse_disagreement
from expert_parallel.moe.ledger import Ledger, Trip
from expert_parallel.moe.permute import sum_rows
from expert_parallel.moe.travel import NOWHERE, RowChoices, columns, plan_travel


@dataclass(frozen=True)
class BroadcastLeg(Leg):
    """lengths: rows of each rank. row_V: which of all ranks' rows are taken."""

    lengths: list[int]
    row_V: Tensor


class BroadcastHop(Hop):
    """Rows and choices are gathered, with no counts beforehand but each rank's numbers of tokens. What an all-to-all
    would have brought is then taken from them, so that the way back, and the backward pass, are the all-to-all's."""

    def plan(
        self, chunks: Sequence[RowChoices], key: PassKey, ledger: Ledger
    ) -> tuple[list[Leg], Callable[[], list[RowChoices]]]:
        lengths_CP = self._exchange_lengths(chunks, key, ledger)
        everyones = self._gather_choices(chunks, lengths_CP, key, ledger)
        legs: list[Leg] = []
        found, leaving, taken, sent_CP, received_CP = [], [], [], [], []
        for choices, order, lengths, (expert_GK, weight_GK) in zip(
            chunks, self._order(chunks), lengths_CP, everyones, strict=True
        ):
            travel = plan_travel(choices, order, key.num_choices, self.merge)
            (send, send_choices), num_ranks = torch.stack([order.rows_P, order.choices_P]).tolist(), self.peers.size
            here_GK = self.rank_of_expert_E1[expert_GK.long()] == self.peers.me
            row_V = here_GK.any(1).nonzero().squeeze(1)
            row_N, column_N = here_GK[row_V].nonzero().unbind(1)
            source_G = torch.arange(num_ranks, device=row_V.device).repeat_interleave(
                torch.tensor(lengths, device=row_V.device)
            )
            receive = torch.bincount(source_G[row_V], minlength=num_ranks).tolist()
            received_CP.append(torch.bincount(source_G[row_V][row_N], minlength=num_ranks).tolist())
            legs.append(BroadcastLeg(travel.token_U[: sum(send)], travel.rows_L, send, receive, lengths, row_V))
            sent_CP.append(send_choices)
            leaving.append(departing(choices, order, travel, sum(send_choices))[1])
            taken.append(weight_GK[row_V[row_N], column_N])
            found.append((row_N, expert_GK[row_V[row_N], column_N].long(), len(row_V)))
        weights = self._take_weights(leaving, taken, sent_CP, received_CP, ledger)
        arrived = [
            RowChoices(row_N, expert_N, weight_N, num_rows)
            for (row_N, expert_N, num_rows), weight_N in zip(found, weights, strict=True)
        ]
        return legs, lambda: arrived

    def start(self, x_LD: Tensor, leg: Leg, ledger: Ledger) -> Trip:
        assert isinstance(leg, BroadcastLeg)
        purpose = f"{self.name}dispatch"
        ledger.count_rows(purpose, leg.send, leg.receive, self.peers)

        def there(x_LD: Tensor) -> Wait:
            wait = ledger.begin_broadcast(x_LD, leg.lengths, self.peers, purpose)
            return lambda: wait()[leg.row_V]

        def back(grad_VD: Tensor) -> Wait:
            wait = ledger.begin(grad_VD, leg.receive, leg.send, self.peers, f"{purpose} backward")
            return lambda: sum_rows(wait(), leg.rows_L)

        return Trip(there, back).start(self._narrow(x_LD))

    def _exchange_lengths(self, chunks: Sequence[RowChoices], key: PassKey, ledger: Ledger) -> list[list[int]]:
        """Of each chunk, the number of rows of each rank."""
        lengths = [choices.num_rows for choices in chunks]
        words = torch.tensor([[*lengths, *key.words]], dtype=torch.int32, device=chunks[0].row_N.device)
        ledger.count_bytes(words, [1] * self.peers.size, self.peers, "counts")
        table_PW = all_gather_rows(words, [1] * self.peers.size, self.peers.group).tolist()
        refuse_disagreement([row[-2:] for row in table_PW], key, self.peers)
        return [list(lengths_P) for lengths_P in zip(*(row[:-2] for row in table_PW), strict=True)]

    def _gather_choices(
        self, chunks: Sequence[RowChoices], lengths_CP: Sequence[Sequence[int]], key: PassKey, ledger: Ledger
    ) -> list[tuple[Tensor, Tensor]]:
        """Everybody's choices of each chunk, as tables with a column for each: its expert, or NOWHERE, and weight."""
        K, dtype, tables = key.num_choices, chunks[0].weight_N.dtype, []
        for choices in chunks:
            column_N = columns(choices)
            expert_LK = choices.row_N.new_full((choices.num_rows, K), NOWHERE, dtype=torch.int32)
            expert_LK[choices.row_N, column_N] = choices.expert_N.to(torch.int32)
            weight_LK = choices.weight_N.new_zeros(choices.num_rows, K)
            weight_LK[choices.row_N, column_N] = choices.weight_N.detach()
            tables.append(torch.cat([expert_LK, weight_LK.view(torch.int32)], 1))
        table, lengths_P = torch.cat(tables), [sum(lengths) for lengths in zip(*lengths_CP, strict=True)]
        ledger.count_bytes(table, [len(table)] * self.peers.size, self.peers, "metadata")
        everyones = by_chunk(all_gather_rows(table, lengths_P, self.peers.group), lengths_CP)
        copied = torch.contiguous_format  # a part of a table may lie unaligned in it
        return [(table_G[:, :K], table_G[:, K:].clone(memory_format=copied).view(dtype)) for table_G in everyones]

    def _take_weights(
        self,
        leaving: Sequence[Tensor],
        taken: Sequence[Tensor],
        sent_CP: Sequence[Sequence[int]],
        received_CP: Sequence[Sequence[int]],
        ledger: Ledger,
    ) -> list[Tensor]:
        """Forward: the gathered weights. Backward: their gradients return to the choices, by all-to-all."""
        send, receive = ([sum(column) for column in zip(*table, strict=True)] for table in (sent_CP, received_CP))
        taken_N = by_peer(taken, received_CP)

        def back(grad_N: Tensor) -> Wait:
            return ledger.begin(grad_N, receive, send, self.peers, "metadata backward", payload=False)

        trip = Trip(lambda _: lambda: taken_N, back).start(by_peer(leaving, sent_CP))
        return by_chunk(trip.finish(), received_CP)
