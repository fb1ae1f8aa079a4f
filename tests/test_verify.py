"""`expert-parallel verify`: right layouts pass, known defects of the field are each found and named, and what is
refused, chosen, reduced and printed.
"""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache
from itertools import combinations, count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from expert_parallel.cli import verify as command
from expert_parallel.cli.app import app
from expert_parallel.cli.verify import build_verification_spec
from expert_parallel.moe.experts.grouped_gemm import has_bfloat16_gemm
from expert_parallel.moe.routers.base import TokenChoiceSettings, TopKRouter
from expert_parallel.moe.routers.registry import ROUTERS
from expert_parallel.runtime.process import CPU, Launch, Runtime, UserError
from expert_parallel.training.config import Config, load_config
from expert_parallel.verify import run as verify_run
from expert_parallel.verify.compare import TOLERANCES, TensorDifference, compare, parameter_group
from expert_parallel.verify.explain import explain
from expert_parallel.verify.layouts import (
    SETTINGS,
    Layout,
    check_layout,
    choose_layouts,
    covering_layouts,
    micro_step_counts,
)
from expert_parallel.verify.ranks import RankError, spawn_ranks
from expert_parallel.verify.result import LayoutResult
from expert_parallel.verify.run import verify
from expert_parallel.verify.shrink_config import shrink_config
from expert_parallel.verify.table import print_results
from tests.launches import ROOT, run_configs, start
from tests.ranks import run_ranks
from tests.verify_defects import PLANTED, WITHOUT

TREE: dict[str, Any] = {
    "run": {"folder": "runs/none"},
    "seed": 3,
    "model": {
        "num_layers": 3,
        "d_model": 16,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_size": 4, "bias": True},
        "norm": {"kind": "layer_norm"},
        "ffn": {"hidden": 16},
        "moe_blocks": {"kind": "all_but_first", "k": 1},
        "moe": {
            "num_experts": 4,
            "router": {"k": 2, "balance_bias_rate": 0.001},
            "capacity": {"kind": "factor", "train": 1.0, "scope": "global"},
            "losses": [{"kind": "balance", "coefficient": 0.1}, {"kind": "z_loss", "coefficient": 0.01}],
            "experts": {"hidden": 16, "bias": True},
        },
    },
    "training": {"steps": 10, "global_batch": 16, "sequence_length": 32},
}


def config_of(model: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **blocks: Any) -> Config:
    merged = {**TREE["model"], **(model or {}), "moe": {**TREE["model"]["moe"], **(moe or {})}}
    return Config.model_validate({**TREE, **blocks, "model": merged})


@cache
def runtime_of(rank: int, world: int) -> Runtime:
    return Runtime(Launch("verify", rank, world, rank, world), CPU, "gloo", timedelta(seconds=180))


# ---------------------------------------------------------------------------------------------- right ones, and wrong


def run_verification(rank: int, layouts: list[str], tree: dict[str, Any], dtype: str, defect: str) -> dict[str, Any]:
    """On one rank of 4: by layout, the columns that differ, and the sentences."""
    plan, _ = build_verification_spec(Config.model_validate(tree), 4, layouts, dtype, full=False)
    with defect_of(defect):
        results = verify(plan, runtime_of(rank, 4))
    tolerance = TOLERANCES[dtype][0]
    return {
        result.layout: {
            "columns": {d.column for d in result.wrong(tolerance)} | ({"dropout"} if result.dropout else set()),
            "sentences": explain(result, tolerance),
            "dropped": result.dropped / result.routed,
            "clips": result.grad_norm > (plan.config.training.clip_norm or 0),
            "backend": result.backend,
        }
        for result in results
    }


RIGHT = ["ep=4,micro_steps=1,recompute=moe", "tp=2,ep=2,data=sharded,micro_steps=2", "cp=2,pp=2,etp=2,micro_steps=2"]


@pytest.mark.parametrize("layout", RIGHT)
def test_a_right_layout_passes(layout: str) -> None:
    for result in run_ranks(4, run_verification, [layout], config_of().model_dump(mode="json"), "float64", "none"):
        (seen,) = result.values()
        assert not seen["columns"], seen["sentences"]
        assert 0.05 <= seen["dropped"] <= 0.3
        assert seen["clips"]


