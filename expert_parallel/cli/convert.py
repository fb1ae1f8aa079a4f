"""Defines the commands `expert-parallel convert import | export | upcycle`.

The commands import torch inside their functions, so that `--help` is fast.
"""

import json
import re
import shlex
import sys
import sysconfig
from pathlib import Path
from typing import Annotated

import typer

from expert_parallel.cli.options import ShardGB, exit_on_user_error
from expert_parallel.settings import MAX_SEED

SHORT_RUN = ("training.steps=100", "training.schedule.warmup_steps=10")

convert = typer.Typer(
    no_args_is_help=True,
    help="Import, export and upcycle models (Hugging Face format)."
    "\n\nExample: `expert-parallel convert import path/to/Mixtral-8x7B-v0.1 runs/mixtral`",
)


@convert.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="folder of config.json and safetensors files")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="the run folder to create; with --config-only a .yaml file")
    ],
    config_only: Annotated[
        bool, typer.Option("--config-only", help="read config.json alone (HF_FOLDER may be this file), write a config")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="what weights in fp8 or int4 become: float32, bfloat16 or float64; default: what is exact"),
    ] = None,
    shard_gb: ShardGB = 2.0,
) -> None:
    """Create a run folder from a Hugging Face model.

    Keeps the weights bit for bit, and reads weights in fp8 or int4 exactly. `convert families` lists the families that
    are supported. Fails if a key of config.json or a tensor is not supported. The config of the run can be edited
    before training.

    With --config-only, no weights are read: OUT becomes a config to train such a model from the start.

    Example: `expert-parallel convert import path/to/Mixtral-8x7B-v0.1 runs/mixtral`
    """
    from expert_parallel.interop.config_only import check_arguments, write_config
    from expert_parallel.interop.host_memory import return_freed_memory
    from expert_parallel.interop.importing import import_folder

    return_freed_memory()
    with exit_on_user_error(ValueError, OSError):
        if config_only:
            if dtype is not None:
                raise ValueError(f"--dtype is {dtype!r}, but --config-only reads no weights: remove one of them")
            model = write_config(source, out)
            print(f"wrote {out}: {model.num_params():,} parameters, {model.num_active_params():,} active for a token")
            print(f"Next:\n  {shlex.join(['expert-parallel', 'check', str(out), *check_arguments(out)])}")
            print(
                "To continue from the released weights, import their folder without --config-only, or train with "
                "'checkpoint.start_from={kind: hf, path: FOLDER}'."
            )
            return
        print(f"wrote {import_folder(source, out, int(shard_gb * 1024**3), dtype=dtype)}")
        print("\n".join(next_steps(out)))


def next_steps(run: Path) -> list[str]:
    """Returns commands for an imported run, and what they need. They can be run as they are: the text to train on is
    the top level of Python's standard library, which is on every machine."""
    from expert_parallel.checkpoint.config import CheckpointConfig
    from expert_parallel.data.open import TOKENIZER_FILE

    keep = CheckpointConfig().keep
    corpus, tokenizer = run / "corpus", run / TOKENIZER_FILE
    texts = f"{sysconfig.get_paths()['stdlib']}/*.py"
    check = ["check", str(run)]
    with_tokenizer = [
        ["generate", str(run), "--prompt", "Once upon a time"],
        ["data", "prepare", str(corpus), texts, "--tokenizer", str(tokenizer)],
        ["train", str(run), f"data={{kind: tokens, corpora: [{{path: {yaml_text(corpus)}}}]}}", *SHORT_RUN],
    ]
    trained = run.with_name(f"{run.name}-trained")
    elsewhere = shlex.join([f"run.folder={yaml_text(trained)}", f"checkpoint.start_from={yaml_text(run)}"])
    needed = []
    if not tokenizer.is_file():
        needed = [f"The model came without {TOKENIZER_FILE}, which these commands need: copy it into {run}, then"]
    return [
        "Next, with your own texts in the place of Python's library:",
        f"  {shlex.join(['expert-parallel', *check])}",
        *needed,
        *(f"  {shlex.join(['expert-parallel', *command])}" for command in with_tokenizer),
        f"The imported weights are step 0 in {run / 'checkpoints'}, where training keeps the newest {keep} "
        f"(checkpoint.keep). To keep them, train in another folder: add {elsewhere}",
    ]


