"""Starts ranks as processes on this machine's CPU, connected by gloo, for commands that no launcher has started.

Each rank is forked from a server process that has imported everything once. Ranks report over pipes as JSON; when one
fails or dies, all are killed."""

import json
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from expert_parallel.runtime.process import CPU, Launch, Runtime, UserError

# Runs on every rank: (task, this rank's runtime, progress function) -> a result that JSON can hold.
RankFn = Callable[[Any, Runtime, Callable[[str], None]], Any]


class RankError(Exception):
    """Reports in one sentence that a rank of `verify` failed: which rank, in which parallel layout, and why."""


def spawn_ranks(
    num_ranks: int, fn: RankFn, task: Any, print_progress: Callable[[str], None], timeout: timedelta
) -> Any:
    """Runs `fn(task, runtime, progress function)` on `num_ranks` new processes and returns the result of rank 0.

    fn: a function at module level. task: any JSON value. print_progress: is called here with rank 0's messages. Raises
    UserError if a rank raises one, RankError if a rank fails otherwise."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([fn.__module__])
    connections: list[Connection] = []
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(num_ranks):
                ours, theirs = server.Pipe()
                place = (rank, num_ranks, str(Path(folder, "store")), timeout.total_seconds())
                process = server.Process(target=_rank_main, args=(fn, json.dumps(task), place, theirs), daemon=True)
                process.start()
                theirs.close()
                connections.append(ours)
                processes.append(process)
            return _wait_for_result(connections, processes, print_progress)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _wait_for_result(connections: list[Connection], processes: list[Any], print_progress: Callable[[str], None]) -> Any:
    """Waits until rank 0 has a result or any rank has failed, and passes progress on to `print_progress`."""
    last_progress = "the start"
    while True:
        for ready in wait(connections):
            rank = connections.index(ready)  # type: ignore[arg-type]
            try:
                kind, value = json.loads(connections[rank].recv_bytes())
            except (EOFError, OSError):
                processes[rank].join()
                raise RankError(
                    f"{last_progress}: rank {rank} ended with exit code {processes[rank].exitcode}"
                ) from None
            if kind == "result":
                return value
            if kind == "refused":
                raise UserError(value)
            if kind == "failed":
                # A rank that has died breaks the connections of others, whose errors may arrive first.
                if ended := _ended(processes):
                    code, rank = ended[0].exitcode, processes.index(ended[0])
                    raise RankError(f"{last_progress}: rank {rank} ended with exit code {code}")
                raise RankError(f"{last_progress}: rank {rank} failed: {value}")
            last_progress = value
            print_progress(value)


def _ended(processes: list[Any]) -> list[Any]:
    """Returns the processes that have ended, or that end within a second."""
    ended = wait([process.sentinel for process in processes], timeout=1.0)
    return [process for process in processes if process.sentinel in ended]


def _rank_main(fn: RankFn, task: str, place: tuple[int, int, str, float], connection: Connection) -> None:
    """Runs one rank and reports over its pipe; the process then waits to be killed."""
    rank, num_ranks, store, seconds = place

    def tell(kind: str, value: Any) -> None:
        connection.send_bytes(json.dumps([kind, value]).encode())

    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks, timeout=timeout
        )
        runtime = Runtime(Launch("verify", rank, num_ranks, rank, num_ranks), CPU, "gloo", timeout)
        result = fn(json.loads(task), runtime, lambda text: tell("say", text) if rank == 0 else None)
        if rank == 0:
            tell("result", result)
    except UserError as error:
        tell("refused", str(error))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place_of_error = f"{Path(where.filename).name}, line {where.lineno}"
        tell("failed", f"{type(error).__name__} in {place_of_error}: {' '.join(str(error).split())}")
    # Stay until killed: a rank that leaves breaks the others' connections, and their errors would hide the first.
    with suppress(EOFError, OSError):
        connection.recv_bytes()
