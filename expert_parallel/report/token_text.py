"""Converts tokens to readable text: what each shows in its text, its name, and its kind of character."""

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
    """Decodes one sequence. Each token is decoded after the previous text, since some tokenizers drop a leading
    space."""
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
    """Returns the index in CHARACTER_CLASSES of each token of one sequence.

    A token counts as its first character that is no blank. Blanks are indentation if only blanks precede them in the
    line."""
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
    """Returns the display name of one token: blanks are visible, and a part of a character is shown as its number."""
    text = tokenizer.decode([token])
    if not text or UNKNOWN in text:
        return f"#{token}"
    return "".join(VISIBLE.get(letter, letter if letter.isprintable() else f"\\x{ord(letter):02x}") for letter in text)
