"""Reports a run's metrics: metrics.jsonl, TensorBoard events, and lines on the terminal."""

import json
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from expert_parallel.checkpoint.folders import write_atomically
from expert_parallel.moe.conservation import LayerTotals
from expert_parallel.training.step import StepReport

Metrics = dict[str, float]
EXPERT_LOAD = re.compile(r"(.*layer_\d+)/load/\d+")  # the share of one expert (see `_expert_load_shares`)


def step_metrics(report: StepReport, prefix: str) -> Metrics:
    """Returns the metrics of one step by name: `train/...` or `eval/...` as `prefix` says, each metric of the MoE
    layers as `moe/layer_<i>/...`, and its mean over these layers as `moe/...` (in evaluation `eval/moe/...`). The loss
    of each depth of multi-token prediction is `loss/mtp_<depth>` (`eval/loss/mtp_<depth>`)."""
    metrics: Metrics = {f"{prefix}/loss": report.loss}
    further = "loss" if prefix == "train" else "eval/loss"
    metrics |= {f"{further}/mtp_{depth}": loss for depth, loss in enumerate(report.mtp_losses, start=1)}
    if prefix == "train":
        metrics |= {"train/grad_norm": report.grad_norm, "train/learning_rate": report.learning_rate}
    if not report.layers:
        return metrics
    moe = "moe" if prefix == "train" else "eval/moe"
    layers = {layer: _layer_metrics(totals, len(report.layers)) for layer, totals in report.layers.items()}
    for name in next(iter(layers.values())):
        metrics[f"{moe}/{name}"] = sum(values[name] for values in layers.values()) / len(layers)
    for layer, values in layers.items():
        values = values | _expert_load_shares(report.layers[layer])
        metrics |= {f"{moe}/layer_{layer}/{name}": value for name, value in values.items()}
    return metrics


def _layer_metrics(totals: LayerTotals, num_layers: int) -> Metrics:
    """Returns the metrics of one layer. Losses pooled over layers are scaled by their number, as a mean follows."""
    # The totals are on the CPU (StepTotals.reduce), so these reads need no device sync.
    routed = max(int(totals.routed_E.sum()), 1)
    tokens = max(totals.num_tokens, 1)
    dead = (totals.kept_E + totals.rerouted_E) == 0
    metrics: Metrics = {
        "dropped_share": int(totals.dropped_E.sum()) / routed,
        "dropped_receive_bound_share": int(totals.dropped_receive_bound_E.sum()) / routed,
        "rerouted_share": int(totals.rerouted_E.sum()) / routed,
        "unserved_share": totals.num_tokens_without_expert / tokens,
        "load_cv": coefficient_of_variation(totals.routed_E),
        "dead_expert_share": float(dead.double().mean()),
        "router_entropy": totals.entropy / tokens,
        "rows_in_node": totals.rows_moved["node"],
        "rows_between_nodes": totals.rows_moved["network"],
        "bytes_in_node": totals.bytes_sent["node"],
        "bytes_between_nodes": totals.bytes_sent["network"],
        "bytes_gathered": totals.gathered_bytes,
    }
    losses = {n: v * (num_layers if n.endswith("_pooled") else 1) for n, v in totals.losses.items()}
    balance = [value for name, value in losses.items() if name.startswith("balance")]
    metrics |= {"balance_loss": sum(balance) / len(balance)} if balance else {}
    return metrics | losses


def _expert_load_shares(totals: LayerTotals) -> Metrics:
    """Returns each expert's share of all choices that were computed."""
    served_E = totals.kept_E + totals.rerouted_E
    return {
        f"load/{expert}": share
        for expert, share in enumerate((served_E.double() / served_E.sum().clamp(min=1)).tolist())
    }


def coefficient_of_variation(load_E: Tensor) -> float:
    """Returns standard deviation / mean of the numbers of choices per expert: 0 if balanced, sqrt(E - 1) if one expert
    has all."""
    load_E = load_E.double()
    return float(load_E.std(correction=0) / load_E.mean().clamp(min=1e-300))


