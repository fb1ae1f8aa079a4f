"""Conservation: the ledger's counts of one layer, summed over micro-steps and ranks, must add up.

    choices:  routed = kept + rerouted + dropped;  kept + rerouted on an expert = choices that arrived at its rank
    rows:     sent = received, with tokens and with outputs, forward and backward; as many return as went

Each rank adds up its passes in one vector of float64 (exact for counts below 2^53), and one all-reduce of all layers'
vectors gives every rank the totals.
"""

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.moe.dispatch.ledger import Ledger, LedgerConfig
from expert_parallel.moe.dispatch.permute import count_keys
from expert_parallel.moe.types import ExpertCounts, LoadStats, Reason, RoutingPlan
from expert_parallel.parallel.collectives import ExchangeKey, Link, Phase, all_reduce_sum, total_of

# The exchanges of rows, in the order of a pass; each stands for all of its hops.
EXCHANGES = {
    str(key): key
    for key in (
        ExchangeKey(Phase.DISPATCH),
        ExchangeKey(Phase.COMBINE),
        ExchangeKey(Phase.COMBINE).of_backward,
        ExchangeKey(Phase.DISPATCH).of_backward,
    )
}
LINKS: tuple[Link, ...] = ("node", "network")


def count_choices(routed: RoutingPlan, plan: RoutingPlan, real_T: Tensor | None) -> dict[str, Tensor]:
    """Returns the first fields of LoadStats: each choice is counted once as it was routed, and once under what became
    of it."""
    num_experts = plan.num_experts
    key_TK = plan.reason_TK.long() * num_experts + plan.expert_ids_TK
    counts = count_keys(key_TK.flatten(), len(Reason) * num_experts).view(len(Reason), num_experts)
    probabilities_TE = plan.probabilities_TE.detach()
    logs_TE = probabilities_TE.clamp(min=torch.finfo(probabilities_TE.dtype).tiny).log()  # 0 log 0 is 0
    real_T = torch.ones_like(plan.reason_TK[:, 0], dtype=torch.bool) if real_T is None else real_T
    return {
        "routed_E": count_routed(routed),
        "kept_E": counts[Reason.KEPT],
        "rerouted_E": counts[Reason.REROUTED],
        "dropped_capacity_E": counts[Reason.DROPPED_CAPACITY],
        "dropped_receive_bound_E": counts[Reason.DROPPED_RECEIVE_BOUND],
        "num_tokens": real_T.sum(),
        "num_unserved": (real_T & ~plan.kept_TK.any(1)).sum(),
        "entropy": -((probabilities_TE * logs_TE).sum(1) * real_T).sum(),
    }


def count_routed(plan: RoutingPlan) -> Tensor:
    """Choices per expert that a router made, int64 (E)."""
    ids_TK = plan.expert_ids_TK.masked_fill(~plan.routed_TK, plan.num_experts)
    return count_keys(ids_TK.flatten(), plan.num_experts + 1)[: plan.num_experts]


@dataclass(frozen=True)
class LayerTotals(ExpertCounts):
    """Adds up LoadStats of one MoE layer over passes and ranks. Counts per expert are on the CPU.

    rows_sent, rows_received: by exchange, rows that stayed on their rank included. rows_moved, bytes_sent: by link
    class, forward and backward; bytes with metadata. rows_own: those of dispatch that stayed. gathered_bytes: of scopes
    beyond a rank. losses: before coefficients, summed over passes.
    """

    num_tokens: int
    num_unserved: int
    entropy: float
    gathered_bytes: int
    rows_own: int
    rows_sent: dict[str, int]
    rows_received: dict[str, int]
    rows_moved: dict[str, int]
    bytes_sent: dict[str, int]
    losses: dict[str, float]

    def breaches(self) -> list[str]:
        """What does not add up, in words; empty if all does."""
        found = []
        routed, served_E = int(self.routed_E.sum()), self.kept_E + self.rerouted_E
        accounted = int((served_E + self.dropped_E).sum())
        if routed != accounted:
            found.append(f"{routed} choices were routed, {accounted} kept, rerouted or dropped")
        for expert in (served_E != self.computed_E).nonzero().flatten().tolist():
            found.append(
                f"expert {expert} was to compute {int(served_E[expert])} choices and computed "
                f"{int(self.computed_E[expert])}"
            )
        for name, key in EXCHANGES.items():
            sent, received, gone = self.rows_sent[name], self.rows_received[name], self.rows_sent["dispatch"]
            if sent != received:
                found.append(f"{name}: {sent} rows were sent, {received} received")
            if sent != gone and not (sent == 0 and key.is_backward):  # evaluation has no backward pass
                found.append(f"{name}: {sent} rows were sent, but {gone} with tokens")
        return found


