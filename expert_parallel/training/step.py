"""One training step, and evaluation: forward, backward, reduce, clip, update, and what to report of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from expert_parallel.collectives import all_reduce_sum
from expert_parallel.mesh import ParallelMesh
from expert_parallel.model.transformer import Block, ModelOutput, Recompute, Transformer
from expert_parallel.moe.balance import update_balance_bias
from expert_parallel.moe.ledger import LedgerConfig
from expert_parallel.moe.plan import RouterReplay, StepContext
from expert_parallel.moe.routing import TopKRouter
from expert_parallel.moe.totals import LayerTotals, pack, report_breaches, unpack
from expert_parallel.settings import Settings
from expert_parallel.training.data import MicroBatch
from expert_parallel.training.grads import clip_gradients, global_norm, reduce_gradients
from expert_parallel.training.optim import OptimizerConfig, ScheduleConfig, learning_rate
from expert_parallel.training.replay import RoutingConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class TrainingConfig(Settings):
    """`global_batch`: sequences of a step over all ranks, in `micro_steps` equal parts (gradient accumulation).

    `dtype`: what the model computes in; weights, gradients and optimizer state are kept in float32, or float64 for
    float64. `routing`: record every token's experts, or play a record back (replay.py). `recompute`: forget
    activations of the MoE layers, or of whole blocks, and compute them again in the backward pass.
    """

    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    micro_steps: int = Field(default=1, ge=1)
    sequence_length: int = Field(ge=1)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    recompute: Recompute = "none"
    routing: RoutingConfig | None = None
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _divide(self) -> "TrainingConfig":
        if self.global_batch % self.micro_steps:
            raise ValueError(
                f"global_batch ({self.global_batch}) is not a multiple of micro_steps ({self.micro_steps})"
            )
        return self


@dataclass(frozen=True)
class StepReport:
    """loss: cross entropy alone, nats a token, of all ranks' tokens. grad_norm: before clipping; 0 in evaluation."""

    loss: float
    num_tokens: int
    layers: dict[int, LayerTotals]
    grad_norm: float = 0.0
    learning_rate: float = 0.0


@dataclass
class StepTotals:
    """Sums over the micro-steps of one step on this rank; one all-reduce of all layers makes them the step's over all
    ranks.

    Add a pass after its backward pass, if it has one, so that the ledger has seen both."""

    ledger: LedgerConfig
    step: int
    sums: Tensor | None = None
    shapes: dict[int, tuple[int, list[str]]] = field(default_factory=dict)  # by layer: experts, losses
    num_micro_steps: int = 0

    def add(self, cross_entropy: Tensor, num_tokens: int, output: ModelOutput) -> None:
        self.num_micro_steps += 1
        head = cross_entropy.detach().double().view(1)
        parts = [head, head.new_tensor([num_tokens]), *(pack(stats) for stats in output.stats.values())]
        packed = torch.cat(parts)
        self.sums = packed if self.sums is None else self.sums + packed
        self.shapes = {layer: (len(stats.routed_E), list(stats.losses)) for layer, stats in output.stats.items()}

    def reduce(self, group: dist.ProcessGroup) -> StepReport:
        """Raises LedgerBreach on all ranks where a layer's counts do not add up, or warns, as set."""
        assert self.sums is not None
        head, rest = all_reduce_sum(self.sums, group).cpu().tensor_split([2])
        loss, num_tokens = float(head[0]), int(head[1])
        layers = {}
        for (layer, (num_experts, names)), part in zip(
            self.shapes.items(), rest.chunk(len(self.shapes) or 1), strict=False
        ):
            totals = unpack(part, num_experts, names)
            report_breaches(totals, self.ledger, layer, self.step)
            losses = {name: value / self.num_micro_steps for name, value in totals.losses.items()}
            layers[layer] = replace(totals, losses=losses)
        return StepReport(loss / max(num_tokens, 1), num_tokens, layers)


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[MicroBatch],
    config: TrainingConfig,
    mesh: ParallelMesh,
    *,
    step: int,
    seed: int,
    replay: RouterReplay | None = None,
) -> StepReport:
    """Updates the model once. The loss is sum of cross entropy / all targets of the step, plus, for each MoE layer, the
    mean over micro-steps of coefficient * loss. replay: choices to take, and where those made are recorded."""
    model.train()
    sharded = isinstance(model, FSDPModule)
    num_targets = config.global_batch * config.sequence_length
    totals = StepTotals(ledger_of(model), step)
    for micro_step, batch in enumerate(micro_batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(micro_step == config.micro_steps - 1)
        context = StepContext(seed, step, micro_step, 0, mesh.dp_rank, batch.sequence_index_B, replay=replay)
        output: ModelOutput = model(batch.inputs_BS, context)
        cross_entropy = cross_entropy_sum(output.logits, batch.targets_BS)
        auxiliary = sum((loss for losses in output.losses.values() for loss in losses.values()), torch.zeros(()))
        (cross_entropy / num_targets + auxiliary / config.micro_steps).backward()
        totals.add(cross_entropy, batch.targets_BS.numel(), output)

    reduce_gradients(model, mesh, sharded=sharded)
    norm = global_norm(model, mesh, sharded=sharded)
    if config.clip_norm is not None:
        clip_gradients(model, norm, config.clip_norm)
    rate = learning_rate(config.optimizer, config.schedule, step, config.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    report = totals.reduce(mesh.dp_group)
    update_balance_biases(model, report)
    return StepReport(report.loss, report.num_tokens, report.layers, float(norm), rate)


@torch.no_grad()
def evaluate(model: Transformer, micro_batches: Iterable[MicroBatch], mesh: ParallelMesh, *, seed: int) -> StepReport:
    """Mean cross entropy over all ranks' sequences. Every rank must bring the same number of batches, empty or not."""
    model.eval()
    totals = StepTotals(ledger_of(model), 0)
    for micro_step, batch in enumerate(micro_batches):
        context = StepContext(seed, 0, micro_step, 0, mesh.dp_rank, batch.sequence_index_B)
        output: ModelOutput = model(batch.inputs_BS, context)
        totals.add(cross_entropy_sum(output.logits, batch.targets_BS), batch.targets_BS.numel(), output)
    forget_gathered_weights(model)
    return totals.reduce(mesh.dp_group)


def ledger_of(model: Transformer) -> LedgerConfig:
    return LedgerConfig() if model.config.moe is None else model.config.moe.ledger


def forget_gathered_weights(model: Transformer) -> None:
    """FSDP2 keeps the outermost weights whole after a forward pass, for a backward pass that evaluation never makes."""
    if isinstance(model, FSDPModule):
        model.reshard()


def cross_entropy_sum(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Sum of -log p(target), nats, in float32 or wider."""
    wide = logits_BSV.to(torch.promote_types(torch.float32, logits_BSV.dtype))
    return F.cross_entropy(wide.flatten(0, 1), targets_BS.flatten(), reduction="sum")


def update_balance_biases(model: Transformer, report: StepReport) -> None:
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        router = None if block.moe is None else block.moe.router
        if isinstance(router, TopKRouter) and router.balance_bias_E is not None:
            routed_E = report.layers[layer].routed_E.to(router.balance_bias_E.device)
            update_balance_bias(router.balance_bias_E, routed_E, router.config.balance_bias_rate)
