"""Writes weights back in blocks of fp8, in the format in which they were imported.

An import keeps the scales of a folder, one number for each block of weights. A block whose values are codes times its
kept scale, bit for bit, was not trained: it goes back as it was. Another block gets the scale max|w| / 448, and its
values are rounded.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expert_parallel.checkpoint.manifest import DTYPE_NAMES, DTYPES
from expert_parallel.interop.folder import HuggingFaceFolder
from expert_parallel.interop.hf_config import Tree
from expert_parallel.interop.quantization import LARGEST_SCALE, SMALLEST_SCALE, BlockQuantization, read_quantization
from expert_parallel.interop.quantized_folder import QuantizedFolder

KEPT_SCALES = "fp8_scales.safetensors"  # beside the config.json that a run keeps of its origin
FP8 = torch.float8_e4m3fn
LARGEST_CODE = torch.finfo(FP8).max  # 448
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def keep_scales(folder: HuggingFaceFolder, out: Path) -> None:
    """Writes into the folder `out` what an export in fp8 needs: the scales; the dtype that the weights are imported as;
    the dtypes of the tensors that are not quantized. Does nothing for folders without fp8."""
    if not isinstance(folder, QuantizedFolder) or not folder.quantization.is_fp8:
        return
    scales = {name: folder.read_scales(name).clone() for name in folder.weights}
    plain = {name: folder.dtype(name) for name in folder.files if name not in folder.weights}
    metadata = {"format": "pt", "dtype": DTYPE_NAMES[folder.target], "plain": json.dumps(plain)}
    save_file(scales, out / KEPT_SCALES, metadata=metadata)


@dataclass
class Rounding:
    """Adds up what rounding to fp8 changes. error, size: sums of |rounded - w| and of |w| over the values of blocks
    with new scales. largest: the largest |rounded - w|, divided by the largest |w| of its block."""

    num_weights: int = 0
    num_rounded: int = 0
    error: float = 0.0
    size: float = 0.0
    largest: float = 0.0

    def describe(self) -> str:
        """Returns a sentence on all weights that were written in fp8."""
        same = (
            f"{self.num_weights - self.num_rounded:,} of {self.num_weights:,} fp8 weights are as imported, bit for bit"
        )
        if not self.num_rounded:
            return same
        mean = self.error / self.size if self.size else 0.0
        return (
            f"{same}; the others were rounded: by {mean:.2%} of the values' size in the mean, by at most "
            f"{self.largest:.2%} of the largest value of a block"
        )


@dataclass
class Fp8Writer:
    """Converts tensors of a Hugging Face model to those of a folder in fp8, and adds up the rounding.

    A weight is quantized if it was so in the folder that the model was imported from, or if a weight there has the same
    name but for the numbers of layer and expert, since experts may have been added. config: `quantization_config`.
    dtype: what the weights were imported as. kept: the open file of scales, by name of the weight. plain: the dtypes of
    the other tensors.
    """

    config: Tree
    quantization: BlockQuantization
    dtype: torch.dtype
    kept: Any
    plain: dict[str, torch.dtype]
    rounding: Rounding = field(default_factory=Rounding)

    def __post_init__(self) -> None:
        self.names = set(self.kept.keys())
        self.templates = {template(name) for name in self.names}
        self.scale_dtype = self.kept.get_tensor(min(self.names)).dtype if self.names else torch.float32

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yields the names and tensors that stand in the files for a tensor of the model."""
        if template(name) in self.templates:
            codes, scales = self.quantize(name, tensor)
            yield name + self.quantization.codes, codes
            yield name + self.quantization.scales, scales
        else:
            yield name, tensor.to(self.plain.get(name, torch.bfloat16))

    def quantize(self, name: str, w: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the codes (rows, columns) of a weight, and the scales (blocks of rows, blocks of columns).

        Raises a ValueError for a value that is not finite: codes have no infinity.
        """
        codes, scales = torch.empty(w.shape, dtype=FP8), self.kept_scales(name, w)
        of_rows, _ = self.quantization.sizes(w.shape[1])
        rounded = False
        chunk = self.quantization.chunk_rows(w.shape[1])
        for first in range(0, len(w), chunk):
            rows, blocks = slice(first, first + chunk), slice(first // of_rows, (first + chunk) // of_rows)
            some = w[rows].contiguous()
            codes[rows], is_same = self.encode(some, scales[blocks])
            if not is_same.all():
                if not some.isfinite().all():
                    raise ValueError(f"{name} has a value that is not finite, which fp8 does not hold")
                scales[blocks] = torch.where(is_same, scales[blocks], self.new_scales(some))
                codes[rows], _ = self.encode(some, scales[blocks])
                self.add_rounding(some, codes[rows], scales[blocks], is_same)
                rounded = True
        self.rounding.num_weights += 1
        self.rounding.num_rounded += rounded
        return codes, scales.to(self.scale_dtype)

    def kept_scales(self, name: str, w: Tensor) -> Tensor:
        """Returns the kept scales of a weight in float32, which holds them exactly, or NaN if it had none."""
        shape = self.quantization.scale_shape(*w.shape)
        if name in self.names and self.kept.get_slice(name).get_shape() == shape:
            return self.kept.get_tensor(name).to(torch.float32)
        return torch.full(shape, torch.nan)

    def encode(self, w: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the codes of whole blocks of rows, and which blocks are codes x scale, bit for bit."""
        expanded = self.quantization.expand(scales, slice(0, len(w)), w.shape[1], wide_dtype(w))
        codes = w.to(expanded.dtype).div(expanded).clamp_(-LARGEST_CODE, LARGEST_CODE).to(FP8)
        back = self.quantization.dequantize(codes, scales, self.dtype).to(w.dtype)
        bits = INTEGERS[w.element_size()]  # as integers, since NaN differs from itself
        return codes, ~self.blocks(back.view(bits) != w.view(bits)).any(3).any(1)

    def blocks(self, x: Tensor) -> Tensor:
        """Returns rows as (blocks of rows, rows of a block, blocks of columns, columns of a block), with zeros behind
        the last row and column."""
        of_rows, of_columns = self.quantization.sizes(x.shape[1])
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % of_columns, 0, -len(x) % of_rows))
        return padded.unflatten(1, (-1, of_columns)).unflatten(0, (-1, of_rows))

    def new_scales(self, w: Tensor) -> Tensor:
        """Returns max|w| / 448 of each block, or the next power of two if the format has such scales, as the file holds
        it. A block of zeros has the scale 1."""
        highest = self.blocks(w.to(wide_dtype(w)).abs()).amax((1, 3))
        smallest = max(SMALLEST_SCALE, torch.finfo(self.scale_dtype).tiny)  # float16 would make smaller ones zero
        scales = (highest / LARGEST_CODE).to(torch.float32).clamp(smallest, LARGEST_SCALE)
        if self.quantization.powers_of_two:
            mantissa, exponent = torch.frexp(scales)  # mantissa x 2^exponent, the mantissa from 0.5 to 1
            scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
        return torch.where(highest > 0, scales, 1.0).to(self.scale_dtype).to(torch.float32)

    def add_rounding(self, w: Tensor, codes: Tensor, scales: Tensor, is_same: Tensor) -> None:
        """Adds the errors of the blocks that are not the same."""
        back = self.quantization.dequantize(codes, scales, torch.float64)
        errors, sizes = (
            self.blocks(x.abs()).movedim(2, 1)[~is_same].flatten(1)
            for x in (back - w.to(torch.float64), w.to(torch.float64))
        )
        self.rounding.error += float(errors.sum())
        self.rounding.size += float(sizes.sum())
        highest = sizes.amax(1).clamp(min=torch.finfo(torch.float64).tiny)  # a block of zeros has no error
        self.rounding.largest = max(self.rounding.largest, float((errors.amax(1) / highest).max()))


