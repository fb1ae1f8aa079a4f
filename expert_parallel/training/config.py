"""Joins the settings of all parts into the config of a run, and refuses combinations that no part can check alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AliasChoices, Field, model_validator

from expert_parallel.checkpoint.config import CheckpointConfig
from expert_parallel.checkpoint.files import list_checkpoints
from expert_parallel.config import apply_override, dump_tree, load_tree, read_settings
from expert_parallel.data.config import DataConfig, StdlibData, TokensData
from expert_parallel.data.tokenizer import VOCABULARY_SIZE
from expert_parallel.model.config import ModelConfig, Recompute
from expert_parallel.model.generation import Sampling
from expert_parallel.model.rotary import LearnedPositionConfig
from expert_parallel.moe.capacity.policies import CapacitySettings
from expert_parallel.moe.config import preset_contradictions
from expert_parallel.moe.experts.grouped import supports_grouped_mm
from expert_parallel.nn.ffn import w_in_columns
from expert_parallel.parallel.degrees import EXPERT_ORDER, InterleavedConfig, ParallelConfig, ShardedConfig
from expert_parallel.runtime.process import RuntimeConfig
from expert_parallel.settings import CONFIG_VERSION, MAX_SEED, PathText, Settings, refuse_newer
from expert_parallel.training.engines.config import EngineConfig, NativeConfig, validate_engine
from expert_parallel.training.freeze import AllTrainable, TrainableConfig, validate_trainable
from expert_parallel.training.health import HealthConfig
from expert_parallel.training.optim import CosineConfig, OptimizerConfig, ScheduleConfig
from expert_parallel.training.replay import ReplayConfig, RoutingConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class TrainingConfig(Settings):
    """Sets how long and on how much data the model trains, in which precision, and how its weights are updated."""

    steps: int = Field(ge=1)
    """Sets the number of optimizer steps."""
    global_batch: int = Field(ge=1, validation_alias=AliasChoices("global_batch", "global_batch_size"))
    """Sets the number of sequences of a step, over all ranks and micro-steps."""
    micro_steps: int = Field(
        default=1, ge=1, validation_alias=AliasChoices("micro_steps", "gradient_accumulation_steps")
    )
    """Divides a step's batch into this many equal parts, whose gradients are accumulated."""
    sequence_length: int = Field(ge=1)
    """Sets the length of training sequences, in tokens."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Sets the dtype that the model computes in; weights, gradients and optimizer state are float32, or float64 for
    float64."""
    recompute: Recompute = "none"
    """Recomputes the activations of MoE layers (`moe`) or of whole blocks (`block`) in the backward pass, to save
    memory."""
    engine: EngineConfig = NativeConfig()
    """Chooses the engine that reduces gradients and updates the weights."""
    routing: RoutingConfig | None = None
    """Records the experts of every token, or replays a record; null does neither."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clips the global L2 norm of the gradients to this number; null does not clip."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Describes the optimizer."""
    schedule: ScheduleConfig = CosineConfig()
    """Describes how the learning rate changes over the steps."""
    trainable: TrainableConfig = AllTrainable()
    """Chooses the weights that are trained."""

    @model_validator(mode="after")
    def _check_micro_steps(self) -> "TrainingConfig":
        if self.global_batch % self.micro_steps:
            raise ValueError(
                f"global_batch ({self.global_batch}) is not a multiple of micro_steps ({self.micro_steps})"
            )
        return self


class EvaluationConfig(Settings):
    """Sets how often the loss on held-out data is computed, and on how many sequences."""

    every: int = Field(default=100, ge=1)
    """Computes the loss on held-out data every this many steps, and after the last one."""
    sequences: int = Field(default=64, ge=1)
    """Evaluates at most this many sequences."""


class SampleConfig(Sampling):
    """Generates a text at the end of the run."""

    prompt: str = Field(min_length=1)
    """Sets the text to continue."""
    length: int = Field(default=200, ge=1)
    """Sets the number of tokens to generate."""
    temperature: float = Field(default=0.7, ge=0)
    """Divides the logits by this number before tokens are drawn; 0 always takes the most probable token."""


