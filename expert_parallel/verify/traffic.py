"""The bytes that each parallel axis moves in a training step: counted where torch's collectives are called, beside what
the formulas of model/README.md (formulas.py) make of the sizes alone.

Counted is what leaves a rank by the usual algorithms, whatever the backend really does, with P ranks in the group:
    all-gather      (P - 1) * its part         all-reduce    2 (P - 1) / P * the tensor
    reduce-scatter  (P - 1) / P * the tensor   all-to-all    the rows for others
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
from expert_parallel.verify.formulas import Step, Terms, pipeline, tokens_between_ranks, weights
from expert_parallel.verify.formulas_moe import ExpertRows, dispatch, expert_tensor, losses_and_totals, scopes


@dataclass(frozen=True)
class AxisBytes:
    """Of all ranks together, in one step. axes: more than one where they have the same ranks, and share their groups.
    expected: by what is carried, as `tp: tokens`."""

    axes: tuple[str, ...]
    num_ranks: int
    measured: int
    expected: dict[str, int]

    @property
    def agrees(self) -> bool:
        return self.measured == sum(self.expected.values())


def measure_step(
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
    """Takes a training step, which changes the weights, and counts what it moves; of a pipeline the second of two,
    since the first sends some words more. Every rank calls it; all get the same, axes that move nothing left out.

    The arguments are train_step's; parallel: as the mesh was built from it. NotImplementedError where a step calls a
    collective that is not known here.
    """
    if isinstance(model, Pipeline):
        train_step(model, engine, micro_batches, training, mesh, step=step, seed=seed)
    rows_of_passes, hooks = _watch_experts(model)
    with counting() as counted:
        report = train_step(model, engine, micro_batches, training, mesh, step=step, seed=seed)
    for hook in hooks:
        hook.remove()

    device = next(model.parameters()).device
    groups = axis_groups(mesh)
    measured, num_ranks = _over_all_ranks(counted.sent, groups, device)
    rows = _expert_rows(rows_of_passes, mesh, device)
    expected = expected_bytes(Step(model.config, training, parallel, mesh), report.layers, rows)
    assert set(expected) <= set(groups), f"formulas of {set(expected) - set(groups)}, which are no axes of the mesh"

    found = []
    for number, axis in enumerate(groups):
        same = _same_ranks(groups, axis)
        terms = {f"{name}: {what}": n for name in same for what, n in expected.get(name, {}).items() if n}
        if axis == same[0] and (measured[number] or terms):
            found.append(AxisBytes(tuple(same), num_ranks[number], measured[number], terms))
    return found


def expected_bytes(step: Step, layers: dict[int, LayerTotals], rows: ExpertRows) -> dict[str, dict[str, int]]:
    """By axis and by what is carried, all ranks together. What routing decides is taken from the step itself: layers,
    the totals of its report, and rows.

    Not in the formulas: a sharded pipeline of more than three stages a rank, whose weights torch gathers oftener.
    """
    terms: Terms = Counter()
    for part in (tokens_between_ranks(step), pipeline(step), weights(step), losses_and_totals(step), scopes(step)):
        terms.update(part)
    for totals in layers.values():
        terms.update(dispatch(step, totals))
    terms.update(expert_tensor(step, rows))
    by_axis: dict[str, dict[str, int]] = {}
    for (axis, what), number in terms.items():
        by_axis.setdefault(axis, {})[what] = number
    return by_axis


def describe(found: list[AxisBytes]) -> str:
    """A table: measured bytes and the formulas' beside each other, and below each axis what it carries."""
    lines = ["bytes that leave a rank in one training step, all ranks together", ""]
    width = max([len(" = ".join(axis.axes)) for axis in found] + [4]) + 2
    lines.append(f"{'axis':<{width}}{'ranks':>5}{'measured':>18}{'formula':>18}")
    for axis in found:
        expected = sum(axis.expected.values())
        verdict = "" if axis.agrees else f"  differs by {axis.measured - expected:+,}"
        lines.append(f"{' = '.join(axis.axes):<{width}}{axis.num_ranks:>5}{axis.measured:>18,}{expected:>18,}{verdict}")
        lines += [f"{'':<{width}}{'':>23}{n:>18,}  {what}" for what, n in axis.expected.items()]
    wrong = [" = ".join(axis.axes) for axis in found if not axis.agrees]
    lines += ["", f"not as the formulas say: {', '.join(wrong)}" if wrong else "all axes move what the formulas say"]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- measuring


def _size(x: Any) -> int:
    """Bytes of a tensor, or of all tensors of a list."""
    return x.numel() * x.element_size() if isinstance(x, Tensor) else sum(_size(part) for part in x)


def _rows_to_others(arguments: Sequence[Any], num_ranks: int, me: int) -> int:
    """all_to_all_single: (output, input, group, output splits, input splits); no splits: equal ones."""
    x, splits = arguments[1], arguments[4]
    if not splits:
        return _size(x) * (num_ranks - 1) // num_ranks
    return 0 if len(x) == 0 else _size(x) // len(x) * (sum(splits) - splits[me])


