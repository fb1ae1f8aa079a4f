"""Measures the bytes that each parallel axis sends in a training step, by intercepting torch's collectives, and
compares them with the formulas of model/README.md (formulas.py).

A collective counts as the bytes that leave one rank in the usual algorithm, whatever the backend really does. With P
ranks in the group:

    all-gather      (P - 1) * the rank's part  all-reduce    2 (P - 1) / P * the tensor
    reduce-scatter  (P - 1) / P * the tensor   all-to-all    the rows for other ranks
    send            the tensor
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import CausalBias
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from expert_parallel.data.batch import MicroBatch
from expert_parallel.model.pipeline import Pipeline
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.moe.conservation import LayerTotals
from expert_parallel.moe.experts.grouped import GroupedExperts
from expert_parallel.parallel.collectives import group_size
from expert_parallel.parallel.degrees import ParallelConfig
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.training.config import TrainingConfig
from expert_parallel.training.engines.engine import Engine
from expert_parallel.training.step import train_step
from expert_parallel.verify.formulas import ByteCounts, StepSizes, activation_bytes, pipeline_bytes, weight_bytes
from expert_parallel.verify.formulas_moe import (
    ExpertRows,
    dispatch_bytes,
    expert_tensor_bytes,
    scope_bytes,
    statistics_bytes,
)


@dataclass(frozen=True)
class AxisBytes:
    """Holds the bytes that one parallel axis sends in a training step, over all ranks.

    axes: its name; several names if these axes have the same ranks and share a process group. num_ranks: size of a
    group. measured, expected: bytes; expected by content, such as `tp: tokens`."""

    axes: tuple[str, ...]
    num_ranks: int
    measured: int
    expected: dict[str, int]

    @property
    def matches(self) -> bool:
        """Returns True if the measured bytes equal the sum of the formulas."""
        return self.measured == sum(self.expected.values())


def measure_step_bytes(
    model: LanguageModel,
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    training: TrainingConfig,
    parallel: ParallelConfig,
    mesh: ParallelMesh,
    *,
    step: int,
    seed: int,
) -> list[AxisBytes]:
    """Takes a training step, which changes the weights, and returns the bytes that each axis sends, measured and
    expected. In a pipeline, takes two steps and measures the second, since the first sends additional shape messages.

    A collective; all ranks get the same result, without axes that send nothing. The arguments are those of
    `train_step`; parallel: the config that the mesh was built from. Raises NotImplementedError for a collective that is
    not in `BYTES_SENT`."""
    if isinstance(model, Pipeline):
        train_step(model, engine, micro_batches, training, mesh, step=step, seed=seed)
    rows_of_passes, hooks = _record_expert_rows(model)
    with counting_collective_bytes() as counted:
        report = train_step(model, engine, micro_batches, training, mesh, step=step, seed=seed)
    for hook in hooks:
        hook.remove()

    device = next(model.parameters()).device
    groups = axis_groups(mesh)
    measured, num_ranks = _sum_over_ranks(counted.sent, groups, device)
    rows = _expert_rows(rows_of_passes, mesh, device)
    has_documents = micro_batches[0].documents_BS is not None
    sizes = StepSizes(model.config, training, parallel, mesh, has_documents)
    expected = expected_bytes(sizes, report.layers, rows)
    assert set(expected) <= set(groups), f"formulas of {set(expected) - set(groups)}, which are no axes of the mesh"

    found = []
    for number, axis in enumerate(groups):
        same = _same_ranks(groups, axis)
        terms = {f"{name}: {what}": n for name in same for what, n in expected.get(name, {}).items() if n}
        if axis == same[0] and (measured[number] or terms):
            found.append(AxisBytes(tuple(same), num_ranks[number], measured[number], terms))
    return found


def expected_bytes(step: StepSizes, layers: dict[int, LayerTotals], rows: ExpertRows) -> dict[str, dict[str, int]]:
    """Returns the bytes by the formulas, by axis and content, over all ranks. layers (counts of the step's report) and
    rows tell what the routers decided in this step.

    The formulas do not cover a sharded pipeline of more than three stages per rank, whose weights torch gathers more
    often."""
    terms: ByteCounts = Counter()
    for part in (
        activation_bytes(step),
        pipeline_bytes(step),
        weight_bytes(step),
        statistics_bytes(step),
        scope_bytes(step),
    ):
        terms.update(part)
    for totals in layers.values():
        terms.update(dispatch_bytes(step, totals))
    terms.update(expert_tensor_bytes(step, rows))
    by_axis: dict[str, dict[str, int]] = {}
    for (axis, what), number in terms.items():
        by_axis.setdefault(axis, {})[what] = number
    return by_axis


def format_axis_bytes(found: list[AxisBytes]) -> str:
    """Formats a table of each axis's measured bytes and the formulas' sum, and below each axis the terms of that
    sum."""
    lines = ["bytes that leave a rank in one training step, all ranks together", ""]
    width = max([len(" = ".join(axis.axes)) for axis in found] + [4]) + 2
    lines.append(f"{'axis':<{width}}{'ranks':>5}{'measured':>18}{'formula':>18}")
    for axis in found:
        expected = sum(axis.expected.values())
        verdict = "" if axis.matches else f"  differs by {axis.measured - expected:+,}"
        lines.append(f"{' = '.join(axis.axes):<{width}}{axis.num_ranks:>5}{axis.measured:>18,}{expected:>18,}{verdict}")
        lines += [f"{'':<{width}}{'':>23}{n:>18,}  {what}" for what, n in axis.expected.items()]
    wrong = [" = ".join(axis.axes) for axis in found if not axis.matches]
    lines += [
        "",
        f"these axes differ from the formulas: {', '.join(wrong)}" if wrong else "all axes send what the formulas say",
    ]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- measuring


def _size(x: Any) -> int:
    """Returns the bytes of a tensor, or of all tensors of a list."""
    return x.numel() * x.element_size() if isinstance(x, Tensor) else sum(_size(part) for part in x)


def _all_to_all_bytes(arguments: Sequence[Any], num_ranks: int, me: int) -> int:
    """Returns the bytes that all_to_all_single sends to other ranks. Arguments: output, input, group, output splits,
    input splits; without splits all parts are equal."""
    x, splits = arguments[1], arguments[4]
    if not splits:
        return _size(x) * (num_ranks - 1) // num_ranks
    return 0 if len(x) == 0 else _size(x) // len(x) * (sum(splits) - splits[me])


# c10d operator -> (arguments, P, this rank's index) -> P times the bytes that leave this rank, which is an integer.
BYTES_SENT: dict[str, Callable[[Sequence[Any], int, int], int]] = {
    "allreduce_": lambda a, P, me: 2 * (P - 1) * _size(a[0]),
    "allreduce_coalesced_": lambda a, P, me: 2 * (P - 1) * _size(a[0]),
    "_allgather_base_": lambda a, P, me: P * (P - 1) * _size(a[1]),
    "allgather_": lambda a, P, me: P * (P - 1) * _size(a[1]),
    "allgather_into_tensor_coalesced_": lambda a, P, me: P * (P - 1) * _size(a[1]),
    "_reduce_scatter_base_": lambda a, P, me: (P - 1) * _size(a[1]),
    "reduce_scatter_": lambda a, P, me: (P - 1) * _size(a[1]),
    "reduce_scatter_tensor_coalesced_": lambda a, P, me: (P - 1) * _size(a[1]),
    "alltoall_base_": lambda a, P, me: P * _all_to_all_bytes(a, P, me),
    "alltoall_": lambda a, P, me: P * (_size(a[1]) - _size(a[1][me])),
    "send": lambda a, P, me: P * _size(a[0]),
    "recv_": lambda a, P, me: 0,
    "barrier": lambda a, P, me: 0,
}


class CollectiveByteCounter(TorchDispatchMode):
    """Counts the bytes that this rank sends while the mode is active. sent: by name of the process group, the bytes
    times the group's size P, which is an integer.

    Sees all collectives that go through torch.distributed, also those of FSDP2 and of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor then dispatches to plain tensors, whose collectives are counted
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            if func.namespace != "c10d" or name not in BYTES_SENT:
                raise NotImplementedError(f"bytes of {func.namespace}::{name} are not counted: add it to BYTES_SENT")
            # The process group is the first boxed script object; a later one holds the reduce op.
            boxed = next(argument for argument in args if isinstance(argument, torch.ScriptObject))
            group = dist.ProcessGroup.unbox(boxed)
            self.sent[str(group.group_name)] += BYTES_SENT[name](args, group.size(), group.rank())
        return func(*args, **(kwargs or {}))


@contextmanager
def counting_collective_bytes() -> Iterator[CollectiveByteCounter]:
    """Counts the bytes of all collectives in the body of a `with` statement. torch cannot create a CausalBias, which
    context parallel attention uses, inside a dispatch mode, so it is created with the mode disabled."""

    def make_outside(kind: type, *_: Any) -> Tensor:
        with _disable_current_modes():
            return Tensor.__new__(kind)

    CausalBias.__new__ = make_outside  # type: ignore[method-assign, assignment]
    try:
        with CollectiveByteCounter() as counted:
            yield counted
    finally:
        del CausalBias.__new__


Groups = dict[str, dist.ProcessGroup | None]


def axis_groups(mesh: ParallelMesh) -> Groups:
    """Returns every process group that a step may use, by name of its axis; None for an axis of a single rank.

    `nodes`, `node`: the two exchanges of hierarchical dispatch, between and within nodes. Where weights are sharded
    over some of the ranks only, FSDP2 has groups of its own."""
    names = ("tp", "cp", "pp", "ep", "etp", "edp", "dense", "stage", "sequence")
    groups: Groups = {name: getattr(mesh, f"{name}_group") for name in names}
    groups |= {"key": mesh.kv_replica_group, "tied": mesh.tied_embedding_group}
    groups |= {"nodes": mesh.nodes.rail_group, "node": mesh.nodes.node_group}
    for name, device_mesh in (("dense", mesh.dense_mesh), ("edp", mesh.expert_mesh)):
        if device_mesh is not None and device_mesh.ndim == 2:
            groups |= {f"{name} {part}": device_mesh.get_group(part) for part in ("shards", "replicas")}
    return groups | {"world": dist.group.WORLD}


def _same_ranks(groups: Groups, axis: str) -> list[str]:
    """Returns the axes that share this one's group, itself included: the mesh builds one group for each set of
    ranks."""
    group = groups[axis]
    return [axis] if group is None else [other for other in groups if groups[other] is group]


def _sum_over_ranks(sent: Counter[str], groups: Groups, device: torch.device) -> tuple[list[int], list[int]]:
    """Returns, by axis, the bytes of all ranks and the number of ranks. A collective."""
    bytes_A = torch.zeros(len(groups), dtype=torch.int64, device=device)
    sizes_A = torch.ones_like(bytes_A)
    axes = list(groups)
    number_of = {
        str(group.group_name): axes.index(_same_ranks(groups, axis)[0]) for axis, group in groups.items() if group
    }
    for name, total in sent.items():
        assert name in number_of or not total, f"a collective over a group ({name}) that is not an axis of the mesh"
        if total:
            bytes_A[number_of[name]] += total
    for axis, group in groups.items():
        sizes_A[axes.index(axis)] = group_size(group)
    dist.all_reduce(bytes_A)
    dist.all_reduce(sizes_A, op=dist.ReduceOp.MAX)
    return (bytes_A // sizes_A).tolist(), sizes_A.tolist()  # waits for the device


def _record_expert_rows(model: LanguageModel) -> tuple[dict[int, list[int]], list[Any]]:
    """Registers hooks that record, by MoE block, how many rows this rank's experts receive in each pass, including
    recomputed ones. Returns the lists and the hooks."""
    rows: dict[int, list[int]] = {}
    hooks = []
    for layer, block in model.local_blocks():
        if block.moe is not None:
            note = partial(_append_rows, rows.setdefault(layer, []))
            hooks.append(block.moe.experts.register_forward_pre_hook(note))
    return rows, hooks


def _append_rows(noted: list[int], experts: GroupedExperts, inputs: tuple[Any, ...]) -> None:
    noted.append(len(inputs[0].row_R))


def _expert_rows(rows_of_passes: dict[int, list[int]], mesh: ParallelMesh, device: torch.device) -> ExpertRows:
    """Sums the recorded rows over all ranks. A collective."""
    rows = torch.zeros(2, dtype=torch.int64, device=device)
    for passes in rows_of_passes.values():
        mine = torch.tensor(passes, dtype=torch.int64, device=device)
        max_rows = mine.clone()
        if mesh.etp_group is not None:
            dist.all_reduce(max_rows, op=dist.ReduceOp.MAX, group=mesh.etp_group)
        rows += torch.stack([mine.sum(), max_rows.sum()])
    dist.all_reduce(rows)
    total, fullest_everywhere = rows.tolist()  # waits for the device
    return ExpertRows(total, fullest_everywhere // mesh.degrees.etp)
