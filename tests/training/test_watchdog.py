"""A rank that stands still reports it, prints its stacks and exits; a working rank continues."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from composing import ROOT

from mixtrain.training import watchdog
from mixtrain.training.watchdog import (
    Heartbeat,
    Watchdog,
    heartbeat_file,
    main_stack,
    read_heartbeat,
)

BEGIN = """
import sys, time
from pathlib import Path
from mixtrain.training.watchdog import Watchdog, heartbeat
words = lambda text: Path(sys.argv[1], 'words').write_text(text)
with Watchdog(3, 0.5 / 60, sys.argv[1], words):
"""


def run(folder: Path, body: str) -> subprocess.CompletedProcess:
    """Run this body within a watchdog of half a second."""
    return subprocess.run(
        [sys.executable, "-c", BEGIN + body, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_beat_that_cannot_be_written_ends_nothing(tmp_path):
    full = (
        "    from mixtrain.training import watchdog\n"
        "    watchdog._active.file = open('/dev/full', 'w')\n"
    )
    done = run(
        tmp_path / "gone",
        "    heartbeat('start', 1)\n" + full + "    heartbeat('forward', 1); print('goes on')\n",
    )
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


def test_a_main_thread_that_stands_still_is_shown_and_ended(tmp_path):
    done = run(tmp_path, "    heartbeat('forward', 12)\n    time.sleep(20)\n")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "mixtrain: rank 3 stands still in step 12 (forward) for 0 s; its stacks:\n"
    )
    assert 'File "<string>", line 8 in <module>' in done.stderr
    assert (tmp_path / "words").read_text() == "rank 3 stands still in step 12 (forward) for 0 s"
    assert read_heartbeat(heartbeat_file(tmp_path, 3)) == Heartbeat(12, "forward")


def test_a_main_thread_that_lets_no_other_run_is_ended_as_well(tmp_path):
    """A call into C that holds the GIL: the watchdog's thread cannot run."""
    done = run(
        tmp_path, "    heartbeat('forward', 12)\n    import re; re.match('(a*)*b', 'a' * 40)\n"
    )
    assert (
        done.returncode == 1
        and "Timeout" in done.stderr
        and "most recent call first" in done.stderr
    )


@dataclass
class Looks:
    """The watchdog's event on its own clock: each look comes a tenth of the timeout later."""

    clock: float = 100.0
    seen: int = 0
    ended_at: int | None = None  # the look at which the watchdog would have ended the process
    at_look: Callable[[int], None] = lambda number: None

    def wait(self, seconds: float) -> bool:
        assert seconds == pytest.approx(0.05)
        self.seen += 1
        self.clock = 100 + self.seen / 20
        self.at_look(self.seen)
        return self.seen == 100 or self.ended_at is not None


@pytest.fixture
def looks(monkeypatch) -> Iterator[tuple[Looks, Watchdog]]:
    """A watchdog of half a second that runs on this thread, and the event that it waits for."""
    found = Looks()
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: found.clock)
    monkeypatch.setattr(
        Watchdog, "_end", lambda self: setattr(self.done, "ended_at", self.done.seen)
    )
    dog = Watchdog(3, 0.5 / 60, None, print)
    dog.done = found
    yield found, dog
    faulthandler.cancel_dump_traceback_later()


def test_who_has_not_begun_is_left_alone(looks):
    found, dog = looks
    dog._watch()
    assert (found.seen, found.ended_at) == (100, None)  # 5 s


def test_who_moves_is_left_alone(looks):
    found, dog = looks
    found.at_look = lambda number: number % 9 == 0 and dog.heartbeat("x", number)
    dog.heartbeat("x", 0)
    dog._watch()
    assert (found.seen, found.ended_at) == (100, None)


def test_who_has_stopped_moving_is_ended_at_the_first_look_after_the_timeout(looks):
    found, dog = looks
    dog.heartbeat("x", 0)
    dog._watch()
    assert found.ended_at == 11


def test_after_the_block_nobody_watches(tmp_path):
    """Neither the thread nor the backstop, which would end the process after 1.75 s."""
    ended = "[thread.join(20) for thread in threading.enumerate() if thread.name == 'watchdog']"
    after = f"import threading; {ended}\ntime.sleep(2)\nheartbeat('nobody')\nprint('done')\n"
    done = run(tmp_path, "    heartbeat('x', 1)\n" + after)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_beat_that_was_never_left_is_none(tmp_path):
    assert read_heartbeat(tmp_path / "heartbeat_0") is None
    (tmp_path / "heartbeat_0").write_text("")
    assert read_heartbeat(tmp_path / "heartbeat_0") is None


DUMP = """Thread 0x1 (most recent call first):
  File "/t/threading.py", line 331 in wait
  File "/t/threading.py", line 1002 in _bootstrap

Thread 0x2 (most recent call first):
  File "/a/loop.py", line 7 in train_step
  File "/a/train.py", line 9 in <module>
"""


def test_it_shows_its_stacks_when_it_is_asked_and_goes_on(tmp_path):
    body = "    import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print('on')\n"
    done = run(tmp_path, body)
    assert (done.returncode, done.stdout) == (0, "on\n")
    assert main_stack((tmp_path / "stacks_3").read_text()) == [
        'File "<string>", line 7 in <module>'
    ]


def test_the_main_thread_is_found_in_a_dump():
    frames = ['File "/a/loop.py", line 7 in train_step', 'File "/a/train.py", line 9 in <module>']
    assert main_stack("words\n" + DUMP) == frames
    assert main_stack(DUMP + 'Current thr  File "/x", line 1ead') == frames
    assert main_stack("no dump") == []
