"""Implements the native engine: plain PyTorch with our own gradient reductions, norm and clipping (grads.py)."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from expert_parallel.checkpoint.state import TorchState, TrainingState
from expert_parallel.model.outputs import ModelOutput
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.moe.context import StepContext
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.training.freeze import zero_frozen_gradients
from expert_parallel.training.grads import clip_gradients, global_grad_norm, reduce_gradients
from expert_parallel.training.optim import skip_update_if_not_finite


class NativeEngine:
    """Trains a model with a torch optimizer; implements Engine (engine.py). clip_norm: the gradient norm above which
    gradients are clipped; None disables clipping."""

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        mesh: ParallelMesh,
        clip_norm: float | None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.mesh = mesh
        self.clip_norm = clip_norm

    @property
    def state(self) -> TrainingState:
        return TorchState(self.optimizer)

    @property
    def skips_bad_updates(self) -> bool:
        return True

    def forward(self, inputs_BS: Tensor, context: StepContext) -> ModelOutput:
        return self.model(inputs_BS, context)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)  # reduce once per step, after the last micro-step
        loss.backward()

    def update(self, rate: float) -> float:
        reduce_gradients(self.model, self.mesh, sharded=is_sharded(self.model))
        zero_frozen_gradients(self.optimizer)
        norm = global_grad_norm(self.model, self.mesh)
        if self.clip_norm is not None:
            clip_gradients(self.model, norm, self.clip_norm)
        skip_update_if_not_finite(self.optimizer, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)  # device sync: the loop reports the norm


def is_sharded(model: nn.Module) -> bool:
    """Returns True if FSDP2 shards any module of the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
