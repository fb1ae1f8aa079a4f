"""Computes the input, targets and loss of multi-token prediction for reference.py, slow and simple: position by
position, from DeepSeek-V3 (2412.19437), equations 21 to 25, without any code of model/ or training/."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Norm = Callable[[Tensor], Tensor]


def has_target(document_BS: Tensor, depth: int) -> Tensor:
    """Returns a mask of the positions whose token `depth` places later is in the row and in the same document, bool (B,
    S)."""
    found = torch.zeros_like(document_BS, dtype=torch.bool)
    for b, row in enumerate(document_BS.tolist()):
        for s in range(len(row) - depth):
            found[b, s] = row[s + depth] == row[s]
    return found


def tokens_ahead(tokens_BS: Tensor, depth: int) -> Tensor:
    """Returns the token `depth` places later, 0 behind the end of the row."""
    ahead_BS = torch.zeros_like(tokens_BS)
    for s in range(tokens_BS.shape[1] - depth):
        ahead_BS[:, s] = tokens_BS[:, s + depth]
    return ahead_BS


def merged_input(projection: Tensor, norms: list[Norm], embedding_BSD: Tensor, hidden_BSD: Tensor) -> Tensor:
    """Computes equation 21 with the halves in the order of the published weights: embedding first. norms: of the
    embedding and of the hidden state. projection: (D, 2 D)."""
    d_model = hidden_BSD.shape[-1]
    of_embedding, of_hidden = projection[:, :d_model], projection[:, d_model:]
    return norms[0](embedding_BSD) @ of_embedding.T + norms[1](hidden_BSD) @ of_hidden.T


@dataclass
class FurtherTokens:
    """Adds up the cross entropies of each depth over the micro-steps of a step. sums: in nats, with gradients. counts:
    the numbers of targets."""

    sums: list[Tensor]
    counts: list[int]

    @classmethod
    def of(cls, model: Any) -> "FurtherTokens":
        """Returns sums of nothing for a model, a ModelConfig."""
        depths = 0 if model.mtp is None else model.mtp.depth
        return cls([torch.zeros((), dtype=torch.float64) for _ in range(depths)], [0] * depths)

    def add(self, logits: list[Tensor], targets_BS: Tensor, document_BS: Tensor | None) -> None:
        """Adds one micro-step. logits: by depth, (B, S, V). targets_BS: the next token of each position."""
        document_BS = torch.zeros_like(targets_BS) if document_BS is None else document_BS
        for index, logits_BSV in enumerate(logits):
            mask_BS, wanted_BS = has_target(document_BS, index + 1), tokens_ahead(targets_BS, index + 1)
            found_BS = torch.log_softmax(logits_BSV, -1).gather(-1, wanted_BS[..., None])[..., 0]
            self.sums[index] = self.sums[index] - found_BS[mask_BS].sum()
            self.counts[index] += int(mask_BS.sum())

    def weighted(self, model: Any) -> Tensor:
        """Returns equation 25, weight / depths * the sum of the means, a scalar."""
        parts = [total / max(1, count) for total, count in zip(self.sums, self.counts, strict=True)]
        return sum((model.mtp.weight / len(parts) * part for part in parts), torch.zeros((), dtype=torch.float64))

    def means(self) -> list[float]:
        """Returns the mean cross entropy of each depth, nats per token."""
        return [float(total.detach()) / max(1, count) for total, count in zip(self.sums, self.counts, strict=True)]
