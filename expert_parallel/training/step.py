"""Implements one training step, and evaluation: forward, backward, reduce, clip, update, report."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from expert_parallel.data.batch import MicroBatch
from expert_parallel.model.outputs import ModelOutput
from expert_parallel.model.pipeline import Pipeline, PipelineStep, Stage
from expert_parallel.model.transformer import LanguageModel, ModelConfig
from expert_parallel.moe.conservation import LayerTotals, pack, packed_size, report_breaches, unpack
from expert_parallel.moe.context import RouterReplay, StepContext
from expert_parallel.moe.routers.base import TopKRouter
from expert_parallel.moe.routers.losses import loss_name, update_balance_bias
from expert_parallel.moe.types import LoadStats
from expert_parallel.parallel.collectives import all_reduce_sum
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.training.config import TrainingConfig
from expert_parallel.training.cross_entropy import StepTargets, count_targets, local_cross_entropy, no_cross_entropy
from expert_parallel.training.engines.engine import Engine
from expert_parallel.training.freeze import AllTrainable
from expert_parallel.training.optim import learning_rate


@dataclass(frozen=True)
class StepReport:
    """Holds the results of a training step or an evaluation.

    loss: the mean cross entropy of all ranks' tokens, in nats per token, without auxiliary losses. num_tokens: the
    number of these tokens. layers: the totals of each MoE block, by its number. grad_norm: the norm of the whole
    model's gradient before clipping; 0 in evaluation. mtp_losses: the mean cross entropy of each depth of multi-token
    prediction over the targets that it has.
    """

    loss: float
    num_tokens: int
    layers: dict[int, LayerTotals]
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    mtp_losses: tuple[float, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Returns True if neither the loss nor the gradient norm is NaN or infinite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class StepTotals:
    """Accumulates losses and counts over the micro-steps of this rank; `reduce` sums them over all ranks in one
    all-reduce.

    Add a micro-step after its backward pass, if it has one, so that the counts of rows cover both passes.
    """

    config: ModelConfig
    step: int
    num_micro_steps: int = 0
    sums: Tensor | None = None

    def add(self, counted: Tensor, stats: dict[int, LoadStats]) -> None:
        """Adds one micro-step. counted: see CrossEntropy. stats: by number of the MoE block."""
        self.num_micro_steps += 1
        head = counted.flatten()
        empty = head.new_zeros(self._layer_size)
        layers = (
            pack(stats[layer]) if layer in stats else empty  # empty: the layer is on another pipeline stage
            for layer in self.config.moe_layers
        )
        packed = torch.cat([head, *layers])
        self.sums = packed if self.sums is None else self.sums + packed

    def reduce(self) -> StepReport:
        """Sums over all ranks and returns the report of the step; every rank must call it.

        Raises LedgerBreach on all ranks (or warns, as `model.moe.ledger` says) if a layer's counts are inconsistent.
        """
        assert self.sums is not None
        # .cpu() is the step's device sync for its report.
        num_means = 1 + len(self.config.mtp_layers)
        head, rest = all_reduce_sum(self.sums, dist.group.WORLD).cpu().tensor_split([2 * num_means])
        loss, *mtp_losses = (total / max(count, 1) for total, count in head.view(num_means, 2).tolist())
        layers = {}
        for number, layer in enumerate(self.config.moe_layers):
            assert self.config.moe is not None
            part = rest[number * self._layer_size :][: self._layer_size]
            totals = unpack(part, self.config.moe.num_experts, self._loss_names)
            report_breaches(totals, self.config.moe.ledger, layer, self.step)
            losses = {name: value / self.num_micro_steps for name, value in totals.losses.items()}
            layers[layer] = replace(totals, losses=losses)
        return StepReport(loss, int(head[1]), layers, mtp_losses=tuple(mtp_losses))

    @property
    def _loss_names(self) -> list[str]:
        return [] if self.config.moe is None else [loss_name(loss) for loss in self.config.moe.losses]

    @property
    def _layer_size(self) -> int:
        return 0 if self.config.moe is None else packed_size(self.config.moe.num_experts, len(self._loss_names))


def train_step(
    model: LanguageModel,
    engine: Engine,
    micro_batches: Iterable[MicroBatch],
    config: TrainingConfig,
    mesh: ParallelMesh,
    *,
    step: int,
    seed: int,
    replay: RouterReplay | None = None,
) -> StepReport:
    """Makes one training step, which updates the weights once, and returns its report.

    The loss is (sum of cross entropy) / (number of all targets of the step), plus model.mtp.weight times the mean over
    the depths of multi-token prediction of the same quotient, plus, for each auxiliary loss of each MoE layer, the mean
    over micro-steps of coefficient * loss. replay: the recorded choices that the routers take; choices
    of passes that it does not hold are recorded in it.
    """
    totals = StepTotals(model.config, step)
    passes = forward_backward(model, engine, list(micro_batches), config, mesh, step=step, seed=seed, replay=replay)
    for counted, stats in passes:
        totals.add(counted, stats)

    rate = learning_rate(config.optimizer, config.schedule, step, config.steps)
    norm = engine.update(rate)

    report = totals.reduce()
    report = replace(report, grad_norm=norm, learning_rate=rate)
    # A step that is not finite has updated no weight (Engine.update), so it must not change the biases either.
    trains_routers = isinstance(config.trainable, AllTrainable) or config.trainable.router == "chosen"
    if report.is_finite and trains_routers:
        update_balance_biases(model, report)
    return report


def make_step_contexts(
    batches: list[MicroBatch], mesh: ParallelMesh, *, seed: int, step: int = 0, replay: RouterReplay | None = None
) -> list[StepContext]:
    """Returns the StepContext of each of this rank's micro-batches, one for each micro-step."""
    documents = [b.documents_BS for b in batches if b.documents_BS is not None and b.documents_BS.numel()]
    most = max((int(documents_BS.max()) + 1 for documents_BS in documents), default=1)  # device sync
    return [
        StepContext(
            seed,
            step,
            micro_step,
            0,
            mesh.stage_rank,
            batch.sequence_index_B,
            document_BS=batch.documents_BS,
            documents_per_row=1 << (most - 1).bit_length(),  # a power of two, so that few different shapes occur
            replay=replay,
        )
        for micro_step, batch in enumerate(batches)
    ]


