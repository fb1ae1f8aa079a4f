"""Every config class derives from `Settings`: strict types, unknown keys refused, frozen after validation.
`changed_settings` says how two resolved configs differ."""

from typing import Any

from pydantic import BaseModel, ConfigDict

CONFIG_VERSION = 1  # one more where a config that was written before would mean another thing, or be refused


class Settings(BaseModel):
    """A block of the YAML file. Each component declares its own subclass beside its code.

    Strict: `"8"` is not `8`. Unknown keys are errors. Instances never change after validation, so a
    value that was checked at start is the value that runs. Infinities and NaN are no settings.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def refuse_newer(what: str, found: int, newest: int) -> None:
    """Raises a ValueError where a file's version is newer than the newest that this code reads.

    what: the file, and what it calls its version.
    """
    if found > newest:
        raise ValueError(
            f"{what} is {found}, newer than {newest}, the newest that this installation reads: update expert-parallel"
        )


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
