"""The balance loss of a config.json: an imported model trains with that of transformers, or of DeepSeek's paper; an
export states it; and what is not kept is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expert_parallel.interop.exporting import describe_lost_losses, export_config
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.hf_model import describe_model_losses, read_model_config
from expert_parallel.interop.importing import import_folder
from expert_parallel.model.config import ModelConfig
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.layer import MoELayer
from tests.interop_models import MODELS
from tests.oracles import draw
from tests.peers import peers_in_float64
from tests.test_interop import SHARD, load_ours, make_peer, tokens

Tree = dict[str, Any]
KEY = "router_aux_loss_coef"
# Three of each token's experts, a dense block in between, a router with a bias: what a factor could get wrong.
POOLED = (
    "mixtral with a window",
    "qwen3_moe with all parts",
    "olmoe",
    "gpt_oss",
    "granitemoeshared",
    "qwen2_moe with all parts",
    "phimoe",
)


def next_token_loss(logits_BSV: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


def routers_and_table(named: Any) -> list[Tensor]:
    """The router weights, block by block, and the embedding, on which every router's loss depends."""
    ends = ("gate.weight", "router.weight", "embed_tokens.weight", "embedding.weight")
    return [parameter for name, parameter in named if name.endswith(ends) and "unembedding" not in name]


@pytest.mark.parametrize("name", POOLED)
def test_training_loss_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """With its gradients, in float64, and a coefficient so large that the balance loss is most of the loss."""
    with peers_in_float64():
        peer = make_peer(name, torch.float64, **{KEY: 5.0, "output_router_logits": True})
        output = peer(tokens(), labels=tokens())
        assert output.loss.item() > 1.5 * next_token_loss(output.logits).item()
        expected = torch.autograd.grad(output.loss, routers_and_table(peer.named_parameters()))
    peer.save_pretrained(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "run", SHARD, print_message=lambda text: None)

    model = load_ours(tmp_path / "run", torch.float64)
    ours = model(tokens(), StepContext())
    loss = next_token_loss(ours.logits) + sum(loss for layer in ours.losses.values() for loss in layer.values())
    torch.testing.assert_close(loss, output.loss, rtol=1e-10, atol=0)
    actual = torch.autograd.grad(loss, routers_and_table(model.named_parameters()))
    assert len(actual) == len(expected) >= 3
    for own, their in zip(actual, expected, strict=True):
        torch.testing.assert_close(own, their, rtol=1e-8, atol=1e-10)


def model_of(family: str, **changes: Any) -> ModelConfig:
    """Our settings for a config.json with these values."""
    return read_model_config(FAMILIES[family], config_of(family, **changes))


def config_of(family: str, **changes: Any) -> Tree:
    """A config.json of a family, as save_pretrained writes it; a key whose value is `...` is taken away."""
    name = next(name for name, (kind, _) in MODELS.items() if kind == family)
    values = json.loads(make_config(name)) | changes
    return {key: value for key, value in values.items() if value is not ...}


def make_config(name: str) -> str:
    import transformers

    family, values = MODELS[name]
    return str(
        getattr(transformers, FAMILIES[family].architecture).config_class(**values).to_json_string(use_diff=False)
    )


@pytest.mark.parametrize("per_sequence", [True, False])
def test_training_loss_is_that_of_the_deepseek_paper(per_sequence: bool) -> None:
    """Equations 17 to 20, token by token: s' are sigmoids that sum to 1, f counts choices, times E / (K T)."""
    moe = model_of("deepseek_v3", aux_loss_alpha=0.5, seq_aux=per_sequence, n_group=1, topk_group=1).moe
    assert moe is not None
    layer = MoELayer(MoEConfig.model_validate({**moe.model_dump(mode="json"), "d_model": 16})).double()
    assert layer.router.weight.shape == (6, 16)
    x_BSD = draw(2, 7, 16)
    scores_BSE = (x_BSD @ layer.router.weight.T).sigmoid().tolist()
    sequences = scores_BSE if per_sequence else [scores_BSE[0] + scores_BSE[1]]
    expected = 0.0
    for scores_TE in sequences:
        for expert in range(6):
            chosen = [expert in sorted(range(6), key=lambda e, row=row: -row[e])[:3] for row in scores_TE]  # type: ignore[misc]
            mean = sum(row[expert] / sum(row) for row in scores_TE) / len(scores_TE)
            expected += 0.5 * 6 / (3 * len(scores_TE)) * sum(chosen) * mean / len(sequences)
    (loss,) = layer(x_BSD).losses.values()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


POOLED_LOSS, BALANCE = {"kind": "balance", "layers": "pooled"}, {"kind": "balance", "scope": "sequence"}
# family, losses of the run, what its config.json states: None if it cannot
STATED: list[tuple[str, list[Tree], Tree | None]] = [
    ("mixtral", [], {KEY: 0.0}),
    ("qwen3_moe", [{**POOLED_LOSS, "coefficient": 0.3}], {KEY: 0.1}),
    ("olmoe", [{**POOLED_LOSS, "coefficient": 0.1}], {KEY: 0.0333333333333333}),  # k is 3
    ("gpt_oss", [{**POOLED_LOSS, "coefficient": 0.04}, {"kind": "z_loss"}], None),
    ("olmoe", [{"kind": "balance"}], None),
    ("olmoe", [{**POOLED_LOSS, "scope": "rank"}], None),
    ("olmoe", [{**POOLED_LOSS, "choices": "first"}], None),
    ("deepseek_v3", [], {}),
    ("deepseek_v3", [{**BALANCE, "coefficient": 0.003}], {"aux_loss_alpha": 0.003, "seq_aux": True}),
    ("deepseek_v3", [{"kind": "balance"}], {"aux_loss_alpha": 0.01, "seq_aux": False}),
    ("deepseek_v3", [POOLED_LOSS], None),
]


