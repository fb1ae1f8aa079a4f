"""Every setting of every kind with the extremes of its type: the config is refused in one sentence, or `check` reports
on it. Nothing overflows, recurses without end, or allocates what a number asks for.
"""

import copy
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.routers.registry import RegisteredRouterConfig
from expert_parallel.settings import Settings, blocks_in, blocks_of, find_setting, kinds_of
from expert_parallel.training.check import format_config_report
from expert_parallel.training.config import Config, load_config, read_config
from tests.launches import small_config

SECONDS = 20  # for one config, on a busy machine

# Overrides of small configs in which, together, every setting of every kind occurs.
ROUTER, POSITION = "model.moe.router=", "model.position="
YARN = "kind: yarn, factor: 2.0, original_length: 8"
LOSSES = ", ".join(
    f"{{kind: {kinds_of(loss)[0]}}}" for _, loss in blocks_in(MoEConfig.model_fields["losses"].annotation)
)
CONFIGS = [
    [
        "model.moe.preset=mixtral",
        "model.moe.shared_experts={hidden: 8}",
        "model.moe.shared_expert_gate=true",
        "model.moe.d_model=16",
        "model.attention={num_heads: 2, head_size: 8, num_kv_heads: 1, value_size: 4, window: 4, rope_size: 4, "
        "qk_norm: {kind: per_head}, length_scaling: {beta: 0.1, length: 4}}",
        "run.sample={prompt: x, top_k: 3}",
        "parallel.data={kind: sharded, shards: 1, expert_shards: 1}",
        "parallel.ranks_per_node=1",
        "training.routing={kind: record, folder: r}",
        "checkpoint={keep_every: 3, start_from: x}",
        "data={kind: stdlib}",
    ],
    [
        "model.mtp={depth: 1, weight: 0.1}",
        "model.attention={kind: latent, num_heads: 2, query_rank: 4, kv_rank: 8, nope_size: 4, rope_size: 4, "
        "value_size: 8, length_scaling: {beta: 0.1, length: 4}}",
        "data={kind: tokens, corpora: [{path: x}], end_id: 3, tokenizer: bytes}",
        "training.routing={kind: play, folder: r}",
        "checkpoint.start_from={kind: run, path: x}",
    ],
    [
        ROUTER + "{kind: top_k, k: 2, group_limit: {count: 2, limit: 2}}",
        "model.moe_blocks={kind: list, indices: [0]}",
        "model.ffn={hidden: 8}",
        "training.schedule={kind: inverse_sqrt}",
        "checkpoint.start_from={kind: hf, path: x}",
        "model.moe.capacity={kind: dropless, receive_bound: 2.0}",
        "training.trainable={kind: experts, experts: [0], blocks: [0]}",
    ],
    [
        ROUTER + "{kind: noisy_top_k, k: 2, noise: normal, std: 0.5}",
        f"model.moe.losses=[{LOSSES}]",
        "model.moe_blocks={kind: every_nth, n: 2}",
        "model.ffn={hidden: 8}",
        "training.schedule={kind: constant}",
        "model.attention.window=4",
        "model.window_blocks={kind: every_nth, n: 2}",
        "model.rope_blocks={kind: every_nth, n: 2}",
    ],
    [
        ROUTER + "{kind: gshard}",
        "training.schedule={kind: wsd}",
        "model.moe.capacity={kind: absolute, train: 3, eval: 4, pad: true}",
        "model.moe_blocks={kind: all_but_first, k: 1}",
        "model.ffn={hidden: 8}",
        "model.attention.window=4",
        "model.window_blocks={kind: all_but_first, k: 1}",
        "model.window_overrides={position: {theta: 50.0}, num_kv_heads: 1, sinks: true}",
    ],
    [
        ROUTER + "{kind: expert_choice, accept_future_tokens: true}",
        "model.moe.losses=[]",
        "model.moe.capacity={kind: dropless}",
        "model.attention.chunk=4",
        "model.window_blocks={kind: list, indices: [0]}",
    ],
    [ROUTER + "{kind: hash, k: 2}", "model.moe.losses=[]", "model.moe.dispatcher={kind: local}"],
    [ROUTER + "{kind: sparsemixer}"],
    [ROUTER + "{kind: sinkhorn, k: 2}", "model.moe.dispatcher={kind: all_gather}"],
    ["model.moe.dispatcher={kind: hierarchical}", POSITION + "{kind: learned, max_length: 32}"],
    [POSITION + f"{{kind: rope, scaling: {{{YARN}, attention_factor: 1.0}}}}"],
    [POSITION + f"{{kind: rope, scaling: {{{YARN}, mscale: 1.0, mscale_all_dim: 1.0}}}}"],
    [
        POSITION + "{kind: rope, scaling: {kind: llama3, factor: 2.0, low_frequency_factor: 1.0, "
        "high_frequency_factor: 4.0, original_length: 8}}",
        "training.dtype=float32",
        "training.engine={kind: deepspeed, zero_stage: 2}",
    ],
    [POSITION + "{kind: rope, scaling: {kind: linear, factor: 2.0}}"],
    [
        POSITION + "{kind: rope, scaling: {kind: longrope, original_length: 8, short_factors: [1.0, 1.5, 2.0, 3.0], "
        "long_factors: [1.0, 2.0, 3.0, 4.0]}}"
    ],
    ["parallel={pp: 2, pipeline: {kind: interleaved, stages_per_rank: 2}}", "model.num_layers=4"],
]
DEEP: list[Any] = []
for _ in range(40):
    DEEP = [DEEP]
