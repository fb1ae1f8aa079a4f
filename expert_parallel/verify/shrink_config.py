"""Derives the config that is verified from the user's: switches off what would disturb the comparison and, unless in
full size, reduces sizes. Keeps routers, capacity, losses, norms, biases, activations and the pattern of MoE blocks."""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from expert_parallel.data.tokenizer import VOCABULARY_SIZE
from expert_parallel.moe.reference.reference_routing import ROUTERS as REFERENCE_ROUTERS
from expert_parallel.parallel.degrees import ParallelConfig
from expert_parallel.training.config import Config
from expert_parallel.verify.layouts import Layout, config_layout, micro_step_counts

# Small, all different, and multiples of 8, which grouped matrix products require.
SIZES = {"model.d_model": 16, "model.ffn.hidden": 48, "model.moe.experts.hidden": 32}
SHARED_HIDDEN = 24
HEAD_SIZE, VALUE_SIZE = 4, 3
UNROTATED_SIZE = 2  # columns of a head beside those with rotary positions, if not all have them
MAX_KV_HEADS = 4
MAX_HEADS_PER_GROUP = 4
MAX_EXPERTS = 16
MAX_MTP_DEPTH = 2
LATENT_SIZES = {"num_heads": 8, "query_rank": 12, "kv_rank": 8, "nope_size": 6, "rope_size": 4, "value_size": 5}
WINDOW = 3  # shorter than a sequence, so that it masks some tokens
SCALED_LENGTH = 3  # likewise, so that queries are scaled by several factors
ORIGINAL_LENGTH = 64  # so that some frequencies lie within the ramp of a rotary scaling
LONGROPE_LENGTH = 5  # so that sequences of training are longer, and texts that are generated become it
INIT_STD = 0.3
CLIP_NORM = 0.1
LEARNING_RATE = 0.02  # of which the first step has half
EPS = 1e-4
BETAS = [0.6, 0.9]


@dataclass
class ConfigEditor:
    """Edits a config's tree of settings, and records each change as text."""

    tree: dict[str, Any]
    changes: list[str] = field(default_factory=list)

    def get(self, path: str) -> Any:
        """Returns the value at a dotted path; None if a part of the path is absent or null."""
        here: Any = self.tree
        for key in path.split("."):
            here = None if here is None else here.get(key)
        return here

    def put(self, path: str, value: Any, why: str = "") -> None:
        """Sets the value at a dotted path and records the change, with the reason `why`; does nothing if the config has
        no such setting or already has the value."""
        parent, _, leaf = path.rpartition(".")
        block = self.get(parent)
        if block is None or leaf not in block or block[leaf] == value:
            return
        self.changes.append(f"{path} {_shown(block[leaf])} -> {_shown(value)}" + (f" ({why})" if why else ""))
        block[leaf] = value

    def at_most(self, path: str, limit: int) -> None:
        """Reduces the value at a dotted path to `limit`, if it is set."""
        value = self.get(path)
        if value is not None:
            self.put(path, min(value, limit))


def _shown(value: Any) -> str:
    return value["kind"] if isinstance(value, dict) and "kind" in value else str(value)


@dataclass(frozen=True)
class ShrunkConfig:
    """Holds the config to verify. config: the shrunk one, with all parallel degrees 1. own: the layout of the user's
    config. changes: the sizes that were reduced. settings: the values that were changed for the comparison. Both lists
    are texts such as `path old -> new`."""

    config: Config
    own: Layout
    changes: list[str]
    settings: list[str]


