"""Settings of checkpoints: when one is written, which of them stay, where a new run begins."""

from pydantic import Field

from expert_parallel.settings import Settings


class CheckpointConfig(Settings):
    """One is written every so many steps, and at the end in any case.

    keep: the newest that stay. keep_every: those whose step is a multiple of it stay, too. background: training goes on
    while one is written, from a copy in host memory. start_from: a new run begins with the weights of this checkpoint
    (a folder of it, of several, or of a run), at step 0 and with a fresh optimizer.
    """

    every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1)
    background: bool = True
    start_from: str | None = Field(default=None, min_length=1)
