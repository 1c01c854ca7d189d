"""A Slurm cluster on this machine for tests: three nodes, controller and munge, on loopback.

Rule: everything lies in one folder (SLURM_CONF points every command to it), several clusters may
run at once, and every process that was started is ended.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = (
    "slurmctld",
    "slurmd",
    "munged",
    "sbatch",
    "srun",
    "scontrol",
    "squeue",
    "sinfo",
    "scancel",
)
# where Debian has the daemons, not on everybody's PATH
SBIN = os.pathsep.join(["/usr/sbin", "/usr/local/sbin"])
# of the node in the partition gpu; regular files stand in for the devices, which no job opens
GPUS = 2

CONFIGURATION = """
ClusterName=mixtrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmdLogFile={folder}/slurmd_%n.log
SlurmdSpoolDir={folder}/spool_%n
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1
ReturnToService=2
GresTypes=gpu
NodeName=n0 Port={ports[1]} {node}
NodeName=n2 Port={ports[3]} {node}
NodeName=n1 Port={ports[2]} {node} Gres=gpu:{gpus}
PartitionName=cpu Nodes=n[0-1] Default=YES MaxTime=60
PartitionName=gpu Nodes=n1 MaxTime=60
PartitionName=short Nodes=n2 MaxTime=1
"""
# in the user's shell: gloo also connects over loopback, and all ranks share two cores
SHELL = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
# a node fails a job that returns within a second or two of its end there
REVOKED_S = 3
OTHER_CLUSTERS = ("SLURM", "SBATCH", "MIXTRAIN")  # prefixes of another cluster's variables


def lacking() -> list[str]:
    """Return the programs that are not installed here."""
    path = os.pathsep.join([os.environ.get("PATH", ""), SBIN])
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """A cluster; `environment` is that of a user's shell on its login node."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes = []
        path = os.pathsep.join([os.environ["PATH"], SBIN])
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(OTHER_CLUSTERS)
        }
        self.environment = environment | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}

    def start(self) -> None:
        for name in ("munge", "state", "spool_n0", "spool_n1", "spool_n2"):
            (self.folder / name).mkdir()
        os.chmod(self.folder / "munge", 0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        devices = [self.folder / f"gpu{number}" for number in range(GPUS)]
        for device in devices:
            device.write_text("")
        gres = "".join(f"NodeName=n1 Name=gpu File={device}\n" for device in devices)
        (self.folder / "gres.conf").write_text(gres)
        host = socket.gethostname().split(".")[0]
        values = {
            "folder": self.folder,
            "host": host,
            "node": f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000",
            "user": pwd.getpwuid(os.getuid()).pw_name,
            "ports": free_ports(4),
            "gpus": GPUS,
        }
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        self._daemon("munged", "--foreground", "--force", "--num-threads=2", *self._munge())
        wait((self.folder / "munge" / "socket").exists, 20, "munge's socket")
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n0", "n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        wait(
            lambda: self.ask("sinfo", "--format=%T %D", "--partition=cpu") == "idle 2",
            30,
            self.logs,
        )

    def _munge(self) -> list[str]:
        folder = self.folder / "munge"
        files = [f"--{name}-file={folder}/{name}" for name in ("key", "pid", "log", "seed")]
        return [*files, f"--socket={folder}/socket"]

    def _daemon(self, *command: str) -> None:
        with open(self.folder / "daemons.log", "a") as log:
            process = subprocess.Popen(
                command,
                env=self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.processes.append(process)

    def stop(self) -> None:
        """End the jobs, then the daemons in the reverse order of their start."""
        with contextlib.suppress(subprocess.SubprocessError, OSError, AssertionError):
            for job in self.ask("squeue", "--format=%A").split():
                self.run("scancel", job, check=False)
            wait(lambda: not self.ask("squeue"), 45, "the last job")
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def run(
        self, *command: str, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster."""
        return subprocess.run(
            command,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=check,
        )

    def ask(self, command: str, *flags: str) -> str:
        """Return the output of a listing command, without a header; "" if Slurm does not answer."""
        return self.run(command, "--noheader", *flags, check=False).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`; {} if Slurm has forgotten the job."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number, check=False).stdout
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def state(self, number: str) -> str:
        return self.job(number).get("JobState", "GONE")

    def wait_for(self, number: str, *states: str, seconds: float = 300) -> None:
        wait(
            lambda: self.state(number) in states,
            seconds,
            lambda: f"{number} is {self.state(number)}\n{self.logs()}",
        )

    def let_return(self, number: str, seconds: float = 60) -> None:
        """Start a requeued job after REVOKED_S; Slurm would let it wait for two minutes."""
        wait(
            lambda: self.is_requeued(number),
            seconds,
            lambda: f"job {number} to be requeued\n{self.logs()}",
        )
        time.sleep(REVOKED_S)
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
        wait(
            lambda: self.state(number) != "PENDING",
            seconds,
            lambda: f"job {number} to start\n{self.logs()}",
        )

    def is_requeued(self, number: str) -> bool:
        job = self.job(number)
        return job.get("JobState") == "PENDING" and job.get("Reason") == "BeginTime"

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-1500:]}"
            for path in sorted(self.folder.glob("*.log"))
        )


def free_ports(count: int) -> list[int]:
    """Return unused ports below the range of outgoing connections."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(11000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports


def wait(until: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            raise AssertionError(
                f"nothing after {seconds:.0f} s: {what() if callable(what) else what}"
            )
        time.sleep(0.1)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Run a cluster for the duration of the block."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
