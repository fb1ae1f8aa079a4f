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
from expert_parallel.data.open import TOKENIZER_FILE
from expert_parallel.interop.folder import CONFIG
from expert_parallel.interop.importing import find_origin, find_tokenizer, imported_config, write_run
from expert_parallel.interop.source import HuggingFaceModel
from expert_parallel.model.config import ModelConfig
from expert_parallel.nn.ffn import GATED
from expert_parallel.nn.random import mix
from expert_parallel.training.config import Config, read_config

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
class Dense:
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


def open_dense(path: Path, out: Path) -> Dense:
    """path: a Hugging Face folder, a run or a checkpoint. out: the folder of the run that is to be made."""
    if (path / CONFIG).is_file():
        source = HuggingFaceModel(path)
        return Dense(imported_config(source, out), path, origin=path, tokenizer=path / TOKENIZER_FILE)
    tree = open_checkpoint(path).config
    tree = {**tree, "run": {**tree["run"], "folder": str(out)}}
    return Dense(read_config(tree, str(path)), path, origin=find_origin(path), tokenizer=find_tokenizer(path))


def upcycle(source: Path, out: Path, upcycling: Upcycling, shard_bytes: int) -> Path:
    """Writes a run folder whose checkpoint of step 0 is the mixture. ValueError where it cannot be had."""
    dense = open_dense(source, out)
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
