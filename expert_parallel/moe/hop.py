"""One hop of a dispatch: rows, each with the choices that it serves, go to the ranks of a group that lead to their
experts.

A row that several choices need at one destination travels once; on the way back their weighted outputs are one row.
The tokens of a pass may travel in chunks, one after the other. What the ranks must know beforehand goes for all chunks
at once, in two messages: for each rank pair 8 bytes a chunk (numbers of rows and of choices) and 8 that say what the
pass is, which all ranks must agree on; then, for each choice, its expert (4 bytes, with a bit that says where a row
begins) and its weight (4; 8 in float64).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_parallel.collectives import Peers, Wait, all_gather_rows, start_counts
from expert_parallel.moe.ledger import Ledger, Trip
from expert_parallel.moe.permute import NO_ROW, gather_rows
from expert_parallel.moe.plan import StepContext
from expert_parallel.moe.travel import Order, RowChoices, Travel, order_choices, plan_travel


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
class Leg:
    """How the rows of one chunk travel in one hop. send, receive: how many of them, by peer."""

    token_U: Tensor
    rows_L: Tensor
    send: list[int]
    receive: list[int]


class Hop:
    """rank_of_expert: which of the peers leads to each expert. exchange_dtype: what rows travel in; None: as they
    are."""

    def __init__(
        self, name: str, peers: Peers, rank_of_expert: Sequence[int], merge: bool, exchange_dtype: torch.dtype | None
    ) -> None:
        self.name, self.peers, self.merge, self.exchange_dtype = name, peers, merge, exchange_dtype
        ranks = [*rank_of_expert, peers.size]
        self.rank_of_expert_E1 = torch.tensor(ranks, device="cpu")  # even where a model is built on meta

    def plan(
        self, chunks: Sequence[RowChoices], key: PassKey, ledger: Ledger
    ) -> tuple[list[Leg], Callable[[], list[RowChoices]]]:
        """How the rows of each chunk travel; and what to call for the choices that arrive, which are under way."""
        orders = self._order(chunks)
        wait = start_counts(sent_PW := self._count(orders, key, ledger), self.peers.group)
        travels = [
            plan_travel(choices, order, key.num_choices, self.merge)
            for choices, order in zip(chunks, orders, strict=True)
        ]
        sent_WP, received_WP = torch.stack([sent_PW, wait()]).mT.tolist()  # here the host waits
        refuse_disagreement(list(zip(*received_WP[-2:], strict=True)), key, self.peers)
        C = len(chunks)
        legs = [
            Leg(travel.token_U[: sum(send)], travel.rows_L, send, receive)
            for travel, send, receive in zip(travels, sent_WP[:C], received_WP[:C], strict=True)
        ]
        parcels = [
            departing(choices, order, travel, sum(send))
            for choices, order, travel, send in zip(chunks, orders, travels, sent_WP[C : 2 * C], strict=True)
        ]
        num_rows = [sum(leg.receive) for leg in legs]
        return legs, self._send_choices(parcels, sent_WP[C : 2 * C], received_WP[C : 2 * C], num_rows, ledger)

    def start(self, x_LD: Tensor, leg: Leg, ledger: Ledger) -> Trip:
        """The rows leave for those that need them."""
        x_UD = self._narrow(gather_rows(x_LD, leg.token_U, leg.rows_L))
        return ledger.trip(leg.send, leg.receive, self.peers, f"{self.name}dispatch").start(x_UD)

    def start_back(self, y_VD: Tensor, leg: Leg, ledger: Ledger) -> Trip:
        """What the arrived rows became leaves for where they came from; see `added_up`."""
        return ledger.trip(leg.receive, leg.send, self.peers, f"{self.name}combine").start(self._narrow(y_VD))

    def added_up(self, y_UD: Tensor, leg: Leg) -> Tensor:
        """What has come back, at the rows that it belongs to, added up in a fixed order."""
        return gather_rows(y_UD, leg.rows_L, leg.token_U)

    def _order(self, chunks: Sequence[RowChoices]) -> list[Order]:
        self.rank_of_expert_E1 = self.rank_of_expert_E1.to(chunks[0].expert_N.device)
        return [order_choices(choices, self.rank_of_expert_E1, self.peers.size, self.merge) for choices in chunks]

    def _count(self, orders: Sequence[Order], key: PassKey, ledger: Ledger) -> Tensor:
        """(P, 2 C + 2), int32: for each peer the rows of each chunk, the choices of each, and the key's words."""
        counts = [order.rows_P for order in orders] + [order.choices_P for order in orders]
        words_2P = counts[0].new_tensor(key.words)[:, None].expand(2, self.peers.size)
        sent_PW = torch.cat([torch.stack(counts), words_2P]).mT.to(torch.int32)
        ledger.count_bytes(sent_PW, [1] * self.peers.size, self.peers, "counts")
        return sent_PW

    def _send_choices(
        self,
        parcels: Sequence[tuple[Tensor, Tensor]],
        send_CP: Sequence[Sequence[int]],
        receive_CP: Sequence[Sequence[int]],
        num_rows: Sequence[int],
        ledger: Ledger,
    ) -> Callable[[], list[RowChoices]]:
        """All chunks' in one message. parcels: of each chunk, tags and weights of its choices, by destination.
        num_rows: that will arrive, of each chunk."""
        tag_N, weight_N = (by_peer(list(parts), send_CP) for parts in zip(*parcels, strict=True))
        send, receive = ([sum(column) for column in zip(*table, strict=True)] for table in (send_CP, receive_CP))
        tags: list[Tensor] = []

        def there(weight_N: Tensor) -> Wait:
            bits = weight_N.view(torch.int32).view(len(weight_N), weight_N.itemsize // 4)
            record = torch.cat([tag_N[:, None], bits], 1)
            wait = ledger.begin(record, send, receive, self.peers, "metadata", payload=False)

            def arrive() -> Tensor:
                arrived = wait()
                tags.append(arrived[:, 0])
                bits = arrived[:, 1:].clone(memory_format=torch.contiguous_format)  # at the start of its memory
                return bits.view(weight_N.dtype).flatten()

            return arrive

        def back(grad_N: Tensor) -> Wait:
            return ledger.begin(grad_N, receive, send, self.peers, "metadata backward", payload=False)

        trip = Trip(there, back).start(weight_N)

        def learn() -> list[RowChoices]:
            weights, tags_C = by_chunk(trip.finish(), receive_CP), by_chunk(tags.pop(), receive_CP)
            return [
                RowChoices((tag_N & 1).cumsum(0) - 1, (tag_N >> 1).long(), weight_N, rows)
                for tag_N, weight_N, rows in zip(tags_C, weights, num_rows, strict=True)
            ]

        return learn

    def _narrow(self, x: Tensor) -> Tensor:
        return x if self.exchange_dtype is None else x.to(self.exchange_dtype)


def departing(choices: RowChoices, order: Order, travel: Travel, count: int) -> tuple[Tensor, Tensor]:
    """The `count` choices that travel, in the order of travel: their tags (the expert, and in the lowest bit whether a
    row begins), and weights, which have a gradient."""
    choice_N = order.choice_N[:count]
    inverse_N1 = torch.where(travel.place_N < count, travel.place_N, NO_ROW)[:, None]
    tag_N = choices.expert_N[choice_N] << 1 | order.first_N[:count]
    return tag_N.to(torch.int32), gather_rows(choices.weight_N, choice_N, inverse_N1)


def by_peer(parts: Sequence[Tensor], counts_CP: Sequence[Sequence[int]]) -> Tensor:
    """Chunks, each by peer, as one message: by peer, for each its part of every chunk."""
    if len(parts) == 1:
        return parts[0]
    blocks_CP = [part.split(list(counts)) for part, counts in zip(parts, counts_CP, strict=True)]
    return torch.cat([block for blocks_C in zip(*blocks_CP, strict=True) for block in blocks_C])


def by_chunk(message: Tensor, counts_CP: Sequence[Sequence[int]]) -> list[Tensor]:
    """The inverse of by_peer."""
    if len(counts_CP) == 1:
        return [message]
    blocks = message.split([count for counts_C in zip(*counts_CP, strict=True) for count in counts_C])
    return [torch.cat(blocks[chunk :: len(counts_CP)]) for chunk in range(len(counts_CP))]
