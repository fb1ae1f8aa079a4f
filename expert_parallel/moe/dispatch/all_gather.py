"""Implements the all-gather exchange: every rank receives every row and keeps those that chose its experts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expert_parallel.moe.dispatch.async_collective import AsyncCollective, SplitSizes
from expert_parallel.moe.dispatch.base import (
    ChunkRoute,
    Exchange,
    Metadata,
    outgoing_metadata,
    pack_by_rank,
    sum_sizes,
    unpack_by_chunk,
)
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.dispatch.pass_fingerprint import PassFingerprint, raise_if_out_of_sync
from expert_parallel.moe.dispatch.permute import sum_rows
from expert_parallel.moe.dispatch.row_index import NO_EXPERT, ChoicesByRow, build_send_index, column_of_choice
from expert_parallel.parallel.collectives import Phase, Wait, all_gather_rows


@dataclass(frozen=True)
class GatheredRoute(ChunkRoute):
    """Describes how the rows of one chunk cross an all-gather. lengths: the number of rows that each rank contributes.
    row_V: int64, the indices of the gathered rows that this rank keeps, since they chose one of its experts."""

    lengths: list[int]
    row_V: Tensor


class AllGatherExchange(Exchange):
    """Gathers the choices of all ranks, then their rows, and keeps the rows that an all-to-all would have received, so
    that the combine and the backward pass are those of the all-to-all."""

    def plan(
        self, chunks: Sequence[ChoicesByRow], fingerprint: PassFingerprint, ledger: Ledger
    ) -> tuple[list[ChunkRoute], Metadata]:
        """Gathers the numbers of rows and the choices of all ranks; returns and raises as Exchange.plan does. The host
        waits for the number of rows of each rank, and for the numbers of rows and choices that are kept."""
        lengths_CP = self._exchange_lengths(chunks, fingerprint, ledger)
        gathered = self._gather_choices(chunks, lengths_CP, fingerprint, ledger)
        routes: list[ChunkRoute] = []
        choice_sizes: list[SplitSizes] = []
        sent_weights: list[Tensor] = []
        kept_choices: list[ChoicesByRow] = []
        for choices, order, lengths, (expert_GK, weight_GK) in zip(
            chunks, self._sort_by_rank(chunks), lengths_CP, gathered, strict=True
        ):
            send_index = build_send_index(choices, order, fingerprint.num_choices, self.dedup)
            send_rows, send_choices = torch.stack([order.rows_P, order.choices_P]).tolist()  # the host waits
            here_GK = self.rank_of_expert_E1(expert_GK.long()) == self.peers.me
            row_V = here_GK.any(1).nonzero().squeeze(1)  # nonzero: the host waits for the number of rows
            row_N, column_N = here_GK[row_V].nonzero().unbind(1)  # and of choices
            receive_rows, receive_choices = self._count_by_source(lengths, row_V, row_N)
            routes.append(
                GatheredRoute(
                    send_index.token_U[: sum(send_rows)],
                    send_index.rows_L,
                    SplitSizes(send_rows, receive_rows),
                    lengths,
                    row_V,
                )
            )
            choice_sizes.append(SplitSizes(send_choices, receive_choices))
            sent_weights.append(outgoing_metadata(choices, order, send_index, sum(send_choices))[1])
            kept_choices.append(
                ChoicesByRow(
                    row_N, expert_GK[row_V[row_N], column_N].long(), weight_GK[row_V[row_N], column_N], len(row_V)
                )
            )
        metadata = GatheredMetadata(kept_choices, choice_sizes, self, ledger)
        return routes, metadata.start(pack_by_rank(sent_weights, choice_sizes))

    def start(self, x_LD: Tensor, route: ChunkRoute, ledger: Ledger) -> AsyncCollective:
        """Starts gathering the rows of all ranks. `finish` of the returned collective gives x_VD, the rows that this
        rank keeps."""
        assert isinstance(route, GatheredRoute)
        return AsyncAllGather(ledger, route, self).start(self._to_exchange_dtype(x_LD))

    def _exchange_lengths(
        self, chunks: Sequence[ChoicesByRow], fingerprint: PassFingerprint, ledger: Ledger
    ) -> list[list[int]]:
        """Returns, for each chunk, the number of rows of each rank. The host waits for them."""
        lengths = [choices.num_rows for choices in chunks]
        # int32 has half the bytes of int64.
        encoded = torch.tensor([[*lengths, *fingerprint.encoded]], dtype=torch.int32, device=chunks[0].row_N.device)
        ledger.count_bytes(encoded, [1] * self.peers.size, self.peers, self.exchange_key(Phase.COUNTS))
        gathered_PW = all_gather_rows(encoded, [1] * self.peers.size, self.peers.group)
        table_PW = gathered_PW.tolist()  # the host waits: lengths become shapes
        raise_if_out_of_sync([row[-2:] for row in table_PW], fingerprint, self.peers)
        return [list(lengths_P) for lengths_P in zip(*(row[:-2] for row in table_PW), strict=True)]

    def _gather_choices(
        self,
        chunks: Sequence[ChoicesByRow],
        lengths_CP: Sequence[Sequence[int]],
        fingerprint: PassFingerprint,
        ledger: Ledger,
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns the choices of all ranks for each chunk, as tables with one column for each choice: its expert
        (int32, `NO_EXPERT` for none) and its weight, without gradient."""
        K = fingerprint.num_choices
        dtype = chunks[0].weight_N.dtype
        tables = []
        for choices in chunks:
            column_N = column_of_choice(choices)
            expert_LK = choices.row_N.new_full((choices.num_rows, K), NO_EXPERT, dtype=torch.int32)
            expert_LK[choices.row_N, column_N] = choices.expert_N.to(torch.int32)
            weight_LK = choices.weight_N.new_zeros(choices.num_rows, K)
            weight_LK[choices.row_N, column_N] = choices.weight_N.detach()  # GatheredMetadata gives them their gradient
            tables.append(torch.cat([expert_LK, weight_LK.view(torch.int32)], 1))
        table, lengths_P = torch.cat(tables), [sum(lengths) for lengths in zip(*lengths_CP, strict=True)]
        gathered = ledger.all_gather(table, lengths_P, self.peers, self.exchange_key(Phase.METADATA))()
        table_of_chunk = unpack_by_chunk(gathered, [SplitSizes([], list(lengths)) for lengths in lengths_CP])
        copied = torch.contiguous_format  # aligned, for a view as another dtype
        return [(table_G[:, :K], table_G[:, K:].clone(memory_format=copied).view(dtype)) for table_G in table_of_chunk]

    def _count_by_source(self, lengths: Sequence[int], row_V: Tensor, row_N: Tensor) -> list[list[int]]:
        """Returns how many of the kept rows, and how many of their choices, come from each rank. The host waits for
        both."""
        num_ranks = self.peers.size
        source_G = torch.arange(num_ranks, device=row_V.device).repeat_interleave(
            torch.tensor(lengths, device=row_V.device)
        )
        source_V = source_G[row_V]
        return [torch.bincount(source, minlength=num_ranks).tolist() for source in (source_V, source_V[row_N])]


