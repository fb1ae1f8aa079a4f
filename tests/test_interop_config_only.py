"""`convert import --config-only`: a config of ours from a config.json alone, for a model without weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner, Result

from expert_parallel.cli.app import app
from expert_parallel.interop.config_only import write_config
from expert_parallel.interop.families import FAMILIES
from expert_parallel.interop.hf_model import read_model_config
from expert_parallel.training.check import format_config_report
from expert_parallel.training.config import load_config
from tests.test_interop import MODELS

Tree = dict[str, Any]


def write_theirs(folder: Path, family: str, **values: Any) -> Path:
    """A config.json, as save_pretrained writes it, with values that the class in transformers need not know."""
    config = getattr(transformers, FAMILIES[family].architecture).config_class()
    known = {key: value for key, value in values.items() if hasattr(config, key)}
    tree = json.loads(type(config)(**known).to_json_string(use_diff=False))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree | values))
    return folder / "config.json"


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["convert", "import", "--config-only", *map(str, arguments)])


def refusal(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    return result.stderr


@pytest.mark.parametrize("name", MODELS)
def test_every_family(name: str, tmp_path: Path) -> None:
    """What is read from the file again is what import makes of a folder, and `check` takes it."""
    family, values = MODELS[name]
    path = write_theirs(tmp_path / "theirs", family, **values, initializer_range=0.03, max_position_embeddings=64)
    made = write_config(path.parent, tmp_path / "ours.yaml", print_message=lambda text: None)
    config = load_config(tmp_path / "ours.yaml")
    imported = read_model_config(FAMILIES[family], json.loads(path.read_text()))
    assert config.model == made == imported.model_copy(update={"init_std": 0.03})
    assert config.training.sequence_length == 64
    assert f" {made.num_params():,} in all" in format_config_report(config, 1)


def test_the_command(tmp_path: Path) -> None:
    """DeepSeek-V3 as published: in 8 bits, with a layer of multi-token prediction."""
    published = {"quantization_config": {"quant_method": "fp8"}, "num_nextn_predict_layers": 1, "aux_loss_alpha": 0.001}
    path, out = write_theirs(tmp_path / "theirs", "deepseek_v3", **published), tmp_path / "a folder" / "ours.yaml"
    result = invoke(path, out)
    assert result.stdout.splitlines() == [
        "quantization_config ('fp8') is left out: it describes weights, and training has its own",
        "num_nextn_predict_layers (1) is left out: the model has no layers of multi-token prediction",
        "training adds a balance loss of each sequence with coefficient 0.001, which is aux_loss_alpha; transformers "
        "has no such loss",
        f"wrote {out}: 671,026,404,352 parameters, 37,552,282,624 active for a token",
        "Next:",
        f"  expert-parallel check '{out}'",
    ]
    text = out.read_text()
    assert text.startswith("# An untrained deepseek_v3 with the sizes of its config.json")
    assert f"error: {out} exists already" in refusal(path, out)
    assert out.read_text() == text


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    path, out = write_theirs(tmp_path / "theirs", "olmoe"), tmp_path / "ours.yaml"
    assert "must end with .yaml or .yml" in refusal(path, tmp_path / "ours")
    assert f"there is no file {tmp_path / 'nothing'}" in refusal(tmp_path / "nothing", out)
    assert f"there is no file {tmp_path / 'config.json'}" in refusal(tmp_path, out)
    for changed, said in (
        ({"model_type": "gpt2"}, "model_type is 'gpt2', it must be one of llama"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0: only None is supported"),
        ({"initializer_range": 0}, "initializer_range is 0: it must be above 0"),
        ({"initializer_range": "small"}, "initializer_range is 'small': it must be above 0"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1: it must be an integer from 1"),
        ({"num_experts_per_tok": 65, "num_experts": 64}, "model.moe.router.k"),
    ):
        path.write_text(json.dumps(json.loads(write_theirs(path.parent, "olmoe").read_text()) | changed))
        assert said in refusal(path, out)
    path.write_text("{")
    assert "config.json cannot be read" in refusal(path, out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["theirs"]
    path.write_text("{}")
    for source in (path, path.parent):  # without the option
        assert "--config-only" in CliRunner().invoke(app, ["convert", "import", str(source), str(out)]).stderr
