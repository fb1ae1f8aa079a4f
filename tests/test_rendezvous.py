"""How ranks meet: who does not come, comes twice, or is another, is named to all that have come. Here ranks are
threads; test_start_faults.py has processes."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from expert_parallel import rendezvous
from expert_parallel.launchers import Launch, LaunchError
from expert_parallel.rendezvous import Card, Meeting, host_lines, meet

SECONDS = timedelta(seconds=20)
SOON = timedelta(seconds=1)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(rank: int, world_size: int, port: int, host: str = "127.0.0.1") -> Launch:
    return Launch("env", rank, world_size, rank, world_size, (host, port), serves=rank == 0)


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
    meetings = at_once(*(lambda rank=rank: meet(launch(rank, 3, port), SECONDS, settings) for rank in range(3)))
    for meeting in meetings:
        assert [card.rank for card in meeting.cards] == [0, 1, 2]
        assert {card.host for card in meeting.cards} == {socket.gethostname()}


def test_one_process_alone_meets_nobody() -> None:
    assert [card.rank for card in meet(Launch("none"), SECONDS).cards] == [0]


def test_ranks_that_never_come_are_named(port: int) -> None:
    began = time.monotonic()
    came = at_once(*(lambda rank=rank: meet(launch(rank, 5, port), SOON) for rank in (0, 2)))
    host = socket.gethostname()
    assert set(came) == {
        f"ranks 1, 3, 4 of 5 did not come within 1 s (runtime.rendezvous_seconds); 2 came, from {host}"
    }
    assert time.monotonic() - began < 10


def test_rank_0_never_comes(port: int) -> None:
    (sentence,) = at_once(lambda: meet(launch(1, 2, port), SOON))
    assert f"rank 1 on host {socket.gethostname()} cannot reach rank 0 at 127.0.0.1:{port} within 1 s" in sentence


def test_two_with_one_number(port: int) -> None:
    sentences = at_once(*(lambda rank=rank: meet(launch(rank, 3, port), SECONDS) for rank in (0, 1, 1)))
    assert len(set(sentences)) == 1
    assert sentences[0].startswith("two processes say that they are rank 1: on host ")


def test_the_second_comes_late(port: int) -> None:
    meetings = at_once(*(lambda rank=rank: meet(launch(rank, 2, port), SECONDS) for rank in range(2)))
    assert all(isinstance(meeting, Meeting) for meeting in meetings)
    (sentence,) = at_once(lambda: meet(launch(1, 2, port), SECONDS))
    assert "two processes say that they are rank 1" in sentence


def test_another_config_names_the_setting(port: int) -> None:
    of_rank = [{"training": {"steps": 2, "micro_steps": 1}}, {"training": {"steps": 4, "micro_steps": 1}}]
    sentences = at_once(*(lambda rank=rank: meet(launch(rank, 2, port), SECONDS, of_rank[rank]) for rank in (0, 1)))
    host = socket.gethostname()
    sentence = f"rank 1 (host {host}) has another config: training.steps is 4 there and 2 on rank 0 (host {host})"
    assert sentences == [sentence] * 2


@pytest.mark.parametrize("what", ["torch", "Python", "expert_parallel"])
def test_other_versions_are_named(what: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = rendezvous.versions()
    monkeypatch.setattr(
        rendezvous, "versions", lambda: ours | ({what: "9.9"} if threading.current_thread().name.endswith("_1") else {})
    )
    with ThreadPoolExecutor(2, thread_name_prefix="rank") as pool:
        started = [pool.submit(meet, launch(rank, 2, port), SECONDS) for rank in range(2)]
        sentences = [str(future.exception()) for future in started]
    assert len(set(sentences)) == 1
    assert f"runs {what} 9.9" in sentences[0]
    assert f"runs {what} {ours[what]}" in sentences[0] or f"runs {ours[what]}" in sentences[0]


def test_a_port_in_use(port: int) -> None:
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", port))
        other.listen()
        (sentence,) = at_once(lambda: meet(launch(0, 2, port), SECONDS))
    assert sentence.startswith(f"rank 0 cannot open port {port} on host {socket.gethostname()}: it is in use")


def test_an_unknown_host(port: int) -> None:
    (sentence,) = at_once(lambda: meet(launch(1, 2, port, "no-such-host.invalid"), SOON))
    assert f"rank 1 on host {socket.gethostname()} does not know the host 'no-such-host.invalid'" in sentence


def test_the_lost_are_named_and_the_living_are_not(port: int) -> None:
    meetings = at_once(*(lambda rank=rank: meet(launch(rank, 4, port), SECONDS) for rank in range(4)))
    for meeting in (meetings[0], meetings[1], meetings[3]):
        meeting.answer_calls(SECONDS)  # rank 2 died before it could
    meetings[3].leave(0.0)  # an error of its own
    assert [card.rank for card in meetings[1].lost_ranks()] == [2, 3]
    assert [meetings[0].is_first_to_tell(), meetings[1].is_first_to_tell()] == [True, False]
    for meeting in meetings[1::-1]:
        meeting.leave(0.0)


def test_host_lines() -> None:
    hosts = ["n0", "n0", "n0", "n1", "n0", "n1"]
    cards = [Card(rank, host, 1, {}, {}) for rank, host in enumerate(hosts)]
    assert host_lines(cards) == "n0 0-2 4, n1 3 5"