SEPARATE = {
    "model": {"position": {"kind": "learned", "max_length": 32}},
    "moe": {"losses": [{"kind": "balance", "coefficient": 0.1, "scope": "sequence", "layers": "pooled"}]},
    "data": {"kind": "stdlib", "documents": "separate"},
}


@pytest.mark.parametrize("layout", [*RIGHT, "pp=2,ep=2,tp=2,micro_steps=2"])
def test_documents_kept_apart_are_the_same_in_every_layout(layout: str) -> None:
    tree = config_of(**SEPARATE).model_dump(mode="json")
    for result in run_ranks(4, run_verification, [layout], tree, "float64", "none"):
        (seen,) = result.values()
        assert not seen["columns"], seen["sentences"]


@pytest.mark.parametrize(
    ("defect", "column"),
    [
        ("documents see each other", "output"),
        ("positions run on over documents", "output"),
        ("a balance loss takes documents together", "balance loss"),
    ],
)
def test_documents_not_kept_apart_are_found(defect: str, column: str) -> None:
    tree = config_of(**SEPARATE).model_dump(mode="json")
    for result in run_ranks(4, run_verification, ["cp=2,ep=2,micro_steps=1"], tree, "float64", defect):
        (seen,) = result.values()
        assert column in seen["columns"], seen


