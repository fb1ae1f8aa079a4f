"""Opens a Hugging Face folder as one of our models: its settings, and its tensors by logical name."""

from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from expert_parallel.checkpoint.files import expected_shapes
from expert_parallel.interop.families import FAMILIES, Family
from expert_parallel.interop.folder import HuggingFaceFolder
from expert_parallel.interop.rules import Tree
from expert_parallel.interop.tensor_map import TensorPair, match_tensors
from expert_parallel.model.config import ModelConfig

Shapes = dict[str, list[int]]


class HuggingFaceModel:
    """Opens a folder, and checks config.json and the shapes of all tensors before any weight is read.

    Raises a ValueError that names the first key that is not supported, or the first tensor that is missing, left over
    or of another shape.
    """

    def __init__(self, path: Path) -> None:
        self.folder = HuggingFaceFolder(path)
        config = self.folder.config
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise ValueError(f"{path}: model_type is {kind!r}, it must be one of {', '.join(FAMILIES)}")
        self.family = FAMILIES[kind]
        self.model = read_model_config(self.family, config)
        shapes = logical_shapes(self.model)
        self.pairs = match_model_tensors(self.family, config, self.model)
        check_shapes(self.folder, hugging_face_shapes(self.pairs, shapes))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every logical name and its tensor, in the file's dtype. Memory holds the tensors of one pair."""
        for pair in self.pairs:
            theirs = [self.folder.read(name) for name in pair.theirs]
            if len({tensor.dtype for tensor in theirs}) > 1:
                both = ", ".join(f"{n} is {t.dtype}" for n, t in zip(pair.theirs, theirs, strict=True))
                raise ValueError(f"{self.folder.path}: {both}: they become one tensor and must have the same dtype")
            yield from zip(pair.ours, pair.transform.to_ours(theirs), strict=True)


def read_model_config(family: Family, config: Tree) -> ModelConfig:
    """Reads a config.json. Raises a ValueError of one sentence if a key or a resulting setting is not valid."""
    tree = family.read(config)
    try:
        return ModelConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["model", *map(str, first["loc"])])
        message = (
            first["ctx"]["error"] if first["type"] == "value_error" else f"{first['msg']}, found {first['input']!r}"
        )
        raise ValueError(f"config.json gives settings that are not valid: {where}: {message}") from None


def logical_shapes(model: ModelConfig) -> Shapes:
    """Returns the shape of every weight of a model, by logical name."""
    return {name.removeprefix("weights/"): shape for name, shape in expected_shapes(model, moments=False).items()}


def match_model_tensors(family: Family, config: Tree, model: ModelConfig) -> list[TensorPair]:
    """Returns the pairs of a model's tensors and those of its Hugging Face folder. config: the folder's config.json, on
    which the layout of some tensors depends."""
    experts = 0 if model.moe is None else model.moe.num_experts
    return match_tensors(family.tensor_map(config), logical_shapes(model), experts)


def hugging_face_shapes(pairs: list[TensorPair], ours: Shapes) -> Shapes:
    """Returns the shape of every tensor that the Hugging Face folder must hold. ours: shapes by logical name.

    Applies the transforms to meta tensors, which have no data.
    """
    shapes: Shapes = {}
    for pair in pairs:
        empty = [torch.empty(ours[name], device="meta") for name in pair.ours]
        theirs = {
            name: list(made.shape) for name, made in zip(pair.theirs, pair.transform.to_theirs(empty), strict=True)
        }
        shapes |= theirs
    return shapes


def check_shapes(folder: HuggingFaceFolder, expected: Shapes) -> None:
    """Raises a ValueError for the first tensor that is missing, left over or of another shape."""
    counts = f"{len(folder.files)} tensors found, {len(expected)} expected"
    for name in expected:
        if name not in folder.files:
            raise ValueError(f"{folder.path}: {name} is missing ({counts})")
    for name in folder.files:
        if name not in expected:
            raise ValueError(f"{folder.path}: {name} is left over ({counts})")
    for name, shape in expected.items():
        if (found := folder.shape(name)) != shape:
            raise ValueError(f"{folder.path}: {name} has shape {found}, expected {shape}")
