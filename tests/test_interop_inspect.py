"""`convert inspect`: what a Hugging Face folder is, without its weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_parallel.data.tokenizer import train_tokenizer
from expert_parallel.interop.folder import HuggingFaceFolder
from tests.launches import ROOT
from tests.test_interop_command import TEXT, done, refusal
from tests.test_interop_mtp import folder_with_mtp
from tests.test_interop_set_aside import extra_tensors, with_extra


@pytest.fixture
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("read", "read_rows"):
        monkeypatch.setattr(HuggingFaceFolder, name, lambda *arguments: pytest.fail("weights are read"))


@pytest.mark.usefixtures("no_weights_are_read")
def test_a_folder_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    theirs = with_extra(tmp_path / "theirs", extra_tensors())
    train_tokenizer([TEXT * 20], 259, theirs / "tokenizer.json")
    text = done("convert", "inspect", theirs)
    assert "family               deepseek_v3 (DeepseekV3ForCausalLM)\n" in text
    assert "1 of safetensors, 52.7 KB: 20,534 BF16, 688 F32, 6 F64\n" in text
    assert "tokenizer.json, 259 ids\n" in text
    assert "MTP                  694 numbers in 4 tensors beside the model\n" in text
    assert f"result               can be imported: convert import {theirs} OUT\n" in text.replace("\n" + " " * 21, " ")
    assert (
        "check OUT.yaml --world-size 1 runtime.device=cuda training.dtype=bfloat16\nparameters           20,522" in text
    )
    found = json.loads(done("convert", "inspect", "--json", theirs))
    assert (found["importable"], found["model"]["parameters"], found["training"]["gpus"]) == (True, 20522, 1)
    assert found["multi_token_prediction"] == {"tensors": 4, "elements": 694}

    tensors = load_file(theirs / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, theirs / "model.safetensors")
    (theirs / "generation_config.json").write_text("{")
    train_tokenizer([TEXT * 20], 300, theirs / "tokenizer.json")
    found = json.loads(done("convert", "inspect", "--json", theirs))
    shape, *others = found["refusals"]
    assert shape == "model.norm.weight has shape [3], expected [16]"
    assert any("generation_config.json cannot be read" in sentence for sentence in others)
    assert not found["importable"]
    assert "the weights cannot be imported, config.json can" in done("convert", "inspect", theirs)


def test_what_an_import_trains_is_counted_and_what_it_does_not_read_is_not(tmp_path: Path) -> None:
    """Layers of multi-token prediction take parameters and memory; a further file beside the index's does not count."""
    theirs = tmp_path / "theirs"
    folder_with_mtp("deepseek_v3", theirs, 1, torch.bfloat16)
    text, found = done("convert", "inspect", theirs), json.loads(done("convert", "inspect", "--json", theirs))
    assert found["model"]["parameters"] == 26264
    assert "check OUT.yaml --world-size 1 runtime.device=cuda training.dtype=bfloat16 model.mtp.depth=1\n" in text
    assert "\nparameters           26,264 in all" in text
    assert "\nfurther tokens       1, predicted by" in text
    shutil.copyfile(theirs / "model.safetensors", theirs / "consolidated.safetensors")
    assert json.loads(done("convert", "inspect", "--json", theirs))["files"] == found["files"]
    assert found["files"]["count"] == 1
    (theirs / "config.json").write_text(json.dumps({"model_type": "\x1b[31m", "architectures": ["x" * 5000]}))
    text = done("convert", "inspect", theirs)
    assert text.startswith("family               '\\x1b[31m' ('xxx")
    assert max(map(len, text.splitlines())) <= 120


def test_a_config_alone_and_models_that_are_not_supported(tmp_path: Path) -> None:
    published = ROOT / "tests/published/deepseek_v3.json"
    text = done("convert", "inspect", published)
    assert "config.json alone, no weights" in text
    assert "can be imported: convert import --config-only" in text
    assert "\nTo train it, 256 GPUs of 80 GB have the memory, and no fewer:\n" in text
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_next"}))
    text = done("convert", "inspect", tmp_path)
    assert "refused              model_type is 'qwen3_next': its" in text
    assert text.endswith("result               cannot be imported\n")
    assert f"there is no folder {tmp_path}/x" in refusal("convert", "inspect", tmp_path / "x")
    (tmp_path / "config.json").unlink()
    assert "it has no config.json" in refusal("convert", "inspect", tmp_path)
