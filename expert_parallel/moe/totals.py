"""Conservation: the ledger's counts of one layer, summed over micro-steps and ranks, must add up.

    choices:  routed = kept + rerouted + dropped;  kept + rerouted on an expert = rows that its rank computed
    rows:     sent = received, with tokens and with outputs, forward and backward; as many return as went

Each rank adds up its passes in one vector of float64 (exact for counts below 2^53), and one all-reduce of all layers'
vectors gives every rank the totals.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expert_parallel.collectives import CommLog, Phase, all_reduce_sum, total_of
from expert_parallel.moe.ledger import Ledger, LedgerConfig
from expert_parallel.moe.plan import LoadStats

PER_EXPERT = ("routed_E", "kept_E", "rerouted_E", "dropped_capacity_E", "dropped_receive_bound_E", "computed_E")
PURPOSES = ("dispatch", "combine", "combine backward", "dispatch backward")
_LINKS = ("node", "network")


@dataclass(frozen=True)
class LayerTotals:
    """One MoE layer over passes and ranks. Per expert: int64, on the CPU. rows_sent, rows_received: by purpose, rows
    that stayed on their rank included. rows_moved, bytes_sent: by link class, forward and backward; bytes with
    metadata. rows_own: those of dispatch that stayed. gathered_bytes: of scopes beyond a rank. losses: before
    coefficients, summed over passes."""

    routed_E: Tensor
    kept_E: Tensor
    rerouted_E: Tensor
    dropped_capacity_E: Tensor
    dropped_receive_bound_E: Tensor
    computed_E: Tensor
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

    @property
    def dropped_E(self) -> Tensor:
        return self.dropped_capacity_E + self.dropped_receive_bound_E

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
        for purpose in PURPOSES:
            sent, received, gone = self.rows_sent[purpose], self.rows_received[purpose], self.rows_sent["dispatch"]
            if sent != received:
                found.append(f"{purpose}: {sent} rows were sent, {received} received")
            if sent != gone and not (sent == 0 and purpose.endswith("backward")):  # evaluation has no backward pass
                found.append(f"{purpose}: {sent} rows were sent, but {gone} with tokens")
        return found


def pack(stats: LoadStats) -> Tensor:
    """One pass of one layer on this rank as a vector, float64. Sums of vectors are what `unpack` takes."""
    log = stats.log
    numbers = [
        stats.gathered_bytes,
        total_of(log.rows_sent, ("own",), Phase.DISPATCH, is_backward=False),
        *(_of_purpose(log, purpose, "rows_sent") for purpose in PURPOSES),
        *(_of_purpose(log, purpose, "rows_received") for purpose in PURPOSES),
        *(sum(n for (_, on), n in log.rows_sent.items() if on == link) for link in _LINKS),
        *(sum(n for (_, on), n in log.bytes_sent.items() if on == link) for link in _LINKS),
    ]
    device = stats.routed_E.device
    return torch.cat(
        [
            torch.stack([getattr(stats, name) for name in PER_EXPERT]).flatten().double(),
            torch.stack([stats.num_tokens, stats.num_unserved, stats.entropy]).double(),
            torch.tensor(numbers, dtype=torch.float64).to(device),
            *(value.double().view(1) for value in stats.losses.values()),
        ]
    )


def packed_size(num_experts: int, num_losses: int) -> int:
    """The length of what `pack` makes."""
    return len(PER_EXPERT) * num_experts + 3 + 2 + 2 * len(PURPOSES) + 2 * len(_LINKS) + num_losses


def unpack(total: Tensor, num_experts: int, loss_names: list[str]) -> LayerTotals:
    """total: on the CPU."""
    counts, rest = total[: len(PER_EXPERT) * num_experts].view(-1, num_experts), total[len(PER_EXPERT) * num_experts :]
    numbers = iter(rest.tolist())
    num_tokens, num_unserved, entropy = int(next(numbers)), int(next(numbers)), next(numbers)
    gathered_bytes, rows_own = int(next(numbers)), int(next(numbers))
    per_expert: dict[str, Any] = dict(zip(PER_EXPERT, counts.round().long().unbind(0), strict=True))
    return LayerTotals(
        **per_expert,
        num_tokens=num_tokens,
        num_unserved=num_unserved,
        entropy=entropy,
        gathered_bytes=gathered_bytes,
        rows_own=rows_own,
        rows_sent={purpose: int(next(numbers)) for purpose in PURPOSES},
        rows_received={purpose: int(next(numbers)) for purpose in PURPOSES},
        rows_moved={link: int(next(numbers)) for link in _LINKS},
        bytes_sent={link: int(next(numbers)) for link in _LINKS},
        losses={name: next(numbers) for name in loss_names},
    )


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


def _of_purpose(log: CommLog, purpose: str, counter: str) -> int:
    """Over all hops and links. `dispatch` is not `dispatch backward`."""
    phase, *backward = purpose.split()
    return total_of(getattr(log, counter), ("own", "node", "network"), Phase(phase), is_backward=bool(backward))
