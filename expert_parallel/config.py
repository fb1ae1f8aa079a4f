"""Reads YAML files into Settings classes and writes them back: overrides, validation, and one sentence for each error.
This is the only file that knows YAML."""

import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from string import Template
from types import NoneType
from typing import Any, TypeVar, get_args

import yaml
from pydantic.fields import FieldInfo

from expert_parallel.sentences import QUOTES, cut, shown
from expert_parallel.settings import (
    Settings,
    blocks_of,
    change_values,
    check_number,
    find_setting,
    is_path,
    is_text,
    use_own_names,
)

S = TypeVar("S", bound=Settings)
MAX_DEPTH, MAX_VALUES = 50, 100_000  # of a config; aliases in a short file can make it nest, and grow, without end
MAX_DIGITS = 40
INT, FLOAT, TIMESTAMP = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))


class _Loader(yaml.SafeLoader):
    """Loads YAML as safe_load does, with these differences: 3e-4 is a number, as in YAML 1.2; a date is a text; a key
    that is given twice, and octal and base-60 numbers, which exist in YAML 1.1 alone, are refused."""

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Returns an int or a float, by the node's tag."""
        text, is_int = node.value, node.tag == INT
        if re.fullmatch("[-+]?0[0-7_]+", text):
            what = f"{text!r} is an octal number in YAML 1.1: write it without the leading zero, or a text in quotes"
        elif ":" in text:
            what = f"{text!r} is a number of base 60 in YAML 1.1: write it in decimal, or a text in quotes"
        elif len(text) > MAX_DIGITS:
            what = f"a number has {len(text)} characters, it must have at most {MAX_DIGITS}"
        else:
            try:
                return int(self.construct_yaml_int(node)) if is_int else float(self.construct_yaml_float(node))
            except ValueError:  # of a text that `!!int` or `!!float` stands before
                what = f"{text!r} is not a number"
        raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)

    def refuse_tag(self, node: yaml.Node) -> None:
        """Refuses a tag that has no use in a config, and that PyYAML fails on if the text is not of its form."""
        raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag!r} is not allowed", node.start_mark)

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
    _yaml.add_implicit_resolver(FLOAT, re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(INT, _Loader.construct_number)
_Loader.add_constructor(FLOAT, _Loader.construct_number)
_Loader.add_constructor(TIMESTAMP, _Loader.refuse_tag)


def load_tree(path: Path, overrides: Sequence[str] = (), block: type[Settings] = Settings) -> dict[str, Any]:
    """Returns the mapping of a YAML file with overrides, not validated. Raises a ValueError if it is no mapping.

    block: the class that the tree is for. Its aliases become own names; `~` and `$NAME` in its paths are replaced.
    """
    try:
        tree = _read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the config file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ValueError(f"the config file {path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"the config file {path} must hold a mapping of settings, found {shown(tree)}")
    try:
        tree = change_values([block], use_own_names([block], tree), _expand)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for override in overrides:
        apply_override(tree, override, block)
    return tree


def _read_yaml(text: str) -> Any:
    """Returns the value that a text has in YAML. Raises a ValueError that says where it is not valid."""
    try:
        value = yaml.load(text, _Loader)
        _check_size(value, [MAX_VALUES])
    except yaml.MarkedYAMLError as error:
        what, mark = ", ".join(filter(None, (error.context, error.problem, error.note))), error.problem_mark
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        hint = "" if isinstance(error, yaml.constructor.ConstructorError) else f": {QUOTES}"
        raise ValueError(f"{what}{place}{hint}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except KeyError as error:  # of `!!bool x`: PyYAML does not check the text
        raise ValueError(f"{error} is neither true nor false") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    return value


def _check_size(value: Any, values_left: list[int], depth: int = 0) -> None:
    """Raises a ValueError if a value is nested too deeply, or too large. values_left: a counter, which is changed."""
    values_left[0] -= 1
    if depth > MAX_DEPTH or values_left[0] < 0:
        what = f"nested more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else f"larger than {MAX_VALUES:,} values"
        raise ValueError(f"it is {what}")
    for entry in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_size(entry, values_left, depth + 1)


def _expand(value: Any, fields: Sequence[FieldInfo]) -> Any:
    return expand_path(value) if isinstance(value, str) and any(map(is_path, fields)) else value


def _escape(value: Any, fields: Sequence[FieldInfo]) -> Any:
    return escape_path(value) if isinstance(value, str) and any(map(is_path, fields)) else value


def expand_path(path: str) -> str:
    """Returns a path with a leading `~` or `~user`, and every `$NAME` and `${NAME}`, replaced; `$$` is a `$`.

    Raises a ValueError that names a variable that is not set or empty, or a user that does not exist.
    """
    try:
        expanded = Template(path).substitute({name: value for name, value in os.environ.items() if value})
    except KeyError as error:
        raise ValueError(f"the environment variable {error.args[0]} is not set, or empty, in {path!r}") from None
    except ValueError:
        raise ValueError(f"{path!r} has a '$' that begins no variable: write '$$' for the character itself") from None
    expanded = os.path.expanduser(expanded)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"{path!r} begins with {user}, but there is no such user: write './~' for a '~'")
    return expanded


def escape_path(path: str) -> str:
    """Returns the text that `expand_path` reads as the given path."""
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


def read_settings(kind: type[S], tree: dict[str, Any], where: str) -> S:
    """Validates a tree. Raises a ValueError of one sentence that begins with `where` and names the setting's path."""
    try:
        change_values([kind], tree, check_number)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return kind.model_validate(tree, context={"where": where})


def dump_tree(tree: dict[str, Any], block: type[Settings] = Settings) -> str:
    """Returns the tree as YAML, from which `load_tree` reads the same tree. block: the class that it is for."""
    return yaml.dump(change_values([block], tree, _escape), Dumper=_Dumper, sort_keys=False)


def one_line(value: Any) -> str:
    """Returns a value as YAML on one line, as the command line takes it between quotes."""
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=math.inf).strip()


def apply_override(tree: dict[str, Any], override: str, block: type[Settings]) -> None:
    """Sets one `dotted.key=value` in the tree, whose names are not aliases. block: the class that the tree is for.

    All that follows the `=` is the value, ` #` included: plain text for a setting that is a text or a path, YAML for
    all others. Raises a ValueError if the override is malformed.
    """
    blocks = [block]
    dotted, equals, text = override.partition("=")
    *parents, leaf = dotted.split(".")
    if not equals or not all([*parents, leaf]) or len(parents) > MAX_DEPTH:
        raise ValueError(f"the override {cut(repr(override))} is not of the form dotted.key=value")
    for depth, parent in enumerate(parents):
        key, fields = find_setting(blocks, tree, parent)
        blocks = blocks_of(fields)
        if tree.get(key) is None:  # an absent block, or one that a dumped config shows as null
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ValueError(
                f"the override {cut(repr(override))}: {'.'.join(parents[: depth + 1])} is not a block of settings"
            )
    name, fields = find_setting(blocks, tree, leaf)
    try:
        value = _override_value(text, fields)
    except ValueError as error:
        is_open = text.count("[") > text.count("]") or text.count("{") > text.count("}")
        split = "it ends inside a bracket: if the shell has split it, put '...' around the whole setting"
        why = split if is_open else str(error)
        raise ValueError(f"the override {cut(repr(override))} is not valid YAML: {why}") from error
    try:
        value = use_own_names(blocks_of(fields), value, dotted)
        tree[name] = change_values(blocks_of(fields), value, _expand, dotted, fields)
    except ValueError as error:
        raise ValueError(f"the override {cut(repr(override))}: {error}") from error


def _override_value(text: str, fields: Sequence[FieldInfo]) -> Any:
    """Returns the value that the text of an override means for a setting. fields: the fields that it may be.

    The text of a text or a path is taken as it is, unless all of it stands in quotes. A list of paths, or a block for
    one, may be one path.
    """
    is_tree = (text[:1], text[-1:]) in (("[", "]"), ("{", "}"))
    if not fields or not all(is_text(field) or (is_path(field) and not is_tree) for field in fields):
        return _read_yaml_without_comments(text)
    if text.startswith(("'", '"')):
        with suppress(ValueError):  # of a text that only begins with a quotation mark
            return _read_yaml_without_comments(text)
    may_be_null = all(NoneType in get_args(field.annotation) for field in fields)
    return None if may_be_null and text in ("", "null") else text


def _read_yaml_without_comments(text: str) -> Any:
    """Returns the value that a text has in a YAML in which `#` is a character like any other."""
    stand_in = next(character for character in map(chr, range(0xE000, 0xF900)) if character not in text)

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {restore(key): restore(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [restore(entry) for entry in value]
        return value.replace(stand_in, "#") if isinstance(value, str) else value

    try:
        return restore(_read_yaml(text.replace("#", stand_in)))
    except ValueError as error:
        raise ValueError(restore(str(error))) from error
