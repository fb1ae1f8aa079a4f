"""A training run, read from top to bottom: setup, build, resume, loop, finish."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from expert_parallel.config import Config, dump_config
from expert_parallel.mesh import ParallelDegrees, ParallelMesh, build_mesh
from expert_parallel.model.parallelize import build_model
from expert_parallel.model.transformer import Transformer
from expert_parallel.runtime import Runtime, UserError
from expert_parallel.training.checkpoint import list_checkpoints, load_checkpoint, read_manifest, save_checkpoint
from expert_parallel.training.data import (
    Corpus,
    MicroBatch,
    TokenSampler,
    held_out_sequences,
    load_corpus,
    micro_batch,
    shard_bounds,
)
from expert_parallel.training.generate import generate
from expert_parallel.training.metrics import Metrics, MetricsWriter, max_memory, progress_line, step_metrics
from expert_parallel.training.optim import build_optimizer
from expert_parallel.training.step import DTYPES, evaluate, train_step


def train(config: Config, runtime: Runtime) -> None:
    """Trains to `training.steps`, going on from the newest checkpoint of `run.folder` if there is one."""
    say = print if runtime.rank == 0 else _nothing
    training, folder = config.training, Path(config.run.folder)

    # ------------------------------------------------------------------ what must hold before any work
    degrees = runtime.together(lambda: check_world(config, runtime.world_size))
    corpus = runtime.together(lambda: load_corpus(config.data))
    sampler = runtime.together(lambda: build_sampler(config, corpus))
    held_out = runtime.together(
        lambda: held_out_sequences(corpus.held_out, training.sequence_length, config.evaluation.sequences)
    )
    checkpoints = runtime.together(lambda: open_folder(config, folder, runtime.rank))

    # ------------------------------------------------------------------ build
    mesh = build_mesh(degrees, runtime.device.type, runtime.timeout)
    model = build_model(
        config.model,
        mesh,
        sharded=config.parallel.data == "sharded",
        dtype=DTYPES[training.dtype],
        device=runtime.device,
        recompute=training.recompute,
        seed=config.seed,
    )
    optimizer = build_optimizer(training.optimizer, model)
    say(f"data: {corpus.description}")
    say(
        f"ranks: {runtime.world_size} on {runtime.device.type} ({runtime.backend}), dp {degrees.dp} "
        f"({config.parallel.data}), ep {degrees.ep}, edp {degrees.edp}"
    )

    # ------------------------------------------------------------------ resume
    first_step = 0
    if checkpoints:
        first_step = load_checkpoint(checkpoints[-1], model, optimizer, runtime)["step"]
        say(f"resumed from {checkpoints[-1]} after step {first_step}")
    if first_step >= training.steps:
        say(f"this run is finished: {first_step} of {training.steps} steps are done; results are in {folder}")
        return
    writer = MetricsWriter(folder, first_step) if runtime.rank == 0 else None

    # ------------------------------------------------------------------ loop
    def held_out_loss() -> Metrics:
        batches = _evaluation_batches(config, held_out, mesh, runtime.device)
        return step_metrics(evaluate(model, batches, mesh, seed=config.seed), "eval")

    def save(step: int) -> None:
        saved = config.model_dump(mode="json")
        keep, target = config.checkpoint.keep, folder / "checkpoints"
        say(f"saved {save_checkpoint(target, model, optimizer, mesh, runtime, step=step, config=saved, keep=keep)}")

    tokens_of_step = training.global_batch * training.sequence_length
    if first_step == 0:
        _record(writer, 0, training.steps, 0, held_out_loss(), say)
    since, steps_since = time.perf_counter(), 0
    for step in range(first_step, training.steps):
        batches = _training_batches(config, sampler, step, mesh, runtime.device)
        report = train_step(model, optimizer, batches, training, mesh, step=step, seed=config.seed)
        done, steps_since = step + 1, steps_since + 1
        metrics = step_metrics(report, "train")
        if not math.isfinite(report.loss) or not math.isfinite(report.grad_norm):
            raise UserError(
                f"step {done}: the loss is {report.loss} and the gradient norm {report.grad_norm}; the run stops, the "
                f"last checkpoint is good (a smaller training.optimizer.learning_rate may help)"
            )
        if done % config.run.log_every == 0 or done == training.steps:
            seconds = time.perf_counter() - since
            metrics["perf/tokens_per_second"] = steps_since * tokens_of_step / seconds
            if runtime.device.type == "cuda":
                metrics["perf/peak_memory_bytes"] = max_memory(runtime.device)
            since, steps_since = time.perf_counter(), 0
            say(progress_line(done, training.steps, metrics))
        pause = time.perf_counter()
        if done % config.evaluation.every == 0 or done == training.steps:
            evaluated = held_out_loss()
            say(progress_line(done, training.steps, evaluated))
            metrics |= evaluated
        if writer is not None:  # before the checkpoint: a resumed run drops what is newer than it, never the reverse
            writer.write(done, done * tokens_of_step, metrics)
        if done % config.checkpoint.every == 0 or done == training.steps:
            save(done)
        since += time.perf_counter() - pause  # tokens/s is of training alone

    # ------------------------------------------------------------------ finish
    if writer is not None:
        writer.close()
    if config.run.sample is not None:
        say("\n--- sample " + "-" * 69 + f"\n{sample_text(config, model)}\n" + "-" * 80)
    say(f"done: {training.steps} steps; metrics, checkpoints and the resolved config are in {folder}")


def check_world(config: Config, world_size: int) -> ParallelDegrees:
    """The degrees for the ranks that run, or a ValueError that names the setting and the numbers."""
    if config.runtime.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device is 'cuda' but torch finds no GPU here")
    return check_degrees(config, world_size)


def check_degrees(config: Config, world_size: int) -> ParallelDegrees:
    """The degrees for `world_size` ranks, wherever they may be."""
    degrees = ParallelDegrees(world_size, ep=config.parallel.ep)
    micro = config.training.global_batch // config.training.micro_steps
    if micro < degrees.dp:
        raise ValueError(
            f"training.global_batch / training.micro_steps ({micro} sequences) is smaller than the number of data "
            f"ranks ({degrees.dp}): some would have nothing to do"
        )
    return degrees


def build_sampler(config: Config, corpus: Corpus) -> TokenSampler:
    return TokenSampler(corpus.train, config.training.sequence_length, config.seed)


def open_folder(config: Config, folder: Path, rank: int) -> list[Path]:
    """The checkpoints to go on from. Rank 0 makes the folder and writes the resolved config, or says that it cannot."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    if checkpoints:
        saved = read_manifest(checkpoints[-1])["config"]
        for room in ("model", "seed"):
            if saved[room] != config.model_dump(mode="json")[room]:
                raise ValueError(
                    f"{checkpoints[-1]} is a checkpoint of another model: {_difference(saved, config, room)}; "
                    "choose another run.folder, or the same settings"
                )
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(dump_config(config))
        except OSError as error:
            raise ValueError(f"run.folder: cannot write to {folder}: {error.strerror}") from error
    return checkpoints


