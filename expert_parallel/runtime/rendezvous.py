"""Lets the ranks meet at a key-value store on rank 0, before any process group exists, and checks later which ranks
still answer.

Each rank writes its RankInfo to the store; rank 0 waits for all, compares them and writes a verdict that all ranks
read. A missing rank, two processes with one rank, other code or another config on a node end the start with the same
sentence on all ranks, which names rank and host. When a collective fails, the ranks look through the store for ranks
that no longer answer.
"""

import hashlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from expert_parallel import __version__
from expert_parallel.runtime.addresses import resolvable_host
from expert_parallel.runtime.launchers import Launch, LaunchError
from expert_parallel.settings import changed_settings

Result = TypeVar("Result")
POLL_SECONDS = 0.05
RESPONSE_TIMEOUT_SECONDS = 3.0  # how long a live rank may take to answer a health check
LEAVE_TIMEOUT_SECONDS = 60.0  # how long rank 0 waits for the others at the end, since the store ends with its process
MAX_LISTED = 8  # ranks or hosts that a message lists

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankInfo:
    """Describes one rank to the other ranks. settings: its resolved config, or {} if it has none.

    It is written to the store as JSON, and ranks of other versions read it: the names of the fields must not change.
    """

    rank: int
    host: str
    pid: int
    software_versions: dict[str, str]
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host})"


@dataclass
class Rendezvous:
    """Holds the RankInfo of every rank, in rank order, and the key-value store that the ranks share until they end."""

    launch: Launch
    store: dist.Store
    rank_infos: list[RankInfo]
    responder: threading.Thread | None = None
    is_leaving: bool = False
    is_store_gone: bool = False

    def start_health_responder(self, timeout: timedelta) -> None:
        """Starts a thread that waits for another rank's health check and answers it. timeout: for opening the store."""
        store, rank = open_store(self.launch, timeout, hosts_store=False), self.launch.rank

        def answer() -> None:
            with suppress(RuntimeError):  # rank 0 has ended, and the store with it: nobody will ask
                store.wait([f"called/{rank}"], timedelta(days=365))
                if not self.is_leaving:
                    store.set(f"here/{rank}", "")

        self.responder = threading.Thread(target=answer, name="answer calls", daemon=True)
        self.responder.start()

    def lost_ranks(self) -> list[RankInfo]:
        """Returns the ranks that do not answer a health check in time: crashed, stopped or unreachable.

        Without an answer from the store, these are rank 0, which serves it.
        """
        others = [info for info in self.rank_infos if info.rank != self.launch.rank]

        def call() -> list[RankInfo]:
            for info in others:
                self.store.set(f"called/{info.rank}", "")
            missing, deadline = others, time.monotonic() + RESPONSE_TIMEOUT_SECONDS
            while missing and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                missing = [info for info in missing if not self.store.check([f"here/{info.rank}"])]
            return missing

        try:
            return run_with_timeout(2 * RESPONSE_TIMEOUT_SECONDS, call)
        except RuntimeError:
            self.is_store_gone = True
            return self.rank_infos[:1]  # rank 0 serves the store

    def is_first_to_report(self) -> bool:
        """Returns True on the first rank that calls it, so that only one logs an error; on all if the store is gone."""
        if self.is_store_gone:
            return True
        try:
            return run_with_timeout(RESPONSE_TIMEOUT_SECONDS, lambda: self.store.add("told", 1)) == 1
        except RuntimeError:
            return True

    def leave(self, patience: float) -> None:
        """Ends this rank's use of the store. The rank that serves it waits up to `patience` seconds for the others."""
        if self.responder is None or self.is_store_gone:
            return
        self.is_leaving = True
        with suppress(RuntimeError):
            run_with_timeout(patience + 2 * RESPONSE_TIMEOUT_SECONDS, lambda: self._leave_store(patience))

    def _leave_store(self, patience: float) -> None:
        """Ends the responder thread, counts this rank as gone, and waits for the others if it serves the store."""
        assert self.responder is not None
        self.store.set(f"called/{self.launch.rank}", "")
        self.responder.join(RESPONSE_TIMEOUT_SECONDS)
        self.store.add("left", 1)
        if self.launch.hosts_store:
            _wait_until(lambda: self.store.add("left", 0) >= len(self.rank_infos), patience)


