"""Upcycles a dense model into a mixture of experts that initially computes the same.

Each expert is a copy of its block's dense network (Komatsuzaki et al. 2022, arXiv:2212.05055). The weights of a token's
experts sum to 1, so the output is the dense network's whatever the router chooses. With `split` = G each copy is split
into G experts with hidden / G columns each (virtual groups, He et al. 2024, arXiv:2410.07524): see `Upcycling`.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
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
from expert_parallel.interop.folder import CONFIG, missing
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
    """Makes copies * split experts, of which each token uses k * split. Expert c * split + g is part g of copy c.

    All parts of a copy have the same row in the router, so the k * split best experts are k complete copies. Each part
    has the weight p_c / split, where the p_c sum to 1, and its second matrix is multiplied by `split`. So the output is
    sum_c p_c sum_g part_g(x) = sum_c p_c dense(x) = dense(x). If `split` is a power of two, the factor does not round.

    noise: standard deviation of the Gaussian noise, relative to that of each matrix, drawn independently for each
    expert; with noise the output is only approximately the dense model's.
    """

    copies: int
    k: int = 2
    noise: float = 0.0
    split: int = 1
    seed: int = 0

    def refuse(self, model: ModelConfig) -> None:
        """Raises a ValueError if the model or the options do not allow upcycling."""
        if model.ffn is None or model.moe is not None:
            raise ValueError("the model already has experts (model.moe): only a dense model can be upcycled")
        if self.k > self.copies:
            raise ValueError(f"--k ({self.k}) is larger than --experts ({self.copies})")
        if self.k * self.split == 1:
            raise ValueError(
                "--k is 1: the weight of a single expert is always 1, so the router would get no gradient; use --k 2 "
                "or more, or --split 2 or more"
            )
        if model.ffn.hidden % self.split:
            raise ValueError(f"--split ({self.split}) does not divide model.ffn.hidden ({model.ffn.hidden})")

    def model(self, dense: ModelConfig) -> dict[str, Any]:
        """Returns the `model` block of the mixture, with a balance loss for training, which changes no output."""
        assert dense.ffn is not None
        moe = {
            "num_experts": self.copies * self.split,
            "router": {"kind": "top_k", "k": self.k * self.split},
            "experts": {**dense.ffn.model_dump(), "hidden": dense.ffn.hidden // self.split},
            "losses": [{"kind": "balance", "coefficient": 0.01}],
        }
        return {**dense.model_dump(mode="json"), "ffn": None, "moe": moe}

    def weights(self, dense: ModelConfig, weights: Weights) -> Weights:
        """Yields the mixture's weights by logical name, from those of the dense model. Reads them one by one."""
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
        """Splits a tensor of a dense network into the G = `split` parts of a copy, in the layout of experts.

        Part g has the hidden columns g * F / G to (g + 1) * F / G. matrix: w_in or w_out. leaf: weight or bias.
        """
        if (matrix, leaf) == ("w_out", "bias"):
            return [tensor] * self.split  # not divided, since the weights of a token's experts sum to 1
        if matrix == "w_out":
            return [part * self.split if self.split > 1 else part for part in tensor.mT.chunk(self.split)]
        halves = tensor.chunk(2) if is_gated else (tensor,)
        cuts = zip(*(half.chunk(self.split) for half in halves), strict=True)
        parts = [torch.cat(cut) for cut in cuts]
        return parts if leaf == "bias" else [part.mT for part in parts]

    def _with_noise(self, name: str, part: Tensor) -> Tensor:
        """Adds noise to a matrix."""
        if self.noise == 0:
            return part
        wide = part.float()  # so that small noise is not rounded away before the sum
        return (wide + self.noise * wide.std() * self._normal(name, part.shape)).to(part.dtype)

    def _router(self, block: str, dense: ModelConfig) -> Tensor:
        """Draws a router's weight, (copies * split, D), float32, with the same row for all parts of a copy."""
        rows = self._normal(f"{block}.moe.router.weight", torch.Size([self.copies, dense.d_model]))
        return (rows * dense.init_std).repeat_interleave(self.split, dim=0)

    def _normal(self, name: str, shape: torch.Size) -> Tensor:
        """Draws standard normal numbers, float32, as a function of the seed and the name."""
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return torch.randn(shape, generator=torch.Generator().manual_seed(mix(self.seed, key)))