class RunConfig(Settings):
    """Sets where the run's files are written, and how often it reports."""

    folder: PathText
    """Sets the folder of the run's config, metrics and checkpoints."""
    log_every: int = Field(default=10, ge=1)
    """Prints metrics every this many steps."""
    sample: SampleConfig | None = None
    """Describes a text to generate and print after the last step; null generates none."""
    health: HealthConfig | None = HealthConfig()
    """Sets when a sentence says that the run is unhealthy; null never does."""


class Config(Settings):
    """Holds the settings of a run: a YAML file's paths are attribute paths of this class."""

    version: int = Field(default=CONFIG_VERSION, ge=1)
    """States which version of the settings the file was written for; a newer one than the installed package knows is
    refused."""
    run: RunConfig
    """Sets where the run's files are written, and how often it reports."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seeds the initial weights, the order of the data, dropout and the routers' noise."""
    model: ModelConfig
    """Describes the model: dense without `model.moe`, a mixture of experts with it."""
    parallel: ParallelConfig = ParallelConfig()
    """Sets how the model and the data are divided over the ranks."""
    training: TrainingConfig
    """Sets how the model is trained."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Sets how often and on how much held-out data the model is evaluated."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Sets when checkpoints are written and which of them are kept."""
    data: DataConfig = StdlibData(kind="stdlib")
    """Describes the training data."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Sets the device, the communication backend, and how long ranks wait for each other."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_newer(cls, tree: Any) -> Any:
        """Runs before all other checks, since a newer file may have settings that are unknown here."""
        version = tree.get("version") if isinstance(tree, dict) else None
        if isinstance(version, int):
            refuse_newer("version", version, CONFIG_VERSION)
        return tree

    @model_validator(mode="after")
    def _check_consistency(self) -> "Config":
        model, training = self.model, self.training
        if not isinstance(self.data, TokensData) and model.vocab_size < VOCABULARY_SIZE:
            raise ValueError(
                f"model.vocab_size ({model.vocab_size}) must be at least {VOCABULARY_SIZE}: tokens are bytes"
            )
        position = model.position
        if isinstance(position, LearnedPositionConfig) and position.max_length < training.sequence_length:
            raise ValueError(
                f"model.position.max_length ({position.max_length}) is smaller than "
                f"training.sequence_length ({training.sequence_length})"
            )
        validate_trainable(training.trainable, model)
        writes_sample = self.run.sample is not None
        validate_engine(training.engine, self.parallel, dtype=training.dtype, writes_sample=writes_sample)
        if self.run.sample is not None and training.sequence_length < 2:
            raise ValueError(
                f"run.sample is given but training.sequence_length ({training.sequence_length}) is smaller than 2: it "
                "bounds the tokens that the model sees when it generates"
            )
        if isinstance(self.parallel.pipeline, InterleavedConfig) and self.parallel.pp == 1:
            raise ValueError("parallel.pipeline.kind is 'interleaved' but parallel.pp is 1: there is no pipeline")
        if model.moe is None:
            for name in ("ep", "etp"):
                if (degree := getattr(self.parallel, name)) > 1:
                    raise ValueError(f"parallel.{name} is {degree} but the model has no experts (model.moe)")
            if self.parallel.expert_order != list(EXPERT_ORDER):
                raise ValueError("parallel.expert_order is given but the model has no experts (model.moe)")
            if isinstance(self.parallel.data, ShardedConfig) and self.parallel.data.expert_shards is not None:
                raise ValueError("parallel.data.expert_shards is given but the model has no experts (model.moe)")
            if training.routing is not None:
                raise ValueError("training.routing is given but the model has no experts (model.moe)")
            if training.recompute == "moe":
                raise ValueError("training.recompute is 'moe' but the model has no experts (model.moe)")
            return self
        if model.moe.num_experts < self.parallel.ep:
            raise ValueError(
                f"model.moe.num_experts ({model.moe.num_experts}) is smaller than parallel.ep "
                f"({self.parallel.ep}): each expert-parallel rank must hold at least one expert"
            )
        if self.parallel.ep > 1 and model.moe.dispatcher.kind == "local":
            raise ValueError(
                f"model.moe.dispatcher.kind 'local' cannot reach the experts of other ranks: parallel.ep is "
                f"{self.parallel.ep}, it must be 1 (or use 'all_to_all')"
            )
        capacity, dispatcher = model.moe.capacity, model.moe.dispatcher
        if isinstance(training.routing, ReplayConfig) and isinstance(capacity, CapacitySettings) and capacity.pad:
            raise ValueError(
                "model.moe.capacity.pad is true but training.routing.kind is 'play': the recorded choices may not "
                "fit into this capacity; set model.moe.capacity.pad to false, the result is the same"
            )
        if training.dtype == "bfloat16" and dispatcher.exchange_dtype == "bfloat16":
            raise ValueError(
                "model.moe.dispatcher.exchange_dtype is 'bfloat16' and so is training.dtype: it would change nothing"
            )
        self.check_backend("cuda" if self.runtime.device == "cuda" else "cpu")
        return self

    def check_backend(self, device_type: str) -> None:
        """Raises a ValueError if the experts' backend cannot run on this device, which is known when a run starts."""
        if self.model.moe is None:
            return
        experts, device = self.model.moe.experts, torch.device(device_type)
        hidden = experts.hidden // self.parallel.etp
        sizes = (self.model.d_model, w_in_columns(experts.activation, hidden), hidden)
        if experts.backend == "grouped_mm" and not supports_grouped_mm(DTYPES[self.training.dtype], device, sizes):
            raise ValueError(
                f"model.moe.experts.backend 'grouped_mm' cannot multiply these: training.dtype is "
                f"{self.training.dtype} (it takes float32 and bfloat16, on CUDA bfloat16 alone), model.d_model is "
                f"{self.model.d_model} and model.moe.experts.hidden is {experts.hidden} (it takes 16-byte multiples)"
            )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config, applies overrides (`dotted.key=value`), and validates the settings.

    path: a YAML file, or the folder of a run, whose config.yaml is read. The config.yaml of a run belongs to the folder
    in which it lies, even if it names another, as that of a copied or moved run does (see `renamed_folder`). Raises a
    ValueError of one sentence that names the setting's path; also if an override contradicts the preset's paper, of
    which a file's own settings are only warned (`dead_settings`).
    """
    path = config_file(path)
    tree = load_tree(path, (), Config)
    if (renamed := renamed_folder(path, tree)) is not None:
        tree["run"]["folder"] = renamed
    of_the_file = _preset_contradictions(tree)
    for override in overrides:
        apply_override(tree, override, Config)
    config = read_settings(Config, tree, str(path))
    for sentence in _preset_contradictions(tree):
        if sentence not in of_the_file:
            raise ValueError(f"{path}: {sentence}")
    return config


def _preset_contradictions(tree: dict[str, Any]) -> list[str]:
    """Returns those of a config that is not validated yet."""
    model = tree.get("model")
    return preset_contradictions(model.get("moe")) if isinstance(model, dict) else []


def config_file(path: Path) -> Path:
    """Returns the file of a config that is given as a file or as the folder of a run."""
    return path / "config.yaml" if path.is_dir() else path


def renamed_folder(path: Path, tree: dict[str, Any]) -> str | None:
    """Returns the folder of a config.yaml that has checkpoints beside it, if its `run.folder` names another folder.

    path: the file. tree: its content. Such a run was copied or moved: to train it in the folder that the file names
    would overwrite the original. None otherwise.
    """
    run = tree.get("run")
    named = run.get("folder") if isinstance(run, dict) else None
    if path.name != "config.yaml" or not isinstance(named, str) or not list_checkpoints(path.parent / "checkpoints"):
        return None
    return None if Path(named).resolve() == path.parent.resolve() else str(path.parent)


def read_config(tree: dict[str, Any], where: str) -> Config:
    """Validates a tree of settings. Raises a ValueError of one sentence that begins with `where`."""
    return read_settings(Config, tree, where)


def dump_config(config: Config) -> str:
    """Returns the resolved config as YAML, from which `load_config` reads the same config."""
    return dump_tree(config.model_dump(mode="json"), Config)
