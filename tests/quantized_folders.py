"""Quantizes the weights of saved Hugging Face folders by formulas of its own, and returns the exact weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expert_parallel.interop.folder import CONFIG, SINGLE

Tensors = dict[str, Tensor]


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **changes}))


def is_quantized(name: str) -> bool:
    """As in released files: the matrices in blocks, but for those of routers."""
    return ".layers." in name and name.endswith(".weight") and "norm" not in name and ".gate.weight" not in name


def spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of each element, in float64."""
    tiled = torch.kron(scales.double(), torch.ones(block, dtype=torch.float64))
    return tiled[: shape[0], : shape[1]]


def quantize_fp8(folder: Path, block: tuple[int, int], scale_dtype: torch.dtype, **config: Any) -> Tensors:
    """Replaces the matrices of a single file by random codes and scales; other tensors become bfloat16, but for
    selection biases. Returns the weights that the folder now stands for, in float64.

    The codes have every bit pattern that is a number, -0 and the smallest ones too."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    tensors, exact = {}, {}
    for name, tensor in sorted(load_file(folder / SINGLE).items()):
        if not is_quantized(name):
            tensors[name] = tensor if "correction_bias" in name else tensor.to(torch.bfloat16)
            exact[name] = tensors[name].double()
            continue
        picked = torch.randint(0, len(patterns), tensor.shape, generator=generator)
        codes = patterns[picked].view(torch.float8_e4m3fn)
        size = [-(-rows // of) for rows, of in zip(tensor.shape, block, strict=True)]
        if config.get("scale_fmt") == "ue8m0":
            scales = torch.exp2(torch.randint(-12, -8, size, generator=generator)).to(scale_dtype)
        else:
            scales = (torch.rand(size, generator=generator) * 2e-3 + 1e-4).to(scale_dtype)
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        exact[name] = codes.double() * spread(scales, block, tensor.shape)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    change_config(folder, dtype="bfloat16", quantization_config={**method, **config})
    return exact


def quantize_int4(folder: Path, group_size: int) -> Tensors:
    """Replaces the experts' matrices of a single file by random codes of 4 bits, packed one after another, and scales,
    as Kimi K2 Thinking is released. Returns the weights that the folder now stands for, in float64."""
    generator = torch.Generator().manual_seed(7)
    tensors, exact = {}, {}
    for name, tensor in sorted(load_file(folder / SINGLE).items()):
        tensors[name] = tensor if "correction_bias" in name else tensor.to(torch.bfloat16)
        exact[name] = tensors[name].double()
        if ".experts." in name:
            del tensors[name]
            codes = torch.randint(-8, 8, tensor.shape, generator=generator)
            scales = (torch.rand(len(codes), codes.shape[1] // group_size, generator=generator) * 0.1).bfloat16()
            tensors |= {f"{name}_packed": pack(codes), f"{name}_scale": scales}
            tensors[f"{name}_shape"] = torch.tensor(tensor.shape)
            exact[name] = codes.double() * spread(scales, (1, group_size), codes.shape)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": True}
    weights |= {"actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax"}
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    form = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    form |= {"config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*self_attn.*"], "kv_cache_scheme": None}
    change_config(folder, dtype="bfloat16", quantization_config=form)
    return exact


def pack(codes: Tensor) -> Tensor:
    """Packs 8 codes of a row, plus 8, into 32 bits, the first in the lowest four, by arithmetic in Python."""
    rows = []
    for row in codes.tolist():
        words = [sum((code + 8) << 4 * n for n, code in enumerate(row[k : k + 8])) for k in range(0, len(row), 8)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)
