"""Sums the gradients of the native engine (PyTorch without DeepSpeed) over ranks, computes their norm, and clips them.

The loss is divided once, by the global number of tokens, and each rank back-propagates its share of it. So every
reduction is a SUM, and nothing is divided here.

The gradient of an expert's weight is summed over these groups:

    group                      by
    expert parallel (ep)       nothing here: each row went to its expert's rank, and the backward pass of combine brings
                               its dy there, so that the product over rows (experts/fused.py) is the whole sum
    expert tensor (etp)        likewise: experts/expert_tensor_parallel.py gathers the rows and their dy; only b_out,
                               which is replicated, is summed below
    expert data (edp)          reduce_gradients below; where they are sharded, FSDP2 in its backward pass
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expert_parallel.moe.parameters import (
    TIED,
    LogicalParameter,
    local_tensor,
    logical_parameters,
    replica_index_and_count,
)
from expert_parallel.parallel.collectives import all_reduce_sum, group_size
from expert_parallel.parallel.mesh import ParallelMesh

BUCKET_BYTES = 32 * 1024**2


def reduce_gradients(model: nn.Module, mesh: ParallelMesh, *, sharded: bool) -> None:
    """Sums the gradients of a step over all ranks that hold the same parameters.

    sharded: True if FSDP2 has summed them over the data-parallel ranks already.
    """
    dense: list[LogicalParameter] = []
    experts: list[LogicalParameter] = []
    for logical in logical_parameters(model):
        assert logical.parameter.grad is not None, f"{logical.names[0]} has no gradient: it is cut off from the loss"
        (experts if logical.is_expert else dense).append(logical)
    if not sharded:
        _all_reduce_in_buckets(dense, mesh.dense_group)
        _all_reduce_in_buckets(experts, mesh.edp_group)
    # Parameters that tp or etp replicates (norms, routers, biases): each of its ranks has computed other tokens.
    _all_reduce_in_buckets([logical for logical in dense if logical.tensor_shard is None], mesh.tp_group)
    _all_reduce_in_buckets([logical for logical in experts if logical.tensor_shard is None], mesh.etp_group)
    # Key and value heads that several tp ranks hold, if there are fewer heads than ranks.
    _all_reduce_in_buckets(
        [logical for logical in dense if logical.tensor_shard and logical.tensor_shard.copies > 1],
        mesh.kv_replica_group,
    )
    # The embedding table, if the first and the last pipeline stage hold a copy each.
    _all_reduce_in_buckets([logical for logical in dense if logical.names == TIED], mesh.tied_embedding_group)


def is_first_replica(logical: LogicalParameter, mesh: ParallelMesh) -> bool:
    """Returns True on the first of the ranks that hold the same elements of a parameter."""
    return replica_index_and_count(logical, mesh)[0] == 0


def global_grad_norm(model: nn.Module, mesh: ParallelMesh) -> Tensor:
    """Returns the L2 norm of the whole model's gradient, each element counted once: a float64 scalar on the device, the
    same on all ranks."""
    # float64, so that the sum does not depend on the order of the parameters, up to the float32 that is reported.
    total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for logical in logical_parameters(model):
        assert logical.parameter.grad is not None
        if is_first_replica(logical, mesh):
            total += torch.linalg.vector_norm(local_tensor(logical.parameter.grad)).double().square()
    return all_reduce_sum(total, dist.group.WORLD).sqrt()


def clip_gradients(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Multiplies all gradients, in place, by limit / norm if norm exceeds limit. norm: that of the whole model's
    gradient."""
    factor = (limit / norm).clamp(max=1.0)
    for parameter in model.parameters():
        grad = local_tensor(parameter.grad)  # type: ignore[arg-type]
        grad.mul_(factor.to(grad.dtype))


def _all_reduce_in_buckets(logicals: list[LogicalParameter], group: dist.ProcessGroup | None) -> None:
    """All-reduces gradients in place. Every rank of the group must pass the same parameters in the same order."""
    if group_size(group) == 1:
        return
    grads = [local_tensor(logical.parameter.grad) for logical in logicals if logical.parameter.grad is not None]
    for bucket in _buckets(grads):
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat, group=group)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Groups consecutive gradients of one dtype into buckets of at most BUCKET_BYTES (or a single larger gradient)."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        bytes_ = grad.numel() * grad.element_size()
        if bucket and (size + bytes_ > BUCKET_BYTES or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += bytes_
    if bucket:
        yield bucket
