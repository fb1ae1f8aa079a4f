"""What import and export refuse, by name; forms of older folders; packed weights; how much memory they take."""

import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expert_parallel.data.tokenizer import train_tokenizer
from expert_parallel.interop.exporting import choose_family, export_config, export_run
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.folder import CONFIG, INDEX, SINGLE
from expert_parallel.interop.hf_model import HuggingFaceModel, read_model_config
from expert_parallel.interop.importing import import_folder
from expert_parallel.interop.rope import ORIGINAL_LENGTH
from expert_parallel.model.config import ModelConfig
from expert_parallel.moe.context import StepContext
from tests.interop_models import MODELS, without
from tests.test_interop import SHARD, load_ours, make_peer, same_bits, tensors_of, tokens

Config, Tensors = dict[str, Any], dict[str, Tensor]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """transformers' folder of a model of MODELS, made when first asked for."""
    root, made = tmp_path_factory.mktemp("originals"), {}

    def original(name: str) -> Path:
        if name not in made:
            made[name] = root / name
            make_peer(name).save_pretrained(made[name])
        return made[name]

    return original


@pytest.fixture
def theirs(originals: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Mixtral of one's own to damage."""
    return shutil.copytree(originals("mixtral"), tmp_path / "theirs")


def refused(path: Path, match: str) -> None:
    """With these words, and nothing is left behind."""
    out = path.parent / "run"
    before = sorted(path.parent.iterdir())
    with pytest.raises(ValueError, match=match):
        import_folder(path, out, SHARD)
    assert sorted(path.parent.iterdir()) == before


def rewrite(path: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE)


# -------------------------------------------------------------------------------------------------------------- tensors

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(EXPERT), rf"{EXPERT} is missing \(59 tensors found, 60 expected\)"),
        (lambda t: t.update({"odd": torch.ones(1)}), r"odd is left over \(61 tensors found, 60 expected\)"),
        (lambda t: t.update({"lm_head.bias": torch.ones(260)}), "lm_head.bias is left over"),
        (lambda t: t.update({EXPERT.replace("w3", "w4"): t.pop(EXPERT)}), f"{EXPERT} is missing"),
        (lambda t: t.update({EXPERT: t[EXPERT][:-1].clone()}), rf"{EXPERT} has shape \[11, 16\], expected \[12, 16\]"),
        (lambda t: t.update({EXPERT: t[EXPERT].half()}), r"w1.weight is F32, .*w3.weight is F16: they become one"),
    ],
    ids=["missing", "left over", "a bias", "renamed", "shape", "dtypes"],
)
def test_tensors(theirs: Path, change: Callable[[Tensors], Any], words: str) -> None:
    rewrite(theirs, change)
    refused(theirs, words)


def weights_of(path: Path) -> Tensors:
    return {name: tensor.contiguous() for name, tensor in HuggingFaceModel(path).weights()}


def test_a_head_beside_tied_embeddings(originals: Callable[[str], Path], tmp_path: Path) -> None:
    """As transformers reads it: an equal one is set aside, another one is untied, and one alone is the table."""
    original = originals("llama with all parts")
    table = "model.embed_tokens.weight"
    head = "lm_head.weight"
    changes: dict[str, tuple[Callable[[Tensors], Any], str]] = {
        "equal": (lambda t: t.update({head: t[table].clone()}), r"set aside 1 tensor \(lm_head.weight\): equal"),
        "other": (lambda t: t.update({head: t[table] + 1}), "tied_embeddings is false .*: lm_head.weight differs"),
        "alone": (lambda t: t.update({head: t.pop(table)}), f"{head} is also the embedding, .* {table} is missing"),
    }
    for name, (change, words) in changes.items():
        path = shutil.copytree(original, tmp_path / name)
        rewrite(path, change)
        said: list[str] = []
        run = import_folder(path, tmp_path / f"run_{name}", SHARD, said.append)
        assert len(said) == 1
        assert re.search(words, said[0]), said
        expected = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
        with torch.no_grad():
            actual = load_ours(run)(tokens(), StepContext()).logits
            torch.testing.assert_close(actual, expected(tokens()).logits, rtol=0, atol=1e-4)
        export_run(run, tmp_path / f"back_{name}", family=None, dtype=None, shard_bytes=SHARD)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"back_{name}").eval()
        assert torch.equal(again.lm_head.weight, expected.lm_head.weight)
        if name == "equal":
            same_bits(load_file(tmp_path / "back_equal/model.safetensors"), load_file(path / "model.safetensors"))
    rewrite(path, lambda t: t.update({table: torch.ones(9, 9)}))  # of the last, whose head is [260, 16]
    refused(path, r"model.embed_tokens.weight has shape \[9, 9\], expected \[260, 16\]")


