"""`ENGINES` builds the engine that `training.engine.kind` names."""

from collections.abc import Callable

import torch

from expert_parallel.model.transformer import LanguageModel, Transformer
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.process import Runtime, tell_deepspeed
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
