"""Computes the bytes that the MoE layers of one training step send, by parallel axis: counts for losses, scopes, rows.

See formulas.py. Decisions of the router are taken from the step itself."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expert_parallel.moe.capacity.policies import CapacitySettings, DroplessConfig
from expert_parallel.moe.conservation import LayerTotals, packed_size
from expert_parallel.moe.dispatch.chunk import chunk_sizes
from expert_parallel.moe.routers.across_tokens import ExpertChoiceConfig, SinkhornConfig
from expert_parallel.moe.routers.base import HashConfig
from expert_parallel.parallel.collectives import group_size
from expert_parallel.parallel.degrees import ranks_by_group
from expert_parallel.verify.formulas import ByteCounts, StepSizes, balance_losses


@dataclass(frozen=True)
class ExpertRows:
    """Holds the rows that experts received in a step, over layers, passes (including recomputed ones) and ranks.

    total: sum over ranks. max_rows: the largest number within each group of etp ranks, summed over the groups."""

    total: int
    max_rows: int


def statistics_bytes(step: StepSizes) -> ByteCounts:
    """Returns the traffic of statistics: in every pass, counts of choices and tokens for losses; once a step, over all
    ranks, the gradient norm, cross entropy, number of tokens, and the counts of all layers."""
    degrees = step.degrees
    numbers = 3  # gradient norm, cross entropy, number of tokens
    terms: ByteCounts = Counter()
    if step.model.moe is not None:
        E = step.moe.num_experts
        num_losses = len(step.moe.losses)
        num_layers = len(step.model.moe_layers)
        numbers += num_layers * packed_size(E, num_losses)
        if num_losses:
            terms["stage", "counts for losses"] = (
                num_layers * step.moe_forward_passes * 2 * (step.ranks_per_stage - 1) * (2 * E + 2) * 8
            )
        if any(loss.scope == "sequence" for loss in balance_losses(step)):
            terms["sequence", "counts for losses"] = (
                num_layers
                * step.moe_forward_passes
                * 2
                * (degrees.cp * degrees.tp - 1)
                * step.sequences
                * (2 * E + 1)
                * 8
            )
    terms["world", "norm and totals"] = 2 * (degrees.world_size - 1) * numbers * 8
    return terms


def scope_bytes(step: StepSizes) -> ByteCounts:
    """Returns the traffic of routers and capacities with a scope beyond one rank: gathered scores, padded to the
    fullest rank, and small reductions over ep. Recomputation adds nothing, since it replays the recorded choices."""
    terms: ByteCounts = Counter()
    if step.model.moe is None:
        return terms
    capacity, router = step.moe.capacity, step.router
    E, K = step.moe.num_experts, router.num_choices(step.moe.num_experts)
    W = step.param_bytes
    ep = step.degrees.ep
    passes = step.training.micro_steps * len(step.model.moe_layers)
    ep_ranks = passes * step.ranks_per_stage  # over all ep groups and passes
    looks: list[tuple[str, int]] = []  # (scope, bytes per token) of each gather
    if isinstance(router, ExpertChoiceConfig | SinkhornConfig):
        looks.append((router.scope, W * E))
    if isinstance(capacity, CapacitySettings):
        scores = W * K * (capacity.priority in ("probability", "batch_priority"))
        looks.append((capacity.scope, 5 * K + scores + W * E * (capacity.overflow == "reroute")))
        if capacity.pad and capacity.scope != "global":
            terms["ep", "agreed padding"] = ep_ranks // ep * 2 * (ep - 1) * 8
    if isinstance(capacity, DroplessConfig) and capacity.receive_bound is not None:
        terms["ep", "receive bound"] = ep_ranks * (ep - 1) * ep * 8
    for scope, width in looks:
        if scope != "rank":
            axis = "stage" if scope == "global" else "sequence"
            terms[axis, "gathered for decisions"] += passes * padded_all_gather_bytes(step, axis, 9 + width, header=8)
    return terms


def padded_all_gather_bytes(
    step: StepSizes, axis: str, width: int, header: int, tokens: Sequence[int] | None = None
) -> int:
    """Returns the bytes of one all-gather per group and layer: a header and the tokens, padded to those of the fullest
    rank.

    width: bytes per token. tokens: by rank; None: all tokens of each rank."""
    groups, tokens = ranks_by_group(step.degrees)[axis], tokens or step.tokens_per_rank
    sent = [(header + max(tokens[rank] for rank in ranks) * width) * len(ranks) for ranks in groups]
    return sum(sent) * (len(groups[0]) - 1) // step.degrees.pp


def dispatch_bytes(step: StepSizes, totals: LayerTotals) -> ByteCounts:
    """Returns the traffic of one MoE layer's rows: out and back, forward and backward, and once more if it is
    recomputed.

    Metadata is 8 bytes per pair of ranks, 8 more per chunk, and expert id and weight for each choice that crosses. The
    ledger does not record how many choices share a row, so their number is derived from its bytes."""
    if step.degrees.ep == 1:
        return Counter()
    if step.moe.dispatcher.kind == "all_gather":
        return all_gather_bytes(step, totals)
    hops: list[tuple[str, int, tuple[str, ...]]] = [("ep", step.degrees.ep, ("node", "network"))]
    row, choice = row_bytes(step), 4 + step.param_bytes
    terms: ByteCounts = Counter()
    if step.moe.dispatcher.kind == "hierarchical":
        nodes = step.mesh.nodes
        hops = [
            ("nodes", group_size(nodes.rail_group), ("network",)),
            ("node", group_size(nodes.node_group), ("node",)),
        ]
        terms["ep", "agreement"] = step.moe_forward_passes * step.ranks_per_stage * (step.degrees.ep - 1) * 8
    for axis, P, links in hops:
        moved = sum(totals.rows_moved[link] for link in links) // 4  # each way
        counts = step.training.micro_steps * (8 + 8 * step.chunks) * step.ranks_per_stage * (P - 1)
        metadata = sum(totals.bytes_sent[link] for link in links) - 4 * moved * row
        choices = (metadata - counts) // (choice + weight_gradient_bytes(step))
        if step.moe.dispatcher.one_row_per == "choice":
            choices = moved
        terms[axis, "rows"] = 4 * moved * row
        terms[axis, "metadata"] = counts + choices * (choice + weight_gradient_bytes(step))
        if step.recomputes_moe:
            terms[axis, "recomputed"] = 2 * moved * row + counts + choices * choice
    return terms


def all_gather_bytes(step: StepSizes, totals: LayerTotals) -> ByteCounts:
    """Returns the traffic of the all-gather dispatcher: out go all tokens with all their choices, padded to the fullest
    rank, chunk by chunk (the ledger counts them unpadded); back and backward move what an all-to-all moves."""
    row = row_bytes(step)
    M, P = step.training.micro_steps, step.degrees.ep
    header = 8 + 4 * step.chunks  # bytes of metadata per rank
    choices = step.router.num_choices(step.moe.num_experts) * (4 + step.param_bytes)
    chunks_of_ranks = zip(*(chunk_sizes(tokens, step.chunks) for tokens in step.tokens_per_rank), strict=True)
    rows = sum(padded_all_gather_bytes(step, "ep", row, header=0, tokens=tokens) for tokens in chunks_of_ranks)
    out = M * (padded_all_gather_bytes(step, "ep", choices, header) + rows)
    unpadded = (P - 1) * (M * step.ranks_per_stage * header + step.tokens * (row + choices))
    moved = sum(totals.rows_moved.values()) // 4
    return Counter(
        {
            ("ep", "all tokens and choices"): out,
            ("ep", "rows"): 3 * moved * row,
            ("ep", "metadata"): sum(totals.bytes_sent.values()) - unpadded - 3 * moved * row,
            ("ep", "recomputed"): (out + moved * row) * step.recomputes_moe,
        }
    )


def row_bytes(step: StepSizes) -> int:
    """Returns the bytes of a row between ranks; ledger kind `rows` adds a tag and a checksum."""
    is_narrow = step.moe.dispatcher.exchange_dtype == "bfloat16"
    number = torch.bfloat16.itemsize if is_narrow else step.compute_bytes
    return step.model.d_model * number + (16 if step.moe.ledger.kind == "rows" else 0)


def weight_gradient_bytes(step: StepSizes) -> int:
    """Returns the bytes of the gradient of one routing weight, 0 for routers whose weights are not trained."""
    return 0 if isinstance(step.router, HashConfig) else step.param_bytes


def expert_tensor_bytes(step: StepSizes, rows: ExpertRows) -> ByteCounts:
    """Returns the traffic of etp: rows are gathered, padded to the fullest rank, and partial outputs are reduced to the
    ranks that own the rows; gradients go the reverse way. Counts of rows per expert are gathered as well."""
    if step.model.moe is None:
        return Counter()
    others, edp = step.degrees.etp - 1, step.degrees.edp
    once = others * step.model.d_model * step.compute_bytes
    gathered, returned = once * step.degrees.etp * rows.max_rows, once * rows.total
    times = 2 if step.recomputes_moe else 1  # the rows are those of all forward passes
    counts = 8 * step.moe.num_experts * edp * step.degrees.etp * others * step.chunks
    return Counter(
        {
            ("etp", "rows"): gathered + returned + (gathered + returned) // times,
            ("etp", "numbers of rows"): step.moe_forward_passes * len(step.model.moe_layers) * counts,
        }
    )
