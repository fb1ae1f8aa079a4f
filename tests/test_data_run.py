"""Token files in a whole run: through the command line's parts, on real ranks, stopped and resumed on others."""

import contextlib
import io
import json
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from expert_parallel.cli.app import app
from expert_parallel.data.batch import MicroBatch
from expert_parallel.data.prepare import prepare
from expert_parallel.runtime.process import Launch, Runtime, UserError
from expert_parallel.training.config import Config
from expert_parallel.training.loop import train
from expert_parallel.training.run import TrainingRun
from tests.ranks import run_ranks

LENGTH = 8


def prepared(folder: Path, name: str, count: int, first: str) -> str:
    """Documents of 8 bytes with their end: `count` of them, all different."""
    texts = [f"{first}{number:06}" for number in range(count)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = [str(folder / f"{name}.jsonl")]
    prepare(str(folder / name), files, print_message=lambda text: None, report=lambda progress: None)
    return str(folder / name)


def run_tree(folder: Path, steps: int, **data: Any) -> dict[str, Any]:
    return {
        "run": {"folder": str(folder / "run"), "log_every": 1},
        "model": {
            "vocab_size": 256,
            "num_layers": 1,
            "d_model": 8,
            "attention": {"num_heads": 2, "head_size": 4},
            "moe": {"num_experts": 2, "router": {"k": 2}, "experts": {"hidden": 4}},
        },
        "training": {"steps": steps, "global_batch": 8, "micro_steps": 2, "sequence_length": LENGTH},
        "evaluation": {"every": 100, "sequences": 5},
        "checkpoint": {"every": 100},
        "data": {"kind": "tokens", **data},
        "runtime": {"device": "cpu"},
    }


def recorded_run(rank: int, world: int, tree: dict[str, Any]) -> tuple[list[tuple[int, list[int], Any]], str, str]:
    """(step, tokens, documents) of every sequence that this rank trains on, what stopped the run, what it said."""
    runtime = Runtime(Launch("test", rank, world, rank, world), torch.device("cpu"), "gloo", timedelta(seconds=60))
    seen: list[tuple[int, list[int], Any]] = []
    read = TrainingRun.batches

    def recorded(run: TrainingRun, step: int) -> list[MicroBatch]:
        batches = read(run, step)
        for batch in batches:
            rows = torch.cat([batch.inputs_BS, batch.targets_BS[:, -1:]], dim=1).tolist()
            documents = [None] * len(rows) if batch.documents_BS is None else batch.documents_BS.tolist()
            seen.extend((step, row, document) for row, document in zip(rows, documents, strict=True))
        return batches

    TrainingRun.batches = recorded  # type: ignore[method-assign]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            train(Config.model_validate(tree), runtime)
    except UserError as error:
        return seen, str(error), said.getvalue()
    finally:
        TrainingRun.batches = read  # type: ignore[method-assign]
    return seen, "", said.getvalue()


def run_on(world: int, tree: dict[str, Any]) -> tuple[list[tuple[int, list[int], Any]], set[str], str]:
    results = run_ranks(world, recorded_run, world, tree)
    return sorted(seen for found, _, _ in results for seen in found), {error for _, error, _ in results}, results[0][2]


def test_a_run_resumed_on_other_ranks_sees_each_sample_once(tmp_path: Path) -> None:
    """2 data ranks, then 3, which do not divide a micro-step's 4 sequences, then 1; two epochs of both corpora."""
    big, small = prepared(tmp_path, "big", 27, "a"), prepared(tmp_path, "small", 11, "b")
    corpora = [{"path": big, "weight": 3.0}, {"path": small, "weight": 1.0}]
    data = {"corpora": corpora, "documents": "separate", "held_out": 0.1}
    seen = []
    for world, steps in ((2, 3), (3, 5), (1, 8)):
        found, errors, _ = run_on(world, run_tree(tmp_path, steps, **data))
        assert errors == {""}
        seen += found
    assert Counter(step for step, _, _ in seen) == dict.fromkeys(range(8), 8)
    counts = Counter(tuple(row) for _, row, _ in seen)
    # 24 documents of 8 bytes and 1 that ends the last window make 23 windows; of the small corpus 9 documents, 8.
    rows = {first: [row for row in counts if row[0] == ord(first)] for first in "ab"}
    assert (len(rows["a"]), len(rows["b"])) == (23, 8)
    assert all(counts[row] == 2 for row in rows["b"]), "16 samples of 8 windows: each twice"
    assert Counter(counts[row] for row in rows["a"]) == {2: 21, 3: 2}, "48 samples of 23 windows"
    assert all(documents == [0] * LENGTH for _, _, documents in seen), "windows and documents fall together here"
    manifest = json.loads(next((tmp_path / "run" / "checkpoints").glob("step_*8/manifest.json")).read_text())
    assert len(manifest["config"]["data"]["sha256"]) == 64


def test_documents_and_changed_data_in_a_run(tmp_path: Path) -> None:
    one, two = prepared(tmp_path, "one", 50, "abc"), prepared(tmp_path, "two", 60, "abc")
    tree = run_tree(tmp_path, 1, corpora=[{"path": one}], documents="separate")
    seen, errors, _ = run_on(1, tree)
    assert errors == {""}
    for _, row, documents in seen:
        ends = [int(token == 0) for token in row[:-1]]
        assert documents == [sum(ends[:place]) for place in range(LENGTH)]
    assert any(documents[-1] == 1 for _, _, documents in seen)
    found, errors, said = run_on(1, run_tree(tmp_path, 2, corpora=[{"path": two}], documents="separate"))
    assert errors == {""}
    assert len(found) == 8
    changed = said.partition("; changed: ")[2].partition("\n")[0]
    for change in ("training.steps 1 -> 2", "data.corpora [", "data.sha256 '"):
        assert change in changed
    pinned = json.loads((tmp_path / "one.json").read_text())["sha256"]
    _, errors, _ = run_on(2, run_tree(tmp_path, 3, corpora=[{"path": two}], sha256=pinned))
    assert len(errors) == 1
    assert errors.pop().startswith(f"data.sha256 is {pinned} but the data has ")


def test_a_token_found_wrong_in_the_middle_ends_all_ranks_together(tmp_path: Path) -> None:
    prefix = prepared(tmp_path, "one", 50, "1")
    Path(prefix + ".json").unlink()
    content = bytearray(Path(prefix + ".bin").read_bytes())
    content[100] = 200
    Path(prefix + ".bin").write_bytes(content)
    tree = run_tree(tmp_path, 20, corpora=[{"path": prefix}])
    tree["model"]["vocab_size"] = 97  # enough for digits
    seen, errors, _ = run_on(2, tree)
    assert errors == {f"data.corpora[0].path: {prefix}.bin holds 200 as token 100, model.vocab_size is 97"}
    assert len(seen) == 32, "after four steps"


def test_a_sample_without_a_tokenizer_is_refused_before_training(tmp_path: Path) -> None:
    prefix = prepared(tmp_path, "one", 50, "1")
    Path(prefix + ".json").unlink()
    tree = run_tree(tmp_path, 20, corpora=[{"path": prefix}])
    tree["run"]["sample"] = {"prompt": "1"}
    seen, errors, _ = run_on(2, tree)
    assert (len(seen), len(errors)) == (0, 1)
    assert "data.tokenizer is not set" in errors.pop()


def test_check_opens_token_files(tmp_path: Path) -> None:
    prefix = prepared(tmp_path, "one", 50, "a")
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(run_tree(tmp_path, 10, corpora=[{"path": prefix}])))
    result = CliRunner().invoke(app, ["check", str(config)])
    assert result.exit_code == 0, result.output
    assert f"data {prefix}: 50 documents, 376 tokens for training, 24 held out" in " ".join(result.stdout.split())
    result = CliRunner().invoke(app, ["check", str(config), "model.vocab_size=99"])
    assert result.exit_code == 2
    assert "one has a vocabulary of 256 tokens, model.vocab_size is 99" in result.stderr
