"""configs/reference.md and the JSON schemas are what the typed settings generate, every setting has a sentence, the
schemas accept the shipped configs, and `expert-parallel settings` prints the settings."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from expert_parallel.cli.app import app
from expert_parallel.cli.reference import all_sections
from expert_parallel.cli.settings import reference_files
from expert_parallel.config import load_tree
from expert_parallel.moe.config import PRESETS
from expert_parallel.settings import Settings, blocks_in, setting_paths
from expert_parallel.study.definition import StudyConfig
from expert_parallel.training.config import Config
from tests.launches import ROOT, assert_refused, run_configs, small_config

CONFIGS = ROOT / "configs"
FILES = reference_files()
RUN_SCHEMA, STUDY_SCHEMA = json.loads(FILES["schema.json"]), json.loads(FILES["study.schema.json"])


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["settings", *arguments])


# ---------------------------------------------------------------------------------------------------------------------
# The generated files


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_what_the_settings_say(name: str) -> None:
    assert (CONFIGS / name).read_text(encoding="utf-8") == FILES[name], (
        "the settings have changed: look at the difference after `.venv/bin/expert-parallel settings --write configs`"
    )


def test_every_setting_has_a_row() -> None:
    rows = {row.path for section in all_sections() for row in section.settings}
    assert set(setting_paths(Config)) <= rows
    assert all(f"| `{path}`" in FILES["reference.md"] for path in setting_paths(Config))


def blocks_of(block: type[Settings]) -> set[type[Settings]]:
    inner = {found for field in block.model_fields.values() for _, found in blocks_in(field.annotation)}
    return {block}.union(*(blocks_of(found) for found in inner))


def test_every_setting_has_a_sentence() -> None:
    for block in blocks_of(Config) | blocks_of(StudyConfig):
        assert block.__doc__, block
    for section in all_sections():
        for row in section.settings:
            assert re.fullmatch(r"[A-Z].*\.", row.text), f"{row.path}: {row.text!r} is no sentence"


def test_the_presets_are_named() -> None:
    (row,) = (row for section in all_sections() for row in section.settings if row.path == "model.moe.preset")
    assert re.findall(r"`(\w+)`", row.text) == list(PRESETS)


# ---------------------------------------------------------------------------------------------------------------------
# The schemas


def errors(value: Any, schema: dict[str, Any], whole: dict[str, Any], path: str = "") -> list[str]:
    """What does not fit, by the keywords of JSON schema that ours have. An unknown keyword is an error of the test."""
    found: list[str] = []
    for keyword, limit in schema.items():
        match keyword:
            case "$ref":
                found += errors(value, whole["$defs"][limit.removeprefix("#/$defs/")], whole, path)
            case "anyOf" | "oneOf":
                options = [errors(value, option, whole, path) for option in limit]
                passed = sum(not option for option in options)
                found += [] if passed == 1 or (passed and keyword == "anyOf") else [f"{path}: {keyword}", *min(options)]
            case "allOf":
                found += [error for option in limit for error in errors(value, option, whole, path)]
            case "not":
                found += [] if errors(value, limit, whole, path) else [f"{path}: not {limit}"]
            case "type":
                found += [] if is_of_type(value, limit) else [f"{path}: {value!r} is no {limit}"]
            case "enum" | "const":
                found += (
                    [] if value in (limit if keyword == "enum" else [limit]) else [f"{path}: {value!r}, not {limit}"]
                )
            case "required":
                found += [
                    f"{path}.{name} is missing" for name in limit if isinstance(value, dict) and name not in value
                ]
            case "properties" if isinstance(value, dict):
                for name in limit.keys() & value.keys():
                    found += errors(value[name], limit[name], whole, f"{path}.{name}")
            case "additionalProperties" if isinstance(value, dict):
                others = value.keys() - schema.get("properties", {}).keys()
                found += [f"{path}.{name} is unknown" for name in others if limit is False]
                if isinstance(limit, dict):
                    found += [e for name in others for e in errors(value[name], limit, whole, f"{path}.{name}")]
            case "items" if isinstance(value, list):
                found += [e for entry in value for e in errors(entry, limit, whole, f"{path}[]")]
            case "minItems" | "minLength" | "minProperties":
                found += [] if len(value) >= limit else [f"{path}: too short"]
            case "maxItems":
                found += [] if len(value) <= limit else [f"{path}: too long"]
            case "pattern":
                found += [] if re.search(limit, str(value)) else [f"{path}: {value!r}"]
            case "minimum" | "exclusiveMinimum" | "maximum" | "exclusiveMaximum" if isinstance(value, int | float):
                fits = {"minimum": value >= limit, "exclusiveMinimum": value > limit, "maximum": value <= limit}
                found += [] if fits.get(keyword, value < limit) else [f"{path}: {value}, {keyword} {limit}"]
            case _:
                known = (
                    "properties",
                    "additionalProperties",
                    "items",
                    "default",
                    "description",
                    "format",
                    "$defs",
                    "$schema",
                )
                assert keyword in known or keyword.lower().endswith("imum"), keyword
    return found


def is_of_type(value: Any, name: str) -> bool:
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "null": type(None)}
    if name == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kinds[name]) and not (name == "integer" and isinstance(value, bool))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_fits_the_schema_that_it_names(path: Path) -> None:
    name = "study.schema.json" if path.stem == "study" else "schema.json"
    assert path.read_text().startswith(f"# yaml-language-server: $schema={name}\n")
    schema = json.loads(FILES[name])
    assert errors(load_tree(path), schema, schema) == []


def test_all_shipped_run_configs_are_there() -> None:
    assert set(run_configs()) <= set(CONFIGS.glob("**/*.yaml"))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": {"num_layer": 2}}, ".model.num_layer is unknown"),
        ({"model": {"moe": {"router": {"kind": "top_k", "kk": 2}}}}, ".model.moe.router: anyOf"),
        ({"model": {"moe": {"experts": {"hidden": 8, "ffn_hidden_size": 8}}}}, ".model.moe.experts: oneOf"),
        ({"training": {"dtype": "float16"}}, ".training.dtype: 'float16', not"),
        ({"training": {"steps": 0}}, ".training.steps: 0, minimum 1"),
        ({"run": {}}, ".run.folder is missing"),
    ],
)
def test_the_schema_finds_mistakes(change: dict[str, Any], error: str, tmp_path: Path) -> None:
    good = yaml.safe_load(small_config(tmp_path).read_text())
    assert errors(good, RUN_SCHEMA, RUN_SCHEMA) == []

    def merged(below: Any, above: Any) -> Any:
        both = isinstance(below, dict) and isinstance(above, dict) and above
        return {**below, **{k: merged(below.get(k), v) for k, v in above.items()}} if both else above

    found = errors(merged(good, change), RUN_SCHEMA, RUN_SCHEMA)
    assert any(line.startswith(error) for line in found), found


def test_the_schemas_let_kinds_and_own_names_out() -> None:
    blocks = RUN_SCHEMA["$defs"]
    preset = {"preset": "switch", "num_experts": 4, "experts": {"ffn_hidden_size": 8}, "capacity": {"train": 1.5}}
    assert errors(preset, blocks["MoEConfig"], RUN_SCHEMA) == []
    assert errors({"kind": "mine", "temperature": 3}, blocks["RegisteredRouterConfig"], RUN_SCHEMA) == []
    assert errors({"folder": "x"}, STUDY_SCHEMA, STUDY_SCHEMA) != []


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_without_a_path_all_blocks_are_printed() -> None:
    result = invoke()
    assert result.exit_code == 0
    for path in ("model.moe.router", "training.optimizer", "data.corpora[]", "seed", "variants.NAME"):
        assert re.search(rf"^  {re.escape(path)} +[A-Z]", result.stdout, re.MULTILINE), path


def test_a_block_is_printed_with_all_kinds() -> None:
    result = invoke("model.moe.router")
    assert result.exit_code == 0
    for text in ("kind: top_k (default)", "kind: sinkhorn", "model.moe.router.tolerance", "float, default 0.0001, > 0"):
        assert text in result.stdout


@pytest.mark.parametrize("path", ["model.moe.losses[0].coefficient", "model.moe.losses.coefficient"])
def test_a_setting_of_a_list_is_printed(path: str) -> None:
    assert invoke(path).stdout.count("model.moe.losses[].coefficient") == 4  # of all kinds


def test_a_setting_is_found_by_its_alias() -> None:
    assert "training.global_batch (or global_batch_size)" in invoke("training.global_batch_size").stdout


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("training.learning_rate", "did you mean training.optimizer.learning_rate?"),
        ("model.moe.num_expert", "did you mean model.moe.num_experts"),
        ("training.lr", "did you mean "),
        ("zzzzzz", "`expert-parallel settings` lists all blocks"),
    ],
)
def test_an_unknown_path_is_refused(path: str, error: str) -> None:
    result = invoke(path)
    assert_refused(result, f"there is no setting '{path}'")
    assert error in result.stderr


def test_the_files_are_written(tmp_path: Path) -> None:
    assert invoke("--write", str(tmp_path)).exit_code == 0
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == FILES
    assert_refused(invoke("--write", str(tmp_path / "none")), "")
