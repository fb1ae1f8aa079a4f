"""A training run: `train` reads from top to bottom; what it calls stands below it."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expert_parallel.collectives import gather_text
from expert_parallel.config import Config, dump_config
from expert_parallel.mesh import ParallelMesh
from expert_parallel.model.pipeline import Pipeline
from expert_parallel.model.sequence import SequencePlace
from expert_parallel.model.transformer import Transformer
from expert_parallel.moe.plan import RouterReplay
from expert_parallel.runtime import Runtime, UserError
from expert_parallel.training.checkpoint import list_checkpoints, load_checkpoint, read_manifest, save_checkpoint
from expert_parallel.training.data import (
    MicroBatch,
    TokenSampler,
    held_out_sequences,
    load_corpus,
    micro_batch,
    shard_bounds,
)
from expert_parallel.training.generate import generate
from expert_parallel.training.metrics import Metrics, MetricsWriter, memory_metrics, progress_line, step_metrics
from expert_parallel.training.replay import MoEPlace, PlayConfig, RecordConfig, load_choices, save_choices
from expert_parallel.training.setup import build, check_world, describe_degrees
from expert_parallel.training.step import StepReport, evaluate, train_step

# What a checkpoint's weights and data position are counted in.
FIXED_SETTINGS = ("model.", "seed", "training.global_batch", "training.sequence_length")


def train(config: Config, runtime: Runtime) -> None:
    """Trains to `training.steps`, going on from the newest checkpoint of `run.folder` if there is one."""
    run = set_up(config, runtime)
    training, tokens_of_step = config.training, config.training.global_batch * config.training.sequence_length

    first_step = run.resume()
    if first_step >= training.steps:
        run.say(f"this run is finished: {first_step} of {training.steps} steps are done; results are in {run.folder}")
        return
    writer = runtime.together(lambda: MetricsWriter(run.folder, first_step) if runtime.rank == 0 else None)
    if first_step == 0:
        metrics = run.evaluate(0)
        if writer is not None:
            writer.write(0, 0, metrics)

    clock = Clock(tokens_of_step)
    for step in range(first_step, training.steps):
        batches = list(run.batches(step))
        replay = run.open_replay(step, batches)
        report = train_step(
            run.model, run.optimizer, batches, training, run.mesh, step=step, seed=config.seed, replay=replay
        )
        run.save_replay(step, batches, replay)
        done = step + 1
        is_last = done == training.steps
        metrics = step_metrics(report, "train")
        refuse_nonsense(done, report)
        clock.count_step()
        if done % config.run.log_every == 0 or is_last:
            metrics |= clock.read() | memory_metrics(runtime.device)
            run.say(progress_line(done, training.steps, metrics))
        with clock.paused():
            if done % config.evaluation.every == 0 or is_last:
                metrics |= run.evaluate(done)
            # Before the checkpoint: a resumed run drops what is newer than it, never the reverse.
            if writer is not None:
                writer.write(done, done * tokens_of_step, metrics)
            if done % config.checkpoint.every == 0 or is_last:
                run.save(done)

    if writer is not None:
        writer.close()
    if config.run.sample is not None:
        run.say(f"\n--- sample {'-' * 69}\n{sample_text(config, run.model, run.mesh)}\n{'-' * 80}")
    run.say(f"done: {training.steps} steps; metrics, checkpoints and the resolved config are in {run.folder}")


@dataclass(frozen=True)
class Run:
    """What a run works with on this rank."""

    config: Config
    runtime: Runtime
    mesh: ParallelMesh
    model: Transformer | Pipeline
    optimizer: torch.optim.Optimizer
    sampler: TokenSampler
    held_out: Tensor  # sequences, the same on all ranks
    checkpoints: list[Path]  # that were there when the run began, oldest first

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @property
    def own_positions(self) -> Tensor:
        """Of each sequence, those that this rank has."""
        return SequencePlace.of(self.mesh).own(self.config.training.sequence_length)

    def say(self, text: str) -> None:
        if self.runtime.rank == 0:
            print(text, flush=True)

    def resume(self) -> int:
        """Steps done: 0, or those of the newest checkpoint, which is loaded."""
        if not self.checkpoints:
            return 0
        newest = self.checkpoints[-1]
        step = load_checkpoint(newest, self.model, self.optimizer, self.runtime)["step"]
        changes = [f"{path} {old!r} -> {new!r}" for path, old, new in changed_settings(newest, self.config)]
        self.say(f"resumed from {newest} after step {step}" + (f"; changed: {', '.join(changes)}" if changes else ""))
        return step

    def batches(self, step: int) -> Iterator[MicroBatch]:
        training = self.config.training
        for number in range(training.micro_steps):
            yield micro_batch(
                self.sampler,
                step=step,
                global_batch=training.global_batch,
                num_micro_steps=training.micro_steps,
                micro_step=number,
                num_ranks=self.mesh.degrees.dp,
                rank=self.mesh.dp_rank,
            ).to(self.runtime.device)

    def open_replay(self, step: int, batches: list[MicroBatch]) -> RouterReplay | None:
        """The step's routing as recorded, or an empty record to fill; None where routing is left to itself."""
        routing = self.config.training.routing
        if isinstance(routing, PlayConfig):
            moe = self.config.model.moe
            assert moe is not None
            choices = moe.router.num_choices(moe.num_experts)
            place = MoEPlace(self.config.model.moe_layers, moe.num_experts, choices, self.own_positions)
            own = [batch.at(self.own_positions) for batch in batches]
            return self.runtime.together(lambda: load_choices(routing, step, own, place))
        return None if routing is None else RouterReplay()

    def save_replay(self, step: int, batches: list[MicroBatch], replay: RouterReplay | None) -> None:
        routing = self.config.training.routing
        if isinstance(routing, RecordConfig) and replay is not None:
            own = [batch.at(self.own_positions) for batch in batches]
            self.runtime.together(lambda: save_choices(routing, step, self.runtime.rank, own, replay))

    def evaluate(self, step: int) -> Metrics:
        """Held-out loss, in global batches of a micro-step's size; the last may leave ranks without a sequence."""
        size = self.config.training.global_batch // self.config.training.micro_steps
        mine = []
        for batch in self.held_out.split(size):
            first, count = shard_bounds(len(batch), self.mesh.degrees.dp, self.mesh.dp_rank)
            rows, index_B = batch[first : first + count], torch.arange(first, first + count)
            mine.append(MicroBatch(rows[:, :-1], rows[:, 1:], index_B).to(self.runtime.device))
        metrics = step_metrics(evaluate(self.model, mine, self.mesh, seed=self.config.seed), "eval")
        self.say(progress_line(step, self.config.training.steps, metrics))
        return metrics

    def save(self, step: int) -> None:
        path = save_checkpoint(
            self.folder / "checkpoints",
            self.model,
            self.optimizer,
            self.mesh,
            self.runtime,
            step=step,
            config=self.config.model_dump(mode="json"),
            keep=self.config.checkpoint.keep,
        )
        self.say(f"saved {path}")


