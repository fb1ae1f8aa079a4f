"""Collectives on rows, and the log of what they moved.

Every function takes its process group. None means one rank alone: nothing is communicated.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 gave them other names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Link = Literal["own", "node", "network"]
# What a collective that was started returns: called once, it waits for the result. Every rank of the group starts the
# same ones in the same order; MPI's are done when they have been started.
Wait = Callable[[], Tensor]


class Phase(StrEnum):
    """Names what an exchange of an MoE layer carries: numbers of rows; the choices that rows serve; rows to the
    experts; their outputs back."""

    COUNTS = "counts"
    METADATA = "metadata"
    DISPATCH = "dispatch"
    COMBINE = "combine"


Hop = Literal["", "between nodes", "within the node"]


class ExchangeKey(NamedTuple):
    """Names one exchange of a pass. hop: which of several that rows take one after the other; "" where there is one."""

    phase: Phase
    hop: Hop = ""
    is_backward: bool = False

    @property
    def of_backward(self) -> "ExchangeKey":
        """Returns the key of the gradients' exchange."""
        return self._replace(is_backward=True)

    def __str__(self) -> str:
        return f"{self.hop}{': ' if self.hop else ''}{self.phase}{' backward' if self.is_backward else ''}"


@dataclass
class CommLog:
    """What this rank exchanged in one pass, by (ExchangeKey, link class): rows and bytes. `own` never left the rank.

    The backward pass adds its own entries as it runs. The caller makes it, passes it down and reads it.
    """

    rows_sent: Counter[tuple[ExchangeKey, Link]] = field(default_factory=Counter)
    rows_received: Counter[tuple[ExchangeKey, Link]] = field(default_factory=Counter)
    bytes_sent: Counter[tuple[ExchangeKey, Link]] = field(default_factory=Counter)

    def bytes_to_others(self, phase: Phase, *, is_backward: bool = False) -> int:
        """Returns the bytes that left this rank, over all hops."""
        return total_of(self.bytes_sent, ("node", "network"), phase, is_backward)


def total_of(
    counter: Counter[tuple[ExchangeKey, Link]],
    links: Sequence[Link],
    phase: Phase | None = None,
    is_backward: bool | None = None,
) -> int:
    """Returns the sum of a log's counter over these links and over all hops; of every phase, and of both passes, where
    none is named."""
    return sum(
        number
        for (key, link), number in counter.items()
        if link in links and phase in (None, key.phase) and is_backward in (None, key.is_backward)
    )


