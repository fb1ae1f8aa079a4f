"""Sharding: which of a step's sequences belong to one data rank.

Which sequences a step sees follows from (seed, step) alone: not from the number of ranks or micro-steps, nor from
where the files lie. So a checkpoint holds the step number, and no reader state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from expert_parallel.data.sampler import Sampler


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """documents_BS: the number of the document within its row, from 0, non-decreasing; None where documents are
    joined. The token that ends a document belongs to it."""

    inputs_BS: Tensor  # int64
    targets_BS: Tensor  # int64: the inputs' next tokens
    sequence_index_B: Tensor  # int64: which sequence of the micro-step's global batch
    documents_BS: Tensor | None = None  # int64

    def to(self, device: torch.device) -> "MicroBatch":
        documents_BS = None if self.documents_BS is None else self.documents_BS.to(device)
        inputs_BS, targets_BS = self.inputs_BS.to(device), self.targets_BS.to(device)
        return MicroBatch(inputs_BS, targets_BS, self.sequence_index_B.to(device), documents_BS)

    def at(self, positions_S: Tensor) -> "MicroBatch":
        """Some positions of each sequence."""
        documents_BS = None if self.documents_BS is None else self.documents_BS[:, positions_S]
        inputs_BS, targets_BS = self.inputs_BS[:, positions_S], self.targets_BS[:, positions_S]
        return MicroBatch(inputs_BS, targets_BS, self.sequence_index_B, documents_BS)


def shard_bounds(total: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """(first, count) of this rank's run of `total` items; the first ranks hold one more where it does not divide."""
    share, rest = divmod(total, num_ranks)
    return rank * share + min(rank, rest), share + (rank < rest)


def micro_batch(
    sampler: Sampler,
    *,
    step: int,
    global_batch: int,
    num_micro_steps: int,
    micro_step: int,
    num_ranks: int,
    rank: int,
) -> MicroBatch:
    """This rank's share of one micro-step. Micro-steps cut a step's samples in order, ranks cut a micro-step's."""
    assert global_batch % num_micro_steps == 0, f"global_batch {global_batch}, num_micro_steps {num_micro_steps}"
    size = global_batch // num_micro_steps
    first, count = shard_bounds(size, num_ranks, rank)
    sequences = sampler.sequences(step * global_batch + micro_step * size + first, count)
    return as_batch(sequences, first, sampler.separator)


def held_out_batch(sequences: Tensor, num_ranks: int, rank: int, separator: int | None) -> MicroBatch:
    """This rank's share of one batch of evaluation. sequences: all of it, (n, S + 1)."""
    first, count = shard_bounds(len(sequences), num_ranks, rank)
    return as_batch(sequences[first : first + count], first, separator)


def as_batch(sequences: Tensor, first: int, separator: int | None) -> MicroBatch:
    """sequences: (B, S + 1), of which the first is number `first` of the global batch."""
    inputs_BS = sequences[:, :-1].contiguous()
    return MicroBatch(
        inputs_BS=inputs_BS,
        targets_BS=sequences[:, 1:].contiguous(),
        sequence_index_B=torch.arange(first, first + len(sequences)),
        documents_BS=None if separator is None else number_documents(inputs_BS, separator),
    )


def number_documents(inputs_BS: Tensor, separator: int) -> Tensor:
    """int64, (B, S): how many documents have ended before each position."""
    ends_BS = (inputs_BS == separator).long()
    return ends_BS.cumsum(1) - ends_BS
