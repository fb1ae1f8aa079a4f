"""Implements the ledger, which checks that every row that a rank sends arrives at the rank it was sent to, forward and
backward.

A `Ledger` lives for one forward pass of one layer and its backward pass. `counts` compares numbers of rows and is
always on. `rows` sends 16 more bytes with each row: a tag (source rank, and the index of the row among those for this
destination) and the sum of the row's bits; the receiver checks both and names every faulty row.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from expert_parallel.parallel import collectives
from expert_parallel.parallel.collectives import CommLog, ExchangeKey, Peers, Wait, as_bytes, from_bytes
from expert_parallel.settings import Settings

_TAG_BYTES = 16


class LedgerConfig(Settings):
    """Checks that every row sent between ranks arrives, forward and backward."""

    kind: Literal["counts", "rows"] = "counts"
    """Compares numbers of choices and rows (`counts`), or also a tag and a checksum of each row, 16 bytes more
    (`rows`)."""
    breach: Literal["error", "warn"] = "error"
    """Ends the run when a check fails (`error`), or warns and continues (`warn`)."""


class LedgerBreach(RuntimeError):
    """Reports that a row or a choice was lost, doubled, swapped or altered between ranks."""


@dataclass(frozen=True)
class Ledger:
    """Wraps the collectives that move rows: counts rows and bytes, and checks that every row arrives.

    layer, step: named in error messages. log: the numbers of rows and bytes, by exchange and link class; the backward
    pass adds to it.
    """

    config: LedgerConfig = field(default_factory=LedgerConfig)
    layer: int = 0
    step: int = 0
    log: CommLog = field(default_factory=CommLog)

    def all_to_all(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], peers: Peers, key: ExchangeKey
    ) -> Wait:
        """Starts an all-to-all of rows, without gradient. The returned function waits for the rows and checks them.

        send, receive: the number of rows for each rank and from each rank. x: (sum(send), ...), ordered by destination
        rank. The function's result: (sum(receive), ...), ordered by source rank. key: names the exchange in the log and
        in errors.
        """
        self.count_rows(send, receive, peers, key)
        tags = _tags(send, peers, x.device) if self.config.kind == "rows" else None
        rows = self._attach_tags(x, tags, send, peers, key)
        wait = collectives.start_all_to_all_rows(rows, send, receive, peers.group)
        return partial(self._wait_and_check, wait, x[:0], tags is not None, receive, peers, key)

    def all_gather(self, x: Tensor, counts: Sequence[int], peers: Peers, key: ExchangeKey) -> Wait:
        """Starts an all-gather of all ranks' rows, without gradient. The returned function waits for the rows and
        checks them.

        counts: the number of rows of each rank. Only bytes are counted here; the caller counts the rows that it keeps.
        """
        send = [counts[peers.me]] * peers.size
        tags = _tags(send[:1], peers, x.device) if self.config.kind == "rows" else None
        rows = self._attach_tags(x, tags, send, peers, key)
        wait = collectives.start_all_gather_rows(rows, counts, peers.group)
        return partial(self._wait_and_check, wait, x[:0], tags is not None, counts, peers, key)

    def all_to_all_metadata(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], peers: Peers, key: ExchangeKey
    ) -> Wait:
        """Starts an all-to-all of metadata, without gradient. Only its bytes are counted."""
        self.count_bytes(x, send, peers, key)
        return collectives.start_all_to_all_rows(x, send, receive, peers.group)

    def _attach_tags(
        self, x: Tensor, tags: Tensor | None, send: Sequence[int], peers: Peers, key: ExchangeKey
    ) -> Tensor:
        """Returns the rows as they are sent, and counts their bytes. With tags: uint8, each row followed by its tag and
        bit sum."""
        rows = x if tags is None else torch.cat([as_bytes(x), as_bytes(tags), as_bytes(_bit_sums(x))], dim=1)
        self.count_bytes(rows, send, peers, key)
        return rows

    def _wait_and_check(
        self, wait: Wait, like: Tensor, has_tags: bool, receive: Sequence[int], peers: Peers, key: ExchangeKey
    ) -> Tensor:
        """Waits for the rows, and returns them without tags, after checking them."""
        return self._check_rows(wait(), like, has_tags, receive, peers, key)

    def _check_rows(
        self, arrived: Tensor, like: Tensor, has_tags: bool, receive: Sequence[int], peers: Peers, key: ExchangeKey
    ) -> Tensor:
        """Returns the rows without their tags, and reports missing, additional and altered ones."""
        if has_tags:
            arrived = self._check_tags(arrived, like, receive, peers, key)
        if len(arrived) != sum(receive):
            if not has_tags:  # with tags, every such row has been reported already
                me = peers.ranks[peers.me]
                self.report(f"{key}: rank {me} was to receive {sum(receive)} rows and received {len(arrived)}")
            # Counted, so that the totals of check_conservation do not add up either.
            self.log.rows_received[key, "own"] += len(arrived) - sum(receive)
            # With breach: warn the pass continues, on as many rows as were expected.
            arrived = torch.cat([arrived, arrived.new_zeros(sum(receive), *arrived.shape[1:])])[: sum(receive)]
        return arrived

    def _check_tags(self, arrived: Tensor, x: Tensor, receive: Sequence[int], peers: Peers, key: ExchangeKey) -> Tensor:
        """Returns the rows without their tags, and reports rows whose tag or bit sum is wrong. The host waits for the
        result."""
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
        me = peers.ranks[peers.me]
        found = set()
        # The host waits below, but only if a row is wrong.
        for tag in set(expected_V.tolist()) - set(tag_V.tolist()):
            found.add((tag, "was lost"))
        for tag in tag_V[torch.isin(tag_V, expected_V)].tolist():
            if int((tag_V == tag).sum()) > 1:
                found.add((tag, "came twice"))
        for tag in tag_V[~torch.isin(tag_V, expected_V)].tolist():
            found.add((tag, "was not for it"))
        if not found:
            found |= {(tag, "is out of order") for tag in expected_V[wrong_V].tolist()}
        found |= {(tag, "was altered") for tag in tag_V[altered_V].tolist()}
        faults = [f"rank {tag >> 32} -> rank {me}, row {tag & 0xFFFFFFFF} {what}" for tag, what in sorted(found)]
        self.report(f"{key}: {'; '.join(faults[:4])}{f'; and {len(faults) - 4} more' if len(faults) > 4 else ''}")
        return rows

    def count_rows(self, send: Sequence[int], receive: Sequence[int], peers: Peers, key: ExchangeKey) -> None:
        """Adds to the log the numbers of rows sent to each rank (`send`) and received from each rank (`receive`)."""
        for peer, link in enumerate(peers.links):
            self.log.rows_sent[key, link] += send[peer]
            self.log.rows_received[key, link] += receive[peer]

    def report(self, what: str) -> None:
        """Raises a LedgerBreach with the message `what`, or warns, as `config.breach` says."""
        text = f"ledger: layer {self.layer}, step {self.step}, {what}"
        if self.config.breach == "error":
            raise LedgerBreach(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def count_bytes(self, rows: Tensor, send: Sequence[int], peers: Peers, key: ExchangeKey) -> None:
        """Adds the bytes sent to each rank p to the log: send[p] times the size of one row of `rows`."""
        row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
        for peer, link in enumerate(peers.links):
            self.log.bytes_sent[key, link] += send[peer] * row_bytes


def _tags(send: Sequence[int], peers: Peers, device: torch.device) -> Tensor:
    """Returns (U, 1) int64: this rank's number in the upper 32 bits, the index of the row for its destination in the
    lower."""
    me = peers.ranks[peers.me]
    return torch.cat([(me << 32) + torch.arange(count, device=device) for count in send])[:, None]


def _bit_sums(rows: Tensor) -> Tensor:
    """Returns (L, 1) int64: the sum, with wrap-around, of each row's bits, read as integers of its dtype's width."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    if rows.numel() == 0:
        return torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)
    return rows.contiguous().view(integers).reshape(len(rows), -1).sum(1, dtype=torch.int64)[:, None]
