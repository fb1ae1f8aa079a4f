"""Gathers the tokens that are decided on together (by capacity, expert choice or Sinkhorn), in an order that does not
depend on the layout.

`rank`: this rank's tokens of the micro-step. `sequence`: each sequence by itself, with its tokens on all ranks.
`global`: the tokens of all ranks, each once, in global order: by the index of their sequence in the micro-step's global
batch, then by position.
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
    """Describes the G tokens of a scope, in order, in blocks of equal length (including padding); each block is decided
    by itself.

    index_G: int64, the place of each token in the global order (see TokenBatch). real_G: bool, False for padding.
    sizes: the number of real tokens of each block. local_T: int64, the indices of this rank's tokens among the G.
    """

    num_blocks: int
    index_G: Tensor
    real_G: Tensor
    sizes: list[int]
    local_T: Tensor

    @property
    def block_G(self) -> Tensor:
        """Returns the index of each token's block, int64."""
        length = len(self.index_G) // max(self.num_blocks, 1)
        return torch.arange(len(self.index_G), device=self.index_G.device) // max(length, 1)


def gather_scope(scope: Scope, batch: TokenBatch, *columns: Tensor) -> tuple[ScopedTokens, list[Tensor]]:
    """Gathers the G tokens of `scope` that are decided on together with this rank's T tokens. Returns their
    description, and the values of `columns` for them.

    columns: tensors (T, ...) with one entry for each token; they are returned as (G, ...), detached, in the order of
    the G tokens.

    `global` gathers the columns of all ranks, with 9 more bytes a token, so that every rank decides on all tokens, with
    the same result; `sequence` does so over the ranks that share sequences. Every rank calls this, also one without
    tokens. Raises a ValueError, on every rank of the group, if the tokens have no valid global order.
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
    """Returns the number of real tokens of each block. The host waits for them: capacities are computed from them."""
    return real_G.view(num_blocks, -1).sum(1).tolist() if num_blocks else []


def _gather_scope_over_ranks(
    scope: Scope, batch: TokenBatch, real_T: Tensor, columns: tuple[Tensor, ...]
) -> tuple[ScopedTokens, list[Tensor]]:
    """Gathers the tokens of all ranks and sorts them by global index."""
    group, num_blocks = (batch.group, 1) if scope == "global" else (batch.sequence_group, batch.num_sequences)
    lacks_index = scope == "global" and group_size(group) > 1 and not batch.is_global
    index_T = torch.full_like(batch.index_T, -1) if lacks_index else batch.index_T  # -1 tells the other ranks
    (index_G, real_G, *gathered), lengths, sent = all_gather_columns([index_T, real_T, *columns], group)
    if bool((index_G < 0).any()):  # the host waits; all ranks raise, even if only one lacks the indices
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
    """Raises a ValueError if two tokens have the same index, or if the tokens are not those of num_sequences sequences
    of one length (None: of any number and length).

    index_G: sorted. The host waits for the comparisons.
    """
    twice_G = index_G[1:] == index_G[:-1]
    if bool(twice_G.any()):
        sequence, position = divmod(int(index_G[1:][twice_G][0]), 2**32)
        if batch.context.positions_S is None:
            raise ValueError(
                f"StepContext.sequence_index_B: two sequences of this micro-step have the index {sequence}"
            )
        raise ValueError(f"StepContext.positions_S: two tokens of sequence {sequence} have position {position}")
    if num_sequences is None or len(index_G) == 0:
        return
    lengths_b = torch.unique_consecutive(index_G >> 32, return_counts=True)[1].tolist()
    if len(lengths_b) != num_sequences or len(set(lengths_b)) > 1:
        raise ValueError(
            f"StepContext.sequence_index_B: ranks that share sequences must have the same ones, of equal length: this "
            f"rank has {num_sequences}, the ranks together {len(lengths_b)}, of {min(lengths_b)} to {max(lengths_b)} "
            "tokens"
        )