def test_tensors_that_transformers_ignores(originals: Callable[[str], Path], tmp_path: Path) -> None:
    """Multi-token prediction follows the model's layers, and older folders hold rotary frequencies."""
    path = shutil.copytree(originals("deepseek_v3"), tmp_path / "theirs")
    before = weights_of(path)
    extra = {"eh_proj.weight": torch.ones(3), "mlp.experts.0.up_proj.weight": torch.ones(1).to(torch.float8_e4m3fn)}
    rewrite(path, lambda t: t.update({f"model.layers.3.{name}": tensor for name, tensor in extra.items()}))
    rewrite(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert HuggingFaceModel(path).notes == [
        "set aside 1 tensor (model.layers.0.self_attn.rotary_emb.inv_freq): rotary frequencies, which follow from "
        "config.json",
        "set aside 2 tensors (model.layers.3.eh_proj.weight, ...): multi-token prediction, which transformers leaves "
        "out, too",
        "model.mtp is null: model.layers.3.input_layernorm.weight is missing",
        "training adds no balance loss, since config.json has no aux_loss_alpha above 0",
        "experts are balanced by model.moe.router.balance_bias_rate, which is 0.001",
    ]
    same_bits(weights_of(path), before)
    rewrite(path, lambda t: t.update({"model.layers.4.eh_proj.weight": torch.ones(3)}))
    refused(path, "model.layers.4.eh_proj.weight is left over")
    values = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**values, "num_nextn_predict_layers": 0}))
    refused(path, "model.layers.3.eh_proj.weight is left over")


def test_quantized_tensors_without_quantization_config(theirs: Path) -> None:
    for dtype, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        rewrite(theirs, lambda t, dtype=dtype: t.update({EXPERT: t[EXPERT].to(dtype)}))  # type: ignore[misc]
        refused(theirs, rf"{EXPERT} is {name}, it must be F64 or F32 or F16 or BF16 \(1 such tensors\): save the model")


def test_files_beside_the_weights(theirs: Path, tmp_path: Path) -> None:
    train_tokenizer(["some words " * 9], 300, theirs / "tokenizer.json")
    tree = json.loads((theirs / "tokenizer.json").read_text())
    added = {**tree["added_tokens"][0], "id": 260, "content": "<new>"}
    (theirs / "tokenizer.json").write_text(json.dumps({**tree, "added_tokens": [*tree["added_tokens"], added]}))
    refused(theirs, r"tokenizer.json has token ids up to 2\d\d, but the model has only 260 \(0 to 259")
    (theirs / "tokenizer.json").write_text("{}")
    refused(theirs, "tokenizer.json is not a tokenizer.json")
    (theirs / "tokenizer.json").unlink()
    (theirs / "generation_config.json").write_text('{"eos_token_id": ')
    refused(theirs, "generation_config.json cannot be read")
    (theirs / "generation_config.json").unlink()
    run = import_folder(theirs, tmp_path / "run", SHARD)
    train_tokenizer(["some words and more " * 9], 275, run / "tokenizer.json")
    with pytest.raises(ValueError, match="has token ids up to"):
        export_run(run, tmp_path / "back", family=None, dtype=None, shard_bytes=SHARD)
    assert not (tmp_path / "back").exists()


