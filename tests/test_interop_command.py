"""`convert` as a user calls it: import, generate, go on training, export, and what it says when it cannot."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from expert_parallel.checkpoint.files import open_checkpoint
from expert_parallel.cli.app import app
from expert_parallel.data.tokenizer import FileTokenizer, train_tokenizer
from expert_parallel.training.config import load_config
from expert_parallel.training.dead_settings import dead_settings
from tests.launches import ROOT
from tests.test_interop import greedy, load_ours, make_peer

TEXT = "the quick brown fox jumps over the lazy dog and runs away "


def invoke(*arguments: str | float | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: str | float | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A Mixtral with a tokenizer of few words."""
    folder = tmp_path / "theirs"
    make_peer("mixtral").save_pretrained(folder)
    train_tokenizer([TEXT * 20], 259, folder / "tokenizer.json")
    return folder


@torch.no_grad()
def test_import_generate_export(theirs: Path, tmp_path: Path) -> None:
    run, back = tmp_path / "run", tmp_path / "back"
    assert f"\nwrote {run}\nNext" in done("convert", "import", theirs, run)
    said = done("generate", run, "--prompt", TEXT, "--tokens", "5", "--temperature", "0")
    tokenizer = FileTokenizer(run / "tokenizer.json")
    prompt_BS = torch.tensor([tokenizer.encode(TEXT)])
    expected = make_peer("mixtral").generate(prompt_BS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert said.strip() == tokenizer.decode(expected[0].tolist()).strip()

    assert done("convert", "export", run, back) == (
        f"wrote {back} as mixtral, from step 0 of 1,000: the run is not finished\n"
    )
    step_0 = done("convert", "export", run / "checkpoints/step_00000000", tmp_path / "again")
    assert step_0.endswith("as mixtral, from step 0 of 1,000\n"), "a checkpoint need not be the newest"
    assert (back / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back).eval()
    assert torch.equal(loaded.generate(prompt_BS, max_new_tokens=5, do_sample=False, pad_token_id=0), expected)


def test_the_logits_in_python(theirs: Path, tmp_path: Path) -> None:
    """The lines of the README, on an imported model."""
    done("convert", "import", theirs, tmp_path / "run")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "expert_parallel/interop/README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace('"OUT"', repr(str(tmp_path / "run"))), names)
    with torch.no_grad():
        expected_BSV = make_peer("mixtral")(names["ids_BS"]).logits
    torch.testing.assert_close(names["logits_BSV"], expected_BSV, rtol=1e-5, atol=1e-5)


def printed_commands(output: str) -> list[list[str]]:
    """The arguments of the commands that import prints, as a shell would pass them."""
    commands = [shlex.split(line) for line in output.splitlines() if line.startswith("  ")]
    assert {command[0] for command in commands} == {"expert-parallel"}
    return [command[1:] for command in commands]


def test_the_commands_that_import_prints(theirs: Path, tmp_path: Path) -> None:
    """Each does what it is for, in a folder whose name needs quotes, but with less text and fewer steps."""
    run, texts = tmp_path / "it's: a run", tmp_path / "text.txt"
    texts.write_text(TEXT * 40)
    output = done("convert", "import", theirs, run)
    check, generate, prepare, train = printed_commands(output)
    assert not dead_settings(load_config(run / "config.yaml", train[2:])), "as printed, the run outlasts its warm-up"
    assert "active for a token" in done(*check)
    assert done(*generate, "--tokens", "3").startswith("Once upon a time")
    assert "1 documents" in done(*(str(texts) if part.endswith("*.py") else part for part in prepare))
    small = ["training.global_batch=2", "training.sequence_length=16", "evaluation.sequences=4"]
    elsewhere = shlex.split(output.partition("train in another folder: add ")[2])
    trained = done(*train[:-2], *small, "training.steps=2", "checkpoint={every: 1, keep: 1}", *elsewhere)
    assert f"metrics, checkpoints and the resolved config are in {run}-trained" in trained
    assert open_checkpoint(run).step == 0, "the imported weights stay"
    assert open_checkpoint(tmp_path / f"{run.name}-trained").step == 2
    exported = done("convert", "export", f"{run}-trained", tmp_path / "back")
    assert exported == f"wrote {tmp_path / 'back'} as mixtral, from step 2 of 2\n"
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()


def test_import_without_a_tokenizer_says_what_its_commands_need(theirs: Path, tmp_path: Path) -> None:
    (theirs / "tokenizer.json").unlink()
    output = done("convert", "import", theirs, tmp_path / "run")
    assert f"\nThe model came without tokenizer.json, which these commands need: copy it into {tmp_path}/run" in output
    assert "data.tokenizer is not set" in refusal(*printed_commands(output)[1])


def test_training_goes_on_from_an_imported_model(theirs: Path, tmp_path: Path) -> None:
    """Its first loss is the imported model's; what it becomes is exported, and transformers says what it says."""
    run = tmp_path / "run"
    done("convert", "import", theirs, run)
    config = run / "config.yaml"
    assert "data.corpora is empty" in refusal("train", config)
    sizes = ["training.steps=2", "training.global_batch=2", "training.sequence_length=16", "evaluation.sequences=4"]
    assert "model.norm.eps is" in refusal("train", config, "data={kind: stdlib}", *sizes, "model.norm.eps=1e-2")
    yours = ["model.moe.losses=[{kind: balance}]", "model.moe.capacity={kind: factor}", "model.dropout=0.1", *sizes]
    text = done("train", config, "data={kind: stdlib}", *yours)
    assert "(weights only)" in text
    assert [path.name for path in sorted((run / "checkpoints").glob("step_*"))] == ["step_00000000", "step_00000002"]
    first = open_checkpoint(run / "checkpoints/step_00000000")
    assert first.tensors.keys() < open_checkpoint(run).tensors.keys()

    back = tmp_path / "back"
    done("convert", "export", run, back)
    assert not list(back.glob("tokenizer*")), "it was trained on bytes: the tokenizer that it came with is not its own"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager").eval()
    prompt_BS = torch.tensor([list(b"def __init__(")])
    expected = loaded.generate(prompt_BS, max_new_tokens=10, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(greedy(load_ours(run), prompt_BS, 10), expected)
        assert not torch.equal(make_peer("mixtral")(prompt_BS).logits, loaded(prompt_BS).logits)


def test_a_run_of_ours_is_exported(tmp_path: Path) -> None:
    """Nothing was imported: no origin. Capacity and losses are of training, generation has no limits either."""
    run, back = tmp_path / "run", tmp_path / "back"
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run: {{folder: {run}}}\n"
        "model:\n  num_layers: 2\n  d_model: 32\n  init_std: 0.2\n  attention: {num_heads: 2, head_size: 16}\n"
        "  moe:\n    num_experts: 4\n    capacity: {kind: factor, train: 0.5, eval: 0.5}\n"
        "    losses: [{kind: balance, coefficient: 0.01}]\n    experts: {hidden: 24}\n"
        "training: {steps: 3, global_batch: 2, sequence_length: 16}\n"
        "evaluation: {sequences: 4}\n"
    )
    done("train", config)
    assert done("convert", "export", run, back) == (
        "balance_global of model.moe.losses is not in config.json, as mixtral has no such loss (the logits are the "
        f"same)\nwrote {back} as mixtral, from step 3 of 3\n"
    )
    said = done("generate", run, "--prompt", "def main", "--tokens", "8", "--temperature", "0")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back).eval()
    prompt_BS = torch.tensor([list(b"def main")])
    with torch.no_grad():
        theirs = loaded.generate(prompt_BS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert bytes(theirs[0].tolist()).decode(errors="replace").strip() == said.strip()
    assert json.loads((back / "config.json").read_text())["max_position_embeddings"] == 16


def test_upcycled_folder_trains_and_is_exported(tmp_path: Path) -> None:
    make_peer("llama").save_pretrained(tmp_path / "theirs")
    moe, back = tmp_path / "moe", tmp_path / "back"
    text = done("convert", "upcycle", tmp_path / "theirs", moe, "--experts", "4", "--split", "2")
    assert "random tokens: the logits differ by" in text
    sizes = ["training.steps=1", "training.global_batch=2", "training.sequence_length=16", "evaluation.sequences=4"]
    done("train", moe / "config.yaml", "data={kind: stdlib}", *sizes)
    model = load_config(moe / "config.yaml").model
    assert model.moe is not None
    assert model.moe.num_experts == 8
    assert done("convert", "export", moe, back, "--dtype", "bfloat16").endswith(
        f"wrote {back} as mixtral, from step 1 of 1\n"
    )
    assert transformers.AutoModelForCausalLM.from_pretrained(back).config.num_local_experts == 8


def test_refusals_are_one_sentence(theirs: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    assert f"there is no folder {nothing}" in refusal("convert", "import", nothing, "out")
    assert f"{tmp_path} is not a Hugging Face model: it has no config.json" in refusal(
        "convert", "import", tmp_path, "out"
    )
    hub = "mistralai/Mixtral-8x7B-v0.1"
    download = f"{hub}; a model of the hub is downloaded first, with `hf download {hub} --local-dir Mixtral-8x7B-v0.1`"
    for command, kind in (
        ("import", "folder"),
        ("import --config-only", "file"),
        ("upcycle --experts 2", "checkpoint"),
    ):
        assert f"there is no {kind} {download}" in refusal("convert", *command.split(), hub, "out.yaml")
    assert f"there is no checkpoint {nothing}" in refusal("convert", "export", nothing, tmp_path / "out")
    assert f"there is no checkpoint {nothing}" in refusal("convert", "upcycle", nothing, "out", "--experts", "2")
    done("convert", "import", theirs, tmp_path / "run")
    refused = invoke("convert", "import", theirs, tmp_path / "run")
    assert refused.stderr.endswith("exists already\n")
    assert not refused.stdout, "nothing is said of the losses of a run that is not made"
    out = tmp_path / "out"
    assert "--dtype is 'int8', it must be one of float32, bfloat16, float16" in refusal(
        "convert", "export", tmp_path / "run", out, "--dtype", "int8"
    )
    assert "--family is 'gpt2'" in refusal("convert", "export", tmp_path / "run", out, "--family", "gpt2")
    assert "already has experts" in refusal("convert", "upcycle", theirs, out, "--experts", "2")
    assert not out.exists()
