"""A rank's output: what a full disk does not take goes to the launcher, and never ends the run. No torch."""

from __future__ import annotations

import contextlib
import io
import os
import sys

PIPE = "MIXTRAIN_PIPE"  # set by our own launcher: the descriptor of a pipe to it


class _Forgiving(io.FileIO):
    """A file that is written as far as it can be; the rest goes to `pipe`, if there is one and it takes it."""

    def __init__(self, descriptor: int, pipe: int | None):
        super().__init__(descriptor, "w", closefd=False)
        self.pipe = pipe

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise  # its reader has seen enough
        except OSError:
            if self.pipe is not None:
                with contextlib.suppress(OSError):
                    os.write(self.pipe, data)
            return len(data)


def forgive() -> None:
    """From now on no print of this process fails because a disk is full, or a terminal or a file system gone."""
    pipe = int(os.environ[PIPE]) if PIPE in os.environ else None
    if pipe is not None:
        os.set_inheritable(pipe, False)
    for name, spill in (("stdout", None), ("stderr", pipe)):
        stream = getattr(sys, name)
        raw = io.BufferedWriter(_Forgiving(stream.fileno(), spill))
        setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))
