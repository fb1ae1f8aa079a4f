"""Describes every setting as rows, Markdown and JSON schemas, all derived from the Settings classes."""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_origin

from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from expert_parallel.settings import Settings, alias_of, blocks_in, kinds_of
from expert_parallel.study.definition import StudyConfig
from expert_parallel.training.config import Config

TYPES = {"integer": "int", "number": "float", "string": "text", "boolean": "bool", "object": "mapping"}
INTRODUCTION = """\
# Settings

Every setting of a run, and of a study. This page is generated from the typed settings; after a change of these, run
`expert-parallel settings --write configs`.

- A config is a YAML file: `model.num_layers` is the key `num_layers` in the block `model`. Every setting can also be
  given on the command line, after the file: `expert-parallel train CONFIG model.num_layers=8 training.clip_norm=null`.
  The value of a text or a path is all that follows the `=`, ` #` included; every other value is YAML.
- In a path, `~` is the home folder and `$NAME` or `${NAME}` an environment variable, in files and on the command line;
  `$$` is a `$`. A variable that is not set is refused. The run's own `config.yaml` has the paths as expanded.
- A text that has a meaning in YAML (`yes`, `1.5`, `*.txt`, `%x`) must stand in quotes in a file. Octal numbers (`010`)
  and numbers of base 60 (`1:30`), which exist in YAML 1.1 alone, are refused.
- Where no upper bound is given, whole numbers go up to 2,147,483,647, others up to 1e30 and, but for 0, from 1e-30.
- A block with a `kind` has the settings of that kind alone. Another name of a setting, in parentheses below its path,
  may be used in its place, in files and on the command line; resolved configs have the first name.
- `model.moe.preset` changes the defaults of `model.moe.router`, `model.moe.capacity` and `model.moe.losses`; their
  `kind` may then be left out. What a config sets wins over the preset.
- `expert-parallel settings` prints this page's blocks, `expert-parallel settings model.moe.router` one of them, and
  `expert-parallel check CONFIG --all` the values of a config with all defaults.
- Editors that know YAML schemas complete and check settings by the first line of the files in this folder:
  `# yaml-language-server: $schema=schema.json`. What depends on several settings is checked by `check` alone.
"""


@dataclass(frozen=True)
class Setting:
    """Holds one row of the settings reference as texts.

    path: of the setting in a file. alias: another name that a file may use, or None. allowed: the allowed values; empty
    if the type allows all. text: the description.
    """

    path: str
    alias: str | None
    type: str
    default: str
    allowed: str
    text: str


@dataclass(frozen=True)
class Section:
    """Holds the rows of one block of settings, such as `model.moe`, or of one kind of it.

    path: of the block; empty for the top level of the file. title: names the file. purpose: the first part of the
    description. note: the rest of the class's docstring. kind: the kinds that the rows are for, as shown; empty if
    there is only one.
    """

    path: str
    title: str
    purpose: str
    note: str
    kind: str
    settings: list[Setting]


def all_sections() -> list[Section]:
    """Returns the sections of a run's config file, and then those of a study's file."""
    return [
        section
        for title, block in (("Config of a run", Config), ("Config of a study", StudyConfig))
        for section in (_section(block, title, "", _summary(block)), *_inner_sections(block, title, ""))
    ]


def _inner_sections(block: type[Settings], title: str, path: str) -> Iterator[Section]:
    """Yields the sections of all blocks inside a block: all kinds of one, then the blocks inside them."""
    for name, field in block.model_fields.items():
        found = list(dict.fromkeys(blocks_in(field.annotation)))
        place = f"{path}.{name}".removeprefix(".") + (".NAME" if get_origin(field.annotation) is dict else "")
        for brackets, inner in found:
            kind = f"kind: {' | '.join(kinds_of(inner)) or 'a registered router'}" if len(found) > 1 else ""
            kind += " (default)" if kind and isinstance(field.default, inner) else ""
            section = _section(inner, title, place + brackets, _one_line(field.description or ""), kind)
            if isinstance(field.discriminator, str):  # pydantic then requires the kind, even if it has a default
                selector, *others = section.settings
                section = replace(section, settings=[replace(selector, default="required"), *others])
            yield section
        for brackets, inner in found:
            yield from _inner_sections(inner, title, place + brackets)


def _section(block: type[Settings], title: str, path: str, purpose: str, kind: str = "") -> Section:
    properties = block.model_json_schema(schema_generator=SettingsSchema)["properties"]
    settings = []
    for name, field in sorted(block.model_fields.items(), key=lambda item: item[0] != "kind"):
        full = f"{path}.{name}".removeprefix(".")
        shown, allowed = _type(properties[name])
        text = properties[name]["description"]
        settings.append(Setting(full, alias_of(block, name), shown, _default(field), allowed, text))
    note = _one_line((block.__doc__ or "").partition("\n\n")[2])
    return Section(path, title, purpose, note, kind, settings)


def _summary(block: type[Settings]) -> str:
    return _one_line((block.__doc__ or "").partition("\n\n")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, Settings):
        return json.dumps(value)
    kinds = kinds_of(type(value))
    return f"kind: {kinds[0]}" if len(kinds) == 1 else "its defaults"


