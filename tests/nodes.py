"""Nodes on one machine: network, UTS, mount and PID namespaces, on a bridge in a namespace of its own. Needs root and
the Debian packages iproute2 and util-linux. Nothing has a name outside, so two clusters at once do not meet.

with nodes(2) as cluster:                                # hosts n0 and n1, which know each other by name
    subprocess.Popen(cluster.on(0, ["python", "x.py"]))  # a process on n0
    cluster.cut(1); cluster.heal(1)                      # n1's cable
    cluster.kill(1); cluster.boot(1)                     # n1 with all its processes; a new, empty n1
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launches import ROOT

PACKAGES = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount"}
# The first process of a node. It reaps orphans, and lives until its stdin is closed: at the latest when pytest ends.
INIT = "trap : CHLD; echo up; read -r _"


def need_programs(packages: dict[str, str], *, root: bool = True) -> None:
    """Skips the test where a program is missing, naming its Debian package, or where this is not root."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    for program, package in packages.items():
        if shutil.which(program, path=os.pathsep.join(folders)) is None:
            pytest.skip(f"needs {program}: Debian package {package}")
    if root and os.geteuid() != 0:
        pytest.skip("needs root: it makes namespaces")


@contextmanager
def nodes(count: int) -> Iterator["Cluster"]:
    need_programs(PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(count, Path(folder))
        try:
            cluster.set_up()
            yield cluster
        finally:
            cluster.close()


class Cluster:
    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder
        self.inits: dict[str, subprocess.Popen[str]] = {}  # host name -> the unshare process that holds the host

    def set_up(self) -> None:
        addresses = "".join(f"{self.address(node)} n{node}\n" for node in range(self.count))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{addresses}")
        (self.folder / "nsswitch.conf").write_text("hosts: files\n")  # no name server: an unknown name fails at once
        self._unshare("switch")
        self._run("switch", "ip link add br0 type bridge && ip link set br0 up")
        for node in range(self.count):
            self.boot(node)

    @staticmethod
    def address(node: int) -> str:
        return f"10.232.0.{10 + node}"

    def boot(self, node: int) -> None:
        name = f"n{node}"
        self._unshare(name)
        card = (
            f"eth0 address 02:00:00:00:00:{node:02x}"  # a node that comes back has its old one, as others remember it
        )
        self._run("switch", f"ip link add v{node} type veth peer name {card} netns {self._first_process(name)}")
        self._run("switch", f"ip link set v{node} master br0 up")
        self._run(name, f"hostname {name}; ip link set lo up; ip addr add {self.address(node)}/24 dev eth0")
        self._run(name, "ip link set eth0 up; mount -t tmpfs tmpfs /run")
        for file in ("hosts", "nsswitch.conf"):
            self._run(name, f"mount --bind {self.folder / file} /etc/{file}")

    def on(self, node: int, command: list[str]) -> list[str]:
        """The command that runs `command` on that node."""
        return [*self._enter(f"n{node}"), *command]

    def serve_ssh(self) -> None:
        """An sshd on each node; root of each may log in to all, without a question."""
        need_programs({"ssh": "openssh-client", "sshd": "openssh-server", "ssh-keygen": "openssh-client"})
        home = self.folder / "ssh"
        home.mkdir(mode=0o700)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / "id_ed25519"], check=True)
        shutil.copy(home / "id_ed25519.pub", home / "authorized_keys")
        (home / "config").write_text("StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n")
        (home / "sshd_config").write_text(
            f"HostKey {home / 'id_ed25519'}\nPidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        )
        for node in range(self.count):
            self._run(f"n{node}", f"mkdir -p ~/.ssh /run/sshd && mount --bind {home} ~/.ssh")
            self._run(f"n{node}", f"$(command -v sshd || echo /usr/sbin/sshd) -f {home / 'sshd_config'}")

    def cut(self, node: int) -> None:
        self._run("switch", f"ip link set v{node} down")

    def heal(self, node: int) -> None:
        self._run("switch", f"ip link set v{node} up")

    def kill(self, node: int) -> None:
        """As by a power cut: without a farewell, which the network would deliver if its cable were not out first."""
        self._run("switch", f"ip link delete v{node} 2>/dev/null || true")
        holder = self.inits.pop(f"n{node}")
        holder.kill()  # the kernel then kills the node's first process, and with it all others
        holder.communicate()

    def close(self) -> None:
        for holder in self.inits.values():
            holder.kill()
            holder.communicate()
        self.inits.clear()

    def _unshare(self, name: str) -> None:
        command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.inits[name] = subprocess.Popen(
            [*command, "bash", "-c", INIT], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        output = self.inits[name].stdout
        assert output is not None
        assert output.readline() == "up\n", f"{name} did not come up: has this container the right to make namespaces?"

    def _first_process(self, name: str) -> int:
        holder = self.inits[name].pid
        return int(Path(f"/proc/{holder}/task/{holder}/children").read_text())

    def _enter(self, name: str) -> list[str]:
        # The switch is entered for its network alone: `ip link add ... netns PID` must see the nodes' process ids.
        spaces = ["--net"] if name == "switch" else ["--net", "--uts", "--mount", "--pid"]
        return ["nsenter", f"--target={self._first_process(name)}", *spaces, "--wd", "--"]

    def _run(self, name: str, script: str) -> None:
        command = [*self._enter(name), "bash", "-ec", f"PATH=$PATH:/usr/sbin:/sbin; {script}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{name}: {script}\n{done.stderr}"
