"""Tokens as people read them: what each shows in its text, what it is called, and what kind of character it is."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from expert_parallel.data.tokenizer import Tokenizer

CLASSES = ("letters", "upper case", "digits", "punctuation", "spaces", "indentation", "newlines", "other")
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of half a character
LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens at most
VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\0": "␀"}


@dataclass(frozen=True)
class Piece:
    """A token's text; of a character whose bytes are several tokens, all of them."""

    text: str
    num_tokens: int


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Piece]:
    """One sequence. Each token is decoded behind the piece before it: some tokenizers drop the space that begins a
    text."""
    found: list[Piece] = []
    before: list[int] = []
    group: list[int] = []
    for token in ids:
        group.append(token)
        text = tokenizer.decode([*before, *group])[len(tokenizer.decode(before)) :]
        if text.endswith(UNKNOWN) and len(group) < LONGEST_CHARACTER:
            continue
        found.append(Piece(text, len(group)))
        before, group = group, []
    if group:
        found.append(Piece(tokenizer.decode(group), len(group)))
    return found


def classes(found: Sequence[Piece]) -> list[int]:
    """Of each token of one sequence, the number in CLASSES. A token of several characters is what its first one is that
    is no blank. Blanks are indentation where nothing else stands before them in the line."""
    numbers: list[int] = []
    at_line_start = False  # a sequence may begin anywhere in a line
    for piece in found:
        kind = _class(piece.text, at_line_start)
        numbers += [CLASSES.index(kind)] * piece.num_tokens
        at_line_start = kind in ("newlines", "indentation")
    return numbers


def _class(text: str, at_line_start: bool) -> str:
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


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """Of one token, in a list: blanks are visible, half a character is its number."""
    text = tokenizer.decode([token])
    if not text or UNKNOWN in text:
        return f"#{token}"
    return "".join(VISIBLE.get(letter, letter if letter.isprintable() else f"\\x{ord(letter):02x}") for letter in text)