@pytest.mark.full
def test_layouts_that_show_a_defect_pass_without_it() -> None:
    for layout in sorted({layout for layout, *_ in DEFECTS.values()}):
        test_a_right_layout_passes(layout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_layout_passes_in_lower_precision(dtype: str) -> None:
    tree = config_of().model_dump(mode="json")
    (seen,) = run_ranks(4, run_verification, ["ep=2,tp=2,micro_steps=2"], tree, dtype, "none")[0].values()
    assert not seen["columns"], seen["sentences"]
    assert seen["backend"] == ("bmm" if dtype == "bfloat16" and has_bfloat16_gemm() else "grouped_mm")


@contextmanager
def defect_of(name: str) -> Iterator[None]:
    """The product with one of its functions replaced."""
    with mock.patch.object(*DEFECT_PATCHES[name]()) if name in DEFECT_PATCHES else mock.patch.object(sys, "path"):
        yield


def after_reduction(change: Callable[[Any, Any], None]) -> tuple[Any, str, Any]:
    """reduce_gradients with something done after it."""
    from expert_parallel.training.engines import native

    original = native.reduce_gradients

    def wrong(model: Any, mesh: Any, *, sharded: bool) -> None:
        original(model, mesh, sharded=sharded)
        change(model, mesh)

    return native, "reduce_gradients", wrong


def expert_gradients_divided() -> tuple[Any, str, Any]:
    from expert_parallel.moe.parameters import logical_parameters

    def divide(model: Any, mesh: Any) -> None:
        for logical in logical_parameters(model):
            if logical.is_expert:
                logical.parameter.grad /= mesh.degrees.ep

    return after_reduction(divide)


def without_sum(group: str, is_left_out: Callable[[Any], bool]) -> tuple[Any, str, Any]:
    """reduce_gradients that leaves some parameters out of the sum over one group."""
    from expert_parallel.training import grads
    from expert_parallel.training.engines import native

    original, add_up = native.reduce_gradients, grads._all_reduce_in_buckets

    def wrong(model: Any, mesh: Any, *, sharded: bool) -> None:
        def some(logicals: Any, over: Any) -> None:
            left_out = over is not None and over is getattr(mesh, group)
            add_up([one for one in logicals if not (left_out and is_left_out(one))], over)

        with mock.patch.object(grads, "_all_reduce_in_buckets", some):
            original(model, mesh, sharded=sharded)

    return native, "reduce_gradients", wrong


def counted(change: Callable[[bool, Any, Any], bool]) -> tuple[Any, str, Any]:
    """Which rank counts a parameter in the gradient norm."""
    from expert_parallel.training import grads

    original = grads.is_first_replica

    def wrong(logical: Any, mesh: Any) -> bool:
        return change(original(logical, mesh), logical, mesh)

    return grads, "is_first_replica", wrong


def norm_with_copies() -> tuple[Any, str, Any]:
    from expert_parallel.parallel.collectives import group_rank

    def change(right: bool, logical: Any, mesh: Any) -> bool:
        return right or (not logical.is_expert and logical.tensor_shard is None and group_rank(mesh.dense_group) == 0)

    return counted(change)


def balance_of_each_rank() -> tuple[Any, str, Any]:
    from expert_parallel.moe.routers import losses as balance

    original = balance.router_losses

    def wrong(configs: Any, plan: Any, batch: Any) -> Any:
        own = [c.model_copy(update={"scope": "rank"}) if c.kind == "balance" else c for c in configs]
        losses, pooled = original(own, plan, batch)
        return {name.replace("rank", "global"): value for name, value in losses.items()}, pooled

    from expert_parallel.moe import layer

    return layer, "router_losses", wrong


def own_token_counts() -> tuple[Any, str, Any]:
    """Each rank's loss is the mean over its own tokens, and these are averaged."""
    from expert_parallel.training import step

    original = step.local_cross_entropy

    def wrong(model: Any, output: Any, batch: Any, mesh: Any) -> Any:
        found = original(model, output, batch, mesh)
        mean_tokens = 5 * 8 / mesh.degrees.dp
        return replace(found, next_token=found.next_token * mean_tokens / max(1, batch.targets_BS.numel()))

    return step, "local_cross_entropy", wrong


def balance_loss_of_a_stage_lost() -> tuple[Any, str, Any]:
    from expert_parallel.model.pipeline import Stage

    original = Stage._balance_of

    def wrong(self: Any, output: Any, num_sequences: int) -> Tensor:
        balance = original(self, output, num_sequences)
        return balance * 0 if self.stage_spec.is_first else balance

    return Stage, "_balance_of", wrong


def equal_dropout() -> tuple[Any, str, Any]:
    from expert_parallel.training import step

    def wrong(seed: int, step: int, micro_step: int, layer: int, coordinate: int, *others: Any, **more: Any) -> Any:
        return original(seed, step, micro_step, layer, 0, *others, **more)

    original = step.StepContext
    return step, "StepContext", wrong


def experts_in_another_order() -> tuple[Any, str, Any]:
    from expert_parallel.moe import layer
    from expert_parallel.parallel.collectives import group_size

    original = layer.group_rank
    return layer, "group_rank", lambda group: group_size(group) - 1 - original(group)


def bias_added_by_every_rank() -> tuple[Any, str, Any]:
    from expert_parallel.moe.experts import grouped

    original = grouped._add_bias

    def wrong(rows: Tensor, bias_e: Tensor | None, counts_e: Tensor) -> Tensor:
        is_output = bias_e is not None and bias_e.shape[-1] == 16
        return original(rows, 2 * bias_e if is_output and bias_e is not None else bias_e, counts_e)

    return grouped, "_add_bias", wrong


def dropout_drawn_anew() -> tuple[Any, str, Any]:
    """From a generator that goes on, as it does without care in recomputation."""
    from expert_parallel.model import transformer

    original, calls = transformer.dropout, count()
    return transformer, "dropout", lambda x, probability, seed: original(x, probability, seed + next(calls))


def documents_see_each_other() -> tuple[Any, str, Any]:
    from expert_parallel.model.attention_mask import AttentionContext

    original = AttentionContext.mask
    return AttentionContext, "mask", lambda self, *limits: original(replace(self, document_BS=None), *limits)


def positions_run_on() -> tuple[Any, str, Any]:
    from expert_parallel.model.attention_mask import AttentionContext

    original = AttentionContext.of

    def wrong(*arguments: Any) -> AttentionContext:
        attention_context = original(*arguments)
        return replace(attention_context, position_BS=attention_context.index_BS)

    return AttentionContext, "of", staticmethod(wrong)


def balance_of_rows() -> tuple[Any, str, Any]:
    from expert_parallel.moe import layer

    original = layer.token_batch
    return layer, "token_batch", lambda *arguments: replace(original(*arguments), document_T=None)


DEFECT_PATCHES: dict[str, Callable[[], tuple[Any, str, Any]]] = {
    "expert gradients divided by ep": expert_gradients_divided,
    "router gradient not reduced over tp": lambda: without_sum("tp_group", lambda one: "router" in one.names[0]),
    "norm without experts": lambda: counted(lambda right, logical, mesh: right and not logical.is_expert),
    "norm with tensor-parallel copies": norm_with_copies,
    "balance loss of each rank": balance_of_each_rank,
    "divided by its own tokens": own_token_counts,
    "tied embedding not summed over stages": lambda: without_sum("tied_embedding_group", lambda one: True),
    "balance loss of a stage lost": balance_loss_of_a_stage_lost,
    "dropout equal over ranks": equal_dropout,
    "dropout drawn anew in recomputation": dropout_drawn_anew,
    "experts in another order": experts_in_another_order,
    "experts' bias added by every rank": bias_added_by_every_rank,
    "documents see each other": documents_see_each_other,
    "positions run on over documents": positions_run_on,
    "a balance loss takes documents together": balance_of_rows,
}

# The layout that shows it, columns that must differ, columns that must not, and what a sentence must say.
DEFECTS: dict[str, tuple[str, set[str], set[str], str]] = {
    "expert gradients divided by ep": (
        "ep=4,micro_steps=1",
        {"gradient: experts", "gradient norm", "update"},
        {"loss", "output", "gradient: router", "gradient: attention"},
        "is 0.25 times what it must be, exactly 1 / ep",
    ),
    "router gradient not reduced over tp": (
        "tp=2,ep=2,micro_steps=1",
        {"gradient: router", "gradient norm"},
        {"output", "gradient: experts", "gradient: attention"},
        "moe.router.weight",
    ),
    "norm without experts": ("ep=4,micro_steps=1", {"gradient norm", "update"}, {"gradient: experts"}, "experts count"),
    "norm with tensor-parallel copies": (
        "tp=4,micro_steps=1",
        {"gradient norm", "update"},
        {"gradient: norm"},
        "copies do not",
    ),
    "balance loss of each rank": (
        "ep=4,micro_steps=1",
        {"balance loss", "gradient: router"},
        {"loss", "output"},
        "before they are multiplied",
    ),
    "divided by its own tokens": ("ep=4,micro_steps=1", {"gradient: attention", "gradient: experts"}, {"loss"}, ""),
    "tied embedding not summed over stages": (
        "pp=2,micro_steps=2",
        {"gradient: embedding"},
        {"gradient: attention", "loss"},
        "gradient of embedding.weight",
    ),
    "balance loss of a stage lost": (
        "pp=2,micro_steps=2",
        {"gradient: router"},
        {"loss", "output"},
        "moe.router.weight",
    ),
    "dropout equal over ranks": ("ep=2,micro_steps=1", {"dropout"}, {"loss", "output"}, "draw the same masks"),
    "dropout drawn anew in recomputation": (
        "ep=2,micro_steps=1,recompute=block",
        {"dropout"},
        {"loss", "output"},
        "between training.recompute 'block' and 'none'",
    ),
    "experts in another order": ("ep=2,micro_steps=1", {"output", "loss"}, set(), "block 1 differs"),
    "experts' bias added by every rank": ("etp=2,micro_steps=1", {"output", "loss"}, set(), "block 1 differs"),
}


@pytest.mark.parametrize("defect", sorted(DEFECTS))
def test_a_defect_is_found_and_named(defect: str) -> None:
    layout, differ, agree, words = DEFECTS[defect]
    results = run_ranks(4, run_verification, [layout], config_of().model_dump(mode="json"), "float64", defect)
    for result in results:
        (seen,) = result.values()
        assert differ <= seen["columns"], seen
        assert not agree & seen["columns"], seen
        assert any(words in sentence for sentence in seen["sentences"]), seen["sentences"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if defect.is_slow else name for name, defect in PLANTED.items()]
)
def test_a_planted_defect_is_found_and_named(name: str) -> None:
    planted = PLANTED[name]
    tree = config_of(moe=planted.moe).model_dump(mode="json")
    columns, sentences = run_ranks(2, run_planted, tree, name)[0]
    assert planted.column in columns, (columns, sentences)
    assert any(all(words in sentence for words in planted.words) for sentence in sentences), sentences


