"""Multiplies rows that are grouped by expert with the experts' matrices. `GROUPED_GEMMS` maps each `backend:` to its
implementation.

rows:  result[r] = x[r] @ weight[expert of row r]            (R, K), (e, K, N) -> (R, N)
sums:  result[e] = sum over the rows of e of x[r]^T g[r]     (R, K), (R, N)    -> (e, K, N)
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class GroupedGemm:
    """Holds the functions of one backend.

    groups: turns counts_e into the description of the groups that `rows` and `sums` take. rows: is differentiable.
    pad_group_sizes: turns counts_e and K * N into group sizes that are usually faster although rows of zeros fill them
    up; None if the backend is fastest without padding.
    """

    groups: Callable[[Tensor], Any]
    rows: Callable[[Tensor, Tensor, Any], Tensor]
    sums: Callable[[Tensor, Tensor, Any], Tensor]
    pad_group_sizes: Callable[[Tensor, int], Tensor] | None = None


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


class ExpertSpan(NamedTuple):
    """Consecutive experts, each with `rows` rows."""

    experts: int
    rows: int


# What a product costs beside its own operations, in operations: bfloat16 with AVX512-BF16 (moe/MEASUREMENTS.md, log).
CALL_FLOPS = 2.5e6


def bmm_rows(x_RK: Tensor, weight_eKN: Tensor, runs: list[ExpertSpan]) -> Tensor:
    """Neighbours with equally many rows are one batched product. Any dtype. Autocast has no say in it, as it would have
    none where a result's place is given."""
    weights = weight_eKN.split([run.experts for run in runs])
    if torch.is_grad_enabled():
        with torch.autocast(x_RK.device.type, enabled=False):
            blocks = [torch.bmm(x, weight) for x, weight in zip(_stacked(x_RK, runs), weights, strict=True)]
        return torch.cat([block.flatten(0, 1) for block in blocks])
    result_RN = x_RK.new_empty(len(x_RK), weight_eKN.shape[2])
    for x, weight, result in zip(_stacked(x_RK, runs), weights, _stacked(result_RN, runs), strict=True):
        torch.bmm(x, weight, out=result)
    return result_RN


def bmm_sums(x_RK: Tensor, g_RN: Tensor, runs: list[ExpertSpan]) -> Tensor:
    result_eKN = x_RK.new_empty(sum(run.experts for run in runs), x_RK.shape[1], g_RN.shape[1])
    results = result_eKN.split([run.experts for run in runs])
    for x, g, result in zip(_stacked(x_RK, runs), _stacked(g_RN, runs), results, strict=True):
        torch.bmm(x.mT, g, out=result)
    return result_eKN


def _stacked(x_RK: Tensor, runs: list[ExpertSpan]) -> list[Tensor]:
    """Of each run (experts, rows, K)."""
    blocks = x_RK.split([run.experts * run.rows for run in runs])
    return [block.reshape(run.experts, run.rows, block.shape[1]) for block, run in zip(blocks, runs, strict=True)]


def expert_spans(counts_e: Tensor) -> list[ExpertSpan]:
    """counts 3 3 5 5 5 -> (2 experts of 3 rows) (3 of 5). On a GPU the host waits."""
    return [ExpertSpan(len(list(run)), rows) for rows, run in groupby(counts_e.tolist())]


def pad_group_sizes(counts_e: Tensor, product_size: int) -> Tensor:
    """counts_e, some raised to their neighbours', so that there are few runs. An expert joins the run before it if the
    rows of zeros that this takes cost less than a product more would, and leave the run with half as many rows again
    at most. Experts without rows get none: their weights need not be read. product_size: K * N. On a GPU the host
    waits."""
    affordable = CALL_FLOPS / (2 * product_size)
    runs, own = [ExpertSpan(0, 0)], 0  # own: rows of the last run that are not zeros
    for count in counts_e.tolist():
        experts, rows = runs[-1]
        higher = max(rows, count)
        total = higher * (experts + 1)
        is_cheap = total - rows * experts - count <= affordable and 2 * total <= 3 * (own + count)
        if is_cheap and (rows == 0) == (count == 0):
            runs[-1], own = ExpertSpan(experts + 1, higher), own + count
        else:
            runs.append(ExpertSpan(1, count))
            own = count
    return counts_e.new_tensor([run.rows for run in runs for _ in range(run.experts)])


def _as_dtype(x: Tensor, product: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
    """product(x, y), computed in float32 where this CPU has no instructions for products of 16-bit numbers: torch's are
    then several times slower than float32's (moe/MEASUREMENTS.md, log)."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not has_bfloat16_gemm():
        return product(x.float(), y.float()).to(x.dtype)
    return product(x, y)


def has_bfloat16_gemm() -> bool:
    """Private names of torch, here alone. Where a release lacks them, its own product is used."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()


# backend -> its products. loop, bmm: any dtype and device. grouped_mm: float32 and bfloat16, on CUDA bfloat16 alone.
GROUPED_GEMMS: dict[str, GroupedGemm] = {
    "loop": GroupedGemm(lambda counts_e: counts_e.tolist(), loop_rows, loop_sums),
    "grouped_mm": GroupedGemm(lambda counts_e: counts_e.cumsum(0, dtype=torch.int32), grouped_mm_rows, grouped_mm_sums),
    "bmm": GroupedGemm(expert_spans, bmm_rows, bmm_sums, pad_group_sizes),
}
