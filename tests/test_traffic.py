"""The bytes of a training step, measured at torch's collectives on real ranks, equal the formulas of model/README.md,
for every axis; the formulas equal numbers worked out by hand; and waste shows."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from expert_parallel.data.batch import MicroBatch, shard_bounds
from expert_parallel.model import tensor_parallel
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.parallel.collectives import all_gather_single, reduce_scatter_single
from expert_parallel.parallel.mesh import build_mesh
from expert_parallel.training.config import DTYPES, TrainingConfig
from expert_parallel.training.engines.native import NativeEngine
from expert_parallel.training.optim import build_optimizer
from expert_parallel.verify.traffic import AxisBytes, counting_collective_bytes, format_axis_bytes, measure_step_bytes
from tests.layouts import build_on, parallel_config
from tests.ranks import run_ranks

README = Path(__file__).parents[1] / "expert_parallel/model/README.md"
LENGTH = 8
MODEL: dict[str, Any] = {
    "vocab_size": 33,  # not a multiple of tp
    "num_layers": 3,
    "d_model": 16,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_size": 6, "bias": True},
    "ffn": {"hidden": 20, "bias": True},
    "moe_blocks": {"kind": "all_but_first", "k": 1},
    "moe": {
        "num_experts": 7,  # nor of ep, nor of the shards
        "router": {"k": 2},
        "losses": [{"kind": "balance"}, {"kind": "balance", "scope": "sequence"}, {"kind": "z_loss"}],
        "experts": {"hidden": 12, "bias": True},
        "shared_experts": {"hidden": 8, "bias": True},
    },
    "init_std": 0.3,
}


def moe(**settings: Any) -> dict[str, Any]:
    return {"moe": {**MODEL["moe"], **settings}}


POOLED = [{"kind": "balance", "layers": "pooled", "scope": scope} for scope in ("global", "sequence")]
UNTIED = {"tied_embeddings": False, "unembedding_bias": True}
LATENT = {"kind": "latent", "num_heads": 4, "query_rank": 7, "kv_rank": 5}
LATENT |= {"nope_size": 3, "rope_size": 2, "value_size": 4}

# 6 sequences a micro-step: on 4 data ranks they are 2, 2, 1 and 1. The last column: axes that must move something.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tp": ({"world": 2, "tp": 2}, {}, "tp stage sequence edp world"),
    "tp, bfloat16": ({"world": 4, "tp": 2, "dtype": "bfloat16"}, UNTIED, "tp dense"),
    "tp, copies of key heads": ({"world": 4, "tp": 4, "ep": 2}, {}, "tp key ep"),
    "cp": ({"world": 4, "cp": 2, "tp": 2, "ep": 4}, {}, "cp tp sequence ep"),
    "cp, copies of key heads": (
        {"world": 4, "cp": 2, "tp": 2},
        {"attention": {"num_heads": 4, "num_kv_heads": 1, "head_size": 6, "value_size": 4}},
        "cp key",
    ),
    "latent attention": ({"world": 4, "cp": 2, "tp": 2, "recompute": "block"}, {"attention": LATENT}, "tp cp"),
    "latent attention, sharded": (
        {"world": 4, "tp": 2, "data": "sharded", "micro_steps": 2, "dtype": "bfloat16"},
        {"attention": {**LATENT, "query_rank": None}},
        "tp dense",
    ),
    "pp": ({"world": 2, "pp": 2, "micro_steps": 2}, {}, "pp tied"),
    "pp, untied": ({"world": 4, "pp": 2, "micro_steps": 3}, UNTIED, "pp dense"),
    "pp, pooled losses": ({"world": 4, "pp": 2, "tp": 2, "micro_steps": 2}, moe(losses=POOLED), "pp"),
    "interleaved": ({"world": 4, "pp": 2, "micro_steps": 4, "pipeline": "interleaved"}, {"num_layers": 4}, "pp tied"),
    "ep x dp": (
        {"world": 4, "ep": 2},
        moe(router={"kind": "noisy_top_k", "k": 2}, losses=[{"kind": "importance"}, {"kind": "load"}]),
        "ep edp dense stage",
    ),
    "ep in chunks, sharded": (
        {"world": 4, "ep": 2, "data": "sharded"},
        moe(dispatcher={"kind": "all_to_all", "overlap": 3}),
        "ep edp",
    ),
    "ep, micro-steps": ({"world": 4, "ep": 4, "micro_steps": 2, "recompute": "block"}, {}, "ep dense"),
    "tp x pp x ep": ({"world": 8, "tp": 2, "pp": 2, "ep": 2, "micro_steps": 2}, {}, "tp pp ep edp dense tied"),
    "dense model": (
        {"world": 4, "pp": 2, "cp": 2, "micro_steps": 2},
        {"moe": None, "moe_blocks": {"kind": "all"}},
        "cp",
    ),
    "sharded": ({"world": 4, "ep": 2, "data": "sharded", "micro_steps": 2, "dtype": "bfloat16"}, {}, "edp dense"),
    "sharded, kept": (
        {"world": 4, "tp": 2, "data": {"kind": "sharded", "reshard_after_forward": False}, "micro_steps": 2},
        {"position": {"kind": "learned", "max_length": 8}, "norm": {"kind": "layer_norm"}},
        "dense tp",
    ),
    "sharded, 3 ranks": ({"world": 3, "data": "sharded"}, UNTIED, "edp dense"),
    "sharded x pp": ({"world": 4, "data": "sharded", "pp": 2, "micro_steps": 4}, {}, "dense pp tied"),
    "sharded x interleaved": (
        {"world": 4, "data": "sharded", "pp": 2, "micro_steps": 4, "pipeline": "interleaved"},
        {"num_layers": 4},
        "dense pp",
    ),
    "hybrid": (
        {"world": 4, "data": {"kind": "sharded", "shards": 2}},
        {},
        "dense.shards dense.replicas edp.shards edp.replicas",
    ),
    "etp": ({"world": 4, "etp": 2, "ep": 2}, {}, "etp ep"),
    "etp, sharded": (
        {"world": 4, "etp": 2, "data": "sharded", "micro_steps": 2, "recompute": "block"},
        moe(capacity={"kind": "factor", "pad": True}),
        "etp edp",
    ),
    "recompute block": ({"world": 4, "tp": 2, "ep": 4, "recompute": "block", "data": "sharded"}, {}, "tp ep dense"),
    "recompute block, norms behind": ({"world": 2, "tp": 2, "recompute": "block"}, {"norm_placement": "post"}, "tp"),
    "recompute block, norms of branches": (
        {"world": 4, "tp": 2, "ep": 2, "recompute": "block", "data": "sharded"},
        {"norm_placement": "branch", "residual_multiplier": 0.5},
        "tp ep",
    ),
    "recompute block, dropout": ({"world": 2, "tp": 2, "recompute": "block"}, {"dropout": 0.1}, "tp"),
    "further tokens": (
        {"world": 4, "tp": 2, "cp": 2, "recompute": "block"},
        {"moe": None, "moe_blocks": {"kind": "all"}, "mtp": {"depth": 2}},
        "tp cp",
    ),
    "further tokens, pp": (
        {"world": 4, "pp": 2, "ep": 2, "data": "sharded", "micro_steps": 2},
        {**UNTIED, "mtp": {"depth": 1}},
        "pp ep tied",
    ),
    "recompute block, cp": ({"world": 2, "cp": 2, "recompute": "block"}, {}, "cp"),
    "recompute moe": ({"world": 4, "tp": 2, "ep": 2, "recompute": "moe"}, {}, "tp ep"),
    "other order": (
        {"world": 4, "tp": 2, "ep": 2, "order": ["tp", "pp", "cp", "dp"], "expert_order": ["ep", "edp", "etp"]},
        {},
        "tp dense ep edp",
    ),
    "a row a choice, with tags": (
        {"world": 4, "ep": 4, "recompute": "block"},
        moe(dispatcher={"kind": "all_to_all", "one_row_per": "choice"}, ledger={"kind": "rows"}),
        "ep",
    ),
    "all-gather": (
        {"world": 4, "ep": 4, "recompute": "moe", "dtype": "float32"},
        moe(dispatcher={"kind": "all_gather", "exchange_dtype": "bfloat16"}, router={"k": 3}),
        "ep",
    ),
    "overlap": (
        {"world": 4, "ep": 4, "recompute": "block"},
        moe(dispatcher={"kind": "all_to_all", "overlap": 3}),
        "ep",
    ),
    "overlap, etp": ({"world": 4, "etp": 2, "ep": 2}, moe(dispatcher={"kind": "all_to_all", "overlap": 2}), "etp ep"),
    "overlap, all-gather": (
        {"world": 4, "ep": 4, "recompute": "moe"},
        moe(dispatcher={"kind": "all_gather", "overlap": 3}, ledger={"kind": "rows"}),
        "ep",
    ),
    "hash": ({"world": 4, "ep": 2, "recompute": "block"}, moe(router={"kind": "hash", "k": 2}, losses=[]), "ep"),
    "scope global": (
        {"world": 4, "ep": 2, "recompute": "block"},
        moe(capacity={"kind": "factor", "scope": "global", "priority": "probability", "overflow": "reroute"}),
        "stage ep",
    ),
    "scope sequence": (
        {"world": 4, "cp": 2, "ep": 4, "micro_steps": 2},
        moe(
            router={"kind": "sinkhorn", "scope": "sequence"},
            capacity={"kind": "factor", "scope": "sequence", "pad": True},
        ),
        "sequence ep",
    ),
    "receive bound": (
        {"world": 4, "ep": 2, "micro_steps": 2},
        moe(capacity={"kind": "dropless", "receive_bound": 1.1}),
        "ep",
    ),
    "hierarchical": (
        {"world": 4, "ep": 4, "ranks_per_node": 2, "recompute": "block"},
        moe(dispatcher={"kind": "hierarchical"}),
        "nodes node ep",
    ),
    "overlap, hierarchical": (
        {"world": 4, "ep": 4, "ranks_per_node": 2, "recompute": "block"},
        moe(dispatcher={"kind": "hierarchical", "overlap": 2}, ledger={"kind": "rows"}),
        "nodes node ep",
    ),
}


def training_config(layout: dict[str, Any]) -> TrainingConfig:
    micro_steps = layout.get("micro_steps", 1)
    size = 8 if layout["world"] == 8 else 6
    return TrainingConfig.model_validate(
        {
            "steps": 2,
            "global_batch": size * micro_steps,
            "micro_steps": micro_steps,
            "sequence_length": LENGTH,
            "dtype": layout.get("dtype", "float64"),
            "recompute": layout.get("recompute", "none"),
        }
    )


def random_batches(training: TrainingConfig, vocab_size: int, num_ranks: int, rank: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(0)
    size, found = training.global_batch // training.micro_steps, []
    for _ in range(training.micro_steps):
        tokens = torch.randint(0, vocab_size, (size, LENGTH + 1), generator=generator)
        first, count = shard_bounds(size, num_ranks, rank)
        mine = tokens[first : first + count]
        found.append(MicroBatch(mine[:, :-1], mine[:, 1:], torch.arange(first, first + count)))
    return found


def measure(rank: int, layout: dict[str, Any], model: dict[str, Any]) -> list[AxisBytes]:
    training, parallel = training_config(layout), parallel_config(layout)
    dtype = DTYPES[training.dtype]
    if "ranks_per_node" in layout:
        degrees, config = parallel.degrees(layout["world"]), ModelConfig.model_validate(model)
        mesh = build_mesh(degrees, "cpu", timedelta(seconds=120), layout["ranks_per_node"], hierarchical=True)
        built: Any = build_model(config, mesh, dtype=dtype, recompute=training.recompute)
    else:
        mesh, built = build_on(layout, model, 0, dtype)
    batches = random_batches(training, built.config.vocab_size, mesh.degrees.dp, mesh.dp_rank)
    engine = NativeEngine(built, build_optimizer(training.optimizer, built), mesh, training.clip_norm)
    return measure_step_bytes(built, engine, batches, training, parallel, mesh, step=1, seed=0)


def measure_on_ranks(layout: dict[str, Any], model: dict[str, Any], body: Any = measure) -> list[AxisBytes]:
    everyone = run_ranks(layout["world"], body, layout, {**MODEL, **model})
    assert all(found == everyone[0] for found in everyone)
    return everyone[0]


# The sums of terms that single axes show already, and that one such case (tp x pp x ep) shows to add up.
SUMS = {
    "sharded x pp",
    "sharded x interleaved",
    "etp, sharded",
    "ep in chunks, sharded",
    "latent attention, sharded",
    "overlap, all-gather",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) if n in SUMS else n for n in CASES])
def test_measured_equals_the_formulas(name: str) -> None:
    layout, model, axes = CASES[name]
    found = measure_on_ranks(layout, model)
    assert all(axis.matches for axis in found), format_axis_bytes(found)
    moved = {label.split(": ")[0] for axis in found for label in axis.expected}
    assert {axis.replace(".", " ") for axis in axes.split()} <= moved
    for axis in found:
        for label in axis.expected:
            assert f"`{label}`" in README.read_text(), f"{label} has no formula in model/README.md"


# ------------------------------------------------------------------------------------------------------------- by hand

# A block of one MoE layer: D 4, F 6, 2 experts, 1 head of 4; 2 sequences of 8 tokens a micro-step; all in float64.
SMALL = {
    "vocab_size": 10,
    "num_layers": 1,
    "d_model": 4,
    "attention": {"num_heads": 2, "head_size": 2},
    "moe": {"num_experts": 2, "router": {"k": 1, "normalise": False}, "experts": {"hidden": 6, "activation": "gelu"}},
}
DENSE_NUMBERS = 10 * 4 + 3 * 4 + 4 * 4 * 4 + 2 * 4  # table, norms, four matrices of attention, router
EXPERT_NUMBERS = 2 * (4 * 6 + 6 * 4)


def by_hand(layout: dict[str, Any], model: dict[str, Any] | None = None) -> dict[str, int]:
    found = run_ranks(layout["world"], measure_small, layout, {**SMALL, **(model or {})})[0]
    return {label: number for axis in found for label, number in axis.expected.items()}


def measure_small(rank: int, layout: dict[str, Any], model: dict[str, Any]) -> list[AxisBytes]:
    found = measure(rank, layout, model)
    assert all(axis.matches for axis in found), format_axis_bytes(found)
    return found


def test_replicated_gradients_by_hand() -> None:
    """6 sequences; an all-reduce over 2 ranks moves each byte of the tensor 2 (2 - 1) times."""
    found = by_hand({"world": 2})
    assert found["dense: gradients"] == 2 * DENSE_NUMBERS * 8
    assert found["edp: gradients"] == 2 * EXPERT_NUMBERS * 8
    assert found["world: norm and totals"] == 2 * 8 * (
        1 + 2 + (6 * 2 + 3 + 2 + 2 * 4 + 2 * 2 + 2 * 6)
    )  # last, checksums


def test_sharded_weights_by_hand() -> None:
    """Over 3 ranks, 2 micro-steps: 4 rows are padded to 6, 10 to 12, 2 to 3. Blocks are gathered 2 * 2 times, the table
    twice."""
    found = by_hand({"world": 3, "data": "sharded", "micro_steps": 2})
    blocks, table, experts = 3 * 6 + 4 * 6 * 4 + 3 * 4, 12 * 4, 3 * 48
    assert found["dense: weights"] == 2 * (4 * blocks + 2 * table) * 8
    assert found["dense: gradients"] == 2 * (blocks + table) * 8
    assert found["edp: weights"] == 2 * 4 * experts * 8


def test_tokens_by_hand() -> None:
    """48 tokens of 4 numbers. tp: attention 4 times, embedding and logits 2 each; both heads divided over 2 ranks; the
    table divided, norms (12), router (8) not. cp: keys and values of 2 heads of 2, out and their gradients back."""
    found = by_hand({"world": 2, "tp": 2})
    assert found["tp: tokens"] == 8 * 48 * 4 * 8
    assert found["tp: cross entropy"] == 2 * 48 * 3 * 8
    assert found["tp: gradients of what it leaves whole"] == 2 * 20 * 8
    found = by_hand({"world": 2, "cp": 2})
    assert found["cp: keys and values"] == 2 * 48 * 2 * 4 * 8


def test_latents_by_hand() -> None:
    """The same with latents of 3 (queries) and 2 + 2 numbers. tp: gathered before attention, and their gradients back;
    out of it come 4 numbers, as before. cp: latents of 2 + 2, and their gradients back."""
    latent = {"kind": "latent", "num_heads": 2, "query_rank": 3, "kv_rank": 2, "rope_size": 2}
    attention = {"attention": {**latent, "nope_size": 5, "value_size": 3}}
    found = by_hand({"world": 2, "tp": 2}, attention)
    assert found["tp: tokens"] == (6 * 4 + 2 * (3 + 4)) * 48 * 8
    whole = 3 * 4 + 2 * 4 + 3 * 4 + 3 + 4 * 4 + 2  # norms, router, query_down, its norm, kv_down, its norm
    assert found["tp: gradients of what it leaves whole"] == 2 * whole * 8
    found = by_hand({"world": 2, "cp": 2}, attention)
    assert found["cp: keys and values"] == 2 * 48 * 4 * 8


def test_pipeline_by_hand() -> None:
    """2 blocks on 2 ranks, 3 micro-steps of 48 tokens and one number of balance loss, each way; both have the table."""
    found = run_ranks(2, measure_two_blocks, {"world": 2, "pp": 2, "micro_steps": 3})[0]
    assert {label: number for axis in found for label, number in axis.expected.items() if "world" not in label} == {
        "pp: tokens": 2 * 3 * 48 * 4 * 8,
        "pp: balance": 2 * 3 * 8,
        "tied: gradients": 2 * 40 * 8,
    }


def measure_two_blocks(rank: int, layout: dict[str, Any]) -> list[AxisBytes]:
    return measure(rank, layout, {**SMALL, "num_layers": 2})


# ----------------------------------------------------------------------------------------------------------- measuring


def count(rank: int, which: str) -> float:
    """Bytes that leave this rank of three: each tensor 24 bytes a rank."""
    x, three = torch.zeros(3, dtype=torch.float64), [torch.zeros(3, dtype=torch.float64) for _ in range(3)]
    collectives: dict[str, Any] = {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_reduce, later": lambda: dist.all_reduce(x, async_op=True).wait(),  # type: ignore[union-attr]
        "all_gather": lambda: dist.all_gather(three, x),
        "all_gather, one tensor": lambda: all_gather_single(torch.cat(three), x),
        "reduce_scatter": lambda: dist.reduce_scatter(x, three),
        "reduce_scatter, one tensor": lambda: reduce_scatter_single(x, torch.cat(three)),
        "all_to_all": lambda: dist.all_to_all_single(torch.zeros(3), torch.zeros(3)),
        "all_to_all, rows": lambda: dist.all_to_all_single(
            torch.zeros(3 * rank, 2), torch.zeros(3, 2), [rank] * 3, [0, 1, 2]
        ),
        "send": lambda: dist.send(x, 1) if rank == 0 else dist.recv(x, 0) if rank == 1 else None,
        "broadcast": lambda: dist.broadcast(x, 0),
        "barrier": lambda: dist.barrier(),
    }
    with counting_collective_bytes() as counted:
        collectives[which]()
    return sum(counted.sent.values()) / 3


@pytest.mark.parametrize(
    ("which", "sent"),
    [
        ("all_reduce", [32, 32, 32]),
        ("all_reduce, later", [32, 32, 32]),
        ("all_gather", [48, 48, 48]),
        ("all_gather, one tensor", [48, 48, 48]),
        ("reduce_scatter", [48, 48, 48]),
        ("reduce_scatter, one tensor", [48, 48, 48]),
        ("all_to_all", [8, 8, 8]),
        ("all_to_all, rows", [24, 16, 8]),  # of 3 rows of 8 bytes: 0, 1 and 2 to themselves
        ("send", [24, 0, 0]),
        ("barrier", [0, 0, 0]),
    ],
)
def test_what_leaves_a_rank(which: str, sent: list[float]) -> None:
    assert run_ranks(3, count, which) == sent


def refuse_broadcast(rank: int) -> str:
    try:
        count(rank, "broadcast")
    except NotImplementedError as error:
        return str(error)
    return "counted"


def test_an_unknown_collective_is_not_passed_over() -> None:
    assert run_ranks(2, refuse_broadcast) == ["bytes of c10d::broadcast_ are not counted: add it to BYTES_SENT"] * 2


def measure_with_waste(rank: int, layout: dict[str, Any], model: dict[str, Any]) -> list[AxisBytes]:
    """Tokens are gathered twice, in front of attention as elsewhere."""
    gather = tensor_parallel.gather_tokens

    def twice(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        gather(x, group)
        return gather(x, group)

    tensor_parallel.gather_tokens = twice
    try:
        return measure(rank, layout, model)
    finally:
        tensor_parallel.gather_tokens = gather


def test_waste_shows() -> None:
    """Half of the exchanges are gathers."""
    found = measure_on_ranks({"world": 4, "tp": 2, "ep": 4}, {}, measure_with_waste)
    wrong = [axis for axis in found if not axis.matches]
    assert [axis.axes for axis in wrong] == [("tp", "sequence")]
    waste = wrong[0].expected["tp: tokens"] // 2
    assert wrong[0].measured == sum(wrong[0].expected.values()) + waste
    text = format_axis_bytes(found)
    assert f"differs by +{waste:,}" in text
    assert text.endswith("these axes differ from the formulas: tp = sequence")
    assert format_axis_bytes(measure_on_ranks({"world": 2, "tp": 2}, {})).endswith(
        "all axes send what the formulas say"
    )