def run_planted(rank: int, tree: dict[str, Any], name: str) -> tuple[set[str], list[str]]:
    """On one rank of 2: the columns that differ, and the sentences. Only the part of `verify` that shows the defect."""
    planted = (PLANTED | WITHOUT)[name]
    spec, _ = build_verification_spec(
        Config.model_validate(tree),
        2,
        [planted.layout, *planted.others],
        "float64",
        full=False,
        quick=planted.part == "step",
    )
    dropout = {"model.dropout": 0.1} if planted.part == "all" else {}
    chosen = spec.layouts if planted.part == "all" else []
    target, attribute, wrong = planted.patch()
    with (
        mock.patch.object(target, attribute, wrong),
        mock.patch.object(verify_run, "covering_layouts", return_value=chosen),
    ):
        results = verify(replace(spec, dropout=dropout), runtime_of(rank, 2))
    result, tolerance = results[0], TOLERANCES["float64"][0]
    columns = {difference.column for difference in result.wrong(tolerance)}
    columns |= {name for name in ("errors", "dropout") if getattr(result, name)}
    return columns, explain(result, tolerance, results)


@pytest.mark.parametrize("name", WITHOUT)
def test_without_a_defect_nothing_differs(name: str) -> None:
    tree = config_of(moe=WITHOUT[name].moe).model_dump(mode="json")
    assert run_ranks(2, run_planted, tree, name) == [(set(), [])] * 2


