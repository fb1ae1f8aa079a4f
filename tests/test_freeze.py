"""Training chosen experts alone: all else stays bit for bit, on every layout; the chosen ones move as on one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expert_parallel.data.batch import MicroBatch, shard_bounds
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.training.config import Config, TrainingConfig
from expert_parallel.training.engines.native import NativeEngine
from expert_parallel.training.freeze import ExpertsTrainable
from expert_parallel.training.optim import build_optimizer
from expert_parallel.training.step import train_step
from tests.layouts import build_on
from tests.ranks import run_ranks

MODEL = {
    "vocab_size": 32,
    "num_layers": 2,
    "d_model": 8,
    "attention": {"num_heads": 2, "head_size": 4},
    "moe": {
        "num_experts": 6,
        "router": {"k": 2, "bias": True, "score": "sigmoid", "balance_bias_rate": 0.01},
        "losses": [{"kind": "balance"}],
        "experts": {"hidden": 8, "bias": True},
    },
}
SEQUENCES, LENGTH, STEPS = 8, 8, 3


def run(
    rank: int, layout: dict[str, Any], trainable: dict[str, Any], warm: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """All weights that this rank holds, before and after the steps, and the steps' gradient norms. warm: after steps in
    which everything trained, so that there is momentum."""
    mesh, model = build_on(layout, MODEL, seed=1)
    all_settings = {"steps": 9, "global_batch": SEQUENCES, "sequence_length": LENGTH, "dtype": "float64"}
    optimizer_settings = {"learning_rate": 0.01, "weight_decay": 0.5}
    everything = TrainingConfig.model_validate(all_settings | {"optimizer": optimizer_settings})
    config = everything.model_copy(update={"trainable": ExpertsTrainable.model_validate(trainable)})
    first, count = shard_bounds(SEQUENCES, mesh.degrees.dp, mesh.dp_rank)
    tokens = torch.randint(0, 32, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    mine = tokens[first : first + count]
    batch = MicroBatch(mine[:, :-1], mine[:, 1:], torch.arange(first, first + count))

    optimizer = build_optimizer(config.optimizer, model, config.trainable)
    if warm:
        earlier = build_optimizer(everything.optimizer, model)
        warming = NativeEngine(model, earlier, mesh, everything.clip_norm)
        for step in range(2):
            train_step(model, warming, [batch], everything, mesh, step=step, seed=0)
        for parameter, state in earlier.state.items():
            optimizer.state[parameter] = state
    before = weights(model)
    engine = NativeEngine(model, optimizer, mesh, config.clip_norm)
    norms = [train_step(model, engine, [batch], config, mesh, step=step, seed=0).grad_norm for step in range(STEPS)]
    return before, weights(model), norms


def weights(model: Any) -> dict[str, Tensor]:
    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for logical in logical_parameters(model):
        found |= {name: tensor.clone() for name, tensor in logical.whole(logical.parameter.detach()).items()}
    return found


def trains(name: str, trainable: dict[str, Any]) -> bool:
    path = name.split(".")
    in_block = len(path) > 1 and int(path[1]) in trainable.get("blocks", [0, 1]) if path[0] == "blocks" else False
    return in_block and "experts" in path and int(path[-2]) in trainable["experts"]


@pytest.mark.parametrize("trainable", [{"experts": [1, 5]}, {"experts": [2], "blocks": [1]}], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        {"world": 1},
        {"world": 2, "ep": 2},
        {"world": 4, "ep": 4},
        {"world": 4, "ep": 2, "data": "sharded"},
        {"world": 4, "ep": 1, "data": "sharded"},
        {"world": 2, "tp": 2, "etp": 2},
    ],
    ids=str,
)
def test_all_but_the_chosen_experts_stay_bit_equal(layout: dict[str, Any], trainable: dict[str, Any]) -> None:
    """With weight decay, and momentum from before."""
    settings = {"kind": "experts", **trainable}
    ((_, alone, norms),) = run_ranks(1, run, {"world": 1}, settings, True)
    seen: set[str] = set()
    for before, after, own_norms in run_ranks(layout["world"], run, layout, settings, True):
        assert own_norms == pytest.approx(norms, rel=1e-10)
        for name, value in after.items():
            if trains(name, trainable):
                assert not torch.equal(value, before[name]), f"{name} did not train"
                torch.testing.assert_close(value, alone[name], rtol=1e-9, atol=1e-11)
            else:
                assert torch.equal(value, before[name]), f"{name} is not what it was"
        seen |= after.keys()
    assert seen == alone.keys()


def test_rows_of_the_router_train_with_their_experts() -> None:
    ((before, after, _),) = run_ranks(1, run, {"world": 1}, {"kind": "experts", "experts": [4], "router": "chosen"})
    for layer in range(2):
        for name in ("weight", "bias"):
            old, new = (w[f"blocks.{layer}.moe.router.{name}"].view(6, -1) for w in (before, after))
            changed = old != new
            assert changed.any(1).tolist() == [False] * 4 + [True, False]
        assert not torch.equal(*(w[f"blocks.{layer}.moe.router.balance_bias_E"] for w in (before, after)))
    assert torch.equal(after["blocks.0.attention.query.weight"], before["blocks.0.attention.query.weight"])


def first_step(rank: int, trainable: dict[str, Any]) -> dict[str, Tensor]:
    mesh, model = build_on({"world": 1}, MODEL, seed=1)
    settings = {"steps": 9, "global_batch": 4, "sequence_length": 8, "dtype": "float64", "clip_norm": None}
    config = TrainingConfig.model_validate({**settings, "trainable": trainable})
    engine = NativeEngine(model, build_optimizer(config.optimizer, model, config.trainable), mesh, config.clip_norm)
    tokens = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.arange(4))
    train_step(model, engine, [batch], config, mesh, step=0, seed=0)
    return weights(model)


def test_chosen_experts_move_as_if_all_trained() -> None:
    """In a first step without clipping, bit for bit."""
    (everything,) = run_ranks(1, first_step, {"kind": "all"})
    (chosen,) = run_ranks(1, first_step, {"kind": "experts", "experts": [3]})
    moved = [name for name in everything if trains(name, {"experts": [3]})]
    assert len(moved) == 8
    assert all(torch.equal(everything[name], chosen[name]) for name in moved)


@pytest.mark.parametrize(
    ("trainable", "words"),
    [
        ({"kind": "experts", "experts": [6]}, "training.trainable.experts names expert 6, model.moe.num_experts is 6"),
        ({"kind": "experts", "experts": [0], "blocks": [3]}, r"names block 3; the MoE blocks are \[0, 1\]"),
    ],
)
def test_what_is_not_there_cannot_train(trainable: dict[str, Any], words: str) -> None:
    training = {"steps": 1, "global_batch": 4, "sequence_length": 8, "trainable": trainable}
    model = {**MODEL, "vocab_size": 256}
    with pytest.raises(ValueError, match=words):
        Config.model_validate({"run": {"folder": "runs/x"}, "model": model, "training": training})
