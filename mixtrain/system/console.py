"""Rich's console, which would end the program with exit code 1 and no word when nobody reads it. No torch."""

from __future__ import annotations

import rich.console


class Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        # for system/closed_pipe.py; a run has streams that do not break (system/streams.py)
        raise BrokenPipeError
