"""Every peer of the bench: measured, with the outputs of ours, or with the reason why not. In processes of their own,
since they change what is around them."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from expert_parallel.bench.layer import LayerResult
from expert_parallel.bench.peers.registry import DEFAULT_PEERS, PEERS, TRAIN_PEERS
from expert_parallel.bench.train import TrainResult
from tests.launches import start

SIZES = ["tokens=64", "d_model=32", "hidden=16", "num_experts=4"]
PACKAGES = {
    "deepspeed": "deepspeed",
    "deepspeed + tutel": "tutel",
    "tutel": "tutel",
    "megatron-core": "megatron-core",
    "torchtitan": "torchtitan",
    "transformers eager": "transformers",
    "transformers grouped_mm": "transformers",
    "transformers model": "transformers",
}
ONE_RANK = {"mask loop", "one-hot einsum", "transformers eager", "transformers grouped_mm"}


def is_installed(name: str) -> bool:
    try:
        version(PACKAGES.get(name, "torch"))
    except PackageNotFoundError:
        return False
    return True


def measured(command: str, folder: Path, *arguments: str) -> str:
    path = folder / "result.json"
    result = start("alone", "bench", command, "--rounds", "1", "--json", path, *arguments, *SIZES)
    assert result.returncode == 0, result.output
    return path.read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_peer_is_measured_or_says_why_not(tmp_path: Path, ranks: int) -> None:
    result = LayerResult.model_validate(json.loads(measured("layer", tmp_path, "--ranks", str(ranks))), strict=False)
    rows = {row.name: row for row in result.rows}
    agree = {name for agreement in result.agreements for name in agreement.names}
    for name in DEFAULT_PEERS:
        if not is_installed(name):
            assert f"{PACKAGES[name]} is not installed" in rows[name].why, rows[name]
        elif ranks > 1 and name in ONE_RANK:
            assert rows[name].why.startswith("on one rank only")
        else:
            assert rows[name].times is not None, rows[name].why
            assert rows[name].version
            assert name in agree
            least, dropped = rows[name].over_minimum, rows[name].dropped_share
            assert (least is None) == (ranks == 1)
            assert least is None or least >= 1 or (name.startswith("ours") and dropped)
    assert {"deepspeed"} <= agree, "so that this test compares something in every environment"
    dropped = rows["deepspeed"].dropped_share
    assert dropped is not None
    assert 0 < dropped < 0.5, "64 tokens of random weights are not balanced, and its factor is 1"
    assert rows["ours"].dropped_share == 0
    if ranks == 1:  # on two, each counts the tokens of its own
        assert rows["ours with capacity"].dropped_share == pytest.approx(dropped)


def test_every_peer_is_trained_or_says_why_not(tmp_path: Path) -> None:
    changes = ["num_layers=2", "num_heads=2", "head_size=8", "sequence_length=16", "vocab_size=32"]
    result = TrainResult.model_validate(json.loads(measured("train", tmp_path, *changes)), strict=False)
    rows = {row.name: row for row in result.rows}
    for name in TRAIN_PEERS:
        assert (rows[name].times is not None) == is_installed(name), rows[name]
        if rows[name].times is None:
            assert f"{PACKAGES[name]} is not installed" in rows[name].why
        else:
            assert rows[name].loss is not None
            assert rows[name].loss < 3.5, "below log 32: it learns"
            assert (rows[name].dropped_share or 0) > 0 or "capacity" not in rows[name].computes
    assert rows["ours"].dropped_share == 0


def test_the_dense_layer_stands_only_where_it_is_asked_for() -> None:
    assert "dense" in PEERS
    assert "dense" not in DEFAULT_PEERS
