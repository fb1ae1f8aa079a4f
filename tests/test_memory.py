"""The estimate of a step's memory against torch's own record of allocations, in real steps on the CPU.

The record is that of torch.profiler: each allocation and release of torch's CPU allocator with the bytes that are in
use after it, so tensors that live within one operation count too. The profiler runs before the model is built.
"""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from expert_parallel.config import apply_override
from expert_parallel.data.batch import MicroBatch, shard_bounds
from expert_parallel.training.config import Config
from expert_parallel.training.engines.native import NativeEngine
from expert_parallel.training.memory import estimate_memory
from expert_parallel.training.optim import build_optimizer
from expert_parallel.training.setup import check_degrees
from expert_parallel.training.step import train_step
from tests.layouts import build_on
from tests.ranks import run_ranks

TREE: dict[str, Any] = {
    "run": {"folder": "x"},
    "model": {
        "vocab_size": 512,
        "num_layers": 3,
        "d_model": 96,
        "attention": {"num_heads": 4, "head_size": 24},
        "moe": {"num_experts": 8, "losses": [{"kind": "balance"}], "experts": {"hidden": 160}},
    },
    "training": {"steps": 2, "global_batch": 8, "sequence_length": 128, "schedule": {"kind": "constant"}},
}
DENSE = ["model.moe=null", "model.ffn={hidden: 256}"]
LATENT = "{kind: latent, num_heads: 4, query_rank: 48, kv_rank: 40, nope_size: 32, rope_size: 16, value_size: 32}"
PADDED = "model.moe.capacity={kind: factor, train: 2.0, pad: true}"
BF16, FULL = "training.dtype=bfloat16", pytest.mark.full
CASES: dict[str, list[str]] = {
    "dropless": [],
    "dropless, whole blocks recomputed, bfloat16": ["training.recompute=block", BF16],
    "dense, bfloat16": [*DENSE, BF16],
    "dense, recomputed, untied": [*DENSE, "training.recompute=block", "model.tied_embeddings=false"],
    "capacity": ["model.moe.capacity={kind: factor, train: 0.5, eval: 1.0}"],
    "capacity, padded, moe recomputed": [PADDED, "training.recompute=moe"],
    "absolute capacity, padded": ["model.moe.capacity={kind: absolute, train: 1500, eval: 9, pad: true}"],
    "absolute capacity": ["model.moe.capacity={kind: absolute, train: 60, eval: 9}", "model.vocab_size=4096"],
    "weights on the input": ["model.moe.experts.weight_input=true"],
    "shared experts with a gate, float64, 4 micro-steps": [
        "model.moe.shared_experts={hidden: 128}",
        "model.moe.shared_expert_gate=true",
        "training.dtype=float64",
        "training.micro_steps=4",
    ],
    "sandwich norms, moe recomputed": ["model.norm_placement=sandwich", "training.recompute=moe"],
    "branch norms, bfloat16": ["model.norm_placement=branch", "model.residual_multiplier=0.5", BF16],
    "latent attention": [f"model.attention={LATENT}"],
    "narrow values": [*DENSE, "model.attention={num_heads: 4, num_kv_heads: 2, head_size: 48, value_size: 32}"],
    "grouped heads, layer norm, narrow gelu experts, loop": [
        "model.attention={num_heads: 4, num_kv_heads: 2, head_size: 24, qk_norm: {kind: per_head}}",
        "model.norm.kind=layer_norm",
        "model.moe.experts={hidden: 64, activation: gelu, backend: loop}",
    ],
    "experts with biases and dropout, bfloat16": ["model.moe.experts={hidden: 160, bias: true}", BF16],
    "two further tokens": ["model.mtp.depth=2"],
    "a further token, recomputed, untied, bfloat16": [
        "model.mtp.depth=1",
        "model.tied_embeddings=false",
        "training.recompute=block",
        BF16,
    ],
    "more weights than activations, bmm": [
        "model.moe.experts={hidden: 512, backend: bmm}",
        "training.sequence_length=16",
        BF16,
    ],
    "jitter, one choice, every other block": [
        "model.moe.router={k: 1, normalise: false, jitter: 0.1}",
        "model.moe_blocks={kind: every_nth, n: 2}",
        "model.ffn={hidden: 256, activation: relu}",
    ],
}
BY_DEFAULT = ("dropless, whole blocks recomputed, bfloat16", "dense, bfloat16", "capacity, padded, moe recomputed")
LAYOUTS: dict[str, list[str]] = {
    "replicated": [],
    "sharded": ["parallel.data={kind: sharded}"],
    "ep": ["parallel.ep=2"],
    "ep, padded": ["parallel.ep=2", PADDED],
    "tp": ["parallel.tp=2"],
    "etp": ["parallel.etp=2"],
}


def config_of(overrides: list[str]) -> Config:
    tree = json.loads(json.dumps(TREE))
    for override in overrides:
        apply_override(tree, override, Config)
    return Config.model_validate(tree)


def measured(rank: int, overrides: list[str], world: int, folder: str) -> int:
    """The most bytes that torch's CPU allocator has given out at a time, from the building of the model on."""
    config = config_of(overrides)
    training, parallel = config.training, config.parallel
    layout: dict[str, Any] = {"world": world, "data": parallel.data.kind, "recompute": training.recompute}
    layout |= {name: getattr(parallel, name) for name in ("cp", "tp", "pp", "ep", "etp")}
    size = training.global_batch // training.micro_steps
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        dtype = getattr(torch, training.dtype)
        mesh, model = build_on(layout, config.model.model_dump(mode="json"), seed=0, dtype=dtype)
        engine = NativeEngine(model, build_optimizer(training.optimizer, model), mesh, training.clip_norm)
        first, count = shard_bounds(size, mesh.degrees.dp, mesh.dp_rank)
        shape = (training.micro_steps, size, training.sequence_length + 1)
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        own = tokens[:, first : first + count]
        index = torch.arange(first, first + count)
        batches = [MicroBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), index) for rows in own]
        for step in range(training.steps):
            gc.collect()  # FSDP2 leaves cycles behind, which would count until Python happens to collect them
            train_step(model, engine, batches, training, mesh, step=step, seed=0)
    path = Path(folder) / f"{rank}.json"
    record.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    in_use = [event["args"]["Total Allocated"] for event in events]
    return max(in_use) - (in_use[0] - events[0]["args"]["Bytes"])


@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=FULL) for name in CASES], ids=str
)
def test_the_estimate_is_what_torch_allocates(name: str, tmp_path: Path) -> None:
    config = config_of(CASES[name])
    (peak,) = run_ranks(1, measured, CASES[name], 1, str(tmp_path))
    assert estimate_memory(config, check_degrees(config, 1), "cpu").total == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(
    "name", [name if name == "sharded" else pytest.param(name, marks=FULL) for name in LAYOUTS], ids=str
)
def test_the_estimate_on_two_ranks(name: str, tmp_path: Path) -> None:
    """Of the rank with the most: the routers of untrained models are not balanced."""
    config = config_of(LAYOUTS[name])
    peaks = run_ranks(2, measured, LAYOUTS[name], 2, str(tmp_path))
    assert estimate_memory(config, check_degrees(config, 2), "cpu").total == pytest.approx(max(peaks), rel=0.1)
