"""The commands `expert-parallel bench ...`."""

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
from expert_parallel.cli.options import refusals
from expert_parallel.runtime.process import RuntimeConfig, UserError, distributed

bench = typer.Typer(no_args_is_help=True, help="Measure: ratios of things timed side by side in one run.")


@bench.command("layer")
def bench_layer(
    changes: Changes = None,
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}; or given, with all of its sizes named")] = "base",
    scale: Annotated[float, typer.Option(min=1e-6, help="multiplies the tokens, for a machine that is slow")] = 1.0,
    dtype: Dtype = "float32",
    peers: Peers = None,
    rounds: Rounds = 7,
    ranks: Ranks = None,
    device: Device = "auto",
    transport: Transport = "auto",
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """One MoE layer, forward and backward: ours, the peers that are installed, and the floor. Starts its ranks itself,
    or runs on every rank of a launcher. Exit code 1 where outputs disagree that should be the same."""
    from expert_parallel.bench.layer import LayerResult, LayerTask, layer_task
    from expert_parallel.bench.peers.peers import PEERS
    from expert_parallel.bench.table import describe_layer

    def plan(world: int) -> dict[str, Any]:
        names = _peer_names(peers, PEERS)
        chosen = choose_shape(shape, changes or [], scale)
        if chosen.num_experts < world:
            raise ValueError(f"{world} ranks are more than the {chosen.num_experts} experts of --shape {shape}")
        task = LayerTask(shape=chosen, dtype=dtype, rounds=rounds, threads=threads, peers=names)
        return task.model_dump(mode="json")

    result = run_bench(layer_task, plan, ranks, RuntimeConfig(device=device, backend=transport), json_file)
    if result is not None:
        print(describe_layer(LayerResult.model_validate(result, strict=False)))


