"""Saves checkpoints from all ranks: training waits for a copy to host memory, and a thread writes it to disk.

    main thread    finish the previous save; agree on a new folder; copy to host memory; continue training
    thread         write this rank's file, then rank_N.json; rank 0 waits for all of these, merges them, renames

The threads communicate through files only, so they issue no collectives that could interleave with those of training.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from expert_parallel.checkpoint.config import CheckpointConfig
from expert_parallel.checkpoint.folders import (
    MANIFEST,
    complete_checkpoints,
    make_partial_folder,
    prune,
    publish,
    remove_partial_folders,
    step_folder,
    update_latest_link,
    write_atomically,
)
from expert_parallel.checkpoint.manifest import FORMAT, WEIGHTS, Manifest
from expert_parallel.checkpoint.shards import (
    LocalTensor,
    assign_writers,
    merge_manifests,
    rank_manifest_path,
    write_rank_file,
)
from expert_parallel.checkpoint.state import TrainingState, balance_biases, expected_shapes
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.parallel.collectives import all_gather_text
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.process import Runtime, UserError

GRACE_SECONDS = 60.0  # for a save in progress when the run ends with an exception


class CheckpointSaver:
    """Saves checkpoints of weights and moments into `folder`. As a context manager it waits, at the end, for the save
    in progress.

    config: the resolved config of the run. layout: a description of the parallel layout for readers, such as the
    degrees. print_rank_0: a function that prints a line on rank 0.
    """

    def __init__(
        self,
        folder: Path,
        model: LanguageModel,
        state: TrainingState,
        mesh: ParallelMesh,
        runtime: Runtime,
        settings: CheckpointConfig,
        *,
        config: dict[str, Any],
        layout: str,
        print_rank_0: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.model = model
        self.state = state
        self.runtime = runtime
        self.settings = settings
        self.config = config
        self.layout = layout
        self.print_rank_0 = print_rank_0
        self.expected = expected_shapes(model.config, moments=True)
        self.local_tensors = list(assign_writers(model, mesh, self.state))
        self.buffers = list(self._allocate_buffers()) if settings.background else []  # reused by every save
        self.job: SaveJob | None = None

    def save(self, step: int, *, is_last: bool = False) -> None:
        """Starts saving a checkpoint, after the save in progress has finished; every rank must call it.

        If a save fails, the failure is printed and training continues. Only a failure of the run's last save raises
        UserError, here or in `finish`. is_last: True for that save.
        """
        self._report_failure(self.finish)
        if is_last:
            self._start_job(step)
        else:
            self._report_failure(lambda: self._start_job(step))

    def finish(self) -> None:
        """Waits for the save in progress. If it failed on any rank, removes its files and raises UserError on all
        ranks."""
        job, self.job = self.job, None
        if job is None:
            return
        try:
            self.runtime.run_on_all_ranks(job.wait_for_file)
            self.runtime.run_on_all_ranks(job.wait_for_commit)
        except UserError as error:
            job.cancel()
            whole = complete_checkpoints(self.folder)
            last = f"the last checkpoint is {whole[-1].name}" if whole else "there is no checkpoint yet"
            raise UserError(f"step {job.manifest.step} is not saved: {error}; {last}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the save in progress; after an exception at most GRACE_SECONDS, as other ranks may be gone."""
        if kind is None:
            self.finish()
        elif self.job is not None:
            self.job.thread.join(GRACE_SECONDS)

    def _report_failure(self, work: Callable[[], None]) -> None:
        try:
            work()
        except UserError as error:
            self.print_rank_0(f"{error}; training continues")

    def _start_job(self, step: int) -> None:
        partial = self._make_folder(step)
        manifest = Manifest(format=FORMAT, step=step, config=self.config, layout=self.layout, files={}, tensors={})
        tensors = self._copy_to_host() if self.settings.background else self.assigned_tensors()
        final, content = step_folder(self.folder, step), list(zip(self.local_tensors, tensors, strict=True))
        self.job = SaveJob(self, final, partial, manifest, content)
        self.job.thread.start()
        if not self.settings.background:
            self.finish()

    def _make_folder(self, step: int) -> Path:
        """Creates a new folder on rank 0 and sends its name to all ranks, so that files of an earlier attempt cannot
        mix in."""

        def begin() -> str:
            if self.runtime.rank > 0:
                return ""
            try:
                remove_partial_folders(self.folder)
                return make_partial_folder(step_folder(self.folder, step)).name
            except OSError as error:
                raise ValueError(f"step {step} is not saved: {_format_oserror(error)}") from error

        name = self.runtime.run_on_all_ranks(begin)
        return self.folder / all_gather_text(name, torch.device("cpu"))[0]

    def _allocate_buffers(self) -> Iterator[Tensor]:
        """Allocates a host buffer for every tensor that this rank writes. Touches all pages, so that no save has to."""
        for held in self.local_tensors:
            # Moments may not exist yet; they have the shape and dtype of their parameter.
            like = self._tensor(LocalTensor(WEIGHTS, held.logical, 0))
            shape = like.shape if held.range is None else (held.range.length,)
            yield torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda).fill_(0)

    def assigned_tensors(self) -> list[Tensor]:
        """Returns the tensors that this rank writes, in the order of `local_tensors`."""
        return [self._tensor(held) for held in self.local_tensors]

    def _tensor(self, held: LocalTensor) -> Tensor:
        if isinstance(held.logical, str):
            return dict(balance_biases(self.model))[held.logical]
        return self.state.tensor(held.part, held.logical.parameter)

    def _copy_to_host(self) -> list[Tensor]:
        """Copies this rank's tensors to the host buffers and returns these."""
        for buffer, tensor in zip(self.buffers, self.assigned_tensors(), strict=True):
            assert (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype), (buffer.shape, tensor.shape)
            buffer.copy_(tensor, non_blocking=True)
        if self.runtime.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the thread must not read before the copies have arrived
        return self.buffers


