"""Checks that the ledger's counts of one layer, summed over micro-steps and ranks, add up.

    choices:  routed = kept + rerouted + dropped;  kept + rerouted of an expert = choices that its rank computed
    rows:     sent = received, in dispatch and combine, forward and backward; each of these exchanges has equally many
    contents: a checksum of what was sent = the same of what arrived, in these four exchanges and those of metadata

Each rank sums its passes in one float64 vector (exact for counts below 2^53), and one all-reduce of all layers' vectors
gives every rank the totals.
"""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.moe.dispatch.checksums import CHECKED
from expert_parallel.moe.dispatch.ledger import Ledger, LedgerConfig
from expert_parallel.moe.dispatch.permute import count_keys
from expert_parallel.moe.types import ExpertCounts, LoadStats, Outcome, RoutingPlan
from expert_parallel.parallel.collectives import ExchangeKey, LinkClass, Phase, all_reduce_sum, sum_traffic

# The exchanges of rows, in the order of a pass; each includes all of its hops.
EXCHANGES = {
    str(key): key
    for key in (
        ExchangeKey(Phase.DISPATCH),
        ExchangeKey(Phase.COMBINE),
        ExchangeKey(Phase.COMBINE).backward_key,
        ExchangeKey(Phase.DISPATCH).backward_key,
    )
}
LINKS: tuple[LinkClass, ...] = ("node", "network")


def count_choices(routed: RoutingPlan, plan: RoutingPlan, real_T: Tensor | None) -> dict[str, Tensor]:
    """Returns the fields of LoadStats that depend on the plans only: choices by expert and outcome, tokens, and
    entropy.

    routed: the plan before capacity. plan: after it. real_T: bool; None: no padding. Detached; nothing is copied to the
    host.
    """
    num_experts = plan.num_experts
    key_TK = plan.outcome_TK.long() * num_experts + plan.expert_ids_TK
    counts = count_keys(key_TK.flatten(), len(Outcome) * num_experts).view(len(Outcome), num_experts)
    probabilities_TE = plan.probabilities_TE.detach()
    # Clamped, so that 0 * log 0 is 0 and not NaN.
    logs_TE = probabilities_TE.clamp(min=torch.finfo(probabilities_TE.dtype).tiny).log()
    real_T = torch.ones_like(plan.outcome_TK[:, 0], dtype=torch.bool) if real_T is None else real_T
    return {
        "routed_E": count_routed(routed),
        "kept_E": counts[Outcome.KEPT],
        "rerouted_E": counts[Outcome.REROUTED],
        "dropped_capacity_E": counts[Outcome.DROPPED_CAPACITY],
        "dropped_receive_bound_E": counts[Outcome.DROPPED_RECEIVE_BOUND],
        "num_tokens": real_T.sum(),
        "num_tokens_without_expert": (real_T & ~plan.kept_TK.any(1)).sum(),
        "entropy": -((probabilities_TE * logs_TE).sum(1) * real_T).sum(),
    }


def count_routed(plan: RoutingPlan) -> Tensor:
    """Counts the choices of each expert that a router made, int64 (E)."""
    ids_TK = plan.expert_ids_TK.masked_fill(~plan.routed_TK, plan.num_experts)
    return count_keys(ids_TK.flatten(), plan.num_experts + 1)[: plan.num_experts]


@dataclass(frozen=True)
class LayerTotals(ExpertCounts):
    """Holds the sums of LoadStats of one MoE layer over passes and ranks. Counts per expert are on the CPU.

    rows_sent, rows_received: the number of rows in each of EXCHANGES, including rows that stayed on their rank.
    rows_moved, bytes_sent: rows and bytes sent over each of LINKS, forward and backward; bytes include metadata.
    rows_own: rows that stayed on their rank in dispatch. gathered_bytes: bytes sent to gather the tokens of scopes
    wider than one rank. losses: each loss before its coefficient, summed over passes. checksums: for each of CHECKED, 0
    if what arrived is what was sent (see Checksums). Other fields: see LoadStats.
    """

    num_tokens: int
    num_tokens_without_expert: int
    entropy: float
    gathered_bytes: int
    rows_own: int
    rows_sent: dict[str, int]
    rows_received: dict[str, int]
    rows_moved: dict[str, int]
    bytes_sent: dict[str, int]
    losses: dict[str, float]
    checksums: dict[str, int] = field(default_factory=dict)

    def breaches(self) -> list[str]:
        """Returns a sentence for each count that does not add up; an empty list if all do."""
        found = []
        routed = int(self.routed_E.sum())
        assigned_E = self.kept_E + self.rerouted_E
        accounted = int((assigned_E + self.dropped_E).sum())
        if routed != accounted:
            found.append(f"{routed} choices were routed, {accounted} kept, rerouted or dropped")
        for expert in (assigned_E != self.computed_E).nonzero().flatten().tolist():  # on the CPU: nothing to wait for
            found.append(
                f"expert {expert} was to compute {int(assigned_E[expert])} choices and computed "
                f"{int(self.computed_E[expert])}"
            )
        dispatched = self.rows_sent["dispatch"]
        for name, key in EXCHANGES.items():
            sent, received = self.rows_sent[name], self.rows_received[name]
            if sent != received:
                found.append(f"{name}: {sent} rows were sent, {received} received")
            if sent != dispatched and not (sent == 0 and key.is_backward):  # evaluation has no backward pass
                found.append(f"{name}: {sent} rows were sent, but {dispatched} with tokens")
        for name, checksum in self.checksums.items():
            if checksum != 0 and self.rows_sent.get(name) == self.rows_received.get(name):
                found.append(
                    f"{name}: what arrived is not what was sent, as their checksums differ (model.moe.ledger.kind "
                    "'rows' names the ranks and rows)"
                )
        return found


