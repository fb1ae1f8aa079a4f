"""Settings of checkpoints, and how those of two runs differ."""

from typing import Any

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


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted path, old value, new value) of each setting that differs between two resolved configs. Their versions say
    how to read them, and set nothing."""
    before, after = _leaves(old), _leaves(new)
    paths = [path for path in before | after if path != "version"]
    return [(path, before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)]


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= _leaves(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return leaves
