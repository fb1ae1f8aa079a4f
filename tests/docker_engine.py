"""A Docker engine of the tests' own, and an image built by it. Needs root and Debian packages; where one is missing the
tests are skipped. Nothing of it is seen by another engine on the machine, and nothing is left.

with docker_engine() as docker:
    build_image(docker, folder, "debian:12", "image")
    docker("run", "--rm", "image", "train", config)   # output, or AssertionError with it
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.launches import ROOT

PACKAGES = {
    "dockerd": "docker.io",
    "docker": "docker.io",
    "docker-compose": "docker-compose",
    "debootstrap": "debootstrap",
    "unshare": "util-linux",
}
CONSTRAINTS = ROOT / "launch" / "constraints.txt"


def program(name: str) -> str:
    """Debian's, before another of that name that stands earlier on the PATH."""
    found = shutil.which(name, path=os.pathsep.join(["/usr/bin", "/usr/sbin", os.environ.get("PATH", "")]))
    if not found:
        pytest.skip(f"needs {name}: Debian package {PACKAGES[name]}")
    return found


class Docker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "DOCKER_HOST": f"unix://{folder}/socket", "DOCKER_BUILDKIT": "1"}

    def __call__(self, *arguments: str | Path, **options: str) -> str:
        return self.run([program("docker"), *arguments], **options)

    def compose(self, *arguments: str | Path, **variables: str) -> str:
        """variables: of the environment, which the compose file reads."""
        return self.run([program("docker-compose"), *arguments], **variables)

    def run(self, command: list[str | Path], **variables: str) -> str:
        """Output of both kinds, from a process that must end well."""
        done = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout


@contextmanager
def docker_engine() -> Iterator[Docker]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for name in PACKAGES:
        program(name)

    folder = Path(tempfile.mkdtemp(prefix="docker-"))  # short: a socket's path has at most 107 characters
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    settings = {
        "data-root": f"{folder}/data",
        "exec-root": f"{folder}/exec",
        "pidfile": f"{folder}/pid",
        "hosts": [f"unix://{folder}/socket"],
        "default-ulimits": {"nofile": {"Name": "nofile", "Soft": files, "Hard": files}},  # the default asks for more
        # The machine's own network is left as it is: containers share it, or have one among themselves.
        "bridge": "none",
        "iptables": False,
        "ip6tables": False,
    }
    (folder / "daemon.json").write_text(json.dumps(settings))
    # In namespaces of its own, the engine's mounts are unseen, and all its processes end with the first of them. Its
    # data is kept in memory where there is enough: thousands of small files, which disks are slow to write and remove.
    start = f"exec {program('dockerd')} --config-file {folder}/daemon.json"
    if _available_memory() > 10e9:
        start = f"mkdir {folder}/data && mount -t tmpfs tmpfs {folder}/data && {start}"
    command = [program("unshare"), "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", start]
    with (folder / "log").open("w") as log:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        docker = Docker(folder)
        _wait_for(docker, daemon)
        try:
            yield docker
        finally:
            if containers := docker("ps", "--all", "--quiet").split():
                docker("rm", "--force", "--volumes", *containers)
            docker("network", "prune", "--force")  # bridges, which are the machine's
    finally:
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()
        _remove(folder)


def _wait_for(docker: Docker, daemon: subprocess.Popen[bytes], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while subprocess.run([program("docker"), "info"], env=docker.environment, capture_output=True).returncode:
        if daemon.poll() is not None or time.monotonic() > end:
            raise RuntimeError("no Docker engine:\n" + (docker.folder / "log").read_text())
        time.sleep(0.1)


def _available_memory() -> int:
    """Bytes."""
    return int(re.findall(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024


def _remove(folder: Path, seconds: float = 30) -> None:
    """The kernel takes the engine's last mounts away a moment after its processes."""
    end = time.monotonic() + seconds
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=time.monotonic() < end)
        time.sleep(0.1)


def build_image(docker: Docker, folder: Path, base: str, tag: str) -> str:
    """Builds docker/Dockerfile unchanged, on a Debian named as its `base` is. Returns the builder's output."""
    wheels = folder / "wheels"
    with _download_packages(wheels) as download:
        _import_debian(docker, folder / "base.tar", base)  # meanwhile
        output, _ = download.communicate()
    if download.returncode:
        pytest.skip(f"packages for the image (torch's CPU build and others) cannot be had from pip's index:\n{output}")
    with _serve(wheels) as address:
        (folder / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {address}\n")
        return docker(
            *("build", "--progress", "plain", "--network", "host", "--secret", f"id=pip.conf,src={folder}/pip.conf"),
            *("--file", "docker/Dockerfile", "--tag", tag, "."),
        )


def _import_debian(docker: Docker, archive: Path, name: str) -> None:
    """Like official images: dpkg does not wait for a disk after each file, apt keeps no packages. Like Ubuntu's: user
    1000 is `ubuntu`. Made in memory, in a mount namespace of its own."""
    script = f"""
        mount -t tmpfs -o mode=755 tmpfs {archive.parent}
        cd {archive.parent}
        debootstrap --variant=minbase --include=ca-certificates bookworm root >&2
        echo force-unsafe-io > root/etc/dpkg/dpkg.cfg.d/docker
        echo 'DPkg::Post-Invoke {{ "rm -f /var/cache/apt/archives/*.deb"; }};' > root/etc/apt/apt.conf.d/docker-clean
        chroot root useradd --create-home --uid 1000 ubuntu
        chroot root apt-get clean
        tar -C root -c .
    """
    with archive.open("wb") as tar:
        done = subprocess.run([program("unshare"), "--mount", "sh", "-ec", script], stdout=tar, stderr=subprocess.PIPE)
    if done.returncode:
        pytest.skip(f"debootstrap cannot make a Debian: {done.stderr.decode()[-400:]}")
    docker("import", archive, name)
    archive.unlink()


def _download_packages(wheels: Path) -> subprocess.Popen[str]:
    """What the image's pip will ask for, fetched by this machine's pip, which knows where from."""
    pinned = CONSTRAINTS.read_text().split("\n# test\n")[0]
    wheels.mkdir()
    requirements = wheels.parent / "requirements.txt"
    requirements.write_text(
        "".join(
            # The CPU's build, whatever the index offers besides: without the gigabytes of CUDA's libraries.
            f"{line}+cpu\n" if line.startswith("torch==") else f"{line}\n"
            for line in pinned.splitlines()
        )
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--python-version", "3.11"] if sys.version_info[:2] != (3, 11) else []  # Debian 12's
    return subprocess.Popen(
        [*command, "--dest", str(wheels), "--requirement", str(requirements)],
        env={**os.environ, "DS_BUILD_OPS": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def _serve(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
