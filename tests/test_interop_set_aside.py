"""Tensors that an import sets aside are in the run, and in its exports again."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from expert_parallel.interop import set_aside
from expert_parallel.interop.exporting import export_run
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.hf_model import HuggingFaceModel
from expert_parallel.interop.ignored_tensors import ignored_tensors
from expert_parallel.interop.importing import import_folder
from expert_parallel.interop.set_aside import INDEX
from expert_parallel.interop.surgery import add, perform_surgery
from expert_parallel.moe.context import StepContext
from tests.test_interop import SHARD, load_ours, make_peer, same_bits, tensors_of, tokens

MTP = "model.layers.3."


def extra_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"eh_proj.weight": (16, 32), "mlp.experts.0.up_proj.weight": (10, 16), "shared_head.norm.weight": (16,)}
    drawn = {MTP + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**drawn, f"{MTP}mlp.gate.e_score_correction_bias": torch.randn(6, generator=generator).to(torch.float64)}


def with_extra(path: Path, extra: dict[str, Tensor]) -> Path:
    make_peer("deepseek_v3", torch.bfloat16).save_pretrained(path)
    save_file(load_file(path / "model.safetensors") | extra, path / "model.safetensors", {"format": "pt"})
    return path


def exported(run: Path, out: Path, dtype: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    said: list[str] = []
    export_run(run, out, family=None, dtype=dtype, shard_bytes=SHARD, print_message=said.append)
    return tensors_of(out), said


def test_multi_token_prediction_goes_back_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From several files, and converted if the export is, but for the selection bias."""
    monkeypatch.setattr(set_aside, "SHARD_BYTES", 1000)
    extra, said = extra_tensors(), list[str]()
    theirs = with_extra(tmp_path / "theirs", extra)
    run = import_folder(theirs, tmp_path / "run", SHARD, said.append)
    assert "kept 4 tensors (model.layers.3.eh_proj.weight, ...) for export, 2.8 KB" in said
    assert len(list((run / "huggingface").glob("set_aside-*.safetensors"))) == 2
    back, said = exported(run, tmp_path / "back")
    same_bits(back, load_file(theirs / "model.safetensors"))
    assert said[-1] == "exported 4 tensors (model.layers.3.eh_proj.weight, ...) as imported, not trained"
    narrow, _ = exported(run, tmp_path / "narrow", "bfloat16")
    assert torch.equal(narrow[f"{MTP}eh_proj.weight"], extra[f"{MTP}eh_proj.weight"].bfloat16())
    assert narrow[f"{MTP}mlp.gate.e_score_correction_bias"].dtype == torch.float64


@pytest.mark.parametrize("family", ["exaone_moe", "mellum", "mimo_v2_flash"])
def test_names_of_their_own_are_those_that_transformers_leaves_out(family: str) -> None:
    names = [f"{prefix}layers.0.eh_proj.weight" for prefix in ("mtp.", "model.mtp.", "model.", "model.layers.3.mtp")]
    model_class = getattr(transformers, FAMILIES[family].architecture)
    patterns = model_class._keys_to_ignore_on_load_unexpected
    expected = [name for name in names if any(re.match(pattern, name) for pattern in patterns)]
    assert list(ignored_tensors(names, 3, 0, FAMILIES[family].set_aside)) == expected != []


def test_what_an_export_cannot_have_again_is_named(tmp_path: Path) -> None:
    fp8 = {f"{MTP}eh_proj.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    run = import_folder(with_extra(tmp_path / "theirs", fp8), tmp_path / "run", SHARD, lambda note: None)
    name = next(iter(fp8))
    back, said = exported(run, tmp_path / "back")
    assert said[-1] == f"left out 1 tensor ({name}): {name} is quantized, and the export is not"
    assert name not in back
    edited = perform_surgery(run, tmp_path / "edited", add(6, [0, 1, 2], noise=0, seed=0), SHARD)
    _, said = exported(edited, tmp_path / "fewer")
    why = "blocks.1.moe.router.balance_bias_E had the shape [6] in the imported model, and has [9]"
    assert said[-1] == f"left out 1 tensor ({name}): {why}"
    (run / "huggingface" / INDEX).write_text(json.dumps({"tied": {}, "weight_map": {name: "../x.safetensors"}}))
    with pytest.raises(ValueError, match=r"assigns 'model.layers.3.eh_proj.weight' to '../x.safetensors'"):
        exported(run, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_norms_that_dense_layers_do_not_use(tmp_path: Path) -> None:
    """And no selection biases, as in files of A.X-K1: transformers leaves out the norm, and sets the biases to 0."""
    norm, bias = "model.layers.0.post_mlp_layernorm.weight", "mlp.gate.e_score_correction_bias"
    make_peer("axk1").save_pretrained(tmp_path / "theirs")
    tensors = {name: tensor for name, tensor in tensors_of(tmp_path / "theirs").items() if not name.endswith(bias)}
    tensors[norm] = torch.full((16,), 3.0)
    save_file(tensors, tmp_path / "theirs/model.safetensors", {"format": "pt"})
    there = {"attn_implementation": "eager", "experts_implementation": "eager"}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", **there).eval()(tokens()).logits
    said: list[str] = []
    run = import_folder(tmp_path / "theirs", tmp_path / "run", SHARD, said.append)
    assert f"the folder lacks 2 tensors (model.layers.1.{bias}, ...), which transformers sets to 0, too" in said
    assert any(sentence.startswith(f"set aside 1 tensor ({norm})") for sentence in said)
    torch.testing.assert_close(load_ours(run)(tokens(), StepContext()).logits, expected, rtol=0, atol=1e-5)
    part = HuggingFaceModel(tmp_path / "theirs").read_slice("blocks.1.moe.router.balance_bias_E", (2,), (3,))
    assert torch.equal(part, torch.zeros(3))
    back, _ = exported(run, tmp_path / "back")
    zeros = {f"model.layers.{layer}.{bias}": torch.zeros(6) for layer in (1, 2)}
    same_bits(back, tensors | zeros)
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors | {next(iter(zeros)): torch.zeros(6)}, tmp_path / "theirs/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate\.weight is missing"):
        HuggingFaceModel(tmp_path / "theirs")


def test_multi_token_prediction_outside_the_layers(tmp_path: Path) -> None:
    """As ERNIE 4.5 has it."""
    extra = {f"model.mtp_{name}": torch.ones(16) for name in ("emb_norm.0.weight", "block.0.input_layernorm.weight")}
    make_peer("ernie4_5_moe").save_pretrained(tmp_path / "theirs")
    tensors = tensors_of(tmp_path / "theirs") | extra
    save_file(tensors, tmp_path / "theirs/model.safetensors", {"format": "pt"})
    run = import_folder(tmp_path / "theirs", tmp_path / "run", SHARD, lambda note: None)
    same_bits(exported(run, tmp_path / "back")[0], tensors)
