"""What TensorBoard shows: a histogram of each layer's loads instead of a curve for each expert, and the step's cost."""

import json
import resource
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from expert_parallel.training.metrics import MetricsWriter, ThroughputTimer, memory_metrics

LAYERS, EXPERTS = 3, 64
# Half of the experts compute three times as much as the others: 1.5 and 0.5 times the even share.
SHARES = [(1.5 if expert < EXPERTS // 2 else 0.5) / EXPERTS for expert in range(EXPERTS)]


def loads(prefix: str) -> dict[str, float]:
    return {
        f"{prefix}/layer_{layer}/load/{expert}": share for layer in range(LAYERS) for expert, share in enumerate(SHARES)
    }


def test_loads_are_a_histogram_of_each_layer(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, histogram_every=5)
    for step in range(1, 11):
        # A load loss has the name `load`: no histogram may have the same.
        metrics = {"train/loss": 1.0, "moe/layer_0/load": 0.3, **loads("moe")}
        writer.write(step, 0, metrics | (loads("eval/moe") if step == 7 else {}))
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "moe/layer_0/load"}
    steps = {tag: [event.step for event in events.Histograms(tag)] for tag in events.Tags()["histograms"]}
    layers = [f"layer_{layer}/expert_load" for layer in range(LAYERS)]
    assert steps == {f"moe/{layer}": [5, 10] for layer in layers} | {f"eval/moe/{layer}": [7] for layer in layers}
    shown = events.Histograms("moe/layer_2/expert_load")[0].histogram_value
    assert (shown.min, shown.max, shown.num, shown.sum) == pytest.approx((0.5, 1.5, EXPERTS, EXPERTS))
    low = sum(count for limit, count in zip(shown.bucket_limit, shown.bucket, strict=True) if limit < 1)
    assert low == EXPERTS // 2
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(loads("moe").items() <= record.items() for record in records), "the file has each number of each step"


def test_seconds_a_step_are_those_of_training() -> None:
    clock = ThroughputTimer(tokens_per_step=100)
    for _ in range(4):
        time.sleep(0.01)
        clock.count_step()
        with clock.paused():
            time.sleep(0.2)
    read = clock.read()
    assert 0.01 <= read["perf/step_seconds"] < 0.15
    assert read["perf/tokens_per_second"] == pytest.approx(100 / read["perf/step_seconds"])


def test_the_peak_of_a_process_is_in_bytes() -> None:
    metrics = memory_metrics(torch.device("cpu"))
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert list(metrics) == ["perf/peak_resident_bytes"]
    assert 0.9 * resident <= metrics["perf/peak_resident_bytes"] < 1000 * resident
