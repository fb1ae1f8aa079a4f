"""A chunk of a pass's tokens goes to its experts and back, by one exchange after the other."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from expert_parallel.moe.dispatch.all_to_all import AllToAllExchange, ChunkRoute
from expert_parallel.moe.dispatch.exchange import AsyncCollective
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.types import DispatchedTokens


class Chunk:
    """Takes the rows of some tokens to their experts and back: `advance` step by step until they have arrived,
    `send_back` with what the experts made of them, then `come_back` step by step until the outputs are home.

    number: its place among the chunks of the pass. The dispatcher sets `routes`, one for each exchange as it becomes
    known, and `assigned`: which arriving row each expert here computes for which choice.
    """

    def __init__(self, number: int, x_LD: Tensor, exchanges: Sequence[AllToAllExchange], ledger: Ledger) -> None:
        self.number, self.exchanges, self.ledger, self.dtype = number, exchanges, ledger, x_LD.dtype
        self.routes: list[ChunkRoute] = []
        self.assigned: DispatchedTokens | None = None
        self.rows = x_LD  # before the next exchange; at last y_LD
        self.under_way: AsyncCollective | None = None
        self.steps = 0  # taken towards the experts
        self.exchanges_left = len(exchanges)  # on the way back

    @property
    def has_arrived(self) -> bool:
        return self.steps > len(self.exchanges)

    @property
    def is_home(self) -> bool:
        return self.has_arrived and self.exchanges_left == 0 and self.under_way is None

    @property
    def tokens(self) -> DispatchedTokens:
        """What this rank's experts compute, when the rows have arrived."""
        assert self.has_arrived
        assert self.assigned is not None
        return replace(self.assigned, x_VD=self.rows)

    def advance(self) -> None:
        """Waits for the exchange under way, and starts the next one towards the experts."""
        rows = self._waited()
        if self.steps < len(self.exchanges):
            exchange, route = self.exchanges[self.steps], self.routes[self.steps]
            self.under_way = exchange.start(rows, route, self.ledger)
        self.steps += 1

    def send_back(self, y_VD: Tensor) -> None:
        """Starts the way back of what the experts made of each arrived row."""
        self.rows = y_VD
        self._start_back()

    def come_back(self) -> None:
        """Waits for the exchange under way, adds up what has come back, and starts the next one on the way back; does
        nothing at home."""
        if self.is_home:
            return
        self.rows = self.exchanges[self.exchanges_left].add_up(self._waited(), self.routes[self.exchanges_left])
        self._start_back()

    def _start_back(self) -> None:
        if self.exchanges_left > 0:
            self.exchanges_left -= 1
            exchange, route = self.exchanges[self.exchanges_left], self.routes[self.exchanges_left]
            self.under_way = exchange.start_back(self.rows, route, self.ledger)

    def _waited(self) -> Tensor:
        if self.under_way is not None:
            arriving, self.under_way = self.under_way, None
            self.rows = arriving.finish().to(self.dtype)
        return self.rows


def chunk_sizes(num_tokens: int, num_chunks: int) -> list[int]:
    """Returns sizes of chunks of successive tokens, as equal as they can be; 0 where there are more chunks than
    tokens."""
    ends = [num_tokens * (chunk + 1) // num_chunks for chunk in range(num_chunks)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Divides x along its first dimension."""
    return [x] if len(sizes) == 1 else x.split(list(sizes))


def join(parts: Sequence[Tensor]) -> Tensor:
    """The inverse of `split`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
