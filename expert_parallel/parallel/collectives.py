"""Implements collectives on rows of tensors, and the log of the traffic that they cause.

Functions that take a process group accept None, which stands for a group of this rank only: nothing is communicated.
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

# torch 2.13 renamed both.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

LinkClass = Literal["own", "node", "network"]
# A handle to a collective in flight: call it once to wait for the result. Every rank of the group must start the same
# collectives in the same order. With MPI the call that starts a collective already completes it.
Wait = Callable[[], Tensor]


class Phase(StrEnum):
    """Names the four exchanges of an MoE layer: row counts, routing metadata, token rows to the experts, and expert
    outputs back to the tokens' ranks."""

    COUNTS = "counts"
    METADATA = "metadata"
    DISPATCH = "dispatch"
    COMBINE = "combine"


Hop = Literal["", "between nodes", "within the node"]


class ExchangeKey(NamedTuple):
    """Identifies one exchange of a forward or backward pass. hop: the step of a hierarchical exchange, or "" if rows
    are sent in one step."""

    phase: Phase
    hop: Hop = ""
    is_backward: bool = False

    @property
    def backward_key(self) -> "ExchangeKey":
        """Returns the key of the exchange of gradients, in the backward pass, that belongs to this exchange."""
        return self._replace(is_backward=True)

    @property
    def to_experts(self) -> bool:
        """Returns True if rows are sent from the ranks of their tokens to the ranks of their experts, and False if they
        are sent back."""
        return (self.phase is Phase.COMBINE) == self.is_backward

    def __str__(self) -> str:
        return f"{self.hop}{': ' if self.hop else ''}{self.phase}{' backward' if self.is_backward else ''}"


@dataclass
class CommLog:
    """Counts the rows and bytes that this rank exchanged in one pass, by (ExchangeKey, link class).

    The link class tells how the other rank is connected: `own` counts rows that stayed on this rank, `node` those
    exchanged within a node, `network` those between nodes. The caller creates the log, passes it down and reads it; the
    backward pass adds its entries as it runs.
    """

    rows_sent: Counter[tuple[ExchangeKey, LinkClass]] = field(default_factory=Counter)
    rows_received: Counter[tuple[ExchangeKey, LinkClass]] = field(default_factory=Counter)
    bytes_sent: Counter[tuple[ExchangeKey, LinkClass]] = field(default_factory=Counter)

    def bytes_to_others(self, phase: Phase, *, is_backward: bool = False) -> int:
        """Returns the number of bytes that this rank sent to other ranks in one phase, summed over all hops."""
        return sum_traffic(self.bytes_sent, ("node", "network"), phase, is_backward)


def sum_traffic(
    counter: Counter[tuple[ExchangeKey, LinkClass]],
    links: Sequence[LinkClass],
    phase: Phase | None = None,
    is_backward: bool | None = None,
) -> int:
    """Returns the sum of a counter of a CommLog over the given link classes and over all hops.

    phase: None sums over all phases. is_backward: None sums over the forward and the backward pass.
    """
    return sum(
        number
        for (key, link), number in counter.items()
        if link in links and phase in (None, key.phase) and is_backward in (None, key.is_backward)
    )


