"""Compares each rank's tensors of a training step with the reference's: relative error, ratio, and the rank with the
largest error."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.checkpoint.manifest import MOMENTS
from expert_parallel.data.batch import MicroBatch
from expert_parallel.moe.conservation import LayerTotals
from expert_parallel.training.config import TrainingConfig
from expert_parallel.training.run import TrainingRun
from expert_parallel.verify.reference import ReferenceStep
from expert_parallel.verify.reference_model import LayerRecord, TokenPartition
from expert_parallel.verify.reference_optimizer import ReferenceState, adamw_step
from expert_parallel.verify.system_under_test import CapturedStep, Tensors, context_token_indices, own_token_indices

# dtype -> (largest relative difference that passes, share of the largest value among all gradients, or updates, that
# replaces a tensor's own maximum where that is smaller: a gradient that is zero but for rounding has no digits).
TOLERANCES = {"float64": (1e-9, 1e-3), "float32": (1e-4, 1e-2), "bfloat16": (3e-1, 1e-1)}

Pairs = dict[str, tuple[Tensor, Tensor]]  # name -> (actual, expected)

# The groups of parameters whose gradients have a column of their own in the table.
GROUPS = ("embedding", "attention", "ffn", "router", "experts", "shared experts", "norm")


def parameter_group(name: str) -> str:
    """Returns the group in `GROUPS` that a parameter belongs to, by its logical name."""
    for part, group in (
        ("norm.", "norm"),
        (".router.", "router"),
        (".shared_experts.", "shared experts"),
        (".shared_expert_gate.", "shared experts"),
        (".experts.", "experts"),
        (".attention.", "attention"),
        (".ffn.", "ffn"),
    ):
        if part in name:
            return group
    return "embedding"


def expected_tensors(reference: ReferenceStep, before: ReferenceState) -> Tensors:
    """Returns every tensor of a step that is compared, as the reference computed it, in float64. The names are
    `quantity/place`, such as `gradient/embedding.weight`. before: what the step started from."""
    start, after = before.parameters, reference.after
    found: Tensors = {
        **loss_tensors(reference.loss, reference.mtp_losses),
        "gradient norm/gradient norm": torch.tensor([reference.grad_norm]),
        "learning rate/learning rate": torch.tensor([reference.rate], dtype=torch.float64),
        **{f"gradient/{name}": value for name, value in reference.gradients.items()},
        **{f"exp_avg/{name}": value for name, value in after.exp_avg.items()},
        **{f"exp_avg_sq/{name}": value for name, value in after.exp_avg_sq.items()},
        **{f"update/{name}": value - start[name] for name, value in after.parameters.items()},
        **{f"output/micro-step {m}, block {layer}": x for (m, layer), x in reference.outputs.items()},
        **layer_tensors(reference.layers),
    }
    return {name: value.detach().to(torch.float64) for name, value in found.items()}


def loss_tensors(loss: float, mtp_losses: Sequence[float]) -> Tensors:
    """Returns the mean cross entropy, and that of each depth of multi-token prediction, named as in
    `expected_tensors`."""
    found = {"loss": loss} | {f"mtp_{depth}": mean for depth, mean in enumerate(mtp_losses, start=1)}
    return {f"loss/{name}": torch.tensor([value], dtype=torch.float64) for name, value in found.items()}


def layer_tensors(layers: Mapping[int, LayerRecord | LayerTotals]) -> Tensors:
    """Returns losses and counts of each MoE block as tensors, named as in `expected_tensors`."""
    found: Tensors = {}
    for layer, totals in layers.items():
        for name, value in totals.losses.items():
            found[f"balance loss/block {layer}, {name}"] = torch.tensor([value], dtype=torch.float64)
        if isinstance(totals, LayerTotals):
            kept_E, dropped = totals.kept_E + totals.rerouted_E, int(totals.dropped_E.sum())
        else:
            assert totals.kept_E is not None
            kept_E, dropped = totals.kept_E, totals.dropped
        assert totals.routed_E is not None
        found[f"dropped/block {layer}, choices routed"] = totals.routed_E.double()
        found[f"dropped/block {layer}, choices kept"] = kept_E.double()
        found[f"dropped/block {layer}, choices dropped"] = torch.tensor([dropped], dtype=torch.float64)
    return found


def actual_tensors(run: TrainingRun, captured: CapturedStep, before: Tensors, expected: Tensors) -> Pairs:
    """Pairs each tensor that this rank has with the slice of the expected tensor that it should equal, by name.

    before: this rank's weights and balance biases before the step. expected: from `expected_tensors`."""
    report, training = captured.report, run.config.training
    found: Tensors = {
        **loss_tensors(report.loss, report.mtp_losses),
        "gradient norm/gradient norm": torch.tensor([report.grad_norm]),
        "learning rate/learning rate": torch.tensor([report.learning_rate], dtype=torch.float64),
        **{f"gradient/{name}": value for name, value in captured.gradients.items()},
        **{f"{moment}/{name}": value for moment, held in captured.moments.items() for name, value in held.items()},
        **{f"update/{name}": value - before[name] for name, value in captured.weights.items()},
        **layer_tensors(report.layers),
    }
    pairs = {name: (value.double(), expected[name]) for name, value in found.items()}
    for (micro_step, layer), (context, value) in captured.outputs.items():
        name = f"output/micro-step {micro_step}, block {layer}"
        sequence_index_B, positions_S = context_token_indices(context, value.shape[1])
        pairs[name] = (value, expected[name][sequence_index_B[:, None], positions_S])
    if training.dtype != "float64":
        pairs |= _updates_of_own_gradients(training, captured, before, pairs)
    return pairs