def yaml_text(path: Path) -> str:
    """Returns a path as YAML: in JSON's quotes, which are YAML's, if it would otherwise be read as something else."""
    return str(path) if re.fullmatch(r"[\w./-]+", str(path)) else json.dumps(str(path), ensure_ascii=False)


@convert.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder (its newest checkpoint) or a checkpoint")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the Hugging Face folder to create")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, or fp8 as imported; default: unchanged")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="model_type to write, such as mixtral; default: one that computes the same")
    ] = None,
    shard_gb: ShardGB = 4.0,
) -> None:
    """Export a checkpoint as a Hugging Face model, for transformers and inference servers.

    Example: `expert-parallel convert export runs/mixtral exported --dtype bfloat16`
    """
    from expert_parallel.interop.exporting import export_run
    from expert_parallel.interop.host_memory import return_freed_memory

    return_freed_memory()
    with exit_on_user_error(ValueError, OSError):
        made = export_run(run, out, family=family, dtype=dtype, shard_bytes=int(shard_gb * 1024**3))
        print(f"wrote {made.folder} as {made.family}, from {made.step}")


@convert.command("inspect")
def inspect_command(
    source: Annotated[
        Path, typer.Argument(metavar="HF_FOLDER", help="folder of a Hugging Face model, or a config.json")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of text")] = False,
) -> None:
    """Show what a Hugging Face folder is, whether it can be imported, and what it takes to train it.

    Reads config.json, the headers of the files and the tokenizer, but no weights.

    Example: `expert-parallel convert inspect path/to/Mixtral-8x7B-v0.1`
    """
    from expert_parallel.interop import inspecting

    with exit_on_user_error(ValueError, OSError):
        found = inspecting.inspect_folder(source)
        print(json.dumps(inspecting.as_json(found), indent=2) if as_json else inspecting.format_inspection(found))


@convert.command("families")
def families_command() -> None:
    """List the model families that can be imported and exported, and what the others need that is not here.

    Example: `expert-parallel convert families`
    """
    from expert_parallel.interop.families.registry import FAMILIES
    from expert_parallel.interop.unsupported import family_rows

    rows = family_rows(list(FAMILIES))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {state}" for name, state in rows))


@convert.command("upcycle")
def upcycle_command(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="a dense model: a run, checkpoint or Hugging Face folder")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the run folder to create")],
    experts: Annotated[int, typer.Option(min=2, help="copies of each feed-forward network")],
    k: Annotated[int, typer.Option("--k", min=1, help="copies that each token is routed to")] = 2,
    noise: Annotated[
        float,
        typer.Option(min=0, max=1e6, help="Gaussian noise per copy, in standard deviations of each matrix"),
    ] = 0.0,
    split: Annotated[int, typer.Option(min=1, help="split each copy's hidden columns into this many experts")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="seed of the router and the noise")] = 0,
    check: Annotated[bool, typer.Option(help="compare outputs with the dense model; needs memory for both")] = True,
    shard_gb: ShardGB = 2.0,
) -> None:
    """Upcycle a dense model into a mixture of experts, from which training can start.

    Without noise, the mixture computes the same as the dense model.

    Example: `expert-parallel convert upcycle runs/dense runs/mixture --experts 8`
    """
    from expert_parallel.interop.host_memory import return_freed_memory
    from expert_parallel.interop.upcycle import Upcycling, compare, upcycle

    return_freed_memory()
    with exit_on_user_error(ValueError, OSError):
        made = Upcycling(copies=experts, k=k, noise=noise, split=split, seed=seed)
        print(f"wrote {upcycle(source, out, made, int(shard_gb * 1024**3))}")
        sys.stdout.flush()
        if check:
            print(compare(source, out))
