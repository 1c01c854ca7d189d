"""A rank that stands still says so, shows its stacks and ends; one that moves is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from composing import ROOT

from mixtrain.watchdog import Beat, beat_file, main_stack, read_beat

BEGIN = """
import sys, time
from pathlib import Path
from mixtrain.watchdog import Watchdog, beat
words = lambda text: Path(sys.argv[1], 'words').write_text(text)
with Watchdog(3, 0.5 / 60, sys.argv[1], words):
"""


def run(folder: Path, body: str) -> subprocess.CompletedProcess:
    """A process of this body within a watchdog of half a second."""
    return subprocess.run(
        [sys.executable, "-c", BEGIN + body, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_beat_that_cannot_be_written_ends_nothing(tmp_path):
    full = "    from mixtrain import watchdog; watchdog._active.file = open('/dev/full', 'w')\n"
    done = run(tmp_path / "gone", "    beat('start', 1)\n" + full + "    beat('forward', 1); print('goes on')\n")
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


def test_a_main_thread_that_stands_still_is_shown_and_ended(tmp_path):
    done = run(tmp_path, "    beat('forward', 12)\n    time.sleep(20)\n")
    assert done.returncode == 1
    assert done.stderr.startswith("mixtrain: rank 3 stands still in step 12 (forward) for 0 s; its stacks:\n")
    assert 'File "<string>", line 8 in <module>' in done.stderr
    assert (tmp_path / "words").read_text() == "rank 3 stands still in step 12 (forward) for 0 s"
    assert read_beat(beat_file(tmp_path, 3)) == Beat(12, "forward")


def test_a_main_thread_that_lets_no_other_run_is_ended_as_well(tmp_path):
    """A call into C that keeps Python's lock: the thread that watches cannot run."""
    done = run(tmp_path, "    beat('forward', 12)\n    import re; re.match('(a*)*b', 'a' * 40)\n")
    assert done.returncode == 1 and "Timeout" in done.stderr and "most recent call first" in done.stderr


@pytest.mark.parametrize("body", ["    for n in range(15): beat('x', n); time.sleep(0.1)\n", "    time.sleep(1)\n"])
def test_who_moves_or_has_not_begun_is_left_alone(tmp_path, body):
    done = run(tmp_path, body + "print('done')\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_after_the_block_nobody_watches(tmp_path):
    done = run(tmp_path, "    beat('x', 1)\ntime.sleep(1.5)\nbeat('nobody')\nprint('done')\n")
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_beat_that_was_never_left_is_none(tmp_path):
    assert read_beat(tmp_path / "beat_0") is None
    (tmp_path / "beat_0").write_text("")
    assert read_beat(tmp_path / "beat_0") is None


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
    assert main_stack((tmp_path / "stacks_3").read_text()) == ['File "<string>", line 7 in <module>']


def test_the_main_thread_is_found_in_a_dump():
    frames = ['File "/a/loop.py", line 7 in train_step', 'File "/a/train.py", line 9 in <module>']
    assert main_stack("words\n" + DUMP) == frames
    assert main_stack(DUMP + 'Current thr  File "/x", line 1ead') == frames
    assert main_stack("no dump") == []
