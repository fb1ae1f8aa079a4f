"""The exchange of the all-gather dispatcher: every rank gets every row and takes those that chose its experts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expert_parallel.moe.dispatch.all_to_all import (
    AllToAllExchange,
    ChunkRoute,
    Metadata,
    PassKey,
    by_chunk,
    by_peer,
    departing,
    refuse_disagreement,
    total_sizes,
)
from expert_parallel.moe.dispatch.exchange import AsyncCollective, SplitSizes
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.dispatch.permute import sum_rows
from expert_parallel.moe.dispatch.row_index import NOWHERE, RowChoices, columns, plan_travel
from expert_parallel.parallel.collectives import Phase, Wait, all_gather_rows


@dataclass(frozen=True)
class GatheredRoute(ChunkRoute):
    """Says besides what is gathered. lengths: each rank's number of rows. row_V: int64, which of all ranks' rows are
    taken here."""

    lengths: list[int]
    row_V: Tensor


class AllGatherExchange(AllToAllExchange):
    """Gathers the choices of all ranks, then their rows. What an all-to-all would have brought is taken from them, so
    that the way back, and the backward pass, are the all-to-all's. The host waits several times in `plan`: for each
    rank's number of tokens, and for what is found among the gathered choices."""

    def plan(self, chunks: Sequence[RowChoices], key: PassKey, ledger: Ledger) -> tuple[list[ChunkRoute], Metadata]:
        lengths_CP = self._exchange_lengths(chunks, key, ledger)
        everyones = self._gather_choices(chunks, lengths_CP, key, ledger)
        routes: list[ChunkRoute] = []
        leaving, choice_sizes, arriving = [], [], []
        for choices, order, lengths, (expert_GK, weight_GK) in zip(
            chunks, self._order(chunks), lengths_CP, everyones, strict=True
        ):
            travel = plan_travel(choices, order, key.num_choices, self.merge)
            send_rows, send_choices = torch.stack([order.rows_P, order.choices_P]).tolist()  # the host waits here
            here_GK = self.rank_of_expert_E1(expert_GK.long()) == self.peers.me
            row_V = here_GK.any(1).nonzero().squeeze(1)
            row_N, column_N = here_GK[row_V].nonzero().unbind(1)
            receive_rows, receive_choices = self._count_by_source(lengths, row_V, row_N)
            routes.append(
                GatheredRoute(
                    travel.token_U[: sum(send_rows)],
                    travel.rows_L,
                    SplitSizes(send_rows, receive_rows),
                    lengths,
                    row_V,
                )
            )
            choice_sizes.append(SplitSizes(send_choices, receive_choices))
            leaving.append(departing(choices, order, travel, sum(send_choices))[1])
            arriving.append(
                RowChoices(
                    row_N, expert_GK[row_V[row_N], column_N].long(), weight_GK[row_V[row_N], column_N], len(row_V)
                )
            )
        return routes, GatheredChoices(arriving, choice_sizes, self, ledger).start(by_peer(leaving, choice_sizes))

    def start(self, x_LD: Tensor, route: ChunkRoute, ledger: Ledger) -> AsyncCollective:
        assert isinstance(route, GatheredRoute)
        return AsyncAllGather(ledger, route, self).start(self._narrow(x_LD))

    def _exchange_lengths(self, chunks: Sequence[RowChoices], key: PassKey, ledger: Ledger) -> list[list[int]]:
        """Returns, for each chunk, the number of rows of each rank. The host waits for them."""
        lengths = [choices.num_rows for choices in chunks]
        words = torch.tensor([[*lengths, *key.words]], dtype=torch.int32, device=chunks[0].row_N.device)
        ledger.count_bytes(words, [1] * self.peers.size, self.peers, self.exchange_key(Phase.COUNTS))
        table_PW = all_gather_rows(words, [1] * self.peers.size, self.peers.group).tolist()
        refuse_disagreement([row[-2:] for row in table_PW], key, self.peers)
        return [list(lengths_P) for lengths_P in zip(*(row[:-2] for row in table_PW), strict=True)]

    def _gather_choices(
        self, chunks: Sequence[RowChoices], lengths_CP: Sequence[Sequence[int]], key: PassKey, ledger: Ledger
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns everybody's choices of each chunk, as tables with a column for each choice: its expert, or NOWHERE,
        and its weight."""
        K, dtype, tables = key.num_choices, chunks[0].weight_N.dtype, []
        for choices in chunks:
            column_N = columns(choices)
            expert_LK = choices.row_N.new_full((choices.num_rows, K), NOWHERE, dtype=torch.int32)
            expert_LK[choices.row_N, column_N] = choices.expert_N.to(torch.int32)
            weight_LK = choices.weight_N.new_zeros(choices.num_rows, K)
            weight_LK[choices.row_N, column_N] = choices.weight_N.detach()
            tables.append(torch.cat([expert_LK, weight_LK.view(torch.int32)], 1))
        table, lengths_P = torch.cat(tables), [sum(lengths) for lengths in zip(*lengths_CP, strict=True)]
        ledger.count_bytes(table, [len(table)] * self.peers.size, self.peers, self.exchange_key(Phase.METADATA))
        gathered = all_gather_rows(table, lengths_P, self.peers.group)
        everyones = by_chunk(gathered, [SplitSizes([], list(lengths)) for lengths in lengths_CP])
        copied = torch.contiguous_format  # a part of a table may lie unaligned in it
        return [(table_G[:, :K], table_G[:, K:].clone(memory_format=copied).view(dtype)) for table_G in everyones]

    def _count_by_source(self, lengths: Sequence[int], row_V: Tensor, row_N: Tensor) -> list[list[int]]:
        """Returns how many of the rows that are taken, and of their choices, come from each rank."""
        num_ranks = self.peers.size
        source_G = torch.arange(num_ranks, device=row_V.device).repeat_interleave(
            torch.tensor(lengths, device=row_V.device)
        )
        source_V = source_G[row_V]
        return [torch.bincount(source, minlength=num_ranks).tolist() for source in (source_V, source_V[row_N])]


class AsyncAllGather(AsyncCollective):
    """Gathers all ranks' rows and takes some of them. In the backward pass their gradients return by all-to-all, and
    are added up in a fixed order."""

    def __init__(self, ledger: Ledger, route: GatheredRoute, exchange: AllGatherExchange) -> None:
        self.ledger, self.route, self.peers = ledger, route, exchange.peers
        self.key = exchange.exchange_key(Phase.DISPATCH)

    def begin(self, x_LD: Tensor) -> Wait:
        self.ledger.count_rows(*self.route.sizes, self.peers, self.key)
        return self.ledger.all_gather(x_LD, self.route.lengths, self.peers, self.key)

    def unpack(self, x_GD: Tensor) -> Tensor:
        return x_GD[self.route.row_V]

    def begin_backward(self, grad_VD: Tensor) -> Wait:
        return self.ledger.all_to_all(grad_VD, *self.route.sizes.reversed, self.peers, self.key.of_backward)

    def unpack_backward(self, grad_UD: Tensor) -> Tensor:
        return sum_rows(grad_UD, self.route.rows_L)


class GatheredChoices(AsyncCollective):
    """Gives the choices that the rows of each chunk serve here, which have been gathered already. In the backward pass
    the gradients of their weights return by all-to-all."""

    def __init__(
        self, choices: list[RowChoices], sizes: list[SplitSizes], exchange: AllGatherExchange, ledger: Ledger
    ) -> None:
        self.choices, self.chunk_sizes, self.sizes = choices, sizes, total_sizes(sizes)
        self.ledger, self.peers, self.key = ledger, exchange.peers, exchange.exchange_key(Phase.METADATA)

    def begin(self, weight_N: Tensor) -> Wait:
        taken = [choices.weight_N for choices in self.choices]
        taken_N = by_peer(taken, [sizes.reversed for sizes in self.chunk_sizes])
        return lambda: taken_N

    def begin_backward(self, grad_N: Tensor) -> Wait:
        return self.ledger.all_to_all_metadata(grad_N, *self.sizes.reversed, self.peers, self.key.of_backward)

    def arrived(self) -> list[RowChoices]:
        weights = by_chunk(self.finish(), self.chunk_sizes)
        arriving, self.choices = self.choices, []  # this object lives until the backward pass
        return [replace(choices, weight_N=weight_N) for choices, weight_N in zip(arriving, weights, strict=True)]
