"""`Engine` is what a training step asks of whatever updates the weights."""

from typing import Protocol

from torch import Tensor

from expert_parallel.checkpoint.state import TrainingState
from expert_parallel.model.transformer import ModelOutput
from expert_parallel.moe.context import StepContext


class Engine(Protocol):
    """Runs a model on micro-batches and updates its weights once a step.

    Each rank back-propagates its own tokens' share of the global loss, so that an engine sums gradients, whatever its
    library does by default; of gradients and moments it keeps what it will, where it will.
    """

    @property
    def state(self) -> TrainingState:
        """Weights and moments, for checkpoints."""
        ...

    def forward(self, inputs_BS: Tensor, context: StepContext) -> ModelOutput:
        """In training or evaluation, as the model is set."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds up the gradients of the micro-steps. is_last: the step's last."""
        ...

    def update(self, rate: float) -> float:
        """One step of the optimizer with this learning rate. Returns the norm of the whole model's gradient before
        clipping, each element counted once; the same on all ranks."""
        ...
