"""Implements what multi-token prediction adds to a transformer block: its settings, the input and output of its blocks,
and the tokens that they are given (DeepSeek-V3, 2412.19437, section 2.2).

Depth k predicts the token k + 1 places later. With h_0 the output of the final norm:

    h_k(i) = norm_k(block_k(M_k [norm_e(embedding of token i + k) | norm_h(h_{k-1}(i))]))

and the logits are those of the shared output projection. The order [embedding | hidden] and the norm on h_0 are those
of the published files and of the code that runs them, which the paper's equation 21 leaves open.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from expert_parallel.nn.ffn import Linear
from expert_parallel.settings import Settings

IGNORED = -100  # the target of a position that has none


class MTPConfig(Settings):
    """Trains the model to predict further tokens beside the next one, with a block of its own for each of them
    (multi-token prediction, DeepSeek-V3 and GLM-4.5). Generation does not use these blocks."""

    depth: int = Field(default=1, ge=1, le=1000)
    """Sets the number of further tokens, each predicted by one more block, which is like the model's last block."""
    weight: float = Field(default=0.3, ge=0)
    """Multiplies the mean of the further tokens' cross entropies in the loss (DeepSeek-V3, GLM-4.5: 0.3, at the end
    0.1)."""


class MTPProjection(nn.Module):
    """Merges the hidden state and the embedding of a later token into the input of a block, and normalizes its output.

    has_final_norm: False for a model without a final norm, whose blocks end with a norm.
    """

    def __init__(self, norm: Callable[[], nn.Module], d_model: int, has_final_norm: bool) -> None:
        super().__init__()
        self.embedding_norm, self.hidden_norm = norm(), norm()
        self.projection = Linear(2 * d_model, d_model, bias=False)
        self.final_norm = norm() if has_final_norm else None

    def merge(self, x: Tensor) -> Tensor:
        """Returns M [norm_e(embedding) | norm_h(hidden)], (B, S, D). x: [embedding | hidden], (B, S, 2 D)."""
        embedding, hidden = x.chunk(2, -1)
        merged: Tensor = self.projection(torch.cat([self.embedding_norm(embedding), self.hidden_norm(hidden)], -1))
        return merged

    def normalize(self, x: Tensor) -> Tensor:
        """Returns the output of the block, (B, S, D), normalized."""
        return x if self.final_norm is None else self.final_norm(x)


def shift(rows_BS: Tensor, depth: int, fill: int) -> Tensor:
    """Returns rows in which each position has the value that is `depth` places later, and `fill` where the row has
    ended. rows_BS: (B, S), of any dtype."""
    return F.pad(rows_BS[:, depth:], (0, min(depth, rows_BS.shape[1])), value=fill)


def has_target(tokens_BS: Tensor, depth: int, document_BS: Tensor | None, mask_BS: Tensor | None = None) -> Tensor:
    """Returns a mask of the positions at which `depth` predicts a token, bool (B, S).

    It is True at i if the token at i + depth, the last that the prediction is made from, is in the row and in the
    document of the token at i. So documents that are packed into a row have the targets that they have in rows of their
    own, and the first token after a document is a target, as it is for the prediction of the next token. document_BS:
    int64, the documents of the tokens; None: a row is one document. mask_BS: bool, False for padding; None: there is
    none.
    """
    real_BS = torch.ones_like(tokens_BS, dtype=torch.bool) if mask_BS is None else mask_BS
    found_BS = real_BS & shift(real_BS, depth, fill=False)
    if document_BS is not None:
        found_BS = found_BS & (shift(document_BS, depth, fill=-1) == document_BS)
    return found_BS


def targets_ahead(targets_BS: Tensor, depth: int, document_BS: Tensor | None) -> Tensor:
    """Returns the targets of `depth`, int64 (B, S), IGNORED where there is none.

    targets_BS: each position's next token, int64. document_BS: int64, the documents of the positions; None: a row is
    one document.
    """
    return shift(targets_BS, depth, fill=0).masked_fill(~has_target(targets_BS, depth, document_BS), IGNORED)
