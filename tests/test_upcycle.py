"""Upcycling: a dense model and the mixture made of it, in float64: exactly the dense output where the method promises
it, with copies and with split copies, from checkpoints of ours and from Hugging Face folders."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from typer.testing import CliRunner

from expert_parallel.checkpoint.files import open_checkpoint
from expert_parallel.cli.app import app
from expert_parallel.interop.importing import write_run
from expert_parallel.interop.upcycle import Upcycling, compare, held_out_loss, upcycle
from expert_parallel.model.parallelize import build_model
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.training.config import Config, load_config
from tests.test_interop import load_ours, make_peer

SHARD = 2**30
DENSE: dict[str, Any] = {
    "vocab_size": 256,
    "num_layers": 2,
    "d_model": 16,
    "attention": {"num_heads": 2, "head_size": 8},
    "ffn": {"hidden": 24, "activation": "swiglu", "bias": True},
}


def dense_run(folder: Path, dtype: torch.dtype = torch.float64, **model: Any) -> Path:
    """A run with one checkpoint, of random weights; biases, too."""
    config = Config.model_validate(
        {
            "run": {"folder": str(folder)},
            "model": {**DENSE, **model},
            "training": {"steps": 1, "global_batch": 1, "sequence_length": 16},
            "evaluation": {"sequences": 4},
        }
    )
    dense = build_model(config.model, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    weights = []
    for logical in logical_parameters(dense):
        drawn = torch.empty(logical.shape, dtype=torch.float64).normal_(0.0, 0.3, generator=generator)
        weights.append((logical.names[0], (drawn + float(logical.names[0].endswith("norm.weight"))).to(dtype)))
    return write_run(folder, config, weights, origin=None, tokenizer=None, shard_bytes=SHARD)


def tokens() -> Tensor:
    return torch.randint(0, 256, (3, 11), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(run: Path, dtype: torch.dtype = torch.float64) -> Tensor:
    return load_ours(run, dtype)(tokens(), StepContext()).logits


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize(
    ("copies", "k", "split"), [(2, 2, 1), (4, 2, 1), (3, 3, 1), (4, 2, 2), (3, 2, 3), (2, 1, 4), (8, 3, 2)]
)
def test_mixture_computes_the_dense_model(tmp_path: Path, copies: int, k: int, split: int, activation: str) -> None:
    ffn = {**DENSE["ffn"], "activation": activation}
    dense = dense_run(tmp_path / "dense", ffn=ffn)
    mixture = upcycle(dense, tmp_path / "moe", Upcycling(copies, k, split=split), SHARD)
    model = load_config(mixture / "config.yaml").model
    assert model.moe is not None
    assert (model.moe.num_experts, model.moe.experts.hidden) == (copies * split, 24 // split)
    torch.testing.assert_close(logits(mixture), logits(dense), rtol=1e-12, atol=1e-12)
    loss = [F.cross_entropy(out.flatten(0, 1), tokens().flatten()) for out in (logits(dense), logits(mixture))]
    assert abs(float(loss[0] - loss[1])) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("split", [1, 2])
def test_whatever_the_router_says(tmp_path: Path, split: int) -> None:
    """Other rows for the router, of other sizes: the same output; experts are taken unequally, weights differ."""
    dense = dense_run(tmp_path / "dense")
    mixture = load_ours(upcycle(dense, tmp_path / "moe", Upcycling(4, 2, split=split), SHARD), torch.float64)
    for number, block in enumerate(mixture.blocks):
        rows = torch.randn(4, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        block.moe.router.weight.copy_(rows.repeat_interleave(split, 0))
    output = mixture(tokens(), StepContext())
    torch.testing.assert_close(output.logits, logits(dense), rtol=1e-12, atol=1e-12)
    assert len(set(output.stats[0].kept_E.tolist())) > 1


def test_split_needs_rows_that_its_parts_share(tmp_path: Path) -> None:
    """With a router of its own for each part, parts of a copy would be taken twice and others not at all."""
    dense = dense_run(tmp_path / "dense")
    mixture = load_ours(upcycle(dense, tmp_path / "moe", Upcycling(4, 2, split=2), SHARD), torch.float64)
    with torch.no_grad():
        for number, block in enumerate(mixture.blocks):
            rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            block.moe.router.weight.copy_(rows)
        off = (mixture(tokens(), StepContext()).logits - logits(dense)).abs().max()
    assert off > 1e-2


def test_the_router_learns(tmp_path: Path) -> None:
    """Copies that are alike give it no gradient by themselves; it comes as soon as they differ by noise."""
    dense = dense_run(tmp_path / "dense")
    for noise, learns in ((0.0, False), (0.05, True)):
        folder = tmp_path / f"moe{noise}"
        mixture = load_ours(upcycle(dense, folder, Upcycling(4, 2, noise), SHARD), torch.float64)
        F.cross_entropy(mixture(tokens(), StepContext()).logits.flatten(0, 1), tokens().flatten()).backward()
        assert bool(mixture.blocks[0].moe.router.weight.grad.abs().max() > 1e-6) is learns


def test_noise_and_router_are_functions_of_the_seed(tmp_path: Path) -> None:
    dense = dense_run(tmp_path / "dense", torch.float32)
    runs = {
        name: upcycle(dense, tmp_path / name, Upcycling(2, 2, noise, seed=seed), SHARD)
        for name, noise, seed in (("exact", 0.0, 1), ("one", 0.1, 1), ("again", 0.1, 1), ("other", 0.1, 2))
    }
    opened = {name: open_checkpoint(run) for name, run in runs.items()}
    same = [entry.digest == opened["again"].tensors[name].digest for name, entry in opened["one"].tensors.items()]
    assert all(same)
    name = "weights/blocks.1.moe.experts.{}.w_in"
    exact, one, other = (opened[key].read(name.format(0)) for key in ("exact", "one", "other"))
    assert not torch.equal(one, other)
    assert not torch.equal(one, opened["one"].read(name.format(1)))
    assert float((one - exact).std() / exact.std()) == pytest.approx(0.1, rel=0.1)
    router = "weights/blocks.1.moe.router.weight"
    assert not torch.equal(opened["one"].read(router), opened["other"].read(router))


@torch.no_grad()
def test_from_a_hugging_face_folder_of_bfloat16(tmp_path: Path) -> None:
    """Its weights are cut and copied without rounding; a split by a power of two rounds nothing either."""
    peer = make_peer("llama with all parts").to(torch.bfloat16)
    peer.save_pretrained(tmp_path / "theirs")
    mixture = upcycle(tmp_path / "theirs", tmp_path / "moe", Upcycling(4, 2, split=2), SHARD)
    checkpoint = open_checkpoint(mixture)
    part = checkpoint.read("weights/blocks.1.moe.experts.5.w_out")
    whole = peer.state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(part, 2 * whole.mT[6:])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(mixture, torch.float32), theirs(tokens()).logits, rtol=0, atol=1e-5)
    assert (mixture / "huggingface/config.json").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"copies": 2, "k": 3}, ("--k (3)", "--experts (2)")),
        ({"copies": 2, "k": 1}, ("--k is 1", "--split")),
        ({"copies": 2, "split": 5}, ("--split (5)", "model.ffn.hidden (24)")),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, Any], words: tuple[str, ...]) -> None:
    dense = dense_run(tmp_path / "dense")
    with pytest.raises(ValueError, match="--") as refusal:
        upcycle(dense, tmp_path / "moe", Upcycling(**options), SHARD)
    assert all(word in str(refusal.value) for word in words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_mixture_is_not_upcycled_again(tmp_path: Path) -> None:
    mixture = upcycle(dense_run(tmp_path / "dense"), tmp_path / "moe", Upcycling(2), SHARD)
    with pytest.raises(ValueError, match="already has experts"):
        upcycle(mixture, tmp_path / "again", Upcycling(2), SHARD)


def test_command_says_the_loss_before_and_after(tmp_path: Path) -> None:
    dense = dense_run(tmp_path / "dense", torch.float32)
    arguments = ["convert", "upcycle", str(dense), str(tmp_path / "moe"), "--experts", "4", "--k", "2"]
    result = CliRunner().invoke(app, [*arguments, "--split", "2"])
    assert result.exit_code == 0, result.output
    assert "held-out text: cross entropy" in result.output
    before, after = (float(word) for word in result.output.split() if word.replace(".", "").isdigit())
    assert before > 1
    assert after == pytest.approx(before, abs=1e-5)


def test_command_compares_logits_where_there_is_no_data(tmp_path: Path) -> None:
    make_peer("qwen2").save_pretrained(tmp_path / "theirs")
    upcycle(tmp_path / "theirs", tmp_path / "moe", Upcycling(2), SHARD)
    line = compare(tmp_path / "theirs", tmp_path / "moe")
    assert line.startswith("random tokens: the logits differ by ")
    assert float(line.split()[8].rstrip(",")) < 1e-5


def test_held_out_loss_of_packed_documents_with_a_loss_by_sequence(tmp_path: Path) -> None:
    """A loss of scope `sequence` counts each document of a row: they are announced to the layer."""
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text("a few words\n" * (1 + number % 3))
    moe = {"num_experts": 4, "experts": {"hidden": 8}}
    tree = {
        "run": {"folder": str(tmp_path / "run")},
        "training": {"steps": 1, "global_batch": 1, "sequence_length": 64},
        "data": {"kind": "files", "paths": str(tmp_path / "*.txt"), "documents": "separate", "held_out": 0.4},
    }
    found = []
    for losses in ([{"kind": "balance", "scope": "sequence"}], []):
        model = {**DENSE, "ffn": None, "moe": {**moe, "losses": losses}}
        config = Config.model_validate({**tree, "model": model})
        built = build_model(config.model, seed=0).eval().requires_grad_(False)
        found.append(held_out_loss(built, SimpleNamespace(config=config)))  # type: ignore[arg-type]
    assert found[0] == found[1]
