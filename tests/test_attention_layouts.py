"""Families of models in every layout: verify finds each part of their attention equal to one rank of plain code, finds
each defect, and what the parts move is what the formulas say."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from expert_parallel.cli.verify import build_verification_spec
from expert_parallel.model import attention, tensor_parallel
from expert_parallel.model.attention_mask import AttentionContext
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import validate_degrees
from expert_parallel.nn import norms
from expert_parallel.parallel.collectives import group_size
from expert_parallel.parallel.degrees import ParallelDegrees
from expert_parallel.training.config import Config
from expert_parallel.verify.compare import TOLERANCES
from expert_parallel.verify.explain import explain
from expert_parallel.verify.run import verify
from expert_parallel.verify.traffic import format_axis_bytes
from tests.ranks import run_ranks
from tests.test_traffic import README, measure_on_ranks
from tests.test_verify import runtime_of

HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_size": 4}
MOE: dict[str, Any] = {
    "num_experts": 4,
    "router": {"k": 2},
    "losses": [{"kind": "balance", "coefficient": 0.1}],
    "experts": {"hidden": 16},
}
YARN = {"kind": "yarn", "factor": 8.0, "original_length": 64, "truncate": False}

# As the families are imported, but small.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"attention": {**HEADS, "window": 5}, "moe": MOE},
    "qwen3-moe": {"attention": {**HEADS, "qk_norm": {"kind": "per_head"}}, "moe": MOE},
    "olmoe": {
        "attention": {**HEADS, "qk_norm": {"kind": "whole"}},
        "moe": {**MOE, "router": {"k": 2, "normalise": False}},
    },
    "gpt-oss": {
        "attention": {**HEADS, "bias": True, "sinks": True, "window": 3},
        "window_blocks": {"kind": "list", "indices": [0]},
        "position": {"kind": "rope", "theta": 150000.0, "scaling": YARN},
        "moe": {
            **MOE,
            "router": {"k": 2, "bias": True},
            "experts": {"hidden": 16, "activation": "gpt_oss", "bias": True},
        },
    },
    "mimo-v2": {
        "attention": {**HEADS, "bias": True, "window": 3},
        "window_blocks": {"kind": "list", "indices": [1]},
        "window_overrides": {"num_kv_heads": 4, "sinks": True, "position": {"theta": 50.0}},
        "moe": MOE,
    },
}
LAYOUTS = [
    "tp=2,ep=2,micro_steps=1,recompute=block",
    "tp=4,ep=2,micro_steps=1",  # two ranks hold each key head, or one where there are more heads
    "cp=2,tp=2,ep=4,data=sharded,micro_steps=1",
]
MORE_LAYOUTS = [
    "cp=2,ep=2,micro_steps=1",
    "pp=2,tp=2,ep=2,micro_steps=2,recompute=block",
    "ep=2,data=sharded,micro_steps=2,recompute=moe",
]


def tree_of(family: str) -> dict[str, Any]:
    return {
        "run": {"folder": "runs/none"},
        "seed": 3,
        "model": {"num_layers": 2, "d_model": 16, **FAMILIES[family]},
        "training": {"steps": 10, "global_batch": 8, "sequence_length": 16},
    }


def run_verification(
    rank: int, world: int, layouts: list[str], family: str, defect: str = "none"
) -> dict[str, tuple[set[str], list[str]]]:
    """By layout: the columns that differ, and the sentences."""
    plan, _ = build_verification_spec(Config.model_validate(tree_of(family)), world, layouts, "float64", full=False)
    with defect_of(defect):
        results = verify(plan, runtime_of(rank, world))
    tolerance = TOLERANCES["float64"][0]
    return {
        result.layout: ({difference.column for difference in result.wrong(tolerance)}, explain(result, tolerance))
        for result in results
    }


@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(MORE_LAYOUTS, marks=pytest.mark.full)], ids=["few", "more"])
@pytest.mark.parametrize(
    "family",
    [name if name in ("olmoe", "mimo-v2") else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES],
)
def test_a_family_is_the_same_model_in_every_layout(family: str, layouts: list[str]) -> None:
    for results in run_ranks(4, run_verification, 4, layouts, family):
        assert len(results) == len(layouts)
        for columns, sentences in results.values():
            assert not columns, sentences


# ------------------------------------------------------------------------------------------------- defects are found


@contextmanager
def defect_of(name: str) -> Iterator[None]:
    """The product with one of its functions replaced."""
    with mock.patch.object(*DEFECTS[name][2]()) if name in DEFECTS else mock.patch.object(norms, "NORMS", norms.NORMS):
        yield


def norm_of_own_heads() -> tuple[Any, str, Any]:
    """The mean square of this rank's heads alone."""

    class Own:
        @staticmethod
        def apply(x: Tensor, group: Any) -> Tensor:
            return group_size(group) * x

    return tensor_parallel, "AllReduceSum", Own


