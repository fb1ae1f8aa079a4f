"""Times a training step of a decoder with our MoE layers against decoders with the peers': forward, loss, backward,
reduction of gradients, clipping, AdamW. Every round times each of them once. No implementation has an auxiliary loss.

    expert-parallel bench train --shape base --ranks 2
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor

from expert_parallel import __version__
from expert_parallel.bench.peers.decoder import TrainableModel
from expert_parallel.bench.peers.implementation import Case, NotMeasured, build_case, first_supported, try_build
from expert_parallel.bench.peers.registry import TRAIN_PEERS
from expert_parallel.bench.shapes import TrainShape
from expert_parallel.bench.timing import (
    Environment,
    Times,
    Workload,
    max_over_ranks,
    measure,
    peak_memory,
    set_up_environment,
)
from expert_parallel.data.batch import MicroBatch, shard_bounds
from expert_parallel.parallel.collectives import all_reduce_sum
from expert_parallel.runtime.process import Runtime
from expert_parallel.settings import Settings
from expert_parallel.training.config import DTYPES, Config
from expert_parallel.training.setup import build, check_degrees
from expert_parallel.training.step import train_step

OURS = "ours"
ProgressFn = Callable[[str], None]
StepFn = Callable[[Tensor, Tensor], Tensor]  # (inputs_BS, targets_BS) -> this rank's sum of the cross entropy
DroppedShareFn = Callable[[], float | None]  # returns the share of this rank's choices that the last step dropped


class TrainTask(Settings):
    """Sets what `bench train` measures. threads: CPU threads of each rank. peers: names of the implementations to
    compare with; None: all."""

    shape: TrainShape
    dtype: Literal["float32", "bfloat16"] = "float32"
    rounds: int = 5
    threads: int = 1
    peers: tuple[str, ...] | None = None


class TrainRow(BaseModel):
    """Holds the measurement of one implementation's training step.

    why: the reason if it was not measured; then only `name` is set besides. computes: a description. over_ours: its
    median time divided by ours. mfu: model FLOP/s of a rank divided by the FLOP/s of one large matrix product. peak:
    bytes, peak memory of a step, the largest over ranks. loss: mean cross entropy of the last step, in nats per token.
    dropped_share: share of the (token, expert) choices that the last step dropped, over layers and ranks."""

    name: str
    activation: str = ""
    version: str = ""
    computes: str = ""
    why: str = ""
    times: Times | None = None
    over_ours: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak: int | None = None
    loss: float | None = None
    dropped_share: float | None = None


class TrainResult(BaseModel):
    """Holds the result of `bench train`. parameters: their number (in total, active per token), with the shape's
    activation. product, product_rate: times and FLOP/s of one large matrix product, whose dimensions are all
    product_size."""

    kind: Literal["train"] = "train"
    shape: TrainShape
    dtype: str
    rounds: int
    facts: Environment
    parameters: tuple[int, int]
    product_size: int
    product: Times
    product_rate: float
    rows: list[TrainRow]


def train_task(tree: dict[str, Any], runtime: Runtime, print_progress: ProgressFn) -> dict[str, Any]:
    """Runs the benchmark on every rank. tree: a `TrainTask`. Returns the result as a tree for JSON."""
    return bench_train(TrainTask.model_validate(tree, strict=False), runtime, print_progress).model_dump(mode="json")


def bench_train(task: TrainTask, runtime: Runtime, print_progress: ProgressFn = lambda text: None) -> TrainResult:
    """Builds all models, then times their training steps. A collective."""
    facts = set_up_environment(runtime, task.threads)
    shape, device = task.shape, runtime.device
    group = dist.group.WORLD if runtime.world_size > 1 else None
    cases: dict[str, Case] = {
        activation: build_case(shape.layer, activation, DTYPES[task.dtype], runtime, group)
        for activation in dict.fromkeys([shape.layer.activation, "swiglu"])
    }
    models = {activation: our_config(task, activation, runtime.world_size).model for activation in cases}
    inputs_BS, targets_BS = random_batch(shape, runtime)
    steps, shares, rows = build_steps(task, cases, runtime, inputs_BS, targets_BS)

    size = 8192 if device.type == "cuda" else 1024
    a, b, out = (torch.ones(size, size, dtype=DTYPES[task.dtype], device=device) for _ in range(3))
    workloads = {"product": Workload(partial(torch.mm, a, b, out=out))}
    workloads |= {name: Workload(partial(step, inputs_BS, targets_BS)) for name, step in steps.items()}
    print_progress(f"timing {task.rounds} rounds of {len(workloads)}")
    times = measure(workloads, device, task.rounds, group)
    rate = 2 * size**3 / times["product"].median * 1000
    for row in rows:
        if row.name in steps:
            ours = times[OURS if row.activation == shape.layer.activation else f"{OURS}, {row.activation}"]
            row.times = times[row.name]
            row.over_ours = row.times.median / ours.median
            row.tokens_per_second = shape.layer.tokens / row.times.median * 1000
            flops = shape.layer.tokens * models[row.activation].flops_per_token(shape.sequence_length)
            row.mfu = flops / runtime.world_size / row.times.median * 1000 / rate
            peak = peak_memory(partial(steps[row.name], inputs_BS, targets_BS), list, device)
            row.peak = round(max_over_ranks([peak.total], group)[0])
            # Waits for the device; float64 and CPU, since the sum of many tokens is reported.
            total = all_reduce_sum(steps[row.name](inputs_BS, targets_BS).double().cpu(), group)
            row.loss = float(total) / shape.layer.tokens
            share = shares[row.name]()
            if share is not None:  # the same on all ranks
                dropped = torch.tensor(share, dtype=torch.float64)
                row.dropped_share = float(all_reduce_sum(dropped, group)) / runtime.world_size
    measured = models[shape.layer.activation]
    return TrainResult(
        shape=shape,
        dtype=task.dtype,
        rounds=task.rounds,
        facts=facts,
        parameters=(measured.num_params(), measured.num_active_params()),
        product_size=size,
        product=times["product"],
        product_rate=rate,
        rows=rows,
    )


def build_steps(
    task: TrainTask, cases: dict[str, Case], runtime: Runtime, inputs_BS: Tensor, targets_BS: Tensor
) -> tuple[dict[str, StepFn], dict[str, DroppedShareFn], list[TrainRow]]:
    """Builds our training step, also with each further activation that a peer computes, and the peers' steps. Returns
    by name the steps, and functions that return the share of this rank's choices that the last step dropped; and a row
    for each implementation asked for."""
    shape, main = task.shape, task.shape.layer.activation
    steps: dict[str, StepFn] = {}
    shares: dict[str, DroppedShareFn] = {}
    rows: list[TrainRow] = []

    def trial(name: str, case: Case) -> TrainableModel:
        trainable = TRAIN_PEERS[name](shape, case)
        trainable.step(inputs_BS, targets_BS)
        return trainable

    def add_ours(name: str, activation: str) -> TrainRow:
        steps[name], shares[name] = our_step(task, activation, runtime), lambda: 0.0
        computes = f"dropless, {activation}"
        return TrainRow(name=name, activation=activation, computes=computes, version=__version__)

    rows.append(add_ours(OURS, main))
    for name in task.peers or TRAIN_PEERS:
        try:
            found, case = first_supported(
                lambda case, name=name: try_build(partial(trial, name, case)),  # type: ignore[misc]
                list(cases.values()),
            )
        except NotMeasured as reason:
            rows.append(TrainRow(name=name, why=str(reason)))
            continue
        steps[name], shares[name] = found.step, found.dropped_share
        row = TrainRow(name=name, activation=case.activation, computes=found.computes, version=found.version)
        rows.append(row)
    others = {row.activation for row in rows if row.activation} - {main}
    rows[1:1] = [add_ours(f"{OURS}, {other}", other) for other in sorted(others)]
    return steps, shares, rows


def our_step(task: TrainTask, activation: str, runtime: Runtime) -> StepFn:
    """Builds our model and returns its training step: `train_step`, as training runs it. Weights and moments stay in
    float32 when it computes in bfloat16."""
    config = our_config(task, activation, runtime.world_size)
    degrees = check_degrees(config, runtime.world_size)
    mesh, model, engine = build(config, runtime, degrees)
    first, count = shard_bounds(task.shape.sequences, degrees.dp, mesh.dp_rank)
    index_B = torch.arange(first, first + count, device=runtime.device)

    def step(inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
        batch = MicroBatch(inputs_BS, targets_BS, index_B)
        report = train_step(model, engine, [batch], config.training, mesh, step=0, seed=0)
        return torch.tensor(report.loss * report.num_tokens / runtime.world_size)

    return step


def our_config(task: TrainTask, activation: str, ranks: int) -> Config:
    """Returns the config of a run with this shape, dtype and activation, and expert parallelism over all ranks."""
    shape, layer = task.shape, task.shape.layer
    model = {
        "vocab_size": shape.vocab_size,
        "num_layers": shape.num_layers,
        "d_model": layer.d_model,
        "attention": {"num_heads": shape.num_heads, "head_size": shape.head_size},
        "moe": {
            "num_experts": layer.num_experts,
            "router": {"k": layer.k, "normalise": layer.k > 1},
            "experts": {"hidden": layer.hidden, "activation": activation},
        },
    }
    training = {
        "steps": 1,
        "global_batch": shape.sequences,
        "sequence_length": shape.sequence_length,
        "dtype": task.dtype,
        "schedule": {"warmup_steps": 0},
    }
    data = {"kind": "tokens"}  # unused: the batches are passed in
    tree = {"run": {"folder": "none"}, "model": model, "training": training, "parallel": {"ep": ranks}, "data": data}
    return Config.model_validate(tree)


def random_batch(shape: TrainShape, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Draws this rank's inputs and targets, (B, S) each, the same at every step and for every implementation."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(shape.vocab_size, (shape.sequences, shape.sequence_length + 1), generator=generator)
    first, count = shard_bounds(shape.sequences, runtime.world_size, runtime.rank)
    own = sequences[first : first + count].to(runtime.device)
    return own[:, :-1].contiguous(), own[:, 1:].contiguous()
