"""Defines what the exchanges of a dispatch share: the interface, the combine, and the packing of messages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from expert_parallel.moe.dispatch.async_collective import AsyncAllToAll, AsyncCollective, SplitSizes
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.dispatch.pass_fingerprint import PassFingerprint
from expert_parallel.moe.dispatch.permute import NO_ROW, gather_rows
from expert_parallel.moe.dispatch.row_index import (
    ChoicesByRank,
    ChoicesByRow,
    IndexTable,
    SendIndex,
    sort_choices_by_rank,
)
from expert_parallel.parallel.collectives import ExchangeKey, Hop, Peers, Phase


@dataclass(frozen=True)
class ChunkRoute:
    """Describes which rows of one chunk are sent to which ranks in one exchange.

    token_U: int64, for each row that is sent, the index of the row of x that it copies; sorted by destination rank.
    rows_L: int64 (L, width), for each row of x, the indices of its copies among the sent rows, in the order in which
    their outputs are summed; NO_ROW fills the rest. sizes: the numbers of rows sent to and received from each rank.
    """

    token_U: Tensor
    rows_L: Tensor
    sizes: SplitSizes


class Metadata(Protocol):
    """Provides the chosen experts, with their weights, of the rows that this rank receives. They may still be in
    transit when the first rows are sent."""

    def wait_for_choices(self) -> list[ChoicesByRow]:
        """Waits for the choices of each chunk's received rows, and returns them. It can be called only once."""
        ...


class Exchange:
    """Sends rows to the ranks of a group that lead to their experts, and returns the outputs to where the rows came
    from.

    peers: the ranks of the group. rank_of_expert: for each expert, the rank of the group to which its rows are sent:
    the expert's own, or one on its node in the first of two hops. `dedup`: True if choices of one row with the same
    destination share a sent row. exchange_dtype: the dtype of rows in transit; None: unchanged. hop: the name of this
    exchange, if rows go through several, one after the other.
    """

    def __init__(
        self,
        peers: Peers,
        rank_of_expert: Sequence[int],
        dedup: bool,
        exchange_dtype: torch.dtype | None,
        hop: Hop = "",
    ) -> None:
        self.peers = peers
        self.dedup = dedup
        self.exchange_dtype = exchange_dtype
        self.hop: Hop = hop
        self.rank_of_expert_E1 = IndexTable([*rank_of_expert, peers.size])  # the last entry is read for NO_EXPERT

    def plan(
        self, chunks: Sequence[ChoicesByRow], fingerprint: PassFingerprint, ledger: Ledger
    ) -> tuple[list[ChunkRoute], Metadata]:
        """Exchanges the numbers of rows and starts sending metadata. Returns the route of each chunk, and the metadata,
        which may still be in transit.

        chunks: the choices of each chunk's rows. Raises a ValueError, on every rank of the group, if the ranks are not
        in the same pass.
        """
        raise NotImplementedError

    def start(self, x_LD: Tensor, route: ChunkRoute, ledger: Ledger) -> AsyncCollective:
        """Starts sending rows to the ranks that lead to their experts. `finish` of the returned collective gives x_VD,
        the received rows, ordered by source rank."""
        raise NotImplementedError

    def start_back(self, y_VD: Tensor, route: ChunkRoute, ledger: Ledger) -> AsyncCollective:
        """Starts sending y_VD, one output for each received row, back to the ranks that sent the rows. `finish` of the
        returned collective gives y_UD, one output for each row that this rank had sent."""
        key = self.exchange_key(Phase.COMBINE)
        return AsyncAllToAll(ledger, route.sizes.reversed, self.peers, key).start(self._to_exchange_dtype(y_VD))

    def add_up(self, y_UD: Tensor, route: ChunkRoute) -> Tensor:
        """Returns y_LD: for each row of x, the sum of the outputs y_UD of its sent copies, in a fixed order."""
        return gather_rows(y_UD, route.rows_L, route.token_U)

    def exchange_key(self, phase: Phase) -> ExchangeKey:
        """Returns the key that stands for a phase of this exchange in the log and in error messages."""
        return ExchangeKey(phase, self.hop)

    def _sort_by_rank(self, chunks: Sequence[ChoicesByRow]) -> list[ChoicesByRank]:
        """Sorts the choices of each chunk by the rank of the group that leads to their experts."""
        return [
            sort_choices_by_rank(choices, self.rank_of_expert_E1(choices.expert_N), self.peers.size, self.dedup)
            for choices in chunks
        ]

    def _to_exchange_dtype(self, x: Tensor) -> Tensor:
        """Converts rows to the dtype in which they are sent. The gradient is sent in that dtype too."""
        return x if self.exchange_dtype is None else x.to(self.exchange_dtype)


def outgoing_metadata(
    choices: ChoicesByRow, order: ChoicesByRank, send_index: SendIndex, count: int
) -> tuple[Tensor, Tensor]:
    """Returns (tag_N, weight_N) of the first `count` choices, in the order in which they are sent.

    tag_N: int32, 2 * expert id, plus 1 if the choice is the first of a sent row. weight_N: the weights, with their
    gradient.
    """
    choice_N = order.choice_N[:count]
    inverse_N1 = torch.where(send_index.place_N < count, send_index.place_N, NO_ROW)[:, None]
    tag_N = choices.expert_N[choice_N] << 1 | order.first_N[:count]
    return tag_N.to(torch.int32), gather_rows(choices.weight_N, choice_N, inverse_N1)


def pack_by_rank(parts: Sequence[Tensor], sizes: Sequence[SplitSizes]) -> Tensor:
    """Merges the messages of all chunks into one that is ordered by destination rank, then by chunk.

    parts: the message of each chunk, ordered by destination. sizes: the split sizes of each chunk.
    """
    if len(parts) == 1:
        return parts[0]
    blocks_CP = [part.split(chunk.send) for part, chunk in zip(parts, sizes, strict=True)]
    return torch.cat([block for blocks_C in zip(*blocks_CP, strict=True) for block in blocks_C])


def unpack_by_chunk(message: Tensor, sizes: Sequence[SplitSizes]) -> list[Tensor]:
    """Splits a received message, which is ordered by source rank, then by chunk, into one message for each chunk.

    sizes: the split sizes of each chunk. Each returned message is ordered by source rank.
    """
    if len(sizes) == 1:
        return [message]
    blocks = message.split(
        [count for counts_C in zip(*(chunk.receive for chunk in sizes), strict=True) for count in counts_C]
    )
    return [torch.cat(blocks[chunk :: len(sizes)]) for chunk in range(len(sizes))]


def sum_sizes(sizes: Sequence[SplitSizes]) -> SplitSizes:
    """Returns the split sizes of all chunks together: for each rank, the sum over chunks."""
    send, receive = zip(*sizes, strict=True)
    return SplitSizes(*([sum(counts) for counts in zip(*table, strict=True)] for table in (send, receive)))
