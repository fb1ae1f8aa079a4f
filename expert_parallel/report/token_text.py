"""Converts tokens to readable text: the text that each token adds to its sequence, a display name, and a class of
characters."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from expert_parallel.data.tokenizer import Tokenizer

CHARACTER_CLASSES = ("letters", "upper case", "digits", "punctuation", "spaces", "indentation", "newlines", "other")
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # a tokenizer's text for an incomplete character
LONGEST_CHARACTER = 4  # in bytes of UTF-8, hence also in tokens
VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\0": "␀"}


@dataclass(frozen=True)
class TokenText:
    """Holds the text of a token, or of several tokens that are the bytes of one character."""

    text: str
    num_tokens: int


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[TokenText]:
    """Decodes one sequence, and returns the text that each token adds. Tokens that are bytes of one character share a
    text. Each token is decoded together with the one before it, since some tokenizers drop a leading space."""
    found: list[TokenText] = []
    before: list[int] = []
    group: list[int] = []
    for token in ids:
        group.append(token)
        text = tokenizer.decode([*before, *group])[len(tokenizer.decode(before)) :]
        if text.endswith(UNKNOWN) and len(group) < LONGEST_CHARACTER:
            continue
        found.append(TokenText(text, len(group)))
        before, group = group, []
    if group:
        found.append(TokenText(tokenizer.decode(group), len(group)))
    return found


def character_classes(found: Sequence[TokenText]) -> list[int]:
    """Returns, for each token of one sequence, the index in CHARACTER_CLASSES of its class. found: from `token_texts`.

    The first character that is not whitespace decides. Whitespace alone is indentation at the beginning of a line, and
    else spaces."""
    numbers: list[int] = []
    at_line_start = False  # False at first: a sequence may begin anywhere in a line
    for piece in found:
        kind = _character_class(piece.text, at_line_start)
        numbers += [CHARACTER_CLASSES.index(kind)] * piece.num_tokens
        at_line_start = kind in ("newlines", "indentation")
    return numbers


def _character_class(text: str, at_line_start: bool) -> str:
    letter = text.lstrip()[:1]
    if not letter:
        if "\n" in text or "\r" in text:
            return "newlines"
        return "other" if not text else "indentation" if at_line_start else "spaces"
    if letter.isalpha():
        return "upper case" if letter.isupper() else "letters"
    if letter.isdigit():
        return "digits"
    return "punctuation" if unicodedata.category(letter)[0] in "PS" and letter != UNKNOWN else "other"


def display_name(tokenizer: Tokenizer, token: int) -> str:
    """Returns a token's display name: its text with whitespace made visible, or `#` and its id if it is part of a
    character."""
    text = tokenizer.decode([token])
    if not text or UNKNOWN in text:
        return f"#{token}"
    return "".join(VISIBLE.get(letter, letter if letter.isprintable() else f"\\x{ord(letter):02x}") for letter in text)
