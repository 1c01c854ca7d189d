"""The fault drill: real training runs, broken in every way that is known to break them, and
resumed.

    python tools/drill.py                             every scenario, 20 random SIGKILLs included
    python tools/drill.py sigterm flipped_byte        only these (--list shows the names)

Prints, for each scenario, what was expected, what was seen, and how many steps had to be done again
at the most: never more than there were since the last save. Exit codes: 0 all as expected, 1 one
was not, 2 there is no such scenario.
"""

import argparse
import os
import sys
import time
from pathlib import Path

# run from a checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import run  # noqa: E402
from mixtrain.errors import FAULT, FINISHED, REFUSED, print_problems  # noqa: E402
from mixtrain.proof.drill import scenarios  # noqa: E402
from mixtrain.system import scratch  # noqa: E402


def main(arguments: list[str]) -> int:
    names = {scenario.__name__: scenario for scenario in scenarios.SCENARIOS}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", nargs="*")
    parser.add_argument("--list", action="store_true", help="show the scenarios")
    parser.add_argument("--kills", type=int, default=scenarios.KILLS, help="of sigkill_at_random")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random moments")
    parser.add_argument(
        "--folder", help="work there, and leave everything; else a temporary folder"
    )
    given = parser.parse_args(arguments)
    if given.list:
        for name, scenario in names.items():
            print(f"{name:<20} {scenario.__doc__}")
        return FINISHED
    if unknown := [name for name in given.scenario if name not in names]:
        print_problems([f"{name} is not a scenario; --list shows them" for name in unknown])
        return REFUSED
    with scratch.folder("drill-") as temporary:
        return drill(
            [names[name] for name in given.scenario or names],
            Path(given.folder or temporary),
            given,
        )


def drill(chosen: list, folder: Path, given: argparse.Namespace) -> int:
    """Run the scenarios one after the other."""
    print(f"seed {given.seed}; training the run that nothing happens to ...", flush=True)
    reference = scenarios.reference(folder / "reference")
    failed = []
    for scenario in chosen:
        started = time.monotonic()
        arena = scenarios.Arena(folder / scenario.__name__, reference, given.seed, given.kills)
        try:
            seen = scenario(arena)
        except Exception as error:
            seen = scenarios.Seen(False, f"{type(error).__name__}: {error}")
        if not seen.ok:
            failed.append(scenario.__name__)
        lost = "" if seen.lost is None else f"   steps lost: {seen.lost}"
        seconds = time.monotonic() - started
        print(f"{'pass' if seen.ok else 'FAIL'}  {scenario.__name__} ({seconds:.0f} s){lost}")
        print(f"      expected  {scenario.__doc__}\n      seen      {seen.words}", flush=True)
    rest = f"; not: {', '.join(failed)}" if failed else ""
    print(f"{len(chosen) - len(failed)} of {len(chosen)} as expected{rest}")
    return FAULT if failed else FINISHED


if __name__ == "__main__":
    os.environ.pop("RANK", None)  # its runs start their own ranks
    sys.exit(run(main, sys.argv[1:]))
