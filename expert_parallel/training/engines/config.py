"""Holds the settings of the training engines, and refuses what an engine cannot run."""

from typing import Annotated, Literal

from pydantic import Field

from expert_parallel.parallel.degrees import ParallelConfig
from expert_parallel.settings import Settings


class NativeConfig(Settings):
    """Trains with PyTorch; weights are replicated or sharded as `parallel.data` says."""

    kind: Literal["native"] = "native"


class DeepSpeedConfig(Settings):
    """Trains with DeepSpeed and its ZeRO (Rajbhandari et al. 2020)."""

    kind: Literal["deepspeed"]
    zero_stage: Literal[0, 1, 2, 3] = 0
    """Shards nothing (0), optimizer state (1), also gradients (2), or also weights (3) over the data ranks."""
    offload: Literal["none", "cpu"] = "none"
    """Keeps optimizer state and the weights that it updates on the device, or in host memory (`cpu`)."""


EngineConfig = Annotated[NativeConfig | DeepSpeedConfig, Field(discriminator="kind")]


def validate_engine(engine: EngineConfig, parallel: ParallelConfig, *, dtype: str, writes_sample: bool) -> None:
    """Raises a ValueError if the engine does not support the other settings. writes_sample: True if `run.sample` is
    given."""
    if isinstance(engine, NativeConfig):
        return
    chosen, stage = "training.engine.kind is 'deepspeed'", engine.zero_stage
    if dtype == "float64":
        raise ValueError(f"{chosen} but training.dtype is 'float64': DeepSpeed reduces gradients in float32 at most")
    for name in ("tp", "pp", "etp"):
        if (degree := getattr(parallel, name)) > 1:
            raise ValueError(
                f"{chosen} but parallel.{name} is {degree}: this engine supports data and expert parallelism only"
            )
    if parallel.data.kind != "replicated":
        raise ValueError(
            f"{chosen} but parallel.data.kind is {parallel.data.kind!r}: set it to 'replicated', ZeRO shards by itself "
            f"(training.engine.zero_stage is {stage})"
        )
    if engine.offload == "cpu" and stage == 0:
        raise ValueError(
            "training.engine.offload is 'cpu' but training.engine.zero_stage is 0: DeepSpeed offloads only what ZeRO "
            "shards, from stage 1 on"
        )
    if stage < 3:
        return
    if parallel.ep > 1:
        raise ValueError(
            f"training.engine.zero_stage is 3 but parallel.ep is {parallel.ep}: DeepSpeed shards weights over all "
            "ranks, as if every rank held the same experts; use zero_stage 2"
        )
    if writes_sample:
        raise ValueError(
            "training.engine.zero_stage is 3 but run.sample is given: no rank has the whole model; leave it out, and "
            "use `generate` on the run"
        )
