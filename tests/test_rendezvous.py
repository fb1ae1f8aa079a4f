"""The meeting of the ranks, with threads for ranks. What keeps them from meeting is in test_start_faults.py, with
processes."""

import re
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from expert_parallel.runtime import addresses, rendezvous
from expert_parallel.runtime.launchers import Launch, LaunchError
from expert_parallel.runtime.rendezvous import RankInfo, Rendezvous, format_hosts, join_rendezvous

SECONDS = timedelta(seconds=20)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(rank: int, world_size: int, port: int, host: str = "127.0.0.1") -> Launch:
    return Launch("env", rank, world_size, rank, world_size, (host, port), hosts_store=rank == 0)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each returns, or the sentence that it raises."""

    def run(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except LaunchError as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_all_come_and_know_each_other(port: int) -> None:
    settings = {"training": {"steps": 2}}
    meetings = at_once(
        *(lambda rank=rank: join_rendezvous(launch(rank, 3, port), SECONDS, settings) for rank in range(3))
    )
    for meeting in meetings:
        assert [info.rank for info in meeting.rank_infos] == [0, 1, 2]
        assert {info.host for info in meeting.rank_infos} == {socket.gethostname()}


@pytest.mark.parametrize("local_world_size", [2, 1])
def test_a_host_that_does_not_know_its_own_name(
    local_world_size: int, port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It needs no name if all ranks are on it; on several hosts it is named, first in a warning."""
    own = "own-name.invalid"
    monkeypatch.setattr(socket, "gethostname", lambda: own)
    monkeypatch.setattr(addresses, "WARN_AFTER_SECONDS", 0.2)
    ranks = [replace(launch(rank, 2, port, own), local_world_size=local_world_size, local_rank=0) for rank in range(2)]
    if local_world_size == 2:
        assert all(
            isinstance(met, Rendezvous) for met in at_once(*(partial(join_rendezvous, r, SECONDS) for r in ranks))
        )
        return
    (sentence,) = at_once(partial(join_rendezvous, ranks[1], timedelta(seconds=1)))
    assert re.match(rf"rank 1 on host {own} does not know its own host's name '{own}' \(.*\), .* within 1 s", sentence)
    assert "/etc/hosts" in sentence
    assert [f"{own}' (" in record.message and "waiting up to 1 s" in record.message for record in caplog.records] == [
        True
    ]


def test_one_process_alone_meets_nobody() -> None:
    assert [info.rank for info in join_rendezvous(Launch("none"), SECONDS).rank_infos] == [0]


def test_the_second_comes_late(port: int) -> None:
    meetings = at_once(*(lambda rank=rank: join_rendezvous(launch(rank, 2, port), SECONDS) for rank in range(2)))
    assert all(isinstance(meeting, Rendezvous) for meeting in meetings)
    (sentence,) = at_once(lambda: join_rendezvous(launch(1, 2, port), SECONDS))
    assert "two processes say that they are rank 1" in sentence


def test_the_lost_are_named_and_the_living_are_not(port: int) -> None:
    meetings = at_once(*(lambda rank=rank: join_rendezvous(launch(rank, 4, port), SECONDS) for rank in range(4)))
    for meeting in (meetings[0], meetings[1], meetings[3]):
        meeting.start_health_responder(SECONDS)  # rank 2 died before it could
    meetings[3].leave(0.0)  # an error of its own
    assert [info.rank for info in meetings[1].lost_ranks()] == [2, 3]
    assert [meetings[0].is_first_to_report(), meetings[1].is_first_to_report()] == [True, False]
    for meeting in meetings[1::-1]:
        meeting.leave(0.0)


def test_two_checkouts_of_one_version_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = rendezvous.software_versions()["expert_parallel"]
    package = tmp_path / "package"
    shutil.copytree(Path(rendezvous.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(rendezvous, "__file__", str(package / "runtime/rendezvous.py"))
    rendezvous.source_digest.cache_clear()
    assert rendezvous.software_versions()["expert_parallel"] == ours
    (package / "moe" / "layer.py").write_text("# another\n")
    rendezvous.source_digest.cache_clear()
    assert rendezvous.software_versions()["expert_parallel"] != ours
    rendezvous.source_digest.cache_clear()


def test_host_lines() -> None:
    hosts = ["n0", "n0", "n0", "n1", "n0", "n1"]
    rank_infos = [RankInfo(rank, host, 1, {}, {}) for rank, host in enumerate(hosts)]
    assert format_hosts(rank_infos) == "n0 0-2 4, n1 3 5"
