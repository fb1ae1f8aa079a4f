"""Formats the tables of `bench layer` and `bench train`."""

from expert_parallel.bench.layer import LayerResult, LayerRow
from expert_parallel.bench.train import TrainResult

MB = 10**6


def format_layer_result(result: LayerResult) -> str:
    """Formats the result of `bench layer`."""
    lines = [
        f"{result.shape}; {result.dtype}, forward and backward",
        str(result.facts),
        f"medians of {result.rounds} interleaved rounds, [smallest - largest], of the slowest rank; the fullest expert "
        f"has {result.fullest:.2f} times the mean's rows",
        f"one product of {result.product_size}^3: {result.product_rate / 1e9:,.0f} GFLOP/s a rank",
        *(
            f"same outputs: {', '.join(a.names)} ({a.activation}; largest difference {a.largest:.0e})"
            for a in result.agreements
        ),
        f"{'':26}{'computes':36}{'ms':>28}{'/ floor':>9}{'/ ours':>8}{'of product':>12}{'peak MB':>9}"
        f"{'activ. MB':>11}{'dropped':>9}{'sent MB':>9}{'/ least':>9}",
    ]
    for activation, times in result.floors.items():
        lines.append(f"{'floor, ' + activation:26}{'products of the experts alone':36}{times!s:>28}{1:9.2f}")
    lines += [layer_line(row) for row in result.rows]
    if result.minimum_bytes:
        lines.append(f"least that must be sent: {result.minimum_bytes / MB:.2f} MB, over all ranks")
    return "\n".join(line.rstrip() for line in lines)


def layer_line(row: LayerRow) -> str:
    """Formats the line of one implementation."""
    if row.times is None:
        return f"{row.name:26}not measured: {row.why}"
    assert row.over_floor is not None
    assert row.over_ours is not None
    assert row.peak is not None
    return (
        f"{row.name:26}{row.computes:36}{row.times!s:>28}{row.over_floor:9.2f}{row.over_ours:8.2f}"
        + (f"{row.of_product:12.0%}" if row.of_product is not None else f"{'-':>12}")
        + f"{row.peak.total / MB:9.1f}{row.peak.activations / MB:11.1f}"
        + share_cell(row.dropped_share)
        + (f"{row.bytes_sent / MB:9.2f}" if row.bytes_sent is not None else f"{'-':>9}")
        + (f"{row.over_minimum:9.2f}" if row.over_minimum is not None else f"{'-':>9}")
    )


def share_cell(share: float | None) -> str:
    """Formats a share as a cell, `-` for None."""
    return f"{'-':>9}" if share is None else f"{share:9.1%}"


def format_train_result(result: TrainResult) -> str:
    """Formats the result of `bench train`."""
    total, active = result.parameters
    lines = [
        f"{result.shape}; {result.dtype}; {total / 1e6:,.1f} M parameters, {active / 1e6:,.1f} M for a token",
        str(result.facts),
        f"AdamW; medians of {result.rounds} interleaved rounds, [smallest - largest], of the slowest rank",
        f"one product of {result.product_size}^3: {result.product_rate / 1e9:,.0f} GFLOP/s a rank, which MFU is of",
        f"{'':26}{'computes':48}{'ms':>30}{'/ ours':>8}{'tokens/s':>11}{'MFU':>7}{'peak MB':>10}{'dropped':>9}"
        f"{'loss':>8}",
    ]
    for row in result.rows:
        if row.times is None:
            lines.append(f"{row.name:26}not measured: {row.why}")
            continue
        lines.append(
            f"{row.name:26}{row.computes:48}{row.times!s:>30}{row.over_ours:8.2f}{row.tokens_per_second:11,.0f}"
            f"{row.mfu:7.1%}{(row.peak or 0) / MB:10.1f}" + share_cell(row.dropped_share) + f"{row.loss:8.3f}"
        )
    return "\n".join(lines)
