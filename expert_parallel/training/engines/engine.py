"""Defines `Engine`, the interface through which a training step runs the model and updates its weights."""

from typing import Protocol

from torch import Tensor

from expert_parallel.checkpoint.state import TrainingState
from expert_parallel.model.outputs import ModelOutput
from expert_parallel.moe.context import StepContext


class Engine(Protocol):
    """Runs a model on micro-batches and updates its weights once per step.

    Each rank back-propagates its own tokens' share of the global loss, so an engine must sum gradients over ranks,
    whatever its library does by default. Where gradients and optimizer state live is up to the engine.
    """

    @property
    def state(self) -> TrainingState:
        """Returns an object through which checkpoints read and write the weights and the optimizer's moments."""
        ...

    @property
    def skips_bad_updates(self) -> bool:
        """Returns True if `update` leaves weights and moments as they were when the gradient norm is not finite."""
        ...

    def forward(self, inputs_BS: Tensor, context: StepContext) -> ModelOutput:
        """Runs the model, in training or evaluation mode as `model.train()` or `model.eval()` has set it."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds the gradients of one micro-step's loss to those of the step. is_last: True for the last micro-step of
        the step."""
        ...

    def update(self, rate: float) -> float:
        """Sums the gradients over ranks, clips them, makes one optimizer step with the learning rate `rate`, and clears
        them.

        Returns the L2 norm of the whole model's gradient before clipping, each element counted once; the same on all
        ranks.
        """
        ...
