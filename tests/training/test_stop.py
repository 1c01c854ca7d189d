"""A stop request is never lost, even before there is a run that could stop."""

from __future__ import annotations

import os
import signal

import pytest

from mixtrain.training.signals import SIGNALS, StopRequest, note_requests


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_comes_while_a_rank_imports_is_granted_by_its_run(handlers):
    note_requests()
    os.kill(os.getpid(), signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.signal == signal.SIGUSR1 and not stop.at_once
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signals == [signal.SIGUSR1, signal.SIGTERM]
    with StopRequest() as another:
        assert another.signal is None
