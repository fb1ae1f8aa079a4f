"""The one place that reduces and norms gradients.

Every rank back-propagates its own tokens' share of the global loss, so every reduction is a SUM. The all-to-all's
backward has already brought each expert the gradients of all tokens of its expert-parallel group; what is left is
the sum over the ranks that hold the same parameter: dp for dense ones, edp for experts. Under FSDP2 (`sharded`) the
same sums are made by its reduce-scatter.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expert_parallel.collectives import all_reduce_sum, group_size
from expert_parallel.mesh import ParallelMesh
from expert_parallel.moe.parameters import local_tensor, logical_parameters

BUCKET_BYTES = 32 * 1024**2


def reduce_gradients(model: nn.Module, mesh: ParallelMesh, *, sharded: bool) -> None:
    """Sums the gradients of the whole step over the ranks that hold the same parameters. Under FSDP2: done already."""
    for logical in logical_parameters(model):
        assert logical.parameter.grad is not None, f"{logical.names[0]} has no gradient: it is cut off from the loss"
    if sharded:
        return
    dense = [p.parameter.grad for p in logical_parameters(model) if not p.is_expert]
    experts = [p.parameter.grad for p in logical_parameters(model) if p.is_expert]
    _sum_in_buckets(dense, mesh.dp_group)
    _sum_in_buckets(experts, mesh.edp_group)


def global_norm(model: nn.Module, mesh: ParallelMesh, *, sharded: bool) -> Tensor:
    """L2 norm of the gradient of the whole model, each shard of each parameter counted once. float64 scalar.

    Replicated: dense gradients are equal on all ranks and counted here, experts are summed over ep. Sharded: every
    rank holds a part of its own of everything; summed over all ranks.
    """
    dense = _square_sum(p.parameter.grad for p in logical_parameters(model) if not p.is_expert)
    experts = _square_sum(p.parameter.grad for p in logical_parameters(model) if p.is_expert)
    device = next(model.parameters()).device
    dense, experts = dense.to(device), experts.to(device)
    if sharded:
        return all_reduce_sum(dense + experts, mesh.dp_group).sqrt()
    return (dense + all_reduce_sum(experts, mesh.ep_group)).sqrt()


def clip_gradients(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Scales all gradients by limit / norm where the norm is larger."""
    factor = (limit / norm).clamp(max=1.0)
    for parameter in model.parameters():
        grad = local_tensor(parameter.grad)  # type: ignore[arg-type]
        grad.mul_(factor.to(grad.dtype))


def _square_sum(grads: Iterable[Tensor | None]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for grad in grads:
        assert grad is not None
        total = total.to(grad.device) + torch.linalg.vector_norm(local_tensor(grad)).double().square()
    return total


def _sum_in_buckets(grads: list[Tensor | None], group: dist.ProcessGroup) -> None:
    if group_size(group) == 1:
        return
    for bucket in _buckets([grad for grad in grads if grad is not None]):
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat, group=group)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one dtype, up to BUCKET_BYTES together, or one alone."""
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