def test_files(theirs: Path) -> None:
    tensors = load_file(theirs / SINGLE)
    names = list(tensors)
    halves = {"a.safetensors": names[:20], "b.safetensors": names[20:]}

    def shards(**changes: Any) -> None:
        for file, part in halves.items():
            save_file({name: tensors[name] for name in part}, theirs / file)
        places = {name: file for file, part in halves.items() for name in part}
        (theirs / INDEX).write_text(json.dumps({"weight_map": {**places, **changes}}))

    (theirs / SINGLE).rename(theirs / "pytorch_model.bin")
    refused(theirs, "has pytorch_model.bin, which is pickled .* convert it to safetensors")
    (theirs / "pytorch_model.bin").unlink()
    refused(theirs, f"neither {SINGLE} nor {INDEX}")
    shards()
    HuggingFaceModel(theirs)
    (theirs / "b.safetensors").write_bytes((theirs / "b.safetensors").read_bytes()[:-8])
    refused(theirs, r"b.safetensors cannot be read: .*")
    (theirs / "b.safetensors").unlink()
    refused(theirs, r"b.safetensors cannot be read: .*No such file")
    shards(**{names[0]: "b.safetensors"})
    refused(theirs, rf"a.safetensors holds {names[0]}, which {INDEX} does not assign to this file")
    doubled = (theirs / "a.safetensors").read_bytes()
    size = int.from_bytes(doubled[:8], "little")
    header = doubled[8 : 8 + size].rstrip()
    entry = json.dumps({names[0]: json.loads(header)[names[0]]}).encode()
    header = header[:-1] + b"," + entry[1:]
    (theirs / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + doubled[8 + size :])
    refused(theirs, f"a.safetensors cannot be read: the key '{names[0]}' is given twice")
    shards(odd="a.safetensors")
    refused(theirs, f"a.safetensors lacks 'odd', which {INDEX} assigns to this file")
    shards(**{names[0]: "../theirs/a.safetensors"})
    refused(
        theirs, rf"assigns '{names[0]}' to '../theirs/a.safetensors', which is not a safetensors file of this folder"
    )
    halves["b.safetensors"] = names[19:]
    shards()
    refused(theirs, f"a.safetensors holds {names[19]}, which {INDEX} does not assign to this file")  # b has it, too
    (theirs / INDEX).unlink()
    refused(theirs, f"has a.safetensors, but neither {SINGLE} nor {INDEX}, which says which file holds a tensor")
    (theirs / INDEX).write_text('{"weight_map": {"odd": "a.safetensors", "odd": "b.safetensors"}}')
    refused(theirs, f"{INDEX} cannot be read: the key 'odd' is given twice")
    (theirs / INDEX).write_text("{")
    refused(theirs, f"{INDEX} cannot be read")
    (theirs / CONFIG).write_text('{"hidden_size": 16, "hidden_size": 32}')
    refused(theirs, f"{CONFIG} cannot be read: the key 'hidden_size' is given twice")
    (theirs / CONFIG).write_text("[]")
    refused(theirs, f"{CONFIG} is not a JSON object")
    (theirs / CONFIG).unlink()
    refused(theirs, f"is not a Hugging Face model: it has no {CONFIG}")


def test_an_index_that_names_the_wrong_file(theirs: Path) -> None:
    tensors = load_file(theirs / SINGLE)
    (theirs / SINGLE).rename(theirs / "a.safetensors")
    save_file({"odd": torch.ones(1)}, theirs / "b.safetensors")
    places = dict.fromkeys(tensors, "a.safetensors")
    (theirs / INDEX).write_text(json.dumps({"weight_map": {**places, EXPERT: "b.safetensors"}}))
    refused(theirs, f"a.safetensors holds {EXPERT}, which {INDEX} does not assign to this file")