def shrink_config(
    config: Config, num_ranks: int, full: bool, one_machine: bool = True, quick: bool = True
) -> ShrunkConfig:
    """Derives the config to verify on `num_ranks` ranks. one_machine: all ranks are processes of one machine. quick:
    False also accumulates gradients over micro-steps.

    Raises ValueError for a config that cannot be verified."""
    _refuse(config)
    draft, small = ConfigEditor(config.model_dump(mode="json")), ConfigEditor({})
    _switch_off(draft)
    if one_machine and draft.get("model.moe.dispatcher.kind") == "hierarchical" and num_ranks % 2 == 0:
        draft.put("parallel.ranks_per_node", num_ranks // 2, "as if there were two nodes")
    if not full:
        small = ConfigEditor(draft.tree)
        _make_small(small, num_ranks, quick)
    own = config_layout(draft.tree)
    parallel = ParallelConfig(ranks_per_node=draft.get("parallel.ranks_per_node")).model_dump(mode="json")
    return ShrunkConfig(Config.model_validate({**draft.tree, "parallel": parallel}), own, small.changes, draft.changes)


def _refuse(config: Config) -> None:
    moe = config.model.moe
    if moe is not None and moe.router.kind not in REFERENCE_ROUTERS:
        raise ValueError(
            f"model.moe.router.kind is {moe.router.kind!r}: verify needs a reference implementation of a registered "
            "router; add one to ROUTERS in expert_parallel/moe/reference/reference_routing.py"
        )
    if moe is not None and moe.capacity.receive_bound is not None:
        raise ValueError(
            "model.moe.capacity.receive_bound: which tokens it drops depends on the layout by definition, so there is "
            "nothing to compare; set it to null to verify the rest"
        )


def _switch_off(draft: ConfigEditor) -> None:
    elsewhere = "checked separately"
    draft.put("model.dropout", 0.0, elsewhere)
    draft.put("model.moe.experts.hidden_dropout", 0.0, elsewhere)
    draft.put("model.moe.experts.output_dropout", 0.0, elsewhere)
    draft.put("model.moe.experts.backend", "auto")
    draft.put("model.moe.dispatcher.exchange_dtype", "model", "it rounds")
    draft.put("model.moe.ledger", {"kind": "rows", "breach": "warn"})
    draft.put("training.engine", {"kind": "native"}, "verify supports no other")
    draft.put("training.routing", None)
    draft.put("training.trainable", {"kind": "all"})
    draft.put("training.dtype", "float64")
    draft.put("training.optimizer.learning_rate", LEARNING_RATE)
    draft.put("training.optimizer.eps", EPS, "so that tiny gradients do not decide the first step of Adam")
    draft.put("training.optimizer.betas", BETAS, "so that both moments count, and differ")
    draft.put("training.schedule.warmup_steps", 2, "so that few steps show all of the schedule")
    draft.put("training.steps", 4)
    draft.put("runtime.device", "auto")


def _make_small(draft: ConfigEditor, num_ranks: int, quick: bool) -> None:
    length = max(8, 2 * num_ranks)
    for path, size in {**SIZES, "model.vocab_size": VOCABULARY_SIZE, "training.sequence_length": length}.items():
        draft.at_most(path, size)
    draft.at_most("model.position.max_length", length + 3)
    draft.put("model.init_std", INIT_STD, "so that gradients are larger than rounding")
    if draft.get("training.clip_norm") is not None:
        draft.put("training.clip_norm", CLIP_NORM, "so that it clips")
    draft.at_most("model.mtp.depth", MAX_MTP_DEPTH)
    _fewer_blocks(draft)
    for shards in ("shards", "expert_shards"):
        draft.put(f"parallel.data.{shards}", None)
    SMALL_ATTENTION[draft.get("model.attention.kind")](draft)
    draft.at_most("model.position.scaling.original_length", ORIGINAL_LENGTH)
    draft.at_most("model.attention.length_scaling.length", SCALED_LENGTH)
    for position in ("model.position", "model.window_overrides.position"):
        if draft.get(f"{position}.scaling.kind") == "longrope":
            _small_longrope(draft, f"{position}.scaling")
    micro_batch = num_ranks + 1  # not divisible by any number of data ranks, so that they get unequal numbers of tokens
    fewest, most = micro_step_counts(num_ranks, quick)
    draft.at_most("training.micro_steps", most)
    if draft.get("training.micro_steps") < fewest:
        draft.put("training.micro_steps", fewest, "so that gradients accumulate")
    draft.put("training.global_batch", draft.get("training.micro_steps") * micro_batch)
    if draft.get("model.moe") is not None:
        _make_moe_small(
            draft, {"rank": length * micro_batch // num_ranks, "sequence": length, "global": length * micro_batch}
        )


def _small_heads(draft: ConfigEditor) -> None:
    kv_heads = draft.get("model.attention.num_kv_heads") or draft.get("model.attention.num_heads")
    group = draft.get("model.attention.num_heads") // kv_heads
    draft.put("model.attention.num_heads", min(kv_heads, MAX_KV_HEADS) * min(group, MAX_HEADS_PER_GROUP))
    draft.at_most("model.attention.num_kv_heads", MAX_KV_HEADS)
    rope_size, head_size = draft.get("model.attention.rope_size"), draft.get("model.attention.head_size")
    others = 0 if rope_size is None else min(head_size - rope_size, UNROTATED_SIZE)
    draft.at_most("model.attention.rope_size", HEAD_SIZE)
    draft.put("model.attention.head_size", min(head_size, HEAD_SIZE + others))
    draft.at_most("model.attention.value_size", VALUE_SIZE)
    draft.at_most("model.attention.window", WINDOW)
    draft.at_most("model.attention.chunk", WINDOW)
    in_windows = draft.get("model.window_overrides.num_kv_heads")
    if in_windows is not None:  # as many times the other blocks' key heads as before, if that divides the heads
        fewer = max(1, min(kv_heads, MAX_KV_HEADS) * in_windows // kv_heads)
        draft.put("model.window_overrides.num_kv_heads", math.gcd(fewer, draft.get("model.attention.num_heads")))
    draft.at_most("model.window_overrides.position.scaling.original_length", ORIGINAL_LENGTH)
    for name in ("window_blocks", "rope_blocks"):
        _select_some(draft, f"model.{name}")


def _small_longrope(draft: ConfigEditor, scaling: str) -> None:
    size = draft.get("model.attention.rope_size") or draft.get("model.attention.head_size")
    for name in ("short_factors", "long_factors"):
        draft.put(f"{scaling}.{name}", draft.get(f"{scaling}.{name}")[: size // 2])
    draft.at_most(f"{scaling}.original_length", LONGROPE_LENGTH)


def _select_some(draft: ConfigEditor, path: str) -> None:
    """Makes a pattern of blocks fit to fewer blocks, of which it still selects some and not others."""
    pattern, num_layers = draft.get(path), draft.get("model.num_layers")
    draft.at_most(f"{path}.n", 2)
    draft.at_most(f"{path}.k", 1 if num_layers > 1 else 0)
    if pattern["kind"] == "list" and (max(pattern["indices"]) >= num_layers or len(pattern["indices"]) == num_layers):
        draft.put(f"{path}.indices", list(range(0, num_layers, 2)))


def _small_latent(draft: ConfigEditor) -> None:
    for name, size in LATENT_SIZES.items():
        draft.at_most(f"model.attention.{name}", size)


SMALL_ATTENTION = {"heads": _small_heads, "latent": _small_latent}


def _fewer_blocks(draft: ConfigEditor) -> None:
    """Reduces the number of blocks to a multiple of 4, for pipeline stages, with at least two MoE blocks if there are
    as many."""
    pattern, num_layers = draft.get("model.moe_blocks"), draft.get("model.num_layers")
    kind, enough = pattern["kind"], 4
    if kind == "every_nth":
        draft.at_most("model.moe_blocks.n", 4)
        enough = 2 * pattern["n"]
    elif kind == "all_but_first":
        draft.at_most("model.moe_blocks.k", 1 if num_layers > 1 else 0)
    elif kind == "list":
        blocks = sorted(pattern["indices"])
        if len(blocks) < num_layers:
            draft.put("model.moe_blocks.indices", [block for block in (1, 2) if block < num_layers])
    draft.at_most("model.num_layers", max(4, math.ceil(enough / 4) * 4))
    if draft.get("model.moe") is not None and kind == "list" and len(pattern["indices"]) == num_layers:
        draft.put("model.moe_blocks.indices", list(range(draft.get("model.num_layers"))))


def _make_moe_small(draft: ConfigEditor, tokens: dict[str, int]) -> None:
    """Shrinks the MoE settings. tokens: the approximate number of tokens in each scope."""
    moe = "model.moe"
    k, groups = draft.get(f"{moe}.router.k") or 1, draft.get(f"{moe}.router.group_limit.count") or 1
    fewest = max(MAX_EXPERTS, 2 * k, 4 * groups)
    draft.at_most(f"{moe}.num_experts", math.ceil(fewest / groups) * groups)
    draft.at_most(f"{moe}.shared_experts.hidden", SHARED_HIDDEN)
    if draft.get(f"{moe}.capacity.kind") == "factor":
        draft.put(f"{moe}.capacity.minimum", 0, "it would keep all of so few tokens")
        scope = draft.get(f"{moe}.capacity.scope")
        if scope != "rank":  # of a rank's tokens, whose number differs, no factor is whole everywhere
            share = Fraction(tokens[scope] * k, draft.get(f"{moe}.num_experts"))
            for mode in ("train", "eval"):
                factor = _rounded_factor(draft.get(f"{moe}.capacity.{mode}"), share)
                draft.put(
                    f"{moe}.capacity.{mode}", factor, "so that the capacity, and that of half the tokens, is rounded"
                )
    if draft.get(f"{moe}.capacity.kind") == "absolute":
        mean = tokens[draft.get(f"{moe}.capacity.scope")] * k / draft.get(f"{moe}.num_experts")
        draft.at_most(f"{moe}.capacity.train", math.ceil(1.25 * mean))
        draft.at_most(f"{moe}.capacity.eval", math.ceil(1.5 * mean))  # evaluation must not drop what training does


def _rounded_factor(factor: float, share: Fraction) -> float:
    """Returns the factor, or the next smaller one, with which a capacity factor * share is between an even number and
    the next: then rounding it down, or adding the capacities of two halves, gives another one."""
    while (capacity := Fraction(str(factor)) * share).denominator == 1 or math.floor(capacity) % 2 == 1:
        factor = round(factor - 0.01, 4)
    return factor
