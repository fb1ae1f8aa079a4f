"""`expert-parallel convert import | export | upcycle`. torch is imported inside, so that `--help` is quick."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from expert_parallel.cli.options import refusals

convert = typer.Typer(no_args_is_help=True, help="Hugging Face models in and out; dense models into experts.")

ShardGB = Annotated[float, typer.Option("--shard-gb", min=0.001, help="size of a file; no more than one is in memory")]


@convert.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="config.json and safetensors files")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the run folder to make")],
    shard_gb: ShardGB = 2.0,
) -> None:
    """Make a run of a Hugging Face folder: the same weights, bit by bit, and a config to edit.

    Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3, gpt-oss, Llama, Qwen2, Qwen3. Refused: a key of config.json or a tensor that
    has no place here.
    """
    from expert_parallel.interop.importing import import_folder

    with refusals(ValueError, OSError):
        print(f"wrote {import_folder(source, out, int(shard_gb * 1024**3))}")


@convert.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run (its newest checkpoint) or a checkpoint")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the Hugging Face folder to make")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as they are")] = None,
    family: Annotated[str | None, typer.Option(help="default: the one that computes what the model does")] = None,
    shard_gb: ShardGB = 4.0,
) -> None:
    """Make a Hugging Face folder of a checkpoint, which transformers and servers load."""
    from expert_parallel.interop.exporting import export_run

    with refusals(ValueError, OSError):
        name, folder = export_run(run, out, family=family, dtype=dtype, shard_bytes=int(shard_gb * 1024**3))
        print(f"wrote {folder} as {name}")


@convert.command("upcycle")
def upcycle_command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a dense model: a run, a checkpoint, a HF folder")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the run folder to make")],
    experts: Annotated[int, typer.Option(min=2, help="copies of each dense network")],
    k: Annotated[int, typer.Option("--k", min=1, help="copies that each token takes")] = 2,
    noise: Annotated[float, typer.Option(min=0, help="added to each copy, in standard deviations of a matrix")] = 0.0,
    split: Annotated[int, typer.Option(min=1, help="cut each copy's hidden columns into so many experts")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of the router and the noise")] = 0,
    check: Annotated[bool, typer.Option(help="compare with the dense model: needs memory for both")] = True,
    shard_gb: ShardGB = 2.0,
) -> None:
    """Turn a dense model into a mixture of experts: without noise it computes the same at first, then train it."""
    from expert_parallel.interop.upcycle import Upcycling, compare, upcycle

    with refusals(ValueError, OSError):
        made = Upcycling(copies=experts, k=k, noise=noise, split=split, seed=seed)
        print(f"wrote {upcycle(source, out, made, int(shard_gb * 1024**3))}")
        sys.stdout.flush()
        if check:
            print(compare(source, out))