def test_out_must_be_new(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    refused(theirs, r"run exists already")
    (tmp_path / "run").rmdir()
    run = import_folder(theirs, tmp_path / "run", SHARD)
    with pytest.raises(ValueError, match="run exists already"):
        export_run(run, run, family=None, dtype=None, shard_bytes=SHARD)


# --------------------------------------------------------------------------------------------------------- config.json

YARN = {"rope_type": "yarn", "factor": 2.0}


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 2.0],
    "long_factor": [2.0, 3.0],
    "short_mscale": 1.2,
    "long_mscale": 1.4,
    "original_max_position_embeddings": 8,
}
LENGTHS = {"original_max_position_embeddings": 8, "max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mixtral", {"embedding_multiplier": 2.0}, "embedding_multiplier is 2.0; remove"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu' is supported"),
        ("mixtral", {"attention_dropout": 0.1}, "attention_dropout is 0.1: only 0.0"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("mixtral", {"model_type": "mamba"}, "model_type is 'mamba', it must be one of llama, qwen2"),
        ("mixtral", {"hidden_size": None}, "hidden_size is None: it must be an integer"),
        ("mixtral", {"hidden_size": "16"}, "hidden_size is '16': it must be an integer"),
        ("mixtral", {"rms_norm_eps": None}, "rms_norm_eps is None: it must have a value"),
        ("mixtral", {"rms_norm_eps": "1e-6"}, 'model.norm.eps: .*found "1e-6"'),
        ("mixtral", {"num_experts_per_tok": 5}, r"model.moe.router.k \(5\) is larger than model.moe.num_experts \(4\)"),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config has quant_method 'fp8'"),
        ("mixtral", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config has quant_method 'mxfp4'"),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "dynamic"}},
            "rope_type is 'dynamic', it must be one of default",
        ),
        ("mixtral", {"rope_parameters": {"rope_type": "longrope"}}, "short_factor of the rotary positions is None"),
        (
            "phimoe",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0]}},
            "short_mscale of the rotary positions is None, it must be a finite number",
        ),
        (
            "phimoe",
            {"rope_parameters": LONGROPE | {"short_factor": [1.0], "long_factor": [1.0]}},
            "short_factors has 1 numbers, but model.attention.head_size .4. makes 2 pairs of columns",
        ),
        (
            "phimoe",
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 9},
            "original_max_position_embeddings of the rotary positions is 8: it must be an integer of at least 2, the "
            "same in all places",
        ),
        (
            "phimoe",
            {"rope_parameters": without(LONGROPE, "original_max_position_embeddings")} | LENGTHS,
            r"original_max_position_embeddings is 8: .* transformers then takes 32 \(max_position_embeddings\)",
        ),
        (
            "mixtral",
            {"rope_parameters": without(LONGROPE, "original_max_position_embeddings")} | LENGTHS,
            r"original_max_position_embeddings is 8: .* transformers then takes 32 \(max_position_embeddings\)",
        ),
        ("phimoe", {"num_experts_per_tok": 3}, "router.k: input should be 2, found 3"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 3, "layer_types": None}, "layer_types is missing"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "it must be greedy or group_limited_greedy"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True: only False is supported"),
        ("mixtral", {"rope_parameters": {"rope_type": "yarn", "type": "linear"}}, "rope_type is 'yarn' and 'linear'"),
        ("mixtral", {"rope_parameters": {"rope_type": "linear"}}, "factor of the rotary positions is missing"),
        ("mixtral", {"rope_parameters": {**YARN, "odd": 1}}, r"rope_type 'yarn' have no parameter 'odd' \(1\)"),
        ("mixtral", {"rope_parameters": {"full_attention": {}}}, "rope_parameters is .* differ between blocks"),
        ("mixtral", {"rope_parameters": {"type": ["yarn"]}}, r"rope_type is \['yarn'\], it must be one of default"),
        (
            "mixtral",
            {"rope_parameters": {"type": "linear", "factor": None}},
            "factor of .* is None, it must be a finite",
        ),
        ("mixtral", {"rope_parameters": {"type": "linear", "factor": 0}}, "model.position.scaling.factor: .*, found 0"),
        (
            "mixtral",
            {"rope_parameters": {**YARN, "factor": math.nan}},
            "factor of .* is nan, it must be a finite number",
        ),
        (
            "mixtral",
            {"rope_parameters": {**YARN, "factor": None, ORIGINAL_LENGTH: 0}},
            r"\(131072\) / orig.* \(0\): both",
        ),
        ("mixtral", {"rope_parameters": {**YARN, ORIGINAL_LENGTH: None}}, f"{ORIGINAL_LENGTH} of .* is None"),
        (
            "mixtral",
            {"rope_parameters": {**YARN, "truncate": None}},
            "truncate of .* is None, it must be true or false",
        ),
        ("mixtral", {"rope_parameters": {"rope_theta": None}}, "rope_theta of the rotary positions is None"),
        (
            "mixtral",
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_type of .* is 'linear' in one .* 'default' in",
        ),
        ("mixtral", {"num_experts": 8}, "num_experts is 8: it must be num_local_experts, which is 4"),
        (
            "mixtral",
            {"odd": 1, "a\nb": [[[[[0]]]]]},
            r"unknown keys .*: odd is 1, 'a\\nb' is \[\[\[\[...\]\]\]\]; remove",
        ),
        (
            "mixtral",
            {"num_local_experts": 10**6},
            "describes a model of 1,776,011,888 parameters, .* 18,992 numbers",
        ),
        ("mixtral", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000: .* from 1 to 100,000"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window is 'no': it must be true or false"),
        ("deepseek_v3", {"topk_group": 4}, r"topk_group is 4: it must be at most n_group \(3\)"),
        ("mixtral", {"rope_theta": 1.5}, "rope_theta of the rotary positions is 1000000.0 in one place and 1.5"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: only 1"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0: only None"),
        ("olmoe", {"head_dim": 6}, r"head_dim is 6: 4 heads .* add up to hidden_size \(16\)"),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
            "max_window_layers is",
        ),
        ("qwen3_moe", {"mlp_only_layers": [0], "intermediate_size": None}, "intermediate_size is missing"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types is .*sliding_attention or full_attention"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window is None: layer_types gives 3 blocks"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias is True: only False"),
        ("deepseek_v3", {"num_key_value_heads": 2}, r"num_key_value_heads is 2: it must be num_attention_heads \(4\)"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy': only 'noaux_tc'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts is 0"),
        ("deepseek_v3", {"qk_head_dim": 9}, "qk_head_dim is 9: it must be 10"),
        ("glm4_moe", {"partial_rotary_factor": 0.25}, "factor is 0.25 in one place, but transformers takes 0.5"),
        (
            "glm4_moe",
            {"rope_scaling": MODELS["glm4_moe"][1]["rope_parameters"] | {"partial_rotary_factor": 1.0}},
            "factor is 0.5 in one place, but transformers takes 1",
        ),
        (
            "minimax_m2",
            {"rope_parameters": {"partial_rotary_factor": 1.5}},
            "factor is 1.5: it must be above 0 and at most 1",
        ),
        ("minimax_m2", {"rotary_dim": 6}, r"rotary_dim is 6: partial_rotary_factor \(0.5\) makes 4 of 8 columns"),
        ("minimax_m2", {"attn_type_list": [1, 0, 1]}, "attn_type_list is .*: it must list 1 for each of 3 blocks"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types is .*: it must list 3 of dense or sparse"),
        (
            "glm4_moe_lite",
            {"first_k_dense_replace": 1},
            r"first_k_dense_replace is 1: mlp_layer_types makes other blocks dense \(1 of 3\)",
        ),
        (
            "exaone_moe",
            {"layer_types": ["full_attention"] * 3},
            "no block has a sliding window, and so none",
        ),
        ("exaone_moe", {"is_moe_layer": [1, 1, 1]}, r"is_moe_layer is \[1, 1, 1\]: it must agree with mlp_layer_types"),
        ("exaone_moe", {"layer_types": None, "sliding_window_pattern": "LLG"}, "sliding_window_pattern is 'LLG'"),
        ("mellum", {"rope_parameters": {"full_attention": {}}}, "rope_parameters is .*: it lacks sliding_attention"),
        ("mellum", {"rope_parameters": {"rope_theta": 1e4}}, "it must have an object for full_attention and one for"),
        ("mimo_v2_flash", {"swa_num_key_value_heads": 1}, r"it must be twice num_key_value_heads \(1\)"),
        ("mimo_v2_flash", {"swa_head_dim": 4}, "swa_head_dim is 4: it must be 8, as in the other blocks"),
        (
            "mimo_v2_flash",
            {"sliding_window_size": 2},
            r"sliding_window is 4: it must be sliding_window_size",
        ),
        ("mimo_v2_flash", {"attention_chunk_size": 3}, r"attention_chunk_size is 3: it must be sliding_window_size"),
        ("mimo_v2_flash", {"hybrid_layer_pattern": [0, 1, 1]}, "it must agree with layer_types"),
        (
            "mimo_v2_flash",
            {"layer_types": ["sliding_attention"] * 3},
            "all blocks have a window: only models with",
        ),
        ("mimo_v2_flash", {"swa_rope_theta": 7.0}, "rope_theta of sliding_attention is 7.0 in one place and 50.0 in"),
        ("mimo_v2_flash", {"add_swa_attention_sink_bias": False}, "add_swa_attention_sink_bias is False: only True"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0: only 7.0"),
        ("hunyuan_v1_moe", {"moe_topk": [2, 3, 2]}, "moe_topk is .*: it must list the same integer for each of 3"),
        ("hunyuan_v1_moe", {"moe_intermediate_size": [12, 12]}, "moe_intermediate_size is .* for each of 3 blocks"),
        ("hunyuan_v1_moe", {"moe_intermediate_size": 10}, "moe_intermediate_size is 10: only 12 is supported"),
        ("hunyuan_v1_moe", {"num_shared_expert": [2, 2, 2]}, "num_shared_expert is .*: only 1 is supported"),
        ("hunyuan_v1_moe", {"use_cla": True}, "use_cla is True: only False"),
        ("hunyuan_v1_moe", {"attention_head_dim": 4}, r"attention_head_dim is 4: it must be head_dim \(6\)"),
        (
            "hunyuan_v1_moe",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic', it must be one of default",
        ),
        (
            "hunyuan_v1_moe",
            {"rope_parameters": {"rope_type": "dynamic", "alpha": -2.0}},
            "alpha of the rotary positions is -2.0: it must be a number above 0",
        ),
        ("llama4_text", {"no_rope_layers": [1, 0]}, "no_rope_layers is .*: it must list 4 of 0 or 1"),
        ("llama4_text", {"layer_types": ["sliding_attention"] * 4}, "layer_types is .*: it must list 4 of chunked"),
        ("llama4_text", {"moe_layers": [1, 4]}, "moe_layers is .*: it must be a list of block indices from 0 to 3"),
        ("llama4_text", {"attention_chunk_size": None}, "attention_chunk_size is None: it must be an integer"),
        ("llama4_text", {"attn_scale": -0.5}, "attention.length_scaling.beta: .*, found -0.5"),
        ("mistral4", {"head_dim": 4}, "head_dim is 4: it must be 10"),
        (
            "mistral4",
            {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            "the rotary positions have no scaling, such as rope_type 'yarn'",
        ),
        ("mistral4", {"rope_parameters": YARN}, "llama_4_scaling_beta of the rotary positions is None"),
        (
            "mistral4",
            {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.9}},
            "partial_rotary_factor is 0.9: it must make 4 of 10 columns rotary",
        ),
        ("gpt_oss", {"rope_parameters": None}, "rope_parameters or rope_scaling is missing"),
    ],
)
def test_config(originals: Callable[[str], Path], tmp_path: Path, name: str, change: Config, words: str) -> None:
    path = shutil.copytree(originals(name), tmp_path / "theirs")
    values = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**values, **change}))
    refused(path, words)


