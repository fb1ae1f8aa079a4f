"""Defines the commands `expert-parallel bench ...`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from expert_parallel.bench.shapes import SHAPES, TRAIN_SHAPES, choose_shape, choose_train_shape
from expert_parallel.cli.bench_options import (
    Changes,
    Device,
    Dtype,
    JsonFile,
    Peers,
    Ranks,
    Rounds,
    Threads,
    Transport,
    run_bench,
)
from expert_parallel.cli.options import exit_on_user_error
from expert_parallel.runtime.process import RuntimeConfig, UserError, distributed

bench = typer.Typer(
    no_args_is_help=True,
    help="Benchmark parts of the system, side by side in one run."
    "\n\nExample: `expert-parallel bench layer --shape base --ranks 2`",
)


@bench.command("layer")
def bench_layer(
    changes: Changes = None,
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}; or `given`, with all sizes named")] = "base",
    scale: Annotated[float, typer.Option(min=1e-6, help="factor on the number of tokens, for slow machines")] = 1.0,
    dtype: Dtype = "float32",
    peers: Peers = None,
    rounds: Rounds = 7,
    ranks: Ranks = None,
    device: Device = "auto",
    transport: Transport = "auto",
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """Time one MoE layer, forward and backward: ours, other installed implementations, and a lower bound.

    Starts its ranks itself, or runs on every rank of a launcher. Exit code 1 if outputs differ that should be equal.

    Example: `expert-parallel bench layer --shape base --ranks 2`
    """
    from expert_parallel.bench.layer import LayerResult, LayerTask, layer_task
    from expert_parallel.bench.peers.registry import PEERS
    from expert_parallel.bench.table import format_layer_result

    def make_task(world: int) -> dict[str, Any]:
        names = _parse_peer_names(peers, PEERS)
        chosen = choose_shape(shape, changes or [], scale)
        if chosen.num_experts < world:
            raise ValueError(f"{world} ranks are more than the {chosen.num_experts} experts of --shape {shape}")
        task = LayerTask(shape=chosen, dtype=dtype, rounds=rounds, threads=threads, peers=names)
        return task.model_dump(mode="json")

    result = run_bench(layer_task, make_task, ranks, RuntimeConfig(device=device, backend=transport), json_file)
    if result is not None:
        print(format_layer_result(LayerResult.model_validate(result, strict=False)))


@bench.command("train")
def bench_train(
    changes: Changes = None,
    shape: Annotated[str, typer.Option(help=", ".join(TRAIN_SHAPES))] = "base",
    scale: Annotated[float, typer.Option(min=1e-6, help="factor on the number of tokens, for slow machines")] = 1.0,
    dtype: Dtype = "float32",
    peers: Peers = None,
    rounds: Rounds = 7,
    ranks: Ranks = None,
    device: Device = "auto",
    transport: Transport = "auto",
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """Time a training step of a decoder with MoE in all blocks: ours, and other implementations' layers.

    Starts its ranks itself, or runs on every rank of a launcher.

    Example: `expert-parallel bench train --scale 0.1`
    """
    from expert_parallel.bench.peers.registry import TRAIN_PEERS
    from expert_parallel.bench.table import format_train_result
    from expert_parallel.bench.train import TrainResult, TrainTask, train_task

    def make_task(world: int) -> dict[str, Any]:
        chosen = choose_train_shape(shape, changes or [], scale)
        if (most := min(chosen.layer.num_experts, chosen.sequences)) < world:
            raise ValueError(f"{world} ranks are more than --shape {shape} has experts and sequences for: {most}")
        names = _parse_peer_names(peers, TRAIN_PEERS)
        task = TrainTask(shape=chosen, dtype=dtype, rounds=rounds, threads=threads, peers=names)
        return task.model_dump(mode="json")

    result = run_bench(train_task, make_task, ranks, RuntimeConfig(device=device, backend=transport), json_file)
    if result is not None:
        print(format_train_result(TrainResult.model_validate(result, strict=False)))


@bench.command("equal-capacity")
def bench_equal_capacity(
    changes: Changes = None,
    hidden: Annotated[
        list[int] | None, typer.Option(min=1, help="hidden size of the dense layer; repeatable; default: 1024 to 16384")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 (default) or bfloat16; repeatable")] = None,
    rounds: Rounds = 7,
    device: Device = "auto",
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """Time a dense layer against experts that split its hidden columns.

    They have the same parameters and k / num_experts of the FLOPs. Reports the speedup, and where the remaining time
    goes. Runs on one rank.

    Example: `expert-parallel bench equal-capacity --hidden 1024 --hidden 2048`
    """
    from expert_parallel.bench.equal_capacity import (
        HIDDEN,
        EqualCapacityResult,
        EqualCapacityTask,
        choose_dtypes,
        choose_shapes,
        equal_capacity_task,
        format_equal_capacity_result,
    )

    def make_task(world: int) -> dict[str, Any]:
        if world > 1:
            raise ValueError(f"bench equal-capacity measures on 1 rank, the launcher has started {world}")
        shapes, dtypes = choose_shapes(hidden or HIDDEN, changes or []), choose_dtypes(dtype or ["float32"])
        task = EqualCapacityTask(shapes=shapes, dtypes=dtypes, rounds=rounds, threads=threads)
        return task.model_dump(mode="json")

    result = run_bench(equal_capacity_task, make_task, None, RuntimeConfig(device=device), json_file)
    if result is not None:
        print(format_equal_capacity_result(EqualCapacityResult.model_validate(result, strict=False)))


@bench.command("machine")
def bench_machine(
    rounds: Rounds = 7,
    ranks: Ranks = None,
    device: Device = "auto",
    transport: Transport = "auto",
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """Measure this machine's limits: rates of matmuls and copies, and the cost of an all-to-all per transport.

    Example: `expert-parallel bench machine --ranks 2`
    """
    from expert_parallel.bench.machine import MachineProfile, MachineTask, format_machine_profile, machine_task

    def make_task(world: int) -> dict[str, Any]:
        return MachineTask(rounds=rounds, threads=threads).model_dump(mode="json")

    result = run_bench(machine_task, make_task, ranks, RuntimeConfig(device=device, backend=transport), json_file)
    if result is not None:
        print(format_machine_profile(MachineProfile.model_validate(result)))


@bench.command("ledger")
def bench_ledger(
    shape: Annotated[str, typer.Option(help="size of the layer: base, fine or wide")] = "base",
    rounds: Annotated[int, typer.Option(min=1, help="measurements of each; medians are reported")] = 15,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the results to this JSON file")] = None,
) -> None:
    """Time the ledger (the check that every token is accounted for) on one MoE layer.

    Runs on this process alone, or on every rank under torchrun.

    Example: `expert-parallel bench ledger --shape fine`
    """
    from expert_parallel.bench import ledger

    with exit_on_user_error(OSError), distributed(RuntimeConfig()) as runtime:
        if shape not in ledger.SHAPES:
            raise UserError(f"--shape is {shape!r}, it must be one of {', '.join(ledger.SHAPES)}")
        if runtime.world_size > ledger.SHAPES[shape].num_experts:
            experts = ledger.SHAPES[shape].num_experts
            raise UserError(f"{runtime.world_size} ranks are more than the {experts} experts of --shape {shape}")
        if json_file is not None and not json_file.parent.is_dir():
            raise UserError(f"--json: there is no folder {json_file.parent}")
        result = ledger.bench_ledger(runtime, shape, rounds)
        if runtime.rank == 0:
            print(ledger.format_result(result))
            if json_file is not None:
                json_file.write_text(json.dumps(result, indent=2) + "\n")


@bench.command("exchange")
def bench_exchange(
    rounds: Annotated[int, typer.Option(min=1, help="measurements of each; medians are reported")] = 15,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the results to this JSON file")] = None,
) -> None:
    """Compare gloo with MPI: all-to-alls of several sizes, and whole MoE layers.

    Runs on every rank under mpirun; under torchrun it measures only gloo.

    Example: `mpirun -n 2 expert-parallel bench exchange`
    """
    from expert_parallel.bench import exchange

    with exit_on_user_error(OSError), distributed(RuntimeConfig(device="cpu")) as runtime:
        if runtime.world_size == 1:
            raise UserError("a single rank has no other rank to exchange with: start 2 or more with mpirun or torchrun")
        if json_file is not None and not json_file.parent.is_dir():
            raise UserError(f"--json: there is no folder {json_file.parent}")
        result = exchange.bench_exchange(runtime, rounds)
        if runtime.rank == 0:
            print(exchange.format_result(result))
            if json_file is not None:
                json_file.write_text(json.dumps(result, indent=2) + "\n")


@bench.command("checkpoint")
def bench_checkpoint(
    megabytes: Annotated[int, typer.Option(min=1, help="size of weights and optimizer state, over all ranks")] = 400,
    rounds: Annotated[int, typer.Option(min=1, help="measurements of each; medians are reported")] = 5,
    folder: Annotated[Path, typer.Option(help="folder on the disk to measure; files are removed afterwards")] = Path(),
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the results to this JSON file")] = None,
) -> None:
    """Measure how long training waits for a checkpoint, saved in the background or not.

    Runs on this process alone, or on every rank under torchrun.

    Example: `expert-parallel bench checkpoint --megabytes 100`
    """
    from expert_parallel.bench import checkpoint as bench

    with exit_on_user_error(OSError), distributed(RuntimeConfig()) as runtime:
        for path in (folder, json_file.parent if json_file is not None else folder):
            if not path.is_dir():
                raise UserError(f"there is no folder {path}")
        result = bench.bench_checkpoint(runtime, megabytes, rounds, folder)
        if runtime.rank == 0:
            print(bench.format_result(result))
            if json_file is not None:
                json_file.write_text(json.dumps(result, indent=2) + "\n")


@bench.command("overlap")
def bench_overlap(
    changes: Changes = None,
    shape: Annotated[str, typer.Option(help="as in `bench layer`")] = "base",
    dispatcher: Annotated[
        Literal["all_to_all", "hierarchical"], typer.Option(help="dispatcher to measure")
    ] = "all_to_all",
    overlap: Annotated[int, typer.Option(min=2, help="number of chunks to pipeline")] = 4,
    rounds: Rounds = 7,
    ranks: Ranks = None,
    device: Device = "auto",
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """Measure how much of the all-to-all overlaps with expert computation, on this machine's network.

    Example: `expert-parallel bench overlap --ranks 2 --overlap 4`
    """
    from expert_parallel.bench.overlap import OverlapResult, OverlapTask, format_overlap_result, overlap_task

    def make_task(world: int) -> dict[str, Any]:
        chosen = choose_shape(shape, changes or [])
        task = OverlapTask(shape=chosen, dispatcher=dispatcher, overlap=overlap, rounds=rounds, threads=threads)
        return task.model_dump(mode="json")

    result = run_bench(overlap_task, make_task, ranks, RuntimeConfig(device=device), json_file)
    if result is not None:
        print(format_overlap_result(OverlapResult.model_validate(result, strict=False)))


@bench.command("nodes")
def bench_nodes(
    ranks_per_node: Annotated[int, typer.Option(min=1, help="number of ranks that count as one node")],
    changes: Changes = None,
    shape: Annotated[str, typer.Option(help="as in `bench layer`")] = "fine-grained",
    rounds: Rounds = 7,
    ranks: Ranks = None,
    device: Device = "auto",
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """Compare the hierarchical dispatcher with the flat one: time, and bytes between nodes.

    Example: `expert-parallel bench nodes --ranks 4 --ranks-per-node 2`
    """
    from expert_parallel.bench.overlap import NodesResult, NodesTask, format_nodes_result, nodes_task

    def make_task(world: int) -> dict[str, Any]:
        chosen = choose_shape(shape, changes or [])
        task = NodesTask(shape=chosen, ranks_per_node=ranks_per_node, rounds=rounds, threads=threads)
        return task.model_dump(mode="json")

    result = run_bench(nodes_task, make_task, ranks, RuntimeConfig(device=device), json_file)
    if result is not None:
        print(format_nodes_result(NodesResult.model_validate(result, strict=False)))


@bench.command("scaling")
def bench_scaling(
    changes: Changes = None,
    shape: Annotated[str, typer.Option(help="as in `bench layer`")] = "base",
    rounds: Rounds = 5,
    ranks: Annotated[int, typer.Option(min=2, help="size of the largest group of ranks")] = 8,
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """Measure how the cost grows with the number of ranks (1, 2, 4, ...) and of experts.

    Starts its ranks itself.

    Example: `expert-parallel bench scaling --ranks 4`
    """
    from expert_parallel.bench.scaling import ScalingResult, ScalingTask, format_scaling_result, scaling_task

    def make_task(world: int) -> dict[str, Any]:
        chosen, counts = choose_shape(shape, changes or []), [1]
        while counts[-1] * 2 <= ranks:
            counts.append(counts[-1] * 2)
        task = ScalingTask(shape=chosen, ranks=tuple(counts), rounds=rounds, threads=threads)
        return task.model_dump(mode="json")

    result = run_bench(scaling_task, make_task, ranks, RuntimeConfig(device="cpu"), json_file)
    if result is not None:
        print(format_scaling_result(ScalingResult.model_validate(result, strict=False)))


def _parse_peer_names(peers: str | None, known: Mapping[str, object]) -> tuple[str, ...] | None:
    """Splits --peers into names. Raises ValueError for an unknown one."""
    names = None if peers is None else tuple(name.strip() for name in peers.split(","))
    for name in names or ():
        if name not in known:
            raise ValueError(f"--peers: {name!r} is not one of {', '.join(known)}")
    return names
