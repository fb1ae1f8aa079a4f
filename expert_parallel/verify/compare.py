"""Compares each rank's tensors of a training step with the reference's: relative error, ratio, and the rank with the
largest error."""

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.moe.conservation import LayerTotals
from expert_parallel.training.loop import TrainingRun
from expert_parallel.verify.reference import LayerRecord, ReferenceStep, TokenPartition, adamw_step
from expert_parallel.verify.system_under_test import CapturedStep, Tensors, context_token_indices

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
        (".experts.", "experts"),
        (".attention.", "attention"),
        (".ffn.", "ffn"),
    ):
        if part in name:
            return group
    return "embedding"


def expected_tensors(reference: ReferenceStep, initial: Tensors, start: Tensors) -> Tensors:
    """Returns every tensor that is compared, as the reference computed it, in float64. The names are `quantity/place`,
    such as `gradient/embedding.weight`.

    initial: the model's initial weights, before `perturb`. start: the weights that the step starts from."""
    after = reference.weights | reference.balance_biases
    found: Tensors = {
        "loss/loss": torch.tensor([reference.loss]),
        "gradient norm/gradient norm": torch.tensor([reference.grad_norm]),
        **{f"initial weights/{name}": value for name, value in initial.items()},
        **{f"gradient/{name}": value for name, value in reference.gradients.items()},
        **{f"update/{name}": after[name] - value for name, value in start.items()},
        **{f"output/micro-step {m}, block {layer}": x for (m, layer), x in reference.outputs.items()},
    }
    for layer, record in reference.layers.items():
        found |= _layer_tensors(layer, record, record.dropped)
    return {name: value.detach().to(torch.float64) for name, value in found.items()}


def _layer_tensors(layer: int, layer_record: LayerRecord | LayerTotals, dropped: int) -> Tensors:
    losses = {f"balance loss/block {layer}, {name}": [value] for name, value in layer_record.losses.items()}
    found = {name: torch.tensor(value, dtype=torch.float64) for name, value in losses.items()}
    counts = (layer_record.routed_E, layer_record.kept_E)
    if isinstance(layer_record, LayerTotals):
        counts = (layer_record.routed_E, layer_record.kept_E + layer_record.rerouted_E)
    for name, count in zip(("choices routed", "choices kept"), counts, strict=True):
        assert count is not None
        found[f"dropped/block {layer}, {name}"] = count
    found[f"dropped/block {layer}, choices dropped"] = torch.tensor([dropped])
    return found


def actual_tensors(
    run: TrainingRun, captured: CapturedStep, before: Tensors, start: Tensors, expected: Tensors
) -> Pairs:
    """Pairs each tensor that this rank has with the slice of the expected tensor that it should equal, by name.

    before: this rank's initial weights, as its model was built. start: the weights that the step starts from. expected:
    from `expected_tensors`."""
    report, training = captured.report, run.config.training
    found: Tensors = {
        "loss/loss": torch.tensor([report.loss]),
        "gradient norm/gradient norm": torch.tensor([report.grad_norm]),
        **{f"initial weights/{name}": value for name, value in before.items()},
        **{f"gradient/{name}": value for name, value in captured.gradients.items()},
        **{f"update/{name}": value - start[name] for name, value in captured.weights.items()},
    }
    for layer, totals in report.layers.items():
        found |= _layer_tensors(layer, totals, int(totals.dropped_E.sum()))
    pairs = {name: (value.double(), expected[name]) for name, value in found.items()}
    for (micro_step, layer), (context, value) in captured.outputs.items():
        name = f"output/micro-step {micro_step}, block {layer}"
        sequence_index_B, positions_S = context_token_indices(context, value.shape[1])
        pairs[name] = (value, expected[name][sequence_index_B[:, None], positions_S])
    if training.dtype != "float64":
        # Adam's first step is nearly sign(gradient), which rounding flips near 0: expect AdamW of this rank's gradient.
        for name, after in adamw_step(training, start, captured.gradients, report.grad_norm).items():
            pairs[f"update/{name}"] = (pairs[f"update/{name}"][0], after - start[name])
    return pairs


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
    0 if a is exactly ratio * b. is_present: False if no rank has the tensor. rank: the rank of the largest error."""

    name: str
    is_present: bool
    relative: float
    ratio: float
    residual: float
    rank: int

    @property
    def column(self) -> str:
        """Returns the key of the table's column that shows this tensor."""
        what, _, where = self.name.partition("/")
        return f"gradient: {parameter_group(where)}" if what == "gradient" else what


def compare(pairs: Pairs, expected: Tensors, floor: float) -> list[TensorDifference]:
    """Returns, for each name in `expected` and in the `pairs` of this rank, the difference on the rank where it is
    largest; every rank gets the same list. A collective; all ranks must pass the same names in `expected`.

    floor: a tensor whose max |b| is below `floor` times the largest value of its quantity (all gradients, say) is
    compared relative to that product instead."""
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
        TensorDifference(name, is_present > 0, relative, ratio, residual, rank)
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


def broadcast_tensors(tensors: Tensors | None) -> Tensors:
    """Broadcasts rank 0's float64 tensors to all ranks and returns them: names and shapes as JSON, then one flat
    buffer. A collective. tensors: None on the other ranks."""
    header = b"" if tensors is None else json.dumps({n: list(t.shape) for n, t in tensors.items()}).encode()
    text = _broadcast(torch.frombuffer(bytearray(header or b"\0"), dtype=torch.uint8))
    shapes: dict[str, list[int]] = json.loads(bytes(text.tolist()))
    flat = torch.cat([tensors[n].flatten() for n in shapes]) if tensors is not None else torch.zeros(1).double()
    parts = _broadcast(flat).split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _broadcast(x: Tensor) -> Tensor:
    size = torch.tensor([x.numel()])
    dist.broadcast(size, 0)
    x = x.contiguous() if dist.get_rank() == 0 else x.new_empty(int(size))
    dist.broadcast(x, 0)
    return x


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