@dataclass(frozen=True)
class DenseSource:
    """Holds an opened model: a run, a checkpoint or a Hugging Face folder.

    config: the run's config; for a Hugging Face folder, the one that import would write. origin: the Hugging Face
    folder that it came from, or None. tokenizer: the tokenizer file, or None; it may not exist. notes: what differs
    from the Hugging Face folder, in sentences.
    """

    config: Config
    path: Path
    origin: Path | None
    tokenizer: Path | None
    notes: tuple[str, ...] = ()

    def weights(self) -> Weights:
        """Yields the weights by logical name, in the dtype of the file."""
        if self.path == self.origin:
            yield from HuggingFaceModel(self.path).weights()
            return
        checkpoint = open_checkpoint(self.path)
        for name in checkpoint.tensors:
            if name.startswith("weights/"):
                yield name.removeprefix("weights/"), checkpoint.read(name)


def open_dense_source(path: Path, out: Path) -> DenseSource:
    """Opens a Hugging Face folder, a run or a checkpoint. out: run folder, which becomes run.folder of the config."""
    if (path / CONFIG).is_file():
        source = HuggingFaceModel(path)
        source.check_values()
        config, tokenizer = imported_config(source, out), path / TOKENIZER_FILE
        return DenseSource(config, path, origin=path, tokenizer=tokenizer, notes=tuple(source.notes))
    if not path.exists():
        raise ValueError(missing("checkpoint", path))
    tree = open_checkpoint(path).config
    tree = {**tree, "run": {**tree["run"], "folder": str(out)}}
    return DenseSource(read_config(tree, str(path)), path, origin=find_origin(path), tokenizer=find_tokenizer(path))


def upcycle(
    source: Path, out: Path, upcycling: Upcycling, shard_bytes: int, print_message: Callable[[str], None] = print
) -> Path:
    """Writes a run folder whose checkpoint of step 0 is the mixture. Returns `out`. Raises ValueError: see `refuse`."""
    dense = open_dense_source(source, out)
    upcycling.refuse(dense.config.model)
    tree = {**dense.config.model_dump(mode="json"), "model": upcycling.model(dense.config.model)}
    run = write_run(
        out,
        Config.model_validate(tree),
        upcycling.weights(dense.config.model, dense.weights()),
        origin=dense.origin,
        tokenizer=dense.tokenizer,
        shard_bytes=shard_bytes,
    )
    for note in dense.notes:
        print_message(note)
    return run


SEQUENCES, LENGTH = 4, 64  # size of the batch of random tokens in `compare`


def compare(dense_path: Path, mixture_path: Path) -> str:
    """Compares two models, and returns a line of text for the user.

    It holds the cross entropy of both on the held-out text of the run's data or, for a run without data, the largest
    absolute difference of their logits for random tokens.
    """
    dense, mixture = open_dense_source(dense_path, mixture_path), open_dense_source(mixture_path, mixture_path)
    models = [build_from_weights(part.config.model, part.weights()) for part in (dense, mixture)]
    if not has_data(dense):
        before, after = (model(random_tokens(model.config), StepContext(dropless=True)).logits for model in models)
        apart, largest = float((after - before).abs().max()), float(before.abs().max())
        return f"random tokens: the logits differ by at most {apart:.2g}, the largest is {largest:.3g}"
    before_loss, after_loss = (held_out_loss(model, dense) for model in models)
    change = after_loss - before_loss
    return f"held-out text: cross entropy {before_loss:.6f} before, {after_loss:.6f} after, change {change:+.2g} nats"


def has_data(dense: DenseSource) -> bool:
    """Returns False if the config names no corpora, as after an import."""
    data = dense.config.data
    return not isinstance(data, TokensData) or bool(data.corpora)


def random_tokens(model: ModelConfig) -> Tensor:
    """Draws the same tokens in each call, int64 (SEQUENCES, LENGTH)."""
    return torch.randint(model.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def build_from_weights(config: ModelConfig, weights: Weights) -> Transformer:
    """Builds a model in float32 and evaluation mode, without gradients. weights: by logical name."""
    tensors = dict(weights)
    model = build_model(config, dtype=torch.float32).eval()
    for logical in logical_parameters(model):
        logical.fill(logical.parameter, [tensors.pop(name) for name in logical.names])
    for name, bias in balance_biases(model):
        bias.copy_(tensors.pop(name))
    assert not tensors, f"{next(iter(tensors))} has no place in the model"
    return model.requires_grad_(False)


def held_out_loss(model: Transformer, dense: DenseSource) -> float:
    """Computes the mean cross entropy on the held-out text, in nats per token, dropless."""
    data = open_data(dense.config.data, data_requirements(dense.config))
    total, count = 0.0, 0
    for sequences in data.held_out.split(8):
        batch = held_out_batch(sequences, 1, 0)
        packed = 1 if batch.documents_BS is None else int(batch.documents_BS.max()) + 1
        context = StepContext(dropless=True, document_BS=batch.documents_BS, documents_per_row=packed)
        total += float(cross_entropy_sum(model(batch.inputs_BS, context).logits, batch.targets_BS))
        count += batch.targets_BS.numel()
    return total / count