# The fields of LayerTotals, in the order of the vector that is summed over ranks; checksums and losses come last.
PER_EXPERT = tuple(field.name for field in fields(ExpertCounts))
ON_DEVICE = {"num_tokens": int, "num_tokens_without_expert": int, "entropy": float}
ON_HOST = {"gathered_bytes": int, "rows_own": int}
LOGGED = {  # field: the counter of CommLog, and the exchanges or link classes by which it is summed
    "rows_sent": ("rows_sent", EXCHANGES),
    "rows_received": ("rows_received", EXCHANGES),
    "rows_moved": ("rows_sent", LINKS),
    "bytes_sent": ("bytes_sent", LINKS),
}


def pack(stats: LoadStats) -> Tensor:
    """Packs one pass of one layer on this rank into a float64 vector. `unpack` reads a sum of such vectors."""
    on_host = [getattr(stats, name) for name in ON_HOST]
    on_host += [_sum(getattr(stats.log, counter), key) for counter, keys in LOGGED.values() for key in keys]
    return torch.cat(
        [
            torch.stack([getattr(stats, name) for name in PER_EXPERT]).flatten().double(),
            torch.stack([getattr(stats, name) for name in ON_DEVICE]).double(),
            torch.tensor(on_host, dtype=torch.float64).to(stats.routed_E.device),
            _pack_checksums(stats),
            *(value.double().view(1) for value in stats.losses.values()),
        ]
    )


def packed_size(num_experts: int, num_losses: int) -> int:
    """Returns the length of the vector that `pack` makes."""
    logged = sum(len(keys) for _, keys in LOGGED.values())
    return len(PER_EXPERT) * num_experts + len(ON_DEVICE) + len(ON_HOST) + logged + 2 * len(CHECKED) + num_losses


def unpack(total: Tensor, num_experts: int, loss_names: list[str]) -> LayerTotals:
    """Reads a sum of packed vectors. total: float64, on the CPU, so that reading it does not wait for a device."""
    counts, rest = total.tensor_split([len(PER_EXPERT) * num_experts])
    numbers = iter(rest.tolist())
    values: dict[str, Any] = dict(zip(PER_EXPERT, counts.round().long().view(-1, num_experts), strict=True))
    values |= {name: kind(next(numbers)) for name, kind in (ON_DEVICE | ON_HOST).items()}
    values |= {name: {key: int(next(numbers)) for key in keys} for name, (_, keys) in LOGGED.items()}
    low, high = ([int(next(numbers)) for _ in CHECKED] for _ in range(2))
    sums = [(low_half + (high_half << 32)) % (1 << 64) for low_half, high_half in zip(low, high, strict=True)]
    values["checksums"] = {str(key): checksum for key, checksum in zip(CHECKED, sums, strict=True)}
    return LayerTotals(**values, losses={name: next(numbers) for name in loss_names})


def check_conservation(
    stats: LoadStats, group: dist.ProcessGroup | None, config: LedgerConfig, layer: int = 0, step: int = 0
) -> LayerTotals:
    """Returns the totals of one pass of a layer over the ranks of `group`: one all-reduce, to be called after the
    backward pass.

    Raises a LedgerBreach on every rank if they do not add up, or warns, as `config.breach` says.
    """
    total = all_reduce_sum(pack(stats), group).cpu()  # the host waits, once for the whole layer
    totals = unpack(total, len(stats.routed_E), list(stats.losses))
    report_breaches(totals, config, layer, step)
    return totals


def report_breaches(totals: LayerTotals, config: LedgerConfig, layer: int, step: int) -> None:
    """Reports all counts that do not add up in one sentence: raises a LedgerBreach, or warns, as `config.breach`
    says."""
    if found := totals.breaches():
        Ledger(config, layer, step).report("; ".join(found))


def _pack_checksums(stats: LoadStats) -> Tensor:
    """Returns the checksum of each of CHECKED: the lower 32 bits of all, then the upper 32 bits. float64 holds the sum
    of up to 2^21 such halves exactly."""
    total = stats.checksums.sum(stats.routed_E.device)
    return torch.cat([total & 0xFFFFFFFF, total >> 32 & 0xFFFFFFFF]).double()


def _sum(counter: Counter[tuple[ExchangeKey, LinkClass]], name: str) -> int:
    """Returns the sum of one of EXCHANGES over all hops and links, or of one link class over all exchanges."""
    if name in EXCHANGES:
        key = EXCHANGES[name]
        return sum_traffic(counter, ("own", *LINKS), key.phase, key.is_backward)
    return sum(number for (_, link), number in counter.items() if link == name)
