"""Save and resume on real ranks: the same losses as a run that never stopped, on the same layout and on others; and
what a damaged, incomplete or foreign checkpoint is told."""

import argparse
import json
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from expert_parallel.checkpoint.files import list_checkpoints, open_checkpoint
from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.checkpoint.manifest import add_checksum
from expert_parallel.checkpoint.tensor_files import write_tensors
from expert_parallel.model.generation import Sampling
from expert_parallel.model.parallelize import build_model
from expert_parallel.runtime.process import Launch, Runtime, UserError
from expert_parallel.training.config import Config
from expert_parallel.training.generate import generate_from_run
from expert_parallel.training.loop import train
from expert_parallel.training.resume import changed_since_checkpoint
from tests.layouts import parallel_config
from tests.ranks import run_ranks


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A tiny run: 10 steps, sigmoid router with a balance bias, jitter and dropout unless a change says otherwise."""
    return {
        "run": {"folder": str(folder), "log_every": 1, "sample": {"prompt": "def", "length": 4}},
        "seed": 5,
        "model": {
            "num_layers": 2,
            "d_model": 16,
            "attention": {"num_heads": 2, "head_size": 8},
            "ffn": {"hidden": 16},
            "moe_blocks": {"kind": "every_nth", "n": 2},
            "moe": {
                "num_experts": 6,
                "router": {"k": 2, "score": "sigmoid", "balance_bias_rate": 0.01, "jitter": changes.get("jitter", 0.1)},
                "losses": [{"kind": "balance"}],
                "experts": {"hidden": 8, "hidden_dropout": changes.get("dropout", 0.1)},
            },
            "dropout": changes.get("dropout", 0.1),
        },
        "parallel": parallel_config(changes).model_dump(mode="json"),
        "training": {
            "steps": changes.get("steps", 10),
            "global_batch": 8,
            "micro_steps": 2,
            "sequence_length": 16,
            "dtype": changes.get("dtype", "float64"),
            "optimizer": {"learning_rate": 0.01},
            "schedule": {"warmup_steps": 3},
        },
        "evaluation": {"every": 5, "sequences": 6},
        "checkpoint": {"every": changes.get("every", 5), "keep": 2, **changes.get("checkpoint", {})},
        "data": {"kind": "files", "paths": [argparse.__file__]},
    }


def run_training(rank: int, world: int, tree: dict[str, Any], stop_after: int | None = None) -> str:
    """`stop_after`: breaks off there, as a kill would. Returns the error's text, or nothing."""
    runtime = Runtime(Launch("test", rank, world, rank, world), torch.device("cpu"), "gloo", timedelta(seconds=120))
    try:
        if stop_after is None:
            train(Config.model_validate(tree), runtime)
        else:
            train(Config.model_validate(tree), StoppingRuntime(**vars(runtime), saves_left=[stop_after]))
    except (UserError, Stopped) as error:
        return str(error)
    return ""


class Stopped(Exception):
    pass


class StoppingRuntime(Runtime):
    """Breaks off when the ranks have agreed that so many saves are done; the next one begins with that."""

    def __init__(self, saves_left: list[int], **fields: Any) -> None:
        super().__init__(**fields)
        object.__setattr__(self, "saves_left", saves_left)

    def run_on_all_ranks(self, work: Any) -> Any:
        result = super().run_on_all_ranks(work)
        if work.__name__ == "wait_for_commit":
            self.saves_left[0] -= 1  # type: ignore[attr-defined]
            if self.saves_left[0] == 0:  # type: ignore[attr-defined]
                raise Stopped
        return result


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[float, ...]]:
    keys = ("step", "train/loss", "eval/loss", "train/grad_norm", "moe/balance_loss", "moe/layer_1/load_cv")
    return [tuple(record[key] for key in keys if key in record) for record in metrics(folder)]


