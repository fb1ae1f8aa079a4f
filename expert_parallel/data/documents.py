"""Finds where documents begin in training sequences, and numbers the documents of each sequence.

A document begins after an end token, or where the index of a token file says so. Masks of both kinds can be combined.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expert_parallel.data.indexed import IndexedDataset


@dataclass(frozen=True, eq=False)
class DocumentBoundaries:
    """Tells where the documents of a token file begin: where its index says so, and also after each end token.

    end_id: the id of the token that ends a document; None if it is unknown, or if documents have none.
    """

    indexed: IndexedDataset
    end_id: int | None

    def number(self, tokens: Tensor, begins: Sequence[int]) -> Tensor:
        """Returns the number of each token's document in its window, int64, the shape of `tokens`. tokens: windows,
        int64, (n, S + 1). begins: the index in the file of each window's first token."""
        starts = starts_in_index(self.indexed, begins, tokens.shape[1])
        if self.end_id is not None:
            starts |= starts_after_end_tokens(tokens, self.end_id)
        return number_documents(starts)


def starts_in_index(indexed: IndexedDataset, begins: Sequence[int], length: int) -> Tensor:
    """Returns a mask of the tokens with which the index begins a document, bool, (len(begins), length). begins: the
    index in the file of the first token of each window of `length` tokens."""
    starts = torch.zeros((len(begins), length), dtype=torch.bool)
    for row, begin in zip(starts, begins, strict=True):
        row[torch.from_numpy(indexed.document_begins(begin, begin + length) - begin)] = True
    return starts


def starts_after_end_tokens(tokens: Tensor, end_id: int) -> Tensor:
    """Returns a mask of the tokens that follow an end token in their sequence, bool, the shape of `tokens`, (n, S)."""
    return F.pad(tokens[:, :-1] == end_id, (1, 0))


def number_documents(starts: Tensor) -> Tensor:
    """Returns the number of each token's document in its sequence, counted from 0, int64, (n, S). starts: bool, (n, S),
    True for tokens that begin a document; the first token of a sequence has document 0 in any case."""
    return F.pad(starts[:, 1:].cumsum(1), (1, 0))
