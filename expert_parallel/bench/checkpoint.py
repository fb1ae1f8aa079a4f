"""Measures how long training waits for a checkpoint that is saved in the background, compared with a blocking save, and
with copying, writing and hashing the same bytes. Every round does each of these once; medians are compared.

    torchrun --nproc-per-node 2 -m expert_parallel bench checkpoint --megabytes 400
"""

import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from expert_parallel.checkpoint.config import CheckpointConfig
from expert_parallel.checkpoint.digest import digest
from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.checkpoint.manifest import MOMENTS
from expert_parallel.checkpoint.save import CheckpointSaver
from expert_parallel.checkpoint.state import TorchState
from expert_parallel.model.config import ModelConfig
from expert_parallel.model.parallelize import build_model
from expert_parallel.parallel.collectives import all_gather_text
from expert_parallel.parallel.degrees import ParallelConfig
from expert_parallel.parallel.mesh import build_mesh
from expert_parallel.runtime.process import Runtime

MEGABYTE = 10**6
D_MODEL = 512
HIDDEN = 1024
LAYERS = 4


def bench_checkpoint(runtime: Runtime, megabytes: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Saves a model in `rounds` rounds. Returns the median seconds of each kind of work on this rank, and the bytes
    written. A collective.

    megabytes: size of weights and optimizer state over all ranks, among which the experts are divided. folder: the
    files are written into a new folder in it, which is removed at the end."""
    place = Path(all_gather_text(tempfile.mkdtemp(dir=folder) if runtime.rank == 0 else "", torch.device("cpu"))[0])
    try:
        config = _model(megabytes, runtime.world_size)
        degrees = ParallelConfig(ep=runtime.world_size).degrees(runtime.world_size)
        mesh = build_mesh(degrees, runtime.device.type, runtime.timeout)
        model = build_model(config, mesh, device=runtime.device)
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            optimizer.state[parameter] = {moment: torch.rand_like(parameter) for moment in MOMENTS}
        state = TorchState(optimizer)

        def saver(name: str, background: bool) -> CheckpointSaver:
            settings = CheckpointConfig(background=background, keep=1)
            tree = {"model": config.model_dump(mode="json")}
            return CheckpointSaver(
                place / name,
                model,
                state,
                mesh,
                runtime,
                settings,
                config=tree,
                layout="bench",
                print_rank_0=_ignore_message,
            )

        savers = {name: saver(name, name == "background") for name in ("blocking", "background")}
        times: dict[str, list[float]] = {}
        for step in range(1, rounds + 2):  # the first round is reported separately
            found = _round(runtime, savers, place, step)
            for name, duration in found.items():
                times.setdefault(f"first {name}" if step == 1 else name, []).append(duration)
        newest = place / "background" / f"step_{rounds + 1:08d}"
        load = _seconds(runtime, lambda: load_checkpoint(newest, model, state, runtime, mesh))
        own = sum(tensor.nbytes for tensor in savers["background"].buffers)
        total = sum(path.stat().st_size for path in newest.iterdir())
    finally:
        runtime.run_on_all_ranks(lambda: None)
        if runtime.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
    seconds = {name: statistics.median(found) for name, found in times.items()} | {"load": load}
    return {
        "ranks": runtime.world_size,
        "device": runtime.device.type,
        "torch": torch.__version__,
        "date": datetime.now().isoformat(timespec="seconds"),
        "rounds": rounds,
        "bytes": total,
        "bytes_of_rank_0": own,
        "seconds": seconds,
        "stall_share": seconds["background stall"] / seconds["blocking save"],
    }


def format_result(result: dict[str, Any]) -> str:
    """Formats the result as a table."""
    seconds, own = result["seconds"], result["bytes_of_rank_0"]
    rows = {
        "blocking save": "training waits for all of it",
        "background stall": f"{result['stall_share']:.1%} of the blocking save: what training waits for",
        "first background stall": "the run's first",
        "background save": "until it is on disk and has its name",
        "copy": "the same bytes, memory to memory",
        "write": "the same bytes, one file, with fsync",
        "sha256": "of the same bytes",
        "digest": "the sum that is the same in every layout, of the same bytes",
        "load": "with both digests checked",
    }
    lines = [
        f"{result['bytes'] / MEGABYTE:,.0f} MB, of which rank 0 writes {own / MEGABYTE:,.0f}; {result['ranks']} ranks, "
        + f"{result['device']}, torch {result['torch']}, {result['date']}; medians of {result['rounds']} rounds"
    ]
    for name, remark in rows.items():
        rate = own / MEGABYTE / seconds[name]
        lines.append(f"{name:24}{seconds[name]:9.3f} s {rate:9,.0f} MB/s a rank  {remark}")
    return "\n".join(lines)


def _round(runtime: Runtime, savers: dict[str, CheckpointSaver], place: Path, step: int) -> dict[str, float]:
    """Runs each kind of work once and returns its seconds; nothing else runs meanwhile."""
    found = {
        "blocking save": _seconds(runtime, lambda: savers["blocking"].save(step, is_last=True)),
        "background stall": _seconds(runtime, lambda: savers["background"].save(step, is_last=True)),
    }
    found["background save"] = found["background stall"] + _seconds(runtime, savers["background"].finish)
    assigned_tensors, buffers = savers["background"].assigned_tensors(), savers["background"].buffers
    path = place / f"plain_{runtime.rank}"

    def copy() -> None:
        for buffer, tensor in zip(buffers, assigned_tensors, strict=True):
            buffer.copy_(tensor)

    def write() -> None:
        with path.open("wb") as file:
            for tensor in buffers:
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def sha256() -> None:
        total = hashlib.sha256()
        for tensor in buffers:
            total.update(tensor.flatten().view(torch.uint8).numpy().data)

    def digests() -> None:
        for tensor in buffers:
            digest(tensor, [0] * tensor.dim(), tensor.shape)

    workloads: dict[str, Callable[[], None]] = {"copy": copy, "write": write, "sha256": sha256, "digest": digests}
    found |= {name: _seconds(runtime, work) for name, work in workloads.items()}
    path.unlink()
    return found


def _model(megabytes: int, world_size: int) -> ModelConfig:
    """Returns a model whose experts come to so many megabytes of weights and moments, the same number on each rank."""
    bytes_of_expert = 3 * D_MODEL * HIDDEN * 4 * (1 + len(MOMENTS)) * LAYERS
    per_rank = max(1, round(megabytes * MEGABYTE / bytes_of_expert / world_size))
    tree = {
        "num_layers": LAYERS,
        "d_model": D_MODEL,
        "attention": {"num_heads": 8, "head_size": 64},
        "moe": {"num_experts": max(2, per_rank * world_size), "router": {"k": 2}, "experts": {"hidden": HIDDEN}},
    }
    return ModelConfig.model_validate(tree)


def _seconds(runtime: Runtime, work: Callable[[], object]) -> float:
    """Times `work` from a barrier of all ranks until this rank is done, its device included."""
    if runtime.world_size > 1:
        dist.barrier()
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _ignore_message(_: str) -> None:
    pass