def compare_broken(rank: int) -> list[tuple[float, ...]]:
    """Rank 1 has half of b, no rank has c, rank 0 a number that is none in d."""
    one = torch.tensor([1.0, 2.0]).double()
    expected = {f"gradient/{name}": one for name in "abcd"}
    pairs = {"gradient/a": (one, one), "gradient/b": (one / (1 + rank), one)}
    if rank == 0:
        pairs["gradient/d"] = (one / 0, one)
    found = compare(pairs, expected, floor=1e-3)
    return [(d.is_present, d.relative, d.ratio, d.residual, d.rank) for d in found]


def test_the_worst_rank_counts() -> None:
    for a, b, c, d in run_ranks(2, compare_broken):
        assert a[:2] == (True, 0.0)
        assert b == (True, 0.5, 0.5, 0.0, 1)
        assert c[0] is False
        assert d[:2] == (True, float("inf"))


# ------------------------------------------------------------------------------------------ layouts, and smaller sizes


def test_layouts_are_read() -> None:
    layout = Layout.parse("ep=4, tp=2,data=sharded,micro_steps=1")
    assert layout.settings == (("ep", 4), ("tp", 2), ("data", "sharded"), ("micro_steps", 1))
    assert Layout.parse("ep=1,pp=2,data=replicated,pipeline=1f1b").name == "pp=2"
    assert Layout.parse("ep=1").name == "ep=1"
    assert Layout.parse(layout.name) == layout
    applied = layout.apply(config_of())
    assert (applied.parallel.ep, applied.parallel.tp, applied.parallel.data.kind) == (4, 2, "sharded")
    assert applied.training.global_batch // applied.training.micro_steps == 16, "micro-steps keep their size"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ep", "'ep' is not of the form name=value"),
        ("ep=", "'ep=' is not of the form name=value"),
        ("dp=2", "'dp' is none of cp, tp, pp, ep, etp, data, shards, pipeline, micro_steps, recompute"),
        ("ep=2,ep=4", "ep is given twice"),
        ("ep=8", "model.moe.num_experts (4) is smaller than parallel.ep (8)"),
        ("tp=3", "the world size (4) is not a multiple of parallel.tp (3)"),
        ("pp=2,micro_steps=1", "training.micro_steps (1) is smaller than parallel.pp (2)"),
        ("data=halved", "found"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="layout") as error:
        check_layout(config_of(), Layout.parse(text), 4)
    assert said in str(error.value) or text == "data=halved"


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_pair_that_can_be_is_covered(ranks: int) -> None:
    """By brute force over all layouts; the user's own comes first."""
    reduced = shrink_config(config_of(parallel={"ep": ranks}), ranks, full=False)
    chosen = choose_layouts(reduced.config, reduced.own, ranks, micro_step_counts(ranks))
    assert chosen[0] == reduced.own
    assert len(chosen) == len(set(chosen)) <= 30

    def pairs(layout: Layout) -> set[Any]:
        return set(combinations(layout.settings, 2))

    covered = set().union(*map(pairs, chosen))
    from expert_parallel.verify.layouts import _candidates, _fits

    missed = [
        layout
        for layout in _candidates(ranks, micro_step_counts(ranks))
        if not pairs(layout) <= covered and _fits(reduced.config, layout, ranks)
    ]
    assert not missed
    assert {name for name, _ in chosen[0].settings} == set(SETTINGS) - {"shards"}


