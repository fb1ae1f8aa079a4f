"""Prints the table of interop/README.md: `python -m tests.family_table --write`.

Every sparse family of the installed transformers: a released model's config.json as published, its parameters, and a
small model with its values, imported, compared, exported and compared again; or the part that is missing."""

import json
import sys
import tempfile
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from expert_parallel.interop.exporting import export_run
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.hf_model import read_model_config
from expert_parallel.interop.importing import import_folder
from expert_parallel.interop.unsupported import UNSUPPORTED, missing
from expert_parallel.moe.context import StepContext
from tests.launches import ROOT
from tests.peers import peers_in_float64
from tests.published_models import PUBLISHED, WORDS, count_parameters, generated, oracle, published, shrink
from tests.test_interop import SHARD, greedy, load_ours, same_bits, tensors_of

README = ROOT / "expert_parallel" / "interop" / "README.md"
BEGINS, ENDS = "<!-- generated: python -m tests.family_table --write -->", "<!-- end of families -->"
HEAD = "| model_type | state | parameters | float32 | float64 | files | text |\n|---|---|---|---|---|---|---|"


def difference(config: dict[str, Any], folder: Path, dtype: torch.dtype) -> float:
    """The largest difference of a logit, over the largest logit or 1. Writes `theirs` and `run` into the folder."""
    tokens_BS = torch.randint(0, WORDS, (3, 11), generator=torch.Generator().manual_seed(0))
    with peers_in_float64() if dtype == torch.float64 else nullcontext():
        theirs = oracle(config, dtype)
        expected = theirs(tokens_BS).logits
    theirs.save_pretrained(folder / "theirs")
    (folder / "theirs" / "config.json").write_text(json.dumps(config))
    import_folder(folder / "theirs", folder / "run", SHARD, print_message=lambda text: None)
    actual = load_ours(folder / "run", dtype)(tokens_BS, StepContext()).logits
    return float((actual - expected).abs().max() / max(1.0, float(expected.abs().max())))


def has_same_text(config: dict[str, Any], run: Path) -> bool:
    """Whether both write the same 8 tokens, greedily."""
    prompt_BS = torch.randint(0, WORDS, (3, 3), generator=torch.Generator().manual_seed(0))
    expected = generated(oracle(config), prompt_BS, 8)
    return torch.equal(greedy(load_ours(run), prompt_BS, 8)[:, 3:], expected)


@torch.no_grad()
def row(name: str) -> str:
    """The row of a family that is imported. Fails where a round trip changes a bit."""
    config, small = published(name), shrink(published(name))
    model = read_model_config(FAMILIES[name], {**config, "quantization_config": None})
    agree = model.num_params() == count_parameters(config)
    with tempfile.TemporaryDirectory() as folder:
        single = difference(small, Path(folder), torch.float32)
        there, back = Path(folder, "run"), Path(folder, "back")
        export_run(there, back, family=None, dtype=None, shard_bytes=SHARD, print_message=lambda text: None)
        same_bits(tensors_of(Path(folder, "back")), tensors_of(Path(folder, "theirs")))
        text = has_same_text(small, Path(folder, "run"))
    with tempfile.TemporaryDirectory() as folder:
        double = difference(small, Path(folder), torch.float64)
    state = "imports and equal" if agree and text and single < 1e-5 and double < 1e-9 else "differs"
    count = f"{model.num_params() / 1e9:.2f} B{'' if agree else ', not as many as in transformers'}"
    return f"| `{name}` | {state} | {count} | {single:.0e} | {double:.0e} | bit-equal | {'same' if text else 'other'} |"


def table() -> str:
    """The whole table, after a line that dates it."""
    names = sorted(path.stem for path in PUBLISHED.glob("*.json"))
    refused = [f"| `{name}` | refused: {missing(name)} | | | | | |" for name in sorted(UNSUPPORTED)]
    dated = f"Measured on {date.today()} with transformers {transformers.__version__} and torch {torch.__version__}."
    return "\n".join([dated, "", HEAD, *map(row, names), *refused])


def main() -> None:
    """Prints the table; with --write it replaces the one in the README."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made = table()
    print(made)
    if "--write" in sys.argv[1:]:
        before, rest = README.read_text(encoding="utf-8").split(BEGINS)
        README.write_text(f"{before}{BEGINS}\n\n{made}\n\n{ENDS}{rest.split(ENDS)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
