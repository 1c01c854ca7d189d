"""Who this process is: a rank that torchrun, Slurm or mixtrain started, or the one that is to start them. No torch."""

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

# set for the ranks that mixtrain starts itself:
FOLDER = "MIXTRAIN_FOLDER"  # holds their plan, and the file they meet at
LAUNCHER = "MIXTRAIN_LAUNCHER"  # the process that started them

INTERFACES = "GLOO_SOCKET_IFNAME"  # gloo's own: where it listens
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
        """The name of this node where there are several, else nothing."""
        return node_name() if self.world_size > self.local_world_size else ""

    @property
    def is_ours(self) -> bool:
        """Started by this project's own launcher, which has printed the plan and reports failures."""
        return self.rendezvous.startswith("file://")


def node_name() -> str:
    """What Slurm calls this node, else what it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def is_started() -> bool:
    """Somebody has started this process as a rank."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ


def read_identity() -> Identity | None:
    """This process's rank from torchrun's or Slurm's environment; None where nobody has started ranks."""
    if not is_started():
        return None
    identity = _torchrun() if "RANK" in os.environ else _slurm()
    if identity.rank >= identity.world_size:
        names = TORCHRUN[:2] if "RANK" in os.environ else SLURM[:2]
        raise UserError(
            f"the environment has {names[0]} = {identity.rank}, but {names[1]} = {identity.world_size}; unset"
            " both where no torchrun or srun has started this process"
        )
    return identity


def _torchrun() -> Identity:
    _refuse_words(TORCHRUN)
    env = os.environ
    world = int(env.get("WORLD_SIZE", 1))
    local_world = int(env.get("LOCAL_WORLD_SIZE", world))
    rendezvous = f"file://{env[FOLDER]}/rendezvous" if FOLDER in env else "env://"
    return Identity(
        int(env["RANK"]), world, int(env.get("LOCAL_RANK", env["RANK"])), local_world, rendezvous
    )


def _slurm() -> Identity:
    _refuse_words((*SLURM, "MASTER_PORT"))
    env = os.environ
    world = int(env.get("SLURM_NTASKS", 1))
    local_world = int(
        env.get("SLURM_NTASKS_PER_NODE", world // max(1, int(env.get("SLURM_NNODES", 1))))
    )
    return Identity(
        int(env["SLURM_PROCID"]),
        world,
        int(env.get("SLURM_LOCALID", 0)),
        local_world,
        _slurm_rendezvous(),
    )


def _refuse_words(names: tuple[str, ...]) -> None:
    wrong = [name for name in names if not os.environ.get(name, "0").isdecimal()]
    if wrong:
        raise UserError(
            *[
                f"the environment has {name}={os.environ[name]}, which is not a number"
                for name in wrong
            ]
        )


def _slurm_rendezvous() -> str:
    """The first node of the job, at a port that follows from the job's number: the same on every rank."""
    host = os.environ.get("MASTER_ADDR")
    if not host:
        # node[07-09,12],login[1-2] is node07, node08 ...; scontrol would tell, but a container
        # seldom has it
        host = re.sub(
            r"\[(\w+)[^]]*\]", r"\1", os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1")
        ).split(",")[0]
    port = os.environ.get("MASTER_PORT", 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000)
    return f"tcp://{host}:{port}"


def interface_problem(names: str) -> str:
    """Why gloo cannot listen at the network interfaces `names`; "" where it can, or where that cannot be known here."""
    for name in filter(None, names.split(",")) if sys.platform == "linux" else ():
        if wrong := _is_unusable(name):
            return (
                f"the ranks meet over the network interface {name} ({INTERFACES}), which {wrong};"
                f" {INTERFACES}=NAME takes another"
            )
    return ""


def _is_unusable(interface: str) -> str:
    # SIOCGIFFLAGS and IFF_UP of Linux
    get_flags = 0x8913
    up = 1
    request = struct.pack("16sH14x", interface.encode()[:15], 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, get_flags, request))[1]
        except OSError as error:
            there = ", ".join(name for _, name in socket.if_nameindex())
            return (
                f"this machine lacks (it has {there or 'none'})"
                if error.errno == errno.ENODEV
                else ""
            )
    return "" if flags & up else f"is down: `ip link set {interface} up` as root"


def die_with(launcher: int) -> None:
    """Ask Linux to end this rank if the process that started it is killed outright, so that none is left behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the call; on other systems this is all there is
        os.kill(os.getpid(), signal.SIGKILL)
