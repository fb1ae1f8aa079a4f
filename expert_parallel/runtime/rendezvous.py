"""Where the ranks meet: a store on rank 0, at which each says who it is before any process group is made; and where
they look for each other when one is lost.

What keeps them from meeting, a rank that never comes, two with one number, other code or another config on a node, is
one sentence on all ranks, which names rank and host.
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
from expert_parallel.runtime.launchers import Launch, LaunchError
from expert_parallel.settings import changed_settings

Result = TypeVar("Result")
POLL_SECONDS = 0.05
ANSWER_SECONDS = 3.0  # how long a living rank may take to answer when the roll is called again
LEAVE_SECONDS = 60.0  # how long rank 0 waits for the others at the end, since the store goes with it
SHOWN = 8  # ranks that a sentence names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """What a rank says of itself. settings: its resolved config, or {} where there is none."""

    rank: int
    host: str
    pid: int
    versions: dict[str, str]
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host})"


@dataclass
class Meeting:
    """All ranks' cards, in rank order, and the store that they share, until they leave."""

    launch: Launch
    store: dist.Store
    cards: list[Card]
    answering: threading.Thread | None = None
    is_leaving: bool = False
    is_store_gone: bool = False

    def answer_calls(self, timeout: timedelta) -> None:
        """A thread that says "here" when another rank calls the roll; until then it waits, and costs nothing."""
        store, rank = open_store(self.launch, timeout, serves=False), self.launch.rank

        def answer() -> None:
            with suppress(RuntimeError):  # the store is gone with rank 0: nobody asks
                store.wait([f"called/{rank}"], timedelta(days=365))
                if not self.is_leaving:
                    store.set(f"here/{rank}", "")

        self.answering = threading.Thread(target=answer, name="answer calls", daemon=True)
        self.answering.start()

    def lost_ranks(self) -> list[Card]:
        """Who does not answer within ANSWER_SECONDS: their processes or hosts are gone, stopped or cut off."""
        others = [card for card in self.cards if card.rank != self.launch.rank]

        def call() -> list[Card]:
            for card in others:
                self.store.set(f"called/{card.rank}", "")
            missing, deadline = others, time.monotonic() + ANSWER_SECONDS
            while missing and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                missing = [card for card in missing if not self.store.check([f"here/{card.rank}"])]
            return missing

        try:
            return within(2 * ANSWER_SECONDS, call)
        except RuntimeError:
            self.is_store_gone = True
            return self.cards[:1]  # which had it

    def is_first_to_tell(self) -> bool:
        """True on one of the ranks that ask: so many see it, one says it. Without the store, on all."""
        if self.is_store_gone:
            return True
        try:
            return within(ANSWER_SECONDS, lambda: self.store.add("told", 1)) == 1
        except RuntimeError:
            return True

    def leave(self, patience: float) -> None:
        """The store goes with the process that serves it: that one waits `patience` seconds for the others."""
        if self.answering is None or self.is_store_gone:
            return
        self.is_leaving = True
        with suppress(RuntimeError):
            within(patience + 2 * ANSWER_SECONDS, lambda: self._say_goodbye(patience))

    def _say_goodbye(self, patience: float) -> None:
        assert self.answering is not None
        self.store.set(f"called/{self.launch.rank}", "")
        self.answering.join(ANSWER_SECONDS)
        self.store.add("left", 1)
        if self.launch.serves:
            _wait_until(lambda: self.store.add("left", 0) >= len(self.cards), patience)


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """RuntimeError after `seconds`. torch's store waits without end for a server that is stopped or cut off, and for a
    stranger at its port: so in a thread, which may have to be left behind."""
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


def meet(launch: Launch, timeout: timedelta, settings: Mapping[str, Any] | None = None) -> Meeting:
    """Waits for all ranks. Raises the same LaunchError on all that have come, at the latest after `timeout`.

    settings: the resolved config of this rank, which must be the same on all."""
    card = Card(launch.rank, socket.gethostname(), os.getpid(), versions(), dict(settings or {}))
    if launch.master is None:
        return Meeting(launch, dist.HashStore(), [card])
    (host, port), rank = launch.master, {"rank": launch.rank}
    logger.info("meeting %d ranks at %s:%d (%s)", launch.world_size, host, port, launch.launcher, extra=rank)
    store = open_store(launch, timeout, launch.serves)
    deadline = time.monotonic() + timeout.total_seconds()  # from now on, so that no rank gives up before rank 0
    try:
        arrival = store.add(f"arrivals/{launch.rank}", 1)
        store.set(f"cards/{launch.rank}/{arrival}", json.dumps(asdict(card)))
        if arrival > 1:
            first = _card(store, launch.rank)
            store.set("trouble", f"two processes say that they are {_twice(first, card)}")
        elif launch.rank == 0:
            store.set("verdict", _roll_call(store, launch.world_size, deadline, timeout) or "all here")
        seconds_left = max(0.0, deadline - time.monotonic())
        store.wait(["verdict"], timedelta(seconds=seconds_left + ANSWER_SECONDS))
        verdict = store.get("verdict").decode()
        if arrival > 1 and verdict == "all here":  # it came when the others had met already
            verdict = store.get("trouble").decode()
        store.add("leaving", 1)
        if verdict != "all here":
            if launch.serves:
                _let_others_read(store, launch.world_size)
            raise LaunchError(verdict)
        keys = [f"cards/{rank}/1" for rank in range(launch.world_size)]
        cards = [Card(**json.loads(raw)) for raw in store.multi_get(keys)]
        logger.info("all ranks are here: %s", host_lines(cards), extra=rank)
        return Meeting(launch, store, cards)
    except RuntimeError as error:  # of the store: a timeout, a closed connection
        raise LaunchError(
            f"rank {launch.rank} met rank 0 at {host}:{port} but then heard no more of it ({first_line(error)})"
        ) from error


