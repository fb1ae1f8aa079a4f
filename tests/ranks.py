"""Real ranks for the tests: processes with gloo between them, started once for each world size and used again.

    results = run_ranks(2, body, argument, ...)     # body(rank, argument, ...) on each rank; results by rank

`body` is a function of a test module (found by name in the ranks). Each rank runs one thread. A rank that fails, or
hangs beyond the timeout, fails the test with its traceback, and its pool is started anew for the next. All pools are
closed, too, when their ranks have made many process groups: each group has a gloo thread on each of its ranks that
polls even while the pool is idle, and hundreds of them take a third of a core.
"""

import atexit
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 240  # shared machines can be slow
MAX_GLOO_THREADS = 160  # of all pools of this process together

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
    try:
        results = _pool(world_size).run(body, arguments)
    except BaseException:
        close_pools()
        raise
    if sum(pool.num_gloo_threads for pool in RankPool.running.values()) > MAX_GLOO_THREADS:
        close_pools()
    return results


@cache
def _pool(world_size: int) -> "RankPool":
    return RankPool(world_size)


@atexit.register
def close_pools() -> None:
    while RankPool.running:
        RankPool.running.popitem()[1].close()
    _pool.cache_clear()


class RankPool:
    running: dict[int, "RankPool"] = {}  # noqa: RUF012 - shared on purpose: what is to be closed

    def __init__(self, world_size: int) -> None:
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
        self.num_gloo_threads = sum(num_groups.values())
        return [results[rank] for rank in range(len(results))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self.folder.cleanup()


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

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