def test_every_key_counts(originals: Callable[[str], Path]) -> None:
    """No key of a folder is passed over: with another name it is refused, but for those that are known to say nothing;
    and none of the sizes may be absent."""
    for name, (family, _) in MODELS.items():
        values = json.loads((originals(name) / CONFIG).read_text())
        for key in values:
            renamed = {(f"{key}_odd" if other == key else other): value for other, value in values.items()}
            with pytest.raises(ValueError, match=r"config\.json: "):
                read_model_config(FAMILIES[family], renamed)


def test_harmless_keys_may_have_any_value(originals: Callable[[str], Path]) -> None:
    values = json.loads((originals("mixtral") / CONFIG).read_text())
    expected = read_model_config(FAMILIES["mixtral"], values)
    odd = [[1], {"a": None}, "odd", -1.5, True, None]
    keys = ("_attn_implementation_autoset", "torch_dtype", "use_cache", "architectures", "sep_token_id", "temperature")
    for key, value in zip(keys, odd, strict=True):
        assert read_model_config(FAMILIES["mixtral"], {**values, key: value, "quantization_config": None}) == expected
    with pytest.raises(ValueError, match="pruned_heads is"):
        read_model_config(FAMILIES["mixtral"], {**values, "pruned_heads": {"0": [1]}})