class MetricsWriter:
    """Writes `folder/metrics.jsonl` and `folder/tensorboard`.

    first_step: the step of the checkpoint that the run resumes from, or 0. Metrics logged after this step are dropped,
    so that each step appears once. histogram_every: the number of steps between two histograms.

    metrics.jsonl has every number of every step. TensorBoard has a histogram over the experts of each layer,
    `moe/layer_<i>/expert_load`, instead of a curve for each expert: 48 layers of 128 experts would be 6,144 curves.
    """

    def __init__(self, folder: Path, first_step: int, histogram_every: int) -> None:
        path = folder / "metrics.jsonl"
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= first_step]
        write_atomically(path, "".join(kept))  # atomic: a kill or a full disk loses nothing
        self.file: TextIO = path.open("a")
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.histogram_every = histogram_every

    def write(self, step: int, tokens: int, metrics: Metrics) -> None:
        """Writes one step's metrics. tokens: the number of tokens that the whole run has been trained on so far."""
        record: dict[str, Any] = {"step": step, "tokens": tokens, **metrics}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        loads: dict[str, list[float]] = {}
        for name, value in metrics.items():
            if (match := EXPERT_LOAD.fullmatch(name)) is None:
                self.tensorboard.add_scalar(name, value, step)
            else:
                loads.setdefault(match[1], []).append(value)
        for layer, shares in loads.items():
            if step % self.histogram_every == 0 or layer.startswith("eval/"):
                # Times the even share, so that 1 is even whatever the number of experts is. It is not named `load`,
                # as the load loss is.
                times_even_E = np.array(shares) * len(shares)
                self.tensorboard.add_histogram(f"{layer}/expert_load", times_even_E, step)

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()


def _complete_lines(path: Path) -> list[str]:
    """Returns the complete lines of a file: a run that was killed may have left half of one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def format_progress_line(step: int, total: int, metrics: Metrics) -> str:
    """Formats the line that the terminal shows for a step."""
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    shown = (
        ("train/loss", "loss", "{:.4f}"),
        ("eval/loss", "held-out loss", "{:.4f}"),
        ("train/grad_norm", "grad norm", "{:.2f}"),
        ("perf/tokens_per_second", "tokens/s", "{:,.0f}"),
        ("moe/dropped_share", "dropped", "{:.1%}"),
        ("moe/balance_loss", "balance", "{:.3f}"),
        ("moe/load_cv", "load cv", "{:.2f}"),
    )
    parts += [f"{label} {form.format(metrics[name])}" for name, label, form in shown if name in metrics]
    if metrics.get("moe/rerouted_share", 0) > 0:
        parts.append(f"rerouted {metrics['moe/rerouted_share']:.1%}")
    if metrics.get("moe/dropped_receive_bound_share", 0) > 0:
        share = metrics["moe/dropped_receive_bound_share"]
        parts.append(f"{share:.1%} OF CHOICES DROPPED AT model.moe.capacity.receive_bound")
    return "  ".join(parts)


def memory_metrics(device: torch.device) -> Metrics:
    """Returns the metric of the peak memory of this rank so far, in bytes.

    On GPUs it is what torch allocated. On CPUs, where torch does not measure it, it is the resident memory of the
    process (ru_maxrss of getrusage), with libraries and data.
    """
    if device.type == "cuda":
        return {"perf/peak_memory_bytes": torch.cuda.max_memory_allocated(device)}
    return {"perf/peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}  # Linux: in KiB


class ThroughputTimer:
    """Measures the seconds a step, and the tokens per second, of training alone, without the time in which it is paused
    (evaluation, saving)."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.start, self.steps = time.perf_counter(), 0

    def count_step(self) -> None:
        self.steps += 1

    def read(self) -> Metrics:
        """Returns the mean over the steps since the previous reading."""
        now = time.perf_counter()
        seconds = (now - self.start) / self.steps
        self.start, self.steps = now, 0
        return {"perf/tokens_per_second": self.tokens_per_step / seconds, "perf/step_seconds": seconds}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside the context."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin
