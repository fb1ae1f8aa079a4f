"""Reads the keys of a config.json, records which are read, and refuses those that nobody knows."""

import reprlib
from collections.abc import Iterable
from typing import Any

from expert_parallel.interop.neutral_keys import SWITCHED_OFF, is_neutral

Tree = dict[str, Any]
REQUIRED = object()
LARGEST = 2**31 - 1  # no size of a model is larger; the product of two fits into torch's int64


def short(value: Any) -> str:
    """Returns the repr of a value from a file, on one line, shortened where it is long or deep."""
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxlist, shown.maxdict = 3, 12, 12
    shown.maxstring = shown.maxlong = shown.maxother = 80
    return shown.repr(value)


def shown(name: Any) -> str:
    """Returns a name from a file as it is, but for one that would break the line, fill the screen, or is no text."""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 80 else short(name)


class HuggingFaceConfig:
    """Holds the values of a config.json, and records which keys the rules have read."""

    def __init__(self, values: Tree) -> None:
        self.values = values
        self.asked: set[str] = set()

    def take(self, *keys: str, default: Any = REQUIRED) -> Any:
        """Returns the value of the first key that exists. keys: several names of one setting.

        Raises a ValueError if none exists and there is no default, or if two exist and differ.
        """
        self.asked |= set(keys)
        found = [key for key in keys if key in self.values]
        for key in found[1:]:
            if self.values[key] != self.values[found[0]]:
                raise self.refuse(key, f"it must be {found[0]}, which is {short(self.values[found[0]])}")
        if found:
            return self.values[found[0]]
        if default is REQUIRED:
            raise ValueError(f"config.json: {' or '.join(keys)} is missing")
        return default

    def size(self, *keys: str, default: Any = REQUIRED, least: int = 1, most: int = LARGEST) -> Any:
        """Returns the value of the first key that exists, which must be an integer from `least` to `most`; else the
        default. Raises a ValueError for any other value."""
        value = self.take(*keys, default=default)
        if type(value) is int and least <= value <= most:
            return value
        if value is default:
            return value
        key = next((key for key in keys if key in self.values), keys[0])
        raise self.refuse(key, f"it must be an integer from {least} to {most:,}")

    def flag(self, key: str, default: bool) -> bool:
        """Returns the value of a key, which must be true or false; else the default. Raises a ValueError for any other
        value."""
        value = self.take(key, default=default)
        if not isinstance(value, bool):
            raise self.refuse(key, "it must be true or false")
        return value

    def refuse(self, key: str, why: str) -> ValueError:
        """Returns a ValueError that names the key, its value and the reason."""
        return ValueError(f"config.json: {key} is {short(self.values.get(key))}: {why}")

    def refuse_unknown_keys(self, neutral: Iterable[str]) -> None:
        """Raises a ValueError that lists all keys that no rule has read. neutral: further keys that do not affect the
        logits."""
        known = self.asked.union(neutral, (key for key in SWITCHED_OFF if not self.values.get(key)))
        unknown = [key for key in self.values if key not in known and not is_neutral(key)]
        if unknown:
            found = (f"{shown(key)} is {short(self.values[key])}" for key in unknown)
            raise ValueError(
                f"config.json: unknown keys may change what the model computes: {', '.join(found)}; remove those that "
                "you know to have no effect on it"
            )
