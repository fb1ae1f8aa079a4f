"""Computes the bytes that the MoE layers of one training step send, by parallel axis: statistics for losses, scores for
routers and capacities with a scope beyond one rank, and rows between tokens' ranks and experts' ranks.

The sizes come from formulas.py; how many rows the router sends where is taken from the measured step."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expert_parallel.moe.capacity.policies import CapacitySettings, DroplessConfig
from expert_parallel.moe.conservation import LayerTotals, packed_size
from expert_parallel.moe.dispatch.chunk import chunk_sizes
from expert_parallel.moe.dispatch.row_tags import TAG_BYTES
from expert_parallel.moe.routers.across_tokens import ExpertChoiceConfig, SinkhornConfig
from expert_parallel.moe.routers.base import HashConfig
from expert_parallel.parallel.collectives import group_size
from expert_parallel.parallel.degrees import ranks_by_group
from expert_parallel.verify.formulas import ByteCounts, StepSizes, balance_losses


@dataclass(frozen=True)
class ExpertRows:
    """Holds the number of rows that experts received in a step, over layers, passes (including recomputed ones) and
    ranks.

    total: sum over ranks. max_rows: the largest number within each group of etp ranks, summed over the groups."""

    total: int
    max_rows: int


def statistics_bytes(step: StepSizes) -> ByteCounts:
    """Returns the bytes of statistics sent in a step, over all ranks: in every pass, counts of choices and tokens for
    the losses; once a step, the gradient norm, cross entropies, their numbers of tokens, and the counts of all layers.
    With documents, the targets of each further token are counted, too."""
    degrees, depths = step.degrees, len(step.model.mtp_layers)
    numbers = 3 + 2 * depths  # gradient norm, cross entropies, numbers of tokens
    terms: ByteCounts = Counter()
    if step.has_documents:
        terms["stage", "targets of further tokens"] = 2 * (step.ranks_per_stage - 1) * depths * 8
    if step.model.moe is not None:
        E = step.moe.num_experts
        num_losses = len(step.moe.losses)
        num_layers = len(step.model.moe_layers)
        numbers += num_layers * packed_size(E, num_losses)
        if num_losses:
            terms["stage", "counts for losses"] = (
                num_layers * step.moe_forward_passes * 2 * (step.ranks_per_stage - 1) * (2 * E + 2) * 8
            )
        if num_variations := sum(loss.kind in ("importance", "load") for loss in step.moe.losses):
            terms["stage", "importance and load"] = (
                num_layers * step.moe_forward_passes * 2 * (step.ranks_per_stage - 1) * num_variations * E
            ) * step.param_bytes
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
    """Returns the bytes that routers and capacities with a scope beyond one rank send in a step, over all ranks: scores
    are gathered, padded to the rank with most tokens, and a few numbers are reduced over ep. Recomputed passes send
    nothing, since they replay the recorded choices."""
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
    """Returns the bytes that all-gathers over the groups of an axis send for one layer, over all ranks: from each rank
    a header and its tokens, padded to the number of the rank with most tokens in the group.

    width: bytes per token. header: bytes per rank. tokens: number of tokens by rank; None: those of a micro-step."""
    groups, tokens = ranks_by_group(step.degrees)[axis], tokens or step.tokens_per_rank
    sent = [(header + max(tokens[rank] for rank in ranks) * width) * len(ranks) for ranks in groups]
    return sum(sent) * (len(groups[0]) - 1) // step.degrees.pp


def dispatch_bytes(step: StepSizes, totals: LayerTotals) -> ByteCounts:
    """Returns the bytes that dispatch and combine of one MoE layer send in a step, over all ranks, forward and
    backward, and forward once more if the layer is recomputed.

    Metadata is 8 bytes per pair of ranks, 8 more per chunk, and expert id, weight and tag for each choice of an expert
    on another rank. One row may serve several choices; their number is derived from the ledger's bytes. totals: the
    ledger's counts of this layer."""
    if step.degrees.ep == 1:
        return Counter()
    if step.moe.dispatcher.kind == "all_gather":
        return all_gather_bytes(step, totals)
    hops: list[tuple[str, int, tuple[str, ...]]] = [("ep", step.degrees.ep, ("node", "network"))]
    row, choice = row_bytes(step), 4 + step.param_bytes + tag_bytes(step)
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
    """Returns what `dispatch_bytes` does for the all-gather dispatcher. Forward dispatch gathers all tokens with all
    their choices, padded to the rank with most tokens, chunk by chunk (the ledger counts them unpadded); combine and
    the backward pass send what an all-to-all sends."""
    row = row_bytes(step)
    M, P = step.training.micro_steps, step.degrees.ep
    header = 8 + 4 * step.chunks  # bytes of metadata per rank
    choices = step.router.num_choices(step.moe.num_experts) * (4 + step.param_bytes) + tag_bytes(step)
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
    """Returns the bytes of one token's row sent between ranks, with its tag."""
    is_narrow = step.moe.dispatcher.exchange_dtype == "bfloat16"
    number = torch.bfloat16.itemsize if is_narrow else step.compute_bytes
    return step.model.d_model * number + tag_bytes(step)


def tag_bytes(step: StepSizes) -> int:
    """Returns the bytes that the ledger adds to each row and to each choice of the metadata."""
    return TAG_BYTES if step.moe.ledger.kind == "rows" else 0


def weight_gradient_bytes(step: StepSizes) -> int:
    """Returns the bytes of the gradient of one routing weight, with its tag; 0 for the hash router, whose weights are
    not trained."""
    return 0 if isinstance(step.router, HashConfig) else step.param_bytes + tag_bytes(step)


def expert_tensor_bytes(step: StepSizes, rows: ExpertRows) -> ByteCounts:
    """Returns the bytes that the etp ranks of experts send in a step, over all ranks: rows are gathered, padded to the
    rank with most rows, and partial outputs are reduced to the ranks that own the rows; gradients go the reverse way.
    The number of rows of each expert is gathered as well."""
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
