"""Holds `Settings`, the base class of all config classes, and what can be read off such a class: the blocks inside it,
the aliases of its settings, and which settings are paths. `changed_settings` compares two resolved configs."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from expert_parallel.sentences import first_sentence

CONFIG_VERSION = 1  # increased when a config written before would change its meaning, or be refused
MAX_INT, MAX_FLOAT, MIN_FLOAT = 2**31 - 1, 1e30, 1e-30  # of settings without bounds of their own: products stay finite
MAX_SEED = 2**63 - 1  # of an int64
MAX_NAME_BYTES = 255  # of a file or folder, on all common file systems of Linux
MAX_PATH_BYTES = 3500  # Linux takes 4,095; what a run writes lies up to a few hundred below its folder


class Settings(BaseModel):
    """Is the base class of every block of a YAML file. Each component declares its own subclass in its own file.

    Strict: `"8"` is not `8`. Unknown keys are errors. Instances never change after validation, so a value that was
    checked at the start is the value that is used. Infinities and NaN are refused.

    What is refused is a ValueError of one sentence, which begins with the class's name, or with `where` of the context:
    `model_validate(tree, context={"where": "config.yaml"})`. A context also says that the settings come from a file.

    A docstring below each field says what the setting does; configs/reference.md is generated from these sentences.

    A setting whose name differs from the field's usual one has that one as an alias, by pydantic's
    `validation_alias=AliasChoices("own_name", "alias")`. A file may use either. Resolved configs, and so checkpoints
    and comparisons of configs, always have the own name: configs and checkpoints that exist keep their meaning.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(f"{type(self).__name__}: {_sentence(type(self), values, error)}") from None

    # Or pydantic would call this method for blocks inside a block too, which then had no path in the sentence.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Validates a tree of settings. options: pydantic's. Raises a ValueError of one sentence."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            where = (options.get("context") or {}).get("where", cls.__name__)
            raise ValueError(f"{where}: {_sentence(cls, obj, error)}".removeprefix(": ")) from None


def _sentence(block: "type[Settings]", tree: Any, error: ValidationError) -> str:
    return first_sentence(error, tree, setting_paths(block))


@dataclass(frozen=True)
class PathMark:
    """Marks a text, or a list of texts, as paths of files or folders: config files may use `~` and `$NAME` in them."""


@dataclass(frozen=True)
class TreeOf:
    """Marks a mapping as a part of the tree of another class, which is validated later."""

    block: "type[Settings]"


def check_path(path: str) -> str:
    """Returns the path. Raises a ValueError if no file system can hold it."""
    data = os.fsencode(path)
    if 0 in data:
        raise ValueError("a path cannot contain the character NUL")
    if (longest := max(map(len, data.split(b"/")))) > MAX_NAME_BYTES:
        raise ValueError(f"a name in this path has {longest} bytes, file systems take at most {MAX_NAME_BYTES}")
    if len(data) > MAX_PATH_BYTES:
        raise ValueError(f"this path has {len(data)} bytes, it must have at most {MAX_PATH_BYTES}")
    return path


PathText = Annotated[
    str, Field(min_length=1, json_schema_extra={"format": "path"}), AfterValidator(check_path), PathMark()
]


def blocks_in(annotation: Any) -> Iterator[tuple[str, type[Settings]]]:
    """Yields each Settings class in a type, with `[]` if it is an entry of a list and an empty text if not."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield "", annotation
    for argument in get_args(annotation):
        for brackets, block in blocks_in(argument):
            yield ("[]" if get_origin(annotation) is list else "") + brackets, block


def setting_paths(block: type[Settings], prefix: str = "") -> list[str]:
    """Returns every path that a config can have, blocks included; `losses[]` is each entry of the list `losses`."""
    paths = []
    for name, field in block.model_fields.items():
        paths.append(prefix + name)
        for brackets, inner in blocks_in(field.annotation):
            paths += setting_paths(inner, f"{prefix}{name}{brackets}.")
    return list(dict.fromkeys(paths))


def alias_of(block: type[Settings], name: str) -> str | None:
    """Returns the alias of a block's setting, or None."""
    names = block.model_fields[name].validation_alias
    return str(names.choices[1]) if isinstance(names, AliasChoices) else None


def kinds_of(block: type[Settings]) -> tuple[Any, ...]:
    """Returns the values that the block's `kind` can have; none if it has no `kind`, or one that may be any text."""
    return get_args(block.model_fields["kind"].annotation) if "kind" in block.model_fields else ()


