"""Implements pipeline parallelism with the schedules of torch.distributed.pipelining.

A stage sends two tensors to the next: its output x (B, S, D), in the compute dtype, and `balance` (N), in float32 or
wider, a vector to which every stage adds its auxiliary losses. So the last stage has the whole loss, and its gradient
reaches the routers of all stages. Gradients are summed, never averaged.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B

from expert_parallel.model.kv_cache import KVCache
from expert_parallel.model.outputs import ModelOutput, Pooled, pooled_losses
from expert_parallel.model.parallelize import build_model, split_into_stages
from expert_parallel.model.transformer import (
    Block,
    LanguageModel,
    ModelConfig,
    Transformer,
)
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.routers.losses import pooled_part
from expert_parallel.moe.types import LoadStats
from expert_parallel.parallel.collectives import all_reduce_sum, group_rank, group_size
from expert_parallel.parallel.degrees import InterleavedConfig, OneForwardOneBackwardConfig
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.parallel.sequence import SequenceShard

PipelineConfig = OneForwardOneBackwardConfig | InterleavedConfig
SCHEDULES = {"1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


class PipelineStep:
    """Holds the inputs of all micro-steps of one step, and collects statistics from the stages of this rank.

    tokens: for each micro-step (B, S), int64, all of one shape. cross_entropy: a function of (last stage, its output,
    number of the micro-step) that returns the summed cross entropy divided by the number of targets of the step; None
    runs the forward pass only. cache: for generation, see Transformer. stats, pooled: for each micro-step, the
    statistics and pooled terms by number of the MoE block (see ModelOutput).

    It is a class of its own because the schedule splits tensors, lists and tuples into micro-batches, but passes other
    objects on whole.
    """

    def __init__(
        self,
        tokens: Sequence[Tensor],
        contexts: Sequence[StepContext],
        cross_entropy: Callable[["Stage", ModelOutput, int], Tensor] | None = None,
        cache: KVCache | None = None,
    ) -> None:
        self.tokens = tokens
        self.contexts = contexts
        self.cross_entropy = cross_entropy
        self.cache = cache
        self.stats: list[dict[int, LoadStats]] = [{} for _ in tokens]
        self.pooled: list[dict[int, Pooled]] = [{} for _ in tokens]

    @property
    def num_blocks(self) -> int:
        """Returns how many sequences or documents of a micro-step have f and P of their own, for losses of scope
        `sequence`.

        These are the sequences of the micro-step or, if they are packed, as many documents as they may hold. The number
        is the same in all micro-steps of a step, since it determines the size of `balance`.
        """
        per_row = max(1 if c.document_BS is None else c.documents_per_row for c in self.contexts)
        return len(self.tokens[0]) * per_row


class Stage(Transformer):
    """Adapts a pipeline stage of a Transformer to the calls of torch.distributed.pipelining."""

    def forward(  # type: ignore[override]
        self, x: Tensor | None = None, balance: Tensor | None = None, *, micro_step: Tensor, pipeline_step: PipelineStep
    ) -> Any:
        """Runs one micro-step. Returns (x, balance) for the next stage; on the last stage the loss, a scalar.

        x: (B, S, D), and balance: (N), are what the previous stage returned; None on the first stage. micro_step: the
        number of the micro-step, as a CPU tensor, since the schedule splits a tensor of all numbers. If `pipeline_step`
        has no cross entropy (forward only), it returns a ModelOutput.
        """
        number = int(micro_step)  # on the CPU: no device synchronisation
        output = super().forward(pipeline_step.tokens[number], pipeline_step.contexts[number], x, pipeline_step.cache)
        pipeline_step.stats[number] |= output.stats
        pipeline_step.pooled[number] |= {
            layer: {name: (f_bE.detach(), p_bE.detach()) for name, (f_bE, p_bE) in terms.items()}
            for layer, terms in output.pooled.items()
        }
        if pipeline_step.cross_entropy is None:
            return output
        own_balance = self._balance_of(output, pipeline_step.num_blocks)
        balance = own_balance if balance is None else balance + own_balance
        if not self.stage_spec.is_last:
            return output.logits, balance
        balance_loss = self._whole_balance(balance, pipeline_step.num_blocks)
        return pipeline_step.cross_entropy(self, output, number) + balance_loss / len(pipeline_step.tokens)

    def _balance_of(self, output: ModelOutput, num_blocks: int) -> Tensor:
        """Returns this stage's summand of `balance`, (N): first the sum of the losses of its layers, then f and P of
        each loss that is pooled over layers, flattened."""
        # float32 or wider: losses are computed so, and sums over stages must not round.
        dtype = torch.promote_types(torch.float32, self.compute_dtype)
        summand = torch.zeros(balance_size(self.config, num_blocks), dtype=dtype, device=output.logits.device)
        for layer, losses in output.losses.items():
            terms = [term.flatten() for pair in output.pooled[layer].values() for term in pair]
            single = sum(
                (loss for name, loss in losses.items() if name not in output.pooled[layer]), summand.new_zeros(())
            )
            summand = summand + torch.cat([single.view(1), *terms])
        return summand

    def _whole_balance(self, balance: Tensor, num_blocks: int) -> Tensor:
        """Returns the balance loss of all stages, a scalar, from `balance` (N) summed over all stages."""
        total, rest = balance[0], balance[1:]
        for name, (blocks, experts) in pooled_shapes(self.config, num_blocks).items():
            fraction, probability, rest = rest.tensor_split([blocks * experts, 2 * blocks * experts])
            shape = (blocks, experts)
            loss = pooled_part(fraction.view(shape), probability.view(shape), len(self.config.moe_layers))
            total = total + pooled_losses(self.config)[name].coefficient * loss
        return total


def pooled_shapes(config: ModelConfig, num_blocks: int) -> dict[str, tuple[int, int]]:
    """Returns the shape (blocks, E) of f and P for each balance loss that is pooled over layers, by name of the loss.
    num_blocks: see `PipelineStep.num_blocks`."""
    experts = 0 if config.moe is None else config.moe.num_experts
    return {
        name: (num_blocks if loss.scope == "sequence" else 1, experts) for name, loss in pooled_losses(config).items()
    }


def balance_size(config: ModelConfig, num_blocks: int) -> int:
    """Returns N, the length of the vector `balance` that stages pass on. num_blocks: see `PipelineStep.num_blocks`."""
    return 1 + sum(2 * blocks * experts for blocks, experts in pooled_shapes(config, num_blocks).values())


class Pipeline(LanguageModel, nn.ModuleList):
    """Runs this rank's pipeline stages of a model. Iterating over it yields these stages in order."""

    def __init__(self, stages: Sequence[Transformer], mesh: ParallelMesh, config: PipelineConfig) -> None:
        super().__init__(stages)
        assert mesh.pp_group is not None
        self.group = mesh.pp_group
        self.kind = config.kind
        self.place = SequenceShard.of(mesh)
        self.config = stages[0].config
        self.schedules: dict[tuple[int, ...], Any] = {}  # by the shapes that stages exchange, see _schedule

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    @property
    def has_logits(self) -> bool:
        return any(stage.stage_spec.is_last for stage in self)

    def local_blocks(self) -> Iterator[tuple[int, Block]]:
        return chain.from_iterable(stage.local_blocks() for stage in self)

    def forward_backward(self, pipeline_step: PipelineStep) -> None:
        """Runs the forward and backward passes of all micro-steps of a step; gradients accumulate in `.grad`."""
        num_sequences, length = pipeline_step.tokens[0].shape
        size = balance_size(self.config, pipeline_step.num_blocks)
        schedule = self._schedule(len(pipeline_step.tokens), num_sequences, length, size)
        numbers = torch.arange(len(pipeline_step.tokens))
        try:
            schedule.step(
                target=numbers, losses=[], return_outputs=False, micro_step=numbers, pipeline_step=pipeline_step
            )
        except RuntimeError as error:
            if error.__cause__ is not None:  # pipelining wraps exceptions of a stage in a RuntimeError
                raise error.__cause__ from None
            raise
        self._pool_stats(pipeline_step)

    def forward(self, tokens_BS: Tensor, context: StepContext, cache: KVCache | None = None) -> ModelOutput:
        """Runs only the forward pass, stage after stage, without gradients.

        Returns the logits on the rank of the last stage; on other ranks, the output (B, S, D) of the rank's last stage.
        """
        pipeline_step = PipelineStep([tokens_BS], [context], cache=cache)
        num_ranks, rank = group_size(self.group), group_rank(self.group)
        length = len(self.place.own(tokens_BS.shape[1]))
        x, mtp_logits = None, tuple[Tensor, ...]()
        for stage in self:
            if not stage.stage_spec.is_first:
                shape = (len(tokens_BS), length, self.config.d_model)
                x = torch.empty(shape, dtype=stage.compute_dtype, device=tokens_BS.device)
                _exchange(dist.recv, x, self.group, (rank - 1) % num_ranks)
            output: ModelOutput = stage(x, micro_step=torch.tensor(0), pipeline_step=pipeline_step)
            x, mtp_logits = output.logits, output.mtp_logits
            if not stage.stage_spec.is_last:
                _exchange(dist.send, x, self.group, (rank + 1) % num_ranks)
        assert x is not None
        self._pool_stats(pipeline_step)
        return ModelOutput(x, {}, pipeline_step.stats[0], {}, mtp_logits)

    def _schedule(self, num_micro_steps: int, num_sequences: int, length: int, balance_size: int) -> Any:
        """Returns the schedule for steps of these sizes, built once: every stage allocates receive buffers for them."""
        key = (num_micro_steps, num_sequences, length, balance_size)
        if key not in self.schedules:
            stages = [self._pipeline_stage(stage, num_sequences, length, balance_size) for stage in self]
            self.schedules[key] = SCHEDULES[self.kind](
                stages[0] if self.kind == "1f1b" else stages,
                n_microbatches=num_micro_steps,
                loss_fn=lambda output, target: output,
                scale_grads=False,  # losses are divided by the targets of the whole step already
            )
        return self.schedules[key]

    def _pipeline_stage(self, stage: Stage, num_sequences: int, length: int, balance_size: int) -> PipelineStage:
        """Builds the PipelineStage with the shapes of its inputs and outputs, or ranks would exchange them first."""
        balance_dtype = torch.promote_types(torch.float32, stage.compute_dtype)
        shape = (num_sequences, len(self.place.own(length)), self.config.d_model)
        travels = (
            torch.empty(shape, dtype=stage.compute_dtype, device="meta", requires_grad=True),
            torch.empty(balance_size, dtype=balance_dtype, device="meta", requires_grad=True),
        )
        loss = torch.empty((), dtype=balance_dtype, device="meta", requires_grad=True)
        return PipelineStage(
            stage,
            stage.stage_spec.number,
            stage.stage_spec.num_stages,
            next(stage.parameters()).device,
            input_args=() if stage.stage_spec.is_first else travels,
            output_args=loss if stage.stage_spec.is_last else travels,
            group=self.group,
        )

    @torch.no_grad()
    def _pool_stats(self, pipeline_step: PipelineStep) -> None:
        """Adds each layer's share of the losses that are pooled over layers to its statistics.

        f is all-reduced over the stages in float64. A collective over the pipeline, without gradients.
        """
        num_layers = len(self.config.moe_layers)
        for stats, pooled in zip(pipeline_step.stats, pipeline_step.pooled, strict=True):
            for name, (blocks, experts) in pooled_shapes(self.config, pipeline_step.num_blocks).items():
                device = pipeline_step.tokens[0].device
                own = [terms[name][0].double() for terms in pooled.values()]
                fraction = sum(own, torch.zeros(blocks, experts, dtype=torch.float64, device=device))
                fraction = all_reduce_sum(fraction, self.group)
                for layer, terms in pooled.items():
                    loss = pooled_part(fraction, terms[name][1], num_layers)
                    stats[layer] = replace(stats[layer], losses={**stats[layer].losses, name: loss})


