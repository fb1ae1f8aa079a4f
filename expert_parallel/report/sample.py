"""A sample of text through a trained model, and which experts each of its tokens went to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expert_parallel.data.batch import as_batch
from expert_parallel.model.tensor_parallel import cross_entropy_sum
from expert_parallel.model.transformer import Transformer
from expert_parallel.moe.capacity.limit import LimitSettings
from expert_parallel.moe.context import RouterReplay, StepContext
from expert_parallel.moe.types import Reason, RoutingPlan


@dataclass(frozen=True, eq=False)
class Routing:
    """Of one block: every token's choices, as capacity left them. ids_TK int64, weights_TK float64 (0 where nothing was
    computed), reason_TK uint8 (values of `Reason`), on the CPU."""

    ids_TK: Tensor
    weights_TK: Tensor
    reason_TK: Tensor

    @property
    def computed_TK(self) -> Tensor:
        return self.reason_TK <= Reason.REROUTED

    @property
    def dropped_TK(self) -> Tensor:
        return ~self.computed_TK & (self.reason_TK != Reason.NOT_ROUTED)

    @property
    def first_T(self) -> Tensor:
        """int64: of the experts that computed the token, the one with the largest weight; -1: none did."""
        best_T1 = self.weights_TK.masked_fill(~self.computed_TK, -1).argmax(1, keepdim=True)
        return self.ids_TK.gather(1, best_T1)[:, 0].masked_fill(~self.computed_TK.any(1), -1)


@dataclass(frozen=True, eq=False)
class Sample:
    """sequences: int64, the tokens that the model was given. loss: nats a token. routing: by MoE block, of all
    sequences' tokens, one after the other."""

    sequences: list[Tensor]
    loss: float
    routing: dict[int, Routing]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)


def cut(tokens: Tensor, length: int) -> list[Tensor]:
    """Windows of length + 1 that overlap by one, as those of evaluation; the last may be shorter. The last token of all
    is a target alone."""
    return [tokens[begin : begin + length + 1] for begin in range(0, len(tokens) - 1, length)]


@torch.no_grad()
def route(
    model: Transformer, windows: Sequence[Tensor], *, batch_size: int, separator: int | None, seed: int
) -> Sample:
    """As evaluation on one rank does: with its capacity, in batches of so many sequences of equal length. windows:
    int64, (S + 1)."""
    model.eval()
    device = next(model.parameters()).device
    loss, count = 0.0, 0
    found: dict[int, list[Routing]] = {layer: [] for layer in model.config.moe_layers}
    for number, rows in enumerate(_batches(windows, batch_size)):
        batch, replay = as_batch(rows, 0, separator).to(device), RouterReplay()
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
        loss += float(cross_entropy_sum(logits, batch.targets_BS))
        count += batch.targets_BS.numel()
        for layer, plan in plans.items():
            choices = replay.recorded[0, number, layer]
            limited = replace(plan, expert_ids_TK=choices.ids_TK, reason_TK=choices.reason_TK)
            found[layer].append(_routing(model, layer, limited))
    routing = {
        layer: Routing(*(torch.cat([getattr(part, name) for part in parts]) for name in Routing.__annotations__))
        for layer, parts in found.items()
    }
    return Sample([window[:-1] for window in windows], loss / count, routing)


def _batches(windows: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """(B, S + 1), in order."""
    begin = 0
    while begin < len(windows):
        end = begin + 1
        while end < min(begin + size, len(windows)) and len(windows[end]) == len(windows[begin]):
            end += 1
        yield torch.stack(list(windows[begin:end]))
        begin = end


@contextmanager
def _watch_routers(model: Transformer) -> Iterator[dict[int, RoutingPlan]]:
    """Each router's plan of the pass that is made inside, by block: before capacity."""
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


def _routing(model: Transformer, layer: int, limited: RoutingPlan) -> Routing:
    """With the weights that the layer multiplies outputs by, which capacity may have changed."""
    moe = dict(model.local_blocks())[layer].moe
    assert moe is not None
    capacity = moe.config.capacity
    counted_TK = limited.kept_TK if isinstance(capacity, LimitSettings) and capacity.renormalise else None
    weights_TK = moe.router.weights(limited, limited.expert_ids_TK, counted_TK)
    weights_TK = weights_TK.double().masked_fill(~limited.kept_TK, 0)
    return Routing(limited.expert_ids_TK.cpu(), weights_TK.cpu(), limited.reason_TK.cpu())
