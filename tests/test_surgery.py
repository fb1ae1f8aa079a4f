"""Expert surgery: what an operated checkpoint holds, tensor by tensor, and that training goes on from it."""

import argparse
import json
import re
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from expert_parallel.checkpoint.files import Checkpoint, open_checkpoint
from expert_parallel.cli.app import app
from expert_parallel.interop.surgery import Surgery, add, merge, perform_surgery, remove
from expert_parallel.runtime.process import Launch, Runtime
from expert_parallel.training.config import Config, load_config
from expert_parallel.training.loop import train
from tests.ranks import run_ranks

NUM_EXPERTS, SHARD = 5, 1 << 20


def tree(folder: Path, router: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": {"folder": str(folder)},
        "model": {
            "num_layers": 2,
            "d_model": 8,
            "attention": {"num_heads": 2, "head_size": 4},
            "ffn": {"hidden": 8},
            "moe_blocks": {"kind": "every_nth", "n": 2},
            "moe": {"num_experts": NUM_EXPERTS, "router": router, "experts": {"hidden": 6, "bias": True}},
        },
        "training": {"steps": 2, "global_batch": 2, "sequence_length": 16, "schedule": {"warmup_steps": 1}},
        "evaluation": {"sequences": 4},
        "data": {"kind": "files", "paths": [argparse.__file__]},
    }


@pytest.fixture(scope="module", params=["sigmoid with bias", "noisy"])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps, with its optimizer state."""
    routers = {
        "sigmoid with bias": {"k": 2, "score": "sigmoid", "bias": True, "balance_bias_rate": 0.5},
        "noisy": {"kind": "noisy_top_k", "k": 2, "noise": "learned"},
    }
    folder = tmp_path_factory.mktemp("run") / "run"
    run_ranks(1, train_alone, tree(folder, routers[request.param]))
    return folder


def train_alone(rank: int, config: dict[str, Any]) -> None:
    runtime = Runtime(Launch("test", 0, 1, 0, 1), torch.device("cpu"), "gloo", timedelta(seconds=120))
    train(Config.model_validate(config), runtime)


def read_all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def mean_of(old: dict[str, Tensor], name: str, parents: tuple[int, ...]) -> Tensor:
    """By hand: of an expert's tensor, or of one row of a router's."""
    if "experts" in name:
        before, _, after = name.partition(".experts.")
        rows = [old[f"{before}.experts.{parent}.{after.partition('.')[2]}"] for parent in parents]
    else:
        rows = [old[name][parent] for parent in parents]
    return sum(row.double() for row in rows).div(len(rows)).to(rows[0].dtype)  # type: ignore[union-attr]


CASES: list[tuple[Surgery, list[tuple[int, ...]]]] = [
    (add(NUM_EXPERTS, [3, 0], 0.0, 0), [(0,), (1,), (2,), (3,), (4,), (3,), (0,)]),
    (remove(NUM_EXPERTS, [1, 4]), [(0,), (2,), (3,)]),
    (merge(NUM_EXPERTS, [[3, 1], [0, 4]]), [(0, 4), (2,), (3, 1)]),
]


@pytest.mark.parametrize(("surgery", "parents"), CASES, ids=["add", "remove", "merge"])
def test_every_tensor_is_its_parents_mean(
    surgery: Surgery, parents: list[tuple[int, ...]], run: Path, tmp_path: Path
) -> None:
    """Weights, balance biases and moments; what belongs to no expert, and experts with one parent, bit for bit."""
    perform_surgery(run, tmp_path / "out", surgery, SHARD)
    before, after = open_checkpoint(run), open_checkpoint(tmp_path / "out")
    old, new = read_all(before), read_all(after)
    assert after.step == before.step == 2
    assert after.has_moments
    assert after.config["model"]["moe"]["num_experts"] == len(parents)
    experts = {name for name in new if ".experts." in name}
    assert len(experts) == 3 * 4 * len(parents)
    for name in experts:
        number = int(name.partition(".experts.")[2].split(".")[0])
        assert torch.equal(new[name], mean_of(old, name, parents[number])), name
    for name in new.keys() - experts:
        if ".router." in name:
            assert len(new[name]) == len(parents)
            for row, expected in zip(new[name], parents, strict=True):
                assert torch.equal(row, mean_of(old, name, expected)), name
        else:
            assert torch.equal(new[name], old[name]), name


def test_noise_moves_the_added_experts_alone(run: Path, tmp_path: Path) -> None:
    perform_surgery(run, tmp_path / "out", add(NUM_EXPERTS, [2], 0.01, 0), SHARD)
    old, new = read_all(open_checkpoint(run)), read_all(open_checkpoint(tmp_path / "out"))
    for leaf in ("w_in", "w_out"):
        parent, copy = (t[f"weights/blocks.1.moe.experts.{e}.{leaf}"] for t, e in ((old, 2), (new, NUM_EXPERTS)))
        assert float((copy - parent).std() / parent.std()) == pytest.approx(0.01, rel=0.5)
        moment = f"exp_avg/blocks.1.moe.experts.{{}}.{leaf}"
        assert torch.equal(new[moment.format(NUM_EXPERTS)], old[moment.format(2)])
    router = "weights/blocks.1.moe.router.weight"
    assert torch.equal(new[router][:NUM_EXPERTS], old[router])
    assert not torch.equal(new[router][NUM_EXPERTS], old[router][2])


def test_a_copied_checkpoint_keeps_its_step(run: Path, tmp_path: Path) -> None:
    """Whatever its folder is called; and what stands beside it is not taken for its run's."""
    shutil.copytree(run / "checkpoints" / "step_00000002", tmp_path / "below" / "copied")
    (tmp_path / "tokenizer.json").write_text("{}")
    out = perform_surgery(tmp_path / "below" / "copied", tmp_path / "out", remove(NUM_EXPERTS, [1]), SHARD)
    assert [path.name for path in (out / "checkpoints").glob("step_*")] == ["step_00000002"]
    assert not (out / "tokenizer.json").exists()


