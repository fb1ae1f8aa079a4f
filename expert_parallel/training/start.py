"""Opens what `checkpoint.start_from` names: the weights with which a new run begins."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from expert_parallel.checkpoint.files import open_checkpoint
from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.checkpoint.state import TrainingState
from expert_parallel.data.open import ORIGIN
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import Config
from expert_parallel.training.resume import check_same_model, format_changes


class Start(Protocol):
    """Gives a new run its first weights. Opening one raises a ValueError if they do not fit the run's model."""

    def check_values(self) -> None:
        """Raises a ValueError for what can only be found in the files. Rank 0 calls it before it writes anything."""
        ...

    def keep_files(self, folder: Path) -> None:
        """Writes into the run's folder what the run keeps beside the weights. Rank 0 calls it."""
        ...

    def load(self, model: LanguageModel, state: TrainingState, runtime: Runtime, mesh: ParallelMesh) -> list[str]:
        """Fills this rank's part of the model. Every rank calls it. Returns sentences on what was loaded."""
        ...


OpenStart = Callable[[Path, Config], Start]


class RunStart:
    """Starts from the weights of a checkpoint."""

    def __init__(self, path: Path, config: Config) -> None:
        if (path / "config.json").is_file():
            raise ValueError(f"{path} is a Hugging Face folder, not a run: {{kind: hf, path: {path}}} starts from it")
        self.path, self.config = path, config
        check_same_model(open_checkpoint(path), config)

    def check_values(self) -> None:
        """Checks nothing: loading compares every file with its SHA-256."""

    def keep_files(self, folder: Path) -> None:
        """Copies the files of the model that the other run was imported from, if it was."""
        sources = (self.path, *self.path.resolve().parents[:2])  # a run, or a checkpoint in one
        origin = next((source / ORIGIN for source in sources if (source / ORIGIN).is_dir()), None)
        if origin is not None and not (folder / ORIGIN).exists():
            shutil.copytree(origin, folder / ORIGIN)

    def load(self, model: LanguageModel, state: TrainingState, runtime: Runtime, mesh: ParallelMesh) -> list[str]:
        """Loads the weights, not the optimizer's state."""
        loaded = load_checkpoint(self.path, model, state, runtime, mesh, model_only=True)
        return [f"started from the weights of {loaded.path}{format_changes(loaded, self.config, 'model')}"]


# The kinds of start that need nothing above this room. A further kind is an entry beside these, passed to `train`.
STARTS: Mapping[str, OpenStart] = {"run": RunStart}


def open_start(config: Config, starts: Mapping[str, OpenStart]) -> Start | None:
    """Opens `checkpoint.start_from`; None if it is null. Raises a ValueError that names the setting."""
    start = config.checkpoint.start
    if start is None:
        return None
    if start.kind not in starts:
        raise ValueError(
            f"checkpoint.start_from.kind is {start.kind!r}, and `train` was given {', '.join(starts)}: pass "
            "starts=expert_parallel.START_KINDS"
        )
    with naming_start():
        return starts[start.kind](Path(start.path), config)


@contextmanager
def naming_start() -> Iterator[None]:
    """Names the setting in each ValueError that is raised inside the context."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"checkpoint.start_from: {error}") from None
