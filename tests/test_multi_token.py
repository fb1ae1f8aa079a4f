"""Multi-token prediction: which positions have a target, and the same model in every layout."""

from typing import Any

import pytest
import torch

from expert_parallel.cli.verify import build_verification_spec
from expert_parallel.model.multi_token import IGNORED, has_target, targets_ahead
from expert_parallel.model.parallelize import build_model, split_into_stages
from expert_parallel.training.config import Config
from expert_parallel.verify.compare import TOLERANCES
from expert_parallel.verify.explain import explain
from expert_parallel.verify.run import verify
from tests.ranks import run_ranks
from tests.test_verify import runtime_of

META = torch.device("meta")


def test_targets_of_packed_documents_by_hand() -> None:
    """Documents of 3, 1 and 2 tokens: the last token of each has no token one place later in its document."""
    documents = torch.tensor([[0, 0, 0, 1, 2, 2]])
    tokens, targets = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[2, 3, 4, 5, 6, 7]])
    none = IGNORED
    assert has_target(tokens, 1, documents).tolist() == [[True, True, False, False, True, False]]
    assert targets_ahead(targets, 1, documents).tolist() == [[3, 4, none, none, 7, none]]
    assert targets_ahead(targets, 2, documents).tolist() == [[4, none, none, none, none, none]]
    assert targets_ahead(targets, 2, None).tolist() == [[4, 5, 6, 7, none, none]]
    padding = torch.tensor([[True, True, True, True, False, False]])
    assert has_target(tokens, 2, None, padding).tolist() == [[True, True, False, False, False, False]]


MOE: dict[str, Any] = {
    "num_experts": 4,
    "router": {"k": 2},
    "losses": [{"kind": "balance", "coefficient": 0.1}, {"kind": "balance", "scope": "sequence", "coefficient": 0.1}],
    "experts": {"hidden": 16},
}
BIASED = {"kind": "top_k", "k": 2, "score": "sigmoid", "balance_bias_rate": 0.01}
POOLED = [{"kind": "balance", "coefficient": 0.1, "layers": "pooled"}]
MODELS: dict[str, dict[str, Any]] = {
    "tied": {
        "model": {"moe": {**MOE, "capacity": {"kind": "factor", "train": 1.0}}, "mtp": {"depth": 1, "weight": 0.4}},
        "data": {"documents": "separate"},
    },
    "untied, two tokens": {
        "model": {
            "num_layers": 4,
            "tied_embeddings": False,
            "moe": {**MOE, "router": BIASED, "losses": POOLED, "shared_experts": {"hidden": 16}},
            "moe_blocks": {"kind": "all_but_first", "k": 1},
            "ffn": {"hidden": 16},
            "mtp": {"depth": 2, "weight": 0.4},
        },
    },
    "dense, norms after": {
        "model": {
            "ffn": {"hidden": 16},
            "norm_placement": "post",
            "tied_embeddings": False,
            "position": {"kind": "learned", "max_length": 16},
            "mtp": {"depth": 2, "weight": 0.4},
        },
    },
}
LAYOUTS = {
    "tied": ["tp=2,ep=2,micro_steps=1,recompute=block"],
    "untied, two tokens": ["pp=2,pipeline=interleaved,ep=2,micro_steps=2,data=sharded"],
}
MORE_LAYOUTS = {
    "tied": ["pp=2,micro_steps=2", "cp=2,ep=4,data=sharded,micro_steps=2"],
    "untied, two tokens": ["tp=2,cp=2,ep=4,micro_steps=1,recompute=moe"],
    "dense, norms after": ["tp=2,cp=2,micro_steps=1,recompute=block", "pp=2,tp=2,micro_steps=2"],
}


def config_of(name: str) -> Config:
    tree: dict[str, Any] = {
        "run": {"folder": "runs/none"},
        "seed": 3,
        "model": {"num_layers": 2, "d_model": 16, "attention": {"num_heads": 4, "num_kv_heads": 2, "head_size": 4}},
        "training": {"steps": 10, "global_batch": 8, "sequence_length": 16},
    }
    tree["model"] |= MODELS[name]["model"]
    return Config.model_validate({**tree, "data": {"kind": "stdlib", **MODELS[name].get("data", {})}})


def run_verification(rank: int, world: int, layouts: list[str], name: str) -> dict[str, list[str]]:
    """The sentences on what differs, by layout."""
    plan, _ = build_verification_spec(config_of(name), world, layouts, "float64", full=False)
    results = verify(plan, runtime_of(rank, world))
    tolerance = TOLERANCES["float64"][0]
    return {result.layout: [] if result.passes(tolerance) else explain(result, tolerance) for result in results}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_as_they_are_built(name: str) -> None:
    """In all, and on each of two stages, of which the last holds the further tokens' blocks and looks tokens up."""
    model = config_of(name).model
    assert model.num_params() == sum(p.numel() for p in build_model(model, device=META).parameters())
    for stage in split_into_stages(model, 2):
        built = sum(p.numel() for p in build_model(model, device=META, stage_spec=stage).parameters())
        assert model.parameter_counts(stage.blocks, is_first=stage.is_first, is_last=stage.is_last).total == built
    assert set(model.mtp_layers) <= set(stage.blocks)


CASES: list[Any] = list(LAYOUTS.items())
CASES += [pytest.param(name, layouts, marks=pytest.mark.full) for name, layouts in MORE_LAYOUTS.items()]


@pytest.mark.parametrize(("name", "layouts"), CASES)
def test_it_is_the_same_model_in_every_layout(name: str, layouts: list[str]) -> None:
    for results in run_ranks(4, run_verification, 4, layouts, name):
        assert len(results) == len(layouts)
        for sentences in results.values():
            assert not sentences, sentences
