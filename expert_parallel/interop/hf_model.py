"""Opens a Hugging Face folder as one of our models: its settings, and its tensors by logical name."""

import math
from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from expert_parallel.checkpoint.files import expected_shapes
from expert_parallel.checkpoint.manifest import DTYPES
from expert_parallel.config import read_settings
from expert_parallel.interop.balance_loss import describe_losses
from expert_parallel.interop.families.registry import FAMILIES
from expert_parallel.interop.family import Family
from expert_parallel.interop.folder import HuggingFaceFolder
from expert_parallel.interop.hf_config import HuggingFaceConfig, Tree
from expert_parallel.interop.ignored_tensors import (
    HEAD,
    MTP,
    TABLE,
    TIED,
    describe_ignored,
    ignored_tensors,
    list_briefly,
    rows_are_equal,
)
from expert_parallel.interop.mtp_layers import (
    COPY,
    MTP_TENSORS,
    WEIGHT,
    copies,
    reason_to_set_aside,
    with_mtp_layers,
)
from expert_parallel.interop.quantized_folder import QuantizedFolder, open_folder
from expert_parallel.interop.tensor_map import TensorPair, Transform, match_tensors
from expert_parallel.interop.unsupported import describe_unsupported
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.rotary import LongRopeScaling, RopeConfig
from expert_parallel.settings import Settings

Shapes = dict[str, list[int]]
VALUES_PER_ELEMENT = 2  # MXFP4 packs two values into an element; of int4, which packs 8, shapes are those of values