def sample_text(config: Config, model: Transformer) -> str:
    sample = config.run.sample
    assert sample is not None
    text = generate(
        model,
        sample.prompt.encode(),
        num_tokens=sample.length,
        temperature=sample.temperature,
        window=config.training.sequence_length,
        seed=config.seed,
    )
    return text.decode(errors="replace")


def _training_batches(
    config: Config, sampler: TokenSampler, step: int, mesh: ParallelMesh, device: torch.device
) -> Iterator[MicroBatch]:
    training = config.training
    for number in range(training.micro_steps):
        yield micro_batch(
            sampler,
            step=step,
            global_batch=training.global_batch,
            num_micro_steps=training.micro_steps,
            micro_step=number,
            num_ranks=mesh.degrees.dp,
            rank=mesh.dp_rank,
        ).to(device)


def _evaluation_batches(
    config: Config, sequences: torch.Tensor, mesh: ParallelMesh, device: torch.device
) -> Iterator[MicroBatch]:
    """The held-out sequences in global batches of a micro-step's size; the last may leave ranks without a sequence."""
    size = config.training.global_batch // config.training.micro_steps
    for batch in sequences.split(size):
        first, count = shard_bounds(len(batch), mesh.degrees.dp, mesh.dp_rank)
        mine = batch[first : first + count]
        yield MicroBatch(mine[:, :-1], mine[:, 1:], torch.arange(first, first + count)).to(device)


def _record(
    writer: MetricsWriter | None, step: int, total: int, tokens: int, metrics: Metrics, say: Callable[[str], None]
) -> None:
    say(progress_line(step, total, metrics))
    if writer is not None:
        writer.write(step, tokens, metrics)


def _difference(saved: dict[str, Any], config: Config, room: str) -> str:
    """The first setting under `room` that differs, with both values."""
    old, new, path = saved[room], config.model_dump(mode="json")[room], room
    while isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in [*old, *new] if old.get(key) != new.get(key))
        old, new, path = old.get(key), new.get(key), f"{path}.{key}"
    return f"{path} is {old!r} there and {new!r} here"


def _nothing(text: str) -> None:
    pass
