"""Builds the engine that `training.engine.kind` names (`ENGINES`)."""

from collections.abc import Callable

import torch

from expert_parallel.model.transformer import LanguageModel, Transformer
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.process import Runtime, set_deepspeed_environment
from expert_parallel.training.config import TrainingConfig
from expert_parallel.training.engines.engine import Engine
from expert_parallel.training.engines.native import NativeEngine


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
    """Builds the DeepSpeed engine. Raises UserError if DeepSpeed is missing on any rank, or has another version."""
    set_deepspeed_environment(runtime)
    engine = runtime.run_on_all_ranks(load_deepspeed)
    assert isinstance(model, Transformer), "a pipeline is refused with the config"
    return engine(model, optimizer, mesh, runtime, config)


def load_deepspeed() -> Callable[..., Engine]:
    try:
        from expert_parallel.training.engines import deepspeed  # takes seconds to import, and is optional
    except ModuleNotFoundError as error:
        raise ValueError(
            f"training.engine.kind is 'deepspeed' but the package {error.name} is not installed: pip install "
            "'expert-parallel[deepspeed]'"
        ) from None
    deepspeed.check_deepspeed_version()
    return deepspeed.DeepSpeedEngine


Builder = Callable[[LanguageModel, torch.optim.Optimizer, ParallelMesh, Runtime, TrainingConfig], Engine]
# Maps training.engine.kind to its builder, which every rank of the world must call.
ENGINES: dict[str, Builder] = {"native": build_native, "deepspeed": build_deepspeed}
