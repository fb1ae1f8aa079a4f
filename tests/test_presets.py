"""Routers of one's own, registered by one line; presets, each of them what its paper says."""

import re
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from pydantic import Field
from torch import Tensor
from typer.testing import CliRunner

from expert_parallel.cli.app import app
from expert_parallel.moe.capacity.policies import DroplessConfig, FactorConfig
from expert_parallel.moe.config import PRESET_CORES, PRESETS, MoEConfig, preset_contradictions, preset_summary
from expert_parallel.moe.context import TokenBatch
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.routers import registry
from expert_parallel.moe.routers.across_tokens import ExpertChoiceConfig, SinkhornConfig
from expert_parallel.moe.routers.base import (
    GroupLimitConfig,
    HashConfig,
    LinearRouter,
    LinearSettings,
    Router,
    RouterSettings,
    Scores,
    TopKRouterConfig,
    score_logits,
)
from expert_parallel.moe.routers.losses import BalanceLossConfig, ZLossConfig
from expert_parallel.moe.routers.noisy import GShardConfig, NoisyTopKConfig
from expert_parallel.moe.routers.registry import ROUTERS
from expert_parallel.moe.routers.variation_losses import ImportanceLossConfig, LoadLossConfig
from expert_parallel.training.config import dump_config, load_config
from tests.launches import small_config
from tests.test_routers import NUM_EXPERTS, X_BSD, Config, batch_of, close, layer_config

# ---------------------------------------------------------------------------------------------------------------------
# A router of one's own


class TemperatureConfig(LinearSettings):
    kind: Literal["mine"]
    temperature: float = Field(default=2.0, gt=0)


class TemperatureRouter(LinearRouter):
    """Top-k of the softmax of logits / temperature."""

    Config = TemperatureConfig
    config: TemperatureConfig  # type: ignore[assignment]

    def score(self, x_TD: Tensor, batch: TokenBatch) -> Scores:
        return score_logits(self.logits(x_TD) / self.config.temperature, "softmax")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "mine", TemperatureRouter)


@pytest.mark.usefixtures("registered")
def test_a_registered_router_trains_a_layer() -> None:
    config = layer_config(router={"kind": "mine", "temperature": 4.0}, losses=[{"kind": "balance"}])
    assert config.router.num_choices(NUM_EXPERTS) == 2
    assert config.router.experts_per_token(NUM_EXPERTS) == 2
    layer = MoELayer(config).double()
    assert isinstance(layer.router, TemperatureRouter)
    assert layer.router.config == TemperatureConfig(kind="mine", temperature=4.0)
    output = layer(X_BSD)
    close(layer.router(X_BSD[0], batch_of(X_BSD[0])).logits_TE, X_BSD[0] @ layer.router.weight.T / 4)
    before = layer.router.weight.detach().clone()
    (output.y.square().sum() + output.losses["balance_global"]).backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert bool((layer.router.weight != before).any(1).all())
    assert int(output.stats.kept_E.sum()) == 40


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temprature": 1.0}, r"^MoEConfig: router: unknown setting temprature \(did you mean temperature\?\)$"),
        ({"temperature": 0.0}, r"router: temperature: input should be greater than 0, found 0\.0$"),
        ({"temperature": "1"}, r'router: temperature: input should be a valid number, found "1"$'),
        ({"k": 7}, r"router\.k \(7\) is larger than num_experts \(6\)"),
        ({"k": 1}, r"router\.normalise is true with router\.k = 1"),
    ],
)
def test_the_settings_of_a_registered_router_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_config(router={"kind": "mine", **wrong})


@pytest.mark.usefixtures("registered")
def test_the_settings_of_a_registered_router_are_checked_without_a_layer() -> None:
    with pytest.raises(ValueError, match="temprature"):
        Config.validate_python({"kind": "mine", "temprature": 1.0})


@pytest.mark.usefixtures("registered")
def test_the_config_of_a_registered_router_is_saved_and_read_again() -> None:
    config = layer_config(router={"kind": "mine", "temperature": 4.0})
    assert MoEConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.usefixtures("registered")
def test_a_registered_router_may_have_its_weights_renormalised() -> None:
    """It normalises, by its default as by its setting; where it does not, the weights have no sum to keep."""
    capacity = {"kind": "factor", "renormalise": True}
    assert layer_config(router={"kind": "mine", "normalise": True}, capacity=capacity)
    with pytest.raises(ValueError, match=r"router\.normalise is false"):
        layer_config(router={"kind": "mine", "normalise": False}, capacity=capacity)
    assert layer_config(router={"kind": "mine"}, capacity=capacity)


