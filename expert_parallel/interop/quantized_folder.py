"""Reads a folder of quantized weights as if they were plain ones, tensor by tensor."""

from pathlib import Path

import torch
from torch import Tensor

from expert_parallel.checkpoint.manifest import DTYPE_NAMES
from expert_parallel.interop.folder import HuggingFaceFolder
from expert_parallel.interop.quantization import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    BlockQuantization,
    read_quantization,
)

SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
SHAPE_DTYPES = ("I32", "I64")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def open_folder(path: Path, dtype: str | None = None) -> HuggingFaceFolder:
    """Opens a folder, whose weights may be quantized. dtype: what quantized weights become; None stands for the
    smallest dtype that loses nothing. Raises a ValueError as the classes of folders do, and for a dtype that is of no
    use."""
    folder = HuggingFaceFolder(path)
    quantization = read_quantization(folder.config)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}, it must be one of {', '.join(DTYPES)}")
    if quantization is not None:
        return QuantizedFolder(folder, quantization, None if dtype is None else DTYPES[dtype])
    if dtype is not None:
        raise ValueError(
            f"--dtype is {dtype!r}, but {path} has no weights in fp8 or int4 blocks: others keep their dtype"
        )
    return folder


class QuantizedFolder(HuggingFaceFolder):
    """Shows each quantized weight of a folder as one tensor of its own shape, in a dtype of choice.

    stored: the folder with the tensors of its files. dtype: None stands for the smallest that loses nothing beyond the
    formula of the method. `weights` holds the shapes of the quantized weights by name. Raises a ValueError that names
    the first tensor whose codes or scales are missing, or do not fit each other. No values are read.
    """

    def __init__(self, stored: HuggingFaceFolder, quantization: BlockQuantization, dtype: torch.dtype | None) -> None:
        self.path, self.config, self.file_names = stored.path, stored.config, stored.file_names
        self.stored, self.quantization = stored, quantization
        self.target = quantization.exact_dtype if dtype is None else dtype
        names = {
            name.removesuffix(suffix)
            for suffix in quantization.suffixes
            for name in stored.files
            if name.endswith(f".weight{suffix}")
            and (suffix or stored.dtype(name) == quantization.code_dtype)  # a plain weight has no suffix, either
        }
        self.weights = {name: self._checked_shape(name) for name in sorted(names)}
        parts = {part for name in self.weights for part in self.stored_names(name)}
        self.files = {name: file for name, file in stored.files.items() if name not in parts}
        self.files |= {name: stored.files[name + quantization.codes] for name in self.weights}

    def stored_names(self, name: str) -> list[str]:
        """Returns the names of the tensors in the files that hold a tensor."""
        return [name + suffix for suffix in self.quantization.suffixes] if name in self.weights else [name]

    def stored_bytes(self, name: str) -> int:
        """Returns the bytes that a tensor takes in the files."""
        return sum(self.stored.read(part).nbytes for part in self.stored_names(name))  # mapped, not read

    def shape(self, name: str) -> list[int]:
        """Returns a tensor's shape without reading its data."""
        return self.weights[name] if name in self.weights else self.stored.shape(name)

    def dtype(self, name: str) -> str:
        """Returns the dtype that a tensor is read in, as safetensors names it."""
        return DTYPE_NAMES[self.target] if name in self.weights else self.stored.dtype(name)

    def read(self, name: str) -> Tensor:
        """Reads a tensor to the CPU: a quantized weight as code x scale, rounded to the dtype of choice."""
        if name not in self.weights:
            return self.stored.read(name)
        codes = self.stored.read(name + self.quantization.codes)
        return self.quantization.dequantize(codes, self.read_scales(name), self.target)

    def read_rows(self, name: str, first: int, end: int) -> Tensor:
        """Reads rows first to end - 1 of a matrix. Of a quantized one, which embeddings rarely are, all are read."""
        return self.read(name)[first:end] if name in self.weights else self.stored.read_rows(name, first, end)

    def read_scales(self, name: str) -> Tensor:
        """Reads the scales of a quantized weight, (blocks of rows, blocks of columns), in the dtype of the file."""
        return self.stored.read(name + self.quantization.scales)

    def check_values(self) -> None:
        """Raises a ValueError for the first scale that is not valid. Reads all scales, but no codes."""
        for name in self.weights:
            scales = self.read_scales(name).to(torch.float64)
            wrong = scales[~((scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE))]  # also NaN
            if len(wrong):
                raise self._wrong(
                    f"{name}{self.quantization.scales} holds the scale {float(wrong[0]):g}, it must be from "
                    f"{SMALLEST_SCALE:.1g} to {LARGEST_SCALE:.1g}"
                )
            odd = scales[torch.frexp(scales).mantissa != 0.5]
            if self.quantization.powers_of_two and self.target == torch.bfloat16 and len(odd):
                raise self._wrong(
                    f"{name}{self.quantization.scales} holds the scale {float(odd[0]):g}, it must be a power of two, "
                    "as scale_fmt 'ue8m0' says; --dtype float32 takes every scale"
                )
            if self.quantization.shape is not None:
                shape = self.stored.read(name + self.quantization.shape).tolist()
                if shape != self.weights[name]:
                    raise self._wrong(f"{name}{self.quantization.shape} is {shape}, expected {self.weights[name]}")

    def describe(self) -> str:
        """Returns a sentence on what the quantized weights become."""
        if not self.weights:
            form = self.quantization.describe()
            return f"no weight is stored as {form}, though config.json has it in quantization_config: all are plain"
        dtype = str(self.target).removeprefix("torch.")
        count = "1 weight is" if len(self.weights) == 1 else f"{len(self.weights):,} weights are"
        text = f"{count} stored as {self.quantization.describe()} and imported as {dtype}"
        if self.target == torch.float64 or (self.quantization.powers_of_two and self.target == torch.bfloat16):
            return f"{text}, which holds them exactly"
        if self.target == torch.float32:
            return f"{text}, the product of code and scale (--dtype bfloat16 rounds it, and takes half the space)"
        return f"{text}, which rounds the product of code and scale to 8 bits (--dtype float32 does not)"

    def _checked_shape(self, name: str) -> list[int]:
        """Returns the shape of a quantized weight, whose parts are all there and fit each other."""
        quantization, stored = self.quantization, self.stored
        codes, scales = name + quantization.codes, name + quantization.scales
        parts = [name + suffix for suffix in quantization.suffixes]
        found = [part for part in parts if part in stored.files]
        for part in parts:
            if part not in stored.files:
                raise self._wrong(f"{part} is missing, which {found[0]} needs")
        if quantization.codes and name in stored.files:
            raise self._wrong(f"{name} is stored twice: as it is, and as {codes}")
        allowed = {codes: (quantization.code_dtype,), scales: SCALE_DTYPES}
        for part in parts:
            if (dtype := stored.dtype(part)) not in allowed.get(part, SHAPE_DTYPES):
                raise self._wrong(f"{part} is {dtype}, it must be {' or '.join(allowed.get(part, SHAPE_DTYPES))}")
        shape = stored.shape(codes)
        if len(shape) != 2 or 0 in shape:
            raise self._wrong(f"{codes} has shape {shape}, it must be a matrix")
        rows, columns = shape[0], shape[1] * quantization.packed
        expected = quantization.scale_shape(rows, columns)
        if (scale_shape := stored.shape(scales)) != expected:
            raise self._wrong(
                f"{scales} has shape {scale_shape}, expected {expected} for {quantization.describe()} of {codes}, "
                f"which has shape {shape}"
            )
        return [rows, columns]

    def _wrong(self, sentence: str) -> ValueError:
        return ValueError(f"{self.path}: {sentence}")
