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

    groups: turns counts_e, the number of rows of each expert, into the last argument of `rows` and `sums`. rows, sums:
    compute the two products above; `rows` is differentiable. pad_group_sizes: turns counts_e and K * N into group sizes
    that are usually faster although rows of zeros fill them up; None if the backend is fastest without padding.
    """

    groups: Callable[[Tensor], Any]
    rows: Callable[[Tensor, Tensor, Any], Tensor]
    sums: Callable[[Tensor, Tensor, Any], Tensor]
    pad_group_sizes: Callable[[Tensor, int], Tensor] | None = None


def loop_rows(x_RK: Tensor, weight_eKN: Tensor, sizes: list[int]) -> Tensor:
    """Computes `rows` by one product for each expert, in any dtype."""
    # unbind: the gradient of an indexing expression would be a tensor of all experts' size for each expert.
    blocks = zip(x_RK.split(sizes), weight_eKN.unbind(0), strict=True)
    return torch.cat([x @ weight for x, weight in blocks])


def loop_sums(x_RK: Tensor, g_RN: Tensor, sizes: list[int]) -> Tensor:
    """Computes `sums` by one product for each expert, in any dtype."""
    return torch.stack([x.T @ g for x, g in zip(x_RK.split(sizes), g_RN.split(sizes), strict=True)])


def grouped_mm_rows(x_RK: Tensor, weight_eKN: Tensor, ends_e: Tensor) -> Tensor:
    """Computes `rows` by torch's grouped_mm. ends_e: int32, the end of each expert's rows."""
    if x_RK.shape[0] == 0:  # the kernels of some devices reject empty products; the sum keeps weights in the graph
        return x_RK @ weight_eKN.sum(0)
    return _as_dtype(x_RK, lambda x, weight: F.grouped_mm(x, weight, offs=ends_e), weight_eKN)


def grouped_mm_sums(x_RK: Tensor, g_RN: Tensor, ends_e: Tensor) -> Tensor:
    """Computes `sums` by torch's grouped_mm. ends_e: int32, the end of each expert's rows."""
    if x_RK.shape[0] == 0:
        return x_RK.new_zeros(len(ends_e), x_RK.shape[1], g_RN.shape[1])
    return _as_dtype(x_RK, lambda x, g: F.grouped_mm(x.T, g, offs=ends_e), g_RN)


class ExpertSpan(NamedTuple):
    """Describes consecutive experts that have equally many rows: how many experts, and how many rows each."""

    experts: int
    rows: int


# The overhead of a call of bmm, in floating-point operations that take as long; measured for bfloat16 with AVX512-BF16
# (moe/MEASUREMENTS.md, log).
CALL_FLOPS = 2.5e6


def bmm_rows(x_RK: Tensor, weight_eKN: Tensor, spans: list[ExpertSpan]) -> Tensor:
    """Computes `rows` by one batched product for each span of experts, in any dtype. Runs with autocast disabled.

    Without autograd (as in fused.py), each product is written directly into the result. Autocast does not apply to such
    products, and so must not apply to the others.
    """
    weights = weight_eKN.split([span.experts for span in spans])
    if torch.is_grad_enabled():
        with torch.autocast(x_RK.device.type, enabled=False):
            blocks = [torch.bmm(x, weight) for x, weight in zip(_stacked(x_RK, spans), weights, strict=True)]
        return torch.cat([block.flatten(0, 1) for block in blocks])
    result_RN = x_RK.new_empty(len(x_RK), weight_eKN.shape[2])
    for x, weight, result in zip(_stacked(x_RK, spans), weights, _stacked(result_RN, spans), strict=True):
        torch.bmm(x, weight, out=result)
    return result_RN


def bmm_sums(x_RK: Tensor, g_RN: Tensor, spans: list[ExpertSpan]) -> Tensor:
    """Computes `sums` by one batched product for each span of experts, in any dtype."""
    result_eKN = x_RK.new_empty(sum(span.experts for span in spans), x_RK.shape[1], g_RN.shape[1])
    results = result_eKN.split([span.experts for span in spans])
    for x, g, result in zip(_stacked(x_RK, spans), _stacked(g_RN, spans), results, strict=True):
        torch.bmm(x.mT, g, out=result)
    return result_eKN


def _stacked(x_RK: Tensor, spans: list[ExpertSpan]) -> list[Tensor]:
    """Splits rows into a view (experts, rows, K) for each span."""
    blocks = x_RK.split([span.experts * span.rows for span in spans])
    return [block.reshape(span.experts, span.rows, block.shape[1]) for block, span in zip(blocks, spans, strict=True)]


def expert_spans(counts_e: Tensor) -> list[ExpertSpan]:
    """Groups consecutive experts with equal counts: 3 3 5 5 5 -> (2 experts of 3 rows) (3 of 5)."""
    counts = counts_e.tolist()  # the host waits: counts become shapes
    return [ExpertSpan(len(list(equal)), rows) for rows, equal in groupby(counts)]


def pad_group_sizes(counts_e: Tensor, product_size: int) -> Tensor:
    """Returns counts_e with some counts raised to those of neighbouring experts, so that there are fewer spans.

    An expert joins the span before it if the added rows of zeros cost less than another product would, and if at most
    a third of the span's rows are zeros. Experts without rows get none, so that their weights are not read.
    product_size: K * N.
    """
    affordable = CALL_FLOPS / (2 * product_size)  # in rows
    spans = [ExpertSpan(0, 0)]
    own = 0  # rows of the last span that are not padding
    for count in counts_e.tolist():  # the host waits, as for expert_spans
        experts, rows = spans[-1]
        higher = max(rows, count)
        total = higher * (experts + 1)
        is_cheap = total - rows * experts - count <= affordable and 2 * total <= 3 * (own + count)
        if is_cheap and (rows == 0) == (count == 0):
            spans[-1] = ExpertSpan(experts + 1, higher)
            own += count
        else:
            spans.append(ExpertSpan(1, count))
            own = count
    return counts_e.new_tensor([span.rows for span in spans for _ in range(span.experts)])


def _as_dtype(x: Tensor, product: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
    """Returns product(x, y) in x's dtype, computed in float32 on a CPU without bfloat16 instructions: there torch's
    bfloat16 products are several times slower than float32's (moe/MEASUREMENTS.md, log)."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not has_bfloat16_gemm():
        return product(x.float(), y.float()).to(x.dtype)
    return product(x, y)


def has_bfloat16_gemm() -> bool:
    """Returns True if this CPU has instructions for products of bfloat16 numbers.

    It reads a private name of torch. With a release of torch that lacks this name it returns True, so that torch's own
    bfloat16 product is used.
    """
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()


# Each backend's functions. loop and bmm take any dtype and device; for grouped_mm see grouped.supports_grouped_mm. In
# the groups of `loop`, tolist makes the host wait: counts become shapes.
GROUPED_GEMMS: dict[str, GroupedGemm] = {
    "loop": GroupedGemm(lambda counts_e: counts_e.tolist(), loop_rows, loop_sums),
    "grouped_mm": GroupedGemm(lambda counts_e: counts_e.cumsum(0, dtype=torch.int32), grouped_mm_rows, grouped_mm_sums),
    "bmm": GroupedGemm(expert_spans, bmm_rows, bmm_sums, pad_group_sizes),
}