def _exchange(send_or_recv: Callable[..., Any], x: Tensor, group: dist.ProcessGroup, peer: int) -> None:
    """Sends x to, or receives x from, rank `peer` of the group. Both sides know the shape; an empty x is not sent."""
    if x.numel():
        send_or_recv(x.contiguous(), dist.get_global_rank(group, peer), group=group)


def build_pipeline(config: ModelConfig, mesh: ParallelMesh, *, pipeline: PipelineConfig, **settings: Any) -> Pipeline:
    """Builds this rank's stages: those whose number modulo pp is its pipeline rank. settings: passed to build_model."""
    per_rank = pipeline.stages_per_rank if isinstance(pipeline, InterleavedConfig) else 1
    specs = split_into_stages(config, mesh.degrees.pp * per_rank)[mesh.pp_rank :: mesh.degrees.pp]
    stages = [build_model(config, mesh, stage_spec=spec, model_class=Stage, **settings) for spec in specs]
    return Pipeline(stages, mesh, pipeline)


def validate_schedule(config: PipelineConfig, pp: int, num_micro_steps: int) -> None:
    """Raises ValueError if the pipeline schedule cannot run `num_micro_steps` micro-steps on `pp` ranks."""
    if isinstance(config, OneForwardOneBackwardConfig) and num_micro_steps < pp:
        raise ValueError(
            f"training.micro_steps ({num_micro_steps}) is smaller than parallel.pp ({pp}): a pipeline needs a "
            "micro-step or more for each of its ranks"
        )
    rounds = max(1, num_micro_steps // pp)
    if isinstance(config, InterleavedConfig) and num_micro_steps % rounds:
        raise ValueError(
            f"training.micro_steps ({num_micro_steps}) is not a multiple of {rounds}, the rounds that "
            f"parallel.pipeline.kind 'interleaved' makes of them over parallel.pp ({pp})"
        )
