"""Trains mixture-of-experts models with expert parallelism. Every layout is verified to compute the same model.

The public names are loaded at first use: `import expert_parallel` alone does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of _MODULES, for type checkers
    from expert_parallel.checkpoint.full_state_dict import full_state_dict as full_state_dict
    from expert_parallel.checkpoint.full_state_dict import load_full_state_dict as load_full_state_dict
    from expert_parallel.checkpoint.load import load_checkpoint as load_checkpoint
    from expert_parallel.checkpoint.optimizer_state_dict import load_optimizer_state_dict as load_optimizer_state_dict
    from expert_parallel.checkpoint.optimizer_state_dict import optimizer_state_dict as optimizer_state_dict
    from expert_parallel.checkpoint.state import TorchState as TorchState
    from expert_parallel.interop.start import START_KINDS as START_KINDS
    from expert_parallel.model.config import ModelConfig as ModelConfig
    from expert_parallel.model.outputs import ModelOutput as ModelOutput
    from expert_parallel.model.parallelize import build_model as build_model
    from expert_parallel.model.transformer import Transformer as Transformer
    from expert_parallel.moe.config import MoEConfig as MoEConfig
    from expert_parallel.moe.context import RouterReplay as RouterReplay
    from expert_parallel.moe.context import StepContext as StepContext
    from expert_parallel.moe.data_parallel import clip_grad_norm_ as clip_grad_norm_
    from expert_parallel.moe.data_parallel import expert_parameters as expert_parameters
    from expert_parallel.moe.data_parallel import prepare_data_parallel as prepare_data_parallel
    from expert_parallel.moe.dispatch.ledger import LedgerBreach as LedgerBreach
    from expert_parallel.moe.layer import MoELayer as MoELayer
    from expert_parallel.moe.types import LoadStats as LoadStats
    from expert_parallel.moe.types import MoEOutput as MoEOutput
    from expert_parallel.parallel.degrees import ParallelConfig as ParallelConfig
    from expert_parallel.parallel.degrees import ParallelDegrees as ParallelDegrees
    from expert_parallel.parallel.mesh import ParallelMesh as ParallelMesh
    from expert_parallel.parallel.mesh import build_mesh as build_mesh
    from expert_parallel.parallel.placement import ExpertPlacement as ExpertPlacement
    from expert_parallel.runtime.launchers import LaunchError as LaunchError
    from expert_parallel.runtime.process import LostContact as LostContact
    from expert_parallel.runtime.process import RankFilter as RankFilter
    from expert_parallel.runtime.process import Runtime as Runtime
    from expert_parallel.runtime.process import RuntimeConfig as RuntimeConfig
    from expert_parallel.runtime.process import UserError as UserError
    from expert_parallel.runtime.process import distributed as distributed
    from expert_parallel.training.config import Config as Config
    from expert_parallel.training.config import load_config as load_config
    from expert_parallel.training.loop import train as train
else:  # hidden from type checkers, so that they report misspelt names

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value


__version__ = "0.1.0"

_MODULES = {
    # the layer, for your own model
    "MoELayer": "expert_parallel.moe.layer",
    "MoEConfig": "expert_parallel.moe.config",
    "MoEOutput": "expert_parallel.moe.types",
    "LoadStats": "expert_parallel.moe.types",
    "StepContext": "expert_parallel.moe.context",
    "RouterReplay": "expert_parallel.moe.context",
    "LedgerBreach": "expert_parallel.moe.dispatch.ledger",
    "prepare_data_parallel": "expert_parallel.moe.data_parallel",
    "clip_grad_norm_": "expert_parallel.moe.data_parallel",
    "expert_parameters": "expert_parallel.moe.data_parallel",
    "ExpertPlacement": "expert_parallel.parallel.placement",
    "full_state_dict": "expert_parallel.checkpoint.full_state_dict",
    "load_full_state_dict": "expert_parallel.checkpoint.full_state_dict",
    "optimizer_state_dict": "expert_parallel.checkpoint.optimizer_state_dict",
    "load_optimizer_state_dict": "expert_parallel.checkpoint.optimizer_state_dict",
    # the whole model, on any layout
    "ModelConfig": "expert_parallel.model.config",
    "ModelOutput": "expert_parallel.model.outputs",
    "Transformer": "expert_parallel.model.transformer",
    "build_model": "expert_parallel.model.parallelize",
    "load_checkpoint": "expert_parallel.checkpoint.load",
    "TorchState": "expert_parallel.checkpoint.state",
    "ParallelConfig": "expert_parallel.parallel.degrees",
    "ParallelDegrees": "expert_parallel.parallel.degrees",
    "ParallelMesh": "expert_parallel.parallel.mesh",
    "build_mesh": "expert_parallel.parallel.mesh",
    # a training run
    "Config": "expert_parallel.training.config",
    "load_config": "expert_parallel.training.config",
    "train": "expert_parallel.training.loop",
    "START_KINDS": "expert_parallel.interop.start",
    "Runtime": "expert_parallel.runtime.process",
    "RuntimeConfig": "expert_parallel.runtime.process",
    "distributed": "expert_parallel.runtime.process",
    "UserError": "expert_parallel.runtime.process",
    "LaunchError": "expert_parallel.runtime.launchers",
    "LostContact": "expert_parallel.runtime.process",
    "RankFilter": "expert_parallel.runtime.process",
}
__all__ = ["__version__", *_MODULES]


def __dir__() -> list[str]:
    return sorted(__all__)
