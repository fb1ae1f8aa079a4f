"""One exchange of a dispatch: rows, each with the choices that it serves, go to the ranks of a group that lead to their
experts.

A row that several choices need at one destination travels once; on the way back their weighted outputs are one row.
The tokens of a pass may travel in chunks, one after the other. What the ranks must know beforehand goes for all chunks
at once, in two messages: for each rank pair 8 bytes a chunk (numbers of rows and of choices) and 8 that say what the
pass is, which all ranks must agree on; then, for each choice, its expert (4 bytes, with a bit that says where a row
begins) and its weight (4; 8 in float64).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from expert_parallel.moe.context import StepContext
from expert_parallel.moe.dispatch.exchange import AsyncAllToAll, AsyncCollective, SplitSizes
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.dispatch.permute import NO_ROW, gather_rows
from expert_parallel.moe.dispatch.row_index import IndexTable, Order, RowChoices, Travel, order_choices, plan_travel
from expert_parallel.parallel.collectives import ExchangeKey, Hop, Peers, Phase, Wait, all_gather_rows, start_counts


@dataclass(frozen=True)
class PassKey:
    """What all ranks of a pass must agree on, in two 31-bit numbers that travel with the counts."""

    width: int
    dtype: torch.dtype
    num_choices: int
    needs_grad: bool
    context: StepContext

    # dtype -> its number on the wire.
    DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)

    @property
    def words(self) -> list[int]:
        shape = (
            self.width % 2**17
            | self.needs_grad << 17
            | self.DTYPES.index(self.dtype) << 18
            | self.num_choices % 2**9 << 22
        )
        c = self.context
        return [shape, c.layer % 2**10 | c.micro_step % 2**7 << 10 | c.step % 2**14 << 17]

    @staticmethod
    def say(words: Sequence[int]) -> str:
        shape, place = words
        dtype = PassKey.DTYPES[min(shape >> 18 & 15, 3)]
        return (
            f"rows of {shape % 2**17} {str(dtype).removeprefix('torch.')} {'with' if shape >> 17 & 1 else 'without'} "
            f"gradient, {shape >> 22} choices a token, "
            f"layer {place % 2**10}, micro-step {place >> 10 & 127}, step {place >> 17}"
        )


def agree(key: PassKey, peers: Peers, device: torch.device) -> None:
    """ValueError on every rank of `peers` where one is in another pass. One small collective."""
    words = torch.tensor([key.words], dtype=torch.int32, device=device)
    refuse_disagreement(all_gather_rows(words, [1] * peers.size, peers.group).tolist(), key, peers)


def refuse_disagreement(words_P2: Sequence[Sequence[int]], key: PassKey, peers: Peers) -> None:
    """ValueError that names both ranks, on each of them, instead of a hang or rows that mean something else."""
    for peer, words in enumerate(words_P2):
        if list(words) != key.words:
            raise ValueError(
                f"the ranks are not in the same pass: rank {peers.ranks[peers.me]} brings {PassKey.say(key.words)}; "
                f"rank {peers.ranks[peer]} brings {PassKey.say(words)} (steps modulo 16384)"
            )


@dataclass(frozen=True)
class ChunkRoute:
    """Says how the rows of one chunk cross one exchange.

    token_U: int64, the row of x behind each row that travels, by destination. rows_L: int64 (L, width), the travelling
    rows of each row of x, in the order in which they are added up on return. sizes: numbers of rows that travel.
    """

    token_U: Tensor
    rows_L: Tensor
    sizes: SplitSizes


class Metadata(Protocol):
    """Gives the choices that arriving rows serve; they may be under way still when the first rows leave."""

    def arrived(self) -> list[RowChoices]:
        """Waits for the choices of each chunk. Called once."""
        ...


class AllToAllExchange:
    """Takes rows to the ranks of a group that lead to their experts, and back: a variable-size all-to-all.

    hop: its name where rows take several exchanges one after the other. rank_of_expert: which rank of the group leads
    to each expert. merge: choices of one row at one destination share a travelling row. exchange_dtype: what rows
    travel in; None: as they are.
    """

    def __init__(
        self,
        peers: Peers,
        rank_of_expert: Sequence[int],
        merge: bool,
        exchange_dtype: torch.dtype | None,
        hop: Hop = "",
    ) -> None:
        self.peers, self.merge, self.exchange_dtype, self.hop = peers, merge, exchange_dtype, hop
        self.rank_of_expert_E1 = IndexTable([*rank_of_expert, peers.size])  # the last one is read for NOWHERE

    def plan(self, chunks: Sequence[RowChoices], key: PassKey, ledger: Ledger) -> tuple[list[ChunkRoute], Metadata]:
        """Exchanges the numbers of rows and choices. Returns how the rows of each chunk travel, and the choices that
        arriving rows serve, which are then under way. The host waits once, for the numbers.

        ValueError, on every rank of the group, where ranks are not in the same pass.
        """
        orders = self._order(chunks)
        sent_PW = self._outgoing_counts(orders, key, ledger)
        wait = start_counts(sent_PW, self.peers.group)
        travels = [
            plan_travel(choices, order, key.num_choices, self.merge)
            for choices, order in zip(chunks, orders, strict=True)
        ]
        sent_WP, received_WP = torch.stack([sent_PW, wait()]).mT.tolist()  # the host waits here
        refuse_disagreement(list(zip(*received_WP[-2:], strict=True)), key, self.peers)
        C = len(chunks)
        row_sizes = [SplitSizes(*sizes) for sizes in zip(sent_WP[:C], received_WP[:C], strict=True)]
        choice_sizes = [SplitSizes(*sizes) for sizes in zip(sent_WP[C : 2 * C], received_WP[C : 2 * C], strict=True)]
        routes = [
            ChunkRoute(travel.token_U[: sum(sizes.send)], travel.rows_L, sizes)
            for travel, sizes in zip(travels, row_sizes, strict=True)
        ]
        outgoing = [
            departing(choices, order, travel, sum(sizes.send))
            for choices, order, travel, sizes in zip(chunks, orders, travels, choice_sizes, strict=True)
        ]
        tags, weights = ([pair[part] for pair in outgoing] for part in (0, 1))
        num_rows = [sum(sizes.receive) for sizes in row_sizes]
        return routes, AsyncChoices(tags, choice_sizes, num_rows, self, ledger).start(by_peer(weights, choice_sizes))

    def start(self, x_LD: Tensor, route: ChunkRoute, ledger: Ledger) -> AsyncCollective:
        """Sends rows to those that need them."""
        x_UD = self._narrow(gather_rows(x_LD, route.token_U, route.rows_L))
        return AsyncAllToAll(ledger, route.sizes, self.peers, self.exchange_key(Phase.DISPATCH)).start(x_UD)

    def start_back(self, y_VD: Tensor, route: ChunkRoute, ledger: Ledger) -> AsyncCollective:
        """Sends what the arrived rows became to where they came from; see `add_up`."""
        sizes, key = route.sizes.reversed, self.exchange_key(Phase.COMBINE)
        return AsyncAllToAll(ledger, sizes, self.peers, key).start(self._narrow(y_VD))

    def add_up(self, y_UD: Tensor, route: ChunkRoute) -> Tensor:
        """Returns y_LD: for each row, the sum in a fixed order of what has come back for it."""
        return gather_rows(y_UD, route.rows_L, route.token_U)

    def exchange_key(self, phase: Phase) -> ExchangeKey:
        """Names this exchange in the log and in messages."""
        return ExchangeKey(phase, self.hop)

    def _order(self, chunks: Sequence[RowChoices]) -> list[Order]:
        return [
            order_choices(choices, self.rank_of_expert_E1(choices.expert_N), self.peers.size, self.merge)
            for choices in chunks
        ]

    def _outgoing_counts(self, orders: Sequence[Order], key: PassKey, ledger: Ledger) -> Tensor:
        """(P, 2 C + 2), int32: for each peer the rows of each chunk, the choices of each, and the key's words."""
        counts = [order.rows_P for order in orders] + [order.choices_P for order in orders]
        words_2P = counts[0].new_tensor(key.words)[:, None].expand(2, self.peers.size)
        sent_PW = torch.cat([torch.stack(counts), words_2P]).mT.to(torch.int32)
        ledger.count_bytes(sent_PW, [1] * self.peers.size, self.peers, self.exchange_key(Phase.COUNTS))
        return sent_PW

    def _narrow(self, x: Tensor) -> Tensor:
        return x if self.exchange_dtype is None else x.to(self.exchange_dtype)