def test_training_goes_on_with_the_new_expert_alone(run: Path, tmp_path: Path) -> None:
    """The others stay bit for bit."""
    out = tmp_path / "out"
    perform_surgery(run, out, add(NUM_EXPERTS, [2], 0.01, 0), SHARD)
    chosen = f"{{kind: experts, experts: [{NUM_EXPERTS}], router: chosen}}"
    config = load_config(out / "config.yaml", ["training.steps=4", f"training.trainable={chosen}"])
    run_ranks(1, train_alone, config.model_dump(mode="json"))
    before, after = open_checkpoint(out / "checkpoints" / "step_00000002"), open_checkpoint(out)
    assert after.step == 4
    for name, entry in after.tensors.items():
        is_new = f".experts.{NUM_EXPERTS}." in name
        if name.startswith("weights/") and ".router." not in name:
            assert (entry.digest != before.tensors[name].digest) == is_new, name


def test_the_commands(run: Path, tmp_path: Path) -> None:
    def said(*arguments: Any) -> str:
        result = CliRunner().invoke(app, ["checkpoint", "experts", *map(str, arguments)])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    added = said("add", run, tmp_path / "added", "--like", "1,2")
    measured = re.fullmatch(
        rf"wrote {tmp_path / 'added'}: 7 experts\n"
        r"held-out text: cross entropy (\S+) before, (\S+) after, change \S+ nats\n",
        added,
    )
    assert measured is not None, added
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(measured[1]) == pytest.approx(last["eval/loss"], abs=2e-6), "with balance biases"
    assert float(measured[2]) == pytest.approx(last["eval/loss"], abs=0.1)
    assert ": 3 experts\n" in said("remove", run, tmp_path / "removed", "--experts", "0,3")
    merged = said("merge", run, tmp_path / "merged", "--experts", "0,1", "--experts", "2,3", "--no-check")
    assert merged == f"wrote {tmp_path / 'merged'}: 3 experts\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add", "--like", "5"], "--like names expert 5, model.moe.num_experts is 5"),
        (["add", "--like", "a"], "--like is 'a', it must be a list of expert numbers"),
        (["remove", "--experts", "0,1,2,3,4"], "--experts names all 5 experts: none would remain"),
        (["remove", "--experts", "0,1,2,3"], "model.moe.router.k (2) is larger than model.moe.num_experts (1)"),
        (["merge", "--experts", "1,2", "--experts", "2,3"], "--experts names expert 2 twice"),
        (["merge", "--experts", "1"], "a merge needs two or more experts"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    arguments: list[str], words: str, run: Path, tmp_path: Path
) -> None:
    command = ["checkpoint", "experts", arguments[0], str(run), str(tmp_path / "out"), *arguments[1:]]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()
