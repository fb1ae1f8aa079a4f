"""`convert import --config-only`: a config of ours from a config.json alone, for a model without weights; and
the configs of published models are what it makes."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from expert_parallel.cli.app import app
from expert_parallel.interop.config_only import write_config
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.hf_model import read_model_config
from expert_parallel.training.check import format_config_report
from expert_parallel.training.config import load_config
from tests.interop_models import MODELS
from tests.launches import ROOT

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
    path = write_theirs(
        tmp_path / "theirs", family, **{**values, "initializer_range": 0.03, "max_position_embeddings": 64}
    )
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
        "num_nextn_predict_layers (1) is left out: model.mtp.depth trains layers of multi-token prediction",
        "training adds a balance loss of each sequence with coefficient 0.001, which is aux_loss_alpha; transformers "
        "has no such loss",
        "experts are balanced by model.moe.router.balance_bias_rate, which is 0.001",
        f"wrote {out}: 671,026,404,352 parameters, 37,552,282,624 active for a token",
        "Next:",
        f"  expert-parallel check '{out}' --world-size 256 runtime.device=cuda training.dtype=bfloat16 "
        "training.global_batch=256 training.recompute=block 'parallel.data={kind: sharded}' parallel.ep=256",
        "To continue from the released weights, import their folder without --config-only, or train with "
        "'checkpoint.start_from={kind: hf, path: FOLDER}'.",
    ]
    report = CliRunner().invoke(app, shlex.split(result.stdout.splitlines()[-2])[1:])
    assert (report.exit_code, "does not fit" in report.stdout) == (0, False), report.output
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


# ---------------------------------------------------------------------------------------------------------------------
# configs/


def rope(theta: float) -> Tree:
    return {"rope_type": "default", "rope_theta": theta}


DEEPSEEK_YARN: Tree = {
    "rope_type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# file in configs/ -> family, the released config.json where the class in transformers has other defaults, parameters
PUBLISHED: dict[str, tuple[str, Tree, int]] = {
    "mixtral-8x7b": ("mixtral", {"router_aux_loss_coef": 0.02, "rope_parameters": rope(1e6)}, 46_702_792_704),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope(1e6),
        },
        30_532_122_624,
    ),
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}, 20_914_757_184),
    "olmoe": (
        "olmoe",
        {"num_experts": 64, "intermediate_size": 1024, "num_hidden_layers": 16, "rope_parameters": rope(1e4)},
        6_919_161_856,
    ),
    "deepseek-v3": ("deepseek_v3", {"rope_parameters": {**rope(1e4), **DEEPSEEK_YARN}}, 671_026_404_352),
}
# Billions of active parameters, as published: rounded, and OpenAI leaves the embedding out.
ACTIVE = {"mixtral-8x7b": 12.9, "qwen3-30b-a3b": 3.3, "gpt-oss-20b": 3.61, "olmoe": 1.3, "deepseek-v3": 37}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_of_a_published_model_is_its_config_json(name: str, tmp_path: Path) -> None:
    family, values, total = PUBLISHED[name]
    path, model = write_theirs(tmp_path, family, **values), load_config(ROOT / "configs" / f"{name}.yaml").model
    made = write_config(path, tmp_path / "made.yaml", print_message=lambda text: None)
    trees = [config.model_dump(mode="json") for config in (model, made)]
    for tree in trees:
        del tree["moe"]["preset"], tree["moe"]["dispatcher"]
    if name == "deepseek-v3":  # what its paper has and its config.json has not
        (loss,) = trees[0]["moe"].pop("losses")
        assert (loss["coefficient"], loss["scope"], trees[0].pop("init_std")) == (0.0001, "sequence", 0.006)
        del trees[1]["moe"]["losses"], trees[1]["init_std"]
    assert trees[0] == trees[1]

    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    experts = sum(weight.numel() for key, weight in peer.named_parameters() if ".experts." in key)
    counted = sum(weight.numel() for weight in peer.parameters())
    assert model.moe is not None
    active = counted - experts + experts * model.moe.router.k // model.moe.num_experts  # type: ignore[union-attr]
    assert (model.num_params(), model.num_active_params()) == (counted, active)
    assert counted == total
    looked_up = model.vocab_size * model.d_model if name == "gpt-oss-20b" else 0
    assert (active - looked_up) / 1e9 == pytest.approx(ACTIVE[name], rel=0.02)
