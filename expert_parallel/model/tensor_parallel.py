"""Applies tensor and sequence parallelism to a Transformer: Shoeybi et al. 2019, Korthikanti et al. 2022.

Outside attention and feed-forwards every rank holds its own tokens. They are all-gathered over tp in front of attention
and dense feed-forwards; each rank computes some of the heads (or hidden columns) for all tokens; the partial outputs
are reduce-scattered back. The embedding table and the logits are split by vocabulary.

DTensor's parallel styles do not fit: gated matrices hold [gate | up] side by side, there may be fewer key heads than
ranks, vocabularies need not divide evenly, and FSDP2 shards the local tensors that remain.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from expert_parallel.model.attention import Attention
from expert_parallel.model.latent_attention import LatentAttention
from expert_parallel.nn.ffn import FFN, GATED, Linear
from expert_parallel.nn.norms import RMSNorm, WholeNorm
from expert_parallel.parallel.collectives import (
    all_gather_single,
    all_reduce_sum,
    group_rank,
    group_size,
    reduce_scatter_single,
)
from expert_parallel.parallel.sharding import shard_parameter


class GatherTokens(torch.autograd.Function):
    """All-gathers (..., T, D) of each of P ranks to (..., P * T, D) in rank order. Gradients are reduce-scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_tokens(grad, ctx.group), None


class ReduceScatterTokens(torch.autograd.Function):
    """Sums (..., P * T, D) over the ranks and returns this rank's (..., T, D). Gradients are all-gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_tokens(grad, ctx.group), None


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gathers (..., T, D) of each of P ranks to (..., P * T, D) in rank order. It has no gradient: see
    GatherTokens."""
    rows = x.movedim(-2, 0).contiguous()
    gathered = rows.new_empty(group_size(group) * rows.shape[0], *rows.shape[1:])
    all_gather_single(gathered, rows, group=group)
    return gathered.movedim(0, -2).contiguous()


def reduce_scatter_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sums (..., P * T, D) over the P ranks, in the dtype of x, and returns this rank's (..., T, D). It has no
    gradient: see ReduceScatterTokens."""
    rows = x.movedim(-2, 0).contiguous()
    own = rows.new_empty(rows.shape[0] // group_size(group), *rows.shape[1:])
    reduce_scatter_single(own, rows, group=group)
    return own.movedim(0, -2).contiguous()


class AllReduceSum(torch.autograd.Function):
    """Sums x over the ranks. The gradient is summed too, since each rank back-propagates its own share of the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad, ctx.group), None


class RowParallelLinear(Linear):
    """Multiplies with a matrix that is split along its input columns. (..., P * T, in / P) -> (..., T, out).

    The partial outputs are reduce-scattered to each rank's own tokens; the bias is added once, after the sum.
    """

    def __init__(self, whole: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=whole.bias is not None, device="meta")
        self.group = group
        shard_parameter(self, "weight", -1, group)

    def forward(self, x: Tensor) -> Tensor:
        partial = F.linear(x, self.weight.to(x.dtype))
        y = ReduceScatterTokens.apply(partial, self.group)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class TensorParallelRMSNorm(RMSNorm):
    """Computes the RMS norm of rows whose columns are split over the ranks; the mean square is over all columns.

    copies: the number of consecutive ranks that hold the same columns (key heads that several ranks share).
    """

    def __init__(self, whole: WholeNorm, group: dist.ProcessGroup, copies: int) -> None:
        super().__init__(len(whole.weight), whole.eps)
        self.width = len(whole.weight)
        self.group = group
        self.copies = copies
        shard_parameter(self, "weight", -1, group, copies=copies)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes x (..., local columns) in float32 or wider, and returns it in the dtype of x."""
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        # Shared columns enter the sum once per copy: hence the division.
        squares = AllReduceSum.apply(wide.square().sum(-1, keepdim=True), self.group) / self.copies
        return (wide * torch.rsqrt(squares / self.width + self.eps) * self.weight.to(wide.dtype)).to(x.dtype)


class VocabularyParallelEmbedding(nn.Embedding):
    """Looks up tokens in a table whose rows are split over the ranks. (B, P * T), int64 -> (B, T, D) in `dtype`.

    Each rank contributes zeros for tokens of other ranks' rows, and the sum is reduce-scattered. Exactly one summand is
    not zero, so nothing is rounded, in any dtype.
    """

    def __init__(self, whole: nn.Embedding, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        super().__init__(whole.num_embeddings, whole.embedding_dim, device="meta")
        self.group, self.dtype = group, dtype
        shard_parameter(self, "weight", -2, group)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        local_BS = tokens_BS - vocab_start_index(self.num_embeddings, self.group)
        is_here_BS = (local_BS >= 0) & (local_BS < len(self.weight))
        x_BSD = F.embedding(local_BS.clamp(0, len(self.weight) - 1), self.weight).to(self.dtype)
        x_BSD = x_BSD * is_here_BS[..., None]
        return ReduceScatterTokens.apply(x_BSD, self.group)


def vocab_start_index(vocab_size: int, group: dist.ProcessGroup | None) -> int:
    """Returns the first token id of this rank's vocabulary shard. The vocabulary is divided as by
    `torch.tensor_split`."""
    small, larger = divmod(vocab_size, group_size(group))
    return group_rank(group) * small + min(group_rank(group), larger)


class _CrossEntropy(torch.autograd.Function):
    """Sums logsumexp(logits) - logit of the target over tokens, with logits split by vocabulary: (T, V / P). Negative
    targets are ignored.

    Every rank returns the same sum. The gradient of a rank's logits needs no communication.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, group: dist.ProcessGroup, vocab_size: int) -> Tensor:
        largest_T = logits_TV.amax(1)  # subtracted, so that exp does not overflow
        dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
        shifted_TV = logits_TV - largest_T[:, None]
        local_T = targets_T - vocab_start_index(vocab_size, group)
        is_here_T = (local_T >= 0) & (local_T < logits_TV.shape[1])
        local_T = local_T.clamp(0, logits_TV.shape[1] - 1)
        target_T = shifted_TV.gather(1, local_T[:, None]).squeeze(1) * is_here_T
        exp_TV = shifted_TV.exp()
        sums_T, target_logits_T = all_reduce_sum(torch.stack([exp_TV.sum(1), target_T]), group)
        is_target_T = targets_T >= 0
        ctx.save_for_backward(exp_TV / sums_T[:, None], local_T, is_here_T, is_target_T)
        return ((sums_T.log() - target_logits_T) * is_target_T).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        softmax_TV, local_T, is_here_T, is_target_T = ctx.saved_tensors
        logits_grad_TV = softmax_TV.scatter_add(1, local_T[:, None], -is_here_T[:, None].to(softmax_TV.dtype))
        return logits_grad_TV * (grad * is_target_T)[:, None], None, None, None