@dataclass(frozen=True)
class Peers:
    """The ranks of a process group as one of them sees them. ranks: their numbers in the world. links: what lies
    between them and this rank. group None: this rank alone."""

    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    links: tuple[Link, ...]

    @staticmethod
    def of(group: dist.ProcessGroup | None, ranks_per_node: int | None = None) -> "Peers":
        """ranks_per_node: consecutive ranks of the world share a node; None: all do."""
        me = dist.get_rank() if dist.is_initialized() else 0
        ranks = (me,) if group is None else tuple(dist.get_process_group_ranks(group))
        node_size = ranks_per_node or max(*ranks, me) + 1
        links: list[Link] = ["node" if rank // node_size == me // node_size else "network" for rank in ranks]
        links[ranks.index(me)] = "own"
        return Peers(group, ranks, tuple(links))

    def __deepcopy__(self, memo: object) -> "Peers":
        return self  # immutable, and a process group cannot be copied

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def me(self) -> int:
        """This rank's place among them."""
        return self.links.index("own")


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of x over the group, in a new tensor. No gradient passes."""
    total = x.detach().clone()
    if group_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def start_counts(counts_PC: Tensor, group: dist.ProcessGroup | None) -> Wait:
    """Row p of the result is what rank p holds for this rank. counts_PC: (P, C), integers, any device. No gradient."""
    if group_size(group) == 1:
        return lambda: counts_PC
    counts_PC, received_PC = counts_PC.contiguous(), torch.empty_like(counts_PC, memory_format=torch.contiguous_format)
    work = dist.all_to_all_single(received_PC, counts_PC, group=group, async_op=True)
    return partial(_wait, work, received_PC, counts_PC)


def start_all_to_all_rows(
    x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: dist.ProcessGroup | None
) -> Wait:
    """Sends the first send_counts[0] rows of x to rank 0, the next send_counts[1] to rank 1, and so on.

    x: (sum(send_counts), ...), any dtype. What is waited for: (sum(receive_counts), ...), ordered by source rank. A
    rank without rows takes part. No gradient: see moe/dispatch/exchange.py.
    """
    assert x.shape[0] == sum(send_counts), (x.shape, send_counts)
    if group_size(group) == 1:
        return lambda: x
    x, received = x.contiguous(), x.new_empty((sum(receive_counts), *x.shape[1:]))
    work = dist.all_to_all_single(received, x, list(receive_counts), list(send_counts), group=group, async_op=True)
    return partial(_wait, work, received, x)


def all_to_all_rows(
    x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: dist.ProcessGroup | None
) -> Tensor:
    """start_all_to_all_rows, waited for."""
    return start_all_to_all_rows(x, send_counts, receive_counts, group)()


def start_all_gather_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> Wait:
    """All ranks' rows in rank order, on every rank. counts: every rank's number of rows; sent padded to the largest.
    x: (counts[this rank], ...), any dtype. No gradient."""
    if group_size(group) == 1:
        return lambda: x
    mine = x.new_zeros((max(counts), *x.shape[1:]))
    mine[: x.shape[0]] = x
    gathered = mine.new_empty((len(counts) * max(counts), *x.shape[1:]))
    work = all_gather_single(gathered, mine, group=group, async_op=True)

    def wait() -> Tensor:
        blocks = _wait(work, gathered, mine).view(len(counts), max(counts), *x.shape[1:])
        return torch.cat([block[:count] for block, count in zip(blocks.unbind(0), counts, strict=True)])

    return wait


def all_gather_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """start_all_gather_rows, waited for."""
    return start_all_gather_rows(x, counts, group)()


def _wait(work: dist.Work, received: Tensor, sent: Tensor) -> Tensor:
    """sent: kept until here, since it is being read."""
    work.wait()
    return received


def gather_columns(columns: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[list[Tensor], list[int], int]:
    """All ranks' rows of each column, in rank order, on every rank; each rank's number of rows; the bytes sent.

    columns: tensors of one length, which may differ between ranks and be 0. Two collectives: the lengths, then all
    columns as bytes. No gradient.
    """
    num_ranks, length = group_size(group), columns[0].shape[0]
    if num_ranks == 1:
        return [column.detach() for column in columns], [length], 0
    lengths = all_gather_rows(columns[0].new_tensor([length], dtype=torch.int64), [1] * num_ranks, group).tolist()
    flat = [as_bytes(column.detach()) for column in columns]
    rows, widths = all_gather_rows(torch.cat(flat, dim=1), lengths, group), [column.shape[1] for column in flat]
    result = [from_bytes(part, column) for part, column in zip(rows.split(widths, dim=1), columns, strict=True)]
    return result, lengths, (num_ranks - 1) * (max(lengths) * sum(widths) + 8)


def as_bytes(rows: Tensor) -> Tensor:
    """(L, ...) of any dtype -> (L, bytes of a row), uint8: the same bits."""
    width = math.prod(rows.shape[1:])
    if rows.shape[0] == 0:
        return rows.new_empty(0, width * rows.element_size(), dtype=torch.uint8)
    return rows.reshape(-1, width).contiguous().view(torch.uint8)


def from_bytes(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of as_bytes: rows of `like`'s dtype and shape. A copy: a part of a buffer may lie unaligned in it."""
    return rows.flatten().clone().view(like.dtype).view(rows.shape[0], *like.shape[1:])


def anywhere(flag: bool) -> bool:
    """Whether the flag is set on any rank of the world. Every rank calls it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    count = torch.tensor([int(flag)])  # on the CPU: no GPU waits for it
    dist.all_reduce(count)
    return bool(count)


def gather_text(text: str, device: torch.device, limit: int = 2000) -> list[str]:
    """Every rank's text, cut to `limit` bytes, on every rank. Bytes in tensors: nothing is unpickled."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [text]
    raw = text.encode()[:limit].ljust(limit, b"\0")
    mine = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return [bytes(part.tolist()).rstrip(b"\0").decode(errors="replace") for part in gathered]
