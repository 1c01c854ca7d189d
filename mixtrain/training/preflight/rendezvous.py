"""Check that ranks of several nodes can meet at their rendezvous address. No torch.

Rule: a loopback address is right only on the machine of the first rank.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from urllib.parse import urlparse

from mixtrain.errors import UserError
from mixtrain.system.rank_identity import Identity, node_name

PATIENCE_S = 120.0  # wait for the first rank to listen: its imports take as long as ours


def address_of(identity: Identity) -> tuple[str, int] | None:
    """Return (host, port) of the rendezvous; None if it is a file."""
    if identity.rendezvous.startswith("tcp://"):
        parts = urlparse(identity.rendezvous)
        return parts.hostname, parts.port
    if identity.rendezvous == "env://":
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return None


def is_loopback(host: str) -> bool:
    """Whether the host resolves to loopback addresses only; False if it cannot be resolved."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(addresses) and all(
        ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses
    )


def check(identity: Identity, patience: float = PATIENCE_S) -> None:
    """UserError if the address is loopback and no first rank answers. Quick for other addresses."""
    address = address_of(identity)
    if address is None or identity.rank < identity.local_world_size or not is_loopback(address[0]):
        return
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:  # two Slurm nodes, or two torchruns, may share a machine: then the first rank answers
            socket.create_connection(address, timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise UserError(
        f"node {node_name()}: the ranks are to meet at {address[0]}:{address[1]}, which is this"
        f" node itself, but the first rank is on another node (no answer for {patience:.0f} s);"
        " MASTER_ADDR must be the first node's address, and /etc/hosts must not map it to localhost"
    )
