"""Rich's console without its handling of a closed pipe, a silent exit with code 1. No torch."""

from __future__ import annotations

import rich.console


class Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        # system/closed_pipe.py handles it; the streams of a run never raise it (system/streams.py)
        raise BrokenPipeError