@dataclass(frozen=True)
class Peers:
    """Describes a process group as one of its ranks sees it.

    ranks: the global ranks of the members. links: for each member, how it is connected to this rank ("own", "node" or
    "network"). If group is None, this rank is the only member.
    """

    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    links: tuple[LinkClass, ...]

    @staticmethod
    def of(group: dist.ProcessGroup | None, ranks_per_node: int | None = None) -> "Peers":
        """Returns the members of `group` as this rank sees them.

        ranks_per_node: how many consecutive global ranks share a node; None: all ranks share one.
        """
        me = dist.get_rank() if dist.is_initialized() else 0
        ranks = (me,) if group is None else tuple(dist.get_process_group_ranks(group))
        node_size = ranks_per_node or max(*ranks, me) + 1
        links: list[LinkClass] = ["node" if rank // node_size == me // node_size else "network" for rank in ranks]
        links[ranks.index(me)] = "own"
        return Peers(group, ranks, tuple(links))

    def __deepcopy__(self, memo: object) -> "Peers":
        return self  # the object is immutable, and a process group cannot be copied

    @property
    def size(self) -> int:
        """Returns the number of ranks in the group."""
        return len(self.ranks)

    @property
    def me(self) -> int:
        """Returns this rank's index within the group."""
        return self.links.index("own")


def group_size(group: dist.ProcessGroup | None) -> int:
    """Returns the number of ranks in `group`; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """Returns this rank's index within `group`; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the sum of x over the group in a new tensor, detached from autograd."""
    total = x.detach().clone()
    if group_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def start_all_to_all_counts(counts_PC: Tensor, group: dist.ProcessGroup | None) -> Wait:
    """Starts an all-to-all of counts. Row p of the result is the row that rank p sent to this rank.

    counts_PC: (P, C), integers on any device; row p goes to rank p. Returns a function that waits for the result (P,
    C). No gradient.
    """
    if group_size(group) == 1:
        return lambda: counts_PC
    counts_PC, received_PC = counts_PC.contiguous(), torch.empty_like(counts_PC, memory_format=torch.contiguous_format)
    work = dist.all_to_all_single(received_PC, counts_PC, group=group, async_op=True)
    return partial(_wait, work, received_PC, counts_PC)


def start_all_to_all_rows(
    x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: dist.ProcessGroup | None
) -> Wait:
    """Starts an all-to-all that sends the first send_counts[0] rows of x to rank 0, the next send_counts[1] to rank 1,
    and so on.

    x: (sum(send_counts), ...), any dtype. The result is (sum(receive_counts), ...), ordered by source rank. A rank that
    has no rows to send or receive must take part nevertheless. No gradient; moe/dispatch/async_collective.py adds it.
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
    """Runs `start_all_to_all_rows` and waits for its result."""
    return start_all_to_all_rows(x, send_counts, receive_counts, group)()


def start_all_gather_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> Wait:
    """Starts an all-gather of rows. The result holds the rows of all ranks in rank order, (sum(counts), ...).

    x: (counts[this rank], ...), any dtype. counts: the number of rows of every rank; each rank sends max(counts) rows,
    padded with zeros, as all-gather needs equal sizes. No gradient.
    """
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
    """Runs `start_all_gather_rows` and waits for its result."""
    return start_all_gather_rows(x, counts, group)()


def _wait(work: dist.Work, received: Tensor, sent: Tensor) -> Tensor:
    """Waits for `work` and returns `received`. sent: referenced until here, so that its memory is not reused while the
    collective reads it."""
    work.wait()  # NCCL: makes the current stream wait; gloo: blocks the host
    return received


def all_gather_columns(
    columns: Sequence[Tensor], group: dist.ProcessGroup | None
) -> tuple[list[Tensor], list[int], int]:
    """Gathers several tensors of equal length from all ranks in two collectives: lengths first, then rows as bytes.

    columns: tensors of one length, which may differ between ranks and may be 0. Returns each column with the rows of
    all ranks in rank order, the length on each rank, and the bytes that this rank sent. No gradient.
    """
    num_ranks, length = group_size(group), columns[0].shape[0]
    if num_ranks == 1:
        return [column.detach() for column in columns], [length], 0
    # .tolist() synchronises with the device: the sizes of the second collective must be known on the host.
    lengths = all_gather_rows(columns[0].new_tensor([length], dtype=torch.int64), [1] * num_ranks, group).tolist()
    flat = [as_bytes(column.detach()) for column in columns]
    widths = [column.shape[1] for column in flat]
    rows = all_gather_rows(torch.cat(flat, dim=1), lengths, group)
    result = [from_bytes(part, column) for part, column in zip(rows.split(widths, dim=1), columns, strict=True)]
    return result, lengths, (num_ranks - 1) * (max(lengths) * sum(widths) + 8)


def as_bytes(rows: Tensor) -> Tensor:
    """Reinterprets rows (L, ...) of any dtype as (L, bytes per row), uint8, with the same bits."""
    width = math.prod(rows.shape[1:])
    if rows.shape[0] == 0:
        return rows.new_empty(0, width * rows.element_size(), dtype=torch.uint8)
    return rows.reshape(-1, width).contiguous().view(torch.uint8)


def from_bytes(rows: Tensor, like: Tensor) -> Tensor:
    """Inverts `as_bytes`: returns rows with the dtype and trailing shape of `like`."""
    # clone: a slice of a buffer may start at an address that is not aligned for the wider dtype.
    return rows.flatten().clone().view(like.dtype).view(rows.shape[0], *like.shape[1:])


def any_rank(flag: bool) -> bool:
    """Returns True on all ranks if `flag` is True on any rank. It is a collective over all ranks, and blocks the
    host."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    count = torch.tensor([int(flag)])  # a CPU tensor goes through gloo (or MPI): the GPU is not synchronised
    dist.all_reduce(count)
    return bool(count)


def all_gather_text(text: str, device: torch.device, limit: int = 2000) -> list[str]:
    """Gathers the text of every rank on every rank, in rank order, each cut to `limit` bytes.

    Texts travel as uint8 tensors on `device`, as torch's all_gather_object would unpickle what it receives.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [text]
    raw = text.encode()[:limit].ljust(limit, b"\0")
    mine = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return [bytes(part.tolist()).rstrip(b"\0").decode(errors="replace") for part in gathered]