class AsyncChoices(AsyncCollective):
    """Exchanges the choices that travelling rows serve, of all chunks in one message: their experts, and their weights,
    which have a gradient.

    tags: of each chunk, the int32 tags of its choices by destination (see `departing`). sizes: numbers of choices.
    num_rows: how many rows of each chunk will arrive.
    """

    def __init__(
        self,
        tags: list[Tensor],
        sizes: list[SplitSizes],
        num_rows: list[int],
        exchange: AllToAllExchange,
        ledger: Ledger,
    ) -> None:
        self.tag_N, self.chunk_sizes, self.num_rows = by_peer(tags, sizes), sizes, num_rows
        self.sizes, self.peers, self.ledger = total_sizes(sizes), exchange.peers, ledger
        self.key = exchange.exchange_key(Phase.METADATA)

    def begin(self, weight_N: Tensor) -> Wait:
        bits = weight_N.view(torch.int32).view(len(weight_N), weight_N.itemsize // 4)
        record = torch.cat([self.tag_N[:, None], bits], 1)
        self.dtype = weight_N.dtype
        return self.ledger.all_to_all_metadata(record, *self.sizes, self.peers, self.key)

    def unpack(self, record: Tensor) -> tuple[Tensor, Tensor]:
        bits = record[:, 1:].clone(memory_format=torch.contiguous_format)  # at the start of its memory
        return bits.view(self.dtype).flatten(), record[:, 0]

    def begin_backward(self, grad_N: Tensor) -> Wait:
        return self.ledger.all_to_all_metadata(grad_N, *self.sizes.reversed, self.peers, self.key.of_backward)

    def arrived(self) -> list[RowChoices]:
        weight_N, tag_N = self.finish()
        weights, tags = by_chunk(weight_N, self.chunk_sizes), by_chunk(tag_N, self.chunk_sizes)
        return [
            RowChoices((tag_N & 1).cumsum(0) - 1, (tag_N >> 1).long(), weight_N, rows)
            for tag_N, weight_N, rows in zip(tags, weights, self.num_rows, strict=True)
        ]


def departing(choices: RowChoices, order: Order, travel: Travel, count: int) -> tuple[Tensor, Tensor]:
    """The `count` choices that travel, in the order of travel: their tags (the expert, and in the lowest bit whether a
    row begins), and weights, which have a gradient."""
    choice_N = order.choice_N[:count]
    inverse_N1 = torch.where(travel.place_N < count, travel.place_N, NO_ROW)[:, None]
    tag_N = choices.expert_N[choice_N] << 1 | order.first_N[:count]
    return tag_N.to(torch.int32), gather_rows(choices.weight_N, choice_N, inverse_N1)


def by_peer(parts: Sequence[Tensor], sizes: Sequence[SplitSizes]) -> Tensor:
    """Joins what leaves of each chunk, ordered by destination, into one message by destination, then by chunk."""
    if len(parts) == 1:
        return parts[0]
    blocks_CP = [part.split(chunk.send) for part, chunk in zip(parts, sizes, strict=True)]
    return torch.cat([block for blocks_C in zip(*blocks_CP, strict=True) for block in blocks_C])


def by_chunk(message: Tensor, sizes: Sequence[SplitSizes]) -> list[Tensor]:
    """Divides a message that has arrived, by source, then by chunk, into what arrives of each chunk by source."""
    if len(sizes) == 1:
        return [message]
    blocks = message.split(
        [count for counts_C in zip(*(chunk.receive for chunk in sizes), strict=True) for count in counts_C]
    )
    return [torch.cat(blocks[chunk :: len(sizes)]) for chunk in range(len(sizes))]


def total_sizes(sizes: Sequence[SplitSizes]) -> SplitSizes:
    """Returns the sizes of all chunks together."""
    send, receive = zip(*sizes, strict=True)
    return SplitSizes(*([sum(counts) for counts in zip(*table, strict=True)] for table in (send, receive)))