def no_sum_of_norm_gradients() -> tuple[Any, str, Any]:
    def wrong(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    return tensor_parallel.AllReduceSum, "backward", staticmethod(wrong)


def copies_counted_twice() -> tuple[Any, str, Any]:
    original = tensor_parallel.TensorParallelRMSNorm.__init__

    def wrong(self: Any, whole: Any, group: Any, copies: int) -> None:
        original(self, whole, group, copies)
        self.copies = 1

    return tensor_parallel.TensorParallelRMSNorm, "__init__", wrong


def first_heads_sinks() -> tuple[Any, str, Any]:
    """Every rank takes the sinks of the first rank's heads."""
    original = tensor_parallel.shard_parameter

    def wrong(module: Any, name: str, dim: int, group: Any, *more: Any, **others: Any) -> None:
        original(module, name, dim, group, *more, **others)
        if name == "sinks":
            part = module.tensor_shards[name]
            object.__setattr__(part, type(part).narrow_to_shard.__name__, lambda full: full[: len(module.sinks)])

    return tensor_parallel, original.__name__, wrong


def sinks_forgotten() -> tuple[Any, str, Any]:
    """Where sequences are divided."""
    from expert_parallel.model import context_parallel

    def wrong(*parts: Any) -> Tensor:
        return attention.causal_attention(*parts[:4], parts[4] * 0 - 1e4)

    return context_parallel, "causal_attention", wrong


def window_one_too_wide() -> tuple[Any, str, Any]:
    original = AttentionContext.mask
    return AttentionContext, "mask", lambda self, window=None, chunk=None: original(self, window and window + 1, chunk)


def window_everywhere() -> tuple[Any, str, Any]:
    return ModelConfig, "attention_of", lambda self, layer: self.attention


def positions_of_other_blocks() -> tuple[Any, str, Any]:
    return ModelConfig, "rope_of", lambda self, layer: self.position


def factor_forgotten() -> tuple[Any, str, Any]:
    from expert_parallel.model import rotary

    return rotary, "_attention_factor", lambda scaling: 1.0


# name -> family, layout, what is replaced.
DEFECTS: dict[str, tuple[str, str, Callable[[], tuple[Any, str, Any]]]] = {
    "norm of the own heads": ("olmoe", "tp=2,ep=2,micro_steps=1", norm_of_own_heads),
    "gradients of the norm not summed": ("olmoe", "tp=2,ep=2,micro_steps=1", no_sum_of_norm_gradients),
    "copies counted twice in the norm": ("olmoe", "tp=4,ep=2,micro_steps=1", copies_counted_twice),
    "sinks of the first heads": ("gpt-oss", "tp=2,ep=2,micro_steps=1", first_heads_sinks),
    "sinks forgotten where sequences are divided": ("gpt-oss", "cp=2,ep=2,micro_steps=1", sinks_forgotten),
    "window one too wide": ("mixtral", "cp=2,ep=2,micro_steps=1", window_one_too_wide),
    "window in every block": ("gpt-oss", "ep=2,micro_steps=1", window_everywhere),
    "positions of other blocks": ("mimo-v2", "ep=2,micro_steps=1", positions_of_other_blocks),
    "attention factor forgotten": ("gpt-oss", "ep=2,micro_steps=1", factor_forgotten),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(defect: str) -> None:
    family, layout, _ = DEFECTS[defect]
    for results in run_ranks(4, run_verification, 4, [layout], family, defect):
        ((columns, sentences),) = results.values()
        assert "gradient: attention" in columns, sentences


# ------------------------------------------------------------------------------------------------------------- bytes

BYTES: dict[str, tuple[str, dict[str, Any]]] = {
    "whole norm": ("olmoe", {"world": 4, "tp": 2, "ep": 2}),
    "whole norm, copies, recomputed": ("olmoe", {"world": 4, "tp": 4, "ep": 2, "recompute": "block"}),
    "whole norm, sharded": ("olmoe", {"world": 4, "tp": 2, "data": "sharded", "dtype": "bfloat16"}),
    "norm of each head, sharded": ("qwen3-moe", {"world": 4, "tp": 2, "data": "sharded", "dtype": "bfloat16"}),
    "sinks": ("gpt-oss", {"world": 4, "tp": 2, "cp": 2, "ep": 4}),
    "key heads of each kind of block": ("mimo-v2", {"world": 4, "tp": 2, "cp": 2, "ep": 4}),
    "key heads of which some have copies": ("mimo-v2", {"world": 4, "tp": 4, "ep": 2}),
    "sinks, sharded": ("gpt-oss", {"world": 4, "tp": 2, "data": "sharded", "dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name", BYTES)
def test_what_is_moved_is_what_the_formulas_say(name: str) -> None:
    family, layout = BYTES[name]
    dense = {"moe_blocks": {"kind": "all"}, "ffn": None}
    found = measure_on_ranks(layout, {**dense, **FAMILIES[family]})
    assert all(axis.matches for axis in found), format_axis_bytes(found)
    labels = {label for axis in found for label in axis.expected}
    assert ("tp: norms of queries and keys" in labels) is (family == "olmoe")
    for label in labels:
        assert f"`{label}`" in README.read_text(), f"{label} has no formula in model/README.md"


# ----------------------------------------------------------------------------------------------- what verify runs on


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_made_small_still_has_the_family_s_parts(family: str) -> None:
    """Windows are shorter than the sequences, scalings change some frequencies, not all."""
    tree = tree_of(family)
    tree["model"]["attention"] = {**tree["model"]["attention"], "num_heads": 32, "num_kv_heads": 8, "head_size": 64}
    if "window" in tree["model"]["attention"]:
        tree["model"]["attention"]["window"] = 128
    tree["model"]["num_layers"] = 24
    if family == "gpt-oss":
        tree["model"]["window_blocks"] = {"kind": "list", "indices": list(range(0, 24, 2))}
        tree["model"]["position"]["scaling"] = {**YARN, "original_length": 4096}
    plan, _ = build_verification_spec(Config.model_validate(tree), 4, ["ep=4"], "float64", full=False)
    small, length = plan.config.model, plan.config.training.sequence_length
    assert small.attention.kind == "heads"
    assert small.attention.qk_norm == ModelConfig.model_validate(tree["model"]).attention.qk_norm
    assert small.attention.sinks == tree["model"]["attention"].get("sinks", False)
    if small.attention.window is not None:
        assert small.attention.window < length
    if family == "mimo-v2":
        assert [attention.kv_heads for attention, _ in small.attention_counts()] == [2, 4]
    if family == "gpt-oss":
        assert 0 < len(small.window_blocks.blocks(small.num_layers)) < small.num_layers
        from expert_parallel.model.rotary import rotary_frequencies

        scaled, _ = rotary_frequencies(small.position, small.attention.head_size)
        plain, _ = rotary_frequencies(small.position.model_copy(update={"scaling": None}), small.attention.head_size)
        assert bool((scaled == plain).any())
        assert not torch.equal(scaled, plain)


@pytest.mark.parametrize(
    ("tp", "kv_heads", "message"),
    [
        (4, (4, 6), r"model\.window_overrides\.num_kv_heads \(6\) is not a multiple of parallel\.tp \(4\)"),
        (4, (3, 12), r"parallel\.tp \(4\) is not a multiple of model\.attention\.num_kv_heads \(3\)"),
        (4, (1, 2), r"parallel\.tp \(4\) is larger than both model\.attention\.num_kv_heads \(1\) and model\.window_"),
    ],
)
def test_tp_fits_the_key_heads_of_both_kinds_of_blocks(tp: int, kv_heads: tuple[int, int], message: str) -> None:
    attention = {"num_heads": 12, "num_kv_heads": kv_heads[0], "head_size": 4, "window": 3}
    overrides = {**FAMILIES["mimo-v2"]["window_overrides"], "num_kv_heads": kv_heads[1]}
    changes = {"attention": attention, "window_overrides": overrides, "num_layers": 2, "d_model": 16}
    model = ModelConfig.model_validate({**FAMILIES["mimo-v2"], **changes})
    with pytest.raises(ValueError, match=message):
        validate_degrees(model, ParallelDegrees(tp, tp=tp), 1)
