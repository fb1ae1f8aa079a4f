"""Routing recorded by one run and played back in another: on other layouts, with other weights; and what a record that
does not fit is told."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import RouterReplay, StepContext
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.routers.base import TopKRouterConfig
from tests.ranks import run_ranks
from tests.test_checkpoint import run_training

STEPS = 3


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """`scope: rank` with drops: which tokens fall depends on the layout, unless it is played back."""
    capacity = changes.get("capacity", {"kind": "factor", "train": 0.8, "minimum": 0, "overflow": "reroute"})
    return {
        "run": {"folder": str(folder), "log_every": 1},
        "seed": changes.get("seed", 5),
        "model": {
            "num_layers": 2,
            "d_model": 16,
            "init_std": changes.get("init_std", 0.3),
            "attention": {"num_heads": 2, "head_size": 8},
            "moe": {
                "num_experts": changes.get("num_experts", 6),
                "router": {"k": changes.get("k", 2)},
                "capacity": capacity,
                "experts": {"hidden": 8},
            },
        },
        "parallel": {"ep": changes.get("ep", 1)},
        "training": {
            "steps": changes.get("steps", STEPS),
            "global_batch": 8,
            "micro_steps": changes.get("micro_steps", 2),
            "sequence_length": 16,
            "dtype": "float64",
            "routing": changes.get("routing"),
            "recompute": changes.get("recompute", "none"),
        },
        "data": {"kind": "files", "paths": [argparse.__file__]},
    }


def train_and_read(folder: Path, world: int, **changes: Any) -> list[dict[str, float]]:
    """The records of the steps after the first evaluation."""
    assert set(run_ranks(world, run_training, world, settings(folder, **changes))) == {""}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["step"] > 0]


def fates(records: list[dict[str, float]]) -> list[dict[str, float]]:
    """What the routing decides: loads, drops, reroutes of each layer and step."""
    names = ("load/", "dropped_share", "rerouted_share", "load_cv")
    return [
        {k: v for k, v in r.items() if "layer_" in k and any(n in k for n in names) and "eval" not in k}
        for r in records
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """By 2 ranks."""
    folder = tmp_path_factory.mktemp("recorded")
    records = train_and_read(folder / "run", 2, ep=2, routing={"kind": "record", "folder": str(folder / "routing")})
    assert all(0.05 < r["moe/dropped_share"] + r["moe/rerouted_share"] < 0.5 for r in records)
    return folder / "routing", records


def test_a_record_holds_every_token_once_and_nothing_is_pickled(recorded: tuple[Path, Any]) -> None:
    files = sorted(file.name for file in recorded[0].iterdir())
    assert files == [f"step_{s:08d}.rank_{r:05d}.safetensors" for s in range(STEPS) for r in range(2)]
    with safe_open(recorded[0] / files[0], "pt") as file:
        assert file.get_tensor("0.1.ids_TK").shape == (2 * 16, 2)
        assert len(file.get_tensor("1.0.index_T").unique()) == 2 * 16


@pytest.mark.parametrize(
    ("world", "changes"),
    [(1, {"capacity": {"kind": "dropless"}}), (2, {"ep": 2, "recompute": "block"}), (4, {"ep": 2})],
)
def test_a_record_plays_on_any_layout(
    recorded: tuple[Path, list[dict[str, float]]], world: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    """The same weights and choices: the same losses to rounding, though capacity of scope `rank` would drop others,
    and a dropless layer none."""
    routing = {"kind": "play", "folder": str(recorded[0])}
    played = train_and_read(tmp_path / "played", world, routing=routing, **changes)
    for ours, theirs in zip(played, recorded[1], strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-9)
    assert fates(played) == fates(recorded[1])


def test_without_the_record_another_layout_drops_others(
    recorded: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    assert fates(train_and_read(tmp_path / "free", 4, ep=2)) != fates(recorded[1])


def test_a_model_with_other_weights_takes_the_recorded_experts(
    recorded: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    routing = {"kind": "play", "folder": str(recorded[0])}
    played = train_and_read(tmp_path / "played", 1, routing=routing, init_std=0.1)
    assert fates(played) == fates(recorded[1])
    assert played[0]["train/loss"] != pytest.approx(recorded[1][0]["train/loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 4}, "has no record of step 3: it holds steps 0 to 2"),
        ({"seed": 6}, "step 0 was recorded with other data (data or seed)"),
        (
            {"micro_steps": 1},
            "4 passes through MoE layers were recorded, but this run has 2 (training.micro_steps 1, ",
        ),
        ({"k": 3}, "step 0 holds 2 choices a token, model.moe.router makes 3"),
        ({"num_experts": 5}, "names expert 5, model.moe.num_experts is 5"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(
    recorded: tuple[Path, Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """In one sentence, the same on all ranks, before the step."""
    routing = {"kind": "play", "folder": str(recorded[0])}
    texts = run_ranks(2, run_training, 2, settings(tmp_path / "refused", ep=2, routing=routing, **changes))
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"training.routing.folder: {recorded[0]}")
    assert said in texts[0]


def test_two_records_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    routing = {"kind": "record", "folder": str(tmp_path / "routing")}
    for world in (1, 2):
        train_and_read(tmp_path / f"run{world}", world, routing=routing, steps=1)
    for file in (tmp_path / "routing").glob("*.rank_00000*"):  # as if the second run had not written this rank's
        file.rename(file.with_name(file.name.replace("00000.s", "00007.s")))
    train_and_read(tmp_path / "again", 1, routing=routing, steps=1)
    tree = settings(tmp_path / "refused", routing={**routing, "kind": "play"}, steps=1)
    (text,) = run_ranks(1, run_training, 1, tree)
    assert text.endswith("step 0 was recorded twice, on different numbers of ranks: use an empty folder to record")


def test_a_record_that_lacks_a_ranks_file_is_refused(recorded: tuple[Path, Any], tmp_path: Path) -> None:
    copied = tmp_path / "routing"
    shutil.copytree(recorded[0], copied)
    (copied / "step_00000000.rank_00001.safetensors").unlink()
    tree = settings(tmp_path / "refused", routing={"kind": "play", "folder": str(copied)})
    (text,) = run_ranks(1, run_training, 1, tree)
    assert "step 0 does not hold all of this rank's tokens: a rank's file is missing" in text


def test_a_damaged_record_and_a_folder_that_is_a_file_are_told(recorded: tuple[Path, Any], tmp_path: Path) -> None:
    copied = tmp_path / "routing"
    shutil.copytree(recorded[0], copied)
    (copied / "step_00000000.rank_00001.safetensors").write_bytes(b"")
    tree = settings(tmp_path / "refused", routing={"kind": "play", "folder": str(copied)})
    (text,) = run_ranks(1, run_training, 1, tree)
    assert text.startswith(f"training.routing.folder: {copied}: a record of step 0 cannot be read: ")
    (tmp_path / "file").write_text("")
    tree = settings(tmp_path / "again", routing={"kind": "record", "folder": str(tmp_path / "file")})
    (text,) = run_ranks(1, run_training, 1, tree)
    assert text.startswith(f"training.routing.folder: cannot write {tmp_path / 'file'}/step_00000000.rank_00000.safe")


def test_a_layer_refuses_a_replay_of_other_tokens() -> None:
    layer = MoELayer(MoEConfig.model_validate({"d_model": 4, "num_experts": 4, "experts": {"hidden": 4}}))
    context = StepContext(replay=RouterReplay())
    layer(torch.zeros(5, 4), context)
    with pytest.raises(ValueError, match="recorded for other tokens: it has 5, this pass has 6"):
        layer(torch.zeros(6, 4), context)
    other = MoELayer(layer.config.model_copy(update={"router": TopKRouterConfig(k=3)}))
    with pytest.raises(ValueError, match="holds 2 choices a token, the router makes 3"):
        other(torch.zeros(5, 4), context)


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    tree = settings(tmp_path / "refused", routing={"kind": "play", "folder": str(tmp_path / "nowhere")})
    (text,) = run_ranks(1, run_training, 1, tree)
    assert text.endswith("nowhere has no record of step 0: it is empty")
