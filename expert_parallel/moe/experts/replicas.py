"""Tells the experts of a rank from replicated weights, where a wrapper could take them for such.

DistributedDataParallel and FSDP2 take every weight for a replica: they overwrite experts with those of other ranks and
average the gradients of different experts, without an error.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.moe.dispatch.checksums import hash_rows
from expert_parallel.parallel.collectives import all_gather_rows, all_reduce_sum, group_size

SAMPLE = 1024  # elements of each expert's matrix that are compared
RECIPE = (
    "give the very module that DistributedDataParallel wraps to expert_parallel.prepare_data_parallel, and fully_shard "
    "ignored_params=set(expert_parallel.expert_parameters(model)), as expert_parallel/moe/README.md shows under 'In "
    "your own model'"
)


def check_own_weights(weights: Sequence[Tensor], group: dist.ProcessGroup | None, name: str) -> None:
    """Raises a ValueError on all ranks of the group if two of them hold equal experts.

    Ranks whose experts are all copies of one are left out, as a dense model's feed-forward network may have been copied
    into every expert. weights: the stacks of this rank, each (e, ...). name: the group's, for the message.
    """
    if group_size(group) == 1:
        return
    # The host waits, once in the life of a layer: the numbers decide whether to raise.
    hashes = all_gather_rows(_hash_sample(weights)[None], [1] * group_size(group), group).tolist()
    first_rank: dict[int, int] = {}
    for rank, (digest, is_distinct) in enumerate(hashes):
        if is_distinct and first_rank.setdefault(digest, rank) != rank:
            raise ValueError(
                f"ranks {first_rank[digest]} and {rank} of {name} have equal weights in their experts, though each "
                f"holds others: a wrapper took them for replicas, or they were drawn alike; {RECIPE}, or set "
                "layer.experts.compares_ranks = False if they are meant to be equal"
            )


def _hash_sample(weights: Sequence[Tensor]) -> Tensor:
    """Returns int64 (2,): a hash of up to 2 * SAMPLE elements of each matrix, and 0 if this rank has several experts
    and all are equal, else 1."""
    parts = [weight.detach().flatten(1) for weight in weights]
    sample_eN = torch.cat([part[:, :: max(1, part.shape[1] // SAMPLE)] for part in parts], 1)
    hash_e = hash_rows(sample_eN)
    is_distinct = (hash_e != hash_e[0]).any() | (len(hash_e) == 1)
    return torch.cat([hash_rows(hash_e[None]), is_distinct.long()[None]])


def mean_gradient(weight: Tensor, num_ranks: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Returns the weight itself; in the backward pass its gradient is summed over `group` and divided by num_ranks.

    Part of the graph and not a hook, so that it holds for copies of the module and for the tensors that FSDP2 puts in
    place of its parameters.
    """
    mean: Tensor = _MeanGradient.apply(weight, num_ranks, group)
    return mean


class _MeanGradient(torch.autograd.Function):
    """Implements `mean_gradient`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, num_ranks: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.num_ranks = num_ranks
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = all_reduce_sum(grad, ctx.group) if group_size(ctx.group) > 1 else grad
        return total / ctx.num_ranks, None, None