def _updates_of_own_gradients(training: TrainingConfig, captured: CapturedStep, before: Tensors, pairs: Pairs) -> Pairs:
    """Pairs updates and moments of the first step with those that AdamW makes of this rank's own gradients: Adam's
    first step is nearly sign(gradient), which rounding flips near 0."""
    report = captured.report
    state = ReferenceState.at_start(before)
    after = adamw_step(training, state, captured.gradients, report.grad_norm, report.learning_rate)
    wanted = {f"update/{name}": value - before[name] for name, value in after.weights.items()}
    wanted |= {f"exp_avg/{name}": value for name, value in after.exp_avg.items()}
    wanted |= {f"exp_avg_sq/{name}": value for name, value in after.exp_avg_sq.items()}
    return {name: (pairs[name][0], value) for name, value in wanted.items()}


def gather_divisions(run: TrainingRun, mine: list[MicroBatch]) -> list[TokenPartition]:
    """Returns, for each micro-step, the sequences and positions of every rank of the first pipeline stage. A
    collective."""
    token_indices = [[numbers.tolist() for numbers in place] for place in own_token_indices(run, mine)]
    everyone = gather_json({"stage": run.mesh.pp_rank, "places": token_indices})
    first = [rank["places"] for rank in everyone if rank["stage"] == 0]
    return [
        [(torch.tensor(rank[m][0], dtype=torch.int64), torch.tensor(rank[m][1])) for rank in first]
        for m in range(len(mine))
    ]


def coverage(divisions: list[TokenPartition], shape: tuple[int, int]) -> Pairs:
    """Counts, for every micro-step, how many ranks hold each token, and pairs the counts with ones, since exactly one
    should.

    divisions: for each micro-step, the tokens of every rank. shape: (sequences, positions) of a micro-step."""
    found = {}
    for micro_step, division in enumerate(divisions):
        num_holders = torch.zeros(shape, dtype=torch.float64)
        for sequence_index_B, positions_S in division:
            num_holders[sequence_index_B[:, None], positions_S] += 1
        found[f"output/micro-step {micro_step}, ranks that hold each token"] = (
            num_holders,
            torch.ones_like(num_holders),
        )
    return found


@dataclass(frozen=True)
class TensorDifference:
    """Holds the error of one tensor on the rank where it is largest, with a: actual, b: expected.

    relative: max |a - b| / max |b|. ratio: the r that minimises |a - r * b|^2. residual: max |a - ratio * b| / max |b|;
    0 if a is exactly ratio * b. is_present: False if no rank has the tensor. rank: the rank of the largest error. step:
    counted from 0. tolerance: the largest relative difference that passes, if it is not that of the comparison."""

    name: str
    is_present: bool
    relative: float
    ratio: float
    residual: float
    rank: int
    step: int = 0
    tolerance: float | None = None

    def passes(self, tolerance: float) -> bool:
        """Returns True if a rank has the tensor and no error is above the tolerance, or the tensor's own."""
        return self.is_present and self.relative <= (tolerance if self.tolerance is None else self.tolerance)

    @property
    def column(self) -> str:
        """Returns the key of the table's column that shows this tensor."""
        what, _, where = self.name.partition("/")
        if what == "gradient":
            return f"gradient: {parameter_group(where)}"
        return "moments" if what in MOMENTS else what


