"""Reads `quantization_config` of a config.json: how the weights of a folder are stored in fewer bits.

A quantized weight is a matrix of codes whose blocks share a scale: weight = code x scale. `BlockQuantization` says how
both are stored; methods that are not of this kind, or not documented, are refused by name.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expert_parallel.interop.hf_config import Tree, short

Block = tuple[int | None, int | None]
Values = dict[str, tuple[Any, ...]]  # the values that a key may have
CHUNK = 128  # rows that are converted at once, or one block of rows if that is more
# With scales in this range, code x scale is a normal number of float32 and bfloat16: only its digits are rounded.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-100, 2.0**100


@dataclass(frozen=True)
class BlockQuantization:
    """Describes how the files hold a quantized weight `X` of shape (rows, columns): as tensors `X` + suffix.

    name: for messages. codes, scales, shape: suffixes; shape is None if no tensor repeats the shape. block: the rows
    and columns that share a scale; None stands for all. A last block may be smaller. code_dtype: as safetensors names
    it; I32 holds 8 codes of 4 bits. powers_of_two: True if all scales are powers of two.
    """

    name: str
    codes: str
    scales: str
    shape: str | None
    block: Block
    code_dtype: str
    powers_of_two: bool = False

    @property
    def suffixes(self) -> list[str]:
        """Returns the suffixes of the tensors that hold a weight: first that of its codes, then that of its scales."""
        return [suffix for suffix in (self.codes, self.scales, self.shape) if suffix is not None]

    @property
    def packed(self) -> int:
        """Returns the number of codes in one element of the files."""
        return 8 if self.code_dtype == "I32" else 1

    @property
    def is_fp8(self) -> bool:
        """Returns True if codes are numbers of 8 bits, which an export can write, too."""
        return self.code_dtype == "F8_E4M3"

    @property
    def exact_dtype(self) -> torch.dtype:
        """Returns the smallest dtype that holds code x scale as the methods define it: they round the product, of 4
        significant bits of a code and up to 24 of a scale, to float32. bfloat16 holds code x power of two exactly."""
        return torch.bfloat16 if self.powers_of_two else torch.float32

    def sizes(self, columns: int) -> tuple[int, int]:
        """Returns the rows and columns of a block, for a weight with this many columns."""
        assert self.block[0] is not None, "blocks of all rows are refused: one scale for a tensor"
        return self.block[0], columns if self.block[1] is None else self.block[1]

    def scale_shape(self, rows: int, columns: int) -> list[int]:
        """Returns the shape of the scales of a weight."""
        of_rows, of_columns = self.sizes(columns)
        return [-(-rows // of_rows), -(-columns // of_columns)]

    def chunk_rows(self, columns: int) -> int:
        """Returns how many rows to convert at once: whole blocks, so that memory holds few expanded scales."""
        of_rows, _ = self.sizes(columns)
        return of_rows * max(1, CHUNK // of_rows)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the codes of some rows as numbers."""
        if self.packed == 1:
            return codes.to(dtype)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)  # the lowest four bits come first; 8 stands for zero
        return ((codes[..., None] >> shifts & 15) - 8).flatten(-2).to(dtype)

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns code x scale as a tensor (rows, columns) of a dtype.

        codes: as stored. scales: (blocks of rows, blocks of columns). The product is made in float32 and then rounded
        to `dtype`, as the methods define it, or in float64 if that is the dtype, which is exact.
        """
        wide = torch.promote_types(torch.float32, dtype)
        out = torch.empty(codes.shape[0], codes.shape[1] * self.packed, dtype=dtype)
        rows, chunk = len(out), self.chunk_rows(out.shape[1])
        for first in range(0, rows, chunk):
            some = slice(first, min(first + chunk, rows))
            out[some] = self.decode(codes[some], wide).mul_(self.expand(scales, some, out.shape[1], wide))
        return out

    def expand(self, scales: Tensor, rows: slice, columns: int, dtype: torch.dtype) -> Tensor:
        """Returns the scale of each element of some rows, which begin with a block of rows."""
        of_rows, of_columns = self.sizes(columns)
        some = scales[rows.start // of_rows : -(-rows.stop // of_rows)].to(dtype)
        tall = some.repeat_interleave(of_rows, 0)[: rows.stop - rows.start]
        return tall.repeat_interleave(of_columns, 1)[:, :columns]

    def describe(self) -> str:
        """Returns a few words for a message, such as `fp8 (blocks of 128 x 128)`."""
        return f"{self.name} (blocks of {' x '.join('all' if size is None else str(size) for size in self.block)})"


def read_quantization(config: Tree) -> BlockQuantization | None:
    """Returns how the weights of a folder are quantized; None if they are not, or if they are gpt-oss's MXFP4, which
    its map of tensors reads. Raises a ValueError for every other method."""
    found = config.get("quantization_config")
    if not found or is_mxfp4(config):
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found
    reader = METHODS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise unsupported(method, "")
    return reader(found)


def is_mxfp4(config: Tree) -> bool:
    """Returns True if a config.json says that the folder is gpt-oss with experts in MXFP4."""
    found = config.get("quantization_config")
    is_its_method = isinstance(found, dict) and found.get("quant_method") == "mxfp4"
    return is_its_method and config.get("model_type") == "gpt_oss"


def unsupported(method: Any, detail: str) -> ValueError:
    """Returns the ValueError for a method of quantization. detail: which of its keys is the reason, if one is."""
    return ValueError(
        f"config.json: quantization_config has quant_method {short(method)}{detail}, which is not supported: import "
        "the weights that were quantized, or save the model without quantization (in transformers: from_pretrained, "
        "dequantize, save_pretrained), then import it"
    )


def check_keys(
    method: str, found: Any, place: str, allowed: dict[str, tuple[Any, ...]], other: Collection[str]
) -> Tree:
    """Returns a block of quantization_config. Raises a ValueError for a key with another value than those allowed, and
    for a key that nobody knows. place: what precedes the keys in messages. other: keys that may have any value here."""
    if not isinstance(found, dict):
        raise unsupported(method, f" with {place or 'quantization_config'} {short(found)}")
    for key, value in found.items():
        if key not in other and value not in allowed.get(key, ()):
            raise unsupported(method, f" with {place}{key} {short(value)}")
    return found


def read_block(method: str, key: str, value: Any) -> tuple[int, int]:
    """Returns the two sizes of a block. Raises a ValueError for another value."""
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    raise unsupported(method, f" with {key} {short(value)}")


def read_fp8(found: Tree) -> BlockQuantization:
    """Reads the format of DeepSeek-V3 (arXiv:2412.19437, section 3.3), which transformers calls fine-grained fp8.

    Which weights are quantized follows from the tensors in the files, so the lists of modules do not matter.
    """
    allowed = {
        "fmt": ("e4m3", "float8_e4m3fn"),
        "activation_scheme": ("dynamic",),  # activations are quantized in servers; no tensor of the folder says how
        "scale_fmt": (None, "float", "ue8m0"),
        "expert_dtype": (None, "fp8"),
    }
    modules = ("modules_to_not_convert", "ignored_layers", "modules_to_convert")
    check_keys("fp8", found, "", allowed, ("quant_method", "weight_block_size", "dequantize", *modules))
    block = read_block("fp8", "weight_block_size", found.get("weight_block_size"))
    powers_of_two = found.get("scale_fmt") == "ue8m0"
    return BlockQuantization("fp8", "", "_scale_inv", None, block, "F8_E4M3", powers_of_two)


def read_compressed_tensors(found: Tree) -> BlockQuantization:
    """Reads the formats of the library compressed-tensors that this package supports: int4 with a scale for each group
    of a row (`pack-quantized`), and fp8 with a scale for each row or block (`float-quantized`)."""
    method, group_keys = "compressed-tensors", ("targets", "input_activations", "weights", "format")
    other = ("quant_method", "format", "config_groups", "ignore", "global_compression_ratio", "version")
    allowed: Values = {
        "quantization_status": (None, "compressed"),
        "kv_cache_scheme": (None,),
        "sparsity_config": (None, {}),
        "transform_config": (None, {}),
    }
    groups = check_keys(method, found, "", allowed, other).get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise unsupported(method, f" with config_groups {short(groups)}")
    (group,) = groups.values()
    group = check_keys(method, group, "config_groups.", {"output_activations": (None,)}, group_keys)
    sizes = ("num_bits", "type", "strategy", "group_size", "block_structure")
    observed = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    allowed = {"symmetric": (True,), "dynamic": (False,), "actorder": (None,)}
    weights = check_keys(method, group.get("weights"), "weights.", allowed, (*sizes, *observed))
    form, kind = found.get("format"), [weights.get(key) for key in ("type", "num_bits", "strategy")]
    size = weights.get("group_size")
    if form == "pack-quantized" and kind == ["int", 4, "group"] and type(size) is int and size > 0:
        return BlockQuantization("int4", "_packed", "_scale", "_shape", (1, size), "I32")
    if form == "float-quantized" and kind == ["float", 8, "channel"]:
        return BlockQuantization("fp8", "", "_scale", None, (1, None), "F8_E4M3")
    if form == "float-quantized" and kind == ["float", 8, "block"]:
        block = read_block(method, "weights.block_structure", weights.get("block_structure"))
        return BlockQuantization("fp8", "", "_scale", None, block, "F8_E4M3")
    raise unsupported(method, f", format {short(form)} and weights {short(weights)}")


METHODS: dict[str, Callable[[Tree], BlockQuantization]] = {
    "fp8": read_fp8,
    "compressed-tensors": read_compressed_tensors,
}