def wide_dtype(w: Tensor) -> torch.dtype:
    """Returns the dtype in which weights are divided by scales: float32, or float64 for such weights."""
    return torch.promote_types(torch.float32, w.dtype)


def template(name: str) -> str:
    """Returns a tensor's name without the numbers of layer and expert."""
    return re.sub(r"\.\d+(?=\.)", ".#", name)


def open_fp8_writer(origin: Path | None, family: str, config: Tree) -> Fp8Writer:
    """Opens the scales that an import kept. origin: the folder of Hugging Face files of a run, or None. config: its
    config.json. Raises a ValueError if there are none, or if another family is written."""
    path = None if origin is None else origin / KEPT_SCALES
    if path is None or not path.is_file():
        raise ValueError(
            "--dtype fp8 needs the scales that an import from a folder in fp8 keeps, which say what to quantize, and "
            f"there is no {'folder of the import' if path is None else path}: choose another dtype"
        )
    if family != config.get("model_type"):
        raise ValueError(
            f"--dtype fp8 writes the family that was imported, which is {config.get('model_type')}, but the model is "
            f"exported as {family}: choose another dtype"
        )
    quantization = read_quantization(config)
    try:
        kept = safe_open(path, "pt")
        metadata = kept.metadata() or {}
        dtype, plain = DTYPES[metadata["dtype"]], json.loads(metadata["plain"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if quantization is None or not quantization.is_fp8:
        raise ValueError(f"{path} holds scales, but config.json beside it has no quantization_config in fp8")
    dtypes = {name: DTYPES[found] for name, found in plain.items() if found in DTYPES}
    return Fp8Writer(config["quantization_config"], quantization, dtype, kept, dtypes)
