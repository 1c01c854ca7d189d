"""Exceptions that print without a traceback, and the exit codes of every command.

User mistakes raise UserError with every problem found: exit code 2, no traceback. Any other
exception is a fault of the program or the machine: exit code 1.
"""

import sys
from collections.abc import Sequence

from mixtrain.characters import escaped

MAX_PRINTED = 2000  # characters of a problem: it may quote a value as long as a file
# exit codes
FINISHED = 0
FAULT = 1
REFUSED = 2


class UserError(Exception):
    """Problems of a configuration or an input: one sentence each, the most useful first.

    A problem names the key or file, both numbers and the nearest legal value.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class Fault(RuntimeError):
    """A fault that explains itself (such as a NaN loss): one line, no traceback, exit code 1."""


def print_problems(problems: Sequence[str], node: str = "") -> None:
    """Print a count and one line per problem to standard error; name `node` if it is given."""
    stream = sys.stderr
    plural = "" if len(problems) == 1 else "s"
    print(f"mixtrain: {len(problems)} problem{plural}{node and f' on node {node}'}:", file=stream)
    for problem in problems:
        cut = " ..." if len(problem) > MAX_PRINTED else ""
        print(f"  - {escaped(problem[:MAX_PRINTED], keep=chr(10) + chr(9))}{cut}", file=stream)
    if stream is not None:  # None: the shell closed it (2>&-) and print used standard output
        stream.flush()
