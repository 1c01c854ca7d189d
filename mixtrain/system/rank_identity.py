"""The rank of this process, from the environment of torchrun, Slurm or our launcher. No torch."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import signal
import socket
import struct
import sys
from dataclasses import dataclass

from mixtrain.errors import UserError

# environment variables of ranks that our own launcher starts
FOLDER = "MIXTRAIN_FOLDER"  # contains their plan and the rendezvous file
LAUNCHER = "MIXTRAIN_LAUNCHER"  # the launcher's process id

INTERFACES = "GLOO_SOCKET_IFNAME"  # gloo's variable: the network interfaces it listens on
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
SLURM = (
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_NNODES",
    "SLURM_LOCALID",
    "SLURM_JOB_ID",
)


@dataclass(frozen=True)
class Identity:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    rendezvous: str  # torch.distributed's init_method

    @property
    def node(self) -> str:
        """The name of this node if the job has several, else ""."""
        return node_name() if self.world_size > self.local_world_size else ""

    @property
    def is_ours(self) -> bool:
        """Whether our own launcher started this rank; it prints the plan and reports failures."""
        return self.rendezvous.startswith("file://")


def node_name() -> str:
    """Return Slurm's name of this node, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def is_started() -> bool:
    """Return whether torchrun, Slurm or our launcher started this process as a rank."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ


def read_identity() -> Identity | None:
    """Read the rank from the environment; None if this process is not a rank. Raises UserError."""
    if not is_started():
        return None
    is_torchrun = "RANK" in os.environ
    identity = _torchrun() if is_torchrun else _slurm()
    if identity.rank >= identity.world_size:
        rank, world_size = (TORCHRUN if is_torchrun else SLURM)[:2]
        raise UserError(
            f"the environment has {rank} = {identity.rank}, but {world_size} ="
            f" {identity.world_size}; unset both where no torchrun or srun has started this process"
        )
    return identity


def _torchrun() -> Identity:
    _check_numbers(TORCHRUN)
    env = os.environ
    world = int(env.get("WORLD_SIZE", 1))
    local_world = int(env.get("LOCAL_WORLD_SIZE", world))
    rendezvous = f"file://{env[FOLDER]}/rendezvous" if FOLDER in env else "env://"
    return Identity(
        int(env["RANK"]), world, int(env.get("LOCAL_RANK", env["RANK"])), local_world, rendezvous
    )


def _slurm() -> Identity:
    _check_numbers((*SLURM, "MASTER_PORT"))
    env = os.environ
    world = int(env.get("SLURM_NTASKS", 1))
    nodes = max(1, int(env.get("SLURM_NNODES", 1)))
    local_world = int(env.get("SLURM_NTASKS_PER_NODE", world // nodes))
    local_rank = int(env.get("SLURM_LOCALID", 0))
    rendezvous = _slurm_rendezvous()
    return Identity(int(env["SLURM_PROCID"]), world, local_rank, local_world, rendezvous)


def _check_numbers(names: tuple[str, ...]) -> None:
    wrong = [name for name in names if not os.environ.get(name, "0").isdecimal()]
    problems = [
        f"the environment has {name}={os.environ[name]}, which is not a number" for name in wrong
    ]
    if problems:
        raise UserError(*problems)


def _slurm_rendezvous() -> str:
    """Return the URL of the job's first node, at a port from the job id: the same on every rank."""
    host = os.environ.get("MASTER_ADDR")
    if not host:
        # node[07-09,12],login[1-2] starts with node07; scontrol expands such lists, but a container
        # seldom has it
        nodes = os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1")
        host = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]
    port = os.environ.get("MASTER_PORT", 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000)
    return f"tcp://{host}:{port}"


def interface_problem(names: str) -> str:
    """Return why gloo cannot listen on the network interfaces `names`, or ""; Linux only."""
    for name in filter(None, names.split(",")) if sys.platform == "linux" else ():
        if reason := _interface_fault(name):
            return (
                f"the ranks connect over the network interface {name} ({INTERFACES}), which"
                f" {reason}; {INTERFACES}=NAME selects another"
            )
    return ""


def _interface_fault(interface: str) -> str:
    # SIOCGIFFLAGS and IFF_UP of Linux
    get_flags = 0x8913
    up = 1
    request = struct.pack("16sH14x", interface.encode()[:15], 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, get_flags, request))[1]
        except OSError as error:
            if error.errno != errno.ENODEV:
                return ""
            existing = ", ".join(name for _, name in socket.if_nameindex())
            return f"this machine lacks (it has {existing or 'none'})"
    return "" if flags & up else f"is down: `ip link set {interface} up` as root"


def die_with(launcher: int) -> None:
    """End this rank when its launcher is killed, so that no rank is left behind; Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if (
        os.getppid() != launcher
    ):  # the launcher ended before the call; other systems only check this
        os.kill(os.getpid(), signal.SIGKILL)