def test_an_unknown_router_is_refused_with_the_list() -> None:
    known = (
        "'top_k', 'noisy_top_k', 'gshard', 'expert_choice', 'hash', 'sinkhorn', 'sparsemixer', or a registered router"
    )
    with pytest.raises(ValueError, match=f"kind is 'mine', it must be one of {known}"):
        layer_config(router={"kind": "mine"})


def test_an_installed_package_registers_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def __init__(self, name: str) -> None:
            self.name = name

        def load(self) -> type[Router]:
            assert self.name == "mine"  # others are left unloaded
            return TemperatureRouter

    asked = []

    def entry_points(group: str) -> list[Point]:
        asked.append(group)
        return [Point("another"), Point("mine")]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    monkeypatch.setattr(registry, "ROUTERS", dict(ROUTERS))
    config = layer_config(router={"kind": "mine", "temperature": 3.0})
    assert asked == ["expert_parallel.routers"]
    assert isinstance(MoELayer(config).router, TemperatureRouter)
    with pytest.raises(ValueError, match="kind is 'yours'"):
        layer_config(router={"kind": "yours"})


def test_a_router_without_a_kind_is_top_k() -> None:
    assert layer_config(router={"k": 3}).router == layer_config(router={"kind": "top_k", "k": 3}).router


# ---------------------------------------------------------------------------------------------------------------------
# Presets

CONTRADICTS = pytest.mark.filterwarnings("ignore:.*, preset .* means")
DROPLESS = DroplessConfig()
PAPERS: dict[str, tuple[RouterSettings, Any, list[Any]]] = {
    # Softmax(Top2(x W)); the paper names no loss. The released config.json has router_aux_loss_coef 0.02, for
    # transformers' sum over all layers at once, which does not divide by k = 2: 0.04 of ours.
    "mixtral": (
        TopKRouterConfig(k=2, normalise=True),
        DROPLESS,
        [BalanceLossConfig(kind="balance", coefficient=0.04, layers="pooled")],
    ),
    # 8 of 64 experts, weights not normalised, losses 0.01 and 0.001
    "olmoe": (
        TopKRouterConfig(k=8, normalise=False),
        DROPLESS,
        [BalanceLossConfig(kind="balance", coefficient=0.01), ZLossConfig(kind="z_loss", coefficient=0.001)],
    ),
    # Top-1, jitter 0.01, capacity 1.25 in training and 2 in evaluation, loss 0.01 over all tokens
    "switch": (
        TopKRouterConfig(k=1, normalise=False, jitter=0.01),
        FactorConfig(kind="factor", train=1.25, eval=2.0, minimum=0),
        [BalanceLossConfig(kind="balance", coefficient=0.01)],
    ),
    # C = 2 N / (G E) for a group of N / G tokens (section 2.2): 2 T / E, so a factor of 1 beside k = 2
    "gshard": (
        GShardConfig(kind="gshard", k=2, second="proportional", threshold=0.5, normalise=True),
        FactorConfig(kind="factor", train=1.0, eval=1.0, minimum=0),
        [BalanceLossConfig(kind="balance", coefficient=0.01, choices="first")],
    ),
    # k = 4 in the flat layers; softmax after the choice; w_importance = w_load = 0.1
    "shazeer": (
        NoisyTopKConfig(kind="noisy_top_k", k=4, noise="learned", normalise=True),
        DROPLESS,
        [
            ImportanceLossConfig(kind="importance", coefficient=0.1, of="weights"),
            LoadLossConfig(kind="load", coefficient=0.1, threshold="others"),
        ],
    ),
    # k = 2, C = 1.05, noise of 1 / E, weights chosen after the softmax, batch prioritized routing; 0.01 times
    # (importance + load) / 2
    "v_moe": (
        NoisyTopKConfig(kind="noisy_top_k", k=2, noise="normal", std=None, normalise=False),
        FactorConfig(kind="factor", train=1.05, eval=1.05, minimum=0, priority="batch_priority"),
        [
            ImportanceLossConfig(kind="importance", coefficient=0.005, of="probabilities"),
            LoadLossConfig(kind="load", coefficient=0.005, threshold="all"),
        ],
    ),
    # 8 experts of 256 within 4 of 8 nodes, sigmoid, scale 2.5, bias update 0.001, sequence loss 0.0001
    "deepseek_v3": (
        TopKRouterConfig(
            k=8,
            score="sigmoid",
            normalise=True,
            scale=2.5,
            balance_bias_rate=0.001,
            group_limit=GroupLimitConfig(count=8, limit=4, score="top2_sum"),
        ),
        DROPLESS,
        [BalanceLossConfig(kind="balance", coefficient=0.0001, scope="sequence")],
    ),
    "expert_choice": (ExpertChoiceConfig(kind="expert_choice", train=2.0, eval=2.0), DROPLESS, []),
    "hash_layers": (HashConfig(kind="hash", k=1), DROPLESS, []),
    "s_base": (SinkhornConfig(kind="sinkhorn", k=1, score="softmax", normalise=False), DROPLESS, []),
}


