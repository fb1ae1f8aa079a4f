"""Settings of the training engines, and what each cannot do."""

from typing import Annotated, Literal

from pydantic import Field

from expert_parallel.parallel.degrees import ParallelConfig
from expert_parallel.settings import Settings


class NativeConfig(Settings):
    """PyTorch, with the reductions of grads.py; weights replicated or sharded as `parallel.data` says."""

    kind: Literal["native"] = "native"


class DeepSpeedConfig(Settings):
    """DeepSpeed, with ZeRO (Rajbhandari et al. 2020). zero_stage: what is divided over the data ranks: 1 the moments, 2
    gradients too, 3 weights too. offload: moments and weights to update live in host memory."""

    kind: Literal["deepspeed"]
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "cpu"] = "none"


EngineConfig = Annotated[NativeConfig | DeepSpeedConfig, Field(discriminator="kind")]


def refuse_engine(engine: EngineConfig, parallel: ParallelConfig, *, dtype: str, writes_sample: bool) -> None:
    """ValueError where the engine cannot run what the other settings ask for. writes_sample: `run.sample` is given."""
    if isinstance(engine, NativeConfig):
        return
    chosen, stage = "training.engine.kind is 'deepspeed'", engine.zero_stage
    if dtype == "float64":
        raise ValueError(f"{chosen} but training.dtype is 'float64': DeepSpeed reduces gradients in float32 at most")
    for name in ("tp", "pp", "etp"):
        if (degree := getattr(parallel, name)) > 1:
            raise ValueError(f"{chosen} but parallel.{name} is {degree}: this engine divides data and experts alone")
    if parallel.data.kind != "replicated":
        raise ValueError(
            f"{chosen} but parallel.data.kind is {parallel.data.kind!r}: set it to 'replicated', ZeRO shards by itself "
            f"(training.engine.zero_stage is {stage})"
        )
    if engine.offload == "cpu" and stage == 0:
        raise ValueError(
            "training.engine.offload is 'cpu' but training.engine.zero_stage is 0: DeepSpeed offloads what ZeRO has "
            "divided, from stage 1 on"
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