def open_store(launch: Launch, timeout: timedelta, serves: bool) -> dist.Store:
    """Raises LaunchError if the port cannot be opened, or nothing answers there until `timeout`."""
    assert launch.master is not None
    host, port = launch.master
    deadline = time.monotonic() + timeout.total_seconds()
    while True:  # a container's or a node's name may take a while to be known
        try:
            socket.getaddrinfo(host, port)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"rank {launch.rank} on host {socket.gethostname()} does not know the host {host!r} "
                    f"({error.strerror}), where rank 0 should be, for {timeout.total_seconds():g} s: see MASTER_ADDR, "
                    "or the launcher's list of hosts"
                ) from error
            time.sleep(min(0.5, timeout.total_seconds() / 10))
    seconds = max(1.0, deadline - time.monotonic())
    try:
        open_here = partial(dist.TCPStore, host, port, is_master=serves, wait_for_workers=False, multi_tenant=serves)
        store = within(seconds + 1, lambda: open_here(timeout=timedelta(seconds=seconds)))
        return dist.PrefixStore(f"attempt {launch.attempt}", store) if launch.attempt else store
    except RuntimeError as error:
        if serves and "EADDRINUSE" in str(error):
            raise LaunchError(
                f"rank 0 cannot open port {port} on host {socket.gethostname()}: it is in use, by "
                "another program or another rank 0; choose another (MASTER_PORT, or the launcher's option)"
            ) from error
        what = "cannot open" if serves else "cannot reach rank 0 at"
        raise LaunchError(
            f"rank {launch.rank} on host {socket.gethostname()} {what} {host}:{port} within "
            f"{timeout.total_seconds():g} s (runtime.rendezvous_seconds): {first_line(error)}"
        ) from error


def versions() -> dict[str, str]:
    """What must be the same on every rank."""
    return {
        "Python": ".".join(map(str, sys.version_info[:2])),
        "torch": torch.__version__,
        "expert_parallel": f"{__version__}, source {source_digest()}",
        "byte order": sys.byteorder,
    }


@cache
def source_digest() -> str:
    """Of the package's own files: two checkouts may have one version."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _roll_call(store: dist.Store, world_size: int, deadline: float, timeout: timedelta) -> str:
    """Rank 0's: waits for every rank's card and compares them. What is wrong, or "" where nothing is."""
    missing, cards = list(range(world_size)), {}
    while missing:
        if store.check(["trouble"]):
            return store.get("trouble").decode()
        for rank in [rank for rank in missing if store.check([f"cards/{rank}/1"])]:
            cards[rank] = _card(store, rank)
            missing.remove(rank)
        if missing and time.monotonic() > deadline:
            return _absent(missing, cards, world_size, timeout)
        if missing:
            time.sleep(POLL_SECONDS)
    return _differ(cards)


def _absent(missing: list[int], cards: dict[int, Card], world_size: int, timeout: timedelta) -> str:
    named = ", ".join(map(str, missing[:SHOWN])) + (" ..." if len(missing) > SHOWN else "")
    hosts = sorted({card.host for card in cards.values()})
    return (
        f"rank{'s' * (len(missing) > 1)} {named} of {world_size} did not come within {timeout.total_seconds():g} s "
        f"(runtime.rendezvous_seconds); {len(cards)} came, from {', '.join(hosts[:SHOWN])}"
    )


def _differ(cards: dict[int, Card]) -> str:
    first = cards[0]
    for card in cards.values():
        for name, version in card.versions.items():
            if version != first.versions.get(name):
                return f"{card} runs {name} {version}, {first} runs {first.versions.get(name)}"
        if card.settings and first.settings and (changes := changed_settings(first.settings, card.settings)):
            path, ours, theirs = changes[0]
            return f"{card} has another config: {path} is {theirs!r} there and {ours!r} on {first}"
    return ""


def _twice(first: Card, second: Card) -> str:
    where = f"on host {first.host} (pids {first.pid} and {second.pid})"
    if first.host != second.host:
        where = f"on host {first.host} and on host {second.host}"
    return f"rank {first.rank}: {where}"


def _card(store: dist.Store, rank: int) -> Card:
    store.wait([f"cards/{rank}/1"])
    try:
        return Card(**json.loads(store.get(f"cards/{rank}/1")))
    except (TypeError, ValueError):
        return Card(rank, "unknown", 0, dict.fromkeys(versions(), "that says other things of itself"), {})


def _let_others_read(store: dist.Store, world_size: int) -> None:
    """The store goes with this process: those that have come read the verdict first."""
    come = sum(store.add(f"arrivals/{rank}", 0) for rank in range(world_size))
    _wait_until(lambda: store.add("leaving", 0) >= come, ANSWER_SECONDS)


def _wait_until(is_true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def first_line(error: BaseException) -> str:
    return str(error).split("\n")[0].strip() or type(error).__name__


def host_lines(cards: list[Card]) -> str:
    """As `n0 0-3, n1 4-7`."""
    hosts: dict[str, list[int]] = {}
    for card in cards:
        hosts.setdefault(card.host, []).append(card.rank)
    return ", ".join(f"{host} {_ranges(ranks)}" for host, ranks in hosts.items())


def _ranges(ranks: list[int]) -> str:
    starts = [rank for rank in ranks if rank - 1 not in ranks]
    ends = [rank for rank in ranks if rank + 1 not in ranks]
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
