"""Imported families in layouts: each passes `verify` with tensor and expert parallelism, and writes what transformers
writes, from its cache."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_parallel.cli.verify import build_verification_spec
from expert_parallel.interop.importing import import_folder
from expert_parallel.model.generation import generate
from expert_parallel.runtime.process import CPU, Launch, Runtime
from expert_parallel.training.config import Config, load_config
from expert_parallel.verify.compare import TOLERANCES
from expert_parallel.verify.explain import explain
from expert_parallel.verify.run import verify
from tests.interop_models import MODELS
from tests.ranks import run_ranks
from tests.test_interop import SHARD, load_ours, make_peer

# One for each part of a model that the families bring, with most of its other parts.
FAMILY_MODELS = [
    "mixtral with a window",
    "qwen3_moe with all parts",
    "olmoe with all parts",
    "deepseek_v3",
    "deepseek_v3 with yarn",
    "gpt_oss",
    "mimo_v2_flash",  # blocks with a window have other positions, key heads and sinks
    "glm4_moe",
    "granitemoeshared",
    "flex_olmo",
    "ernie4_5_moe with all parts",
    "axk1",
    "hunyuan_v1_moe with a stretched base",
    "mistral4",
    "llama4_text",  # chunks in some blocks, no positions in the others
    "llama4_text",
    "qwen2_moe with all parts",
    "phimoe with all parts",
]
DENSE = {"llama", "qwen2", "qwen3"}


def of_other_families() -> list[str]:
    """The last, and fullest, model of each sparse family that is not among them."""
    covered = DENSE | {MODELS[name][0] for name in FAMILY_MODELS}
    return list({family: name for name, (family, _) in MODELS.items() if family not in covered}.values())


@pytest.fixture(
    scope="module",
    params=[*FAMILY_MODELS, *(pytest.param(name, marks=pytest.mark.full) for name in of_other_families())],
)
def imported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("imported")
    make_peer(request.param).save_pretrained(folder / "theirs")
    return request.param, import_folder(folder / "theirs", folder / "ours", SHARD)


def verified(rank: int, tree: dict[str, Any], layouts: list[str]) -> list[str]:
    """What is wrong."""
    plan, _ = build_verification_spec(Config.model_validate(tree), 2, layouts, "float64", full=False)
    results = verify(plan, Runtime(Launch("verify", rank, 2, rank, 2), CPU, "gloo", timedelta(seconds=180)))
    wrong = [result for result in results if not result.passes(TOLERANCES["float64"][0])]
    return [sentence for result in wrong for sentence in (result.layout, *explain(result, 1e-9), *result.ledger)]


def test_an_imported_family_is_the_same_in_every_layout(imported: tuple[str, Path]) -> None:
    config = load_config(imported[1] / "config.yaml", ["training.global_batch=6"])
    layouts = ["tp=2,ep=2", "cp=2,ep=2,data=sharded", "pp=2,micro_steps=2"]
    assert run_ranks(2, verified, config.model_dump(mode="json"), layouts) == [[], []]


def test_it_writes_what_transformers_writes(imported: tuple[str, Path]) -> None:
    """Greedily, a batch of two unlike lengths, from the cache."""
    name, folder = imported
    prompts = [[5, 77, 100, 3, 9, 12], [200, 4, 4]]
    ours = generate(load_ours(folder), prompts, num_tokens=8, window=64)
    theirs = make_peer(name)
    for prompt, text in zip(prompts, ours, strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        assert text == expected[0].tolist()
