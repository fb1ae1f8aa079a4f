"""Implements the all-to-all exchange: rows, each with the choices that it serves, go to the ranks that lead to their
experts.

With `dedup`, a row that several choices need at one destination is sent once, and their weighted outputs return as one
row. The tokens of a pass may be sent in chunks. Metadata is sent for all chunks at once, in two messages: for each pair
of ranks 8 bytes a chunk (numbers of rows and of choices) and 8 bytes of fingerprint; then, for each choice, its expert
(4 bytes, with a bit that marks the begin of a row) and its weight (4 bytes; 8 in float64).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expert_parallel.moe.dispatch.async_collective import AsyncAllToAll, AsyncCollective, SplitSizes
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
from expert_parallel.moe.dispatch.permute import gather_rows
from expert_parallel.moe.dispatch.row_index import ChoicesByRank, ChoicesByRow, build_send_index
from expert_parallel.parallel.collectives import Phase, Wait, start_all_to_all_counts


class AllToAllExchange(Exchange):
    """Exchanges rows by a variable-size all-to-all."""

    def plan(
        self, chunks: Sequence[ChoicesByRow], fingerprint: PassFingerprint, ledger: Ledger
    ) -> tuple[list[ChunkRoute], Metadata]:
        """Exchanges the numbers of rows and choices, and starts the all-to-all of metadata; returns and raises as
        Exchange.plan does. The host waits once, for the numbers."""
        orders = self._sort_by_rank(chunks)
        sent_PW = self._outgoing_counts(orders, fingerprint, ledger)
        wait = start_all_to_all_counts(sent_PW, self.peers.group)
        send_indices = [
            build_send_index(choices, order, fingerprint.num_choices, self.dedup)
            for choices, order in zip(chunks, orders, strict=True)
        ]
        sent_WP, received_WP = torch.stack([sent_PW, wait()]).mT.tolist()  # the host waits: counts become shapes
        raise_if_out_of_sync(list(zip(*received_WP[-2:], strict=True)), fingerprint, self.peers)
        C = len(chunks)
        row_sizes = [SplitSizes(*sizes) for sizes in zip(sent_WP[:C], received_WP[:C], strict=True)]
        choice_sizes = [SplitSizes(*sizes) for sizes in zip(sent_WP[C : 2 * C], received_WP[C : 2 * C], strict=True)]
        routes = [
            ChunkRoute(send_index.token_U[: sum(sizes.send)], send_index.rows_L, sizes)
            for send_index, sizes in zip(send_indices, row_sizes, strict=True)
        ]
        outgoing = [
            outgoing_metadata(choices, order, send_index, sum(sizes.send))
            for choices, order, send_index, sizes in zip(chunks, orders, send_indices, choice_sizes, strict=True)
        ]
        tags = [tag_N for tag_N, _ in outgoing]
        weights = [weight_N for _, weight_N in outgoing]
        num_rows = [sum(sizes.receive) for sizes in row_sizes]
        metadata = AllToAllMetadata(tags, choice_sizes, num_rows, self, ledger)
        return routes, metadata.start(pack_by_rank(weights, choice_sizes))

    def start(self, x_LD: Tensor, route: ChunkRoute, ledger: Ledger) -> AsyncCollective:
        """Starts sending each row of x to every rank that leads to one of its chosen experts. `finish` of the returned
        collective gives x_VD, the received rows."""
        x_UD = self._to_exchange_dtype(gather_rows(x_LD, route.token_U, route.rows_L))
        return AsyncAllToAll(ledger, route.sizes, self.peers, self.exchange_key(Phase.DISPATCH)).start(x_UD)

    def _outgoing_counts(self, orders: Sequence[ChoicesByRank], fingerprint: PassFingerprint, ledger: Ledger) -> Tensor:
        """Returns the message of counts, int32 (P, 2 C + 2): for each rank, the rows of each chunk, the choices of
        each, and the fingerprint."""
        counts = [order.rows_P for order in orders] + [order.choices_P for order in orders]
        encoded_2P = counts[0].new_tensor(fingerprint.encoded)[:, None].expand(2, self.peers.size)
        sent_PW = torch.cat([torch.stack(counts), encoded_2P]).mT.to(torch.int32)  # half the bytes of int64
        ledger.count_bytes(sent_PW, [1] * self.peers.size, self.peers, self.exchange_key(Phase.COUNTS))
        return sent_PW


class AllToAllMetadata(AsyncCollective):
    """Exchanges the metadata of all chunks in one all-to-all: the expert of each choice, and its weight, which has a
    gradient.

    tags: for each chunk, int32, one tag for each choice sent (see `outgoing_metadata`). sizes: for each chunk, the
    numbers of choices sent to and received from each rank. num_rows: the number of rows that this rank will receive in
    each chunk.
    """

    def __init__(
        self,
        tags: list[Tensor],
        sizes: list[SplitSizes],
        num_rows: list[int],
        exchange: AllToAllExchange,
        ledger: Ledger,
    ) -> None:
        self.tag_N = pack_by_rank(tags, sizes)
        self.chunk_sizes = sizes
        self.num_rows = num_rows
        self.sizes = sum_sizes(sizes)
        self.peers = exchange.peers
        self.ledger = ledger
        self.key = exchange.exchange_key(Phase.METADATA)

    def launch(self, weight_N: Tensor) -> Wait:
        """Starts sending a record for each choice: its tag, and the bits of its weight as one or two int32."""
        bits = weight_N.view(torch.int32).view(len(weight_N), weight_N.itemsize // 4)
        record = torch.cat([self.tag_N[:, None], bits], 1)
        self.dtype = weight_N.dtype
        return self.ledger.all_to_all_metadata(record, *self.sizes, self.peers, self.key)

    def unpack(self, record: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weights and the tags of the received records."""
        bits = record[:, 1:].clone(memory_format=torch.contiguous_format)  # aligned, for a view as another dtype
        return bits.view(self.dtype).flatten(), record[:, 0]

    def launch_backward(self, grad_N: Tensor) -> Wait:
        """Starts sending the gradients of the weights to the ranks that the weights came from."""
        return self.ledger.all_to_all_metadata(grad_N, *self.sizes.reversed, self.peers, self.key.backward_key)

    def wait_for_choices(self) -> list[ChoicesByRow]:
        """Waits for the metadata, and returns the choices of the rows that this rank receives in each chunk. A row
        begins wherever a tag's lowest bit is set."""
        weight_N, tag_N = self.finish()
        weights, tags = unpack_by_chunk(weight_N, self.chunk_sizes), unpack_by_chunk(tag_N, self.chunk_sizes)
        return [
            ChoicesByRow((tag_N & 1).cumsum(0) - 1, (tag_N >> 1).long(), weight_N, rows)
            for tag_N, weight_N, rows in zip(tags, weights, self.num_rows, strict=True)
        ]
