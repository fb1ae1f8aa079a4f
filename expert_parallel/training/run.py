"""Holds the objects of a training run on this rank: how they are set up, and what the loop asks of them."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expert_parallel.checkpoint.files import list_checkpoints, open_checkpoint
from expert_parallel.checkpoint.load import load_checkpoint
from expert_parallel.checkpoint.save import CheckpointSaver
from expert_parallel.data.batch import MicroBatch, held_out_batch, micro_batch
from expert_parallel.data.open import open_data, save_tokenizer
from expert_parallel.data.sampler import Sampler, Sequences
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.moe.context import RouterReplay
from expert_parallel.parallel.collectives import all_gather_text
from expert_parallel.parallel.degrees import ParallelDegrees
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.parallel.sequence import SequenceShard
from expert_parallel.runtime.output import print_line
from expert_parallel.runtime.process import Runtime, UserError
from expert_parallel.training.config import Config, dump_config
from expert_parallel.training.engines.engine import Engine
from expert_parallel.training.failures import FILE
from expert_parallel.training.generate import open_prompt_tokenizer
from expert_parallel.training.metrics import Metrics, MetricsWriter, format_progress_line, step_metrics
from expert_parallel.training.replay import RecordConfig, ReplayConfig, ReplaySpec, load_routing, save_routing
from expert_parallel.training.resume import (
    check_can_resume,
    format_changes,
    notes_at_start,
    settings_of_last_run,
)
from expert_parallel.training.setup import build, check_memory, check_world_size, data_requirements, format_degrees
from expert_parallel.training.start import STARTS, OpenStart, Start, naming_start, open_start
from expert_parallel.training.step import StepReport, evaluate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRun:
    """Holds the objects that a run uses on this rank."""

    config: Config
    runtime: Runtime
    mesh: ParallelMesh
    model: LanguageModel
    engine: Engine
    sampler: Sampler
    held_out: Sequences  # the same on all ranks
    checkpoints: list[Path]  # those that existed when the run began, oldest first
    start: Start | None = None  # where the weights of a new run come from; None: they are drawn or a checkpoint's

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @property
    def own_positions(self) -> Tensor:
        """Returns the positions of each sequence that this rank holds (int64, (S of this rank,))."""
        return SequenceShard.of(self.mesh).own(self.config.training.sequence_length)

    def print_rank_0(self, text: str) -> None:
        """Prints on rank 0, in one write, since the thread that saves prints, too."""
        if self.runtime.rank == 0:
            print_line(text)

    def resume(self, announced: Sequence[tuple[str, Any, Any]] = ()) -> int:
        """Loads the newest checkpoint, or the weights of `checkpoint.start_from`. Returns the number of steps already
        done.

        announced: changes of settings, (path, old value, new value), that are not printed again.
        """
        if self.checkpoints:
            loaded = load_checkpoint(self.checkpoints[-1], self.model, self.engine.state, self.runtime, self.mesh)
            alone = "" if loaded.has_moments else " (weights only)"
            changes = format_changes(loaded, self.config, announced=announced)
            self.print_rank_0(f"resumed from {loaded.path}{alone} after step {loaded.step}{changes}")
            return loaded.step
        if self.start is not None:
            sentences = self.start.load(self.model, self.engine.state, self.runtime, self.mesh)
            self.print_rank_0("\n".join(sentences))
        return 0

    def batches(self, step: int) -> list[MicroBatch]:
        """Reads this rank's micro-batches of a step.

        If reading fails on any rank, as a token file may be damaged, all ranks raise UserError.
        """
        training = self.config.training

        def read() -> list[MicroBatch]:
            return [
                micro_batch(
                    self.sampler,
                    step=step,
                    global_batch=training.global_batch,
                    num_micro_steps=training.micro_steps,
                    micro_step=number,
                    num_ranks=self.mesh.degrees.dp,
                    rank=self.mesh.dp_rank,
                ).to(self.runtime.device)
                for number in range(training.micro_steps)
            ]

        return self.runtime.run_on_all_ranks(read)

    def open_replay(self, step: int, batches: list[MicroBatch]) -> RouterReplay | None:
        """Loads the step's recorded routing, or makes an empty record; None if `training.routing` is not set."""
        routing = self.config.training.routing
        if isinstance(routing, ReplayConfig):
            moe = self.config.model.moe
            assert moe is not None
            choices = moe.router.num_choices(moe.num_experts)
            place = ReplaySpec(self.config.model.moe_layers, moe.num_experts, choices, self.own_positions)
            own = [batch.select_positions(self.own_positions) for batch in batches]
            return self.runtime.run_on_all_ranks(lambda: load_routing(routing, step, own, place))
        return None if routing is None else RouterReplay()

    def save_replay(self, step: int, batches: list[MicroBatch], replay: RouterReplay | None) -> None:
        """Saves the step's routing if `training.routing.kind` is `record`."""
        routing = self.config.training.routing
        if isinstance(routing, RecordConfig) and replay is not None:
            own = [batch.select_positions(self.own_positions) for batch in batches]
            self.runtime.run_on_all_ranks(lambda: save_routing(routing, step, self.runtime.rank, own, replay))

    def held_out_batches(self) -> list[MicroBatch]:
        """Returns this rank's micro-batches of an evaluation, each of a micro-step's size. Ranks may have no sequence
        of the last one."""
        dp, size = self.mesh.degrees.dp, self.config.training.global_batch // self.config.training.micro_steps
        cut = [held_out_batch(batch, dp, self.mesh.dp_rank) for batch in self.held_out.split(size)]
        return [batch.to(self.runtime.device) for batch in cut]

    def held_out_report(self) -> StepReport:
        """Computes the held-out loss. A collective."""
        return evaluate(self.model, self.engine, self.held_out_batches(), self.mesh, seed=self.config.seed)

    def evaluate(self, step: int) -> Metrics:
        """Computes the held-out loss, and prints it."""
        metrics = step_metrics(self.held_out_report(), "eval")
        self.print_rank_0(format_progress_line(step, self.config.training.steps, metrics))
        return metrics

    def open_metrics(self, first_step: int) -> MetricsWriter:
        """Opens metrics.jsonl and TensorBoard after step `first_step`."""
        return MetricsWriter(self.folder, first_step, self.config.run.log_every)

    def open_saver(self) -> CheckpointSaver:
        """Creates the saver of this run's checkpoints."""
        return CheckpointSaver(
            self.folder / "checkpoints",
            self.model,
            self.engine.state,
            self.mesh,
            self.runtime,
            self.config.checkpoint,
            config=self.config.model_dump(mode="json"),
            layout=f"{self.runtime.world_size} ranks, {format_degrees(self.config, self.mesh.degrees)}",
            print_rank_0=self.print_rank_0,
        )


