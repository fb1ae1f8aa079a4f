"""Reads YAML files into Settings classes and writes them back: overrides, validation, and one sentence for each error.
This is the only file that knows YAML."""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from expert_parallel.settings import Settings, blocks_in, find_setting, use_own_names

S = TypeVar("S", bound=Settings)


class _Loader(yaml.SafeLoader):
    """Loads YAML as safe_load does, but reads 3e-4 as a number (YAML 1.2) and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused below, with a message of its own
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Dumps YAML as safe_dump does, but quotes a text that the loader would read as a number."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def load_tree(path: Path, overrides: Sequence[str] = (), block: type[Settings] = Settings) -> dict[str, Any]:
    """Returns the mapping of a YAML file with overrides, not validated. Raises a ValueError if it is no mapping.

    block: the class that the tree is for, whose aliases become own names; without it they stay.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"the config file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"the config file {path} must hold a mapping of settings, found {_shown(tree)}")
    try:
        tree = use_own_names([block], tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for override in overrides:
        apply_override(tree, override, block)
    return tree


def read_settings(kind: type[S], tree: dict[str, Any], where: str) -> S:
    """Validates a tree. Raises a ValueError of one sentence that begins with `where` and names the setting's path."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{where}: {_first_sentence(error, tree, setting_paths(kind))}") from None


def dump_tree(tree: dict[str, Any]) -> str:
    """Returns the tree as YAML, from which `load_tree` reads the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def setting_paths(block: type[Settings], prefix: str = "") -> list[str]:
    """Returns every path that a config can have, blocks included; `losses[]` is each entry of the list `losses`."""
    paths = []
    for name, field in block.model_fields.items():
        paths.append(prefix + name)
        for brackets, inner in blocks_in(field.annotation):
            paths += setting_paths(inner, f"{prefix}{name}{brackets}.")
    return list(dict.fromkeys(paths))


def apply_override(tree: dict[str, Any], override: str, block: type[Settings]) -> None:
    """Sets one `dotted.key=value` in the tree, whose names are not aliases. block: the class that the tree is for.

    Raises a ValueError if the override is malformed.
    """
    blocks = [block]
    dotted, equals, text = override.partition("=")
    *parents, leaf = dotted.split(".")
    if not equals or not all([*parents, leaf]):
        raise ValueError(f"the override {override!r} is not of the form dotted.key=value")
    for depth, parent in enumerate(parents):
        key, blocks = find_setting(blocks, tree, parent)
        if tree.get(key) is None:  # an absent block, or one that a dumped config shows as null
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ValueError(f"the override {override!r}: {'.'.join(parents[: depth + 1])} is not a block of settings")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"the override {override!r} is not valid YAML: {' '.join(str(error).split())}") from error
    name, blocks = find_setting(blocks, tree, leaf)
    tree[name] = use_own_names(blocks, value, dotted)


def _first_sentence(error: ValidationError, tree: Any, paths: list[str]) -> str:
    """Returns the first error, `path: what, found value`, and the number of further ones. A misspelled setting comes
    first, since others may be missing because of it."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] not in ("extra_forbidden", "invalid_key"))
    first, context = details[0], details[0].get("ctx", {})
    path = _user_path(first["loc"], tree, is_missing=first["type"] == "missing")
    match first["type"]:
        case "extra_forbidden":
            text = f"unknown setting {path}{_did_you_mean(path, paths)}"
        case "value_error":
            text = _with_full_paths(str(context["error"]), path, paths)
        case "missing":
            text = f"{path} is missing"
        case "union_tag_not_found":
            text = f"{path}.kind is missing"
        case "union_tag_invalid":
            text = f"{path}.kind is {context['tag']!r}, it must be one of {context['expected_tags']}"
        case "model_type" | "model_attributes_type":
            text = f"{path} must be a block of settings, found {_shown(first['input'])}"
        case _:
            text = f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}, found {_shown(first['input'])}"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return text + more


def _user_path(location: tuple[int | str, ...], tree: Any, is_missing: bool) -> str:
    """Returns pydantic's location without the kinds that it inserts: capacity.factor.train is capacity.train."""
    path = ""
    for number, part in enumerate(location):
        is_entry = isinstance(tree, list) and isinstance(part, int)
        is_key = is_entry or (isinstance(tree, dict) and part in tree)
        if is_key:
            tree = tree[part]
        if is_key or (is_missing and number == len(location) - 1):
            path += f"[{part}]" if is_entry else f".{part}"
    return path.removeprefix(".")


def _with_full_paths(text: str, block: str, paths: list[str]) -> str:
    """Puts the block's path before each setting in the message of a block's own check, which names settings as the
    block does (`router.k`).

    A single word is a setting only if a value or a statement follows: `hidden (3)`, but not `the router learns`.
    """

    def full(word: re.Match[str]) -> str:
        names_setting = re.search("[._]", word[0]) or text[word.end() :].startswith((" (", " is ", " = ", ": "))
        path = f"{block}.{word[0]}"
        return path if names_setting and path in paths else word[0]

    result = re.sub(r"(?<![\w.])\w+(\.\w+)*", full, text) if block else text
    return result if result != text or not block else f"{block}: {text}"


def _did_you_mean(path: str, paths: list[str]) -> str:
    """Suggests the setting of this name in another block, or the one of its block with the most similar spelling."""
    block, _, name = re.sub(r"\[\d+\]", "[]", path).rpartition(".")
    if ".".join(filter(None, (block, name))) in paths:
        return f" (another kind of {block} has it)"
    settings = [other.rpartition(".") for other in paths]
    found = [".".join(filter(None, (b, n))) for b, _, n in settings if n == name]
    if not found:
        close = difflib.get_close_matches(name, [n for b, _, n in settings if b == block], n=1)
        found = [".".join(filter(None, (block, n))) for n in close]
    return f" (did you mean {' or '.join(found)}?)" if len(found) in (1, 2) else ""


def _shown(value: Any) -> str:
    """Returns the value as YAML would have it, on one line of bounded length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
