"""Models on meshes for tests: a layout is a dict of degrees and settings, such as {"world": 4, "tp": 2, "ep": 2}."""

import json
from datetime import timedelta
from functools import cache
from typing import Any

import torch

from expert_parallel.model.parallelize import build_model, kv_copies
from expert_parallel.model.pipeline import build_pipeline
from expert_parallel.model.transformer import LanguageModel, ModelConfig
from expert_parallel.parallel.degrees import ParallelConfig, ShardedConfig
from expert_parallel.parallel.mesh import ParallelMesh, build_mesh

DEGREES = ("cp", "tp", "pp", "ep", "etp", "order", "expert_order", "data", "pipeline")


def parallel_config(layout: dict[str, Any]) -> ParallelConfig:
    """`data` and `pipeline` may be kinds alone; degrees beside others' settings in the layout are picked out."""
    tree = {key: value for key, value in layout.items() if key in DEGREES}
    for block in ("data", "pipeline"):
        if isinstance(tree.get(block), str):
            tree[block] = {"kind": tree[block]}
    return ParallelConfig.model_validate(tree)


@cache
def _mesh(world: int, parallel: str, copies: int, tied: bool) -> ParallelMesh:
    config = ParallelConfig.model_validate_json(parallel)
    timeout = timedelta(seconds=120)
    return build_mesh(config.degrees(world), "cpu", timeout, data=config.data, kv_copies=copies, tied_embeddings=tied)


def build_on(
    layout: dict[str, Any], model: dict[str, Any], seed: int, dtype: torch.dtype = torch.float64
) -> tuple[ParallelMesh, LanguageModel]:
    """On one rank: its mesh, kept from test to test, and its part of the model."""
    parallel, config = parallel_config(layout), ModelConfig.model_validate(model)
    copies = kv_copies(config, parallel.degrees(layout["world"]))
    mesh = _mesh(layout["world"], json.dumps(parallel.model_dump(mode="json")), copies, config.embeds_on_last_stage)
    settings: dict[str, Any] = {
        "sharding": parallel.data if isinstance(parallel.data, ShardedConfig) else None,
        "dtype": dtype,
        "recompute": layout.get("recompute", "none"),
        "seed": seed,
    }
    if parallel.pp > 1:
        return mesh, build_pipeline(config, mesh, pipeline=parallel.pipeline, **settings)
    return mesh, build_model(config, mesh, **settings)
