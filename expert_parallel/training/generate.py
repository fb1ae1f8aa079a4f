"""Generates text from a run: its config, newest checkpoint and tokenizer, on one process or on ranks of any layout."""

from collections.abc import Sequence
from pathlib import Path

from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.data.open import load_tokenizer
from expert_parallel.data.tokenizer import Tokenizer
from expert_parallel.model.generation import Sampling, generate
from expert_parallel.model.parallelize import build_model, validate_degrees
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import DTYPES, Config, load_config
from expert_parallel.training.setup import build_mesh_and_model
from expert_parallel.training.step import reshard_parameters


def generate_texts(
    config: Config,
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    sampling: Sampling,
    seed: int,
    mesh: ParallelMesh | None = None,
    use_cache: bool = True,
) -> list[str]:
    """Returns each prompt with its continuation. The model sees at most the last `training.sequence_length` tokens."""
    tokenizer = open_run_tokenizer(config)
    tokens = generate(
        model,
        [tokenizer.encode(prompt) for prompt in prompts],
        num_tokens=num_tokens,
        window=config.training.sequence_length,
        sampling=sampling,
        seed=seed,
        tokenizer_vocab_size=tokenizer.vocab_size,
        end_id=tokenizer.end_id,
        mesh=mesh,
        use_cache=use_cache,
    )
    reshard_parameters(model)
    return [tokenizer.decode(text) for text in tokens]


def open_run_tokenizer(config: Config) -> Tokenizer:
    """Opens the tokenizer of a run. Raises ValueError if the run has none."""
    tokenizer = load_tokenizer(config.data, Path(config.run.folder))
    if tokenizer is None:
        raise ValueError("data.tokenizer is not set: text cannot be encoded without it")
    return tokenizer


def generate_from_run(
    run: Path,
    overrides: Sequence[str],
    prompts: Sequence[str],
    runtime: Runtime,
    *,
    num_tokens: int,
    sampling: Sampling,
    seed: int,
    use_cache: bool = True,
) -> list[str]:
    """Generates texts from the newest checkpoint in the folder `run`, identical on all ranks.

    A single process holds the whole model, whatever layout trained it; several use the layout of the run or of the
    overrides.
    """
    config = runtime.run_on_all_ranks(lambda: load_run_config(run, overrides))
    runtime.run_on_all_ranks(lambda: open_run_tokenizer(config))
    mesh: ParallelMesh | None = None
    model: LanguageModel
    if runtime.world_size == 1:
        model = build_model(config.model, dtype=DTYPES[config.training.dtype], device=runtime.device, seed=None)
    else:
        degrees = runtime.run_on_all_ranks(lambda: config.parallel.degrees(runtime.world_size))
        runtime.run_on_all_ranks(lambda: validate_degrees(config.model, degrees, config.parallel.stages_per_rank))
        mesh, model = build_mesh_and_model(config, runtime, degrees, initialize=False)
    load_checkpoint(run / "checkpoints", model, None, runtime, mesh)
    return generate_texts(
        config,
        model,
        prompts,
        num_tokens=num_tokens,
        sampling=sampling,
        seed=seed,
        mesh=mesh,
        use_cache=use_cache,
    )


def load_run_config(run: Path, overrides: Sequence[str]) -> Config:
    """Loads a run's config with `run.folder` set to the given folder, as the run may have been moved."""
    if not run.is_dir():
        raise ValueError(f"there is no run folder {run}")
    config = load_config(run / "config.yaml", overrides)
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": str(run)})})