def test_few_layouts_use_every_axis() -> None:
    """Of those that are chosen without --quick, which all accumulate gradients."""
    spec, _ = build_verification_spec(config_of({"num_layers": 4}), 4, [], "float64", full=False, quick=False)
    chosen = covering_layouts(spec.layouts, 4)
    assert 2 <= len(chosen) <= 4
    assert set(chosen) <= set(spec.layouts)
    used = [{name for name, value in layout.settings if value not in (1, "none", "1f1b")} for layout in chosen]
    assert set().union(*used) >= {"cp", "tp", "pp", "ep", "etp"}
    kinds = {value for layout in chosen for _, value in layout.settings}
    assert {"replicated", "sharded", "interleaved", "1f1b"} <= kinds
    assert all(int(dict(layout.settings)["micro_steps"]) >= 2 for layout in spec.layouts)


SHIPPED = run_configs()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_config_can_be_reduced(file: Path) -> None:
    """Small, with two MoE blocks or more if it has any, and unequal numbers of sequences on the data ranks."""
    config = load_config(file)
    reduced = shrink_config(config, 4, full=False)
    model = reduced.config.model
    assert model.d_model <= 16
    assert (model.moe is None) == (config.model.moe is None)
    if model.moe is not None and config.model.moe is not None:
        assert len(model.moe_layers) >= 2
        assert model.moe.router.kind == config.model.moe.router.kind
    assert reduced.config.training.global_batch // reduced.config.training.micro_steps == 5
    assert any("model.d_model" in change for change in reduced.changes)


def test_what_is_reduced_and_switched_off_is_said() -> None:
    model = {"dropout": 0.2, "d_model": 32, "moe_blocks": {"kind": "every_nth", "n": 2}, "num_layers": 12}
    moe = {
        "num_experts": 48,
        "router": {"k": 2, "group_limit": {"count": 6, "limit": 3}},
        "capacity": {"kind": "absolute", "train": 500, "eval": 500},
        "experts": {"hidden": 16, "output_dropout": 0.3},
        "dispatcher": {"kind": "hierarchical"},
    }
    reduced = shrink_config(config_of(model, moe, parallel={"ep": 24}), 4, full=False)
    config, said = reduced.config, "; ".join(reduced.changes + reduced.settings)
    assert config.model.moe is not None
    assert config.model.moe_layers == [1, 3]
    assert config.model.moe.num_experts == 24
    assert config.model.moe.capacity.train < 10  # type: ignore[union-attr]
    for words in (
        "model.dropout 0.2 -> 0.0",
        "output_dropout 0.3 -> 0.0",
        "model.num_layers 12 -> 4",
        "num_experts 48 -> 24",
        "ranks_per_node None -> 2 (as if there were two nodes)",
        "training.dtype float32 -> float64",
        "model.moe.ledger counts -> rows",
    ):
        assert words in said, words
    plan, reduced = build_verification_spec(config_of(model, moe, parallel={"ep": 24}), 4, [], "float64", full=False)
    assert "the config's own layout, ep=24" in "; ".join(reduced.changes)
    assert plan.dropout == {
        "model.dropout": 0.2,
        "model.moe.experts.hidden_dropout": 0.1,
        "model.moe.experts.output_dropout": 0.3,
    }


def test_in_full_the_sizes_stay() -> None:
    config = config_of({"d_model": 48})
    reduced = shrink_config(config, 4, full=True)
    assert not reduced.changes
    assert reduced.config.model == config.model.model_copy(update={"moe": reduced.config.model.moe}), (
        "but for the ledger of the MoE layers"
    )
    assert reduced.config.training.global_batch == 16