# The config.json files of published models, as older versions of transformers wrote them.
OLDER: dict[str, Config] = {
    "mixtral": {
        "num_local_experts": 4,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "head_dim": 6,
        "rms_norm_eps": 1e-3,
    },
    "qwen3_moe": {
        "num_experts": 6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_window_layers": 3,
        "use_sliding_window": False,
        "sliding_window": None,
        "head_dim": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 10,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-6,
        "qkv_bias": False,
        "use_qk_norm": True,
        "shared_expert_intermediate_size": 0,
    },
    "olmoe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "clip_qkv": None,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "experts_per_token": 2,
        "head_dim": 6,
        "initial_context_length": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        "sliding_window": 4,
        "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "pad_token_id": 9,
    },
    "llama": {"rms_norm_eps": 1e-6, "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1},
    "qwen2": {
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_window_layers": 3,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_mrope": False,
    },
    "deepseek_v3 with yarn": {
        **{key: value for key, value in MODELS["deepseek_v3 with yarn"][1].items() if key != "rope_parameters"},
        "rope_theta": 500.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 8,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
            "beta_fast": 2,
            "beta_slow": 0.5,
        },
        "ep_size": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    },
}


@pytest.mark.parametrize("name", OLDER)
def test_older_config(originals: Callable[[str], Path], name: str) -> None:
    family, settings = MODELS[name]
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same = {key: settings[key] for key in (*sizes, "intermediate_size")}
    experts = {} if family in ("llama", "qwen2") else {"num_experts_per_tok": 2}
    older = {"model_type": family, "hidden_act": "silu", **experts, **same, **OLDER[name]}
    losses = {key: older[key] for key in ("aux_loss_alpha", "seq_aux") if key in older}  # transformers drops them
    newer = json.loads((originals(name) / CONFIG).read_text()) | losses
    assert read_model_config(FAMILIES[family], older) == read_model_config(FAMILIES[family], newer)