def set_up_run(config: Config, runtime: Runtime, starts: Mapping[str, OpenStart] = STARTS) -> TrainingRun:
    """Opens data and run folder and builds the model; every rank must call it. Raises UserError on failure.

    starts: how each kind of `checkpoint.start_from` is opened.
    """
    degrees = runtime.run_on_all_ranks(lambda: wait_for_nodes(config, runtime))
    runtime.run_on_all_ranks(lambda: check_memory(config, degrees, runtime.device))
    data = runtime.run_on_all_ranks(lambda: open_data(config.data, data_requirements(config)))
    if len(digests := set(all_gather_text(str(data.config.sha256), torch.device("cpu")))) > 1:
        raise UserError(f"data: the ranks see different data, with sha256 {' and '.join(sorted(digests))}")
    config = config.model_copy(update={"data": data.config})
    last = settings_of_last_run(Path(config.run.folder)) if runtime.rank == 0 else None
    checkpoints, start = runtime.run_on_all_ranks(lambda: open_run_folder(config, runtime.rank, starts))
    if config.run.sample is not None:
        runtime.run_on_all_ranks(lambda: open_prompt_tokenizer(config))
    newest = all_gather_text(checkpoints[-1].name if checkpoints else "none", torch.device("cpu"))
    if len(set(newest)) > 1:
        raise UserError(
            f"run.folder: the ranks see different newest checkpoints in {config.run.folder} ({', '.join(newest)}): it "
            "must lie on a file system that all of them share"
        )

    draws_weights = not checkpoints and start is None
    mesh, model, engine = build(config, runtime, degrees, initialize=draws_weights)
    run = TrainingRun(config, runtime, mesh, model, engine, data.sampler, data.held_out, checkpoints, start)
    if runtime.rank == 0:
        newest_checkpoint = open_checkpoint(checkpoints[-1]) if checkpoints else None
        has_failed = (run.folder / FILE).exists()  # with other settings, or the run would have been refused
        for note in notes_at_start(config, last, newest_checkpoint, has_failed=has_failed):
            run.print_rank_0(note)
    run.print_rank_0(f"data: {data.description}")
    launch = runtime.launch
    run.print_rank_0(
        f"ranks: {runtime.world_size} on {runtime.device.type} ({runtime.backend}), {format_degrees(config, degrees)}"
    )
    if launch.master is not None:
        mpi_library = f" ({launch.mpi_library})" if launch.mpi_library else ""
        run.print_rank_0(f"started by {launch.launcher}{mpi_library}: {runtime.hosts}")
    return run


def wait_for_nodes(config: Config, runtime: Runtime) -> ParallelDegrees:
    """Returns the degrees for the running ranks. Raises ValueError if none fit.

    In an elastic run they may not fit while a node is away. Then the ranks wait for it before they fail; torchrun
    restarts them all when it joins.
    """
    try:
        return check_world_size(config, runtime)
    except ValueError as error:
        seconds = config.runtime.wait_for_nodes_seconds
        if seconds == 0 or runtime.launch.launcher != "torchrun":
            raise
        if runtime.rank == 0:
            logger.warning("waiting %g s for other nodes to join: %s", seconds, error)
        time.sleep(seconds)
        raise ValueError(
            f"{error}; no other node has joined in {seconds:g} s (runtime.wait_for_nodes_seconds)"
        ) from None


def open_run_folder(
    config: Config, rank: int, starts: Mapping[str, OpenStart] = STARTS
) -> tuple[list[Path], Start | None]:
    """Returns the checkpoints to resume from and, if there are none, where a new run starts; rank 0 creates the folder
    and writes the resolved config, the tokenizer, and what the run keeps of the start.

    Raises ValueError if the folder cannot be written, or if a checkpoint or the start does not fit the config.
    """
    folder = Path(config.run.folder)
    checkpoints = list_checkpoints(folder / "checkpoints")
    start = None if checkpoints else open_start(config, starts)
    if checkpoints:
        check_can_resume(open_checkpoint(checkpoints[-1]), config)
    if rank == 0 and start is not None:
        with naming_start():
            start.check_values()
    if rank == 0:
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(dump_config(config))
            if start is not None:
                start.keep_files(folder)
            save_tokenizer(config.data, folder)
        except OSError as error:
            raise ValueError(f"run.folder: cannot write to {folder}: {error.strerror or error}") from error
    return checkpoints, start