# What this rank reports of the cross entropy (CrossEntropy.counted), stats of the MoE blocks of this stage.
MicroStepResult = tuple[Tensor, dict[int, LoadStats]]


def forward_backward(
    model: LanguageModel,
    engine: Engine,
    batches: list[MicroBatch],
    config: TrainingConfig,
    mesh: ParallelMesh,
    *,
    step: int,
    seed: int,
    replay: RouterReplay | None,
) -> Iterator[MicroStepResult]:
    """Runs the forward and backward passes of a step, and yields the result of each micro-step. The gradients of this
    rank's tokens accumulate in the engine. Arguments: see `train_step`."""
    model.train()
    contexts = make_step_contexts(batches, mesh, seed=seed, step=step, replay=replay)
    targets = count_targets(model, batches, config.global_batch, config.sequence_length, mesh)
    if isinstance(model, Pipeline):
        return run_pipeline(model, batches, contexts, targets, mesh)
    return run_micro_steps(model, engine, batches, contexts, targets, mesh)


def run_micro_steps(
    model: LanguageModel,
    engine: Engine,
    batches: list[MicroBatch],
    contexts: list[StepContext],
    targets: StepTargets,
    mesh: ParallelMesh,
) -> Iterator[MicroStepResult]:
    """Runs the forward and backward passes, one micro-step after the other, and yields the result of each."""
    for batch, context in zip(batches, contexts, strict=True):
        output = engine.forward(batch.inputs_BS, context)
        cross_entropy = local_cross_entropy(model, output, batch, mesh)
        balance = sum((loss for losses in output.losses.values() for loss in losses.values()), torch.zeros(()))
        loss = cross_entropy.loss(targets) + balance / len(batches)
        engine.backward(loss, is_last=context.micro_step == len(batches) - 1)
        yield cross_entropy.counted, output.stats


def run_pipeline(
    model: Pipeline, batches: list[MicroBatch], contexts: list[StepContext], targets: StepTargets, mesh: ParallelMesh
) -> Iterator[MicroStepResult]:
    """Runs the forward and backward passes of all micro-steps in the order of the pipeline schedule, and yields the
    result of each."""
    counted = [no_cross_entropy(model, batch.inputs_BS.device) for batch in batches]

    def cross_entropy_of(stage: Stage, output: ModelOutput, number: int) -> Tensor:
        cross_entropy = local_cross_entropy(stage, output, batches[number], mesh)
        counted[number] = cross_entropy.counted
        return cross_entropy.loss(targets)

    pipeline_step = PipelineStep([batch.inputs_BS for batch in batches], contexts, cross_entropy_of)
    model.forward_backward(pipeline_step)
    yield from zip(counted, pipeline_step.stats, strict=True)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    engine: Engine,
    micro_batches: Iterable[MicroBatch],
    mesh: ParallelMesh,
    *,
    seed: int,
) -> StepReport:
    """Returns a report with the mean cross entropy over all ranks' sequences.

    Every rank must pass the same number of micro-batches, which may be empty.
    """
    model.eval()
    totals = StepTotals(model.config, 0)
    batches = list(micro_batches)
    for batch, context in zip(batches, make_step_contexts(batches, mesh, seed=seed), strict=True):
        output = engine.forward(batch.inputs_BS, context)
        if not model.has_logits:
            totals.add(no_cross_entropy(model, output.logits.device), output.stats)
            continue
        totals.add(local_cross_entropy(model, output, batch, mesh).counted, output.stats)
    reshard_parameters(model)
    return totals.reduce()


def reshard_parameters(model: nn.Module) -> None:
    """Reshards weights that FSDP2 keeps whole after forward, for a backward pass that evaluation does not make."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def update_balance_biases(model: LanguageModel, report: StepReport) -> None:
    """Updates the balance biases of this rank's routers from the number of choices of each expert in the step
    (DeepSeek-V3)."""
    for layer, block in model.local_blocks():
        router = None if block.moe is None else block.moe.router
        if isinstance(router, TopKRouter) and router.balance_bias_E is not None:
            routed_E = report.layers[layer].routed_E.to(router.balance_bias_E.device)
            update_balance_bias(router.balance_bias_E, routed_E, router.config.balance_bias_rate)
