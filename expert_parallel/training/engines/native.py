"""The native engine is PyTorch alone, with our own reductions, norm and clipping. `Engine` is what a training step
asks of it, and of any other; `ENGINES` builds the one that `training.engine.kind` names."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from expert_parallel.checkpoint.state import TorchState, TrainingState
from expert_parallel.model.transformer import LanguageModel, ModelOutput, Transformer
from expert_parallel.moe.context import StepContext
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.process import Runtime, tell_deepspeed
from expert_parallel.training.config import TrainingConfig
from expert_parallel.training.freeze import freeze_gradients
from expert_parallel.training.grads import clip_gradients, global_norm, reduce_gradients


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


class NativeEngine:
    """Trains a model with a torch optimizer: an Engine. clip_norm: None does not clip."""

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        mesh: ParallelMesh,
        clip_norm: float | None,
    ) -> None:
        self.model, self.optimizer, self.mesh, self.clip_norm = model, optimizer, mesh, clip_norm

    @property
    def state(self) -> TrainingState:
        return TorchState(self.optimizer)

    def forward(self, inputs_BS: Tensor, context: StepContext) -> ModelOutput:
        return self.model(inputs_BS, context)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)
        loss.backward()

    def update(self, rate: float) -> float:
        reduce_gradients(self.model, self.mesh, sharded=is_sharded(self.model))
        freeze_gradients(self.optimizer)
        norm = global_norm(self.model, self.mesh)
        if self.clip_norm is not None:
            clip_gradients(self.model, norm, self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def build_native(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    mesh: ParallelMesh,
    runtime: Runtime,
    config: TrainingConfig,
) -> Engine:
    return NativeEngine(model, optimizer, mesh, config.clip_norm)


def build_deepspeed(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    mesh: ParallelMesh,
    runtime: Runtime,
    config: TrainingConfig,
) -> Engine:
    """UserError where on any rank DeepSpeed is not there, or is another version."""
    tell_deepspeed(runtime)
    engine = runtime.together(load_deepspeed)
    assert isinstance(model, Transformer), "a pipeline is refused with the config"
    return engine(model, optimizer, mesh, runtime, config)


def load_deepspeed() -> Callable[..., Engine]:
    try:
        from expert_parallel.training.engines import deepspeed  # takes seconds, and may not be there
    except ModuleNotFoundError as error:
        raise ValueError(
            f"training.engine.kind is 'deepspeed' but the package {error.name} is not installed: pip install "
            "'expert-parallel[deepspeed]'"
        ) from None
    deepspeed.refuse_version()
    return deepspeed.DeepSpeedEngine


Builder = Callable[[LanguageModel, torch.optim.Optimizer, ParallelMesh, Runtime, TrainingConfig], Engine]
# training.engine.kind -> its builder. Every rank of the world calls it.
ENGINES: dict[str, Builder] = {"native": build_native, "deepspeed": build_deepspeed}
