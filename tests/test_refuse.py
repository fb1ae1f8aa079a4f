"""Combinations of settings that cannot work, or of which one would do nothing: each is refused at start, in one
sentence that names the settings with their full paths and their numbers; and what is close to them is accepted.

The overrides stand on small_config: 4 experts, k = 2, capacity by factor, a balance loss, ep = 2.
"""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from typer.testing import CliRunner

from expert_parallel.cli.app import app
from expert_parallel.model.parallelize import build_model
from expert_parallel.moe.config import PRESETS, MoEConfig
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.routers.base import TokenChoiceSettings, TopKRouter, TopKRouterConfig
from expert_parallel.moe.routers.registry import ROUTERS
from expert_parallel.parallel.mesh import ParallelDegrees, node_and_rail_ranks
from expert_parallel.training.config import load_config
from tests.launches import small_config

DROPLESS, NO_LOSSES = "model.moe.capacity={kind: dropless}", "model.moe.losses=[]"
ROUTER, CAPACITY = "model.moe.router=", "model.moe.capacity={{kind: factor, {}}}"
EXPERT_CHOICE = ROUTER + "{kind: expert_choice, accept_future_tokens: true}"

REFUSED: dict[str, tuple[list[str], list[str]]] = {
    # routers
    "top-1 that normalises": (
        ["model.moe.router.k=1"],
        ["model.moe.router.normalise is true with model.moe.router.k = 1", "set model.moe.router.normalise to false"],
    ),
    "noisy top-1 that normalises": (
        [ROUTER + "{kind: noisy_top_k, k: 1}"],
        ["model.moe.router.normalise is true with model.moe.router.k = 1"],
    ),
    "sinkhorn top-1 that normalises": (
        [ROUTER + "{kind: sinkhorn, normalise: true}"],
        ["model.moe.router.normalise is true with model.moe.router.k = 1"],
    ),
    "k above experts": (
        ["model.moe.router.k=5"],
        ["model.moe.router.k (5) is larger than model.moe.num_experts (4)"],
    ),
    "noisy k above experts": (
        [ROUTER + "{kind: noisy_top_k, k: 5}"],
        ["model.moe.router.k (5) is larger than model.moe.num_experts (4)"],
    ),
    "hash k above experts": (
        [ROUTER + "{kind: hash, k: 5}", NO_LOSSES],
        ["model.moe.router.k (5) is larger than model.moe.num_experts (4)"],
    ),
    "gshard of one expert": (
        [ROUTER + "{kind: gshard}", "model.moe.num_experts=1", "parallel.ep=1"],
        ["model.moe.router.k (2) is larger than model.moe.num_experts (1)"],
    ),
    "gshard with three": ([ROUTER + "{kind: gshard, k: 3}"], ["model.moe.router.k: input should be 2, found 3"]),
    "groups that do not divide": (
        ["model.moe.router.group_limit={count: 3, limit: 1}"],
        ["model.moe.num_experts (4) is not a multiple of model.moe.router.group_limit.count (3)"],
    ),
    "limit above the groups": (
        ["model.moe.router.group_limit={count: 2, limit: 3}"],
        ["model.moe.router.group_limit.limit (3) is larger than model.moe.router.group_limit.count (2)"],
    ),
    "k above the groups' experts": (
        ["model.moe.router.k=3", "model.moe.router.group_limit={count: 2, limit: 1}"],
        ["model.moe.router.k (3) is larger than the 2 experts of model.moe.router.group_limit.limit (1) groups"],
    ),
    "two best of one": (
        ["model.moe.router.group_limit={count: 4, limit: 2}"],
        [
            "model.moe.router.group_limit.score is 'top2_sum' but model.moe.router.group_limit.count (4) leaves one "
            "expert in a group: use 'max'"
        ],
    ),
    "std of learned noise": (
        [ROUTER + "{kind: noisy_top_k, std: 0.5}"],
        ["model.moe.router.std is 0.5 but model.moe.router.noise is 'learned': only 'normal' takes it"],
    ),
    "std of gumbel noise": (
        [ROUTER + "{kind: noisy_top_k, noise: gumbel, std: 0.5}"],
        ["model.moe.router.std is 0.5 but model.moe.router.noise is 'gumbel'"],
    ),
    "a factor above the experts": (
        [ROUTER + "{kind: expert_choice, accept_future_tokens: true, train: 4.5}", DROPLESS, NO_LOSSES],
        ["model.moe.router.train (4.5) is larger than model.moe.num_experts (4)"],
    ),
    "a factor above the experts in evaluation": (
        [ROUTER + "{kind: expert_choice, accept_future_tokens: true, eval: 5.0}", DROPLESS, NO_LOSSES],
        ["model.moe.router.eval (5.0) is larger than model.moe.num_experts (4)"],
    ),
    "a setting of another router": (
        [ROUTER + "{kind: hash, jitter: 0.1}"],
        ["unknown setting model.moe.router.jitter"],
    ),
    "an unknown router": (
        ["model.moe.router.kind=top_p"],
        ["model.moe.router.kind is 'top_p', it must be one of 'top_k', 'noisy_top_k', 'gshard', 'expert_choice', "],
    ),
    # routers and what stands beside them
    "renormalising one choice": (
        [ROUTER + "{kind: hash, k: 1}", "model.moe.capacity.renormalise=true", NO_LOSSES],
        ["model.moe.capacity.renormalise is true but model.moe.router.k is 1"],
    ),
    "bfloat16 rows of a bfloat16 model": (
        ["model.moe.dispatcher={kind: all_to_all, exchange_dtype: bfloat16}", "training.dtype=bfloat16"],
        ["model.moe.dispatcher.exchange_dtype is 'bfloat16' and so is training.dtype: it would change nothing"],
    ),
    "padding what is played back": (
        ["model.moe.capacity.pad=true", "training.routing={kind: play, folder: routing}"],
        ["model.moe.capacity.pad is true but training.routing.kind is 'play'"],
    ),
    "routing of a dense model": (
        [
            "model.moe=null",
            "model.ffn={hidden: 8}",
            "parallel.ep=1",
            "training.routing={kind: record, folder: routing}",
        ],
        ["training.routing is given but the model has no experts (model.moe)"],
    ),
    "expert choice in a causal model": (
        [ROUTER + "{kind: expert_choice}", DROPLESS, NO_LOSSES],
        [
            "model.moe.router.kind is 'expert_choice' in a causal model",
            "set model.moe.router.accept_future_tokens to true",
        ],
    ),
    "expert choice with a capacity": (
        [EXPERT_CHOICE, NO_LOSSES],
        [
            "model.moe.capacity.kind is 'factor' but model.moe.router.kind is 'expert_choice'",
            "set model.moe.capacity.kind to 'dropless'",
        ],
    ),
    "expert choice with an absolute capacity": (
        [EXPERT_CHOICE, NO_LOSSES, "model.moe.capacity={kind: absolute, train: 2, eval: 2}"],
        ["model.moe.capacity.kind is 'absolute' but model.moe.router.kind is 'expert_choice'"],
    ),
    "expert choice with a balance loss": (
        [EXPERT_CHOICE, DROPLESS],
        ["model.moe.losses: balance would do nothing: model.moe.router.kind is 'expert_choice'"],
    ),
    "hash with a balance loss": (
        [ROUTER + "{kind: hash}"],
        ["model.moe.losses: balance_global would do nothing: model.moe.router.kind is 'hash'"],
    ),
    "hash with a z-loss": (
        [ROUTER + "{kind: hash}", "model.moe.losses=[{kind: z_loss}]"],
        ["model.moe.losses: z_loss would do nothing: model.moe.router.kind is 'hash'"],
    ),
    "two losses of one name": (
        ["model.moe.losses=[{kind: balance}, {kind: balance, coefficient: 0.1}]"],
        ["model.moe.losses: each kind and scope may occur once, found balance_global, balance_global"],
    ),
    "two pooled losses of one name": (
        ["model.moe.losses=[{kind: balance, layers: pooled}, {kind: balance, layers: pooled, coefficient: 0.1}]"],
        ["found balance_global_pooled, balance_global_pooled"],
    ),
    # capacity
    "renormalise what was not normalised": (
        ["model.moe.router.normalise=false", CAPACITY.format("renormalise: true")],
        ["model.moe.capacity.renormalise is true but model.moe.router.normalise is false"],
    ),
    "reroute with every expert chosen": (
        ["model.moe.router.k=4", CAPACITY.format("overflow: reroute")],
        ["model.moe.capacity.overflow is 'reroute' but model.moe.router.k is 4 of the 4 experts"],
    ),
    "reroute with every expert of the groups chosen": (
        ["model.moe.router.group_limit={count: 2, limit: 1}", CAPACITY.format("overflow: reroute")],
        ["model.moe.capacity.overflow is 'reroute' but model.moe.router.k is 2 of the 2 experts"],
    ),
    "capacity settings of a dropless layer": (
        ["model.moe.capacity={kind: dropless, priority: random}"],
        ["unknown setting model.moe.capacity.priority"],
    ),
    "a dropless layer that pads": (
        ["model.moe.capacity={kind: dropless, pad: true}"],
        ["unknown setting model.moe.capacity.pad"],
    ),
    "the scope of a z-loss": (
        ["model.moe.losses=[{kind: z_loss, scope: global}]"],
        ["unknown setting model.moe.losses[0].scope (another kind of model.moe.losses[] has it)"],
    ),
    "the setting's former name": (["model.moe.capacity.drop=position"], ["unknown setting model.moe.capacity.drop"]),
    "a bound below what all need": (
        ["model.moe.capacity={kind: dropless, receive_bound: 0.9}"],
        ["model.moe.capacity.receive_bound: input should be greater than or equal to 1, found 0.9"],
    ),
    "a bound for a layer that drops": (
        [CAPACITY.format("receive_bound: 1.5")],
        ["unknown setting model.moe.capacity.receive_bound"],
    ),
    # presets
    "an unknown preset": (
        ["model.moe.preset=mixtrel"],
        ["model.moe.preset is 'mixtrel', it must be one of 'mixtral', 'olmoe', 'switch'"],
    ),
    "no name of a preset": (["model.moe.preset=[switch]"], ["model.moe.preset"]),
    "a preset and what it leaves too few experts for": (
        ["model.moe={preset: deepseek_v3, num_experts: 4, experts: {hidden: 16}}"],
        ["model.moe.router.k (8) is larger than model.moe.num_experts (4)"],
    ),
    # ranks
    "local experts on two ranks": (
        ["model.moe.dispatcher={kind: local}"],
        ["model.moe.dispatcher.kind 'local' cannot reach the experts of other ranks: parallel.ep is 2, it must be 1"],
    ),
    "local rows in a dtype": (
        ["model.moe.dispatcher={kind: local, exchange_dtype: bfloat16}"],
        ["unknown setting model.moe.dispatcher.exchange_dtype"],
    ),
    "local rows in chunks": (
        ["model.moe.dispatcher={kind: local, overlap: 2}"],
        ["unknown setting model.moe.dispatcher.overlap"],
    ),
    "all tokens, once for each choice": (
        ["model.moe.dispatcher={kind: all_gather, one_row_per: choice}"],
        ["unknown setting model.moe.dispatcher.one_row_per"],
    ),
    "no ranks on a node": (["parallel.ranks_per_node=0"], ["parallel.ranks_per_node: input should be greater than"]),
}

