"""Collectives with gradients, and the log of what they moved.

Every function takes its process group. None means one rank alone: nothing is communicated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class CommLog:
    """Bytes that left this rank for another one, by purpose. The caller creates it, passes it down and reads it."""

    bytes_sent: dict[str, int] = field(default_factory=dict)

    def add(self, purpose: str, num_bytes: int) -> None:
        self.bytes_sent[purpose] = self.bytes_sent.get(purpose, 0) + num_bytes


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


def exchange_counts(counts_PC: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Row p of the result is what rank p holds for this rank. counts_PC: int64 (P, C), any device. No gradient."""
    if group_size(group) == 1:
        return counts_PC
    received_PC = torch.empty_like(counts_PC)
    dist.all_to_all_single(received_PC, counts_PC.contiguous(), group=group)
    return received_PC


def all_to_all_rows(
    x: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: dist.ProcessGroup | None,
    log: CommLog | None = None,
    purpose: str = "rows",
) -> Tensor:
    """Sends the first send_counts[0] rows of x to rank 0, the next send_counts[1] to rank 1, and so on.

    x: (sum(send_counts), ...), any dtype. Returns (sum(receive_counts), ...) ordered by source rank.
    Differentiable: the backward pass is the same exchange the other way round. A rank without rows takes part.
    """
    assert x.shape[0] == sum(send_counts), (x.shape, send_counts)
    if group_size(group) == 1:
        return x
    return _AllToAllRows.apply(x, list(send_counts), list(receive_counts), group, log, purpose)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        send_counts: list[int],
        receive_counts: list[int],
        group: dist.ProcessGroup,
        log: CommLog | None,
        purpose: str,
    ) -> Tensor:
        ctx.arguments = (receive_counts, send_counts, group, log, purpose + " backward")
        return _exchange(x, send_counts, receive_counts, group, log, purpose)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, *ctx.arguments), None, None, None, None, None


def _exchange(
    x: Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    group: dist.ProcessGroup,
    log: CommLog | None,
    purpose: str,
) -> Tensor:
    received = x.new_empty((sum(receive_counts), *x.shape[1:]))
    dist.all_to_all_single(received, x.contiguous(), receive_counts, send_counts, group=group)
    if log is not None:
        rows_to_others = sum(send_counts) - send_counts[dist.get_rank(group)]
        log.add(purpose, rows_to_others * x[:1].numel() * x.element_size() if x.shape[0] else 0)
    return received


def gather_text(text: str, device: torch.device, limit: int = 2000) -> list[str]:
    """Every rank's text, cut to `limit` bytes, on every rank. Bytes in tensors: nothing is unpickled."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [text]
    raw = text.encode()[:limit].ljust(limit, b"\0")
    mine = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return [bytes(part.tolist()).rstrip(b"\0").decode(errors="replace") for part in gathered]