# c10d operator -> (arguments, P, this rank's place) -> P times the bytes that leave this rank: a whole number.
SENT: dict[str, Callable[[Sequence[Any], int, int], int]] = {
    "allreduce_": lambda a, P, me: 2 * (P - 1) * _size(a[0]),
    "allreduce_coalesced_": lambda a, P, me: 2 * (P - 1) * _size(a[0]),
    "_allgather_base_": lambda a, P, me: P * (P - 1) * _size(a[1]),
    "allgather_": lambda a, P, me: P * (P - 1) * _size(a[1]),
    "allgather_into_tensor_coalesced_": lambda a, P, me: P * (P - 1) * _size(a[1]),
    "_reduce_scatter_base_": lambda a, P, me: (P - 1) * _size(a[1]),
    "reduce_scatter_": lambda a, P, me: (P - 1) * _size(a[1]),
    "reduce_scatter_tensor_coalesced_": lambda a, P, me: (P - 1) * _size(a[1]),
    "alltoall_base_": lambda a, P, me: P * _rows_to_others(a, P, me),
    "alltoall_": lambda a, P, me: P * (_size(a[1]) - _size(a[1][me])),
    "send": lambda a, P, me: P * _size(a[0]),
    "recv_": lambda a, P, me: 0,
    "barrier": lambda a, P, me: 0,
}


class CountBytes(TorchDispatchMode):
    """While it is entered, adds up what this rank sends, by the name of the process group: `sent[name] / P` bytes. Sees
    all collectives that go through torch.distributed: FSDP2's too, and those of a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let it come down to plain tensors, and to its collectives
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            if func.namespace != "c10d" or name not in SENT:
                raise NotImplementedError(f"bytes of {func.namespace}::{name} are not counted: add it to SENT")
            # Groups travel in a box. It is the first box; a later one holds the kind of reduction.
            boxed = next(argument for argument in args if isinstance(argument, torch.ScriptObject))
            group = dist.ProcessGroup.unbox(boxed)
            self.sent[str(group.group_name)] += SENT[name](args, group.size(), group.rank())
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[CountBytes]:
    """torch cannot make a CausalBias, which context parallel attention uses, inside a dispatch mode: here it is made
    outside of it."""

    def make_outside(kind: type, *_: Any) -> Tensor:
        with _disable_current_modes():
            return Tensor.__new__(kind)

    CausalBias.__new__ = make_outside  # type: ignore[method-assign, assignment]
    try:
        with CountBytes() as counted:
            yield counted
    finally:
        del CausalBias.__new__


Groups = dict[str, dist.ProcessGroup | None]


def axis_groups(mesh: ParallelMesh) -> Groups:
    """Every group that a step may use, by the name of its axis. None: this rank alone. `nodes`, `node`: the two hops of
    hierarchical dispatch. Where weights are sharded over some of the ranks only, FSDP2 has groups of its own."""
    names = ("tp", "cp", "pp", "ep", "etp", "edp", "dense", "stage", "sequence", "key", "tied")
    groups: Groups = {name: getattr(mesh, f"{name}_group") for name in names}
    groups |= {"nodes": mesh.nodes.rail_group, "node": mesh.nodes.node_group}
    for name, device_mesh in (("dense", mesh.dense_mesh), ("edp", mesh.expert_mesh)):
        if device_mesh is not None and device_mesh.ndim == 2:
            groups |= {f"{name} {part}": device_mesh.get_group(part) for part in ("shards", "replicas")}
    return groups | {"world": dist.group.WORLD}


def _same_ranks(groups: Groups, axis: str) -> list[str]:
    """The axes that share this one's group, itself included: the mesh builds one for each set of ranks."""
    group = groups[axis]
    return [axis] if group is None else [other for other in groups if groups[other] is group]


def _over_all_ranks(sent: Counter[str], groups: Groups, device: torch.device) -> tuple[list[int], list[int]]:
    """Bytes of all ranks, and the size of a group, by axis in the order of `groups`; those of several axes with one
    group under the first of them."""
    bytes_A = torch.zeros(len(groups), dtype=torch.int64, device=device)
    sizes_A = torch.ones_like(bytes_A)
    axes = list(groups)
    number_of = {
        str(group.group_name): axes.index(_same_ranks(groups, axis)[0]) for axis, group in groups.items() if group
    }
    for name, total in sent.items():
        assert name in number_of or not total, f"a collective over a group ({name}) that is no axis of the mesh"
        if total:
            bytes_A[number_of[name]] += total
    for axis, group in groups.items():
        sizes_A[axes.index(axis)] = group_size(group)
    dist.all_reduce(bytes_A)
    dist.all_reduce(sizes_A, op=dist.ReduceOp.MAX)
    return (bytes_A // sizes_A).tolist(), sizes_A.tolist()


def _watch_experts(model: LanguageModel) -> tuple[dict[int, list[int]], list[Any]]:
    """By MoE block: how many rows this rank's experts are given, pass after pass, recomputed ones too; and the hooks
    that note it."""
    rows: dict[int, list[int]] = {}
    hooks = []
    for layer, block in model.local_blocks():
        if block.moe is not None:
            note = partial(_note_rows, rows.setdefault(layer, []))
            hooks.append(block.moe.experts.register_forward_pre_hook(note))
    return rows, hooks


def _note_rows(noted: list[int], experts: GroupedExperts, inputs: tuple[Any, ...]) -> None:
    noted.append(len(inputs[0].row_R))


def _expert_rows(rows_of_passes: dict[int, list[int]], mesh: ParallelMesh, device: torch.device) -> ExpertRows:
    """Of all ranks together."""
    rows = torch.zeros(2, dtype=torch.int64, device=device)
    for passes in rows_of_passes.values():
        mine = torch.tensor(passes, dtype=torch.int64, device=device)
        fullest = mine.clone()
        if mesh.etp_group is not None:
            dist.all_reduce(fullest, op=dist.ReduceOp.MAX, group=mesh.etp_group)
        rows += torch.stack([mine.sum(), fullest.sum()])
    dist.all_reduce(rows)
    total, fullest_everywhere = rows.tolist()
    return ExpertRows(total, fullest_everywhere // mesh.degrees.etp)
