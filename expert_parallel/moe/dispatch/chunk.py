"""Moves a chunk of a pass's tokens through the exchanges: to the experts, and back."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from expert_parallel.moe.dispatch.async_collective import AsyncCollective
from expert_parallel.moe.dispatch.base import ChunkRoute, Exchange
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.types import DispatchedTokens


class Chunk:
    """Holds the state of one chunk of tokens. Call `advance_dispatch` until it `is_dispatched`, `start_combine` with
    the outputs of the experts, then `advance_combine` until it `is_combined`.

    number: the chunk's index among the chunks of the pass. The dispatcher appends the route of each exchange to
    `routes` as soon as it is known, and sets `expert_rows`, which tells the rows that each local expert computes.
    """

    def __init__(self, number: int, x_LD: Tensor, exchanges: Sequence[Exchange], ledger: Ledger) -> None:
        self.number = number
        self.exchanges = exchanges
        self.ledger = ledger
        self.dtype = x_LD.dtype
        self.routes: list[ChunkRoute] = []
        self.expert_rows: DispatchedTokens | None = None  # without its rows
        self.rows = x_LD  # the input of the next exchange; in the end y_LD
        self.in_progress: AsyncCollective | None = None
        self.num_started = 0  # calls of `advance_dispatch`: exchanges started, and one when the last has finished
        self.combines_left = len(exchanges)  # exchanges of the combine that are not started

    @property
    def is_dispatched(self) -> bool:
        """Returns True once the rows are on the ranks of their experts."""
        return self.num_started > len(self.exchanges)

    @property
    def is_combined(self) -> bool:
        """Returns True once the outputs are back and summed."""
        return self.is_dispatched and self.combines_left == 0 and self.in_progress is None

    @property
    def tokens(self) -> DispatchedTokens:
        """Returns the input of this rank's experts, once the rows have been received."""
        assert self.is_dispatched
        assert self.expert_rows is not None
        return replace(self.expert_rows, x_VD=self.rows)

    def advance_dispatch(self) -> None:
        """Waits for the exchange in progress, and starts the next one towards the experts."""
        rows = self._waited()
        if self.num_started < len(self.exchanges):
            exchange, route = self.exchanges[self.num_started], self.routes[self.num_started]
            self.in_progress = exchange.start(rows, route, self.ledger)
        self.num_started += 1

    def start_combine(self, y_VD: Tensor) -> None:
        """Starts sending the outputs of the experts back. y_VD: one output for each received row."""
        self.rows = y_VD
        self._start_back()

    def advance_combine(self) -> None:
        """Waits for the exchange in progress, sums what it returned, and starts the next one of the combine. Does
        nothing once the chunk `is_combined`."""
        if self.is_combined:
            return
        self.rows = self.exchanges[self.combines_left].add_up(self._waited(), self.routes[self.combines_left])
        self._start_back()

    def _start_back(self) -> None:
        """Starts the next exchange of the combine, if there is one."""
        if self.combines_left > 0:
            self.combines_left -= 1
            exchange, route = self.exchanges[self.combines_left], self.routes[self.combines_left]
            self.in_progress = exchange.start_back(self.rows, route, self.ledger)

    def _waited(self) -> Tensor:
        """Waits for the exchange in progress, if there is one, and returns the rows."""
        if self.in_progress is not None:
            exchange, self.in_progress = self.in_progress, None
            self.rows = exchange.finish().to(self.dtype)  # back from the dtype in transit
        return self.rows


def chunk_sizes(num_tokens: int, num_chunks: int) -> list[int]:
    """Divides num_tokens successive tokens into num_chunks chunks, as equal as possible, and returns the number of
    tokens of each; some are 0 if there are more chunks than tokens."""
    ends = [num_tokens * (chunk + 1) // num_chunks for chunk in range(num_chunks)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Splits x along its first dimension into parts of these sizes."""
    return [x] if len(sizes) == 1 else x.split(list(sizes))


def join(parts: Sequence[Tensor]) -> Tensor:
    """Returns the parts concatenated along their first dimension: the inverse of `split`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