@pytest.mark.parametrize("has_origin", [True, False])
@pytest.mark.parametrize(("family", "losses", "stated"), STATED)
def test_an_export_states_the_losses_of_the_run(
    family: str, losses: list[Tree], stated: Tree | None, has_origin: bool
) -> None:
    origin = config_of(family, aux_loss_alpha=0.5) if family == "deepseek_v3" else config_of(family)
    tree = read_model_config(FAMILIES[family], origin).model_dump(mode="json")
    tree["moe"]["losses"] = losses
    model, run = ModelConfig.model_validate(tree), {"training": {"sequence_length": 16}}
    exported = export_config(family, model, origin if has_origin else {}, run)
    found = {key: exported[key] for key in (KEY, "aux_loss_alpha", "seq_aux") if key in exported}
    sentence = describe_lost_losses(family, model, exported)
    if stated is None:
        assert sentence is not None
        assert f" of model.moe.losses is not in config.json, as {family} has no such loss (" in sentence
        is_pooled = [loss for loss in losses if loss.keys() == {*POOLED_LOSS, "coefficient"}]
        assert ("; the balance loss is router_aux_loss_coef 0.02" in sentence) == bool(is_pooled)
        assert sentence.startswith("z_loss of" if is_pooled else "balance_"), "it names those that are not stated"
    else:
        assert found == stated
        assert sentence is None
    others = {key: value for key, value in origin.items() if key not in (KEY, "aux_loss_alpha", "seq_aux")}
    assert not has_origin or exported == {**others, **found}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("value", [0.02, 0.07, 0, 3, None, ...])
def test_an_untouched_config_is_exported_unchanged(family: str, value: Any) -> None:
    key = "aux_loss_alpha" if family == "deepseek_v3" else KEY
    origin = config_of(family, **{key: value})
    model = read_model_config(FAMILIES[family], origin)
    assert model.moe is not None
    assert bool(model.moe.losses) == (value not in (0, None) and not (value is ... and key != KEY))
    assert export_config(family, model, origin, {"training": {"sequence_length": 16}}) == origin


@pytest.mark.parametrize("value", [-0.1, True, "0.1", float("nan"), float("inf"), 10**400, [0.1]])
@pytest.mark.parametrize(("family", "key"), [("mixtral", KEY), ("deepseek_v3", "aux_loss_alpha")])
def test_no_coefficient(family: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^config\.json: {key} is .*: it must be a number from 0 to 2,147,483,647$"):
        model_of(family, **{key: value})


def sentences(family: str, **changes: Any) -> list[str]:
    config = config_of(family, **changes)
    return describe_model_losses(FAMILIES[family], config, read_model_config(FAMILIES[family], config))


def test_what_import_says_of_losses() -> None:
    (said,) = sentences("mixtral", router_aux_loss_coef=0.02)
    assert said == (
        "training adds a balance loss with coefficient 0.04, since router_aux_loss_coef is 0.02 and k is 2; "
        "transformers does not, since output_router_logits is false"
    )
    (said,) = sentences("olmoe", router_aux_loss_coef=..., output_router_logits=True)
    assert "coefficient 0.03, since router_aux_loss_coef is 0.01 by default and k is 3; transformers does, too" in said
    first, second = sentences("gpt_oss", router_aux_loss_coef=0.9)
    assert "coefficient 1.8" in first
    assert second.startswith("1.8 is a large coefficient: balanced experts alone add 1.8 to the loss;")
    assert sentences("mixtral", router_aux_loss_coef=0) == [
        "training adds no balance loss, since router_aux_loss_coef is 0"
    ]
    said, bias = sentences("deepseek_v3", aux_loss_alpha=0.001)
    assert bias == "experts are balanced by model.moe.router.balance_bias_rate, which is 0.001"
    assert "of each sequence with coefficient 0.001, which is aux_loss_alpha; transformers has no such loss" in said
    first, second = sentences("qwen3_moe", router_z_loss_coef=0.001)
    assert first.startswith("training adds")
    assert second == ("router_z_loss_coef (0.001) is not kept: Qwen3MoeForCausalLM of transformers has no such loss")
    assert sentences("minimax_m2")[0] == (
        "router_aux_loss_coef (0.001) is not kept: transformers takes that loss of a softmax of the logits, but the "
        "scores of the router are sigmoids"
    )
    assert sentences("minimax_m2", router_aux_loss_coef=None)[0].startswith("training adds no balance loss")
    assert sentences("hy_v3", router_aux_loss_coef=0.1)[0] == (
        "router_aux_loss_coef (0.1) is not kept: HYV3ForCausalLM of transformers has no such loss"
    )
    assert sentences("llama") == []