# --------------------------------------------------------------------------------------------------------------- export

OURS = {
    "vocab_size": 260,
    "num_layers": 2,
    "d_model": 16,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_size": 4},
    "moe": {"num_experts": 4, "router": {"k": 2}, "experts": {"hidden": 12}},
}
EXPERTS = {"num_experts": 4, "experts": {"hidden": 12}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm": {"kind": "layer_norm"}}, "nearest is mixtral: model.norm.kind is 'layer_norm', .* 'rms_norm'"),
        ({"norm_placement": "post"}, "model.norm_placement is 'post'"),
        (
            {"moe": {**EXPERTS, "router": {"k": 2, "scale": 2.0}}},
            "model.moe.router.scale is 2.0, the family has 1.0",
        ),
        ({"moe": {**EXPERTS, "router": {"k": 2, "bias": True}}}, "model.moe.router.bias is True"),
        (
            {"moe": {**EXPERTS, "shared_experts": {"hidden": 12, "activation": "relu"}}},
            "model.moe.shared_experts.activation is 'relu', .* 'swiglu'",
        ),
        ({"moe": {**EXPERTS, "router": {"kind": "hash"}}}, "model.moe.router.kind is 'hash', .* 'top_k'"),
        ({"position": {"kind": "learned", "max_length": 9}}, "model.position.kind is 'learned', .* 'rope'"),
        (
            {"moe": {"num_experts": 4, "experts": {"hidden": 12, "activation": "relu"}}},
            "model.moe.experts.activation is 'relu', the family has 'swiglu'",
        ),
        (
            {"moe": {**EXPERTS, "router": {"k": 1, "normalise": False}}, "norm": {"eps": 1e-4}},
            "nearest is mixtral: .*router.k = 1",
        ),
    ],
)
def test_models_of_no_family(change: Config, words: str) -> None:
    model = ModelConfig.model_validate({**OURS, **change})
    with pytest.raises(ValueError, match=f"none of the families .* computes the same as this model; .*{words}"):
        choose_family(model, None, None)


def test_family_by_name() -> None:
    model = ModelConfig.model_validate(OURS)
    assert choose_family(model, None, None) == "mixtral"
    assert choose_family(model, None, "qwen3") == "mixtral"
    with pytest.raises(ValueError, match=r"the family olmoe does not compute .* model.attention.qk_norm.kind is None"):
        choose_family(model, "olmoe", None)
    with pytest.raises(ValueError, match="--family is 'mamba', it must be one of llama, qwen2"):
        choose_family(model, "mamba", None)


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.1, "init_std": 0.5, "moe": {**OURS["moe"], "losses": [{"kind": "z_loss"}]}},
        {"moe": {**OURS["moe"], "capacity": {"kind": "factor"}, "dispatcher": {"kind": "local"}}},
        {"moe": {**OURS["moe"], "preset": "mixtral"}},
        {"moe": {**EXPERTS, "router": {"k": 2, "jitter": 0.01}}, "moe_blocks": {"kind": "list", "indices": [0, 1]}},
    ],
)
def test_what_is_of_training_is_in_no_family_s_way(change: Config) -> None:
    assert choose_family(ModelConfig.model_validate({**OURS, **change}), None, None) == "mixtral"


def test_an_origin_that_says_another_model_is_not_written(originals: Callable[[str], Path]) -> None:
    """What it says beside the computation stays; of what we write, nothing is packed or brings code."""
    origin = json.loads((originals("mixtral") / CONFIG).read_text())
    origin |= {"bos_token_id": 7, "auto_map": {"AutoModel": "code.py"}}
    model = read_model_config(FAMILIES["mixtral"], origin)
    run = {"training": {"sequence_length": 9}}
    same = export_config("mixtral", model, origin, run)
    assert same == {key: value for key, value in origin.items() if key != "auto_map"}
    assert model.moe is not None
    router = model.moe.router.model_copy(update={"k": 3})
    other = model.model_copy(update={"moe": model.moe.model_copy(update={"router": router})})
    changed = export_config("mixtral", other, origin, run)
    assert (changed["num_experts_per_tok"], changed["bos_token_id"]) == (3, 7)
    assert changed["max_position_embeddings"] == origin["max_position_embeddings"]
    assert "auto_map" not in changed
    assert read_model_config(FAMILIES["mixtral"], changed) == other


