"""Hugging Face folders in and out: random small models of transformers' own classes, written by transformers, imported,
compared, exported, compared bit by bit, and loaded by transformers again."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from expert_parallel.checkpoint.files import open_checkpoint
from expert_parallel.interop.exporting import export_run
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.importing import import_folder
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.transformer import Transformer
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.parameters import logical_parameters
from tests.interop_models import MODELS, WORDS
from tests.peers import peers_in_float64

SHARD = 2**30


def peer_class(name: str) -> Any:
    """transformers' class. AutoModelForCausalLM does not find all of them."""
    return getattr(transformers, FAMILIES[MODELS[name][0]].architecture)


def make_peer(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """transformers' model, in evaluation mode, with random weights: vectors around 1, matrices around 0.

    changes: further values of its config."""
    settings, model_class = MODELS[name][1], peer_class(name)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: nn.Module = model_class(model_class.config_class(**settings, **eager, **changes)).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    buffers = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for key, tensor in [*model.named_parameters(), *buffers]:
        centre = float(key.endswith("norm.weight"))
        drawn = torch.empty(tensor.shape, dtype=torch.float64).normal_(0.0, 0.3, generator=generator)
        tensor.data = (drawn + centre).to(dtype)
    return model


@cache
def tokens() -> Tensor:
    return torch.randint(0, WORDS, (3, 11), generator=torch.Generator().manual_seed(0))


def load_ours(path: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The newest checkpoint of a run, on this process."""
    checkpoint = open_checkpoint(path)
    model = build_model(ModelConfig.model_validate(checkpoint.config["model"]), dtype=dtype).eval()
    for logical in logical_parameters(model):
        logical.fill(logical.parameter, [checkpoint.read(f"weights/{name}") for name in logical.names])
    for name, buffer in model.named_buffers():
        if name.endswith("balance_bias_E"):
            buffer.copy_(checkpoint.read(f"weights/{name}"))
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        loaded = load_file(file)
        assert not loaded.keys() & found.keys()
        found |= loaded
    return found


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def greedy(model: Transformer, prompt_BS: Tensor, count: int) -> Tensor:
    """The likeliest token each time; the whole text runs again for each."""
    for _ in range(count):
        logits = model(prompt_BS, StepContext()).logits[:, -1]
        prompt_BS = torch.cat([prompt_BS, logits.argmax(-1, keepdim=True)], 1)
    return prompt_BS


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A folder with `theirs`, `run` (imported) and `back` (exported)."""
    name, folder = request.param, tmp_path_factory.mktemp("interop")
    make_peer(name).save_pretrained(folder / "theirs")
    import_folder(folder / "theirs", folder / "run", SHARD)
    export_run(folder / "run", folder / "back", family=None, dtype=None, shard_bytes=SHARD)
    return name, folder


@torch.no_grad()
def test_import_computes_the_same_logits(case: tuple[str, Path]) -> None:
    name, folder = case
    expected = make_peer(name)(tokens()).logits
    actual = load_ours(folder / "run")(tokens(), StepContext()).logits
    largest = float(expected.abs().max())
    assert largest > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, largest))


@torch.no_grad()
def test_import_computes_the_same_logits_in_float64(case: tuple[str, Path]) -> None:
    """To the last digits, so that no small difference hides behind rounding."""
    name, folder = case
    with peers_in_float64():
        expected = make_peer(name, torch.float64)(tokens()).logits
    make_peer(name, torch.float64).save_pretrained(folder / "theirs64")
    import_folder(folder / "theirs64", folder / "run64", SHARD)
    actual = load_ours(folder / "run64", torch.float64)(tokens(), StepContext()).logits
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_round_trip_keeps_every_bit(case: tuple[str, Path]) -> None:
    _, folder = case
    same_bits(tensors_of(folder / "back"), tensors_of(folder / "theirs"))
    for file in ("config.json", "generation_config.json"):
        assert json.loads((folder / "back" / file).read_text()) == json.loads((folder / "theirs" / file).read_text())


@torch.no_grad()
def test_config_is_found_again_without_the_origin(case: tuple[str, Path]) -> None:
    """The family is told from the settings alone; config.json and tensors are made from nothing else."""
    name, folder = case
    checkpoint = shutil.copytree(folder / "run/checkpoints", folder / "alone", symlinks=True)
    family, out, _ = export_run(checkpoint, folder / "fresh", family=None, dtype=None, shard_bytes=SHARD)
    there = {"attn_implementation": "eager", "experts_implementation": "eager"}
    loaded = getattr(transformers, FAMILIES[family].architecture).from_pretrained(out, **there).eval()
    torch.testing.assert_close(loaded(tokens()).logits, make_peer(name)(tokens()).logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_transformers_generates_the_same_text(case: tuple[str, Path]) -> None:
    name, folder = case
    there = {"attn_implementation": "eager", "experts_implementation": "eager"}
    loaded = peer_class(name).from_pretrained(folder / "back", **there).eval()
    prompt_BS = tokens()[:2, :3]
    ends = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask_BS = torch.ones_like(prompt_BS)
    expected = make_peer(name).generate(prompt_BS, attention_mask=mask_BS, **ends)
    assert expected.shape == (2, 15)
    assert torch.equal(loaded.generate(prompt_BS, attention_mask=mask_BS, **ends), expected)
    assert torch.equal(greedy(load_ours(folder / "run"), prompt_BS, 12), expected)