@pytest.mark.parametrize(("world", "changes"), [(2, {"ep": 2}), (2, {"ep": 1, "data": "sharded", "dtype": "float32"})])
def test_stopped_and_resumed_run_is_bit_equal(world: int, changes: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(world, run_training, world, settings(whole, **changes))
    run_ranks(world, run_training, world, settings(parts, **changes), 1)
    assert [path.name for path in list_checkpoints(parts / "checkpoints")] == ["step_00000005"]
    run_ranks(world, run_training, world, settings(parts, **changes))
    assert [record["step"] for record in metrics(parts)] == list(range(11))
    assert losses(parts) == losses(whole)
    for file in ("rank_00000.safetensors", "rank_00001.safetensors"):
        path = Path("checkpoints") / "step_00000010" / file
        assert (parts / path).read_bytes() == (whole / path).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of one rank, without dropout, which draws other numbers in other layouts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(1, run_training, 1, settings(folder, dropout=0.0))
    return folder


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, {"ep": 2}), (4, {"ep": 4})),
        ((4, {"ep": 2, "data": "sharded"}), (1, {"ep": 1})),
        ((1, {"ep": 1}), (4, {"ep": 2, "data": "sharded"})),
        ((4, {"ep": 4}), (2, {"ep": 1, "data": "sharded"})),
        ((4, {"tp": 2, "pp": 2, "ep": 2}), (2, {"cp": 2, "etp": 2})),
        ((2, {"cp": 2, "etp": 2}), (4, {"tp": 2, "pp": 2, "ep": 2, "data": "sharded"})),
    ],
    ids=str,
)
def test_resume_on_another_number_of_ranks(first: Any, then: Any, undisturbed: Path, tmp_path: Path) -> None:
    """6 experts do not divide by 4 ranks: uneven placement on the way."""
    run_ranks(first[0], run_training, first[0], settings(tmp_path, **first[1], dropout=0.0), 1)
    run_ranks(then[0], run_training, then[0], settings(tmp_path, **then[1], dropout=0.0))
    assert len(losses(undisturbed)) == len(losses(tmp_path)) == 11
    for actual, expected in zip(losses(tmp_path), losses(undisturbed), strict=True):
        assert actual == pytest.approx(expected, rel=1e-9)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run_ranks(2, run_training, 2, settings(folder, ep=2, steps=4, every=2))
    return folder


def newest(folder: Path) -> Path:
    return list_checkpoints(folder / "checkpoints")[-1]


