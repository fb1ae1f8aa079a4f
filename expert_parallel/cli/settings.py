"""Defines the command `expert-parallel settings`."""

import difflib
import re
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from expert_parallel.cli.options import exit_on_user_error
from expert_parallel.cli.reference import Section, Setting, all_sections, markdown, run_schema, study_schema
from expert_parallel.sentences import suggest_translation
from expert_parallel.settings import setting_paths
from expert_parallel.training.config import Config
from expert_parallel.translations import translation_table

WIDTH = 100  # columns of the printed sentences
TABLE_BEGINS, TABLE_ENDS = "<!-- generated: translations -->", "<!-- end of translations -->"  # in configs/README.md


def settings(
    path: Annotated[
        str | None, typer.Argument(metavar="PATH", help="a block or a setting, for example model.moe.router")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="write reference.md, schema.json and study.schema.json there instead, and the table of other systems' "
            "words into a README.md that has a place for it",
        ),
    ] = None,
) -> None:
    """Print the settings of a config: all blocks, or one block with its types, defaults and allowed values.

    Example: `expert-parallel settings model.moe.router`
    """
    if write is not None:
        files = reference_files()
        with exit_on_user_error(OSError):
            for name, text in files.items():
                (write / name).write_text(text, encoding="utf-8")
            if (page := write / "README.md").exists():
                page.write_text(with_translations(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {', '.join(files)} in {write}")
        return
    with exit_on_user_error(ValueError):
        lines = overview() if path is None else described(path)
    print("\n".join(lines))


def reference_files() -> dict[str, str]:
    """Returns the content of each generated file of configs/, by name."""
    return {"reference.md": markdown(), "schema.json": run_schema(), "study.schema.json": study_schema()}


def with_translations(page: str) -> str:
    """Returns a Markdown page whose table of translations, between two comments, is that of this version."""
    before, begins, rest = page.partition(TABLE_BEGINS)
    _, ends, after = rest.partition(TABLE_ENDS)
    return f"{before}{begins}\n\n{translation_table()}\n\n{ends}{after}" if ends else page


def overview() -> list[str]:
    """Returns a line for each block, and for each setting outside of blocks."""
    lines: list[str] = []
    paths: set[str] = set()
    title = ""
    for section in all_sections():
        if section.title != title:
            title = section.title
            paths = set()
            lines += ["", title, ""]
            rows = [(row.path, row.text) for row in section.settings if "block" not in row.type]
        else:
            rows = [(section.path, section.purpose)] if section.path not in paths else []
        paths.add(section.path)
        lines += [f"  {path:<30} {text}" for path, text in rows]
    return [*lines[1:], "", "expert-parallel settings PATH prints the settings of a block, or one setting."]


def described(path: str) -> list[str]:
    """Returns the rows of a block or a setting. Raises a ValueError that suggests similar paths if there is none."""
    sections, wanted = all_sections(), _plain(path)
    lines: list[str] = []
    for section in sections:
        is_block = _plain(section.path) == wanted
        rows = [row for row in section.settings if is_block or wanted in _names(row)]
        if not rows:
            continue
        if is_block or section.kind:
            lines += [f"{section.path}{f', {section.kind}' if section.kind else ''}"]
        if is_block and not section.kind:
            lines += textwrap.wrap(f"{section.purpose} {section.note}".strip(), WIDTH)
        for row in rows:
            lines += ["", *_printed(row)]
        lines += [""]
    if not lines:
        raise ValueError(f"there is no setting {path!r}{_similar(wanted, sections)}")
    return lines[:-1]


def _plain(path: str) -> str:
    """Returns a path without the brackets of lists: losses[0].kind is losses.kind."""
    return re.sub(r"\[\d*\]", "", path)


def _names(row: Setting) -> list[str]:
    own = _plain(row.path)
    return [own] if row.alias is None else [own, f"{own.rpartition('.')[0]}.{row.alias}"]


def _printed(row: Setting) -> list[str]:
    alias = f" (or {row.alias})" if row.alias else ""
    default = row.default if row.default == "required" else f"default {row.default}"
    facts = ", ".join(filter(None, (row.type, default, row.allowed.replace("`", ""))))
    return [
        f"  {row.path}{alias}",
        f"      {facts}",
        *textwrap.wrap(row.text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]


def _similar(wanted: str, sections: list[Section]) -> str:
    """Suggests the translation of another system's word, or settings with the same last name or a similar path."""
    if translated := suggest_translation(wanted, setting_paths(Config)):
        return translated
    paths = list(dict.fromkeys(name for section in sections for row in section.settings for name in _names(row)))
    last = wanted.rpartition(".")[2]
    same = [path for path in paths if path.rpartition(".")[2] == last]
    block = wanted.rpartition(".")[0]
    inside = [path for path in paths if path.rpartition(".")[0] == block]
    close = difflib.get_close_matches(wanted, inside, n=3, cutoff=0.8) or difflib.get_close_matches(wanted, paths, n=3)
    found = same[:5] or close
    return f" (did you mean {' or '.join(found)}?)" if found else ": `expert-parallel settings` lists all blocks"