@dataclass
class SaveJob:
    """Runs one save on one rank: holds the thread that writes, the tensors that it writes, and the failure if there is
    one."""

    saver: CheckpointSaver
    final: Path
    partial: Path
    manifest: Manifest  # files and tensors are still empty
    content: list[tuple[LocalTensor, Tensor]]
    thread: threading.Thread = field(init=False)
    file_is_written: threading.Event = field(default_factory=threading.Event)
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._thread_main, name=f"save step {self.manifest.step}", daemon=True)

    def wait_for_file(self) -> None:
        self.file_is_written.wait()
        self._raise_failure()

    def wait_for_commit(self) -> None:
        self.thread.join()
        self._raise_failure()

    def cancel(self) -> None:
        self.is_cancelled.set()
        self.thread.join()
        if self.saver.runtime.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _raise_failure(self) -> None:
        if isinstance(self.failure, OSError):
            raise ValueError(_format_oserror(self.failure)) from self.failure
        if self.failure is not None:
            raise self.failure

    def _thread_main(self) -> None:
        self._catch_failure(self._write_file)
        self.file_is_written.set()
        if self.saver.runtime.rank == 0 and self.failure is None:
            self._catch_failure(self._commit)

    def _catch_failure(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:  # the main thread raises it, together with all ranks
            self.failure = failure

    def _write_file(self) -> None:
        rank = self.saver.runtime.rank
        part = write_rank_file(self.partial, rank, self.content)
        write_atomically(rank_manifest_path(self.partial, rank), part.model_dump_json())

    def _wait_for_all_ranks(self) -> bool:
        """Waits until all ranks have written their files. Returns False if the save was cancelled; raises ValueError on
        timeout."""
        world_size, limit = self.saver.runtime.world_size, self.saver.runtime.timeout.total_seconds()
        end = time.monotonic() + limit
        pause = 0.005  # seconds
        waiting = list(range(world_size))
        while waiting := [rank for rank in waiting if not rank_manifest_path(self.partial, rank).exists()]:
            if time.monotonic() > end:
                raise ValueError(f"rank {waiting[0]} has not written its file {limit:.0f} s after rank 0")
            if self.is_cancelled.wait(pause):
                return False
            pause = min(2 * pause, 0.5)
        return True

    def _commit(self) -> None:
        saver = self.saver
        if not self._wait_for_all_ranks():
            return
        markers = [rank_manifest_path(self.partial, rank) for rank in range(saver.runtime.world_size)]
        manifest = merge_manifests(self.manifest, markers, saver.expected)
        write_atomically(self.partial / MANIFEST, manifest.to_json())
        for path in markers:
            path.unlink()
        publish(self.partial, self.final)
        saver.print_rank_0(f"saved {self.final}")
        try:
            update_latest_link(saver.folder)
            prune(saver.folder, saver.settings.keep, saver.settings.keep_every)
        except OSError as error:  # the new checkpoint is complete nevertheless
            saver.print_rank_0(f"{self.final} is complete, but {error.filename} cannot be changed: {error.strerror}")


def _format_oserror(error: OSError) -> str:
    return f"cannot write {error.filename}: {error.strerror}"
