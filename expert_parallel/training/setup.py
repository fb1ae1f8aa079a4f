"""Builds, from a config, the process groups, this rank's part of the model, and the engine that trains it."""

from functools import partial

import torch

from expert_parallel.data.open import DataRequirements
from expert_parallel.model.parallelize import build_model, kv_copies, validate_degrees
from expert_parallel.model.pipeline import build_pipeline, validate_schedule
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.parallel.degrees import ParallelDegrees, ShardedConfig, node_and_rail_ranks, shard_counts
from expert_parallel.parallel.mesh import ParallelMesh, build_mesh
from expert_parallel.parallel.sequence import sequence_length_multiple
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import DTYPES, Config, TrainingConfig
from expert_parallel.training.engines.build import ENGINES
from expert_parallel.training.engines.config import DeepSpeedConfig
from expert_parallel.training.engines.engine import Engine
from expert_parallel.training.memory import GIB, estimate_memory, total_memory
from expert_parallel.training.optim import build_optimizer

# A step is refused if it is estimated to need more than this times the memory that there is. The estimate counts frozen
# weights as trained, which take four times as much, so that no run is refused that fits.
IMPOSSIBLE = 4


def build(
    config: Config, runtime: Runtime, degrees: ParallelDegrees, *, initialize: bool = True
) -> tuple[ParallelMesh, LanguageModel, Engine]:
    """Builds and returns the process groups, this rank's part of the model, and the engine that trains it.

    initialize: False leaves the weights uninitialized, for a checkpoint to fill.
    """
    training = config.training
    mesh, model = build_mesh_and_model(config, runtime, degrees, initialize=initialize)
    optimizer = build_optimizer(training.optimizer, model, training.trainable)
    return mesh, model, ENGINES[training.engine.kind](model, optimizer, mesh, runtime, training)


def build_mesh_and_model(
    config: Config, runtime: Runtime, degrees: ParallelDegrees, *, initialize: bool = True
) -> tuple[ParallelMesh, LanguageModel]:
    """Builds and returns the process groups and this rank's part of the model. initialize: see `build`."""
    moe = config.model.moe
    parallel = config.parallel
    training = config.training
    mesh = build_mesh(
        degrees,
        runtime.device.type,
        runtime.timeout,
        ranks_per_node=parallel.ranks_per_node or runtime.launch.local_world_size,
        hierarchical=moe is not None and moe.dispatcher.kind == "hierarchical",
        data=parallel.data,
        kv_copies=kv_copies(config.model, degrees),
        tied_embeddings=config.model.embeds_on_last_stage,
    )
    build_here = partial(build_pipeline, pipeline=parallel.pipeline) if degrees.pp > 1 else build_model
    model = build_here(
        config.model,
        mesh,
        sharding=parallel.data if isinstance(parallel.data, ShardedConfig) else None,
        dtype=DTYPES[training.dtype],
        device=runtime.device,
        recompute=training.recompute,
        seed=config.seed if initialize else None,
    )
    return mesh, model


def format_degrees(config: Config, degrees: ParallelDegrees) -> str:
    """Returns the degrees as text, `dp 2, cp 1, ... | edp 4, ..., replicated`; with FSDP2 it ends with the numbers of
    shards x replicas, with DeepSpeed with the stage of ZeRO."""
    data, engine = config.parallel.data, config.training.engine
    by_engine = f", DeepSpeed ZeRO {engine.zero_stage}" if isinstance(engine, DeepSpeedConfig) else ""
    if not isinstance(data, ShardedConfig):
        return f"{degrees}, {data.kind}{by_engine}"
    shards, expert_shards = shard_counts(data, degrees)
    text = f"{degrees}, sharded {shards} x {degrees.dp * degrees.cp // shards}"
    return text + (f", experts {expert_shards} x {degrees.edp // expert_shards}" if config.model.moe else "")


def data_requirements(config: Config) -> DataRequirements:
    """Returns the requirements of a run that its data must meet: sequence length, vocabulary, number of sequences,
    seed."""
    training = config.training
    return DataRequirements(
        sequence_length=training.sequence_length,
        vocab_size=config.model.vocab_size,
        held_out_sequences=config.evaluation.sequences,
        num_samples=training.steps * training.global_batch,
        seed=config.seed,
    )


def check_world_size(config: Config, runtime: Runtime) -> ParallelDegrees:
    """Returns the degrees of parallelism for the running ranks. Raises ValueError, which names the setting and the
    numbers, if the config does not fit them."""
    config.check_backend(runtime.device.type)
    return check_degrees(config, runtime.world_size, runtime.launch.local_world_size)


def check_degrees(config: Config, world_size: int, ranks_per_node: int | None = None) -> ParallelDegrees:
    """Returns the degrees of parallelism for `world_size` ranks, which need not be running.

    ranks_per_node: from the launcher, if there is one. Raises ValueError if the model, the batch or the sequences
    cannot be divided over these ranks.
    """
    degrees = config.parallel.degrees(world_size)
    validate_degrees(config.model, degrees, config.parallel.stages_per_rank)
    if config.model.moe is not None and config.model.moe.dispatcher.kind == "hierarchical":
        node_and_rail_ranks(degrees, config.parallel.ranks_per_node or ranks_per_node or world_size)
    training, mtp = config.training, config.model.mtp
    if mtp is not None and mtp.depth >= training.sequence_length:
        raise ValueError(
            f"model.mtp.depth ({mtp.depth}) is not smaller than training.sequence_length ({training.sequence_length}): "
            "no sequence has a token so far ahead"
        )
    micro = training.global_batch // training.micro_steps
    if micro < degrees.dp:
        raise ValueError(
            f"training.global_batch / training.micro_steps ({micro} sequences) is smaller than the number of data "
            f"ranks ({degrees.dp}), and some ranks would have no sequence: set {larger_micro_batch(training, degrees)}"
        )
    unit = sequence_length_multiple(degrees.cp, degrees.tp)
    if training.sequence_length % unit:
        raise ValueError(
            f"training.sequence_length ({training.sequence_length}) is not a multiple of {unit}: sequences are divided "
            f"evenly over parallel.cp ({degrees.cp}, two chunks a rank) and parallel.tp ({degrees.tp})"
        )
    if degrees.pp > 1:
        validate_schedule(config.parallel.pipeline, degrees.pp, training.micro_steps)
    return degrees


def larger_micro_batch(training: TrainingConfig, degrees: ParallelDegrees) -> str:
    """Returns, as text, the settings that give each data rank a sequence in each micro-step: the most micro-steps into
    which the batch can be divided, if there are enough of them for the pipeline, and the smallest batch."""
    batch = training.global_batch
    most = next((n for n in range(batch // degrees.dp, 0, -1) if batch % n == 0), 0)
    fewer = [f"training.micro_steps to at most {most:,}"] if most >= degrees.pp else []
    return " or ".join([*fewer, f"training.global_batch to at least {degrees.dp * training.micro_steps:,}"])


def check_memory(config: Config, degrees: ParallelDegrees, device: torch.device) -> None:
    """Raises ValueError if a training step needs several times the memory of this rank's GPU or machine, as a number
    with a digit too many asks for. A step that needs a little more fails when it allocates."""
    estimate = estimate_memory(config, degrees, "cuda" if device.type == "cuda" else "cpu")
    available = total_memory(device)
    if estimate.total > IMPOSSIBLE * available:
        raise ValueError(
            f"a training step needs about {estimate.total / GIB:,.0f} GiB on a rank (weights, gradients and optimizer "
            f"{estimate.state / GIB:,.0f}), its {'GPU' if device.type == 'cuda' else 'machine'} has "
            f"{available / GIB:,.0f} GiB: `expert-parallel check --all` lists the parts, which training.global_batch, "
            "training.sequence_length and the sizes of model decide"
        )