class HuggingFaceModel:
    """Opens a folder, and checks config.json and the shapes and dtypes of all tensors before any weight is read.

    dtype: what quantized weights become, see `open_folder`. Tensors that transformers does not use either are set
    aside: `ignored` has them by name, and what they are. `tensor_notes` has a sentence about each kind of them; `notes`
    also those about quantized weights and the losses of training. compare_heads: False does not compare a
    tied head, and the copies in layers of multi-token prediction, with the originals, for which values are read.
    with_mtp: False sets all layers of multi-token prediction aside. bytes_read: the number of bytes of the files that
    `read_slice` has read. Raises a ValueError that names the keys that are not supported, or the first tensor that is
    missing, left over, of another shape or of another dtype.
    """

    def __init__(
        self, path: Path, dtype: str | None = None, *, compare_heads: bool = True, with_mtp: bool = True
    ) -> None:
        self.folder, self.compare_heads = open_folder(path, dtype), compare_heads
        config = self.folder.config
        self.family = find_family(config, path)
        self.model = read_model_config(self.family, config)
        refuse_larger_model(self.folder, self.model)
        num_mtp_layers = self.family.num_mtp_layers(HuggingFaceConfig(config))
        self.ignored = ignored = ignored_tensors(
            self.folder.files, self.model.num_layers, num_mtp_layers, self.family.set_aside
        )
        self.tensor_notes: list[str] = []
        table = self._settle_head(ignored) if self.model.tied_embeddings and HEAD in self.folder.files else TABLE
        if with_mtp and self.family.imports_mtp and MTP in ignored.values():
            self._settle_mtp(num_mtp_layers, table)
        pairs = match_model_tensors(self.family, config, self.model)
        pairs = [replace(pair, theirs=(table,)) if pair.theirs == (TABLE,) else pair for pair in pairs]
        self.pairs, zeros = zeros_for_missing(pairs, self.family.zeros, self.folder, logical_shapes(self.model))
        for name in (name for pair in self.pairs for name in pair.theirs):
            ignored.pop(name, None)  # the pattern of a family also fits tensors that the model uses
        others = [*describe_positions(self.model), *describe_model_losses(self.family, config, self.model)]
        quantized = [self.folder.describe()] if isinstance(self.folder, QuantizedFolder) else []
        self.tensor_notes = [*describe_ignored(ignored), *self.tensor_notes, *zeros]
        self.notes = [*quantized, *self.tensor_notes, *others]
        check_tensors(self.folder, self.pairs, logical_shapes(self.model), ignored)
        self.places = {name: (pair, number) for pair in self.pairs for number, name in enumerate(pair.ours)}
        self.bytes_read = 0
        self._dequantized: tuple[TensorPair | None, list[Tensor]] = (None, [])

    def _settle_head(self, ignored: dict[str, str]) -> str:
        """Decides about a lm_head.weight although tie_word_embeddings is true, as transformers 5 does. Returns the name
        of the embedding's table.

        The head is the table if there is no other, is ignored if it equals the table, and else is a weight of its own:
        then `model.tied_embeddings` is false.
        """
        if TABLE not in self.folder.files:
            self.tensor_notes.append(
                f"{HEAD} is also the embedding, as tie_word_embeddings is true and {TABLE} is missing"
            )
            return HEAD
        check_dtypes(self.folder, [TABLE, HEAD])
        if not self.compare_heads:
            ignored[HEAD] = f"tied by config.json; an import compares it with {TABLE}"
        elif rows_are_equal(self.folder, TABLE, HEAD):
            ignored[HEAD] = TIED
        else:
            self.model = self.model.model_copy(update={"tied_embeddings": False})
            self.tensor_notes.append(
                f"model.tied_embeddings is false although tie_word_embeddings is true: {HEAD} differs from {TABLE}, "
                "and transformers then uses both"
            )
        return TABLE

    def check_values(self) -> None:
        """Raises a ValueError for scales of quantized weights that are not valid. Reads all of them, but no weights."""
        if isinstance(self.folder, QuantizedFolder):
            self.folder.check_values()

    def _settle_mtp(self, count: int, table: str) -> None:
        """Decides about layers of multi-token prediction, of which the folder has tensors. They become `model.mtp` if
        they are complete, and else stay set aside. table: the name of the embedding's table."""
        model = with_mtp_layers(self.model, count)
        pairs = match_model_tensors(self.family, self.folder.config, model)
        names = [name for name, kind in self.ignored.items() if kind == MTP]
        if (reason := reason_to_set_aside(self.folder, names, model, pairs, table, self.compare_heads)) is not None:
            self.tensor_notes.append(f"model.mtp is null: {reason}")
            return
        self.model = model
        self.ignored |= {pair.theirs[0]: COPY for pair in copies(model) if pair.theirs[0] in self.folder.files}
        self.tensor_notes.append(
            f"model.mtp trains {count} layer{'s' if count > 1 else ''} of multi-token prediction, with the weight "
            f"{WEIGHT} in the loss; model.mtp=null leaves them out"
        )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every logical name and its tensor, in the folder's dtype. Memory holds the tensors of one pair."""
        for pair in self.pairs:
            theirs = [self.folder.read(name) for name in pair.theirs]
            yield from zip(pair.ours, pair.transform.to_ours(theirs), strict=True)

    def read_slice(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Reads the rectangle of a logical tensor that begins at `start` and has `shape`, in the folder's dtype, and of
        the files little more than that, but all of a quantized tensor.

        Memory holds the tensors of one quantized pair, for the next rectangle of it.
        """
        pair, number = self.places[name]
        index = tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
        if isinstance(self.folder, QuantizedFolder) and not self.folder.weights.keys().isdisjoint(pair.theirs):
            part, _ = pair.transform.read_part(self._dequantize(pair, self.folder), number, index)
            return part
        theirs = [self.folder.read(tensor) for tensor in pair.theirs]  # mapped, not read yet
        part, num_bytes = pair.transform.read_part(theirs, number, index)
        self.bytes_read += num_bytes
        return part

    def _dequantize(self, pair: TensorPair, folder: QuantizedFolder) -> list[Tensor]:
        """Returns the tensors of a pair, which it reads unless they are those of the last call."""
        if self._dequantized[0] is not pair:
            self._dequantized = (None, [])  # frees the last ones before there are others
            self._dequantized = (pair, [folder.read(tensor) for tensor in pair.theirs])
            self.bytes_read += sum(map(folder.stored_bytes, pair.theirs))
        return self._dequantized[1]


def find_family(config: Tree, path: Path) -> Family:
    """Returns the family of a config.json. path: its place, for the ValueError if there is no such family."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{path}: {describe_unsupported(config, list(FAMILIES))}")
    return FAMILIES[kind]


class ImportedSettings(Settings):
    """Holds the block of our config that a config.json gives."""

    model: ModelConfig


def read_model_config(family: Family, config: Tree) -> ModelConfig:
    """Reads a config.json. Raises a ValueError of one sentence if a key or a resulting setting is not valid."""
    tree = {"model": family.read(config)}
    return read_settings(ImportedSettings, tree, "config.json gives settings that are not valid").model


def describe_model_losses(family: Family, config: Tree, model: ModelConfig) -> list[str]:
    """Returns sentences on the losses of a config.json, and on what balances the experts beside them. model: the
    settings that it gives."""
    if model.moe is None:
        return describe_losses(family.rules, family.architecture, config, [])
    losses = [loss.model_dump(mode="json") for loss in model.moe.losses]
    rate = getattr(model.moe.router, "balance_bias_rate", 0)
    by_bias = [f"experts are balanced by model.moe.router.balance_bias_rate, which is {rate:g}"] if rate else []
    return [*describe_losses(family.rules, family.architecture, config, losses), *by_bias]


