"""One hop of a dispatch: rows, each with the choices that it serves, go to the ranks of a group that lead to their
experts.

A row that several choices need at one destination travels once; on the way back their weighted outputs are one row.
Beside the rows travel, as metadata: each row's number of choices (4 bytes), each choice's expert (4) and weight (4; 8
in float64), and 16 bytes a rank pair: numbers of rows and choices, and what the pass is, which all ranks must agree
on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expert_parallel.collectives import Peers, all_gather_rows, exchange_counts
from expert_parallel.moe.ledger import Ledger
from expert_parallel.moe.permute import NO_ROW, gather_rows, sources_table
from expert_parallel.moe.plan import RoutingPlan, StepContext


@dataclass(frozen=True)
class RowChoices:
    """The kept choices of L rows: sorted by row, within a row in the order of choice. row_N, expert_N: int64."""

    row_N: Tensor
    expert_N: Tensor
    weight_N: Tensor


def choices_of(plan: RoutingPlan) -> RowChoices:
    """A row is a token."""
    choice_N = plan.kept_TK.flatten().nonzero().squeeze(1)
    return RowChoices(
        choice_N // plan.expert_ids_TK.shape[1],
        plan.expert_ids_TK.flatten()[choice_N],
        plan.weights_TK.flatten()[choice_N],
    )


@dataclass(frozen=True)
class Travel:
    """Which rows travel. token_U: the row of x behind each, sorted by destination. rows_L: (L, width), the travelling
    rows of each row of x in the order in which they are added up on return, NO_ROW behind them. choice_N: the choices
    in the order of travel. num_choices_U: of each row. rows_P, choices_P: to each destination. All int64."""

    token_U: Tensor
    rows_L: Tensor
    choice_N: Tensor
    num_choices_U: Tensor
    rows_P: Tensor
    choices_P: Tensor


def plan_travel(
    choices: RowChoices, rank_of_expert_E: Tensor, num_rows: int, num_ranks: int, width: int, merge: bool
) -> Travel:
    """merge: choices of one row at one destination share a travelling row, else each has its own.
    width: choices of a row, at most.

    row-major (t0: e5 e1)(t1: e0 e1)  ->  rank-major (r0: t0 e1)(r0: t1 e0 e1)(r1: t0 e5)
    """
    rank_N = rank_of_expert_E[choices.expert_N]
    if merge:
        pair_N, choice_N = (rank_N * num_rows + choices.row_N).sort(stable=True)  # (rank, row) as one number
        pair_U, num_choices_U = torch.unique_consecutive(pair_N, return_counts=True)
        token_U, rank_U = pair_U % max(num_rows, 1), pair_U // max(num_rows, 1)
        rows_L = sources_table(token_U, num_rows, min(width, num_ranks))
    else:
        rank_U, choice_N = rank_N.sort(stable=True)
        token_U, num_choices_U = choices.row_N[choice_N], torch.ones_like(choice_N)
        place_N = torch.empty_like(choice_N)
        place_N[choice_N] = torch.arange(len(choice_N), device=choice_N.device)
        rows_L = look_up(place_N, sources_table(choices.row_N, num_rows, width))
    rows_P = torch.bincount(rank_U, minlength=num_ranks)
    choices_P = torch.bincount(rank_N, minlength=num_ranks)
    return Travel(token_U, rows_L, choice_N, num_choices_U, rows_P, choices_P)


def look_up(values: Tensor, table: Tensor) -> Tensor:
    """values[table], with NO_ROW left as it is."""
    if len(values) == 0:
        return table
    return torch.where(table == NO_ROW, NO_ROW, values[table.clamp(min=0)])


@dataclass(frozen=True)
class PassKey:
    """What all ranks of a pass must agree on, in two 31-bit numbers that travel with the counts."""

    width: int
    dtype: torch.dtype
    num_choices: int
    needs_grad: bool
    context: StepContext

    # dtype -> its number on the wire.
    DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)

    @property
    def words(self) -> list[int]:
        shape = (
            self.width % 2**17
            | self.needs_grad << 17
            | self.DTYPES.index(self.dtype) << 18
            | self.num_choices % 2**9 << 22
        )
        c = self.context
        return [shape, c.layer % 2**10 | c.micro_step % 2**7 << 10 | c.step % 2**14 << 17]

    @staticmethod
    def say(words: Sequence[int]) -> str:
        shape, place = words
        dtype = PassKey.DTYPES[min(shape >> 18 & 15, 3)]
        return (
            f"rows of {shape % 2**17} {str(dtype).removeprefix('torch.')} {'with' if shape >> 17 & 1 else 'without'} "
            f"gradient, {shape >> 22} choices a token, "
            f"layer {place % 2**10}, micro-step {place >> 10 & 127}, step {place >> 17}"
        )


def agree(key: PassKey, peers: Peers, device: torch.device) -> None:
    """ValueError on every rank of `peers` where one is in another pass. One small collective."""
    words = torch.tensor([key.words], dtype=torch.int32, device=device)
    refuse_disagreement(all_gather_rows(words, [1] * peers.size, peers.group).tolist(), key, peers)


def refuse_disagreement(words_P2: Sequence[Sequence[int]], key: PassKey, peers: Peers) -> None:
    """ValueError that names both ranks, on each of them, instead of a hang or rows that mean something else."""
    for peer, words in enumerate(words_P2):
        if list(words) != key.words:
            raise ValueError(
                f"the ranks are not in the same pass: rank {peers.ranks[peers.me]} brings {PassKey.say(key.words)}; "
                f"rank {peers.ranks[peer]} brings {PassKey.say(words)} (steps modulo 16384)"
            )


@dataclass(frozen=True)
class HopState:
    travel: Travel
    send: list[int]
    receive: list[int]


class Hop:
    """rank_of_expert: which of the peers leads to each expert. exchange_dtype: what rows travel in; None: as they
    are."""

    def __init__(
        self, name: str, peers: Peers, rank_of_expert: Sequence[int], merge: bool, exchange_dtype: torch.dtype | None
    ) -> None:
        self.name, self.peers, self.merge, self.exchange_dtype = name, peers, merge, exchange_dtype
        self.rank_of_expert_E = torch.tensor(rank_of_expert, device="cpu")  # even where a model is built on meta

    def send(
        self, x_LD: Tensor, choices: RowChoices, key: PassKey, ledger: Ledger
    ) -> tuple[Tensor, RowChoices, HopState]:
        """The rows that arrive here, by source rank, and their choices."""
        travel = self._plan(x_LD, choices, key)
        send, send_choices, receive, receive_choices = self._exchange_counts(travel, key, ledger)
        x_UD = self._narrow(gather_rows(x_LD, travel.token_U, travel.rows_L))
        x_VD = ledger.exchange(x_UD, send, receive, self.peers, f"{self.name}dispatch").to(x_LD.dtype)

        def metadata(values: Tensor, send: list[int], receive: list[int]) -> Tensor:
            return ledger.exchange(values, send, receive, self.peers, "metadata", payload=False)

        num_choices_V = metadata(travel.num_choices_U.to(torch.int32), send, receive)
        expert_N = metadata(choices.expert_N[travel.choice_N].to(torch.int32), send_choices, receive_choices).long()
        weight_N = metadata(choices.weight_N[travel.choice_N], send_choices, receive_choices)
        row_V = torch.arange(len(x_VD), device=x_VD.device)
        row_N = row_V.repeat_interleave(num_choices_V, output_size=sum(receive_choices))
        return x_VD, RowChoices(row_N, expert_N, weight_N), HopState(travel, send, receive)

    def back(self, y_VD: Tensor, state: HopState, ledger: Ledger) -> Tensor:
        """What the arrived rows became, back at the rows that they came from, added up in a fixed order."""
        y_UD = ledger.exchange(self._narrow(y_VD), state.receive, state.send, self.peers, f"{self.name}combine")
        return gather_rows(y_UD.to(y_VD.dtype), state.travel.rows_L, state.travel.token_U)

    def _plan(self, x_LD: Tensor, choices: RowChoices, key: PassKey) -> Travel:
        self.rank_of_expert_E = self.rank_of_expert_E.to(x_LD.device)
        return plan_travel(choices, self.rank_of_expert_E, len(x_LD), self.peers.size, key.num_choices, self.merge)

    def _exchange_counts(
        self, travel: Travel, key: PassKey, ledger: Ledger
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """(rows to send, choices to send, rows to receive, choices to receive), for each peer."""
        words_P2 = travel.rows_P.new_tensor([key.words]).expand(self.peers.size, 2)
        sent_P4 = torch.cat([torch.stack([travel.rows_P, travel.choices_P], 1), words_P2], 1).to(torch.int32)
        received_P4 = exchange_counts(sent_P4, self.peers.group)
        for link in self.peers.links:
            ledger.log.bytes_sent["counts", link] += sent_P4[0].numel() * sent_P4.element_size()
        (send, send_choices, _, _), (receive, receive_choices, *words) = torch.stack([sent_P4, received_P4]).mT.tolist()
        refuse_disagreement(list(zip(*words, strict=True)), key, self.peers)
        return send, send_choices, receive, receive_choices

    def _narrow(self, x: Tensor) -> Tensor:
        return x if self.exchange_dtype is None else x.to(self.exchange_dtype)