def _type(schema: JsonSchemaValue) -> tuple[str, str]:
    """Returns a JSON schema's type and the values that it allows, in words."""
    if "anyOf" in schema:
        found = [_type(option) for option in schema["anyOf"]]
        return " or ".join(dict.fromkeys(kind for kind, _ in found)), ", ".join(filter(None, (a for _, a in found)))
    if "$ref" in schema or "properties" in schema:
        return "block", ""
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return "choice", ", ".join(f"`{value}`" for value in values)
    if schema.get("type") == "array":
        entry, allowed = _type(schema["items"])
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        count = f"{least} entries" if least == most else f"at least {least} {'entry' if least == 1 else 'entries'}"
        return f"list of {entry}", ", ".join(
            filter(None, (count if least else "", f"each {allowed}" if allowed else ""))
        )
    lowest = f"≥ {schema['minimum']:g}" if "minimum" in schema else ""
    above = f"> {schema['exclusiveMinimum']:g}" if "exclusiveMinimum" in schema else ""
    highest = f"≤ {schema['maximum']:g}" if "maximum" in schema else ""
    below = f"< {schema['exclusiveMaximum']:g}" if "exclusiveMaximum" in schema else ""
    nonempty = "not empty" if schema.get("minLength") else ""
    pattern = f"`{schema['pattern']}`" if "pattern" in schema else ""
    allowed = ", ".join(filter(None, (lowest, above, highest, below, nonempty, pattern)))
    name = str(schema.get("format", schema.get("type", "any")))
    return TYPES.get(name, name), allowed


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def markdown() -> str:
    """Returns the reference page."""
    lines, before = [INTRODUCTION], None
    for section in all_sections():
        if before is None or section.title != before.title:
            lines += [f"## {section.title}", ""]
        elif section.path != before.path:
            lines += [f"### `{section.path}`", ""]
        if before is None or (section.title, section.path) != (before.title, before.path):
            lines += [*_wrapped(section.purpose)]
        if section.kind:
            lines += [f"#### {section.kind}", ""]
        lines += [*_wrapped(section.note), *_table(section.settings)]
        before = section
    return "\n".join(lines).rstrip("\n") + "\n"


def _wrapped(text: str) -> list[str]:
    return [*textwrap.wrap(text, 120, break_on_hyphens=False), ""] if text else []


def _table(settings: list[Setting]) -> Iterator[str]:
    yield from ("| setting | type | default | allowed | what it does |", "|---|---|---|---|---|")
    for row in settings:
        name = f"`{row.path}`" + (f" (`{row.alias}`)" if row.alias else "")
        default = row.default if row.default in ("required", "its defaults") else f"`{row.default}`"
        yield "| " + " | ".join((name, row.type, default, row.allowed.replace("|", "\\|"), row.text)) + " |"
    yield ""


# ---------------------------------------------------------------------------------------------------------------------
# JSON schemas


class SettingsSchema(GenerateJsonSchema):
    """Generates JSON schemas for editors: no titles, aliases beside own names, and kinds that may be left out.

    A kind may be left out where a preset or a default gives it, so a block is checked against any of its kinds.
    """

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Returns False: a title would only repeat the name."""
        return False

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        """Returns the union of all kinds."""
        return {"anyOf": super().tagged_union_schema(schema)["oneOf"]}

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """Returns a block's schema."""
        result, block = super().model_schema(schema), schema["cls"]
        result.pop("title", None)
        result["description"] = _summary(block)
        required = set(result.get("required", ()))
        for name, part in list(result["properties"].items()):
            # A `kind` without a text of its own has that of its class.
            part["description"] = _one_line(part.get("description", _summary(block)))
            if alias := alias_of(block, name):
                result["properties"][alias] = part | {"description": f"Another name of `{name}`. {part['description']}"}
                result.setdefault("allOf", []).append(
                    {"oneOf": [{"required": [name]}, {"required": [alias]}]}
                    if name in required
                    else {"not": {"required": [name, alias]}}
                )
                required.discard(name)
        if len(kinds_of(block)) == 1:
            required.discard("kind")
        result["required"] = [name for name in result["properties"] if name in required]
        return result


def run_schema() -> str:
    """Returns the JSON schema of a run's config."""
    return _as_json(Config.model_json_schema(schema_generator=SettingsSchema))


def study_schema() -> str:
    """Returns the JSON schema of a study's config, whose `base` and variants are parts of a run's config."""
    part = _without_required(Config.model_json_schema(schema_generator=SettingsSchema))
    whole = StudyConfig.model_json_schema(schema_generator=SettingsSchema)
    blocks = part.pop("$defs")
    whole["$defs"] |= blocks
    whole["properties"]["base"] |= part | {"description": whole["properties"]["base"]["description"]}
    model = whole["$defs"]["VariantConfig"]["properties"]["model"]
    model |= blocks["ModelConfig"] | {"description": model["description"]}
    return _as_json(whole)


def _without_required(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_required(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _without_required(value) for key, value in schema.items() if key not in ("required", "allOf")}


def _as_json(schema: JsonSchemaValue) -> str:
    draft = {"$schema": GenerateJsonSchema.schema_dialect}
    return json.dumps(draft | schema, indent=1, ensure_ascii=False) + "\n"