@bench.command("train")
def bench_train(
    changes: Changes = None,
    shape: Annotated[str, typer.Option(help=", ".join(TRAIN_SHAPES))] = "base",
    scale: Annotated[float, typer.Option(min=1e-6, help="multiplies the tokens, for a machine that is slow")] = 1.0,
    dtype: Dtype = "float32",
    peers: Peers = None,
    rounds: Rounds = 7,
    ranks: Ranks = None,
    device: Device = "auto",
    transport: Transport = "auto",
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """A training step of a decoder, all blocks MoE: ours, and the peers' layers in a plain one. Starts its ranks
    itself, or runs on every rank of a launcher."""
    from expert_parallel.bench.peers.peers import TRAINEES
    from expert_parallel.bench.table import describe_train
    from expert_parallel.bench.train import TrainResult, TrainTask, train_task

    def plan(world: int) -> dict[str, Any]:
        chosen = choose_train_shape(shape, changes or [], scale)
        if (most := min(chosen.layer.num_experts, chosen.sequences)) < world:
            raise ValueError(f"{world} ranks are more than --shape {shape} has experts and sequences for: {most}")
        names = _peer_names(peers, TRAINEES)
        task = TrainTask(shape=chosen, dtype=dtype, rounds=rounds, threads=threads, peers=names)
        return task.model_dump(mode="json")

    result = run_bench(train_task, plan, ranks, RuntimeConfig(device=device, backend=transport), json_file)
    if result is not None:
        print(describe_train(TrainResult.model_validate(result, strict=False)))


@bench.command("equal-capacity")
def bench_equal_capacity(
    changes: Changes = None,
    hidden: Annotated[
        list[int] | None, typer.Option(min=1, help="of the dense layer; several can be given; default: 1024 to 16384")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 (default), bfloat16; several can be given")] = None,
    rounds: Rounds = 7,
    device: Device = "auto",
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """A dense layer beside experts that divide its hidden columns: the same parameters, k / num_experts of the work.
    How much faster they are, and where the rest of the time goes. On one rank."""
    from expert_parallel.bench.equal_capacity import (
        HIDDEN,
        EqualCapacityResult,
        EqualCapacityTask,
        choose_dtypes,
        choose_shapes,
        describe_equal_capacity,
        equal_capacity_task,
    )

    def plan(world: int) -> dict[str, Any]:
        if world > 1:
            raise ValueError(f"bench equal-capacity measures on 1 rank, the launcher has started {world}")
        shapes, dtypes = choose_shapes(hidden or HIDDEN, changes or []), choose_dtypes(dtype or ["float32"])
        task = EqualCapacityTask(shapes=shapes, dtypes=dtypes, rounds=rounds, threads=threads)
        return task.model_dump(mode="json")

    result = run_bench(equal_capacity_task, plan, None, RuntimeConfig(device=device), json_file)
    if result is not None:
        print(describe_equal_capacity(EqualCapacityResult.model_validate(result, strict=False)))


@bench.command("machine")
def bench_machine(
    rounds: Rounds = 7,
    ranks: Ranks = None,
    device: Device = "auto",
    transport: Transport = "auto",
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """What this machine can do at most: rates of products and copies, and what an all-to-all costs over each transport.
    Planning reads the file of --json."""
    from expert_parallel.bench.machine import MachineFile, MachineTask, describe_machine, machine_task

    def plan(world: int) -> dict[str, Any]:
        return MachineTask(rounds=rounds, threads=threads).model_dump(mode="json")

    result = run_bench(machine_task, plan, ranks, RuntimeConfig(device=device, backend=transport), json_file)
    if result is not None:
        print(describe_machine(MachineFile.model_validate(result)))


@bench.command("ledger")
def bench_ledger(
    shape: Annotated[str, typer.Option(help="base or fine")] = "base",
    rounds: Annotated[int, typer.Option(min=1, help="of which medians are taken")] = 15,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here, too")] = None,
) -> None:
    """What the ledger costs, on one MoE layer. Alone, or on every rank under torchrun."""
    from expert_parallel.bench import ledger

    with refusals(OSError), distributed(RuntimeConfig()) as runtime:
        if shape not in ledger.SHAPES:
            raise UserError(f"--shape is {shape!r}, it must be one of {', '.join(ledger.SHAPES)}")
        if runtime.world_size > ledger.SHAPES[shape].num_experts:
            experts = ledger.SHAPES[shape].num_experts
            raise UserError(f"{runtime.world_size} ranks are more than the {experts} experts of --shape {shape}")
        if json_file is not None and not json_file.parent.is_dir():
            raise UserError(f"--json: there is no folder {json_file.parent}")
        result = ledger.bench_ledger(runtime, shape, rounds)
        if runtime.rank == 0:
            print(ledger.describe(result))
            if json_file is not None:
                json_file.write_text(json.dumps(result, indent=2) + "\n")


@bench.command("exchange")
def bench_exchange(
    rounds: Annotated[int, typer.Option(min=1, help="of which medians are taken")] = 15,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here, too")] = None,
) -> None:
    """What carries the exchange of rows, gloo beside MPI: all-to-alls of several sizes, and whole MoE layers. On every
    rank under mpirun; under torchrun gloo alone."""
    from expert_parallel.bench import exchange

    with refusals(OSError), distributed(RuntimeConfig(device="cpu")) as runtime:
        if runtime.world_size == 1:
            raise UserError("one rank has nobody to exchange with: start 2 or more with mpirun, or with torchrun")
        if json_file is not None and not json_file.parent.is_dir():
            raise UserError(f"--json: there is no folder {json_file.parent}")
        result = exchange.bench_exchange(runtime, rounds)
        if runtime.rank == 0:
            print(exchange.describe(result))
            if json_file is not None:
                json_file.write_text(json.dumps(result, indent=2) + "\n")


@bench.command("checkpoint")
def bench_checkpoint(
    megabytes: Annotated[int, typer.Option(min=1, help="of weights and optimizer state, over all ranks")] = 400,
    rounds: Annotated[int, typer.Option(min=1, help="of which medians are taken")] = 5,
    folder: Annotated[Path, typer.Option(help="on the disk to measure; what is written is removed")] = Path(),
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here, too")] = None,
) -> None:
    """How long training waits for a checkpoint, saved in the background or not. Alone, or on every rank under
    torchrun."""
    from expert_parallel.bench import checkpoint as bench

    with refusals(OSError), distributed(RuntimeConfig()) as runtime:
        for path in (folder, json_file.parent if json_file is not None else folder):
            if not path.is_dir():
                raise UserError(f"there is no folder {path}")
        result = bench.bench_checkpoint(runtime, megabytes, rounds, folder)
        if runtime.rank == 0:
            print(bench.describe(result))
            if json_file is not None:
                json_file.write_text(json.dumps(result, indent=2) + "\n")


@bench.command("overlap")
def bench_overlap(
    changes: Changes = None,
    shape: Annotated[str, typer.Option(help="as for `bench layer`")] = "base",
    dispatcher: Annotated[Literal["all_to_all", "hierarchical"], typer.Option()] = "all_to_all",
    overlap: Annotated[int, typer.Option(min=2, help="chunks in which the tokens travel")] = 4,
    rounds: Rounds = 7,
    ranks: Ranks = None,
    device: Device = "auto",
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """How much of the exchange between the ranks lies beneath the experts, over the link that there is."""
    from expert_parallel.bench.overlap import OverlapResult, OverlapTask, describe_overlap, overlap_task

    def plan(world: int) -> dict[str, Any]:
        chosen = choose_shape(shape, changes or [])
        task = OverlapTask(shape=chosen, dispatcher=dispatcher, overlap=overlap, rounds=rounds, threads=threads)
        return task.model_dump(mode="json")

    result = run_bench(overlap_task, plan, ranks, RuntimeConfig(device=device), json_file)
    if result is not None:
        print(describe_overlap(OverlapResult.model_validate(result, strict=False)))


@bench.command("nodes")
def bench_nodes(
    ranks_per_node: Annotated[int, typer.Option(min=1)],
    changes: Changes = None,
    shape: Annotated[str, typer.Option(help="as for `bench layer`")] = "fine-grained",
    rounds: Rounds = 7,
    ranks: Ranks = None,
    device: Device = "auto",
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """The hierarchical dispatcher beside the flat one: time, and bytes between nodes."""
    from expert_parallel.bench.overlap import NodesResult, NodesTask, describe_nodes, nodes_task

    def plan(world: int) -> dict[str, Any]:
        chosen = choose_shape(shape, changes or [])
        task = NodesTask(shape=chosen, ranks_per_node=ranks_per_node, rounds=rounds, threads=threads)
        return task.model_dump(mode="json")

    result = run_bench(nodes_task, plan, ranks, RuntimeConfig(device=device), json_file)
    if result is not None:
        print(describe_nodes(NodesResult.model_validate(result, strict=False)))


@bench.command("scaling")
def bench_scaling(
    changes: Changes = None,
    shape: Annotated[str, typer.Option(help="as for `bench layer`")] = "base",
    rounds: Rounds = 5,
    ranks: Annotated[int, typer.Option(min=2, help="of the largest group")] = 8,
    threads: Threads = 1,
    json_file: JsonFile = None,
) -> None:
    """How cost grows with ranks, from 1 on doubled, and with the number of experts. Starts its ranks itself."""
    from expert_parallel.bench.scaling import ScalingResult, ScalingTask, describe_scaling, scaling_task

    def plan(world: int) -> dict[str, Any]:
        chosen, counts = choose_shape(shape, changes or []), [1]
        while counts[-1] * 2 <= ranks:
            counts.append(counts[-1] * 2)
        task = ScalingTask(shape=chosen, ranks=tuple(counts), rounds=rounds, threads=threads)
        return task.model_dump(mode="json")

    result = run_bench(scaling_task, plan, ranks, RuntimeConfig(device="cpu"), json_file)
    if result is not None:
        print(describe_scaling(ScalingResult.model_validate(result, strict=False)))


def _peer_names(peers: str | None, known: Mapping[str, object]) -> tuple[str, ...] | None:
    names = None if peers is None else tuple(name.strip() for name in peers.split(","))
    for name in names or ():
        if name not in known:
            raise ValueError(f"--peers: {name!r} is none of {', '.join(known)}")
    return names