def describe_positions(model: ModelConfig) -> list[str]:
    """Returns a sentence if long texts have the rotary positions of transformers, and not those of the model's
    authors."""
    scaling = model.position.scaling if isinstance(model.position, RopeConfig) else None
    if not isinstance(scaling, LongRopeScaling) or scaling.uses_long_factors:
        return []
    return [
        f"texts of more than {scaling.original_length} tokens have the short factors of rotary positions, too, as in "
        "transformers; the code of the model's authors takes the long ones there: set "
        "model.position.scaling.uses_long_factors to true for that"
    ]


def logical_shapes(model: ModelConfig) -> Shapes:
    """Returns the shape of every weight of a model, by logical name."""
    return {name.removeprefix("weights/"): shape for name, shape in expected_shapes(model, moments=False).items()}


def match_model_tensors(family: Family, config: Tree, model: ModelConfig) -> list[TensorPair]:
    """Returns the pairs of a model's tensors and those of its Hugging Face folder. config: the folder's config.json, on
    which the layout of some tensors depends."""
    experts = 0 if model.moe is None else model.moe.num_experts
    tensor_map = [*family.tensor_map(config), *MTP_TENSORS]
    return match_tensors(tensor_map, logical_shapes(model), experts)


def zeros_for_missing(
    pairs: list[TensorPair], ends: tuple[str, ...], folder: HuggingFaceFolder, shapes: Shapes
) -> tuple[list[TensorPair], list[str]]:
    """Returns the pairs, and a sentence if the folder lacks all tensors of which our names have one of these ends: then
    ours are made of none of theirs, and are 0 in float32. shapes: by our names."""
    optional = [pair for pair in pairs if pair.ours[0].endswith(ends)]
    lacking = [name for pair in optional for name in pair.theirs]
    if not lacking or any(name in folder.files for name in lacking):
        return pairs, []

    def without_theirs(pair: TensorPair) -> TensorPair:
        shape = shapes[pair.ours[0]]
        return replace(pair, theirs=(), transform=Transform(lambda _: [torch.zeros(shape)], lambda _: []))

    found = [without_theirs(pair) if pair in optional else pair for pair in pairs]
    return found, [f"the folder lacks {list_briefly(lacking)}, which transformers sets to 0, too"]


def refuse_larger_model(folder: HuggingFaceFolder, model: ModelConfig) -> None:
    """Raises a ValueError if a model has more parameters than the folder has numbers, before anything of its size is
    made."""
    found = sum(math.prod(folder.shape(name)) for name in folder.files)
    if model.num_params() > VALUES_PER_ELEMENT * found:
        raise ValueError(
            f"{folder.path}: config.json describes a model of {model.num_params():,} parameters, but the files hold "
            f"{found:,} numbers"
        )


def check_tensors(folder: HuggingFaceFolder, pairs: list[TensorPair], ours: Shapes, ignored: Container[str]) -> None:
    """Raises a ValueError for the first tensor that is missing, left over, or of another shape or dtype.

    ours: shapes by logical name. ignored: names that are not left over.
    """
    expected: dict[str, Tensor] = {}
    for pair in pairs:
        empty = [torch.empty(ours[name], device="meta") for name in pair.ours]  # a meta tensor has no data
        expected |= zip(pair.theirs, pair.transform.to_theirs(empty), strict=True)
    counts = f"{len(folder.files)} tensors found, {len(expected)} expected"
    for name in expected:
        if name not in folder.files:
            raise ValueError(f"{folder.path}: {name} is missing ({counts})")
    for name in folder.files:
        if name not in expected and name not in ignored:
            raise ValueError(f"{folder.path}: {name} is left over ({counts})")
    for name, tensor in expected.items():
        if (found := folder.shape(name)) != list(tensor.shape):
            raise ValueError(f"{folder.path}: {name} has shape {found}, expected {list(tensor.shape)}")
    packed = {name for name, tensor in expected.items() if tensor.dtype == torch.uint8}
    check_dtypes(folder, [name for name in expected if name not in packed])
    check_dtypes(folder, sorted(packed), ("U8",))
    for pair in pairs:
        if len({folder.dtype(name) for name in pair.theirs}) > 1:
            both = ", ".join(f"{name} is {folder.dtype(name)}" for name in pair.theirs)
            raise ValueError(f"{folder.path}: {both}: they become one tensor and must have the same dtype")


def check_dtypes(folder: HuggingFaceFolder, names: list[str], allowed: Collection[str] = tuple(DTYPES)) -> None:
    """Raises a ValueError if a tensor has another dtype than those allowed: by default those of checkpoints."""
    wrong = [name for name in names if folder.dtype(name) not in allowed]
    if wrong:
        raise ValueError(
            f"{folder.path}: {wrong[0]} is {folder.dtype(wrong[0])}, it must be {' or '.join(allowed)} ({len(wrong)} "
            "such tensors): save the model without quantization, then import it"
        )
