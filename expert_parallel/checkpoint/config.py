"""Holds the settings of checkpoints: when they are written, which of them are kept, and where a new run starts."""

from pydantic import Field

from expert_parallel.settings import PathText, Settings


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
    start_from: PathText | None = None
    """Starts a new run with the weights of this checkpoint, at step 0 and with a fresh optimizer; the path is a
    checkpoint's folder, a folder of checkpoints, or a run's folder."""
