"""Selects the sequences of a step that belong to one data-parallel rank.

The sequences of a step depend on (seed, step) alone: not on the number of ranks or micro-steps, nor on the location of
the files. So a checkpoint needs only the step number, and no reader state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from expert_parallel.data.sampler import Sampler, Sequences


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Holds this rank's sequences of one micro-step.

    documents_BS: the number of each token's document within its sequence, counted from 0, non-decreasing; None if
    documents are joined. The token that ends a document belongs to it.
    """

    inputs_BS: Tensor  # int64
    targets_BS: Tensor  # int64: the inputs' next tokens
    sequence_index_B: Tensor  # int64: index of each sequence in the micro-step's global batch
    documents_BS: Tensor | None = None  # int64

    def to(self, device: torch.device) -> "MicroBatch":
        documents_BS = None if self.documents_BS is None else self.documents_BS.to(device)
        inputs_BS = self.inputs_BS.to(device)
        targets_BS = self.targets_BS.to(device)
        return MicroBatch(inputs_BS, targets_BS, self.sequence_index_B.to(device), documents_BS)

    def select_positions(self, positions_S: Tensor) -> "MicroBatch":
        """Returns the micro-batch restricted to the given positions of each sequence."""
        documents_BS = None if self.documents_BS is None else self.documents_BS[:, positions_S]
        inputs_BS, targets_BS = self.inputs_BS[:, positions_S], self.targets_BS[:, positions_S]
        return MicroBatch(inputs_BS, targets_BS, self.sequence_index_B, documents_BS)


def shard_bounds(total: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """Returns (index of the first item, number of items) of the consecutive share of `total` items that `rank` takes;
    if they do not divide evenly, the first ranks take one more."""
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
    """Returns this rank's share of one micro-step. The sequences of a step are split into micro-steps in order, and
    those of a micro-step over the data-parallel ranks in order.

    global_batch: the number of sequences of a step. num_ranks, rank: the number of data-parallel ranks, and this one's
    index.
    """
    assert global_batch % num_micro_steps == 0, f"global_batch {global_batch}, num_micro_steps {num_micro_steps}"
    size = global_batch // num_micro_steps
    first, count = shard_bounds(size, num_ranks, rank)
    sequences = sampler.sequences(step * global_batch + micro_step * size + first, count)
    return make_micro_batch(sequences, first)


def held_out_batch(sequences: Sequences, num_ranks: int, rank: int) -> MicroBatch:
    """Returns this rank's share of one evaluation batch. sequences: the whole batch."""
    first, count = shard_bounds(len(sequences), num_ranks, rank)
    return make_micro_batch(sequences.select(first, count), first)


def make_micro_batch(sequences: Sequences, first: int) -> MicroBatch:
    """Splits sequences into inputs and targets. first: the index of the first sequence in the micro-step's global
    batch."""
    return MicroBatch(
        inputs_BS=sequences.tokens[:, :-1].contiguous(),
        targets_BS=sequences.tokens[:, 1:].contiguous(),
        sequence_index_B=torch.arange(first, first + len(sequences)),
        documents_BS=None if sequences.documents is None else sequences.documents[:, :-1].contiguous(),
    )
