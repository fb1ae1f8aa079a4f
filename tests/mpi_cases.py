"""What the MPI transport must do as gloo does: every collective x dtype, each run on both. mpi_ranks.py runs them.

A case is a function of a group and a dtype that returns what to compare.
"""

import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.dispatch.async_collective import AsyncAllToAll, SplitSizes
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.layer import MoELayer
from expert_parallel.parallel.collectives import ExchangeKey, Peers, Phase, all_gather_single, reduce_scatter_single

WORLD = 4
GROUPS = {"world": [[0, 1, 2, 3]], "pairs": [[0, 2], [1, 3]], "three": [[0, 1, 3]], "alone": [[2]]}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
Group = dist.ProcessGroup


def values(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """This rank's; small whole numbers, so that no order of adding rounds."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    return torch.randint(0, 4, shape, generator=generator).to(dtype)


def strided(x: Tensor, group: Group) -> Tensor:
    """x, for MPI with its columns in a row of memory. gloo of torch 2.13 takes memory as it lies, without a word."""
    return x if dist.get_backend(group) == "gloo" else x.mT.contiguous().mT


def all_reduce(group: Group, dtype: torch.dtype, op: dist.ReduceOp = dist.ReduceOp.SUM) -> list[Tensor]:
    x = values(dtype, 3, 5)
    dist.all_reduce(x, op, group)
    return [x]


def all_reduce_average(group: Group, dtype: torch.dtype) -> list[Tensor]:
    """gloo only adds."""
    if not dtype.is_floating_point:
        return []
    x, is_oracle = values(dtype, 3, 5), dist.get_backend(group) == "gloo"
    dist.all_reduce(x, dist.ReduceOp.SUM if is_oracle else dist.ReduceOp.AVG, group)
    return [x.div(group.size()) if is_oracle else x]


def all_reduce_strided(group: Group, dtype: torch.dtype) -> list[Tensor]:
    x = strided(values(dtype, 4, 6), group)
    dist.all_reduce(x, group=group)
    return [x]


def all_reduce_scalar(group: Group, dtype: torch.dtype) -> list[Tensor]:
    x = values(dtype)
    dist.all_reduce(x, group=group)
    return [x]


def reduce(group: Group, dtype: torch.dtype) -> list[Tensor]:
    x = values(dtype, 7)
    dist.reduce(x, group=group, group_dst=group.size() - 1)
    return [x] if group.rank() == group.size() - 1 else []


def reduce_scatter(group: Group, dtype: torch.dtype) -> list[Tensor]:
    output = values(dtype, 2, 3)
    reduce_scatter_single(output, values(dtype, 2 * group.size(), 3, seed=1), group=group)
    return [output]


def all_gather_list(group: Group, dtype: torch.dtype) -> list[Tensor]:
    parts = [values(dtype, 2, 3) for _ in range(group.size())]
    dist.all_gather(parts, values(dtype, 2, 3, seed=1), group=group)
    return parts


def all_gather(group: Group, dtype: torch.dtype) -> list[Tensor]:
    whole = values(dtype, 3 * group.size(), 2)
    all_gather_single(whole, strided(values(dtype, 3, 2, seed=1), group), group=group)
    return [whole]


def all_gather_in_place(group: Group, dtype: torch.dtype) -> list[Tensor]:
    """As FSDP2 does."""
    whole = values(dtype, 2 * group.size(), 3)
    all_gather_single(whole, whole.narrow(0, 2 * group.rank(), 2), group=group)
    return [whole]


def all_gather_nothing(group: Group, dtype: torch.dtype) -> list[Tensor]:
    whole = values(dtype, 0, 2)
    all_gather_single(whole, values(dtype, 0, 2), group=group)
    return [whole]


def all_to_all(group: Group, dtype: torch.dtype) -> list[Tensor]:
    output = values(dtype, 2 * group.size(), 3)
    dist.all_to_all_single(output, values(dtype, 2 * group.size(), 3, seed=1), group=group)
    return [output]


def exchange(group: Group, dtype: torch.dtype, splits: Callable[[int, int], int], *width: int) -> list[Tensor]:
    """splits: rows from one rank to another."""
    me, ranks = group.rank(), range(group.size())
    send, receive = [splits(me, rank) for rank in ranks], [splits(rank, me) for rank in ranks]
    output = values(dtype, sum(receive), *width)
    dist.all_to_all_single(output, values(dtype, sum(send), *width, seed=1), receive, send, group=group)
    return [output]


def all_to_all_strided(group: Group, dtype: torch.dtype) -> list[Tensor]:
    output, source = (strided(values(dtype, 2 * group.size(), 3, seed=seed), group) for seed in (0, 1))
    splits = [2] * group.size()
    dist.all_to_all_single(output, source, splits, splits, group=group)
    return [output]


def reduce_scatter_strided(group: Group, dtype: torch.dtype) -> list[Tensor]:
    output, source = values(dtype, 2, 3), values(dtype, 2 * group.size(), 3, seed=1)
    output, source = strided(output, group), strided(source, group)
    reduce_scatter_single(output, source, group=group)
    return [output]


def broadcast(group: Group, dtype: torch.dtype) -> list[Tensor]:
    x = strided(values(dtype, 3, 4), group)
    dist.broadcast(x, group=group, group_src=group.size() - 1)
    return [x]


def scatter(group: Group, dtype: torch.dtype) -> list[Tensor]:
    output, source = values(dtype, 2, 3), group.size() - 1
    parts = [values(dtype, 2, 3, seed=1 + rank) for rank in range(group.size())]
    dist.scatter(output, parts if group.rank() == source else None, group=group, group_src=source)
    return [output]


def gather(group: Group, dtype: torch.dtype) -> list[Tensor]:
    parts = [values(dtype, 3) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(values(dtype, 3, seed=1), parts, group=group, group_dst=0)
    return parts or []


def send_and_receive(group: Group, dtype: torch.dtype) -> list[Tensor]:
    """In a ring, in the order of ranks."""
    x, me, last = values(dtype, 2, 3), group.rank(), group.size() - 1
    if me > 0:
        dist.recv(x, group=group, group_src=me - 1)
    if me < last:
        dist.send(x, group=group, group_dst=me + 1)
    return [x]


def batch_both_ways(group: Group, dtype: torch.dtype) -> list[Tensor]:
    """All at once, larger than what MPI sends before the receiver asks: blocking calls would wait for each other."""
    others = [rank for rank in range(group.size()) if rank != group.rank()]
    received = [strided(values(dtype, 400, 200), group) for _ in others]
    operations = []
    for rank, x in zip(others, received, strict=True):
        sent = strided(values(dtype, 400, 200, seed=1 + rank), group)
        operations += [dist.P2POp(dist.isend, sent, group=group, group_peer=rank)]
        operations += [dist.P2POp(dist.irecv, x, group=group, group_peer=rank)]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return received


def dtensor(group: Group, dtype: torch.dtype) -> list[Tensor]:
    """What DTensor calls: scatter, all-gather, reduce-scatter, all-reduce, all by its own ways."""
    mesh = DeviceMesh.from_group(group, "cpu")
    whole = torch.arange(group.size() * 6).view(-1, 3).to(dtype)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    partial = DTensor.from_local(values(dtype, group.size() * 2, 3), mesh, [Partial()])
    return [
        sharded.to_local(),
        sharded.full_tensor(),
        sharded.redistribute(placements=[Shard(1)]).to_local(),
        partial.redistribute(placements=[Replicate()]).to_local(),
        partial.redistribute(placements=[Shard(0)]).to_local(),
    ]


def exchange_with_gradient(group: Group, dtype: torch.dtype) -> list[Tensor]:
    """The layer's differentiable exchange; some send nothing, forward or backward."""
    if not dtype.is_floating_point:
        return []
    me, ranks = group.rank(), range(group.size())
    send, receive = [me * rank for rank in ranks], [rank * me for rank in ranks]
    x = values(dtype, sum(send), 3).requires_grad_()
    sizes, key = SplitSizes(send, receive), ExchangeKey(Phase.DISPATCH)
    y = AsyncAllToAll(Ledger(), sizes, Peers.of(group), key).start(x).finish()
    y.backward(values(dtype, *y.shape, seed=1))
    assert x.grad is not None
    return [y.detach(), x.grad]


def layer(group: Group, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and all gradients of a MoE layer with drops and a loss over all ranks."""
    if dtype != torch.float64:
        return []
    config = {
        "d_model": 8,
        "num_experts": 12,
        "router": {"k": 3},
        "experts": {"hidden": 4},
        "capacity": {"kind": "factor", "train": 1.0},
        "losses": [{"kind": "balance"}],
    }
    moe = MoELayer(MoEConfig.model_validate(config), group).double()
    generator = torch.Generator().manual_seed(dist.get_rank())
    x_TD = torch.randn(10, 8, generator=generator, dtype=dtype, requires_grad=True)
    output = moe(x_TD)
    (output.y.square().sum() + sum(output.losses.values())).backward()
    return [output.y.detach(), *(p.grad for p in (x_TD, *moe.parameters()) if p.grad is not None)]


CASES: dict[str, Callable[[Group, torch.dtype], list[Tensor]]] = {
    "all_reduce": all_reduce,
    "all_reduce max": lambda group, dtype: all_reduce(group, dtype, dist.ReduceOp.MAX),
    "all_reduce min": lambda group, dtype: all_reduce(group, dtype, dist.ReduceOp.MIN),
    "all_reduce product": lambda group, dtype: all_reduce(group, dtype, dist.ReduceOp.PRODUCT),
    "all_reduce average": all_reduce_average,
    "all_reduce strided": all_reduce_strided,
    "all_reduce scalar": all_reduce_scalar,
    "reduce": reduce,
    "reduce_scatter": reduce_scatter,
    "reduce_scatter strided": reduce_scatter_strided,
    "all_gather list": all_gather_list,
    "all_gather": all_gather,
    "all_gather in place": all_gather_in_place,
    "all_gather nothing": all_gather_nothing,
    "all_to_all": all_to_all,
    "all_to_all uneven": lambda group, dtype: exchange(group, dtype, lambda source, target: 2 * source + target, 3, 2),
    "all_to_all some none": lambda group, dtype: exchange(group, dtype, lambda source, target: source * target, 4),
    "all_to_all none": lambda group, dtype: exchange(group, dtype, lambda source, target: 0, 4),
    "all_to_all no width": lambda group, dtype: exchange(group, dtype, lambda source, target: 1 + source, 0),
    "all_to_all vectors": lambda group, dtype: exchange(group, dtype, lambda source, target: 1 + target),
    "all_to_all strided": all_to_all_strided,
    "broadcast": broadcast,
    "scatter": scatter,
    "gather": gather,
    "send and receive": send_and_receive,
    "batch both ways": batch_both_ways,
    "dtensor": dtensor,
    "exchange with gradient": exchange_with_gradient,
    "layer": layer,
}


def compare(case: str, group: Group, oracle: Group, dtype: torch.dtype) -> str:
    """Nothing, or what is wrong."""
    expected = CASES[case](oracle, dtype)
    try:
        found = CASES[case](group, dtype)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    except Exception:
        return traceback.format_exc()
    return ""