SOME = [10**400, 1e308, "\ud800", [2**63]]
ALL = [
    *(0, -1, 1, 2, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**19),
    *(1e19, 1e-308, 1e30, 1e-30, math.inf, -math.inf, math.nan),
    *("", "x" * 300, "x\0y", "x" * 100_000, None, True),
    *([], [0], [-1], ["x\0"], [1e308, 1e308], DEEP, {}, {"kind": "x"}, {"kind": [1]}, {"a": DEEP}),
]


Keys = tuple[str | int, ...]
Owner = tuple[type[Settings], str]  # a block and the name of a setting in it


def settings_in(tree: Any, blocks: list[type[Settings]], keys: Keys = ()) -> Iterator[tuple[Keys, Owner]]:
    """Yields the keys of each setting in a resolved config, and which setting of which block it is."""
    for number, entry in enumerate(tree) if isinstance(tree, list) else ():
        yield from settings_in(entry, blocks, (*keys, number))
    for key, value in tree.items() if isinstance(tree, dict) else ():
        _, fields = find_setting(blocks, tree, key)
        for block in blocks:
            if any(block.model_fields.get(key) is field for field in fields):
                yield (*keys, key), (block, key)
        yield from settings_in(value, blocks_of(fields), (*keys, key))


def settings_of(block: type[Settings]) -> set[Owner]:
    """Returns the settings of a block and of all blocks in it. A registered router has no settings that are known."""
    inner = {found for field in block.model_fields.values() for _, found in blocks_in(field.annotation)}
    own = {(block, name) for name in block.model_fields}
    return own.union(*map(settings_of, inner - {RegisteredRouterConfig}))


def with_value(tree: dict[str, Any], keys: Keys, value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(tree)
    *blocks, last = keys
    block = changed
    for key in blocks:
        block = block[key]
    block[last] = value
    return changed  # type: ignore[no-any-return]


def check(tree: dict[str, Any]) -> str:
    """Returns the sentence in which a config is refused, or "". Raises TimeoutError after SECONDS."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        format_config_report(read_config(tree, "config.yaml"), world_size=None)
        return ""
    except ValueError as error:
        return str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("values", [SOME, pytest.param(ALL, marks=pytest.mark.full)], ids=["some", "all"])
def test_an_extreme_is_refused_in_one_sentence_or_works(values: list[Any], tmp_path: Path) -> None:
    tried: set[Owner] = set()
    for overrides in CONFIGS:
        config = load_config(small_config(tmp_path), ["parallel.ep=1", "data.paths=[x.txt]", *overrides])
        tree = config.model_dump(mode="json")
        for keys, owner in settings_in(tree, [Config]):
            for value in values if owner not in tried else ():
                sentence = check(with_value(tree, keys, value))
                assert len(sentence) < 500, (keys, sentence)
                assert sentence.isprintable(), (keys, sentence)
            tried.add(owner)
    assert settings_of(Config) - tried == set()
