"""Upcycling: a dense model -> a mixture of experts that computes the same at first.

Each expert is a copy of its block's dense network (Komatsuzaki et al. 2022, 2212.05055). Whatever the router says, the
weights of the chosen ones sum to 1, and so the output is the dense one's. With `split: G` each copy is cut into G
experts of hidden / G columns each (He et al. 2024, 2410.07524, virtual groups): see `Upcycling`.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expert_parallel.checkpoint.files import open_checkpoint
from expert_parallel.checkpoint.state import balance_biases
from expert_parallel.data.batch import held_out_batch
from expert_parallel.data.config import TokensData
from expert_parallel.data.open import TOKENIZER_FILE, open_data
from expert_parallel.interop.folder import CONFIG
from expert_parallel.interop.hf_model import HuggingFaceModel
from expert_parallel.interop.importing import find_origin, find_tokenizer, imported_config, write_run
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.tensor_parallel import cross_entropy_sum
from expert_parallel.model.transformer import Transformer
from expert_parallel.moe.context import StepContext
from expert_parallel.moe.parameters import logical_parameters
from expert_parallel.nn.ffn import GATED
from expert_parallel.nn.random import mix
from expert_parallel.training.config import Config, read_config
from expert_parallel.training.setup import data_requirements

Weights = Iterator[tuple[str, Tensor]]
DENSE = re.compile(r"(blocks\.\d+)\.ffn\.(w_in|w_out)\.(weight|bias)")


@dataclass(frozen=True)
class Upcycling:
    """copies * split experts, of which each token takes k * split. Expert c * split + g is part g of copy c.

    All parts of a copy get the same row in the router, so the k * split best are k whole copies. Their weights are
    p_c / split each, the p_c summing to 1; the second matrix of each part is multiplied by `split`. Then the output is
    sum_c p_c sum_g part_g(x) = sum_c p_c dense(x) = dense(x). A power of two as `split` rounds nothing.

    noise: normal, in standard deviations of each matrix, another for each expert; then the output is no longer exactly
    the dense one's.
    """

    copies: int
    k: int = 2
    noise: float = 0.0
    split: int = 1
    seed: int = 0

    def refuse(self, model: ModelConfig) -> None:
        """ValueError where the model or the numbers do not allow it."""
        if model.ffn is None or model.moe is not None:
            raise ValueError("the model has experts already (model.moe): only a dense one can be upcycled")
        if self.k > self.copies:
            raise ValueError(f"--k ({self.k}) is larger than --experts ({self.copies})")
        if self.k * self.split == 1:
            raise ValueError(
                "--k is 1: the weight of a single expert would always be 1 and the router would never learn; use --k 2 "
                "or more, or --split 2 or more"
            )
        if model.ffn.hidden % self.split:
            raise ValueError(f"--split ({self.split}) does not divide model.ffn.hidden ({model.ffn.hidden})")

    def model(self, dense: ModelConfig) -> dict[str, Any]:
        """The settings of the mixture. The balance loss is training's; it changes no output."""
        assert dense.ffn is not None
        moe = {
            "num_experts": self.copies * self.split,
            "router": {"kind": "top_k", "k": self.k * self.split},
            "experts": {**dense.ffn.model_dump(), "hidden": dense.ffn.hidden // self.split},
            "losses": [{"kind": "balance", "coefficient": 0.01}],
        }
        return {**dense.model_dump(mode="json"), "ffn": None, "moe": moe}

    def weights(self, dense: ModelConfig, weights: Weights) -> Weights:
        """Those of the dense model, by logical name -> those of the mixture. One matrix of it is held at a time."""
        assert dense.ffn is not None
        is_gated = dense.ffn.activation in GATED
        for name, tensor in weights:
            network = DENSE.fullmatch(name)
            if network is None:
                yield name, tensor
                continue
            block, matrix, leaf = network.groups()
            parts = self._parts(matrix, leaf, tensor, is_gated)
            new_leaf = {"weight": matrix, "bias": matrix.replace("w_", "b_")}[leaf]
            for expert in range(self.copies * self.split):
                new_name = f"{block}.moe.experts.{expert}.{new_leaf}"
                part = parts[expert % self.split]
                yield new_name, part if leaf == "bias" else self._with_noise(new_name, part)
            if (matrix, leaf) == ("w_in", "weight"):
                yield f"{block}.moe.router.weight", self._router(block, dense)

    def _parts(self, matrix: str, leaf: str, tensor: Tensor, is_gated: bool) -> list[Tensor]:
        """Of one copy: the hidden columns g * F / G to (g + 1) * F / G, in the layout of experts."""
        if (matrix, leaf) == ("w_out", "bias"):
            return [tensor] * self.split  # the weights of the chosen experts sum to 1
        if matrix == "w_out":
            return [part * self.split if self.split > 1 else part for part in tensor.mT.chunk(self.split)]
        halves = tensor.chunk(2) if is_gated else (tensor,)
        cuts = zip(*(half.chunk(self.split) for half in halves), strict=True)
        parts = [torch.cat(cut) for cut in cuts]
        return parts if leaf == "bias" else [part.mT for part in parts]

    def _with_noise(self, name: str, part: Tensor) -> Tensor:
        if self.noise == 0:
            return part
        wide = part.float()
        return (wide + self.noise * wide.std() * self._normal(name, part.shape)).to(part.dtype)

    def _router(self, block: str, dense: ModelConfig) -> Tensor:
        rows = self._normal(f"{block}.moe.router.weight", torch.Size([self.copies, dense.d_model]))
        return (rows * dense.init_std).repeat_interleave(self.split, dim=0)

    def _normal(self, name: str, shape: torch.Size) -> Tensor:
        """A function of the seed and the name."""
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return torch.randn(shape, generator=torch.Generator().manual_seed(mix(self.seed, key)))


@dataclass(frozen=True)
class DenseSource:
    """A dense model, opened: the config of its run (of a Hugging Face folder: the one that import would write), its
    tensors by logical name, and what goes with it: a Hugging Face folder, a tokenizer's file."""

    config: Config
    path: Path
    origin: Path | None
    tokenizer: Path | None

    def weights(self) -> Weights:
        if self.path == self.origin:
            yield from HuggingFaceModel(self.path).weights()
            return
        checkpoint = open_checkpoint(self.path)
        for name in checkpoint.tensors:
            if name.startswith("weights/"):
                yield name.removeprefix("weights/"), checkpoint.read(name)


def open_dense_source(path: Path, out: Path) -> DenseSource:
    """path: a Hugging Face folder, a run or a checkpoint. out: the folder of the run that is to be made."""
    if (path / CONFIG).is_file():
        source = HuggingFaceModel(path)
        return DenseSource(imported_config(source, out), path, origin=path, tokenizer=path / TOKENIZER_FILE)
    tree = open_checkpoint(path).config
    tree = {**tree, "run": {**tree["run"], "folder": str(out)}}
    return DenseSource(read_config(tree, str(path)), path, origin=find_origin(path), tokenizer=find_tokenizer(path))


def upcycle(source: Path, out: Path, upcycling: Upcycling, shard_bytes: int) -> Path:
    """Writes a run folder whose checkpoint of step 0 is the mixture. ValueError where it cannot be had."""
    dense = open_dense_source(source, out)
    upcycling.refuse(dense.config.model)
    tree = {**dense.config.model_dump(mode="json"), "model": upcycling.model(dense.config.model)}
    return write_run(
        out,
        Config.model_validate(tree),
        upcycling.weights(dense.config.model, dense.weights()),
        origin=dense.origin,
        tokenizer=dense.tokenizer,
        shard_bytes=shard_bytes,
    )


SEQUENCES, LENGTH = 4, 64  # of random tokens


def compare(dense_path: Path, mixture_path: Path) -> str:
    """A line for people: the cross entropy of both on the held-out text of the run's data; where it has no data, how
    far the logits are apart for random tokens."""
    dense, mixture = open_dense_source(dense_path, mixture_path), open_dense_source(mixture_path, mixture_path)
    models = [build_from_weights(part.config.model, part.weights()) for part in (dense, mixture)]
    if not has_data(dense):
        before, after = (model(random_tokens(model.config), StepContext(dropless=True)).logits for model in models)
        apart, largest = float((after - before).abs().max()), float(before.abs().max())
        return f"random tokens: the logits differ by {apart:.2g} at most, the largest is {largest:.3g}"
    before_loss, after_loss = (held_out_loss(model, dense) for model in models)
    apart = after_loss - before_loss
    return f"held-out text: cross entropy {before_loss:.6f} before, {after_loss:.6f} after, apart {apart:+.2g} nats"


def has_data(dense: DenseSource) -> bool:
    data = dense.config.data
    return not isinstance(data, TokensData) or bool(data.corpora)


def random_tokens(model: ModelConfig) -> Tensor:
    return torch.randint(model.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def build_from_weights(config: ModelConfig, weights: Weights) -> Transformer:
    """In float32, in evaluation mode. weights: by logical name."""
    tensors = dict(weights)
    model = build_model(config, dtype=torch.float32).eval()
    for logical in logical_parameters(model):
        logical.fill(logical.parameter, [tensors.pop(name) for name in logical.names])
    for name, bias in balance_biases(model):
        bias.copy_(tensors.pop(name))
    assert not tensors, f"{next(iter(tensors))} has no place in the model"
    return model.requires_grad_(False)


def held_out_loss(model: Transformer, dense: DenseSource) -> float:
    """Nats a token, without capacity limits."""
    data = open_data(dense.config.data, data_requirements(dense.config))
    total, count = 0.0, 0
    for sequences in data.held_out.split(8):
        batch = held_out_batch(sequences, 1, 0, data.sampler.separator)
        packed = 1 if batch.documents_BS is None else int(batch.documents_BS.max()) + 1
        context = StepContext(dropless=True, document_BS=batch.documents_BS, documents_per_row=packed)
        total += float(cross_entropy_sum(model(batch.inputs_BS, context).logits, batch.targets_BS))
        count += batch.targets_BS.numel()
    return total / count