def test_a_receive_bound_is_refused() -> None:
    config = config_of(moe={"capacity": {"kind": "dropless", "receive_bound": 2.0}})
    with pytest.raises(ValueError, match=r"model\.moe\.capacity\.receive_bound: .* depends on the layout"):
        shrink_config(config, 4, full=False)


def test_a_registered_router_without_a_reference_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class MyRouter(TopKRouter):
        Config = TokenChoiceSettings

    monkeypatch.setitem(ROUTERS, "mine", MyRouter)
    config = config_of(moe={"router": {"kind": "mine", "k": 2}})
    with pytest.raises(ValueError, match=r"router\.kind is 'mine': verify needs a reference .*moe/reference"):
        shrink_config(config, 4, full=False)


# --------------------------------------------------------------------------------------------- tables and sentences


def result_of(*differences: TensorDifference, **changes: Any) -> LayoutResult:
    degrees = {"ep": 4, "etp": 1, "edp": 2, "tp": 2, "cp": 1, "dp": 4, "pp": 1, "micro_steps": 3}
    fields = {"routed": 40, "dropped": 4, "grad_norm": 1.0, "ledger": [], "dropout": [], "backend": "loop"}
    return LayoutResult("ep=4", list(differences), degrees=degrees, seconds=1.0, **(fields | changes))  # type: ignore[arg-type]


def difference(
    name: str, ratio: float, relative: float = 0.5, residual: float = 0.0, is_present: bool = True
) -> TensorDifference:
    return TensorDifference(name, is_present, relative, ratio, residual, rank=1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            difference("gradient/blocks.1.moe.experts.3.w_in", 4.0),
            "4 times what it must be, exactly ep; the all-to-all's",
        ),
        (
            difference("gradient/blocks.1.moe.experts.3.w_in", 0.5),
            "exactly 1 / edp = 1 / tp; it is averaged over the ranks that",
        ),
        (difference("gradient/embedding.weight", 0.25), "0.25 times what it must be, exactly 1 / dp; it is averaged"),
        (difference("gradient/final_norm.weight", 2.0), "exactly tp; each tensor-parallel rank adds the whole of it"),
        (difference("gradient/final_norm.weight", 3.0), "exactly micro_steps; each micro-step is divided by its own"),
        (difference("gradient/embedding.weight", 16.0), "exactly dp^2"),
        (difference("gradient/embedding.weight", 0.7), "it is 0.7 times what it must be; some tokens' parts"),
        (difference("gradient/embedding.weight", 4.0, residual=0.1), "differs by 5.0e-01 (rank 1): some tokens' parts"),
        (
            difference("gradient/embedding.weight", 1.0, is_present=False),
            "gradient of embedding.weight: no rank has it",
        ),
    ],
)
def test_a_factor_is_explained(wrong: TensorDifference, said: str) -> None:
    right = difference("gradient/final_norm.bias", 1.0, relative=1e-12)
    sentences = explain(result_of(right, wrong), 1e-9)
    assert len(sentences) == 1
    assert said in sentences[0]


def test_what_follows_from_an_earlier_difference_is_only_named() -> None:
    sentences = explain(
        result_of(
            difference("update/embedding.weight", 1.1),
            difference("gradient norm/gradient norm", 1.1),
            difference("output/micro-step 0, block 1", 1.1, relative=0.1),
            difference("output/micro-step 0, block 2", 1.1, relative=0.9),
        ),
        1e-9,
    )
    assert sentences[0].startswith("output of micro-step 0, block 1 differs by 1.0e-01 (rank 1) (and 1 more)")
    assert sentences[1] == "later quantities differ as a consequence: update, gradient norm"


@pytest.mark.parametrize("width", [60, 100, 1000])
def test_the_table_shows_everything_however_narrow(width: int) -> None:
    wrong = difference("gradient/blocks.1.moe.router.weight", 2.0, relative=0.25)
    dropped = difference("dropped/block 1, choices dropped", 1.0, relative=0.0)
    results = [
        result_of(difference("loss/loss", 1.0, relative=0.0), wrong, dropped),
        result_of(difference("loss/loss", 1.0, relative=3e-15), difference(wrong.name, 1.0, relative=2e-16)),
    ]
    results.append(result_of(difference("loss/loss", 1.0, is_present=False), ledger=["ledger: a row was lost"]))
    file = io.StringIO()
    print_results(results, 1e-9, Console(file=file, width=width))
    text = file.getvalue()
    words = ("loss", "router", "dropout", "verdict", "3e-15", "2e-01", "missing", "BREACH", "DIFFERS", "ok", "10 %")
    assert [word for word in words if word not in text] == []
    assert "…" not in text
    assert "  ledger: a row was lost" in text


