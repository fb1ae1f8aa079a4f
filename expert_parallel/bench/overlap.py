"""Measures the all-to-all over a real network: how much of it overlaps with the experts' computation when tokens are
exchanged in chunks, and how many bytes cross between nodes with the hierarchical dispatcher and the flat one. Run on
every rank of a launcher:

    torchrun --nnodes 2 --nproc-per-node 1 ... -m expert_parallel bench overlap
    torchrun --nnodes 2 --nproc-per-node 2 ... -m expert_parallel bench nodes --ranks-per-node 2

To try it with a slow link: `tc qdisc add dev eth0 root tbf rate 400mbit burst 256kb latency 400ms` on each node."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, Field
from torch import Tensor

from expert_parallel.bench.shapes import LayerShape
from expert_parallel.bench.timing import Environment, Times, Workload, measure, set_up_environment
from expert_parallel.moe.config import MoEConfig
from expert_parallel.moe.context import StepContext, token_batch
from expert_parallel.moe.dispatch.ledger import Ledger
from expert_parallel.moe.layer import MoELayer
from expert_parallel.moe.types import DispatchedTokens
from expert_parallel.parallel.collectives import Phase, all_reduce_sum, sum_traffic
from expert_parallel.parallel.mesh import NodeGroups, ParallelDegrees, build_node_groups, group_builder
from expert_parallel.runtime.process import Runtime, UserError
from expert_parallel.settings import Settings

ProgressFn = Callable[[str], None]
FLAT = {"choice": {"kind": "all_to_all", "one_row_per": "choice"}, "rank": {"kind": "all_to_all"}}
HIERARCHICAL = {"kind": "hierarchical"}


class OverlapTask(Settings):
    """Times a layer that exchanges its tokens in `overlap` chunks against the same layer with one chunk. threads: CPU
    threads of each rank."""

    shape: LayerShape
    dispatcher: Literal["all_to_all", "hierarchical"] = "all_to_all"
    overlap: int = Field(default=4, ge=2)
    rounds: int = 7
    threads: int = 1


class OverlapResult(BaseModel):
    """Holds the times of one layer's forward and backward pass.

    exchange: the all-to-alls alone, with experts that return their input. experts: the expert computation alone,
    without an exchange. at_once, in_chunks: the whole layer, without and with overlap. difference: the largest error of
    any output or gradient of the layer in chunks, relative to the largest value of the layer without chunks.
    """

    kind: Literal["overlap"] = "overlap"
    facts: Environment
    shape: LayerShape
    dispatcher: str
    overlap: int
    rounds: int
    exchange: Times
    experts: Times
    at_once: Times
    in_chunks: Times
    difference: float

    @property
    def hidden(self) -> float:
        """Returns the time that chunking saves, as a share of the shorter of `exchange` and `experts`: 1 if it is
        hidden entirely."""
        return (self.at_once.median - self.in_chunks.median) / min(self.exchange.median, self.experts.median)


class NodesTask(Settings):
    """Compares the time and the bytes between nodes of the flat all-to-all dispatcher and the hierarchical one."""

    shape: LayerShape
    ranks_per_node: int = Field(ge=1)
    rounds: int = 7
    threads: int = 1


class NodesRow(BaseModel):
    """Holds the measurement of a layer with one dispatcher. bytes: bytes of rows sent between nodes, forward and
    backward, over all ranks. rows_out: rows sent between nodes by dispatch in the forward pass, over all ranks."""

    times: Times
    bytes: int
    rows_out: int


class NodesResult(BaseModel):
    """Holds the result of `bench nodes`. rows: by dispatcher."""

    kind: Literal["nodes"] = "nodes"
    facts: Environment
    shape: LayerShape
    ranks_per_node: int
    rounds: int
    rows: dict[str, NodesRow]

    def ratio(self, flat: str) -> float:
        """Returns the bytes between nodes of the hierarchical dispatcher divided by those of the flat one. flat: what
        the flat one sends a row of a token for: each `choice` of an expert, or each `rank` that holds any of its
        experts."""
        return self.rows["hierarchical"].bytes / self.rows[f"one row a {flat}"].bytes


# ---------------------------------------------------------------------------------------------------------------------
# Overlap


def overlap_task(tree: dict[str, Any], runtime: Runtime, print_progress: ProgressFn) -> dict[str, Any]:
    """Runs `bench overlap` on every rank, two or more, and returns the result as JSON."""
    task = OverlapTask.model_validate(tree, strict=False)
    check_ranks(task.shape, runtime)
    return bench_overlap(task, runtime).model_dump(mode="json")


def bench_overlap(task: OverlapTask, runtime: Runtime) -> OverlapResult:
    """Times the layer with one chunk and with several, the exchange alone and the experts alone, and compares outputs
    and gradients of the two layers. A collective."""
    facts, group = set_up_environment(runtime, task.threads), dist.group.WORLD
    nodes = make_nodes(runtime, runtime.launch.local_world_size) if task.dispatcher == "hierarchical" else None
    layers = [
        make_layer(task.shape, {"kind": task.dispatcher, "overlap": chunks}, runtime, nodes)
        for chunks in (1, task.overlap)
    ]
    x_TD = random_tokens(task.shape, runtime)
    found = [outputs(layer, x_TD) for layer in layers]
    differences = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True) if a.numel()]
    workloads = {
        "exchange": exchange_workload(layers[0], x_TD),
        "experts": experts_workload(layers[0], x_TD),
        "at once": layer_workload(layers[0], x_TD),
        "in chunks": layer_workload(layers[1], x_TD),
    }
    times = measure(workloads, runtime.device, task.rounds, group)
    return OverlapResult(
        facts=facts,
        shape=task.shape,
        dispatcher=task.dispatcher,
        overlap=task.overlap,
        rounds=task.rounds,
        exchange=times["exchange"],
        experts=times["experts"],
        at_once=times["at once"],
        in_chunks=times["in chunks"],
        difference=max(differences, default=0.0),
    )


def format_overlap_result(result: OverlapResult) -> str:
    """Formats the result of `bench overlap`."""
    return "\n".join(
        [
            f"{result.shape}; {result.dispatcher}, forward and backward",
            f"{result.facts}; medians of {result.rounds} interleaved rounds, [smallest - largest], of the slowest rank",
            f"exchange alone, ms           {result.exchange!s:>32}",
            f"experts alone, ms            {result.experts!s:>32}",
            f"layer, all at once, ms       {result.at_once!s:>32}",
            f"layer, overlap {result.overlap:3}, ms       {result.in_chunks!s:>32}",
            f"hidden                       {result.hidden:32.0%}  of the smaller of exchange and experts",
            f"outputs and gradients differ by {result.difference:.0e} at most, relative to the largest",
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Nodes


def nodes_task(tree: dict[str, Any], runtime: Runtime, print_progress: ProgressFn) -> dict[str, Any]:
    """Runs `bench nodes` on every rank of two nodes or more, and returns the result as JSON."""
    task = NodesTask.model_validate(tree, strict=False)
    check_ranks(task.shape, runtime)
    if runtime.world_size % task.ranks_per_node or runtime.world_size == task.ranks_per_node:
        raise UserError(
            f"--ranks-per-node is {task.ranks_per_node}: {runtime.world_size} ranks are not two whole nodes or more"
        )
    return bench_nodes(task, runtime).model_dump(mode="json")


def bench_nodes(task: NodesTask, runtime: Runtime) -> NodesResult:
    """Measures the hierarchical dispatcher, and the flat one with a row per choice and with a row per rank. A
    collective."""
    facts, nodes = set_up_environment(runtime, task.threads), make_nodes(runtime, task.ranks_per_node)
    kinds = {"hierarchical": HIERARCHICAL} | {f"one row a {name}": settings for name, settings in FLAT.items()}
    layers = {name: make_layer(task.shape, settings, runtime, nodes) for name, settings in kinds.items()}
    x_TD = random_tokens(task.shape, runtime)
    times = measure(
        {name: layer_workload(layer, x_TD) for name, layer in layers.items()},
        runtime.device,
        task.rounds,
        dist.group.WORLD,
    )
    rows = {name: NodesRow(times=times[name], **between_nodes(layer, x_TD)) for name, layer in layers.items()}
    return NodesResult(facts=facts, shape=task.shape, ranks_per_node=task.ranks_per_node, rounds=task.rounds, rows=rows)


def between_nodes(layer: MoELayer, x_TD: Tensor) -> dict[str, int]:
    """Runs a step. Returns, over all ranks, the `bytes` of rows that crossed between nodes, and `rows_out`, the rows
    that dispatch sent between nodes in the forward pass. A collective."""
    output = layer(x_TD)
    output.y.backward(torch.ones_like(output.y))
    layer.zero_grad()
    log = output.stats.log
    sent = sum(sum_traffic(log.bytes_sent, ("network",), phase) for phase in (Phase.DISPATCH, Phase.COMBINE))
    rows = sum_traffic(log.rows_sent, ("network",), Phase.DISPATCH, is_backward=False)
    counts = torch.tensor([sent, rows], device=x_TD.device)
    total = all_reduce_sum(counts, layer.dispatcher.peers.group).tolist()
    return {"bytes": total[0], "rows_out": total[1]}


def format_nodes_result(result: NodesResult) -> str:
    """Formats the result of `bench nodes`."""
    lines = [
        f"{result.shape}; {result.ranks_per_node} ranks a node; forward and backward of a layer",
        f"{result.facts}; medians of {result.rounds} interleaved rounds, [smallest - largest], of the slowest rank",
        f"{'':20}{'ms':>34}{'MB between nodes':>20}{'rows out':>12}",
    ]
    lines += [
        f"{name:20}{row.times!s:>34}{row.bytes / 1e6:20.2f}{row.rows_out:12,}" for name, row in result.rows.items()
    ]
    hierarchical = result.rows["hierarchical"].times.median
    for flat in FLAT:
        time = hierarchical / result.rows[f"one row a {flat}"].times.median
        lines.append(f"hierarchical / one row a {flat:8} bytes {result.ratio(flat):.3f}, time {time:.2f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Layers and workloads


def check_ranks(shape: LayerShape, runtime: Runtime) -> None:
    """Raises UserError, on all ranks, unless there are two ranks or more and at least one expert for each."""
    if not 1 < runtime.world_size <= shape.num_experts:
        raise UserError(
            f"there are {runtime.world_size} ranks: an exchange needs two or more (--ranks 2, or a launcher), and each "
            f"needs at least one of the {shape.num_experts} experts"
        )


def make_nodes(runtime: Runtime, ranks_per_node: int) -> NodeGroups:
    """Builds the process groups for nodes of `ranks_per_node` ranks each. A collective."""
    degrees = ParallelDegrees(runtime.world_size, ep=runtime.world_size)
    return build_node_groups(degrees, ranks_per_node, group_builder(runtime.device.type, runtime.timeout))


def make_layer(
    shape: LayerShape, dispatcher: dict[str, Any], runtime: Runtime, nodes: NodeGroups | None = None
) -> MoELayer:
    """Builds a layer with its experts divided over all ranks, with the same weights for every dispatcher."""
    config = {
        "d_model": shape.d_model,
        "num_experts": shape.num_experts,
        "router": {"k": shape.k, "normalise": shape.k > 1},
        "experts": {"hidden": shape.hidden, "activation": shape.activation},
        "dispatcher": dispatcher,
    }
    group = dist.group.WORLD if runtime.world_size > 1 else None
    with torch.device(runtime.device):
        return MoELayer(MoEConfig.model_validate(config), group, nodes=nodes)


def random_tokens(shape: LayerShape, runtime: Runtime) -> Tensor:
    """Draws this rank's share of the shape's tokens, (T, D) float32, which requires a gradient."""
    generator = torch.Generator().manual_seed(runtime.rank)
    x_TD = torch.randn(shape.tokens // runtime.world_size, shape.d_model, generator=generator)
    return x_TD.to(runtime.device).requires_grad_()


def step(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Runs forward and backward, and returns y."""
    y_TD = layer(x_TD).y
    y_TD.backward(torch.ones_like(y_TD))
    return y_TD.detach()


