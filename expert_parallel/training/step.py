"""One training step, and evaluation: forward, backward, reduce, clip, update, and what to report of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from expert_parallel.collectives import all_reduce_sum
from expert_parallel.mesh import ParallelMesh
from expert_parallel.model.transformer import ModelOutput, Recompute, Transformer
from expert_parallel.moe.balance import update_balance_bias
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.plan import StepContext
from expert_parallel.settings import Settings
from expert_parallel.training.data import MicroBatch
from expert_parallel.training.grads import clip_gradients, global_norm, reduce_gradients
from expert_parallel.training.optim import OptimizerConfig, ScheduleConfig, learning_rate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class TrainingConfig(Settings):
    """`global_batch`: sequences of a step over all ranks, in `micro_steps` equal parts (gradient accumulation).

    `dtype`: what the model computes in; weights, gradients and optimizer state are kept in float32, or float64 for
    float64. `recompute`: forget activations of the MoE layers, or of whole blocks, and compute them again in the
    backward pass.
    """

    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    micro_steps: int = Field(default=1, ge=1)
    sequence_length: int = Field(ge=1)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    recompute: Recompute = "none"
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
class LayerReport:
    """One MoE layer over a whole step and all ranks. Counts of choices per expert; losses before coefficients."""

    routed_E: Tensor
    kept_E: Tensor
    dropped_E: Tensor
    rows_sent: int
    rows_received: int
    rows_own: int
    losses: dict[str, float]

    def __post_init__(self) -> None:
        """Conservation: no choice and no row is lost or made up, anywhere."""
        assert torch.equal(self.routed_E, self.kept_E + self.dropped_E), self
        assert self.rows_sent == self.rows_received, self


@dataclass(frozen=True)
class StepReport:
    """loss: cross entropy alone, nats a token, of all ranks' tokens. grad_norm: before clipping; 0 in evaluation."""

    loss: float
    num_tokens: int
    layers: dict[int, LayerReport]
    grad_norm: float = 0.0
    learning_rate: float = 0.0


@dataclass
class StepTotals:
    """Sums over the micro-steps of one step on this rank; one all-reduce makes them the step's over all ranks."""

    sums: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    num_micro_steps: int = 0

    def add(self, cross_entropy: Tensor, num_tokens: int, output: ModelOutput) -> None:
        self.num_micro_steps += 1
        self._add(-1, "cross_entropy", cross_entropy.detach())
        self._add(-1, "tokens", torch.tensor(num_tokens, device=cross_entropy.device))
        for layer, stats in output.stats.items():
            dropped_E = stats.dropped_capacity_E + stats.dropped_receive_bound_E
            rows = torch.tensor([stats.rows.sent, stats.rows.received, stats.rows.own], device=dropped_E.device)
            parts = {"routed": stats.routed_E, "kept": stats.kept_E, "dropped": dropped_E, "rows": rows}
            for name, value in {**parts, **{f"loss/{name}": value for name, value in stats.losses.items()}}.items():
                self._add(layer, name, value)

    def reduce(self, group: dist.ProcessGroup) -> StepReport:
        packed = torch.cat([value.flatten() for value in self.sums.values()])  # float64: exact for counts below 2^53
        packed = all_reduce_sum(packed, group).cpu()
        parts = packed.split([value.numel() for value in self.sums.values()])
        total = dict(zip(self.sums, parts, strict=True))
        num_tokens = int(total[-1, "tokens"])
        layers = {layer: self._layer(layer, total) for layer in sorted({key[0] for key in total} - {-1})}
        return StepReport(float(total[-1, "cross_entropy"]) / max(num_tokens, 1), num_tokens, layers)

    def _layer(self, layer: int, total: dict[tuple[int, str], Tensor]) -> LayerReport:
        losses = {
            name.removeprefix("loss/"): float(value) / self.num_micro_steps
            for (number, name), value in total.items()
            if number == layer and name.startswith("loss/")
        }
        sent, received, own = (int(count) for count in total[layer, "rows"])
        routed_E, kept_E, dropped_E = (total[layer, name].long() for name in ("routed", "kept", "dropped"))
        return LayerReport(routed_E, kept_E, dropped_E, sent, received, own, losses)

    def _add(self, layer: int, name: str, value: Tensor) -> None:
        key = (layer, name)
        self.sums[key] = self.sums.get(key, torch.zeros((), dtype=torch.float64)) + value.double()


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[MicroBatch],
    config: TrainingConfig,
    mesh: ParallelMesh,
    *,
    step: int,
    seed: int,
) -> StepReport:
    """Updates the model once. The loss is sum of cross entropy / all targets of the step, plus, for each MoE layer, the
    mean over micro-steps of coefficient * loss."""
    model.train()
    sharded = isinstance(model, FSDPModule)
    num_targets = config.global_batch * config.sequence_length
    totals = StepTotals()
    for micro_step, batch in enumerate(micro_batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(micro_step == config.micro_steps - 1)
        context = StepContext(seed, step, micro_step, 0, mesh.dp_rank, batch.sequence_index_B)
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
    totals = StepTotals()
    for micro_step, batch in enumerate(micro_batches):
        context = StepContext(seed, 0, micro_step, 0, mesh.dp_rank, batch.sequence_index_B)
        output: ModelOutput = model(batch.inputs_BS, context)
        totals.add(cross_entropy_sum(output.logits, batch.targets_BS), batch.targets_BS.numel(), output)
    forget_gathered_weights(model)
    return totals.reduce(mesh.dp_group)


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
        moe = block.moe
        if isinstance(moe, MoELayer) and moe.router.balance_bias_E is not None:
            bias_E = moe.router.balance_bias_E
            routed_E = report.layers[layer].routed_E.to(bias_E.device)
            update_balance_bias(bias_E, routed_E, moe.config.router.balance_bias_rate)
