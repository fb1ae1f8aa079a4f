"""Moves a chunk of a pass's tokens through the exchanges: to the experts, and back."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from expert_parallel.moe.dispatch.base import ChunkRoute, Exchange
from expert_parallel.moe.dispatch.exchange import AsyncCollective
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.types import DispatchedTokens


class Chunk:
    """Holds the state of one chunk: call `advance_dispatch` until it `is_dispatched`, `start_combine` with the outputs
    of the experts, then `advance_combine` until it `is_combined`.

    number: its index among the chunks of the pass. The dispatcher sets `routes`, one for each exchange as soon as it is
    known, and `expert_rows`, which rows each local expert computes.
    """

    def __init__(self, number: int, x_LD: Tensor, exchanges: Sequence[Exchange], ledger: Ledger) -> None:
        self.number = number
        self.exchanges = exchanges
        self.ledger = ledger
        self.dtype = x_LD.dtype
        self.routes: list[ChunkRoute] = []
        self.assigned: DispatchedTokens | None = None  # without its rows
        self.rows = x_LD  # the input of the next exchange; in the end y_LD
        self.under_way: AsyncCollective | None = None
        self.steps = 0  # calls of `advance_dispatch`: exchanges started, and one when the last has finished
        self.exchanges_left = len(exchanges)  # exchanges of the combine that are not started

    @property
    def has_arrived(self) -> bool:
        """Returns True once the rows are on the ranks of their experts."""
        return self.steps > len(self.exchanges)

    @property
    def is_home(self) -> bool:
        """Returns True once the outputs are back and summed."""
        return self.has_arrived and self.exchanges_left == 0 and self.under_way is None

    @property
    def tokens(self) -> DispatchedTokens:
        """Returns what this rank's experts compute, once the rows have been received."""
        assert self.has_arrived
        assert self.assigned is not None
        return replace(self.assigned, x_VD=self.rows)

    def advance(self) -> None:
        """Waits for the exchange in progress, and starts the next one towards the experts."""
        rows = self._waited()
        if self.steps < len(self.exchanges):
            exchange, route = self.exchanges[self.steps], self.routes[self.steps]
            self.under_way = exchange.start(rows, route, self.ledger)
        self.steps += 1

    def send_back(self, y_VD: Tensor) -> None:
        """Starts returning the outputs of the experts. y_VD: one row for each received row."""
        self.rows = y_VD
        self._start_back()

    def come_back(self) -> None:
        """Waits for the exchange in progress, sums what it returned, and starts the next one of the combine. Does
        nothing once the chunk `is_combined`."""
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
            exchange, self.under_way = self.under_way, None
            self.rows = exchange.finish().to(self.dtype)  # back from the dtype in transit
        return self.rows


def chunk_sizes(num_tokens: int, num_chunks: int) -> list[int]:
    """Returns the sizes of chunks of successive tokens, as equal as possible; some are 0 if there are more chunks than
    tokens."""
    ends = [num_tokens * (chunk + 1) // num_chunks for chunk in range(num_chunks)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Splits x along its first dimension into parts of these sizes."""
    return [x] if len(sizes) == 1 else x.split(list(sizes))


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates parts along their first dimension: the inverse of `split`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