def clear(layer: MoELayer, x_TD: Tensor) -> None:
    """Removes all gradients."""
    layer.zero_grad()
    x_TD.grad = None


def outputs(layer: MoELayer, x_TD: Tensor) -> list[Tensor]:
    """Returns y, the gradient of the tokens, and the gradients of all weights of this rank."""
    y_TD, dx_TD = step(layer, x_TD), x_TD.grad
    assert dx_TD is not None
    found = [y_TD, dx_TD, *(p.grad for p in layer.parameters() if p.grad is not None)]
    clear(layer, x_TD)
    return found


def layer_workload(layer: MoELayer, x_TD: Tensor) -> Workload:
    """Returns a workload that runs the layer's forward and backward pass."""
    return Workload(partial(step, layer, x_TD), partial(clear, layer, x_TD))


def exchange_workload(layer: MoELayer, x_TD: Tensor) -> Workload:
    """Returns a workload of dispatch and combine alone, forward and backward: routing is done beforehand, and rows come
    back from their experts unchanged."""
    with torch.no_grad():
        plan = layer.router(x_TD, token_batch(x_TD[None], StepContext(), layer.data_group))

    def run() -> None:
        pending = layer.dispatcher.dispatch(x_TD, plan, Ledger(), StepContext())
        for chunk in pending.receive_chunks():
            chunk.start_combine(chunk.tokens.x_VD * 1)
        y_TD = pending.combine()
        y_TD.backward(torch.ones_like(y_TD))

    return Workload(run, partial(clear, layer, x_TD))


def experts_workload(layer: MoELayer, x_TD: Tensor) -> Workload:
    """Returns a workload of this rank's experts alone, forward and backward, on all rows that they receive from
    `x_TD`."""
    seen: list[DispatchedTokens] = []

    def see(module: Any, arguments: tuple[DispatchedTokens, ...]) -> None:
        seen.append(arguments[0])

    hook = layer.experts.register_forward_pre_hook(see)
    with torch.no_grad():
        layer(x_TD)
    hook.remove()
    (tokens,) = seen
    tokens.x_VD.requires_grad_()
    tokens.weights_R.requires_grad_()

    def run() -> None:
        y_VD = layer.experts(tokens)
        y_VD.backward(torch.ones_like(y_VD))

    return Workload(run, partial(clear, layer, tokens.x_VD))