def run_with_timeout(seconds: float, work: Callable[[], Result]) -> Result:
    """Runs `work` in a thread and returns its result. Raises RuntimeError after `seconds`, or whatever `work` raises.

    torch's store has no timeout for a server that is stopped or unreachable, or for a foreign program at its port: the
    thread is then abandoned.
    """
    outcome: SimpleQueue[tuple[Result | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except Empty:
        raise RuntimeError(f"no answer in {seconds:.0f} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def join_rendezvous(launch: Launch, timeout: timedelta, settings: Mapping[str, Any] | None = None) -> Rendezvous:
    """Waits for all ranks, compares them, and returns their infos and the store. Every rank must call it.

    settings: the resolved config of this rank, which must be the same on all. If the rendezvous fails, all ranks that
    have arrived raise the same LaunchError, at the latest after `timeout`.
    """
    info = RankInfo(launch.rank, socket.gethostname(), os.getpid(), software_versions(), dict(settings or {}))
    if launch.master is None:
        return Rendezvous(launch, dist.HashStore(), [info])
    host, port = launch.master
    rank = {"rank": launch.rank}  # for the log format, as torch.distributed does not run yet
    logger.info("meeting %d ranks at %s:%d (%s)", launch.world_size, host, port, launch.launcher, extra=rank)
    store = open_store(launch, timeout, launch.hosts_store)
    deadline = (
        time.monotonic() + timeout.total_seconds()
    )  # counted from the open store, so that no rank gives up before rank 0
    try:
        arrival = store.add(f"arrivals/{launch.rank}", 1)
        store.set(f"cards/{launch.rank}/{arrival}", json.dumps(asdict(info)))
        if arrival > 1:
            first = _read_rank_info(store, launch.rank)
            store.set("trouble", f"two processes say that they are {_duplicate_rank_message(first, info)}")
        elif launch.rank == 0:
            store.set("verdict", _wait_for_all_ranks(store, launch.world_size, deadline, timeout) or "all here")
        seconds_left = max(0.0, deadline - time.monotonic())
        store.wait(["verdict"], timedelta(seconds=seconds_left + RESPONSE_TIMEOUT_SECONDS))
        verdict = store.get("verdict").decode()
        if arrival > 1 and verdict == "all here":  # a duplicate that arrived after the verdict
            verdict = store.get("trouble").decode()
        store.add("leaving", 1)
        if verdict != "all here":
            if launch.hosts_store:
                _wait_for_readers(store, launch.world_size)
            raise LaunchError(verdict)
        keys = [f"cards/{rank}/1" for rank in range(launch.world_size)]
        rank_infos = [RankInfo(**json.loads(raw)) for raw in store.multi_get(keys)]
        logger.info("all ranks are here: %s", format_hosts(rank_infos), extra=rank)
        return Rendezvous(launch, store, rank_infos)
    except RuntimeError as error:  # raised by the store: a timeout or a closed connection
        raise LaunchError(
            f"rank {launch.rank} met rank 0 at {host}:{port} but then heard no more of it ({first_line(error)})"
        ) from error


def open_store(launch: Launch, timeout: timedelta, hosts_store: bool) -> dist.Store:
    """Connects to the store at `launch.master`, and serves it in this process if `hosts_store`.

    Raises LaunchError if the port cannot be opened, or nothing answers there within `timeout`.
    """
    assert launch.master is not None
    deadline = time.monotonic() + timeout.total_seconds()
    host, port = resolvable_host(launch, timeout.total_seconds()), launch.master[1]
    seconds = max(1.0, deadline - time.monotonic())
    try:
        open_here = partial(
            dist.TCPStore, host, port, is_master=hosts_store, wait_for_workers=False, multi_tenant=hosts_store
        )
        store = run_with_timeout(seconds + 1, lambda: open_here(timeout=timedelta(seconds=seconds)))
        return dist.PrefixStore(f"attempt {launch.restart_count}", store) if launch.restart_count else store
    except RuntimeError as error:
        if hosts_store and "EADDRINUSE" in str(error):
            raise LaunchError(
                f"rank 0 cannot open port {port} on host {socket.gethostname()}: it is in use, by "
                "another program or another rank 0; choose another (MASTER_PORT, or the launcher's option)"
            ) from error
        what = "cannot open" if hosts_store else "cannot reach rank 0 at"
        raise LaunchError(
            f"rank {launch.rank} on host {socket.gethostname()} {what} {host}:{port} within "
            f"{timeout.total_seconds():g} s (runtime.rendezvous_seconds): {first_line(error)}"
        ) from error


def software_versions() -> dict[str, str]:
    """Returns the versions that must be the same on every rank, by name."""
    return {
        "Python": ".".join(map(str, sys.version_info[:2])),
        "torch": torch.__version__,
        "expert_parallel": f"{__version__}, source {source_digest()}",
        "byte order": sys.byteorder,
    }


@cache
def source_digest() -> str:
    """Returns a digest of the package's source files, as different checkouts may have the same version."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _wait_for_all_ranks(store: dist.Store, world_size: int, deadline: float, timeout: timedelta) -> str:
    """Waits on rank 0 for the infos of all ranks and compares them. Returns an error message, or "" if all is well."""
    missing, rank_infos = list(range(world_size)), {}
    while missing:
        if store.check(["trouble"]):
            return store.get("trouble").decode()
        for rank in [rank for rank in missing if store.check([f"cards/{rank}/1"])]:
            rank_infos[rank] = _read_rank_info(store, rank)
            missing.remove(rank)
        if missing and time.monotonic() > deadline:
            return _missing_ranks_message(missing, rank_infos, world_size, timeout)
        if missing:
            time.sleep(POLL_SECONDS)
    return _mismatch_message(rank_infos)


def _missing_ranks_message(
    missing: list[int], rank_infos: dict[int, RankInfo], world_size: int, timeout: timedelta
) -> str:
    """Formats the message about ranks that did not arrive."""
    named = ", ".join(map(str, missing[:MAX_LISTED])) + (" ..." if len(missing) > MAX_LISTED else "")
    hosts = sorted({info.host for info in rank_infos.values()})
    return (
        f"rank{'s' * (len(missing) > 1)} {named} of {world_size} did not come within {timeout.total_seconds():g} s "
        f"(runtime.rendezvous_seconds); {len(rank_infos)} came, from {', '.join(hosts[:MAX_LISTED])}"
    )


def _mismatch_message(rank_infos: dict[int, RankInfo]) -> str:
    """Returns a message about the first rank whose versions or settings differ from rank 0's, or ""."""
    first = rank_infos[0]
    for info in rank_infos.values():
        for name, version in info.software_versions.items():
            if version != first.software_versions.get(name):
                return f"{info} runs {name} {version}, {first} runs {first.software_versions.get(name)}"
        if info.settings and first.settings and (changes := changed_settings(first.settings, info.settings)):
            path, expected, found = changes[0]
            return f"{info} has another config: {path} is {found!r} there and {expected!r} on {first}"
    return ""


def _duplicate_rank_message(first: RankInfo, second: RankInfo) -> str:
    """Formats where two processes with the same rank run."""
    where = f"on host {first.host} (pids {first.pid} and {second.pid})"
    if first.host != second.host:
        where = f"on host {first.host} and on host {second.host}"
    return f"rank {first.rank}: {where}"


def _read_rank_info(store: dist.Store, rank: int) -> RankInfo:
    """Reads the info of a rank; of another version's that cannot be parsed, one that differs from all others."""
    store.wait([f"cards/{rank}/1"])
    try:
        return RankInfo(**json.loads(store.get(f"cards/{rank}/1")))
    except (TypeError, ValueError):
        return RankInfo(rank, "unknown", 0, dict.fromkeys(software_versions(), "that says other things of itself"), {})


def _wait_for_readers(store: dist.Store, world_size: int) -> None:
    """Waits until all ranks that have arrived have read the verdict, since the store ends with this process."""
    num_arrived = sum(store.add(f"arrivals/{rank}", 0) for rank in range(world_size))
    _wait_until(lambda: store.add("leaving", 0) >= num_arrived, RESPONSE_TIMEOUT_SECONDS)


def _wait_until(is_true: Callable[[], bool], seconds: float) -> None:
    """Polls a condition for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return str(error).split("\n")[0].strip() or type(error).__name__


def format_hosts(rank_infos: list[RankInfo]) -> str:
    """Returns the hosts with their ranks as text, as in `n0 0-3, n1 4-7`."""
    hosts: dict[str, list[int]] = {}
    for info in rank_infos:
        hosts.setdefault(info.host, []).append(info.rank)
    return ", ".join(f"{host} {_ranges(ranks)}" for host, ranks in hosts.items())


def _ranges(ranks: list[int]) -> str:
    """Formats ascending numbers as ranges: [0, 1, 2, 4] is `0-2 4`."""
    starts = [rank for rank in ranks if rank - 1 not in ranks]
    ends = [rank for rank in ranks if rank + 1 not in ranks]
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
