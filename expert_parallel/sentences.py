"""Puts what pydantic finds wrong with settings into one sentence, which names the setting as its user wrote it."""

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from expert_parallel.translations import TRANSLATIONS, translate

QUOTES = "a text that has a meaning in YAML must stand in quotes"


def first_sentence(error: ValidationError, tree: Any, paths: list[str]) -> str:
    """Returns the first error, `path: what, found value`, and the number of further ones. A misspelled setting comes
    first, since others may be missing because of it."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] not in ("extra_forbidden", "invalid_key"))
    first, context = details[0], details[0].get("ctx", {})
    path = _user_path(first["loc"], tree, is_missing=first["type"] == "missing")
    match first["type"]:
        case "extra_forbidden":
            text = _unknown_setting(path, first["input"], paths)
        case "value_error":
            text = _with_full_paths(str(context["error"]), path, paths)
        case "missing":
            text = f"{path} is missing"
        case "union_tag_not_found":
            text = f"{path}.kind is missing"
        case "union_tag_invalid":
            text = f"{path}.kind is {cut(repr(context['tag']))}, it must be one of {context['expected_tags']}"
        case "model_type" | "model_attributes_type":
            text = f"{path} must be a block of settings, found {shown(first['input'])}"
        case "string_type" if isinstance(first["input"], (bool, int, float)):
            text = f"{path} must be a text, found {shown(first['input'])}: {QUOTES}"
        case _:
            text = f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}, found {shown(first['input'])}"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    text = text.removeprefix(": ").removeprefix(" ")  # if the whole tree is wrong, which has no path
    return re.sub(r"\S{200,}", lambda word: cut(word[0]), text) + more  # a block's own message has the value whole


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


def _unknown_setting(path: str, value: Any, paths: list[str]) -> str:
    """Returns the sentence about an unknown setting. A word of another system is looked up at any depth of its value,
    since whole blocks may be unknown: `zero_optimization: {stage: 2}`."""
    for place in _places(path, value):
        if hint := suggest_translation(place, paths):
            return f"unknown setting {place}{hint}"
    return f"unknown setting {path}{_did_you_mean(path, paths)}"


def _places(path: str, value: Any) -> Iterator[str]:
    """Yields the paths of all settings in a value, innermost first, and the value's own path last."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from _places(f"{path}.{key}", inner)
    yield path


def suggest_translation(path: str, paths: list[str]) -> str:
    """Returns ` (did you mean ...?)` if the path ends in another system's word, else an empty text.

    paths: those that the config can have. Of a block that is read alone, they are endings of the table's.
    """
    translation = None if _plain(path) in paths else translate(_plain(path))
    if translation is None:
        return ""
    found = [ending for target in translation.paths if (ending := _ending_in(target, paths))]
    if len(found) < len(translation.paths):  # a block that has nothing of the kind
        return ""
    note = translation.note
    question = f"did you mean {' or '.join(found)}?" if found else ""
    return f" ({' '.join(filter(None, (question, note)))})"


def _ending_in(target: str, paths: list[str]) -> str | None:
    words = target.split(".")
    return next((ending for n in range(len(words)) if (ending := ".".join(words[n:])) in paths), None)


def _plain(path: str) -> str:
    return re.sub(r"\[\d+\]", "[]", path)


def _did_you_mean(path: str, paths: list[str]) -> str:
    """Suggests the setting of this name in another block, the one of its block with the most similar spelling, or the
    translation of the most similar word of another system."""
    block, _, name = _plain(path).rpartition(".")
    if ".".join(filter(None, (block, name))) in paths:
        return f" (another kind of {block} has it)"
    settings = [other.rpartition(".") for other in paths]
    found = [".".join(filter(None, (b, n))) for b, _, n in settings if n == name]
    if not found:
        close = difflib.get_close_matches(name, [n for b, _, n in settings if b == block], n=1)
        found = [".".join(filter(None, (block, n))) for n in close]
    if not found and (words := difflib.get_close_matches(name, TRANSLATIONS, n=1, cutoff=0.85)):
        return suggest_translation(words[0], paths)
    return f" (did you mean {' or '.join(found)}?)" if len(found) in (1, 2, 3) else ""


def shown(value: Any) -> str:
    """Returns the value as YAML would have it, on one line of bounded length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    # JSON leaves some line breaks and control characters as they are, and half a surrogate pair, which no terminal has.
    return cut("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
