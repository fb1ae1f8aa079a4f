"""Holds `Settings`, the base class of all config classes, and what can be read off such a class: the blocks inside it,
and the aliases of its settings. `changed_settings` compares two resolved configs."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import AliasChoices, BaseModel, ConfigDict

CONFIG_VERSION = 1  # increased when a config written before would change its meaning, or be refused


class Settings(BaseModel):
    """Is the base class of every block of a YAML file. Each component declares its own subclass in its own file.

    Strict: `"8"` is not `8`. Unknown keys are errors. Instances never change after validation, so a value that was
    checked at the start is the value that is used. Infinities and NaN are refused.

    A docstring below each field says what the setting does; configs/reference.md is generated from these sentences.

    A setting whose name differs from the field's usual one has that one as an alias, by pydantic's
    `validation_alias=AliasChoices("own_name", "alias")`. A file may use either. Resolved configs, and so checkpoints
    and comparisons of configs, always have the own name: configs and checkpoints that exist keep their meaning.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def blocks_in(annotation: Any) -> Iterator[tuple[str, type[Settings]]]:
    """Yields each Settings class in a type, with `[]` if it is an entry of a list and an empty text if not."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield "", annotation
    for argument in get_args(annotation):
        for brackets, block in blocks_in(argument):
            yield ("[]" if get_origin(annotation) is list else "") + brackets, block


def alias_of(block: type[Settings], name: str) -> str | None:
    """Returns the alias of a block's setting, or None."""
    names = block.model_fields[name].validation_alias
    return str(names.choices[1]) if isinstance(names, AliasChoices) else None


def kinds_of(block: type[Settings]) -> tuple[Any, ...]:
    """Returns the values that the block's `kind` can have; none if it has no `kind`, or one that may be any text."""
    return get_args(block.model_fields["kind"].annotation) if "kind" in block.model_fields else ()


def find_setting(blocks: Sequence[type[Settings]], tree: dict[str, Any], key: str) -> tuple[str, list[type[Settings]]]:
    """Returns the own name of the setting that a key of a config tree means, and the blocks that its value may be.

    blocks: the classes that the tree may be validated as. Only those of the tree's `kind` count, if it has one.
    """
    name, inner = key, []
    for block in blocks:
        if "kind" in tree and "kind" in block.model_fields and tree["kind"] not in kinds_of(block):
            continue
        name = next((field for field in block.model_fields if alias_of(block, field) == key), name)
        if name in block.model_fields:
            inner += [found for _, found in blocks_in(block.model_fields[name].annotation)]
    return name, inner


def use_own_names(blocks: Sequence[type[Settings]], tree: Any, path: str = "") -> Any:
    """Returns a config tree with every alias replaced by the setting's own name. Raises a ValueError if both are given.

    blocks: the classes that the tree may be validated as. path: the tree's place in the config, for the error.
    """
    if isinstance(tree, list):
        return [use_own_names(blocks, entry, f"{path}[{number}]") for number, entry in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    renamed: dict[Any, Any] = {}
    for key, value in tree.items():
        name, inner = find_setting(blocks, tree, key)
        full = f"{path}.{name}".removeprefix(".")
        if name != key and name in tree:
            alias = f"{path}.{key}".removeprefix(".")
            raise ValueError(f"{full} and {alias} are the same setting: give one of them")
        renamed[name] = use_own_names(inner, value, full)
    return renamed


def refuse_newer(what: str, found: int, newest: int) -> None:
    """Raises a ValueError if a file's version is newer than the newest that this installation reads.

    what: names the file and its version.
    """
    if found > newest:
        raise ValueError(
            f"{what} is {found}, newer than {newest}, the newest that this installation reads: update expert-parallel"
        )


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (dotted path, old value, new value) of each setting that differs between two resolved configs, without
    their versions, which set nothing."""
    before, after = _leaves(old), _leaves(new)
    paths = [path for path in before | after if path != "version"]
    return [(path, before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)]


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= _leaves(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return leaves
