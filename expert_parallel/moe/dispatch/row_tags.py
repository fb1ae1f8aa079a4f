"""Attaches a tag to each row that is sent, and finds faults in the rows that arrive, for `ledger: {kind: rows}`.

A tag has 16 bytes, two int64: first the row's number (rank of its token, rank of its expert, index of the row among
those of this pair); then the hash of the row's content plus the number of the pass (step, layer, micro-step, exchange,
direction, chunk). The receiver knows both numbers and computes the hash, which leaves the pass that a row belongs to.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_parallel.moe.dispatch.checksums import ALL_RANKS, RowBlocks, hash_rows, unpack_number
from expert_parallel.parallel.collectives import ExchangeKey, Hop, Phase, as_bytes, from_bytes

TAG_BYTES = 16
MAX_FAULTS = 4  # named in one message
_PHASES = tuple(Phase)
_HOPS: tuple[Hop, ...] = ("", "between nodes", "within the node")
_STEP_WINDOW = 1000  # a step further away than this is taken for the result of altered content


@dataclass(frozen=True)
class ExchangePass:
    """Identifies one exchange of one chunk of rows in a run. `number` fits in 55 bits; large values wrap around."""

    step: int
    layer: int
    micro_step: int
    key: ExchangeKey
    chunk: int

    @property
    def number(self) -> int:
        """Returns the fields packed into a positive integer. The phase counts from 1, so that 0 stands for no pass."""
        phase, hop = _PHASES.index(self.key.phase) + 1, _HOPS.index(self.key.hop)
        exchange = phase | hop << 3 | self.key.is_backward << 5
        place = self.chunk % 2**6 << 6 | self.micro_step % 2**10 << 12 | self.layer % 2**10 << 22
        return exchange | place | self.step % 2**23 << 32

    @staticmethod
    def from_number(number: int) -> "ExchangePass | None":
        """Inverts `number`. Returns None if it is the number of no pass."""
        phase, hop, step = number & 7, number >> 3 & 3, number >> 32
        if not 1 <= phase <= len(_PHASES) or hop >= len(_HOPS) or not 0 <= step < 2**23:
            return None
        key = ExchangeKey(_PHASES[phase - 1], _HOPS[hop], bool(number >> 5 & 1))
        return ExchangePass(step, number >> 22 & 1023, number >> 12 & 1023, key, number >> 6 & 63)

    def __str__(self) -> str:
        return f"layer {self.layer}, step {self.step}, micro-step {self.micro_step}, {self.key}, chunk {self.chunk}"


def attach_tags(rows: Tensor, blocks: RowBlocks, exchange_pass: ExchangePass) -> Tensor:
    """Returns (V, bytes of a row + 16), uint8: each row followed by its tag."""
    sum_V = hash_rows(rows) + exchange_pass.number
    tag_V2 = torch.stack([blocks.number_rows(rows.device), sum_V], 1)
    return torch.cat([as_bytes(rows), as_bytes(tag_V2)], dim=1)


def detach_tags(
    arrived: Tensor, like: Tensor, blocks: RowBlocks, exchange_pass: ExchangePass, me: int
) -> tuple[Tensor, list[str]]:
    """Returns the rows without their tags, and a sentence for each fault that the tags show. The host waits.

    arrived: uint8, as `attach_tags` made them. like: a tensor with the dtype and trailing shape of the rows. me: this
    rank.
    """
    content, tags = arrived.split([arrived.shape[1] - TAG_BYTES, TAG_BYTES], dim=1)
    rows = from_bytes(content, like)
    number_V, sum_V = from_bytes(tags, torch.empty(0, 2, dtype=torch.int64)).unbind(1)
    pass_V = sum_V - hash_rows(rows)
    expected_V = blocks.number_rows(arrived.device)
    if len(number_V) == len(expected_V):
        is_wrong_V = (number_V != expected_V) | (pass_V != exchange_pass.number)
        if not bool(is_wrong_V.any()):  # the host waits
            return rows, []
    numbers = number_V.tolist()  # the host waits here and below only if a row is wrong
    faults = _misplaced(numbers, expected_V.tolist(), me)
    for number, found in zip(numbers, pass_V.tolist(), strict=True):
        if found != exchange_pass.number:
            faults.add((number, _explain_pass(found, exchange_pass)))
    return rows, [_describe(number, exchange_pass.key, me, what) for number, what in sorted(faults)]


def _misplaced(numbers: Sequence[int], expected: Sequence[int], me: int) -> set[tuple[int, str]]:
    """Returns (number of the row, what happened) for rows that are missing, additional or out of order."""
    times, wanted = Counter(numbers), set(expected)
    faults = {(number, "was lost") for number in wanted - set(numbers)}
    faults |= {(number, "came twice") for number in wanted if times[number] > 1}
    faults |= {(number, f"was not for rank {me}") for number in set(numbers) - wanted}
    if faults:
        return faults
    pairs = zip(numbers, expected, strict=True)
    return {(right, "is out of order") for found, right in pairs if found != right}


def _explain_pass(found: int, expected: ExchangePass) -> str:
    """Describes a row whose pass number is `found`. It is of another pass if that number is plausible, and altered
    otherwise."""
    other = ExchangePass.from_number(found)
    if other is None or abs(other.step - expected.step % 2**23) > _STEP_WINDOW:
        return "was altered"
    return f"is of {other}"


def _describe(number: int, key: ExchangeKey, me: int, what: str) -> str:
    token_rank, expert_rank, index = unpack_number(number)
    expert_rank = me if expert_rank == ALL_RANKS else expert_rank
    source, destination = (token_rank, expert_rank) if key.to_experts else (expert_rank, token_rank)
    return f"rank {source} -> rank {destination}, row {index} {what}"


def summarise(faults: Sequence[str]) -> str:
    """Returns the first faults in one sentence, and the number of those that it leaves out."""
    left_out = len(faults) - MAX_FAULTS
    return "; ".join(faults[:MAX_FAULTS]) + (f"; and {left_out} more" if left_out > 0 else "")
