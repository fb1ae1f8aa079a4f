"""Layers of multi-token prediction of Hugging Face folders: imported, compared with transformers' own MtpModel,
exported bit for bit, and set aside with the reason where they cannot be imported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_layers import MtpModel

from expert_parallel.interop.exporting import choose_family, export_run
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.hf_model import HuggingFaceModel
from expert_parallel.interop.importing import import_folder
from expert_parallel.model.config import ModelConfig
from expert_parallel.moe.context import StepContext
from tests.interop_models import MODELS
from tests.peers import peers_in_float64
from tests.quantized_folders import quantize_fp8
from tests.test_interop import SHARD, load_ours, make_peer, same_bits, tensors_of, tokens
from tests.test_interop_command import done, refusal

LAYERS = 3  # of the small models


def folder_with_mtp(name: str, folder: Path, count: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A folder of transformers' model, with `count` further layers whose tensors are drawn, and its tensors. The names
    and shapes of their blocks are those of the last layer that transformers has written."""
    make_peer(name, dtype, num_nextn_predict_layers=count).save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    tensors, generator = load_file(file), torch.Generator().manual_seed(5)
    last, width = f"model.layers.{LAYERS - 1}.", tensors["model.norm.weight"].shape[0]
    shapes = {key.removeprefix(last): value.shape for key, value in tensors.items() if key.startswith(last)}
    shapes |= {f"{norm}.weight": torch.Size([width]) for norm in ("enorm", "hnorm", "shared_head.norm")}
    shapes["eh_proj.weight"] = torch.Size([width, 2 * width])
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    for layer in range(LAYERS, LAYERS + count):
        for leaf, shape in shapes.items():
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 + float("norm" in leaf)
            tensors[f"model.layers.{layer}.{leaf}"] = drawn.to(dtype)
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = head.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "count"), [("deepseek_v3", 2), ("glm4_moe", 1), pytest.param("glm4_moe_lite", 1, marks=pytest.mark.full)]
)
def test_its_logits_are_those_of_transformers_and_it_goes_back_bit_for_bit(
    name: str, count: int, tmp_path: Path
) -> None:
    tensors = folder_with_mtp(name, tmp_path / "theirs", count)
    with peers_in_float64():
        peer_class = type(make_peer(name))
        settings: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
        peer = peer_class.from_pretrained(tmp_path / "theirs", dtype=torch.float64, **settings).eval()
        if name == "glm4_moe_lite":  # its class has no settings of these layers
            peer.config.num_mtp_layers, peer.config.mtp_mlp_layer_types = count, ["sparse"] * count
        # Where transformers looks for them: the class names those of the released sizes alone.
        peer._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS + k}\." for k in range(count)]
        further = MtpModel.from_pretrained(peer).eval()
        hidden = peer(tokens(), output_hidden_states=True).hidden_states[-1]
        expected = []
        for depth in range(1, count + 1):
            given = tokens()[:, depth:]
            positions = torch.arange(depth, tokens().shape[1])[None]
            hidden = further.forward_layer(depth - 1, hidden[:, :-1], positions, None, input_ids=given)
            expected.append(further._project_to_logits(hidden))

    messages: list[str] = []
    import_folder(tmp_path / "theirs", tmp_path / "run", SHARD, print_message=messages.append)
    model = load_ours(tmp_path / "run", torch.float64)
    assert model.config.mtp is not None
    assert any(f"model.mtp trains {count} layer" in message for message in messages)
    for depth, logits in enumerate(model(tokens(), StepContext()).mtp_logits, start=1):
        torch.testing.assert_close(logits[:, :-depth], expected[depth - 1], rtol=1e-9, atol=1e-10)

    export_run(tmp_path / "run", tmp_path / "back", family=None, dtype=None, shard_bytes=SHARD)
    same_bits(tensors_of(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back/config.json").read_text())["num_nextn_predict_layers"] == count


def test_what_cannot_be_imported_is_set_aside_with_the_reason(tmp_path: Path) -> None:
    tensors = folder_with_mtp("deepseek_v3", tmp_path / "theirs", 1, torch.bfloat16)
    (file,) = (tmp_path / "theirs").glob("*.safetensors")
    head, odd = "model.layers.3.shared_head.head.weight", "model.layers.3.self_attn.q_a_proj.bias"
    for changed, reason in (
        (tensors | {head: tensors[head] + 1}, f"model.mtp is null: {head} differs from lm_head.weight"),
        (tensors | {head: tensors[head].float()}, f"{head} differs from lm_head.weight"),
        (tensors | {odd: torch.ones(6)}, f"model.mtp is null: {odd} is a tensor that its layers do not have here"),
        ({k: v for k, v in tensors.items() if "hnorm" not in k}, "model.layers.3.hnorm.weight is missing"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        source = HuggingFaceModel(tmp_path / "theirs")
        assert source.model.mtp is None
        assert any(reason in note for note in source.notes), source.notes
        assert any(note.startswith("set aside") for note in source.notes)
    copies = {k: v for k, v in tensors.items() if "embed_tokens" not in k or k == "model.embed_tokens.weight"}
    save_file(copies, file, metadata={"format": "pt"})  # transformers does without the copies, too
    assert HuggingFaceModel(tmp_path / "theirs").model.mtp is not None


@pytest.mark.full
def test_a_run_may_leave_them_out(tmp_path: Path) -> None:
    """Each start says what it does not load, and one from the folder keeps it for export; with model.mtp both load
    it."""
    tensors = folder_with_mtp("deepseek_v3", tmp_path / "theirs", 1, torch.bfloat16)
    import_folder(tmp_path / "theirs", tmp_path / "imported", SHARD, print_message=lambda note: None)
    sizes = ["training.steps=1", "training.global_batch=2", "training.sequence_length=16", "evaluation.sequences=4"]
    sizes = [tmp_path / "imported/config.yaml", *sizes, "data={kind: stdlib}"]
    from_folder = f"checkpoint.start_from={{kind: hf, path: {tmp_path}/theirs}}"

    text = done("train", *sizes, f"run.folder={tmp_path}/a", from_folder, "model.mtp=null")
    assert "for export" in text
    done("convert", "export", tmp_path / "a", tmp_path / "back")
    kept = {k: v for k, v in tensors.items() if k.startswith("model.layers.3.")}
    same_bits({k: v for k, v in tensors_of(tmp_path / "back").items() if k in kept}, kept)

    from_run = f"checkpoint.start_from={tmp_path}/imported"
    text = done("train", *sizes, f"run.folder={tmp_path}/b", from_run, "model.mtp=null")
    assert "left out " in text
    assert "tensors (weights/blocks.3.attention.kv_down.weight, ...), as model.mtp is null" in text
    starts = {"c": from_folder, "d": from_run}
    with_them = [done("train", *sizes, f"run.folder={tmp_path}/{name}", start) for name, start in starts.items()]
    losses = [[line for line in said.splitlines() if "held-out loss" in line] for said in with_them]
    assert losses[0] == losses[1]
    metrics = json.loads((tmp_path / "c/metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss/mtp_1", "train/loss"} <= metrics.keys()
    other = refusal("train", *sizes, f"run.folder={tmp_path}/e", from_folder, "model.mtp.depth=2")
    assert "model.mtp.depth is 1 there and 2 here" in other


def test_a_family_without_such_layers_is_not_chosen() -> None:
    family, _ = MODELS["mixtral"]
    config = FAMILIES[family].read(json.loads(make_peer("mixtral").config.to_json_string(use_diff=False)))
    model = ModelConfig.model_validate({**config, "mtp": {"depth": 1}})
    with pytest.raises(ValueError, match=r"model\.mtp\.depth is 1, the family has no layers of multi-token prediction"):
        choose_family(model, family, None)


@pytest.mark.full
def test_fp8_goes_back_bit_for_bit(tmp_path: Path) -> None:
    """Trained layers, too: their experts' weights have scales as all others."""
    folder_with_mtp("deepseek_v3", tmp_path / "theirs", 1, torch.float32)
    quantize_fp8(tmp_path / "theirs", (7, 9), torch.float32)
    (file,) = (tmp_path / "theirs").glob("*.safetensors")
    tensors, layer = load_file(file), f"model.layers.{LAYERS}."
    for copy, name in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):  # never quantized
        tensors[f"{layer}{copy}.weight"] = tensors[f"{name}.weight"].clone()
        tensors.pop(f"{layer}{copy}.weight_scale_inv", None)
    save_file(tensors, file, metadata={"format": "pt"})
    import_folder(tmp_path / "theirs", tmp_path / "run", SHARD, print_message=lambda note: None)
    assert load_ours(tmp_path / "run").config.mtp is not None
    export_run(tmp_path / "run", tmp_path / "back", family=None, dtype="fp8", shard_bytes=SHARD)
    same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs"))