def preset(name: str, **options: Any) -> MoEConfig:
    return MoEConfig.model_validate({"preset": name, "num_experts": 64, "experts": {"hidden": 8}, **options})


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_what_its_paper_says(name: str) -> None:
    config = preset(name)
    router, capacity, losses = PAPERS[name]
    assert config.router == router
    assert config.capacity == capacity
    assert config.losses == losses


def test_what_is_set_beside_a_preset_wins() -> None:
    """Setting by setting in the blocks that are kept, also in a block within one; a list replaces the whole list."""
    config = preset("deepseek_v3", router={"k": 4, "group_limit": {"limit": 2}}, losses=[{"kind": "z_loss"}])
    router, _, _ = PAPERS["deepseek_v3"]
    assert config.router == router.model_copy(update={"k": 4, "group_limit": GroupLimitConfig(count=8, limit=2)})
    assert config.losses == [ZLossConfig(kind="z_loss")]
    switch = preset("switch", router={"jitter": 0.0, "kind": "top_k"}, capacity={"train": 1.5})
    assert switch.router == TopKRouterConfig(k=1, normalise=False)
    assert switch.capacity == FactorConfig(kind="factor", train=1.5, eval=2.0, minimum=0)
    assert switch.losses == preset("switch").losses


@CONTRADICTS
def test_a_block_of_another_kind_replaces_the_presets() -> None:
    """Nothing of the old block is left in it: k and eval are the new kind's defaults."""
    config = preset("switch", router={"kind": "sinkhorn"}, capacity={"kind": "factor", "eval": 3.0})
    assert config.router == SinkhornConfig(kind="sinkhorn")
    assert config.capacity == FactorConfig(kind="factor", train=1.25, eval=3.0, minimum=0)
    config = preset("olmoe", router={"kind": "noisy_top_k"}, capacity={"kind": "factor"})
    assert config.router == NoisyTopKConfig(kind="noisy_top_k", k=2, normalise=True)
    assert config.capacity == FactorConfig(kind="factor")


@CONTRADICTS
def test_a_preset_that_cannot_work_with_what_is_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router\.k \(8\) is larger than num_experts \(4\)"):
        preset("olmoe", num_experts=4)
    with pytest.raises(ValueError, match=r"balance_global would do nothing: router\.kind is 'hash'"):
        preset("switch", router={"kind": "hash"})
    with pytest.raises(ValueError, match=r"thresold"):
        preset("gshard", router={"thresold": 0.2})


def test_an_unknown_preset_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="preset is 'mistral', it must be one of 'mixtral', 'olmoe', 'switch'"):
        preset("mistral")


@CONTRADICTS
@pytest.mark.parametrize("name", list(PRESETS))
def test_a_config_with_a_preset_is_saved_and_read_again(name: str) -> None:
    """As checkpoints keep it: preset and all it expands to, so that reading expands nothing anew."""
    changed = [{}, {"router": {"kind": "top_k", "k": 3}, "losses": [], "capacity": {"kind": "dropless"}}]
    if name == "deepseek_v3":
        changed.append({"router": {"group_limit": None}})
    for options in changed:
        config = preset(name, **options)
        assert MoEConfig.model_validate(config.model_dump(mode="json")) == config
        assert config.preset == name


def test_reading_leaves_the_presets_alone() -> None:
    before = repr(PRESETS)
    preset("deepseek_v3", router={"k": 4, "group_limit": {"limit": 2}})
    assert repr(PRESETS) == before


# ---------------------------------------------------------------------------------------------------------------------
# What a config overrides, and what contradicts the paper


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_agrees_with_its_own_core(name: str) -> None:
    """Every setting of the core exists, has the paper's value by the preset alone, and another value contradicts."""
    _, core = PRESET_CORES[name]
    dumped = preset(name).model_dump()
    assert preset_contradictions(dumped) == []
    for path, value in core.items():
        block, key = path.split(".")
        assert dumped[block][key] == value
        changed = dumped | {block: dumped[block] | {key: "another"}}
        assert len(preset_contradictions(changed)) == 1
        assert preset_contradictions(changed | {"preset_overrides": True}) == []


