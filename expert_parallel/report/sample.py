"""Runs a sample of text through a trained model, and records the experts of each token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expert_parallel.data.batch import make_micro_batch
from expert_parallel.data.sampler import Sequences
from expert_parallel.model.tensor_parallel import cross_entropy_sum
from expert_parallel.model.transformer import Transformer
from expert_parallel.moe.capacity.policies import CapacitySettings
from expert_parallel.moe.context import RouterReplay, StepContext
from expert_parallel.moe.types import Outcome, RoutingPlan


@dataclass(frozen=True, eq=False)
class SampleRouting:
    """Holds the K (token, expert) choices of each of T tokens in one MoE block, after capacity was applied, on the CPU.

    ids_TK: int64, the experts. weights_TK: float64, the factor of the expert's output; 0 where no expert computed the
    choice. outcome_TK: uint8, values of `Outcome`."""

    ids_TK: Tensor
    weights_TK: Tensor
    outcome_TK: Tensor

    @property
    def computed_TK(self) -> Tensor:
        """Returns a bool mask, True for choices that an expert computed."""
        return self.outcome_TK <= Outcome.REROUTED

    @property
    def dropped_TK(self) -> Tensor:
        """Returns a bool mask, True for choices that were routed to an expert and then dropped."""
        return ~self.computed_TK & (self.outcome_TK != Outcome.NOT_ROUTED)

    @property
    def first_T(self) -> Tensor:
        """Returns, int64, for each token the expert with the largest weight among those that computed it; -1 if none
        did."""
        best_T1 = self.weights_TK.masked_fill(~self.computed_TK, -1).argmax(1, keepdim=True)
        return self.ids_TK.gather(1, best_T1)[:, 0].masked_fill(~self.computed_TK.any(1), -1)


@dataclass(frozen=True, eq=False)
class Sample:
    """Holds a sample of text and how the model routed it.

    sequences: the input tokens of each sequence, int64. loss: mean cross entropy, nats per token. routing: by MoE
    block, of the tokens of all sequences, concatenated."""

    sequences: list[Tensor]
    loss: float
    routing: dict[int, SampleRouting]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)


def split_windows(tokens: Tensor, length: int) -> list[Tensor]:
    """Splits tokens into windows of length + 1 that overlap by one, as evaluation does; the last may be shorter. The
    last token is only a target."""
    return [tokens[begin : begin + length + 1] for begin in range(0, len(tokens) - 1, length)]


@torch.no_grad()
def run_sample(model: Transformer, groups: Sequence[Sequences], *, batch_size: int, seed: int) -> Sample:
    """Runs the model on sequences as evaluation on one rank does, with its capacity, in batches of `batch_size`
    sequences of equal length. Returns the loss and the routing of every token.

    groups: each of sequences of one length. seed: of the routers' random numbers."""
    model.eval()
    device = next(model.parameters()).device
    loss, count = 0.0, 0
    found: dict[int, list[SampleRouting]] = {layer: [] for layer in model.config.moe_layers}
    batches = [batch for group in groups for batch in group.split(batch_size)]
    for number, sequences in enumerate(batches):
        batch, replay = make_micro_batch(sequences, 0).to(device), RouterReplay()
        # Waits for the device: `StepContext` takes the number of documents as an int.
        packed = 1 if batch.documents_BS is None else int(batch.documents_BS.max()) + 1
        context = StepContext(
            seed,
            micro_step=number,
            sequence_index_B=batch.sequence_index_B,
            document_BS=batch.documents_BS,
            documents_per_row=packed,
            replay=replay,
        )
        with _watch_routers(model) as plans:
            logits = model(batch.inputs_BS, context).logits
        loss += float(cross_entropy_sum(logits, batch.targets_BS))  # waits for the device, as evaluation does
        count += batch.targets_BS.numel()
        for layer, plan in plans.items():
            choices = replay.recorded[0, number, layer]
            limited = replace(plan, expert_ids_TK=choices.ids_TK, outcome_TK=choices.outcome_TK)
            found[layer].append(_routing(model, layer, limited))
    routing = {
        layer: SampleRouting(
            *(torch.cat([getattr(part, name) for part in parts]) for name in SampleRouting.__annotations__)
        )
        for layer, parts in found.items()
    }
    return Sample([row[:-1] for group in groups for row in group.tokens], loss / count, routing)


@contextmanager
def _watch_routers(model: Transformer) -> Iterator[dict[int, RoutingPlan]]:
    """Records each router's plan in the forward pass of its body, by block, before capacity is applied."""
    plans: dict[int, RoutingPlan] = {}
    handles = [
        block.moe.router.register_forward_hook(partial(_keep, plans, layer))
        for layer, block in model.local_blocks()
        if block.moe is not None
    ]
    try:
        yield plans
    finally:
        for handle in handles:
            handle.remove()


def _keep(plans: dict[int, RoutingPlan], layer: int, router: nn.Module, inputs: Any, plan: RoutingPlan) -> None:
    plans[layer] = plan


def _routing(model: Transformer, layer: int, limited: RoutingPlan) -> SampleRouting:
    """Returns the plan's choices with the weights that multiply the experts' outputs, which capacity may have
    changed."""
    moe = dict(model.local_blocks())[layer].moe
    assert moe is not None
    capacity = moe.config.capacity
    counted_TK = limited.kept_TK if isinstance(capacity, CapacitySettings) and capacity.renormalise else None
    weights_TK = moe.router.weights(limited, limited.expert_ids_TK, counted_TK)
    # float64, so that the report rounds nothing; on the CPU, to free the device's memory batch by batch.
    weights_TK = weights_TK.double().masked_fill(~limited.kept_TK, 0)
    return SampleRouting(limited.expert_ids_TK.cpu(), weights_TK.cpu(), limited.outcome_TK.cpu())
