"""The one exception for what a user can cause, and how it reads on a terminal.

Everything a user can get wrong is raised as a UserError with every problem found, ends in exit code
2, and never shows a traceback. Any other exception is a fault of ours or of the machine: exit code
1.
"""

import sys

from mixtrain.characters import escaped

SHOWN = 2000  # characters of a problem: a value that it quotes may be a whole file
# the exit codes of every command of the project
FINISHED = 0
FAULT = 1
REFUSED = 2


class UserError(Exception):
    """What is wrong with a configuration or an input: one sentence per problem, most useful first.

    A problem names the key or file, both numbers and the nearest legal value.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class Fault(RuntimeError):
    """A fault that explains itself (a loss that is not a number, say): one line, no traceback, exit code 1."""


def print_problems(problems, node: str = "") -> None:
    """Print the problems as a user reads them, on `node` where there are several: a count, then one line each."""
    stream = sys.stderr
    count = len(problems)
    print(
        f"mixtrain: {count} problem{'s' if count != 1 else ''}{node and f' on node {node}'}:",
        file=stream,
    )
    for problem in problems:
        text = escaped(problem[:SHOWN], keep="\n\t") + " ..." * (len(problem) > SHOWN)
        print(f"  - {text}", file=stream)
    if stream is not None:  # closed by the shell (2>&-): print has taken standard output
        stream.flush()
