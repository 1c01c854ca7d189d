"""Benchmark several implementations on the same work: they take turns, each in its own processes.

    # print the table, and write runs/bench/cpu_small.csv
    python tools/bench.py scenario=cpu_small
    # a part of a scenario, with fewer rounds
    python tools/bench.py scenario=cpu_small rounds=3 rows=[step_fp32] variants=[torch,local] \\
        csv=FILE
    # choose the disk to measure
    python tools/bench.py scenario=conversion folder=/data
    # run a GPU scenario to its end on this CPU, at tiny sizes
    python tools/bench.py scenario=mixtral_slice_1gpu +shrink=laptop
    # print the table of earlier readings
    python tools/bench.py show benchmarks/cpu_small.csv

Scenarios are conf/bench/*.yaml: rows of variants that are compared, given by overrides of train.py.
Other overrides of train.py on the command line apply to every variant. docs/benchmarks.md describes
what is measured and how.

Exit codes: 0 measured; 1 an internal error, or variants that do not compute the same; 2 wrong
arguments or an unsuitable machine; 130 interrupted.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# runs from a checkout, without installation
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import run as run_tool  # noqa: E402
from mixtrain.errors import FINISHED, UserError  # noqa: E402
from mixtrain.proof.bench import readings, report, run, scenario  # noqa: E402
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
        report.show(*readings.read(Path(argv[1])))
        return FINISHED
    request = scenario.parse(argv)
    rows, left_out = variants_of(request)
    if not rows:
        raise UserError(f"nothing to measure: {'; '.join(left_out) or 'no row is chosen'}")
    return measure(request, rows, left_out)


def measure(
    request: scenario.BenchRequest, rows: dict[str, list[Variant]], left_out: list[str]
) -> int:
    """Take the readings of every row; write all readings so far to the file after each round."""
    for line in left_out:
        say(f"left out: {line}")
    info = {"scenario": describe(request), **readings.machine_info()}
    if left_out:
        info["left out"] = "; ".join(left_out)
    path = Path(request.csv or RESULTS / f"{request.name}.csv")
    taken = []
    with working_folder(path, Path(request.folder or RESULTS)) as folder:
        for name, variants in rows.items():
            row = request.scenario.rows[name]
            rounds = request.scenario.rounds
            new_readings = run.readings_of(
                name, row, variants, request.scenario, folder / name, say
            )
            # closes the generator, and with it the processes, before the folder is removed
            with contextlib.closing(new_readings):
                for number, latest in enumerate(new_readings):
                    taken.append(latest)
                    if number % len(variants) == len(variants) - 1:
                        say(
                            f"{name}: round {latest.round} of {rounds}, other processes kept"
                            f" {latest.others:.1f} CPUs busy"
                        )
                        readings.write(path, info, taken)
    report.show(info, taken)
    print(f"\n{path}")
    return FINISHED


@contextlib.contextmanager
def working_folder(path: Path, folder: Path) -> Iterator[Path]:
    """Create a temporary folder in `folder` for files written while measuring.

    Raises UserError if it, or `path`, cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix="working-", dir=folder)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    with temporary as name:
        yield Path(name).resolve()


def describe(request: scenario.BenchRequest) -> str:
    return " ".join([request.name, *request.changes, *request.overrides])


if __name__ == "__main__":
    os.environ.pop("RANK", None)  # the variants start their own ranks
    sys.exit(run_tool(main, sys.argv[1:]))