# Found out only where the numbers of ranks are known: by `check --world-size`.
REFUSED_WORLDS: dict[str, tuple[int, list[str], list[str]]] = {
    "a group that does not fill nodes": (
        3,
        ["parallel.ep=3", "parallel.ranks_per_node=2", "model.moe.dispatcher={kind: hierarchical}"],
        [
            "parallel.ep (3) and the ranks of a node (2, parallel.ranks_per_node) must divide one another for "
            "model.moe.dispatcher.kind 'hierarchical'"
        ],
    ),
    "a node that does not hold whole groups": (
        4,
        ["parallel.ranks_per_node=3", "model.moe.dispatcher={kind: hierarchical}"],
        ["parallel.ep (2) and the ranks of a node (3, parallel.ranks_per_node) must divide one another"],
    ),
    "a world that no group divides": (
        3,
        ["model.moe.dispatcher={kind: hierarchical}"],
        ["the world size (3) is not a multiple of parallel.ep (2)"],
    ),
}

ACCEPTED: dict[str, list[str]] = {
    "as it stands": [],
    "top-1 that does not normalise": ["model.moe.router.k=1", "model.moe.router.normalise=false"],
    "all experts of a token": ["model.moe.router.k=4"],
    "groups": ["model.moe.router.group_limit={count: 2, limit: 1}"],
    "all groups": ["model.moe.router.group_limit={count: 2, limit: 2}"],
    "groups of one expert by their best": ["model.moe.router.group_limit={count: 4, limit: 2, score: max}"],
    "normal noise with std": [ROUTER + "{kind: noisy_top_k, noise: normal, std: 0.5}"],
    "gshard with its number of experts": [ROUTER + "{kind: gshard, k: 2}"],
    "sinkhorn that normalises two": [ROUTER + "{kind: sinkhorn, k: 2, normalise: true}"],
    "expert choice accepted": [EXPERT_CHOICE, DROPLESS, NO_LOSSES],
    "expert choice of all tokens": [
        ROUTER + "{kind: expert_choice, accept_future_tokens: true, train: 4.0, eval: 4.0}",
        DROPLESS,
        NO_LOSSES,
    ],
    "expert choice with a z-loss": [EXPERT_CHOICE, DROPLESS, "model.moe.losses=[{kind: z_loss}]"],
    "expert choice with a receive bound": [
        EXPERT_CHOICE,
        NO_LOSSES,
        "model.moe.capacity={kind: dropless, receive_bound: 1.0}",
    ],
    "hash with a capacity that renormalises": [
        ROUTER + "{kind: hash, k: 2}",
        NO_LOSSES,
        CAPACITY.format("renormalise: true, overflow: reroute"),
    ],
    "reroute with one expert left": ["model.moe.router.k=3", CAPACITY.format("overflow: reroute")],
    "reroute with one expert of the groups left": [
        "model.moe.router.k=3",
        "model.moe.router.group_limit={count: 2, limit: 2}",
        CAPACITY.format("overflow: reroute, renormalise: true, pad: true, scope: sequence, priority: batch_priority"),
    ],
    "losses that differ in one setting": [
        "model.moe.losses=[{kind: balance}, {kind: balance, scope: rank}, {kind: balance, choices: first}, "
        "{kind: balance, layers: pooled}, {kind: z_loss}]"
    ],
    "local experts on one rank": ["model.moe.dispatcher={kind: local}", "parallel.ep=1"],
    "every rank its own node": ["model.moe.dispatcher={kind: hierarchical}", "parallel.ranks_per_node=1"],
    "two groups on a node": ["model.moe.dispatcher={kind: hierarchical}", "parallel.ranks_per_node=4"],
    "ranks of a node that no dispatcher looks at": ["parallel.ranks_per_node=3"],
}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return small_config(tmp_path)


