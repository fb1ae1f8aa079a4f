"""Scopes: the tokens that a decision looks across (capacity, expert choice, Sinkhorn), in an order that no layout
changes.

`rank`: this rank's tokens of the micro-step. `sequence`: each sequence on its own, whole, on however many ranks its
tokens are. `global`: the tokens of all ranks, each once, in global order: index of the sequence in the micro-step's
global batch, then position.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expert_parallel.moe.context import TokenBatch
from expert_parallel.parallel.collectives import all_gather_columns, group_rank, group_size

Scope = Literal["rank", "sequence", "global"]


@dataclass(frozen=True)
class ScopedTokens:
    """G tokens in order, in blocks of equal length (masked ones included) that are decided on their own.

    index_G, real_G: as in TokenBatch. sizes: each block's real tokens. local_T: where this rank's tokens stand.
    """

    num_blocks: int
    index_G: Tensor
    real_G: Tensor
    sizes: list[int]
    local_T: Tensor

    @property
    def block_G(self) -> Tensor:
        length = len(self.index_G) // max(self.num_blocks, 1)
        return torch.arange(len(self.index_G), device=self.index_G.device) // max(length, 1)


def gather_scope(scope: Scope, batch: TokenBatch, *columns: Tensor) -> tuple[ScopedTokens, list[Tensor]]:
    """The view of this rank's tokens under `scope`, and the columns (T, ...) as (G, ...) in the view's order. Detached.

    `global` gathers the columns over the ranks, each with 9 bytes a token beside them, so that every rank decides all
    of it alike; `sequence` does so over the ranks among which sequences are divided. Every rank calls it, with tokens
    or without.
    """
    real_T = torch.ones_like(batch.index_T, dtype=torch.bool) if batch.real_T is None else batch.real_T
    is_divided = group_size(batch.sequence_group) > 1 or batch.context.positions_S is not None
    if scope == "global" or (scope == "sequence" and is_divided):
        return _gather_scope_over_ranks(scope, batch, real_T, columns)
    num_blocks = batch.num_sequences if scope == "sequence" else 1
    sizes = (
        [len(real_T) // max(num_blocks, 1)] * num_blocks if batch.real_T is None else _block_sizes(real_T, num_blocks)
    )
    local_T = torch.arange(len(real_T), device=real_T.device)
    return ScopedTokens(num_blocks, batch.index_T, real_T, sizes, local_T), [column.detach() for column in columns]


def _block_sizes(real_G: Tensor, num_blocks: int) -> list[int]:
    return real_G.view(num_blocks, -1).sum(1).tolist() if num_blocks else []


def _gather_scope_over_ranks(
    scope: Scope, batch: TokenBatch, real_T: Tensor, columns: tuple[Tensor, ...]
) -> tuple[ScopedTokens, list[Tensor]]:
    """ValueError, on every rank of the group alike, where the global order is not one."""
    group, num_blocks = (batch.group, 1) if scope == "global" else (batch.sequence_group, batch.num_sequences)
    lacks_index = scope == "global" and group_size(group) > 1 and not batch.is_global
    index_T = torch.full_like(batch.index_T, -1) if lacks_index else batch.index_T
    (index_G, real_G, *gathered), lengths, sent = all_gather_columns([index_T, real_T, *columns], group)
    if bool((index_G < 0).any()):  # every rank sees it, whichever rank lacks them
        raise ValueError(
            "scope 'global' over several ranks needs each sequence's index in the micro-step's global batch: give "
            "StepContext.sequence_index_B on all of them"
        )
    batch.scope_bytes.sent += sent
    index_G, order_G = index_G.sort(stable=True)
    _check_global_order(index_G, batch, num_blocks if scope == "sequence" else None)
    place_G = torch.empty_like(order_G)
    place_G[order_G] = torch.arange(len(order_G), device=order_G.device)
    rank = group_rank(group)
    start = sum(lengths[:rank])
    real_G = real_G[order_G]
    view = ScopedTokens(
        num_blocks, index_G, real_G, _block_sizes(real_G, num_blocks), place_G[start : start + lengths[rank]]
    )
    return view, [column[order_G] for column in gathered]


def _check_global_order(index_G: Tensor, batch: TokenBatch, num_sequences: int | None) -> None:
    """ValueError where two tokens have one place, or the tokens are not those of so many sequences of one length.
    index_G: sorted."""
    twice_G = index_G[1:] == index_G[:-1]
    if bool(twice_G.any()):
        sequence, position = divmod(int(index_G[1:][twice_G][0]), 2**32)
        if batch.context.positions_S is None:
            raise ValueError(
                f"StepContext.sequence_index_B: two sequences of this micro-step have the index {sequence}"
            )
        raise ValueError(f"StepContext.positions_S: two tokens of sequence {sequence} stand at position {position}")
    if num_sequences is None or len(index_G) == 0:
        return
    lengths_b = torch.unique_consecutive(index_G >> 32, return_counts=True)[1].tolist()
    if len(lengths_b) != num_sequences or len(set(lengths_b)) > 1:
        raise ValueError(
            f"StepContext.sequence_index_B: the ranks that share sequences must have the same ones: here are "
            f"{num_sequences}, on all of them {len(lengths_b)}, of {min(lengths_b)} to {max(lengths_b)} tokens"
        )