def test_dtype_and_shards(theirs: Path, tmp_path: Path) -> None:
    """bfloat16 and back keeps bits; files are of the size asked for, and all tensors are in the index."""
    small = make_peer("mixtral").to(torch.bfloat16)
    small.save_pretrained(tmp_path / "small")
    run = import_folder(tmp_path / "small", tmp_path / "run", 4000)
    assert len(list((run / "checkpoints/step_00000000").glob("*.safetensors"))) > 5
    export_run(run, tmp_path / "wide", family=None, dtype="float32", shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "wide").glob("*.safetensors"))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert len(files) > 3
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"
    again = import_folder(tmp_path / "wide", tmp_path / "again", SHARD)
    export_run(again, tmp_path / "back", family=None, dtype="bfloat16", shard_bytes=SHARD)
    same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "small"))


def test_selection_bias_is_not_rounded(originals: Callable[[str], Path], tmp_path: Path) -> None:
    run = import_folder(originals("deepseek_v3"), tmp_path / "run", SHARD)
    export_run(run, tmp_path / "back", family=None, dtype="bfloat16", shard_bytes=SHARD)
    tensors = tensors_of(tmp_path / "back")
    kept = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert kept == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}


# ------------------------------------------------------------------------------------------------------- packed weights


@torch.no_grad()
def test_mxfp4(tmp_path: Path) -> None:
    """4-bit blocks as in OpenAI's files: unpacked to the numbers that transformers makes of them, and written plain."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = {**MODELS["gpt_oss"][1], "hidden_size": 64, "intermediate_size": 32}
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **eager)).to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.3, generator=generator))
    model.save_pretrained(tmp_path / "theirs")

    def pack(tensors: Tensors) -> None:
        for layer in range(3):
            for name, rows, groups in (("gate_up_proj", 64, 2), ("down_proj", 64, 1)):
                full = f"model.layers.{layer}.mlp.experts.{name}"
                blocks = torch.randint(0, 256, (4, rows, groups, 16), generator=generator, dtype=torch.uint8)
                scales = torch.randint(120, 130, (4, rows, groups), generator=generator, dtype=torch.uint8)
                unpacked = convert_moe_packed_tensors(blocks, scales)
                assert unpacked.shape == tensors.pop(full).shape
                tensors |= {f"{full}_blocks": blocks, f"{full}_scales": scales}
                model.get_parameter(full).copy_(unpacked)

    rewrite(tmp_path / "theirs", pack)
    values = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(values))

    run = import_folder(tmp_path / "theirs", tmp_path / "run", SHARD)
    export_run(run, tmp_path / "plain", family=None, dtype=None, shard_bytes=SHARD)
    same_bits(tensors_of(tmp_path / "plain"), dict(model.state_dict()))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / CONFIG).read_text())
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, **eager).eval()
    expected = wide(tokens()).logits
    largest = float(expected.abs().max())
    torch.testing.assert_close(load_ours(run)(tokens(), StepContext()).logits, expected, rtol=0, atol=1e-5 * largest)


# --------------------------------------------------------------------------------------------------------------- memory


class HeldBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata)
                    self.peak = max(self.peak, sum(self.live.values()))
        return made


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_no_more_than_a_shard_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of a model of several shards. Beside the shard: one pair's tensors, in both forms and once more. Digests apart,
    whose scratch has a bound of its own, which is larger than this model."""
    monkeypatch.setattr("expert_parallel.checkpoint.files.digest", lambda *_: 0)
    family, settings = MODELS[name]
    model_class = getattr(transformers, FAMILIES[family].architecture)
    sizes = {**settings, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    model_class(model_class.config_class(**sizes)).save_pretrained(tmp_path / "theirs")
    tensors = tensors_of(tmp_path / "theirs")
    whole = sum(tensor.nbytes for tensor in tensors.values())
    source = HuggingFaceModel(tmp_path / "theirs")
    pair = max(sum(tensors[name].nbytes for name in pair.theirs) for pair in source.pairs)
    shard = max(whole // 9, pair)
    with HeldBytes() as imported:
        import_folder(tmp_path / "theirs", tmp_path / "run", shard)
    with HeldBytes() as exported:
        export_run(tmp_path / "run", tmp_path / "back", family=None, dtype=None, shard_bytes=shard)
    same_bits(tensors_of(tmp_path / "back"), tensors)
    for held in (imported, exported):
        assert shard // 2 < held.peak <= shard + 3 * pair, (held.peak, shard, pair, whole)
    assert shard + 3 * pair < whole
