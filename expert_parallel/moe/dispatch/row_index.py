"""Implements the index arithmetic of an exchange, without communication: which rows are sent to which ranks.

Except in `without_dropped`, the host does not wait for the number of dropped choices: tensors have the size of all
choices, and dropped ones come last. An example, for two ranks with experts 0, 1 | 2, 3 and three tokens with two
choices each, of which t1's second is dropped:

    `ChoicesByRow`   row_N 0 0 1 1 2 2, expert_N 2 0 3 `NO_EXPERT` 1 3
    `ChoicesByRank`  rank 0: t0 e0, t2 e1; rank 1: t0 e2, t1 e3, t2 e3; dropped: t1
    `SendIndex`      token_U 0 2 0 1 2 (each token once to a rank); rows_L, the indices in token_U of each token:
                     t0: 0 2, t1: NO_ROW 3, t2: 1 4
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expert_parallel.moe.dispatch.permute import NO_ROW, count_keys, inverse_permutation, stable_argsort

# The expert of a dropped choice. As an index it reads the last entry: tables that are read with it (names in E1) have
# one entry more than there are experts. NO_ROW has the same value and is used in tables of rows.
NO_EXPERT = -1


class IndexTable(nn.Module):
    """Holds a constant table of integers on the device of the module to which it belongs.

    values: int64, one for each key. Not a buffer: DistributedDataParallel would overwrite it with rank 0's values, and
    `to_empty` would lose them.
    """

    def __init__(self, values: Sequence[int]) -> None:
        super().__init__()
        self.values = torch.tensor(values, device="cpu")  # even if the model is built on the meta device

    def forward(self, key_N: Tensor) -> Tensor:
        """Returns the value of each key."""
        return self.values_on(key_N.device)[key_N]

    def values_on(self, device: torch.device) -> Tensor:
        """Returns all values on a device. They are moved here only if the weights were moved without `Module.to`, as
        `fully_shard` does."""
        if self.values.device != device:
            self.values = self.values.to(device)
        return self.values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IndexTable":
        """Moves the values with the module, but not to the meta device, and never casts them."""
        device = fn(self.values).device
        if device.type != "meta":
            self.values = self.values.to(device)
        return self


@dataclass(frozen=True)
class ChoicesByRow:
    """Lists the choices of L rows, sorted by row and, within a row, in choice order.

    row_N: int64, the row of each choice. expert_N: int64, its expert id; `NO_EXPERT` if the choice is dropped.
    weight_N: router dtype, the factor of its expert's output. num_rows: L.
    """

    row_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    num_rows: int


def choices_by_row(expert_ids_TK: Tensor, kept_TK: Tensor, weights_TK: Tensor) -> ChoicesByRow:
    """Returns the choices of T tokens as a ChoicesByRow, with one row for each token."""
    num_tokens, num_choices = expert_ids_TK.shape
    row_T1 = torch.arange(num_tokens, device=expert_ids_TK.device)[:, None]
    expert_TK = expert_ids_TK.masked_fill(~kept_TK, NO_EXPERT)
    return ChoicesByRow(row_T1.expand(-1, num_choices).flatten(), expert_TK.flatten(), weights_TK.flatten(), num_tokens)


def without_dropped(choices: ChoicesByRow) -> ChoicesByRow:
    """Returns the choices that are not dropped. The host waits for their number."""
    if choices.expert_N.is_cpu and bool((choices.expert_N != NO_EXPERT).all()):
        return choices
    choice_N = (choices.expert_N != NO_EXPERT).nonzero().squeeze(1)
    if len(choice_N) == len(choices.expert_N):
        return choices
    return ChoicesByRow(
        choices.row_N[choice_N], choices.expert_N[choice_N], choices.weight_N[choice_N], choices.num_rows
    )


@dataclass(frozen=True)
class ChoicesByRank:
    """Lists choices sorted by destination rank, then by row; dropped choices come last. Integers are int64.

    choice_N: the index, in ChoicesByRow, of the choice at each position of this list. rank_N: its destination rank, P
    if it is dropped. first_N: bool, True for the first choice of each sent row. rows_P, choices_P: the numbers of rows
    and of choices for each destination rank.
    """

    choice_N: Tensor
    rank_N: Tensor
    first_N: Tensor
    rows_P: Tensor
    choices_P: Tensor


def sort_choices_by_rank(choices: ChoicesByRow, rank_N: Tensor, num_ranks: int, dedup: bool) -> ChoicesByRank:
    """Sorts choices by destination rank.

    rank_N: int64, the destination rank of each choice, num_ranks if it is dropped. `dedup`: True if choices of one row
    with the same destination share a sent row; otherwise each choice has its own.

        by row (t0: e5 e1)(t1: e0 e1)  ->  by rank (r0: t0 e1)(r0: t1 e0 e1)(r1: t0 e5)
    """
    choice_N = stable_argsort(rank_N, num_ranks + 1)
    rank_N = rank_N.index_select(0, choice_N)
    first_N = torch.ones_like(rank_N, dtype=torch.bool)
    if dedup:
        row_N = choices.row_N.index_select(0, choice_N)
        first_N[1:] = (row_N[1:] != row_N[:-1]) | (rank_N[1:] != rank_N[:-1])
    choices_P = count_keys(rank_N, num_ranks + 1)
    rows_P = rank_N.new_zeros(num_ranks + 1).scatter_add_(0, rank_N, first_N.long()) if dedup else choices_P
    return ChoicesByRank(choice_N, rank_N, first_N, rows_P[:num_ranks], choices_P[:num_ranks])


@dataclass(frozen=True)
class SendIndex:
    """Holds the indices of the rows that are sent, and of the rows whose outputs are summed when they return.

    token_U: for each row that is sent, the index of the row of x that it copies; sorted by destination rank. rows_L:
    (L, width), for each row of x, the indices of its copies among the sent rows, in the order in which their outputs
    are summed; NO_ROW adds nothing. place_N: the position of each choice in `ChoicesByRank`. token_U has N entries, of
    which the first U are valid, since the host does not know U yet.
    """

    token_U: Tensor
    rows_L: Tensor
    place_N: Tensor


def build_send_index(choices: ChoicesByRow, order: ChoicesByRank, width: int, dedup: bool) -> SendIndex:
    """Computes the SendIndex of `choices`, sorted by rank as in `order`. width: the largest number of choices of a
    row."""
    place_N = inverse_permutation(order.choice_N)
    num_ranks = len(order.rows_P)
    row_N = choices.row_N.index_select(0, order.choice_N)
    if not dedup:
        sent_N = torch.where(choices.expert_N == NO_EXPERT, NO_ROW, place_N)
        return SendIndex(row_N, row_table(choices, sent_N, width), place_N)
    sent_N = order.first_N.cumsum(0) - 1  # the sent row of each choice
    token_U = torch.empty_like(row_N).scatter_(0, sent_N, row_N)
    rows_L = row_N.new_full((choices.num_rows, num_ranks + 1), NO_ROW)
    rows_L.view(-1).scatter_(0, row_N * (num_ranks + 1) + order.rank_N, sent_N)
    return SendIndex(token_U, _compact_columns(rows_L[:, :num_ranks], width), place_N)


def row_table(choices: ChoicesByRow, value_N: Tensor, width: int) -> Tensor:
    """Returns (L, width): row l lists the values of its choices, in their order; NO_ROW fills the rest.

    width: the largest number of choices of a row.
    """
    if len(value_N) == choices.num_rows * width:  # every row has `width` choices
        return value_N.view(-1, width)
    table = value_N.new_full((choices.num_rows * width,), NO_ROW)
    return table.scatter_(0, choices.row_N * width + column_of_choice(choices), value_N).view(-1, width)


def column_of_choice(choices: ChoicesByRow) -> Tensor:
    """Returns the index of each choice among those of its row, int64 (N)."""
    counts_L = count_keys(choices.row_N, choices.num_rows)
    start_L = counts_L.cumsum(0) - counts_L
    return torch.arange(len(choices.row_N), device=choices.row_N.device) - start_L.index_select(0, choices.row_N)


def _compact_columns(table: Tensor, width: int) -> Tensor:
    """Moves the entries of each row to the front and returns the first `width` columns, in which all of them fit."""
    if table.shape[1] <= width:
        return table
    present = table != NO_ROW
    column = torch.where(present, present.cumsum(1) - 1, width)
    return table.new_full((len(table), width + 1), NO_ROW).scatter_(1, column, table)[:, :width]