def copy_of(folder: Path, target: Path) -> Path:
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".safetensors", ".json", ".yaml", ".jsonl"):
            (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    return target


def test_every_expert_stands_once_and_differs(finished: Path) -> None:
    """Traps 23 and 24: experts of one rank only, the same experts from every rank, experts left random."""
    seen: dict[str, torch.Tensor] = {}
    for file in newest(finished).glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a dict
                assert name not in seen
                seen[name] = reader.get_tensor(name)
    experts = [seen[f"weights/blocks.1.moe.experts.{expert}.w_in"] for expert in range(6)]
    assert all(not torch.equal(experts[i], experts[j]) for i in range(6) for j in range(i))
    assert all(seen[f"exp_avg/blocks.1.moe.experts.{expert}.w_in"].abs().sum() > 0 for expert in range(6))


def test_only_the_newest_are_kept_and_nothing_partial_stays(finished: Path) -> None:
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002", "step_00000004"]
    assert (finished / "checkpoints" / "latest").readlink() == Path("step_00000004")


def test_finished_run_is_left_alone(finished: Path) -> None:
    before = newest(finished).stat().st_mtime_ns, (finished / "metrics.jsonl").read_text()
    assert run_ranks(2, run_training, 2, settings(finished, ep=2, steps=4, every=2)) == ["", ""]
    assert before == (newest(finished).stat().st_mtime_ns, (finished / "metrics.jsonl").read_text())


def generated(folder: Path, prompt: str, temperature: float = 0.0, seed: int = 0) -> str:
    runtime = Runtime(Launch("test", 0, 1, 0, 1), torch.device("cpu"), "gloo", timedelta(seconds=120))
    sampling = Sampling(temperature=temperature)
    return generate_from_run(folder, [], [prompt], runtime, num_tokens=8, sampling=sampling, seed=seed)[0]


def test_generate_from_another_layout(finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path)
    greedy = generated(folder, "def ")
    assert greedy.startswith("def ")
    assert len(greedy.encode()) >= 12
    drawn = [generated(folder, "def ", temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_no_weight_depends_on_may_change(finished: Path, tmp_path: Path) -> None:
    """Losses, capacity, dropout, how experts are reached and multiplied: they are training's and the layout's."""
    tree = settings(copy_of(finished, tmp_path), ep=2, steps=6, every=2)
    moe = tree["model"]["moe"]
    moe |= {"losses": [], "dispatcher": {"kind": "all_gather"}, "capacity": {"kind": "factor"}}
    moe["experts"] |= {"backend": "loop", "hidden_dropout": 0.0}
    assert run_ranks(2, run_training, 2, tree) == ["", ""]


def test_data_held_out_must_stay(finished: Path, tmp_path: Path) -> None:
    """Else text that was trained on would be held out."""
    tree = settings(copy_of(finished, tmp_path), ep=2, steps=6, every=2)
    tree["data"]["held_out"] = 0.3
    for error in run_ranks(2, run_training, 2, tree):
        assert "was trained on another order of data: data.held_out is 0.05 there and 0.3 here" in error


def test_a_setting_that_is_newer_than_a_checkpoint_had_its_default() -> None:
    config = Config.model_validate(settings(Path("runs/none")))
    then = config.model_dump(mode="json")
    del then["model"]["norm_placement"], then["model"]["moe"]["capacity"]
    assert changed_since_checkpoint(SimpleNamespace(config=then, path="a checkpoint"), config) == []  # type: ignore[arg-type]
    then["model"]["norm_placement"] = "post"
    changed = changed_since_checkpoint(SimpleNamespace(config=then, path="a checkpoint"), config)  # type: ignore[arg-type]
    assert changed == [("model.norm_placement", "post", "pre")]


def test_another_model_is_refused_by_setting(finished: Path) -> None:
    tree = settings(finished, ep=2, steps=8, every=2)
    tree["model"]["moe"]["num_experts"] = 8
    errors = run_ranks(2, run_training, 2, tree)
    assert errors[0] == errors[1]
    assert "checkpoint of another model" in errors[0]
    assert "model.moe.num_experts is 6 there and 8 here" in errors[0]


def test_resume_for_more_steps(finished: Path, tmp_path: Path) -> None:
    tree = settings(copy_of(finished, tmp_path), ep=2, steps=6, every=2)
    assert run_ranks(2, run_training, 2, tree) == ["", ""]
    assert [record["step"] for record in metrics(tmp_path)] == list(range(7))
    checkpoint = open_checkpoint(newest(tmp_path))
    assert (checkpoint.step, checkpoint.config["training"]["steps"]) == (6, 6)


def damage_flip(path: Path) -> str:
    file = path / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "rank_00001.safetensors is damaged"


def damage_truncate(path: Path) -> str:
    file = path / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "rank_00000.safetensors is damaged"


def damage_remove(path: Path) -> str:
    (path / "rank_00001.safetensors").unlink()
    return "rank_00001.safetensors is missing"


def damage_manifest(path: Path) -> str:
    (path / "manifest.json").write_text("{")
    return "manifest.json cannot be read"


def damage_tensor_left_out(path: Path) -> str:
    name = "weights/blocks.1.moe.experts.4.w_in"
    rewrite(path, lambda tensors: tensors.pop(name, None))
    return f"{name} is missing"


def damage_tensor_added(path: Path) -> str:
    rewrite(path, lambda tensors: tensors.update({"weights/blocks.9": torch.zeros(1)}))
    return "weights/blocks.9 is left over"


def rewrite(path: Path, change: Any) -> None:
    """Changes rank 1's file and puts a manifest beside it that fits: the SHA-256 cannot tell."""
    file = path / "rank_00001.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    record = write_tensors(file, list(tensors.items()))
    tree = json.loads((path / "manifest.json").read_text())
    tree["files"][file.name] = record.model_dump(mode="json")
    for entry in tree["tensors"].values():
        entry["pieces"] = [p for p in entry["pieces"] if p["file"] != file.name or p["key"] in tensors]
    tree["tensors"] = {name: entry for name, entry in tree["tensors"].items() if entry["pieces"]}
    for name, tensor in tensors.items():
        start, shape = [0] * tensor.dim(), list(tensor.shape)
        piece = {"file": file.name, "key": name, "start": start, "shape": shape}
        tree["tensors"].setdefault(name, {"dtype": "F64", "shape": shape, "digest": "0" * 32, "pieces": [piece]})
    (path / "manifest.json").write_text(json.dumps(add_checksum(tree)))


DAMAGES = [damage_flip, damage_truncate, damage_remove, damage_manifest, damage_tensor_left_out, damage_tensor_added]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_by_name(damage: Any, finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path)
    message = damage(newest(folder))
    with pytest.raises(UserError, match=r"checkpoint|damaged|missing") as error:
        generated(folder, "x")
    assert message in str(error.value)


def test_load_fills_every_parameter(finished: Path) -> None:
    config = Config.model_validate(settings(finished, ep=2, steps=4, every=2))
    model = build_model(config.model, dtype=torch.float64)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan"))
    load_checkpoint(newest(finished), model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), name