def set_up(config: Config, runtime: Runtime) -> Run:
    """Everything that can be wrong is found here, before any training, and on all ranks together."""
    training = config.training
    degrees = runtime.together(lambda: check_world(config, runtime))
    corpus = runtime.together(lambda: load_corpus(config.data))
    sampler = runtime.together(lambda: TokenSampler(corpus.train, training.sequence_length, config.seed))
    sequences = config.evaluation.sequences
    held_out = runtime.together(lambda: held_out_sequences(corpus.held_out, training.sequence_length, sequences))
    checkpoints = runtime.together(lambda: open_folder(config, runtime.rank))
    newest = gather_text(checkpoints[-1].name if checkpoints else "none", torch.device("cpu"))
    if len(set(newest)) > 1:
        raise UserError(
            f"run.folder: the ranks see different newest checkpoints in {config.run.folder} ({', '.join(newest)}): it "
            "must lie on a file system that all of them share"
        )

    mesh, model, optimizer = build(config, runtime, degrees)
    run = Run(config, runtime, mesh, model, optimizer, sampler, held_out, checkpoints)
    run.say(f"data: {corpus.description}")
    run.say(
        f"ranks: {runtime.world_size} on {runtime.device.type} ({runtime.backend}), {describe_degrees(config, degrees)}"
    )
    return run


def open_folder(config: Config, rank: int) -> list[Path]:
    """The checkpoints to go on from. Rank 0 makes the folder and writes the resolved config, or says that it cannot."""
    folder = Path(config.run.folder)
    checkpoints = list_checkpoints(folder / "checkpoints")
    if checkpoints:
        for path, old, new in changed_settings(checkpoints[-1], config):
            if path.startswith(FIXED_SETTINGS):
                raise ValueError(
                    f"{checkpoints[-1]} is a checkpoint of another model or data order: {path} is {old!r} there and "
                    f"{new!r} here; choose another run.folder, or the same setting"
                )
    if rank == 0:
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(dump_config(config))
        except OSError as error:
            raise ValueError(f"run.folder: cannot write to {folder}: {error.strerror}") from error
    return checkpoints


def changed_settings(checkpoint: Path, config: Config) -> list[tuple[str, Any, Any]]:
    """(path, value of the run that saved it, value now) of each setting that differs."""
    old, new = _leaves(read_manifest(checkpoint)["config"]), _leaves(config.model_dump(mode="json"))
    return [(path, old.get(path), new.get(path)) for path in old | new if old.get(path) != new.get(path)]


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= _leaves(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return leaves


def sample_text(config: Config, model: Transformer | Pipeline, mesh: ParallelMesh) -> str:
    sample = config.run.sample
    assert sample is not None
    text = generate(
        model,
        sample.prompt.encode(),
        num_tokens=sample.length,
        temperature=sample.temperature,
        window=config.training.sequence_length,
        seed=config.seed,
        mesh=mesh,
    )
    return text.decode(errors="replace")


def refuse_nonsense(step: int, report: StepReport) -> None:
    if not math.isfinite(report.loss) or not math.isfinite(report.grad_norm):
        raise UserError(
            f"step {step}: the loss is {report.loss} and the gradient norm {report.grad_norm}; the run stops, the last "
            "checkpoint is good (a smaller training.optimizer.learning_rate may help)"
        )


class Clock:
    """Tokens per second of training alone: evaluation and saving happen while it is paused."""

    def __init__(self, tokens_of_step: int) -> None:
        self.tokens_of_step = tokens_of_step
        self.start, self.steps = time.perf_counter(), 0

    def count_step(self) -> None:
        self.steps += 1

    def read(self) -> Metrics:
        """The rate since the last reading."""
        now = time.perf_counter()
        rate = self.steps * self.tokens_of_step / (now - self.start)
        self.start, self.steps = now, 0
        return {"perf/tokens_per_second": rate}

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin
