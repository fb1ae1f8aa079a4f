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
from expert_parallel.interop.families import FAMILIES
from expert_parallel.interop.importing import import_folder
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.transformer import Transformer
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.parameters import logical_parameters
from tests.peers import peers_in_float64

WORDS, SHARD = 260, 2**30
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, **NO_ENDS}
HEADS = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 12}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 500.0}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "intermediate_size": 12,
    "moe_intermediate_size": 10,
    "kv_lora_rank": 8,
    "q_lora_rank": 6,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> the family, and what its config says beside the defaults of the class: each part of a family is on somewhere.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**HEADS, "num_local_experts": 4, "head_dim": 6, "rms_norm_eps": 1e-3}),
    "mixtral with a window": (
        "mixtral",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 4},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**HEADS, "moe_intermediate_size": 10, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 6},
    ),
    "qwen3_moe with all parts": (
        "qwen3_moe",
        {
            **HEADS,
            "moe_intermediate_size": 10,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "attention_bias": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 4,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "qwen3_moe with a step": (
        "qwen3_moe",
        {
            **HEADS,
            "moe_intermediate_size": 10,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": ("olmoe", {**HEADS, "num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe with all parts": (
        "olmoe",
        {
            **HEADS,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "n_group": 3, "topk_group": 2}),
    "deepseek_v3 with yarn": (
        "deepseek_v3",
        {
            **LATENT,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 2.0, "beta_slow": 0.5},
        },
    ),
    "deepseek_v3 without a query latent": (
        "deepseek_v3",
        {
            **LATENT,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "rope_interleave": False,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {**HEADS, "head_dim": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    "gpt_oss without biases": (
        "gpt_oss",
        {
            **HEADS,
            "head_dim": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 3,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "llama": ("llama", HEADS),
    "llama with all parts": (
        "llama",
        {
            **HEADS,
            "head_dim": 6,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
        },
    ),
    "qwen2": ("qwen2", HEADS),
    "qwen2 with windows": (
        "qwen2",
        {
            **HEADS,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {**HEADS, "head_dim": 6}),
    "qwen3 with all parts": (
        "qwen3",
        {
            **HEADS,
            "attention_bias": True,
            "head_dim": 6,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def make_peer(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """transformers' model, in evaluation mode, with random weights: vectors around 1, matrices around 0.

    changes: further values of its config."""
    family, settings = MODELS[name]
    model_class = getattr(transformers, FAMILIES[family].architecture)
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
    _, out, _ = export_run(checkpoint, folder / "fresh", family=None, dtype=None, shard_bytes=SHARD)
    there = {"attn_implementation": "eager", "experts_implementation": "eager"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, **there).eval()
    torch.testing.assert_close(loaded(tokens()).logits, make_peer(name)(tokens()).logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_transformers_generates_the_same_text(case: tuple[str, Path]) -> None:
    name, folder = case
    there = {"attn_implementation": "eager", "experts_implementation": "eager"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "back", **there).eval()
    prompt_BS = tokens()[:2, :3]
    ends = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask_BS = torch.ones_like(prompt_BS)
    expected = make_peer(name).generate(prompt_BS, attention_mask=mask_BS, **ends)
    assert expected.shape == (2, 15)
    assert torch.equal(loaded.generate(prompt_BS, attention_mask=mask_BS, **ends), expected)
    assert torch.equal(greedy(load_ours(folder / "run"), prompt_BS, 12), expected)
