"""Defines `Engine`, the interface between a training step and whatever updates the weights."""

from typing import Protocol

from torch import Tensor

from expert_parallel.checkpoint.state import TrainingState
from expert_parallel.model.transformer import ModelOutput
from expert_parallel.moe.context import StepContext


class Engine(Protocol):
    """Runs a model on micro-batches and updates its weights once per step.

    Each rank back-propagates its own tokens' share of the global loss, so an engine must sum gradients over ranks,
    whatever its library does by default. Where gradients and optimizer state live is up to the engine.
    """

    @property
    def state(self) -> TrainingState:
        """Returns access to weights and moments, for checkpoints."""
        ...

    def forward(self, inputs_BS: Tensor, context: StepContext) -> ModelOutput:
        """Runs the model, in training or evaluation mode as `model.train()` or `model.eval()` has set it."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulates the gradients of one micro-step. is_last: this is the last one of the step."""
        ...

    def update(self, rate: float) -> float:
        """Makes one optimizer step with this learning rate and clears the gradients.

        Returns the L2 norm of the whole model's gradient before clipping, each element counted once; the same on all
        ranks.
        """
        ...
