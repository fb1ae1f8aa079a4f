"""Implements the ledger, which checks that every row that a rank sends arrives at the rank it was sent to, forward and
backward.

A `Ledger` lives for one forward pass of one layer and its backward pass. `counts` compares numbers of rows, and a sum
over one word of each row and over all metadata; it is always on. `rows` sends 16 more bytes with each row and each
choice (see row_tags.py); the receiver checks them at once, and names every faulty row.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from expert_parallel.moe.dispatch.checksums import (
    Checksums,
    RowBlocks,
    RowSides,
    SampledRows,
    as_words,
    select_words,
)
from expert_parallel.moe.dispatch.row_tags import ExchangePass, attach_tags, detach_tags, summarise
from expert_parallel.nn.random import mix
from expert_parallel.parallel import collectives
from expert_parallel.parallel.collectives import CommLog, ExchangeKey, Peers, Phase, Wait
from expert_parallel.settings import Settings


class LedgerConfig(Settings):
    """Checks that every row sent between ranks arrives, forward and backward."""

    kind: Literal["counts", "rows"] = "counts"
    """Compares numbers of choices and rows, and a checksum of a part of what was sent (`counts`), or also a tag and a
    checksum of each row and choice, 16 bytes more (`rows`)."""
    breach: Literal["error", "warn"] = "error"
    """Ends the run when a check fails (`error`), or warns and continues (`warn`)."""


class LedgerBreach(RuntimeError):
    """Reports that a row or a choice was lost, doubled, swapped or altered between ranks."""


@dataclass(frozen=True)
class Ledger:
    """Wraps the collectives that move rows: counts rows and bytes, and checks that every row arrives.

    layer, step, micro_step: of the pass. log: the numbers of rows and bytes by exchange. checksums: of what was sent
    and of what arrived. The backward pass adds to both. num_started: how often each exchange was started, once for each
    chunk. selected: which words are read, by the numbers of rows and of their words; the exchanges of one chunk share
    them.
    """

    config: LedgerConfig = field(default_factory=LedgerConfig)
    layer: int = 0
    step: int = 0
    log: CommLog = field(default_factory=CommLog)
    micro_step: int = 0
    num_started: Counter[ExchangeKey] = field(default_factory=Counter)
    checksums: Checksums = field(default_factory=Checksums)
    selected: dict[tuple[RowSides, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def all_to_all(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], peers: Peers, key: ExchangeKey
    ) -> Wait:
        """Starts an all-to-all of rows, without gradient. The returned function waits for the rows and checks them.

        send, receive: the number of rows for each rank and from each rank. x: (sum(send), ...), ordered by destination
        rank. The function's result: (sum(receive), ...), ordered by source rank. key: names the exchange in the log and
        in errors.
        """
        self.count_rows(send, receive, peers, key)
        return self._all_to_all(x, send, receive, peers, key)

    def all_to_all_metadata(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], peers: Peers, key: ExchangeKey
    ) -> Wait:
        """Starts an all-to-all of metadata as `all_to_all` does. Its bytes are counted, but not its rows."""
        return self._all_to_all(x, send, receive, peers, key)

    def all_gather(self, x: Tensor, counts: Sequence[int], peers: Peers, key: ExchangeKey) -> Wait:
        """Starts an all-gather of all ranks' rows, without gradient. The returned function waits for the rows and
        checks them.

        counts: the number of rows of each rank. Only bytes are counted here; the caller counts the rows that it keeps.
        """
        mine = RowBlocks.gathered([counts[peers.me]], [peers.ranks[peers.me]])
        sides = RowSides(mine, RowBlocks.gathered(counts, peers.ranks), num_copies=peers.size)
        start = partial(collectives.start_all_gather_rows, counts=counts, group=peers.group)
        return self._start(x, start, [counts[peers.me]] * peers.size, sides, peers, key)

    def _all_to_all(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], peers: Peers, key: ExchangeKey
    ) -> Wait:
        tokens, experts = (send, receive) if key.to_experts else (receive, send)
        sides = RowSides(RowBlocks.of(tokens, peers, True), RowBlocks.of(experts, peers, False))
        start = partial(collectives.start_all_to_all_rows, send_counts=send, receive_counts=receive, group=peers.group)
        return self._start(x, start, send, sides, peers, key)

    def _start(
        self,
        x: Tensor,
        start: Callable[[Tensor], Wait],
        send: Sequence[int],
        sides: RowSides,
        peers: Peers,
        key: ExchangeKey,
    ) -> Wait:
        """Starts a collective on the rows x, with tags if the config asks for them. The returned function waits for the
        rows and checks them. send: the number of rows sent to each rank."""
        exchange = ExchangePass(self.step, self.layer, self.micro_step, key, chunk=self.num_started[key])
        self.num_started[key] += 1
        sent, received = (sides.tokens, sides.experts) if key.to_experts else (sides.experts, sides.tokens)
        message = attach_tags(x, sent, exchange) if self.config.kind == "rows" else x
        self.count_bytes(message, send, peers, key)
        sent_V, received_V = self._select_words(x, sides, key)
        # Read before the collective starts: it is what the collective is handed.
        sample = self._sample(x, sent, sent_V, exchange, times=sides.num_copies)
        return partial(self._finish, start(message), x[:0], sample, received, received_V, exchange, peers)

    def _finish(
        self,
        wait: Wait,
        like: Tensor,
        sent: SampledRows,
        received: RowBlocks,
        received_V: Tensor | None,
        exchange: ExchangePass,
        peers: Peers,
    ) -> Tensor:
        """Waits for the rows, and returns them without tags, after checking them.

        Both samples are kept here, and not the first at the start: recomputation may start an exchange and not wait.
        """
        arrived, key = wait(), exchange.key
        if self.config.kind == "rows":
            arrived, faults = detach_tags(arrived, like, received, exchange, peers.ranks[peers.me])
            if faults:
                self.report(f"{key}: {summarise(faults)}")
        arrived = self._with_expected_length(arrived, sum(received.counts), key, peers)
        self.checksums.samples += [sent, self._sample(arrived, received, received_V, exchange, times=-1)]
        if key.is_backward and key.phase is Phase.DISPATCH:  # the pass ends: samples need not stay in memory
            self.checksums.sum(arrived.device)
        return arrived

    def _select_words(self, x: Tensor, sides: RowSides, key: ExchangeKey) -> tuple[Tensor | None, Tensor | None]:
        """Returns the indices of the words to be read of the rows that are sent, and of those that arrive. None:
        metadata, whose words are all read."""
        if key.phase is Phase.METADATA:
            return None, None
        row_words = as_words(x).shape[1]
        if (sides, row_words) not in self.selected:
            seed = mix(self.step, self.layer, self.micro_step)
            self.selected[sides, row_words] = select_words(sides, row_words, seed, x.device)
        tokens_V, experts_V = self.selected[sides, row_words]
        return (tokens_V, experts_V) if key.to_experts else (experts_V, tokens_V)

    def _sample(
        self, rows: Tensor, blocks: RowBlocks, word_V: Tensor | None, exchange: ExchangePass, times: int
    ) -> SampledRows:
        """Reads the words with these indices of the rows. times: 1 for rows that are sent, -1 for rows that arrived."""
        # A number below 2^42 (times the ranks of a group it fits in int64), so that the errors of two exchanges, chunks
        # or micro-steps do not add up to 0.
        coefficient = times * (mix(exchange.number) >> 21 | 1)
        words_VW = as_words(rows)
        if word_V is None:  # each word counts as a row
            counts = tuple(count * words_VW.shape[1] for count in blocks.counts)
            return SampledRows(exchange.key, words_VW.flatten().clone(), blocks._replace(counts=counts), coefficient)
        return SampledRows(exchange.key, words_VW.view(-1).index_select(0, word_V), blocks, coefficient)

    def _with_expected_length(self, arrived: Tensor, expected: int, key: ExchangeKey, peers: Peers) -> Tensor:
        """Returns as many rows as were expected, and reports missing and additional ones."""
        if len(arrived) == expected:
            return arrived
        if self.config.kind == "counts":  # with tags, every such row has been reported already
            me = peers.ranks[peers.me]
            self.report(f"{key}: rank {me} was to receive {expected} rows and received {len(arrived)}")
        # Counted, so that the totals of check_conservation do not add up either.
        self.log.rows_received[key, "own"] += len(arrived) - expected
        # With breach: warn the pass continues, on as many rows as were expected.
        return torch.cat([arrived, arrived.new_zeros(expected, *arrived.shape[1:])])[:expected]

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
