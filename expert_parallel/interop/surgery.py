"""Expert surgery: a checkpoint with more, fewer or merged experts, its optimizer state with them.

Whatever is done, each new expert is the mean of some old ones, its parents: their matrices and biases, their rows of
the router, their balance biases, their moments. An expert with one parent is it, bit for bit, but for the noise that
tells an added one from its parent.
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
from expert_parallel.data.open import TOKENIZER_FILE
from expert_parallel.interop.importing import find_tokenizer
from expert_parallel.nn.random import mix
from expert_parallel.training.config import Config, dump_config, read_config

EXPERT = re.compile(r"(\w+/blocks\.\d+\.moe\.experts\.)(\d+)(\..+)")
ROUTER = re.compile(r"(\w+)/blocks\.\d+\.moe\.router\..+")


@dataclass(frozen=True)
class Surgery:
    """parents: of each new expert, by its new number. noise: added to the weights and the router's rows of those from
    `first_added` on, normal, in standard deviations of each tensor."""

    parents: list[tuple[int, ...]]
    noise: float = 0.0
    first_added: int | None = None
    seed: int = 0

    def is_added(self, expert: int) -> bool:
        return self.first_added is not None and expert >= self.first_added


def add(num_experts: int, like: Sequence[int], noise: float, seed: int) -> Surgery:
    """New experts after the old ones, each a copy of one of `like`. Without noise a copy and its parent would get the
    same tokens and the same gradients for ever."""
    _refuse_unknown(num_experts, like, "--like")
    old = [(expert,) for expert in range(num_experts)]
    return Surgery([*old, *((expert,) for expert in like)], noise, num_experts, seed)


def remove(num_experts: int, experts: Sequence[int]) -> Surgery:
    """Those that stay keep their order."""
    _refuse_unknown(num_experts, experts, "--experts")
    stay = [expert for expert in range(num_experts) if expert not in experts]
    if not stay:
        raise ValueError(f"--experts names all {num_experts} experts: none would stay")
    return Surgery([(expert,) for expert in stay])


def merge(num_experts: int, groups: Sequence[Sequence[int]]) -> Surgery:
    """Each group becomes one expert, in the place of its first."""
    named = [expert for group in groups for expert in group]
    _refuse_unknown(num_experts, named, "--experts")
    twice = next((expert for expert in named if named.count(expert) > 1), None)
    if twice is not None:
        raise ValueError(f"--experts names expert {twice} twice: it can be merged into one only")
    for group in groups:
        if len(group) < 2:
            raise ValueError(f"--experts {','.join(map(str, group))}: it takes two experts or more to merge")
    group_of = {expert: tuple(group) for group in groups for expert in group}
    parents = {expert: group_of.get(expert, (expert,)) for expert in range(num_experts)}
    return Surgery([parents[expert] for expert in parents if expert == parents[expert][0]])


def _refuse_unknown(num_experts: int, experts: Sequence[int], option: str) -> None:
    for expert in experts:
        if not 0 <= expert < num_experts:
            raise ValueError(f"{option} names expert {expert}, model.moe.num_experts is {num_experts}")


def perform_surgery(source: Path, out: Path, surgery: Surgery, shard_bytes: int) -> Path:
    """A run folder `out` whose checkpoint, of the same step, is that of `source` with other experts. ValueError where
    the model cannot be had with so many; then nothing is left behind."""
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
    moe = read_config(checkpoint.config, str(checkpoint.path)).model.moe
    if moe is None:
        raise ValueError(f"{checkpoint.path}: the model has no experts (model.moe)")
    return moe.num_experts


def surgery_config(checkpoint: Checkpoint, out: Path, surgery: Surgery) -> Config:
    tree: dict[str, Any] = checkpoint.config
    moe = {**tree["model"]["moe"], "num_experts": len(surgery.parents)}
    model = {**tree["model"], "moe": moe}
    return read_config({**tree, "model": model, "run": {**tree["run"], "folder": str(out)}}, "with these experts")


def new_tensor(checkpoint: Checkpoint, name: str, surgery: Surgery, num_experts: int) -> Tensor:
    """name: in full, of the new model. num_experts: of the old one."""
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
    return tensors[0] if len(tensors) == 1 else torch.stack([t.double() for t in tensors]).mean(0).to(tensors[0].dtype)


def _noisy(tensor: Tensor, name: str, surgery: Surgery) -> Tensor:
    """Weights alone, vectors not: biases may be 0."""
    if surgery.noise == 0 or tensor.dim() == 1 or not name.startswith("weights/"):
        return tensor
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(mix(surgery.seed, key)))
    return (tensor.double() + surgery.noise * tensor.double().std() * noise).to(tensor.dtype)
