"""A real Slurm on one machine: munge and slurmctld on node n0, and slurmd on the others of tests/nodes.py.

with slurm(4, folder) as cluster:                       # compute nodes n1 to n4
    job = cluster.submit(script, *arguments, options=["--nodes", "2"])
    cluster.wait(job, "COMPLETED")                      # or fails, with the job's log
    cluster.kill(1); cluster.boot(1)                    # n1 as by a power cut; a new n1
"""

import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.launches import TIMEOUT_SECONDS, environment
from tests.nodes import Cluster, need_programs, nodes

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

# A node counts as lost after 10 s of silence, and a requeued job starts soon; both take minutes by default.
# Processors and GPUs are said to be those of a large node: nothing looks whether they are there.
CONFIG = """
ClusterName=test
SlurmctldHost=n0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=10
MinJobAge=3600
SlurmdTimeout=10
MessageTimeout=10
TCPTimeout=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,requeue_delay=1
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-{last}] CPUs=64 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(count: int, folder: Path) -> Iterator["Slurm"]:
    need_programs(PACKAGES)
    with nodes(count + 1) as hosts:
        cluster = Slurm(hosts, folder)
        cluster.start()
        yield cluster


class Slurm:
    """Its processes live in the nodes' namespaces, and end with them."""

    def __init__(self, hosts: Cluster, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.environment = environment() | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"

    def start(self) -> None:
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, last=self.hosts.count - 1))
        for number in range(8):  # each a second /dev/null
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(b"a secret of this cluster alone, at least 32 bytes long")
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        self._daemon(0, "munged", "--foreground", "--force", *(f"--{key}={self.folder / files[key]}" for key in files))
        self.until(lambda: (self.folder / "munge.socket").exists(), "socket of munged")
        self._daemon(0, "slurmctld", "-D", "-c")
        for node in range(1, self.hosts.count):
            self._daemon(node, "slurmd", "-D", "-c", "-N", f"n{node}")
        self.until(lambda: self.node_states() == ["idle"] * (self.hosts.count - 1), "idle nodes")

    def submit(self, script: Path, *arguments: str | Path, options: list[str], **variables: str) -> str:
        """The job's number. It runs in the cluster's folder, where its log is; options: sbatch's."""
        words = ["sbatch", "--parsable", f"--chdir={self.folder}", *options]
        return self.run(*words, script, *arguments, **variables).strip()

    def wait(self, job: str, state: str, seconds: float = 2 * TIMEOUT_SECONDS) -> dict[str, str]:
        """The job's record, once it has ended in that state."""
        self.until(lambda: self.record(job)["JobState"] in ENDED, f"end of job {job}", seconds, every=0.5)
        record = self.record(job)
        assert record["JobState"] == state, f"job {job}: {record}\n{self.log(job)}"
        return record

    def record(self, job: str) -> dict[str, str]:
        """scontrol's account of a job, or of one task of an array (`12_3`)."""
        line = self.run("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        return dict(part.partition("=")[::2] for part in line.split())

    def log(self, job: str) -> str:
        path = Path(self.record(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def node_states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--format=%t", may_fail=True).split()

    def kill(self, node: int) -> None:
        """Without a farewell: the cable first, and for good, or the network would live on to deliver one."""
        self.hosts._run("switch", f"ip link delete v{node}")
        self.hosts.kill(node)

    def boot(self, node: int) -> None:
        self.hosts.boot(node)
        self._daemon(node, "slurmd", "-D", "-c", "-N", f"n{node}")

    def run(self, *command: str | Path, may_fail: bool = False, **variables: str) -> str:
        """What a command on the controller's node says."""
        words = self.hosts.on(0, [str(word) for word in command])
        done = subprocess.run(words, env=self.environment | variables, capture_output=True, text=True, timeout=60)
        assert may_fail or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def until(
        self, condition: Callable[[], bool], what: str, seconds: float = TIMEOUT_SECONDS, every: float = 0.1
    ) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} after {seconds:.0f} s\n{self._logs()}"
            time.sleep(every)

    def _daemon(self, node: int, *command: str) -> None:
        output = (self.folder / f"{command[0]}.n{node}.out").open("ab")
        with output:
            subprocess.Popen(
                self.hosts.on(node, list(command)),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _logs(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)