# The fields of LayerTotals, in the order of the vector that is summed over ranks; its losses stand behind them.
PER_EXPERT = tuple(field.name for field in fields(ExpertCounts))
ON_DEVICE = {"num_tokens": int, "num_unserved": int, "entropy": float}
ON_HOST = {"gathered_bytes": int, "rows_own": int}
LOGGED = {  # field: the counter of CommLog, and the exchanges or link classes that it is summed by
    "rows_sent": ("rows_sent", EXCHANGES),
    "rows_received": ("rows_received", EXCHANGES),
    "rows_moved": ("rows_sent", LINKS),
    "bytes_sent": ("bytes_sent", LINKS),
}


def pack(stats: LoadStats) -> Tensor:
    """Returns one pass of one layer on this rank as a vector, float64. Sums of vectors are what `unpack` takes."""
    on_host = [getattr(stats, name) for name in ON_HOST]
    on_host += [_sum(getattr(stats.log, counter), key) for counter, keys in LOGGED.values() for key in keys]
    return torch.cat(
        [
            torch.stack([getattr(stats, name) for name in PER_EXPERT]).flatten().double(),
            torch.stack([getattr(stats, name) for name in ON_DEVICE]).double(),
            torch.tensor(on_host, dtype=torch.float64).to(stats.routed_E.device),
            *(value.double().view(1) for value in stats.losses.values()),
        ]
    )


def packed_size(num_experts: int, num_losses: int) -> int:
    """Returns the length of what `pack` makes."""
    logged = sum(len(keys) for _, keys in LOGGED.values())
    return len(PER_EXPERT) * num_experts + len(ON_DEVICE) + len(ON_HOST) + logged + num_losses


def unpack(total: Tensor, num_experts: int, loss_names: list[str]) -> LayerTotals:
    """Reads a sum of vectors, which is on the CPU."""
    counts, rest = total.tensor_split([len(PER_EXPERT) * num_experts])
    numbers = iter(rest.tolist())
    values: dict[str, Any] = dict(zip(PER_EXPERT, counts.round().long().view(-1, num_experts), strict=True))
    values |= {name: kind(next(numbers)) for name, kind in (ON_DEVICE | ON_HOST).items()}
    values |= {name: {key: int(next(numbers)) for key in keys} for name, (_, keys) in LOGGED.items()}
    return LayerTotals(**values, losses={name: next(numbers) for name in loss_names})


def check_conservation(
    stats: LoadStats, group: dist.ProcessGroup | None, config: LedgerConfig, layer: int = 0, step: int = 0
) -> LayerTotals:
    """The totals of one pass of a layer over the ranks of `group`: one all-reduce, after the backward pass. Raises
    LedgerBreach on every rank, or warns, where they do not add up."""
    total = all_reduce_sum(pack(stats), group).cpu()
    totals = unpack(total, len(stats.routed_E), list(stats.losses))
    report_breaches(totals, config, layer, step)
    return totals


def report_breaches(totals: LayerTotals, config: LedgerConfig, layer: int, step: int) -> None:
    if found := totals.breaches():
        Ledger(config, layer, step).report("; ".join(found))


def _sum(counter: Counter[tuple[ExchangeKey, Link]], name: str) -> int:
    """Returns the sum of one of EXCHANGES, over all hops and links, or of one link class, over all exchanges."""
    if name in EXCHANGES:
        key = EXCHANGES[name]
        return total_of(counter, ("own", *LINKS), key.phase, key.is_backward)
    return sum(number for (_, link), number in counter.items() if link == name)