def test_parameters_are_grouped() -> None:
    groups = {
        "embedding.weight": "embedding",
        "position.weight": "embedding",
        "unembedding.weight": "embedding",
        "blocks.0.attention.query.bias": "attention",
        "blocks.0.attention_norm.weight": "norm",
        "final_norm.bias": "norm",
        "blocks.2.ffn.w_in.weight": "ffn",
        "blocks.2.moe.router.noise_weight": "router",
        "blocks.2.moe.experts.11.b_in": "experts",
        "blocks.2.moe.shared_experts.w_in.weight": "shared experts",
    }
    assert {name: parameter_group(name) for name in groups} == groups


# ----------------------------------------------------------------------------------- ranks of our own, the command


def work(task: str, runtime: Runtime, say: Callable[[str], None]) -> list[int]:
    say("one")
    if task == "fails" and runtime.rank == 1:
        raise KeyError("lost")
    if task == "dies" and runtime.rank == 1:
        os._exit(7)
    if task == "refused":
        runtime.run_on_all_ranks(lambda: Layout.parse("nonsense"))
    total = torch.tensor([runtime.rank + 1])
    dist.all_reduce(total)  # where the other is gone: waits
    return [int(total), runtime.world_size]


def run_work(task: str) -> tuple[Any, list[str]]:
    said: list[str] = []
    return spawn_ranks(2, work, task, said.append, timedelta(seconds=60)), said


def test_ranks_of_our_own() -> None:
    assert run_work("right") == ([3, 2], ["one"])
    with pytest.raises(RankError, match=r"rank 1 failed: KeyError in test_verify\.py, line \d+: 'lost'"):
        run_work("fails")
    with pytest.raises(RankError, match="rank 1 ended with exit code 7"):
        run_work("dies")
    with pytest.raises(UserError, match="'nonsense' is not of the form name=value"):
        run_work("refused")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(config_of().model_dump_json())))
    return path


@pytest.mark.parametrize("launcher", [pytest.param("alone", marks=pytest.mark.full), "torchrun"])
def test_the_command(config_file: Path, launcher: str) -> None:
    """Ranks of our own, or a launcher's; one rank speaks."""
    layouts = ["--ranks", "2", "--layout", "ep=2", "--layout", "tp=2,data=sharded"]
    said = start(launcher, "verify", config_file, *layouts, "runtime.device=cpu")
    assert said.returncode == 0, said.output
    for words in (
        "all 2 layouts compute the same",
        f"2 ranks on cpu{'' if launcher == 'alone' else ' (gloo)'}, 3 steps in float64, experts by loop",
        "ep=2, beside 3 steps: a step in float32 with experts by grouped_mm; the checkpoint of tp=2,data=sharded",
        "tp=2,data=sharded, beside 3 steps: a step in float32 with experts by grouped_mm; the checkpoint of ep=2",
        "made smaller: training.sequence_length 32 -> 8",
        "2 of 2: tp=2,data=sharded",
    ):
        assert said.output.count(words) == 1, (words, said.output)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layout", "ep=3"], "layout ep=3: the world size (4) is not a multiple of parallel.ep (3)"),
        (["--dtype", "float16"], "--dtype is 'float16', it must be one of float64, float32, bfloat16"),
        (["model.d_modl=3"], "unknown setting model.d_modl"),
        (["model.moe.capacity={kind: dropless, receive_bound: 2}"], "depends on the layout by definition"),
    ],
)
def test_the_command_refuses(config_file: Path, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["verify", str(config_file), *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


@pytest.mark.parametrize("change", ["data.documents=separate", "runtime.backend=mpi"])
def test_bytes_that_cannot_be_counted_are_refused(change: str) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", [change])
    with pytest.raises(ValueError, match=f"^--bytes: {change.split('=')[0]} is '"):
        command._refuse_bytes(config)