def checked(config_file: Path, overrides: list[str], *options: str) -> tuple[int, str, str]:
    """What `expert-parallel check` answers."""
    result = CliRunner().invoke(app, ["check", str(config_file), *overrides, *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_paths_and_numbers(case: str, config_file: Path) -> None:
    overrides, parts = REFUSED[case]
    with pytest.raises(ValueError, match=r"model|parallel") as error:
        load_config(config_file, overrides)
    sentence = str(error.value)
    for part in parts:
        assert part in sentence
    assert "\n" not in sentence
    assert checked(config_file, overrides) == (2, "", f"error: {sentence}\n")


@pytest.mark.parametrize("case", REFUSED_WORLDS)
def test_a_world_that_does_not_fit_is_refused(case: str, config_file: Path) -> None:
    world_size, overrides, parts = REFUSED_WORLDS[case]
    load_config(config_file, overrides)
    code, said, refused = checked(config_file, overrides, "--world-size", str(world_size))
    assert (code, said) == (2, "")
    assert refused.count("\n") == 1
    for part in parts:
        assert part in refused


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_works_is_accepted(case: str, config_file: Path) -> None:
    config = load_config(config_file, ACCEPTED[case])
    world_size = str(max(config.parallel.ep, config.parallel.ranks_per_node or 1))
    world_size = "4" if config.parallel.ranks_per_node == 3 else world_size
    code, _, refused = checked(config_file, ACCEPTED[case], "--world-size", world_size)
    assert (code, refused) == (0, "")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_accepted(preset: str, config_file: Path) -> None:
    """With as many experts as its groups ask for; expert choice once it is told that the model is causal."""
    router = ", router: {accept_future_tokens: true}" if preset == "expert_choice" else ""
    moe = f"model.moe={{preset: {preset}, num_experts: 32, experts: {{hidden: 16}}{router}}}"
    code, _, refused = checked(config_file, [moe])
    assert (code, refused) == (0, "")


# ---------------------------------------------------------------------------------------------------------------------
# A router of one's own


class SteepConfig(TopKRouterConfig):
    kind: str = "steep"  # type: ignore[assignment]
    steepness: float = 1.0

    def refuse(self, num_experts: int) -> None:
        super().refuse(num_experts)
        if self.steepness > num_experts:
            raise ValueError(f"router.steepness ({self.steepness}) is larger than num_experts ({num_experts})")


class SteepRouter(TopKRouter):
    Config = SteepConfig


STEEP: dict[str, tuple[str, list[str]]] = {
    "a setting that it does not have": ("{kind: steep, slope: 2.0}", ["model.moe.router", "slope"]),
    "a value of another type": ("{kind: steep, steepness: high}", ["model.moe.router", "steepness", "high"]),
    "what it refuses itself": ("{kind: steep, steepness: 9.0}", ["router.steepness (9.0)", "num_experts (4)"]),
    "what its base refuses": ("{kind: steep, k: 5}", ["router.k (5)", "model.moe.num_experts (4)"]),
}


@pytest.mark.parametrize("case", STEEP)
def test_a_registered_router_refuses_by_its_own_config(
    case: str, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, as all others do."""
    monkeypatch.setitem(ROUTERS, "steep", SteepRouter)
    block, parts = STEEP[case]
    code, said, refused = checked(config_file, [ROUTER + block])
    assert (code, said) == (2, "")
    for part in parts:
        assert part in refused
    assert refused.count("\n") == 1, refused


def test_a_registered_router_is_accepted(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "steep", SteepRouter)
    code, said, refused = checked(config_file, [ROUTER + "{kind: steep, steepness: 2.0}"])
    assert (code, refused) == (0, "")
    assert "router steep, 2 a token" in said


class OwnWeightsConfig(TokenChoiceSettings):
    """A router's settings that share nothing but k, and have a `normalise` of their own."""

    kind: Literal["own_weights"]
    normalise: bool = True


class OwnWeightsRouter(TopKRouter):
    Config = OwnWeightsConfig  # type: ignore[assignment]


def test_a_registered_router_may_have_a_normalise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "own_weights", OwnWeightsRouter)
    router, renormalised = {"kind": "own_weights"}, {"kind": "factor", "renormalise": True}
    moe_config(router=router, capacity=renormalised)
    with pytest.raises(ValueError, match=r"capacity.renormalise is true but router.normalise is false"):
        moe_config(router={**router, "normalise": False}, capacity=renormalised)
    with pytest.raises(ValueError, match=r"router.normalise is true with router.k = 1"):
        moe_config(router={**router, "k": 1})


# ---------------------------------------------------------------------------------------------------------------------
# Outside of a config file


def moe_config(**changes: Any) -> MoEConfig:
    return MoEConfig.model_validate({"d_model": 8, "num_experts": 4, "experts": {"hidden": 4}, **changes})


def test_expert_choice_is_fine_in_a_layer_that_is_used_alone() -> None:
    """Whether its model is causal, a layer does not know."""
    output = MoELayer(moe_config(router={"kind": "expert_choice"}))(torch.zeros(3, 8))
    assert output.stats.kept_E.tolist() == [2, 2, 2, 2]  # ceil(2 * 3 / 4)


@pytest.mark.parametrize(
    "wrong", [{"router": {"k": 5}}, {"router": {"kind": "hash"}, "losses": [{"kind": "z_loss"}]}, {"preset": "none"}]
)
def test_a_layer_used_alone_refuses_too(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^MoEConfig: "):
        moe_config(**wrong)


def test_a_hash_router_asks_for_the_token_ids() -> None:
    layer = MoELayer(moe_config(router={"kind": "hash"}))
    with pytest.raises(ValueError, match=r"give StepContext\.token_ids_BS"):
        layer(torch.zeros(1, 3, 8))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sequence_index_B", torch.zeros(3, dtype=torch.int64)),
        ("token_ids_BS", torch.zeros(2, 4, dtype=torch.int64)),
        ("mask_BS", torch.ones(6, dtype=torch.bool)),
        ("mask_BS", torch.ones(2, 3)),
    ],
)
def test_a_context_of_another_shape_or_dtype_is_refused(name: str, value: torch.Tensor) -> None:
    layer = MoELayer(moe_config())
    with pytest.raises(ValueError, match=rf"StepContext.{name} is {value.dtype} of shape \({value.shape[0]}"):
        layer(torch.zeros(2, 3, 8), StepContext(**{name: value}))


@pytest.mark.parametrize("kind", ["local", "all_to_all", "all_gather", "hierarchical"])
def test_a_model_alone_takes_the_config_of_any_layout(kind: str, config_file: Path) -> None:
    """As `generate` does with a run of many ranks, and `check` to count its parameters."""
    overrides = [f"model.moe.dispatcher={{kind: {kind}}}", "parallel.ep=1"]
    model = build_model(load_config(config_file, overrides).model)
    assert model(torch.zeros(1, 3, dtype=torch.int64), StepContext()).logits.shape == (1, 3, 256)


@pytest.mark.parametrize(("ep", "ranks_per_node"), [(1, 8), (2, 2), (2, 4), (4, 2), (8, 1), (6, 3)])
def test_nodes_and_groups_that_divide_are_accepted(ep: int, ranks_per_node: int) -> None:
    """Every rank stands once in a node group and once in a rail group, and the two meet in it alone."""
    world_size = 2 * max(ep, ranks_per_node)
    axes = node_and_rail_ranks(ParallelDegrees(world_size, ep=ep), ranks_per_node)
    for groups in axes.values():
        assert sorted(rank for group in groups for rank in group) == list(range(world_size))
    assert all(len(set(node) & set(rail)) <= 1 for node in axes["node"] for rail in axes["rail"])
    assert all(len({rank // ranks_per_node for rank in node}) == 1 for node in axes["node"])
