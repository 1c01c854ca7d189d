"""A node whose rendezvous address is loopback is refused, unless the first rank is there too."""

from __future__ import annotations

import socket
import time

import pytest

from mixtrain.errors import UserError
from mixtrain.system.rank_identity import Identity
from mixtrain.training.preflight import rendezvous


def on_the_second_node(address: str) -> Identity:
    return Identity(2, 4, 0, 2, address)


@pytest.mark.parametrize(
    "host, loopback",
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("10.0.0.7", False),
        ("no-such-host.invalid", False),
    ],
)
def test_an_address_that_means_whoever_asks_is_known(host, loopback):
    assert rendezvous.is_loopback(host) is loopback


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_node_that_is_sent_to_itself_and_finds_nobody_is_named(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    with pytest.raises(UserError) as refused:
        rendezvous.check(on_the_second_node(f"tcp://localhost:{free_port()}"), patience=0.5)
    assert str(refused.value).startswith("node n1: the ranks are to meet at localhost:")
    assert "MASTER_ADDR must be the first node's address" in str(refused.value)


def test_two_nodes_on_one_machine_meet_there():
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        first.listen()
        rendezvous.check(
            on_the_second_node(f"tcp://127.0.0.1:{first.getsockname()[1]}"), patience=5
        )


@pytest.mark.parametrize(
    "identity",
    [
        Identity(1, 4, 1, 2, "tcp://127.0.0.1:9"),  # on the node of the first rank
        Identity(1, 2, 1, 2, "file:///somewhere/rendezvous"),
        Identity(2, 4, 0, 2, "tcp://10.0.0.7:9"),
    ],
)
def test_nobody_else_is_asked_to_wait(identity):
    started = time.monotonic()
    rendezvous.check(identity, patience=20)
    assert time.monotonic() - started < 5


def test_torchruns_meeting_is_looked_at_too(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(UserError, match="which is this node itself"):
        rendezvous.check(on_the_second_node("env://"), patience=0.3)
