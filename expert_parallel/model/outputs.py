"""Defines what transformer blocks and models return, and collects the losses of the MoE blocks."""

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from expert_parallel.model.config import ModelConfig
from expert_parallel.moe.routers.losses import BalanceLossConfig, loss_name, pool_layers
from expert_parallel.moe.types import LoadStats

# By name of the loss: f and P of losses that are pooled over layers; see losses.fractions_and_probabilities.
Pooled = dict[str, tuple[Tensor, Tensor]]


class BlockOutput(NamedTuple):
    """Holds the output x (B, S, D) of a block, and the losses, stats and pooled terms that its MoE layer returned
    (MoEOutput).

    For a dense block, stats is None and the others are empty. FSDP2 finds the tensors since a tuple is a pytree.
    """

    x: Tensor
    losses: dict[str, Tensor]
    stats: LoadStats | None
    pooled: Pooled


class ModelOutput(NamedTuple):
    """Holds the output of a model or of a pipeline stage.

    logits: (B, S, vocab) in the compute dtype; a stage that is not the last holds its output x (B, S, D) here instead.
    losses: the weighted auxiliary losses of each MoE block, by its number and by name. stats: the LoadStats of each MoE
    block. pooled: only for a pipeline stage, the terms of losses that are pooled over the layers of all stages; a whole
    model has these losses in `losses`. mtp_logits: those of each depth of multi-token prediction, like `logits`.
    """

    logits: Tensor
    losses: dict[int, dict[str, Tensor]]
    stats: dict[int, LoadStats]
    pooled: dict[int, Pooled]
    mtp_logits: tuple[Tensor, ...] = ()


def collect_losses(
    config: ModelConfig, outputs: dict[int, BlockOutput], is_whole: bool
) -> tuple[dict[int, dict[str, Tensor]], dict[int, LoadStats], dict[int, Pooled]]:
    """Collects losses, stats and pooled terms by MoE block. outputs: of these blocks, by number.

    is_whole: True turns the pooled terms of all layers into losses; a pipeline stage, False, returns the terms.
    """
    losses = {layer: dict(output.losses) for layer, output in outputs.items()}
    stats = {layer: output.stats for layer, output in outputs.items() if output.stats is not None}
    pooled = {layer: output.pooled for layer, output in outputs.items()}
    if not is_whole:
        return losses, stats, pooled
    for layer, terms in pool_layers(pooled).items():
        settings = pooled_losses(config)
        losses[layer] |= {name: settings[name].coefficient * term for name, term in terms.items()}
        detached = {name: term.detach() for name, term in terms.items()}
        stats[layer] = replace(stats[layer], losses={**stats[layer].losses, **detached})
    return losses, stats, {}


def pooled_losses(config: ModelConfig) -> dict[str, BalanceLossConfig]:
    """Returns the settings of the balance losses that are pooled over layers, by name of the loss, in the order of the
    config."""
    losses = [] if config.moe is None else config.moe.losses
    return {loss_name(loss): loss for loss in losses if isinstance(loss, BalanceLossConfig) and loss.layers == "pooled"}
