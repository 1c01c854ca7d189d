"""Whether the ranks of several nodes can meet where they are told to. No torch: it is asked before they try.

Rule: an address that means "this machine" is right only where the first rank is on this machine.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from urllib.parse import urlparse

from mixtrain.errors import UserError
from mixtrain.system.rank_identity import Identity, node_name

PATIENCE_S = 120.0  # for the first rank to come to the meeting: it imports as long as the others


def address_of(identity: Identity) -> tuple[str, int] | None:
    """(host, port) of the meeting; None where it is a file."""
    if identity.rendezvous.startswith("tcp://"):
        parts = urlparse(identity.rendezvous)
        return parts.hostname, parts.port
    if identity.rendezvous == "env://":
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return None


def is_loopback(host: str) -> bool:
    """Whether the host is this machine for whoever asks; False where it cannot be looked up, which says so itself."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(
        ipaddress.ip_address(address.split("%")[0]).is_loopback for address in found
    )


def check(identity: Identity, patience: float = PATIENCE_S) -> None:
    """UserError on a node that is sent to itself, where no first rank is. Quick everywhere else."""
    address = address_of(identity)
    if address is None or identity.rank < identity.local_world_size or not is_loopback(address[0]):
        return
    deadline = (
        time.monotonic() + patience
    )  # two nodes of Slurm, or two torchruns, may be on one machine: somebody answers
    while time.monotonic() < deadline:
        try:  # two nodes of Slurm, or two torchruns, may be on one machine: then somebody answers
            socket.create_connection(address, timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise UserError(
        f"node {node_name()}: the ranks are to meet at {address[0]}:{address[1]}, which is this"
        f" node itself, and the first rank is not here (nobody has answered for {patience:.0f} s);"
        " MASTER_ADDR must be the first node's address, and no localhost in /etc/hosts"
    )
