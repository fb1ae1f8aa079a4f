"""Products of rows that are grouped by expert with the experts' matrices. `PRODUCTS` maps each `backend:` to its own.

rows:  result[r] = x[r] @ weight[expert of row r]            (R, K), (e, K, N) -> (R, N)
sums:  result[e] = sum over the rows of e of x[r]^T g[r]     (R, K), (R, N)    -> (e, K, N)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Products:
    """groups: from counts_e what the other two want to know of the groups. rows is differentiable."""

    groups: Callable[[Tensor], Any]
    rows: Callable[[Tensor, Tensor, Any], Tensor]
    sums: Callable[[Tensor, Tensor, Any], Tensor]


def loop_rows(x_RK: Tensor, weight_eKN: Tensor, sizes: list[int]) -> Tensor:
    """One product an expert. Any dtype. unbind, since indexing would allocate a full gradient for each expert."""
    blocks = zip(x_RK.split(sizes), weight_eKN.unbind(0), strict=True)
    return torch.cat([x @ weight for x, weight in blocks])


def loop_sums(x_RK: Tensor, g_RN: Tensor, sizes: list[int]) -> Tensor:
    return torch.stack([x.T @ g for x, g in zip(x_RK.split(sizes), g_RN.split(sizes), strict=True)])


def grouped_mm_rows(x_RK: Tensor, weight_eKN: Tensor, ends_e: Tensor) -> Tensor:
    if x_RK.shape[0] == 0:  # not every device's kernel takes an empty product
        return x_RK @ weight_eKN.sum(0)
    return _as_dtype(x_RK, lambda x, weight: F.grouped_mm(x, weight, offs=ends_e), weight_eKN)


def grouped_mm_sums(x_RK: Tensor, g_RN: Tensor, ends_e: Tensor) -> Tensor:
    if x_RK.shape[0] == 0:
        return x_RK.new_zeros(len(ends_e), x_RK.shape[1], g_RN.shape[1])
    return _as_dtype(x_RK, lambda x, g: F.grouped_mm(x.T, g, offs=ends_e), g_RN)


def _as_dtype(x: Tensor, product: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
    """product(x, y), computed in float32 where this CPU has no instructions for products of 16-bit numbers: torch's are
    then several times slower than float32's (README.md, log)."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not multiplies_bfloat16():
        return product(x.float(), y.float()).to(x.dtype)
    return product(x, y)


def multiplies_bfloat16() -> bool:
    """Private names of torch, here alone. Where a release lacks them, its own product is used."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()


# backend -> its products. loop: any dtype and device. grouped_mm: float32 and bfloat16, on CUDA bfloat16 alone.
PRODUCTS: dict[str, Products] = {
    "loop": Products(lambda counts_e: counts_e.tolist(), loop_rows, loop_sums),
    "grouped_mm": Products(lambda counts_e: counts_e.cumsum(0, dtype=torch.int32), grouped_mm_rows, grouped_mm_sums),
}