class AsyncAllGather(AsyncCollective):
    """Gathers the rows of all ranks and keeps those of its route. In the backward pass the gradients of kept rows
    return to their source ranks by all-to-all, and are summed there in a fixed order."""

    def __init__(self, ledger: Ledger, route: GatheredRoute, exchange: AllGatherExchange) -> None:
        self.ledger = ledger
        self.route = route
        self.peers = exchange.peers
        self.key = exchange.exchange_key(Phase.DISPATCH)

    def launch(self, x_LD: Tensor) -> Wait:
        """Starts the all-gather; the ledger counts only the rows that are kept."""
        self.ledger.count_rows(*self.route.sizes, self.peers, self.key)
        return self.ledger.all_gather(x_LD, self.route.lengths, self.peers, self.key)

    def unpack(self, x_GD: Tensor) -> Tensor:
        """Returns the gathered rows that the route keeps."""
        return x_GD[self.route.row_V]

    def launch_backward(self, grad_VD: Tensor) -> Wait:
        """Starts sending the gradients of kept rows to the ranks that the rows came from."""
        return self.ledger.all_to_all(grad_VD, *self.route.sizes.reversed, self.peers, self.key.backward_key)

    def unpack_backward(self, grad_UD: Tensor) -> Tensor:
        """Returns the gradient of x_LD: for each row, the sum of the gradients from the ranks that kept it."""
        return sum_rows(grad_UD, self.route.rows_L)


class GatheredMetadata(AsyncCollective):
    """Provides the choices of the rows that this rank keeps, which have been gathered already. In the backward pass the
    gradients of their weights return to their source ranks by all-to-all.

    choices: those of each chunk, without gradient. sizes: for each chunk, the numbers of choices sent to and kept from
    each rank.
    """

    def __init__(
        self, choices: list[ChoicesByRow], sizes: list[SplitSizes], exchange: AllGatherExchange, ledger: Ledger
    ) -> None:
        self.choices = choices
        self.chunk_sizes = sizes
        self.sizes = sum_sizes(sizes)
        self.ledger = ledger
        self.peers = exchange.peers
        self.key = exchange.exchange_key(Phase.METADATA)

    def launch(self, weight_N: Tensor) -> Wait:
        """Connects the gathered weights to the autograd graph of the weights that were sent. Communicates nothing."""
        weights = [choices.weight_N for choices in self.choices]
        kept_N = pack_by_rank(weights, [sizes.reversed for sizes in self.chunk_sizes])
        return lambda: kept_N

    def launch_backward(self, grad_N: Tensor) -> Wait:
        """Starts sending the gradients of the weights to the ranks that the weights came from."""
        return self.ledger.all_to_all_metadata(grad_N, *self.sizes.reversed, self.peers, self.key.backward_key)

    def wait_for_choices(self) -> list[ChoicesByRow]:
        """Returns the choices of each chunk, with weights that have a gradient. It can be called only once."""
        weights = unpack_by_chunk(self.finish(), self.chunk_sizes)
        kept, self.choices = self.choices, []  # released, since this object lives until the backward pass
        return [replace(choices, weight_N=weight_N) for choices, weight_N in zip(kept, weights, strict=True)]
