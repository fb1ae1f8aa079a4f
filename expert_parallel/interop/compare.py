"""What became of a model: a dense one and the mixture made of it, on the same tokens, on this process."""

from pathlib import Path

import torch
from torch import Tensor

from expert_parallel.checkpoint.shapes import balance_biases
from expert_parallel.data.batch import held_out_batch
from expert_parallel.data.config import TokensData
from expert_parallel.data.open import open_data
from expert_parallel.interop.upcycle import Dense, Weights, open_dense
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.tensor_parallel import cross_entropy_sum
from expert_parallel.model.transformer import Transformer
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.training.setup import demand_of

SEQUENCES, LENGTH = 4, 64  # of random tokens


def compare(dense_path: Path, mixture_path: Path) -> str:
    """A line for people: the cross entropy of both on the held-out text of the run's data; where it has no data, how
    far the logits are apart for random tokens."""
    dense, mixture = open_dense(dense_path, mixture_path), open_dense(mixture_path, mixture_path)
    models = [build_filled(part.config.model, part.weights()) for part in (dense, mixture)]
    if not has_data(dense):
        before, after = (model(random_tokens(model.config), StepContext(dropless=True)).logits for model in models)
        apart, largest = float((after - before).abs().max()), float(before.abs().max())
        return f"random tokens: the logits differ by {apart:.2g} at most, the largest is {largest:.3g}"
    before_loss, after_loss = (held_out_loss(model, dense) for model in models)
    apart = after_loss - before_loss
    return f"held-out text: cross entropy {before_loss:.6f} before, {after_loss:.6f} after, apart {apart:+.2g} nats"


def has_data(dense: Dense) -> bool:
    data = dense.config.data
    return not isinstance(data, TokensData) or bool(data.corpora)


def random_tokens(model: ModelConfig) -> Tensor:
    return torch.randint(model.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def build_filled(config: ModelConfig, weights: Weights) -> Transformer:
    """In float32, in evaluation mode. weights: by logical name."""
    tensors = dict(weights)
    model = build_model(config, dtype=torch.float32).eval()
    for logical in logical_parameters(model):
        logical.fill(logical.parameter, [tensors.pop(name) for name in logical.names])
    for name, bias in balance_biases(model):
        bias.copy_(tensors.pop(name))
    assert not tensors, f"{next(iter(tensors))} has no place in the model"
    return model.requires_grad_(False)


def held_out_loss(model: Transformer, dense: Dense) -> float:
    """Nats a token, without capacity limits."""
    data = open_data(dense.config.data, demand_of(dense.config))
    total, count = 0.0, 0
    for sequences in data.held_out.split(8):
        batch = held_out_batch(sequences, 1, 0, data.sampler.separator)
        packed = 1 if batch.documents_BS is None else int(batch.documents_BS.max()) + 1
        context = StepContext(dropless=True, document_BS=batch.documents_BS, documents_per_row=packed)
        total += float(cross_entropy_sum(model(batch.inputs_BS, context).logits, batch.targets_BS))
        count += batch.targets_BS.numel()
    return total / count
