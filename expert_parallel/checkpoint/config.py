"""Holds the settings of checkpoints: when they are written, which of them are kept, and where a new run starts."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from expert_parallel.settings import PathText, Settings


class StartFromRun(Settings):
    """Takes the weights of a checkpoint."""

    kind: Literal["run"]
    path: PathText
    """Sets the checkpoint's folder, a folder of checkpoints, or a run's folder, of which the newest checkpoint is
    taken."""


class StartFromHuggingFace(Settings):
    """Takes the weights of a Hugging Face folder, of which each rank reads its own part."""

    kind: Literal["hf"]
    path: PathText
    """Sets the folder of config.json and safetensors files, which describe the same model as `model`."""


StartBlock = Annotated[StartFromRun | StartFromHuggingFace, Field(discriminator="kind")]
# The function decides between the two, or an error would name both.
StartConfig = Annotated[
    Annotated[PathText, Tag("path")] | Annotated[StartBlock, Tag("block")],
    Discriminator(lambda value: "block" if isinstance(value, dict | Settings) else "path"),
]


class CheckpointConfig(Settings):
    """Sets when checkpoints are written, which of them are kept, and which weights a new run starts from."""

    every: int = Field(default=500, ge=1)
    """Writes a checkpoint every this many steps; the last step of a run always writes one."""
    keep: int = Field(default=2, ge=1)
    """Keeps this many of the newest checkpoints and deletes the older ones."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also keeps every checkpoint whose step is a multiple of this number."""
    background: bool = True
    """Writes checkpoints from a copy in host memory while training continues."""
    start_from: StartConfig | None = None
    """Starts a new run with the weights of this checkpoint, at step 0 and with a fresh optimizer; the path is a
    checkpoint's folder, a folder of checkpoints, or a run's folder; a block may name a Hugging Face folder."""

    @property
    def start(self) -> StartFromRun | StartFromHuggingFace | None:
        """Returns `start_from` as a block; a path alone is that of a run."""
        path = self.start_from
        return StartFromRun(kind="run", path=path) if isinstance(path, str) else path
