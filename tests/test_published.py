"""Released models: config.json is read as it was published, and a small model with its unusual values computes, writes
and generates what transformers does."""

import json
from pathlib import Path

import pytest
import torch

from expert_parallel.interop.exporting import export_run
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.hf_model import read_model_config
from expert_parallel.interop.importing import import_folder
from expert_parallel.moe.context import StepContext
from tests.published_models import (
    PUBLISHED,
    SAME_CLASS,
    WORDS,
    count_parameters,
    generated,
    oracle,
    oracle_class,
    published,
    shrink,
)
from tests.test_interop import SHARD, greedy, load_ours, same_bits, tensors_of

NAMES = sorted(path.stem for path in PUBLISHED.glob("*.json"))
# How a folder is loaded: an export leaves these keys out, or writes those of its own files.
OF_THE_FILES = ("auto_map", "quantization_config", "dtype", "torch_dtype")


def test_every_sparse_family_has_one() -> None:
    dense = {"llama", "qwen2", "qwen3"}
    assert set(NAMES) == FAMILIES.keys() - dense


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_transformers(name: str) -> None:
    config = published(name)
    assert config["model_type"] == name
    model = read_model_config(FAMILIES[name], {**config, "quantization_config": None})
    assert model.num_params() == count_parameters(config)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_small_one_computes_writes_and_generates_the_same(name: str, tmp_path: Path) -> None:
    config = shrink(published(name))
    theirs = oracle(config)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    import_folder(tmp_path / "theirs", tmp_path / "run", SHARD)
    ours = load_ours(tmp_path / "run")

    tokens_BS = torch.randint(0, WORDS, (3, 11), generator=torch.Generator().manual_seed(0))
    expected, actual = theirs(tokens_BS).logits, ours(tokens_BS, StepContext()).logits
    largest = float(expected.abs().max())
    assert largest > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, largest))
    assert torch.equal(greedy(ours, tokens_BS[:, :3], 8)[:, 3:], generated(theirs, tokens_BS[:, :3], 8))

    export_run(tmp_path / "run", tmp_path / "back", family=None, dtype=None, shard_bytes=SHARD)
    same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs"))
    exported = json.loads((tmp_path / "back" / "config.json").read_text())
    given = {**config, "model_type": SAME_CLASS.get(name, name)}
    exported, given = ({k: v for k, v in tree.items() if k not in OF_THE_FILES} for tree in (exported, given))
    assert exported == given
    there = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    loaded = oracle_class(exported).from_pretrained(tmp_path / "back", **there).eval()
    torch.testing.assert_close(loaded(tokens_BS).logits, expected, rtol=0, atol=1e-6 * max(1.0, largest))


@pytest.mark.parametrize("change", [{}, {"head_dim": None}], ids=["missing", "null"])
def test_rotary_rows_of_llama_4_have_the_size_of_its_heads(change: dict[str, None]) -> None:
    """Its default where there is no head_dim, and hidden_size over heads where that is null."""
    config = {key: value for key, value in published("llama4_text").items() if key != "head_dim"} | change
    names = {mapping.ours: mapping for mapping in FAMILIES["llama4_text"].tensor_map(config)}
    size = read_model_config(FAMILIES["llama4_text"], config).attention.rope_columns[1]
    rows = torch.arange(2 * size)[:, None]
    (permuted,) = names["blocks.{L}.attention.query.weight"].transform.to_ours([rows])
    assert permuted[:2, 0].tolist() == [0, 2]
    assert permuted[size : size + 2, 0].tolist() == [size, size + 2]
