"""Any JSON value in any key of a config.json: import either computes what transformers computes, or refuses in one
sentence. The weights stay those of a small model of each family."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from expert_parallel.interop.folder import CONFIG
from expert_parallel.interop.hf_model import HuggingFaceModel
from expert_parallel.interop.importing import imported_config
from expert_parallel.interop.upcycle import build_from_weights
from expert_parallel.moe.context import StepContext
from tests.interop_models import MODELS
from tests.test_interop import make_peer, peer_class, tokens

Tree = dict[str, Any]
NAMES = {
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe with all parts",
    "olmoe": "olmoe with all parts",
    "deepseek_v3": "deepseek_v3 with yarn",
    "gpt_oss": "gpt_oss",
    "glm4_moe": "glm4_moe",
    "glm4_moe_lite": "glm4_moe_lite",
    "solar_open": "solar_open",
    "minimax_m2": "minimax_m2",
    "dots1": "dots1",
    "hy_v3": "hy_v3",
    "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoeshared",
    "flex_olmo": "flex_olmo",
    "ernie4_5_moe": "ernie4_5_moe with all parts",
    "axk1": "axk1",
    "hunyuan_v1_moe": "hunyuan_v1_moe with a stretched base",
    "mistral4": "mistral4",
    "llama4_text": "llama4_text",
    "qwen2_moe": "qwen2_moe with all parts",
    "deepseek_v2": "deepseek_v2",
    "phimoe": "phimoe with all parts",
    "llama": "llama with all parts",
    "qwen2": "qwen2 with windows",
    "qwen3": "qwen3 with all parts",
}
# Keys that files of other versions or families have, in addition to those of the file.
FURTHER = (
    *("rope_scaling", "rope_theta", "partial_rotary_factor", "num_local_experts", "num_experts", "sliding_window"),
    *("n_routed_experts", "head_dim", "layer_types", "use_sliding_window", "max_window_layers", "mlp_only_layers"),
    *("num_nextn_predict_layers", "rope_interleave", "quantization_config", "torch_dtype", "is_causal", "clip_qkv"),
    *("rotary_dim", "first_k_dense_replace", "mlp_layer_types", "scoring_func", "topk_method", "attn_type_list"),
    *("attn_implementation", "_attn_implementation", "per_layer_config", "is_decoder", "unk_token_id", "id2label"),
    *("tie_word_embeddings", "hidden_act", "pretraining_tp", "temperature", "pruned_heads", "use_qk_norm", "odd"),
)
NUMBERS = st.sampled_from((-1, 0, 1, 2, 3, 4, 5, 6, 12, 16, 260, 2**31, 10**30, 10**400, 0.0, 0.5, 1.0, -1.5, 1e6))
LEAVES = st.one_of(
    *(st.none(), st.booleans(), NUMBERS, st.sampled_from((math.nan, math.inf, -math.inf)), st.text(max_size=3)),
    st.sampled_from(("silu", "default", "linear", "yarn", "llama3", "eager", "sdpa", "float64", "sliding_attention")),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
)
ROPE_KEYS = (
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast"),
    *("beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor", "odd"),
    *("partial_rotary_factor", "alpha", "llama_4_scaling_beta"),
)
SCALINGS: tuple[Tree, ...] = (
    {"rope_type": "dynamic", "alpha": 3.0, "rope_theta": 100.0},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.3},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 2.0},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)
ROPES = st.tuples(st.sampled_from(SCALINGS), st.dictionaries(st.sampled_from(ROPE_KEYS), LEAVES, max_size=2)).map(
    lambda parts: parts[0] | parts[1]
)


KEYS = {  # family -> the keys that are changed
    family: sorted({*MODELS[name][1], *FURTHER, *transformers.CONFIG_MAPPING[family]().to_dict()})
    for family, name in NAMES.items()
}


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, Tree, list[str]]:
    """Draws a family, values that replace or add keys of its config.json, and keys that are taken away."""
    family = draw(st.sampled_from(sorted(NAMES)))
    if draw(st.integers(0, 2)) == 0:
        form = {draw(st.sampled_from(("rope_parameters", "rope_scaling"))): draw(ROPES)}
        theta = draw(st.just({}) | st.fixed_dictionaries({"rope_theta": LEAVES}))
        return family, form | theta, draw(st.sampled_from(([], ["rope_parameters"])))
    keys = st.sampled_from(KEYS[family])
    return family, draw(st.dictionaries(keys, LEAVES | VALUES, max_size=2)), draw(st.lists(keys, max_size=1))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    for family, name in NAMES.items():
        make_peer(name).save_pretrained(root / family)
        shutil.copyfile(root / family / CONFIG, root / f"{family}.json")
    return root


@torch.no_grad()
def compare(root: Path, family: str, changed: Tree, removed: list[str]) -> str:
    """Imports a changed folder. Returns `refused`, `equal`, or `theirs fails` if transformers cannot load or run it.

    Fails if import raises anything but one sentence, or if the logits differ.
    """
    folder = root / family
    values = json.loads((root / f"{family}.json").read_text())
    values = {key: value for key, value in values.items() if key not in removed} | changed
    (folder / CONFIG).write_text(json.dumps(values))
    try:
        source = HuggingFaceModel(folder)
        config = imported_config(source, root / "run")
    except ValueError as refusal:
        sentence = str(refusal)
    else:
        sentence = ""
    if sentence:
        assert len(sentence.splitlines()) == 1, sentence
        assert len(sentence) < 1500, sentence
        return "refused"
    actual = build_from_weights(config.model, source.weights())(tokens(), StepContext(dropless=True)).logits
    there = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    try:
        model: nn.Module = peer_class(NAMES[family]).from_pretrained(folder, **there).eval()
        expected = model(tokens(), use_cache=False, return_dict=True).logits
    except Exception:
        return "theirs fails"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))
    return "equal"


@pytest.mark.parametrize("examples", [200, pytest.param(5000, marks=pytest.mark.full)])
def test_any_value_of_any_key(originals: Path, examples: int) -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=examples, database=None, derandomize=examples < 1000)
    @given(changes())
    @example(("mixtral", {"tie_word_embeddings": "\x85"}, []))  # a line break that JSON leaves as it is
    def any_change(change: tuple[str, Tree, list[str]]) -> None:
        outcomes[compare(originals, *change)] += 1

    any_change()
    assert min(outcomes[outcome] for outcome in ("refused", "equal")) > examples // 10, outcomes
