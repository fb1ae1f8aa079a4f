"""What a model comes to: parameters, those of one token, FLOPs. By hand, and counted from models that are really built
(on the meta device)."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from expert_parallel.config import load_tree
from expert_parallel.model.config import ModelConfig, ParameterCounts
from expert_parallel.model.dense_twin import dense_twins, exchanged_bytes_per_token
from expert_parallel.model.parallelize import build_model, split_into_stages
from expert_parallel.model.transformer import StageSpec
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.moe.routers.base import LinearRouter, LinearSettings
from expert_parallel.moe.routers.registry import ROUTERS
from expert_parallel.training.config import load_config
from tests.launches import ROOT
from tests.pairwise import Case, pairwise_cases
from tests.test_attention_layouts import FAMILIES

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def counted(config: ModelConfig, stage_spec: StageSpec | None = None) -> ParameterCounts:
    """From the parameters that the model has, or a stage of it."""
    model = build_model(config, device=torch.device("meta"), stage_spec=stage_spec)
    dense = experts = 0
    for logical in logical_parameters(model):
        if logical.is_expert:
            experts += logical.parameter.numel()
        else:
            dense += logical.parameter.numel()
    return ParameterCounts(dense, experts)


def model_of(file: Path) -> ModelConfig:
    if file.name == "study.yaml":  # its variants are this with experts
        return ModelConfig.model_validate(load_tree(file)["base"]["model"])
    return load_config(file).model


# ---------------------------------------------------------------------------------------------------------------------
# By hand

ATTENTION = {"num_heads": 2, "num_kv_heads": 1, "head_size": 4}
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "num_layers": 3,
    "d_model": 10,
    "attention": ATTENTION,
    "ffn": {"hidden": 7, "activation": "gelu"},
    "moe_blocks": {"kind": "all_but_first", "k": 1},
    "moe": {
        "num_experts": 5,
        "router": {"k": 2, "bias": True},
        "experts": {"hidden": 6, "bias": True},
        "shared_experts": {"hidden": 3},
    },
}
ATTENDING = 10 * 8 + 2 * 10 * 4 + 8 * 10  # queries, keys and values, output
ROUTING, SHARED, EXPERT = 5 * 10 + 5, 3 * 10 * 3, 3 * 10 * 6 + 2 * 6 + 10
BLOCKS = 3 * (ATTENDING + 2 * 10) + 2 * 10 * 7 + 2 * (ROUTING + SHARED)  # without experts


def small(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL, **changes})


def test_a_small_model_by_hand() -> None:
    config, dense = small(), BLOCKS + 10 + 50 * 10
    assert config.parameter_counts() == ParameterCounts(dense, 2 * 5 * EXPERT)
    assert config.num_params() == dense + 2 * 5 * EXPERT
    assert config.num_active_params() == dense + 2 * 2 * EXPERT
    # Scores and sums over values: 2 heads of 4, 2 FLOPs, of half of 16 tokens; three passes, in 3 blocks.
    assert config.flops_per_token(16) == 6 * (dense + 2 * 2 * EXPERT) + 3 * 3 * (2 * 2 * 4 * 2 * 8)


def test_tables_that_are_looked_up_cost_no_flops() -> None:
    config, tied = small(tied_embeddings=False, position={"kind": "learned", "max_length": 32}), small()
    assert config.num_params() == tied.num_params() + 50 * 10 + 32 * 10
    assert config.num_active_params() == tied.num_active_params() + 50 * 10 + 32 * 10
    assert config.flops_per_token(16) == tied.flops_per_token(16)


def test_latent_attention_by_hand() -> None:
    latent = {"kind": "latent", "num_heads": 2, "query_rank": 7, "kv_rank": 5}
    config = small(attention={**latent, "nope_size": 3, "rope_size": 2, "value_size": 4})
    query = 10 * 7 + 7 + 7 * 2 * (3 + 2)
    key_and_value = 10 * (5 + 2) + 5 + 5 * 2 * (3 + 4)
    more = 3 * (query + key_and_value + 2 * 4 * 10 - ATTENDING)
    assert config.num_params() == small().num_params() + more
    attention = 3 * 3 * (2 * (3 + 2 + 4) * 2 * 8)
    assert config.flops_per_token(16) == 6 * config.num_active_params() + attention


def test_expert_choice_gives_a_token_its_mean_of_experts() -> None:
    router = {"kind": "expert_choice", "train": 1.5, "accept_future_tokens": True}
    config = small(moe={**SMALL["moe"], "router": router})
    assert config.num_active_params() == config.parameter_counts().dense + round(2 * 1.5 * EXPERT)


def test_mixtral_by_hand() -> None:
    """Jiang et al. 2024: 46.7 and 12.9 billion."""
    config = model_of(ROOT / "configs" / "mixtral-8x7b.yaml")
    expert = 3 * 4096 * 14336
    dense = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096 + 2 * 4096) + 4096 + 2 * 32000 * 4096
    assert config.num_params() == dense + 32 * 8 * expert == 46_702_792_704
    assert config.num_active_params() == dense + 32 * 2 * expert == 12_879_925_248
    multiplied = 12_879_925_248 - 32000 * 4096
    assert config.flops_per_token(4096) == 6 * multiplied + 6 * 32 * 4096 * 4096


def test_a_hundred_thousand_blocks_are_not_built() -> None:
    counts = small(num_layers=100_000).parameter_counts()
    assert counts.experts == 99_999 * 5 * EXPERT
    dense = 100_000 * (ATTENDING + 2 * 10) + 2 * 10 * 7 + 99_999 * (ROUTING + SHARED)
    assert counts.dense == dense + 10 + 50 * 10


def test_a_small_models_dense_twins_by_hand() -> None:
    """Two blocks of 5 experts of hidden 6 with biases, top-2, and a shared network of hidden 3; swiglu, so a hidden
    column of the twin has 3 x 10 weights, and biases round to whole columns."""
    config = small()
    twins = dense_twins(config, 16)
    rest = config.num_params() - 2 * (5 * EXPERT + SHARED + ROUTING)
    for twin, feed_forward in (
        (twins.equal_operations, 2 * EXPERT + SHARED),
        (twins.equal_parameters, 5 * EXPERT + SHARED),
    ):
        assert twin.hidden == round(feed_forward / 30)
        assert twin.parameters == twin.active == rest + 2 * 30 * twin.hidden
        assert twin.operations == 6 * twin.parameters + 3 * 3 * (2 * 2 * 4 * 2 * 8)
    assert (twins.mixture.hidden, twins.mixture.used) == (5 * 6 + 3, 2 * 6 + 3)
    assert (twins.mixture.parameters, twins.mixture.active) == (config.num_params(), config.num_active_params())


def test_mixtrals_dense_twins_are_mistrals() -> None:
    """Of transformers, on the meta device: hidden 2 x 14,336 for equal operations, 8 x 14,336 for equal parameters."""
    transformers = pytest.importorskip("transformers")
    twins = dense_twins(model_of(ROOT / "configs" / "mixtral-8x7b.yaml"), 4096)
    routers = 32 * 8 * 4096
    for twin, experts, params in (
        (twins.equal_operations, 2, 12_879_925_248 - routers),
        (twins.equal_parameters, 8, 46_702_792_704 - routers),
    ):
        sizes = {"hidden_size": 4096, "intermediate_size": experts * 14336, "num_hidden_layers": 32}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
        with torch.device("meta"):
            mistral = transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=32000, **sizes, **heads))
        assert twin.hidden == experts * 14336
        assert twin.parameters == mistral.num_parameters() == params
    assert twins.active_share == pytest.approx(0.276, abs=5e-4)
    assert twins.memory_ratio == pytest.approx(46.70 / 12.88, abs=5e-3)
    # 6 FLOPs for each weight that is multiplied, and attention to half of 4,096 tokens in 32 blocks.
    attention, table = 6 * 32 * 4096 * 4096, 32000 * 4096
    assert twins.equal_parameters.operations == 6 * (46_702_792_704 - routers - table) + attention
    # A token's 2 experts lie on 2 of 8 ranks, 7 in 8 of these are others; 4,096 bfloat16, there and back, twice.
    ranks = 8 * (1 - 21 / 28)
    model = model_of(ROOT / "configs" / "mixtral-8x7b.yaml")
    assert exchanged_bytes_per_token(model, 8, 2) == pytest.approx(4 * 32 * ranks * 7 / 8 * 4096 * 2)


# ---------------------------------------------------------------------------------------------------------------------
# From models that are built


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_committed_configs(file: Path) -> None:
    config = model_of(file)
    assert config.parameter_counts() == counted(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families(family: str) -> None:
    config = ModelConfig.model_validate({"num_layers": 2, "d_model": 16, **FAMILIES[family]})
    assert config.parameter_counts() == counted(config)


LATENT = {"kind": "latent", "num_heads": 4, "kv_rank": 5, "nope_size": 3, "rope_size": 2, "value_size": 4}
HEADS = {"num_heads": 4, "head_size": 6}
FACTORS: dict[str, list[Any]] = {
    "attention": [
        HEADS,
        {**HEADS, "num_kv_heads": 2, "bias": True},
        {**HEADS, "bias": True, "out_bias": False, "sinks": True},
        {**HEADS, "out_bias": True, "window": 3},
        {**HEADS, "num_kv_heads": 2, "bias": True, "value_size": 5},
        LATENT,
        {**LATENT, "query_rank": 7},
    ],
    "qk_norm": [None, {"kind": "per_head"}, {"kind": "whole"}, {"kind": "l2"}],
    "tied_embeddings": [True, False],
    "unembedding_bias": [False, True],
    "position": [{"kind": "rope"}, {"kind": "learned", "max_length": 9}],
    "norm": [{"kind": "rms_norm"}, {"kind": "layer_norm"}],
    "norm_placement": ["pre", "post", "branch", "sandwich"],
    "moe_output_norm": [False, True],
    "ffn": [{"hidden": 7, "activation": "relu"}, {"hidden": 7, "bias": True}],
    "moe_blocks": [
        None,  # a dense model
        {"kind": "all"},
        {"kind": "every_nth", "n": 2},
        {"kind": "all_but_first", "k": 1},
        {"kind": "list", "indices": [3, 0]},
    ],
    "router": [
        {"k": 2},
        {"k": 3, "bias": True, "score": "sigmoid", "balance_bias_rate": 0.1},
        {"kind": "noisy_top_k"},
        {"kind": "noisy_top_k", "noise": "learned", "bias": True},
        {"kind": "gshard"},
        {"kind": "expert_choice", "bias": True, "accept_future_tokens": True},
        {"kind": "hash"},
        {"kind": "sinkhorn"},
        {"kind": "sparsemixer", "bias": True},
    ],
    "experts": [
        {"hidden": 6},
        {"hidden": 6, "activation": "gelu", "bias": True},
        {"hidden": 6, "activation": "gpt_oss"},
    ],
    "shared_experts": [None, {"hidden": 3}, {"hidden": 3, "activation": "relu", "bias": True}],
    "stages": [1, 2, 3, 4],
}


def possible(case: Case) -> bool:
    if case["moe_output_norm"] and (case["moe_blocks"] is None or case["norm_placement"] != "pre"):
        return False
    is_latent, is_learned = case["attention"].get("kind") == "latent", case["position"]["kind"] == "learned"
    if is_learned and (is_latent or case["qk_norm"] == {"kind": "l2"}):
        return False
    return not (is_latent and case["qk_norm"] is not None)


def config_of(case: Case) -> ModelConfig:
    attention = {**case["attention"], **({} if case["qk_norm"] is None else {"qk_norm": case["qk_norm"]})}
    kept = ("tied_embeddings", "unembedding_bias", "position", "norm", "norm_placement", "moe_output_norm")
    tree = {"vocab_size": 33, "num_layers": 4, "d_model": 16, "attention": attention}
    tree |= {name: case[name] for name in kept}
    blocks = case["moe_blocks"]
    if blocks is not None:
        tree["moe_blocks"] = blocks
        tree["moe"] = {"num_experts": 5, **{name: case[name] for name in ("router", "experts", "shared_experts")}}
    if blocks != {"kind": "all"}:
        tree["ffn"] = case["ffn"]
    return ModelConfig.model_validate(tree)


@pytest.mark.parametrize("case", pairwise_cases(FACTORS, possible), ids=str)
def test_every_part_of_a_model_counts(case: Case) -> None:
    """Of the whole model, and of each stage of a pipeline."""
    config = config_of(case)
    assert config.parameter_counts() == counted(config)
    for stage_spec in split_into_stages(config, case["stages"]):
        counts = config.parameter_counts(stage_spec.blocks, is_first=stage_spec.is_first, is_last=stage_spec.is_last)
        assert counts == counted(config, stage_spec)


class TwoLayerConfig(LinearSettings):
    kind: Literal["two_layers"]


class TwoLayerRouter(LinearRouter):
    """Has parameters that its settings do not tell of."""

    Config = TwoLayerConfig

    def __init__(self, config: TwoLayerConfig, d_model: int, num_experts: int) -> None:
        super().__init__(config, d_model, num_experts)
        self.before = nn.Linear(d_model, d_model)


def test_a_registered_router_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "two_layers", TwoLayerRouter)
    config = small(moe={**SMALL["moe"], "router": {"kind": "two_layers", "bias": True}})
    assert config.num_params() == small().num_params() + 2 * (10 * 10 + 10)
    assert config.parameter_counts() == counted(config)