@pytest.mark.parametrize(
    ("name", "options", "summary"),
    [
        ("switch", {}, "switch set 9 settings"),  # 4 of the router, 4 of the capacity, the list of losses
        ("switch", {"router": {"k": 1, "jitter": 0.01}}, "switch set 9 settings"),  # the same values
        (
            "switch",
            {"router": {"k": 2}, "losses": [{"kind": "balance", "coefficient": 0.01, "scope": "rank"}]},
            "switch set 7 settings; the config overrides router.k (2, not 1), losses",
        ),
        (
            "switch",
            {"router": {"kind": "sinkhorn"}, "capacity": {"eval": 3.0}},
            "switch set 4 settings; the config overrides router.kind (sinkhorn, not top_k), capacity.eval (3.0, not "
            "2.0)",
        ),
        (
            "deepseek_v3",
            {"router": {"group_limit": {"limit": 2}}},
            "deepseek_v3 set 8 settings; the config overrides router.group_limit.limit (2, not 4)",
        ),
        ("s_base", {"losses": []}, "s_base set 3 settings"),
    ],
)
def test_a_summary_counts_what_the_preset_set(name: str, options: dict[str, Any], summary: str) -> None:
    config = preset(name, **options, preset_overrides=True)
    assert preset_summary(config) == summary
    assert preset_summary(MoEConfig.model_validate(config.model_dump(mode="json"))) == summary
    assert preset_summary(config.model_copy(update={"preset": None})) is None


def test_a_contradiction_in_python_is_warned_of_where_it_stands() -> None:
    sentence = (
        r"^router\.k is 2, preset switch means 1 \(Fedus et al\. 2021\): set preset_overrides=true to keep it, or"
    )
    with pytest.warns(UserWarning, match=sentence) as warned:
        config = preset("switch", router={"k": 2})
    assert [Path(warning.filename).name for warning in warned] == ["test_presets.py"]
    with warnings.catch_warnings(action="error"):
        MoEConfig.model_validate(config.model_dump())  # as a run reads its own config again
        preset("switch", router={"k": 2}, preset_overrides=True)
        preset("switch", router={"jitter": 0.0})


SWITCH = "{preset: switch, num_experts: 4, experts: {hidden: 16}%s}"
K2 = "model.moe.router.k is 2, preset switch means 1 (Fedus et al. 2021): set model.moe.preset_overrides=true to keep"


@pytest.mark.parametrize(
    ("file", "overrides", "refused"),
    [
        ("", ["model.moe.router.k=2"], K2),
        ("", ["model.moe.router={k: 2}"], K2),
        ("", ["model.moe=" + SWITCH % ", router: {k: 2}"], K2),
        (", router: {k: 2}", [], None),
        (", router: {k: 2}", ["training.steps=3"], None),
        (", router: {k: 2}", ["model.moe.router.k=1"], None),
        (", router: {k: 2}", ["model.moe.router.k=3"], "model.moe.router.k is 3, preset switch means 1"),
        (", router: {k: 2}", ["model.moe.preset=mixtral"], None),
        (
            ", router: {k: 2, normalise: false}",
            ["model.moe.preset=mixtral"],
            "model.moe.router.normalise is false, preset",
        ),
        ("", ["model.moe.router.k=2", "model.moe.preset_overrides=true"], None),
        ("", ["model.moe.router.k=2", "model.moe.preset=null", "model.moe.router.normalise=true"], None),
        ("", ["model.moe.router={kind: sinkhorn}"], "model.moe.router.kind is sinkhorn, preset switch means top_k"),
        ("", ["model.moe.capacity.train=2.0"], None),
    ],
)
def test_a_contradiction_is_refused_on_the_command_line_alone(
    file: str, overrides: list[str], refused: str | None, tmp_path: Path
) -> None:
    path = small_config(tmp_path)
    tree = yaml.safe_load(path.read_text())
    tree["model"]["moe"] = yaml.safe_load(SWITCH % file)
    path.write_text(yaml.safe_dump(tree))
    if refused is None:
        config = load_config(path, overrides)
        path.write_text(dump_config(config))
        assert load_config(path) == config, "a run reads its own config again"
    else:
        with pytest.raises(ValueError, match=re.escape(f"{path}: {refused}")):
            load_config(path, overrides)


def test_check_prints_what_the_preset_set_and_what_contradicts_it(tmp_path: Path) -> None:
    path = small_config(tmp_path)
    tree = yaml.safe_load(path.read_text())
    tree["model"]["moe"] = yaml.safe_load(SWITCH % ", router: {k: 2}")
    path.write_text(yaml.safe_dump(tree))
    lines = CliRunner().invoke(app, ["check", str(path)]).stdout.splitlines()
    assert "preset               switch set 8 settings; the config overrides router.k (2, not 1)" in lines
    assert [line for line in lines if line.startswith(f"warning: {K2}")]
    lines = CliRunner().invoke(app, ["check", str(path), "model.moe.preset_overrides=true"]).stdout.splitlines()
    assert not [line for line in lines if line.startswith("warning: model.moe")]
