"""Waits until the name of the host at which the ranks meet is known."""

import logging
import socket
import time

from expert_parallel.runtime.launchers import Launch, LaunchError

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.5
WARN_AFTER_SECONDS = 3.0  # a container's name may take a moment to be known

logger = logging.getLogger(__name__)


def resolvable_host(launch: Launch, timeout_seconds: float) -> str:
    """Returns the host of `launch.master` once its name is known, or the loopback address if all ranks are on this host
    and only the host's own name is unknown.

    Says after a few seconds what it waits for. Raises LaunchError after `timeout_seconds`.
    """
    assert launch.master is not None
    host, here = launch.master[0], socket.gethostname()
    rank, is_own = {"rank": launch.rank}, host in (here, socket.getfqdn())
    name = f"its own host's name {host!r}" if is_own else f"the host {host!r}"
    cure = "give it an address in DNS or /etc/hosts" if is_own else "see MASTER_ADDR, or the launcher's list of hosts"
    start, has_warned = time.monotonic(), False
    while True:
        try:
            socket.getaddrinfo(host, launch.master[1])
            return host
        except OSError as error:
            what = f"rank {launch.rank} on host {here} does not know {name} ({error.strerror})"
        if is_own and launch.local_world_size == launch.world_size:
            logger.info("%s: all ranks are here and meet at %s", what, LOOPBACK, extra=rank)
            return LOOPBACK
        waited = time.monotonic() - start
        if waited > timeout_seconds:
            limit = f"within {timeout_seconds:g} s (runtime.rendezvous_seconds)"
            raise LaunchError(f"{what}, where rank 0 should be, {limit}: {cure}")
        if waited > WARN_AFTER_SECONDS and not has_warned:
            logger.warning(
                "%s, where rank 0 should be; waiting up to %g s: %s", what, timeout_seconds, cure, extra=rank
            )
            has_warned = True
        time.sleep(min(POLL_SECONDS, timeout_seconds / 10))