def compare(
    pairs: Pairs, expected: Tensors, floor: float, step: int = 0, tolerance: float | None = None
) -> list[TensorDifference]:
    """Returns, for each name in `expected` and in the `pairs` of this rank, the difference on the rank where it is
    largest; every rank gets the same list. A collective; all ranks must pass the same names in `expected`.

    floor: a tensor whose max |b| is below `floor` times the largest value of its quantity (all gradients, say) is
    compared relative to that product instead. step, tolerance: see `TensorDifference`."""
    largest: dict[str, float] = {}
    for name, value in expected.items():
        what = name.partition("/")[0]
        largest[what] = max(largest.get(what, 0.0), _largest(value))
    names = list(dict.fromkeys([*expected, *pairs]))
    # All tensors are on the CPU here, so reading their values waits for no device.
    rows = torch.zeros(len(names), 4, dtype=torch.float64)
    for row, name in zip(rows, names, strict=True):
        if name in pairs:
            smallest = floor * largest.get(name.partition("/")[0], 0.0)
            row.copy_(torch.tensor([1.0, *_measure(*pairs[name], smallest)], dtype=torch.float64))
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows)
    every = torch.stack(gathered)
    worst = torch.where(every[..., 0] > 0, every[..., 1], -1.0).argmax(0)
    chosen = every[worst, torch.arange(len(names))]
    return [
        TensorDifference(name, is_present > 0, relative, ratio, residual, rank, step, tolerance)
        for name, rank, (is_present, relative, ratio, residual) in zip(
            names, worst.tolist(), chosen.tolist(), strict=True
        )
    ]


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _measure(a: Tensor, b: Tensor, smallest: float) -> tuple[float, float, float]:
    """Returns (relative, ratio, residual) of a against b, as defined in `TensorDifference`. smallest: lower bound of
    max |b|."""
    if not bool(a.isfinite().all()):
        return float("inf"), float("nan"), float("inf")
    relative = _largest(a - b) / max(_largest(b), smallest, torch.finfo(torch.float64).tiny)
    square = float((b * b).sum())
    ratio = float((a * b).sum()) / square if square > 0 else float("nan")
    return relative, ratio, _largest(a - ratio * b) / max(_largest(b), torch.finfo(torch.float64).tiny)


def broadcast_tensors(tensors: Tensors | None, source: int = 0) -> Tensors:
    """Broadcasts the float64 tensors of the rank `source` to all ranks and returns them: names and shapes as JSON, then
    one flat buffer. A collective. tensors: None on the other ranks."""
    header = b"" if tensors is None else json.dumps({n: list(t.shape) for n, t in tensors.items()}).encode()
    text = _broadcast(torch.frombuffer(bytearray(header or b"\0"), dtype=torch.uint8), source)
    shapes: dict[str, list[int]] = json.loads(bytes(text.tolist()))
    flat = torch.zeros(1).double()
    if tensors:
        flat = torch.cat([tensors[n].flatten() for n in shapes])
    if not shapes:
        return {}
    parts = _broadcast(flat, source).split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _broadcast(x: Tensor, source: int) -> Tensor:
    size = torch.tensor([x.numel()])
    dist.broadcast(size, source)
    x = x.contiguous() if dist.get_rank() == source else x.new_empty(int(size))
    dist.broadcast(x, source)
    return x


def union_of_ranks(mine: Tensors) -> Tensors:
    """Returns the tensors of all ranks by name, each from the first rank that has it, on every rank. A collective."""
    found: Tensors = {}
    for rank in range(dist.get_world_size()):
        new = {name: value for name, value in mine.items() if name not in found}
        found |= broadcast_tensors(new if dist.get_rank() == rank else None, rank)
    return found


def gather_json(value: Any) -> list[Any]:
    """Gathers a small JSON value of every rank onto all ranks, in rank order. A collective."""
    raw = json.dumps(value).encode()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(raw)]))
    width = max(int(size) for size in sizes)
    mine = torch.frombuffer(bytearray(raw.ljust(width, b" ")), dtype=torch.uint8)
    everyone = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(everyone, mine)
    return [json.loads(bytes(part.tolist())) for part in everyone]