def cross_entropy_sum(
    logits_BSV: Tensor, targets_BS: Tensor, group: dist.ProcessGroup | None = None, vocab_size: int = 0
) -> Tensor:
    """Returns the sum of -log p(target) over all tokens, in nats, a scalar in float32 or wider.

    logits_BSV: (B, S, V), or (B, S, V / P) if they are split by vocabulary over `group`; they are never gathered, and
    every rank returns the whole sum. targets_BS: int64; those of -100 are ignored. vocab_size: V, needed with a group.
    """
    # float32 or wider: a sum over thousands of tokens, each a sum over the vocabulary, would be noise in bfloat16.
    wide = logits_BSV.to(torch.promote_types(torch.float32, logits_BSV.dtype)).flatten(0, 1)
    if group is None:
        return F.cross_entropy(wide, targets_BS.flatten(), reduction="sum")
    return _CrossEntropy.apply(wide, targets_BS.flatten(), group, vocab_size)


def gather_logits(logits_BSV: Tensor, group: dist.ProcessGroup | None, vocab_size: int) -> Tensor:
    """All-gathers logits (..., V / P), split by vocabulary, to (..., V). No gradient; used by generation."""
    if group is None:
        return logits_BSV
    widths = [len(part) for part in torch.arange(vocab_size).tensor_split(group_size(group))]
    padded = F.pad(logits_BSV.detach(), (0, max(widths) - logits_BSV.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)


# ------------------------------------------------------------------------------- applying it to the modules of a model


def apply_tp_to_attention(attention: Attention, group: dist.ProcessGroup, kv_copies: int) -> None:
    """Splits the heads of an attention module over `group`, in place. kv_copies: the number of consecutive ranks that
    hold the same key and value heads."""
    _apply_column_parallel(attention.query, group)
    _apply_column_parallel(attention.key, group, copies=kv_copies)
    _apply_column_parallel(attention.value, group, copies=kv_copies)
    attention.out = RowParallelLinear(attention.out, group)
    for name, copies in (("query_norm", 1), ("key_norm", kv_copies)):
        norm = getattr(attention, name)
        if isinstance(norm, WholeNorm):
            setattr(attention, name, TensorParallelRMSNorm(norm, group, copies))
    if attention.sinks is not None:
        shard_parameter(attention, "sinks", -1, group)
    attention.gather_sequence = partial(_gather_tokens, group=group)


def apply_tp_to_latent_attention(attention: LatentAttention, group: dist.ProcessGroup) -> None:
    """Splits the heads of a latent attention module over `group`.

    The module is changed in place. The projections down to the latents stay whole on every rank. Each rank applies them
    to its own tokens, and the latents are gathered; so the gradients of these weights come from the rank's own tokens
    only, and must be summed over `group`.
    """
    _apply_column_parallel(attention.query if attention.config.query_rank is None else attention.query_up, group)
    _apply_column_parallel(attention.kv_up, group)
    attention.out = RowParallelLinear(attention.out, group)
    attention.gather_sequence = partial(_gather_tokens, group=group)


def _gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gathers tokens, with gradients; `functools.partial` cannot bind an argument of GatherTokens.apply by name."""
    return GatherTokens.apply(x, group)


def apply_tp_to_ffn(ffn: FFN, group: dist.ProcessGroup) -> None:
    """Splits the hidden columns of a dense feed-forward network over `group`, in place."""
    _apply_column_parallel(ffn.w_in, group, blocks=2 if ffn.activation in GATED else 1)
    ffn.w_out = RowParallelLinear(ffn.w_out, group)
    ffn.gather_sequence = partial(_gather_tokens, group=group)


def _apply_column_parallel(linear: nn.Linear, group: dist.ProcessGroup, blocks: int = 1, copies: int = 1) -> None:
    """Splits the output columns of a linear layer, and its bias, over `group`."""
    shard_parameter(linear, "weight", -2, group, blocks, copies)
    if linear.bias is not None:
        shard_parameter(linear, "bias", -1, group, blocks, copies)
