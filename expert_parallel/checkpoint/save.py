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
    new_partial,
    point_to_newest,
    prune,
    publish,
    remove_partial,
    step_folder,
    whole_checkpoints,
    write_whole,
)
from expert_parallel.checkpoint.manifest import FORMAT, WEIGHTS, Manifest
from expert_parallel.checkpoint.part import Held, add_up, marker, share_of_writing, write_part
from expert_parallel.checkpoint.state import TrainingState, balance_biases, expected_shapes
from expert_parallel.model.transformer import LanguageModel
from expert_parallel.parallel.collectives import gather_text
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.process import Runtime, UserError

GRACE_SECONDS = 60.0  # for a save in progress when the run ends with an exception


class Saver:
    """Saves weights and moments into `folder`. As a context manager it waits, on leaving, for the save in progress.

    config: the resolved config of the run. layout: a description for people. print_rank_0: prints on rank 0.
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
        say: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.model = model
        self.state = state
        self.runtime = runtime
        self.settings = settings
        self.config = config
        self.layout = layout
        self.say = say
        self.expected = expected_shapes(model.config, moments=True)
        self.mine = list(share_of_writing(model, mesh, self.state))
        self.buffers = list(self._host_memory()) if settings.background else []  # reused by every save
        self.attempt: Attempt | None = None

    def save(self, step: int, *, is_last: bool = False) -> None:
        """Saves a checkpoint; every rank must call it.

        If a save fails, the failure is printed and training continues. Only the last save (here or in `finish`) raises
        UserError.
        """
        self._said(self.finish)
        if is_last:
            self._start(step)
        else:
            self._said(lambda: self._start(step))

    def finish(self) -> None:
        """Waits for the save in progress. If it failed on any rank, removes its files and raises UserError on all
        ranks."""
        attempt, self.attempt = self.attempt, None
        if attempt is None:
            return
        try:
            self.runtime.together(attempt.wait_for_file)
            self.runtime.together(attempt.wait_for_commit)
        except UserError as error:
            attempt.abandon()
            whole = whole_checkpoints(self.folder)
            last = f"the last checkpoint is {whole[-1].name}" if whole else "there is no checkpoint yet"
            raise UserError(f"step {attempt.manifest.step} is not saved: {error}; {last}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the save in progress; after an exception at most GRACE_SECONDS, as other ranks may be gone."""
        if kind is None:
            self.finish()
        elif self.attempt is not None:
            self.attempt.thread.join(GRACE_SECONDS)

    def _said(self, work: Callable[[], None]) -> None:
        try:
            work()
        except UserError as error:
            self.say(f"{error}; training continues")

    def _start(self, step: int) -> None:
        partial = self._begin(step)
        manifest = Manifest(format=FORMAT, step=step, config=self.config, layout=self.layout, files={}, tensors={})
        tensors = self._copied() if self.settings.background else self.live()
        final, content = step_folder(self.folder, step), list(zip(self.mine, tensors, strict=True))
        self.attempt = Attempt(self, final, partial, manifest, content)
        self.attempt.thread.start()
        if not self.settings.background:
            self.finish()

    def _begin(self, step: int) -> Path:
        """Creates a new folder on rank 0 and sends its name to all ranks, so that files of an earlier attempt cannot
        mix in."""

        def begin() -> str:
            if self.runtime.rank > 0:
                return ""
            try:
                remove_partial(self.folder)
                return new_partial(step_folder(self.folder, step)).name
            except OSError as error:
                raise ValueError(f"step {step} is not saved: {_reason(error)}") from error

        name = self.runtime.together(begin)
        return self.folder / gather_text(name, torch.device("cpu"))[0]

    def _host_memory(self) -> Iterator[Tensor]:
        """Allocates a host buffer for every tensor that this rank writes. Touches all pages, so that no save has to."""
        for held in self.mine:
            # Moments may not exist yet; they have the shape and dtype of their parameter.
            like = self._tensor(Held(WEIGHTS, held.logical, 0))
            shape = like.shape if held.range is None else (held.range.length,)
            yield torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda).fill_(0)

    def live(self) -> list[Tensor]:
        """Returns the tensors that this rank writes, in the order of `local_tensors`."""
        return [self._tensor(held) for held in self.mine]

    def _tensor(self, held: Held) -> Tensor:
        if isinstance(held.logical, str):
            return dict(balance_biases(self.model))[held.logical]
        return self.state.tensor(held.part, held.logical.parameter)

    def _copied(self) -> list[Tensor]:
        """Copies this rank's tensors to the host buffers and returns these."""
        for buffer, tensor in zip(self.buffers, self.live(), strict=True):
            assert (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype), (buffer.shape, tensor.shape)
            buffer.copy_(tensor, non_blocking=True)
        if self.runtime.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the thread must not read before the copies have arrived
        return self.buffers


@dataclass
class Attempt:
    """Runs one save on one rank: its thread, what it writes, and its outcome."""

    saver: Saver
    final: Path
    partial: Path
    manifest: Manifest  # files and tensors are still empty
    content: list[tuple[Held, Tensor]]
    thread: threading.Thread = field(init=False)
    file_is_done: threading.Event = field(default_factory=threading.Event)
    is_given_up: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name=f"save step {self.manifest.step}", daemon=True)

    def wait_for_file(self) -> None:
        self.file_is_done.wait()
        self._raise()

    def wait_for_commit(self) -> None:
        self.thread.join()
        self._raise()

    def abandon(self) -> None:
        self.is_given_up.set()
        self.thread.join()
        if self.saver.runtime.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _raise(self) -> None:
        if isinstance(self.failure, OSError):
            raise ValueError(_reason(self.failure)) from self.failure
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        self._do(self._write_file)
        self.file_is_done.set()
        if self.saver.runtime.rank == 0 and self.failure is None:
            self._do(self._commit)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:  # the main thread raises it, together with all ranks
            self.failure = failure

    def _write_file(self) -> None:
        rank = self.saver.runtime.rank
        part = write_part(self.partial, rank, self.content)
        write_whole(marker(self.partial, rank), part.model_dump_json())

    def _everyone_is_done(self) -> bool:
        """Waits until all ranks have written their files. Returns False if the save was cancelled; raises ValueError on
        timeout."""
        world_size, limit = self.saver.runtime.world_size, self.saver.runtime.timeout.total_seconds()
        end = time.monotonic() + limit
        pause = 0.005  # seconds
        waiting = list(range(world_size))
        while waiting := [rank for rank in waiting if not marker(self.partial, rank).exists()]:
            if time.monotonic() > end:
                raise ValueError(f"rank {waiting[0]} has not written its file {limit:.0f} s after rank 0")
            if self.is_given_up.wait(pause):
                return False
            pause = min(2 * pause, 0.5)
        return True

    def _commit(self) -> None:
        saver = self.saver
        if not self._everyone_is_done():
            return
        markers = [marker(self.partial, rank) for rank in range(saver.runtime.world_size)]
        manifest = add_up(self.manifest, markers, saver.expected)
        write_whole(self.partial / MANIFEST, manifest.to_json())
        for path in markers:
            path.unlink()
        publish(self.partial, self.final)
        saver.say(f"saved {self.final}")
        try:
            point_to_newest(saver.folder)
            prune(saver.folder, saver.settings.keep, saver.settings.keep_every)
        except OSError as error:  # the new checkpoint is complete all the same
            saver.say(f"{self.final} is complete, but {error.filename} cannot be changed: {error.strerror}")


def _reason(error: OSError) -> str:
    return f"cannot write {error.filename}: {error.strerror}"
