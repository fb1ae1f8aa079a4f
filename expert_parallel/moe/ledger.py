"""The ledger of exchanges: every row that leaves a rank is accounted for where it arrives, forward and backward.

One `Ledger` lives as long as one forward pass of one layer and the backward pass that belongs to it. `counts` compares
numbers of rows and is always on. `rows` sends 16 more bytes with each row: a tag (source rank, number of the row among
those for this destination) and the sum of the row's bits; the receiver checks both and names what it finds.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expert_parallel import collectives
from expert_parallel.collectives import CommLog, Peers, as_bytes, from_bytes
from expert_parallel.settings import Settings

Carry = Callable[[Tensor, Sequence[int], Sequence[int], Any], Tensor]
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

    def exchange(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], peers: Peers, purpose: str, payload: bool = True
    ) -> Tensor:
        """all_to_all_rows with a gradient, which is the same exchange the other way round. x: (sum(send), ...).
        payload: rows that the ledger accounts for; else metadata, of which bytes alone are counted."""
        return _Exchange.apply(x, self, list(send), list(receive), peers, purpose, payload)

    def carry(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], peers: Peers, purpose: str, payload: bool
    ) -> Tensor:
        """One exchange without a gradient."""
        if not payload:
            self._count_bytes(x, send, peers, purpose)
            return collectives.all_to_all_rows(x, send, receive, peers.group)
        self.count_rows(purpose, send, receive, peers)
        tags = _tags(send, peers, x.device) if self.config.kind == "rows" else None
        return self._checked(x, tags, collectives.all_to_all_rows, send, receive, peers, purpose)

    def broadcast(self, x: Tensor, counts: Sequence[int], peers: Peers, purpose: str) -> Tensor:
        """Every rank's rows on every rank, without a gradient. counts: each rank's number of rows. The caller counts
        the rows that are taken from them; the bytes are those of all."""
        mine = [counts[peers.me]] * peers.size

        def carry(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> Tensor:
            return collectives.all_gather_rows(x, receive, group)

        tags = _tags(mine[:1], Peers(None, peers.ranks, peers.links), x.device) if self.config.kind == "rows" else None
        return self._checked(x, tags, carry, mine, counts, peers, purpose)

    def _checked(
        self,
        x: Tensor,
        tags: Tensor | None,
        carry: Carry,
        send: Sequence[int],
        receive: Sequence[int],
        peers: Peers,
        purpose: str,
    ) -> Tensor:
        rows = x if tags is None else torch.cat([as_bytes(x), as_bytes(tags), as_bytes(_bit_sums(x))], dim=1)
        arrived = carry(rows, send, receive, peers.group)
        self._count_bytes(rows, send, peers, purpose)
        if tags is not None:
            arrived = self._check_tags(arrived, x, receive, peers, purpose)
        if len(arrived) != sum(receive):
            if tags is None:  # with tags it has been said, by name
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

    def _count_bytes(self, rows: Tensor, send: Sequence[int], peers: Peers, purpose: str) -> None:
        row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
        for peer, link in enumerate(peers.links):
            self.log.bytes_sent[purpose, link] += send[peer] * row_bytes


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ledger: Ledger,
        send: list[int],
        receive: list[int],
        peers: Peers,
        purpose: str,
        payload: bool,
    ) -> Tensor:
        ctx.ledger, ctx.arguments = ledger, (receive, send, peers, f"{purpose} backward", payload)
        return ledger.carry(x, send, receive, peers, purpose, payload)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ledger.carry(grad, *ctx.arguments), None, None, None, None, None, None


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
