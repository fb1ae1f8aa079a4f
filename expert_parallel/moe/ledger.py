"""The ledger of exchanges: every row that leaves a rank is accounted for where it arrives, forward and backward.

One `Ledger` lives as long as one forward pass of one layer and the backward pass that belongs to it. `counts` compares
numbers of rows and is always on. `rows` sends 16 more bytes with each row: a tag (source rank, number of the row among
those for this destination) and the sum of the row's bits; the receiver checks both and names what it finds.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expert_parallel import collectives
from expert_parallel.collectives import CommLog, Peers, Wait, as_bytes, from_bytes
from expert_parallel.settings import Settings

Start = Callable[[Tensor, Sequence[int], Sequence[int], Any], Wait]
_TAG_BYTES = 16


class LedgerConfig(Settings):
    """`counts`: choices and rows are counted and compared, always. `rows`: each row carries a tag and a content sum,
    checked where it arrives. `breach`: whether one ends the run, or warns and goes on."""

    kind: Literal["counts", "rows"] = "counts"
    breach: Literal["error", "warn"] = "error"


class LedgerBreach(RuntimeError):
    """A row or a choice was lost, doubled, swapped or altered on its way."""


@dataclass(frozen=True)
class Ledger:
    """layer, step: what messages name. log: rows and bytes, by purpose and link class; backward passes add to it."""

    config: LedgerConfig = field(default_factory=LedgerConfig)
    layer: int = 0
    step: int = 0
    log: CommLog = field(default_factory=CommLog)

    def exchange(self, x: Tensor, send: Sequence[int], receive: Sequence[int], peers: Peers, purpose: str) -> Tensor:
        """all_to_all_rows with a gradient, which is the same exchange the other way round. x: (sum(send), ...)."""
        return self.trip(send, receive, peers, purpose).start(x).finish()

    def trip(
        self, send: Sequence[int], receive: Sequence[int], peers: Peers, purpose: str, payload: bool = True
    ) -> "Trip":
        """An exchange that is started and finished apart, in the backward pass too. payload: rows that the ledger
        accounts for; else metadata, of which bytes alone are counted."""
        return Trip(
            partial(self.begin, send=send, receive=receive, peers=peers, purpose=purpose, payload=payload),
            partial(
                self.begin, send=receive, receive=send, peers=peers, purpose=f"{purpose} backward", payload=payload
            ),
        )

    def begin(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], peers: Peers, purpose: str, payload: bool = True
    ) -> Wait:
        """Starts one exchange, without a gradient. Waiting for it checks what has arrived."""
        if not payload:
            self.count_bytes(x, send, peers, purpose)
            return collectives.start_all_to_all_rows(x, send, receive, peers.group)
        self.count_rows(purpose, send, receive, peers)
        tags = _tags(send, peers, x.device) if self.config.kind == "rows" else None
        return self._begin(x, tags, collectives.start_all_to_all_rows, send, receive, peers, purpose)

    def begin_broadcast(self, x: Tensor, counts: Sequence[int], peers: Peers, purpose: str) -> Wait:
        """Every rank's rows on every rank, without a gradient. counts: each rank's number of rows. The caller counts
        the rows that are taken from them; the bytes are those of all."""
        mine = [counts[peers.me]] * peers.size

        def start(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> Wait:
            return collectives.start_all_gather_rows(x, receive, group)

        tags = _tags(mine[:1], Peers(None, peers.ranks, peers.links), x.device) if self.config.kind == "rows" else None
        return self._begin(x, tags, start, mine, counts, peers, purpose)

    def _begin(
        self,
        x: Tensor,
        tags: Tensor | None,
        start: Start,
        send: Sequence[int],
        receive: Sequence[int],
        peers: Peers,
        purpose: str,
    ) -> Wait:
        rows = x if tags is None else torch.cat([as_bytes(x), as_bytes(tags), as_bytes(_bit_sums(x))], dim=1)
        self.count_bytes(rows, send, peers, purpose)
        wait, like = start(rows, send, receive, peers.group), x[:0]
        return lambda: self._checked(wait(), like, tags is not None, receive, peers, purpose)

    def _checked(
        self, arrived: Tensor, like: Tensor, has_tags: bool, receive: Sequence[int], peers: Peers, purpose: str
    ) -> Tensor:
        if has_tags:
            arrived = self._check_tags(arrived, like, receive, peers, purpose)
        if len(arrived) != sum(receive):
            if not has_tags:  # with tags it has been said, by name
                me = peers.ranks[peers.me]
                self.report(f"{purpose}: rank {me} was to receive {sum(receive)} rows and received {len(arrived)}")
            self.log.rows_received[purpose, "own"] += len(arrived) - sum(receive)  # so that no total adds up
            arrived = torch.cat([arrived, arrived.new_zeros(sum(receive), *arrived.shape[1:])])[: sum(receive)]
        return arrived

    def _check_tags(self, arrived: Tensor, x: Tensor, receive: Sequence[int], peers: Peers, purpose: str) -> Tensor:
        """The rows without their tags. Looks at each row's tag and sum, on the host, and reports the first wrong
        one."""
        content, tags, sums = arrived.split([arrived.shape[1] - _TAG_BYTES, 8, 8], dim=1)
        rows, number = from_bytes(content, x), torch.empty(0, dtype=torch.int64)
        tag_V, sum_V = from_bytes(tags, number), from_bytes(sums, number)
        expected_V = torch.cat(
            [(peers.ranks[p] << 32) + torch.arange(n, device=x.device) for p, n in enumerate(receive)]
        )
        wrong_V = tag_V[: len(expected_V)] != expected_V[: len(tag_V)]
        altered_V = _bit_sums(rows).flatten() != sum_V
        if len(tag_V) == len(expected_V) and not bool(wrong_V.any()) and not bool(altered_V.any()):
            return rows
        me, found = peers.ranks[peers.me], set()
        for tag in sorted(set(expected_V.tolist()) - set(tag_V.tolist())):
            found.add((tag, "was lost"))
        for tag in tag_V[torch.isin(tag_V, expected_V)].tolist():
            if int((tag_V == tag).sum()) > 1:
                found.add((tag, "came twice"))
        for tag in tag_V[~torch.isin(tag_V, expected_V)].tolist():
            found.add((tag, "was not for it"))
        if not found:
            found |= {(tag, "is out of order") for tag in expected_V[wrong_V].tolist()}
        found |= {(tag, "was altered") for tag in tag_V[altered_V].tolist()}
        said = [f"rank {tag >> 32} -> rank {me}, row {tag & 0xFFFFFFFF} {what}" for tag, what in sorted(found)]
        self.report(f"{purpose}: {'; '.join(said[:4])}{f'; and {len(said) - 4} more' if len(said) > 4 else ''}")
        return rows

    def count_rows(self, purpose: str, send: Sequence[int], receive: Sequence[int], peers: Peers) -> None:
        for peer, link in enumerate(peers.links):
            self.log.rows_sent[purpose, link] += send[peer]
            self.log.rows_received[purpose, link] += receive[peer]

    def report(self, what: str) -> None:
        """Raises LedgerBreach, or warns, as set."""
        text = f"ledger: layer {self.layer}, step {self.step}, {what}"
        if self.config.breach == "error":
            raise LedgerBreach(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def count_bytes(self, rows: Tensor, send: Sequence[int], peers: Peers, purpose: str) -> None:
        row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
        for peer, link in enumerate(peers.links):
            self.log.bytes_sent[purpose, link] += send[peer] * row_bytes


class Trip:
    """One exchange there and, in the backward pass, back. `there`, `back`: start it, and return how to wait for it.

    `start` and `finish` are two operations of autograd, the later one's backward starts the exchange back and the
    earlier one's waits for it. So whatever is computed between them lies beneath the exchange in both passes, as
    autograd runs what is ready in the reverse order of its making.
    """

    def __init__(self, there: Callable[[Tensor], Wait], back: Callable[[Tensor], Wait]) -> None:
        self.there, self.back = there, back
        self.under_way: list[Wait] = []  # of one, between start and finish of either pass

    def start(self, x: Tensor) -> Self:
        self.token = _Start.apply(x, self)
        return self

    def finish(self) -> Tensor:
        """What has arrived, in x's dtype."""
        token = self.token
        del self.token  # the graph holds this trip: it would hold itself
        return _Finish.apply(token, self)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        trip.under_way.append(trip.there(x))
        return x.new_empty(0)  # what ties `finish` to x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.under_way.pop()(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return trip.under_way.pop()().detach()  # or what `there` holds would get this node, and hold itself

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trip.under_way.append(ctx.trip.back(grad))
        return grad.new_empty(0), None


def _tags(send: Sequence[int], peers: Peers, device: torch.device) -> Tensor:
    """(U, 1) int64: this rank's number in the upper half, below it the row's place among those of its destination."""
    me = peers.ranks[peers.me]
    return torch.cat([(me << 32) + torch.arange(count, device=device) for count in send])[:, None]


def _bit_sums(rows: Tensor) -> Tensor:
    """(L, 1) int64: each row's bits as integers of its dtype's width, added up with wrap-around."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    if rows.numel() == 0:
        return torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)
    return rows.contiguous().view(integers).reshape(len(rows), -1).sum(1, dtype=torch.int64)[:, None]
