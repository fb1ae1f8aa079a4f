"""Adds, removes or merges the experts of a checkpoint, together with their optimizer state.

Each new expert is the mean of one or more old experts, its parents: of their matrices and biases, rows of the router,
balance biases and moments. An expert with one parent equals it bit for bit, except for the noise on an added expert.
"""

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expert_parallel.checkpoint.files import Checkpoint, CheckpointWriter, open_checkpoint
from expert_parallel.checkpoint.folders import step_folder
from expert_parallel.data.open import ORIGIN, TOKENIZER_FILE
from expert_parallel.interop.importing import find_origin, find_tokenizer
from expert_parallel.nn.random import mix
from expert_parallel.training.config import Config, dump_config, read_config

EXPERT = re.compile(r"(\w+/blocks\.\d+\.moe\.experts\.)(\d+)(\..+)")
ROUTER = re.compile(r"(\w+)/blocks\.\d+\.moe\.router\..+")


@dataclass(frozen=True)
class Surgery:
    """Describes the experts of the changed model.

    parents: for each new expert, the old experts that it is the mean of. noise: standard deviation of the Gaussian
    noise, relative to the standard deviation of each tensor. first_added: experts from this index on get noise on their
    matrices and their rows of the router; None: no expert does.
    """

    parents: list[tuple[int, ...]]
    noise: float = 0.0
    first_added: int | None = None
    seed: int = 0

    def is_added(self, expert: int) -> bool:
        """Returns True if the expert gets noise."""
        return self.first_added is not None and expert >= self.first_added


def add(num_experts: int, like: Sequence[int], noise: float, seed: int) -> Surgery:
    """Returns the surgery that appends copies of the experts `like`.

    Without noise, a copy and its parent would always get the same tokens and gradients. Raises a ValueError for an
    expert that does not exist.
    """
    _refuse_unknown(num_experts, like, "--like")
    old = [(expert,) for expert in range(num_experts)]
    return Surgery([*old, *((expert,) for expert in like)], noise, num_experts, seed)


def remove(num_experts: int, experts: Sequence[int]) -> Surgery:
    """Returns the surgery that removes experts; the others keep their order. Raises a ValueError if none would
    remain."""
    _refuse_unknown(num_experts, experts, "--experts")
    stay = [expert for expert in range(num_experts) if expert not in experts]
    if not stay:
        raise ValueError(f"--experts names all {num_experts} experts: none would remain")
    return Surgery([(expert,) for expert in stay])


def merge(num_experts: int, groups: Sequence[Sequence[int]]) -> Surgery:
    """Returns the surgery that merges each group into one expert, at the position of the one that is named first.

    Raises a ValueError for a group of fewer than two experts, and for an expert that is named twice.
    """
    named = [expert for group in groups for expert in group]
    _refuse_unknown(num_experts, named, "--experts")
    twice = next((expert for expert in named if named.count(expert) > 1), None)
    if twice is not None:
        raise ValueError(f"--experts names expert {twice} twice: it can be merged only once")
    for group in groups:
        if len(group) < 2:
            raise ValueError(f"--experts {','.join(map(str, group))}: a merge needs two or more experts")
    group_of = {expert: tuple(group) for group in groups for expert in group}
    parents = {expert: group_of.get(expert, (expert,)) for expert in range(num_experts)}
    return Surgery([parents[expert] for expert in parents if expert == parents[expert][0]])


def _refuse_unknown(num_experts: int, experts: Sequence[int], option: str) -> None:
    for expert in experts:
        if not 0 <= expert < num_experts:
            raise ValueError(f"{option} names expert {expert}, model.moe.num_experts is {num_experts}")


def perform_surgery(source: Path, out: Path, surgery: Surgery, shard_bytes: int) -> Path:
    """Writes a run folder whose checkpoint has the same step as that of `source`, and the new experts. Returns `out`.

    Raises a ValueError if the model's settings do not allow the new number of experts; an error leaves nothing behind.
    """
    checkpoint = open_checkpoint(source)
    num_experts, config = num_experts_of(checkpoint), surgery_config(checkpoint, out, surgery)
    if out.exists():
        raise ValueError(f"{out} exists already")
    try:
        out.mkdir(parents=True)
        (out / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        tokenizer = find_tokenizer(source)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, out / TOKENIZER_FILE)
        if (origin := find_origin(source)) is not None:
            shutil.copytree(origin, out / ORIGIN)
        final = step_folder(out / "checkpoints", checkpoint.step)
        tree = config.model_dump(mode="json")
        with CheckpointWriter(
            final, step=checkpoint.step, config=tree, shard_bytes=shard_bytes, layout="one process"
        ) as writer:
            for name in writer.expected:
                if checkpoint.has_moments or name.startswith("weights/"):
                    writer.add(name, new_tensor(checkpoint, name, surgery, num_experts))
            writer.finish()
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out


def num_experts_of(checkpoint: Checkpoint) -> int:
    """Returns the number of experts of a checkpoint's model. Raises a ValueError for a dense model."""
    moe = read_config(checkpoint.config, str(checkpoint.path)).model.moe
    if moe is None:
        raise ValueError(f"{checkpoint.path}: the model has no experts (model.moe)")
    return moe.num_experts


def surgery_config(checkpoint: Checkpoint, out: Path, surgery: Surgery) -> Config:
    """Returns the checkpoint's config with the new number of experts and the new run folder."""
    tree: dict[str, Any] = checkpoint.config
    moe = {**tree["model"]["moe"], "num_experts": len(surgery.parents)}
    model = {**tree["model"], "moe": moe}
    return read_config({**tree, "model": model, "run": {**tree["run"], "folder": str(out)}}, "with these experts")


def new_tensor(checkpoint: Checkpoint, name: str, surgery: Surgery, num_experts: int) -> Tensor:
    """Computes a tensor of the new checkpoint.

    name: the full name in the new checkpoint, such as weights/blocks.0.moe.experts.3.w_in. num_experts: the number
    before.
    """
    expert = EXPERT.fullmatch(name)
    if expert is not None:
        before, number, after = expert.groups()
        parents = [checkpoint.read(f"{before}{parent}{after}") for parent in surgery.parents[int(number)]]
        return _noisy(_mean(parents), name, surgery) if surgery.is_added(int(number)) else _mean(parents)
    old = checkpoint.read(name)
    if ROUTER.fullmatch(name) is None or old.shape[0] != num_experts:
        return old
    rows = [_mean([old[parent] for parent in parents]) for parents in surgery.parents]
    new = torch.stack(rows)
    if surgery.first_added is not None and name.endswith("router.weight"):
        new[surgery.first_added :] = _noisy(new, name, surgery)[surgery.first_added :]
    return new


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Averages in float64, rounded once to the tensors' dtype; a single tensor is returned unchanged."""
    return tensors[0] if len(tensors) == 1 else torch.stack([t.double() for t in tensors]).mean(0).to(tensors[0].dtype)


def _noisy(tensor: Tensor, name: str, surgery: Surgery) -> Tensor:
    """Adds noise to a matrix of the weights. Vectors get none, since a constant bias has standard deviation 0."""
    if surgery.noise == 0 or tensor.dim() == 1 or not name.startswith("weights/"):
        return tensor
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(mix(surgery.seed, key)))
    return (tensor.double() + surgery.noise * tensor.double().std() * noise).to(tensor.dtype)
