"""How fast, against whom: the same work by several implementations, in turn, each in processes of
its own.

    python tools/bench.py scenario=cpu_small                        the table, and
      runs/bench/cpu_small.csv
    python tools/bench.py scenario=cpu_small rounds=3 rows=[step_fp32] variants=[torch,local]
      csv=FILE
    python tools/bench.py scenario=conversion folder=/data         the disk to measure
    python tools/bench.py scenario=mixtral_slice_1gpu +shrink=laptop   a GPU's scenario to its end,
      tiny, on this CPU
    python tools/bench.py show benchmarks/cpu_small.csv             the table of readings taken
      before

Scenarios are conf/bench/*.yaml: rows of variants that are compared, in words of train.py. Other
words of train.py on the command line go to every variant. docs/benchmarks.md says what is measured
and how.

Exit codes: 0 measured, 1 a fault, or variants that do not compute the same, 2 the arguments or the
machine are wrong, 130 interrupted.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# run from a checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import run as run_tool  # noqa: E402
from mixtrain.errors import FINISHED, UserError  # noqa: E402
from mixtrain.proof.bench import machine, reading, report, run, scenario  # noqa: E402
from mixtrain.proof.bench.variants import Variant, variants_of  # noqa: E402

RESULTS = Path("runs/bench")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nscenarios: {', '.join(scenario.names())}")
        return FINISHED
    if argv[0] == "show":
        if len(argv) != 2:
            raise UserError(
                "show takes one file: python tools/bench.py show benchmarks/cpu_small.csv"
            )
        report.show(*reading.read(Path(argv[1])))
        return FINISHED
    request = scenario.parse(argv)
    rows, left_out = variants_of(request)
    if not rows:
        raise UserError(f"nothing to measure: {'; '.join(left_out) or 'no row is chosen'}")
    return measure(request, rows, left_out)


def measure(request: scenario.Request, rows: dict[str, list[Variant]], left_out: list[str]) -> int:
    """Take every row's readings; what there is by then is in the file after each round."""
    for line in left_out:
        say(f"left out: {line}")
    facts = {"scenario": described(request), **machine.facts()} | (
        {"left out": "; ".join(left_out)} if left_out else {}
    )
    path = Path(request.csv or RESULTS / f"{request.name}.csv")
    taken = []
    with working(path, Path(request.folder or RESULTS)) as folder:
        for name, variants in rows.items():
            row = request.scenario.rows[name]
            rounds = request.scenario.rounds
            # closed before `folder` goes, whatever happens
            with contextlib.closing(
                run.readings_of(name, row, variants, request.scenario, folder / name, say)
            ) as made:
                for number, one in enumerate(made):
                    taken.append(one)
                    if number % len(variants) == len(variants) - 1:
                        say(
                            f"{name}: round {one.round} of {rounds}, others kept {one.others:.1f}"
                            " CPUs busy"
                        )
                        reading.write(path, facts, taken)
    report.show(facts, taken)
    print(f"\n{path}")
    return FINISHED


@contextlib.contextmanager
def working(path: Path, folder: Path) -> Iterator[Path]:
    """A folder for what is written while measuring, in `folder`.

    UserError where it, or `path`, cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="working-", dir=folder)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    with made as name:
        yield Path(name).resolve()


def described(request: scenario.Request) -> str:
    return " ".join([request.name, *request.changes, *request.words])


if __name__ == "__main__":
    os.environ.pop("RANK", None)  # its variants start their own ranks
    sys.exit(run_tool(main, sys.argv[1:]))