def marks_of(field: FieldInfo) -> Iterator[Any]:
    """Yields what the Annotated types of a setting, of its options and of its entries are annotated with."""
    yield from field.metadata
    yield from _marks_in(field.annotation)


def _marks_in(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        if isinstance(argument, FieldInfo):
            yield from argument.metadata
        yield argument
        yield from _marks_in(argument)


def is_path(field: FieldInfo) -> bool:
    """Returns True if a setting is a path or a list of paths."""
    return any(isinstance(mark, PathMark) for mark in marks_of(field))


def is_text(field: FieldInfo) -> bool:
    """Returns True if every value of a setting, other than null, is a text."""

    def has_texts_only(annotation: Any) -> bool:
        arguments = get_args(annotation)
        if get_origin(annotation) is Annotated:
            return has_texts_only(arguments[0])
        if get_origin(annotation) is Literal:
            return all(isinstance(value, str) for value in arguments)
        options = [argument for argument in arguments if argument is not NoneType]
        is_union = get_origin(annotation) in (Union, UnionType)
        return annotation is str or (is_union and all(map(has_texts_only, options)))

    return has_texts_only(field.annotation)


def find_setting(blocks: Sequence[type[Settings]], tree: dict[str, Any], key: str) -> tuple[str, list[FieldInfo]]:
    """Returns the own name of the setting that a key of a config tree means, and the fields that it may be.

    blocks: the classes that the tree may be validated as. Only those of the tree's `kind` count, if it has one.
    """
    name, fields = key, []
    for block in blocks:
        if "kind" in tree and "kind" in block.model_fields and tree["kind"] not in kinds_of(block):
            continue
        name = next((field for field in block.model_fields if alias_of(block, field) == key), name)
        if name in block.model_fields:
            fields.append(block.model_fields[name])
    return name, fields


def blocks_of(fields: Sequence[FieldInfo]) -> list[type[Settings]]:
    """Returns the classes that the value of a setting may be validated as, now or later."""
    now = [block for field in fields for _, block in blocks_in(field.annotation)]
    return now + [mark.block for field in fields for mark in field.metadata if isinstance(mark, TreeOf)]


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
        name, fields = find_setting(blocks, tree, key)
        full = f"{path}.{name}".removeprefix(".")
        if name != key and name in tree:
            alias = f"{path}.{key}".removeprefix(".")
            raise ValueError(f"{full} and {alias} are the same setting: give one of them")
        renamed[name] = use_own_names(blocks_of(fields), value, full)
    return renamed


def change_values(
    blocks: Sequence[type[Settings]],
    tree: Any,
    change: Callable[[Any, Sequence[FieldInfo]], Any],
    path: str = "",
    fields: Sequence[FieldInfo] = (),
) -> Any:
    """Returns a config tree, whose names are not aliases, with every value replaced by `change(value, fields)`. A list
    is changed entry by entry.

    blocks: the classes that the tree may be validated as. fields: the fields that it may be. path: its place in the
    config. A ValueError of `change` is raised again with the setting's path before it.
    """
    if isinstance(tree, list):
        entries = enumerate(tree)
        return [change_values(blocks, entry, change, f"{path}[{number}]", fields) for number, entry in entries]
    if isinstance(tree, dict):
        changed = {}
        for key, value in tree.items():
            _, inner = find_setting(blocks, tree, key)
            changed[key] = change_values(blocks_of(inner), value, change, f"{path}.{key}".removeprefix("."), inner)
        return changed
    try:
        return change(tree, fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_number(value: Any, fields: Sequence[FieldInfo]) -> Any:
    """Returns a setting's value. Raises a ValueError if it is a number that is too large or too small to compute with.

    fields: the fields that it may be. Only those without an upper bound of their own have the common one.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or any(hasattr(mark, "le") or hasattr(mark, "lt") for field in fields for mark in marks_of(field)):
        return value
    most = MAX_INT if isinstance(value, int) else MAX_FLOAT
    if abs(value) > most:
        shown = f"{value:.15g}" if abs(value) < 1e300 else "a number beyond 1e300"  # no float can be as large
        raise ValueError(f"{shown} is out of range, it must be at most {most:.10g}")
    if 0 < abs(value) < MIN_FLOAT:
        raise ValueError(f"{value:g} is out of range, it must be 0 or at least {MIN_FLOAT:g}")
    return value


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
