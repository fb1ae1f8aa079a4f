"""Real ranks for the tests: processes with gloo between them, started once for each world size and used again.

    results = run_ranks(2, body, argument, ...)     # body(rank, argument, ...) on each rank; results by rank

`body` is a function of a test module (found by name in the ranks). Each rank runs one thread. A rank that fails, or
hangs beyond the timeout, fails the test with its traceback, and all pools are started anew for the next. Each process
group has a gloo thread on each of its ranks that polls, and a hundred of them take a tenth of a core. So the processes
of a pool are stopped while it is idle, and a pool is closed when its ranks have made many groups.
"""

import atexit
import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 240  # shared machines can be slow
MAX_GLOO_THREADS = 160  # of one pool
PR_SET_PDEATHSIG = 1  # of prctl(2)

# The server imports what takes long once; ranks are forked from it, clean of whatever the test process has done.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "expert_parallel.training.loop",
        "expert_parallel.verify.run",
        "expert_parallel.moe.reference.reference_layer",
        "expert_parallel.training.engines.deepspeed",
        "functorch.compile",
        "pytest",
        "hypothesis",
        "_pytest.assertion.rewrite",
    ]
)


def run_ranks(world_size: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    pool = RankPool.running.get(world_size) or RankPool(world_size)
    try:
        results = pool.run(body, arguments)
    except BaseException:
        close_pools()
        raise
    if pool.num_gloo_threads > MAX_GLOO_THREADS:
        pool.close()
    return results


@atexit.register
def close_pools() -> None:
    for pool in list(RankPool.running.values()):
        pool.close()


class RankPool:
    running: dict[int, "RankPool"] = {}  # noqa: RUF012 - shared on purpose: what is to be closed

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.connections: list[Connection] = []
        self.processes = []
        self.num_gloo_threads = world_size
        for rank in range(world_size):
            ours, theirs = _server.Pipe()
            process = _server.Process(target=_serve, args=(rank, world_size, store, theirs), daemon=True)
            process.start()
            self.connections.append(ours)
            self.processes.append(process)
        RankPool.running[world_size] = self

    def run(self, body: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        message = pickle.dumps((body, arguments))
        self._send_signal(signal.SIGCONT)
        for connection in self.connections:
            connection.send_bytes(message)
        results: dict[int, Any] = {}
        num_groups: dict[int, int] = {}
        waiting = dict(enumerate(self.connections))
        while waiting:
            ready = wait(list(waiting.values()), TIMEOUT_SECONDS + 10)
            assert ready, f"ranks {sorted(waiting)} gave no answer in {TIMEOUT_SECONDS + 10} s"
            for rank, connection in list(waiting.items()):
                if connection in ready:
                    ok, results[rank], num_groups[rank] = pickle.loads(connection.recv_bytes())
                    assert ok, f"rank {rank} failed:\n{results[rank]}"
                    del waiting[rank]
        self._send_signal(signal.SIGSTOP)
        self.num_gloo_threads = sum(num_groups.values())
        return [results[rank] for rank in range(len(results))]

    def _send_signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self.folder.cleanup()
        del RankPool.running[self.world_size]


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    # A stopped process does not notice that the test process was killed. Its parent, the server, does, and ends, if no
    # rank holds the pipe that tells it; then the kernel kills the ranks.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.close(multiprocessing.forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=timeout
    )
    while True:
        body, arguments = pickle.loads(connection.recv_bytes())
        try:
            answer = (True, body(rank, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        num_groups = len(dist.distributed_c10d._world.pg_map)
        connection.send_bytes(pickle.dumps((*answer, num_groups)))
