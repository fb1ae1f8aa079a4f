"""Generates text from a run: its config, newest checkpoint and tokenizer, on one process or on ranks of any layout."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.data.config import TokensData
from expert_parallel.data.imported import find_imported_generation
from expert_parallel.data.open import load_tokenizer
from expert_parallel.data.prompts import PromptTokenizer
from expert_parallel.data.tokenizer import FileTokenizer, Tokenizer
from expert_parallel.model.generation import Sampling, generate
from expert_parallel.model.parallelize import build_model, validate_degrees
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import DTYPES, Config, load_config
from expert_parallel.training.setup import build_mesh_and_model
from expert_parallel.training.step import reshard_parameters

logger = logging.getLogger(__name__)


def generate_texts(
    config: Config,
    model: LanguageModel,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    sampling: Sampling,
    seed: int,
    mesh: ParallelMesh | None = None,
    use_cache: bool = True,
) -> list[str]:
    """Returns each prompt with its continuation.

    The model is given at most the last `training.sequence_length` tokens; an imported model at least as many as it was
    made for. Rank 0 logs which settings of an imported generation_config.json are not followed.
    """
    imported = tokenizer.imported
    if imported is not None and (mesh is None or dist.get_rank() == 0):
        own = sampling.model_dump(include={"temperature", "top_k", "top_p"}) if sampling.temperature > 0 else None
        if (sentence := imported.not_followed(own)) is not None:
            logger.warning("%s", sentence)
    made_for = 0 if imported is None or imported.max_positions is None else imported.max_positions
    tokens = generate(
        model,
        [tokenizer.encode(prompt) for prompt in prompts],
        num_tokens=num_tokens,
        window=max(config.training.sequence_length, made_for),
        sampling=sampling,
        seed=seed,
        tokenizer_vocab_size=tokenizer.vocab_size,
        end_ids=tokenizer.end_ids,
        mesh=mesh,
        use_cache=use_cache,
    )
    reshard_parameters(model)
    return [tokenizer.decode(text) for text in tokens]


def open_prompt_tokenizer(config: Config, *, special_tokens: bool = False) -> PromptTokenizer:
    """Opens the tokenizer of a run for generation, which follows the files of an imported model. special_tokens: see
    PromptTokenizer. Raises ValueError if the run has no tokenizer, or if a file is damaged."""
    tokenizer, folder = open_run_tokenizer(config), Path(config.run.folder)
    imported = find_imported_generation(folder) if isinstance(tokenizer, FileTokenizer) else None
    trains = isinstance(config.data, TokensData) and bool(config.data.corpora)
    return PromptTokenizer(tokenizer, imported, special_tokens=special_tokens, trains=trains)


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
    special_tokens: bool = False,
    use_cache: bool = True,
) -> list[str]:
    """Generates texts from the newest checkpoint in the folder `run`, identical on all ranks.

    A single process holds the whole model, whatever layout trained it; several use the layout of the run or of the
    overrides. special_tokens: see PromptTokenizer.
    """
    config = runtime.run_on_all_ranks(lambda: load_run_config(run, overrides))
    tokenizer = runtime.run_on_all_ranks(lambda: open_prompt_tokenizer(config, special_tokens=special_tokens))
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
        tokenizer,
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
