"""Builds a plain PyTorch decoder in which each peer's MoE layers are trained.

It has what ours has: pre-norm, rotary positions, SDPA attention, and tied embeddings."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from expert_parallel.bench.peers.implementation import Case, Implementation
from expert_parallel.bench.shapes import TrainShape


class TrainableModel:
    """Trains a peer's model by AdamW, one step at a time.

    logits: function (B, S) tokens -> (B, S, V). replicated_parameters: those that all ranks hold, whose gradients are
    summed over ranks. execution_context: context in which forward and backward run. layers: its MoE layers, where
    known."""

    def __init__(
        self,
        model: nn.Module,
        logits: Callable[[Tensor], Tensor],
        replicated_parameters: Sequence[nn.Parameter],
        case: Case,
        computes: str,
        version: str,
        execution_context: Callable[[], AbstractContextManager[None]] = nullcontext,
        layers: Sequence[Implementation] = (),
    ) -> None:
        self.model, self.logits = model, logits
        self.replicated_parameters = replicated_parameters
        self.execution_context = execution_context
        self.case, self.layers = case, layers
        self.computes, self.version = computes, version
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(self, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Takes one training step on (inputs_BS, targets_BS), and returns this rank's sum of the cross entropy."""
        with self.execution_context():
            logits = self.logits(inputs_BS).flatten(0, 1).float()  # the loss is float32 in every dtype, as in ours
            loss = F.cross_entropy(logits, targets_BS.flatten(), reduction="sum")
            (loss / self.case.shape.tokens).backward()
        self._sum_gradients()
        # The norm of this rank's gradients alone: the norm over all ranks, as ours has it, would add an all-reduce.
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def dropped_share(self) -> float | None:
        """Returns the share of this rank's choices that the last step dropped, over its layers; None where these are
        not known."""
        if not self.layers:
            return None
        return sum(layer.dropped_share() for layer in self.layers) / len(self.layers)

    def _sum_gradients(self) -> None:
        """Sums the gradients of replicated parameters over the ranks, in one flat buffer."""
        if self.case.group is None:
            return
        gradients = [parameter.grad for parameter in self.replicated_parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.case.group)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


class DecoderAttention(nn.Module):
    """Computes causal self-attention with rotary positions."""

    def __init__(self, d_model: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.num_heads, self.head_size = num_heads, head_size
        self.qkv = nn.Linear(d_model, 3 * num_heads * head_size, bias=False)
        self.out = nn.Linear(num_heads * head_size, d_model, bias=False)

    def forward(self, x_BSD: Tensor, cos_Sh: Tensor, sin_Sh: Tensor) -> Tensor:
        batch, length, _ = x_BSD.shape
        qkv = self.qkv(x_BSD).view(batch, length, 3, self.num_heads, self.head_size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(_rotate(q, cos_Sh, sin_Sh), _rotate(k, cos_Sh, sin_Sh), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos_Sh: Tensor, sin_Sh: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos_Sh + torch.cat([-second, first], -1) * sin_Sh


class DecoderBlock(nn.Module):
    """Applies pre-norm attention and a MoE layer, both with a residual. moe: an implementation, whose forward takes (T,
    D)."""

    def __init__(self, shape: TrainShape, moe: Implementation) -> None:
        super().__init__()
        d_model = shape.layer.d_model
        self.attention_norm, self.moe_norm = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.attention = DecoderAttention(d_model, shape.num_heads, shape.head_size)
        self.moe_module, self.moe = moe.module, moe.forward  # as a submodule, so that its parameters are found

    def forward(self, x_BSD: Tensor, cos_Sh: Tensor, sin_Sh: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_Sh, sin_Sh)
        return x_BSD + self.moe(self.moe_norm(x_BSD).flatten(0, 1)).view_as(x_BSD)


class Decoder(nn.Module):
    """Stacks the blocks between an embedding and tied logits."""

    def __init__(self, shape: TrainShape, layers: Sequence[Implementation]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.layer.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList([DecoderBlock(shape, moe) for moe in layers])
        self.norm = nn.RMSNorm(shape.layer.d_model)
        angles_h = 10000.0 ** (-torch.arange(0, shape.head_size, 2) / shape.head_size)
        angles_Sh = torch.outer(torch.arange(shape.sequence_length), angles_h).repeat(1, 2)
        self.register_buffer("cos_Sh", angles_Sh.cos())
        self.register_buffer("sin_Sh", angles_Sh.sin())

    def forward(self, inputs_BS: Tensor) -> Tensor:
        x_BSD = self.embedding(inputs_BS)
        for block in self.blocks:
            x_BSD = block(x_BSD, self.cos_Sh, self.sin_Sh)
        return self.norm(x_BSD) @ self.embedding.weight.T


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Seeds torch's generator in its body, so that all ranks draw the same initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def build_decoder(shape: TrainShape, build: Callable[[Case], Implementation], case: Case) -> TrainableModel:
    """Builds a decoder with MoE layers of one peer. In bfloat16, weights and moments are bfloat16 as well."""
    layers = [build(case) for _ in range(shape.num_layers)]
    with fixed_seed(), torch.device(case.device):
        model = Decoder(shape, layers)
    model.to(case.dtype)
    experts = {id(p) for moe in layers for p in moe.parameters()} - {
        id(p) for moe in layers for p in moe.replicated_parameters()
    }
    replicated_parameters = [parameter for parameter in model.parameters() if id(parameter) not in experts]
    first, computes = layers[0], f"plain decoder, {layers[0].computes}"
    return TrainableModel(
        model, model, replicated_parameters, case, computes, first.version, first.execution_context, layers
    )
