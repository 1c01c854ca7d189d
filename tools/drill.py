"""Run the fault drill: break real training runs in every known way, and resume them.

    python tools/drill.py                             every scenario, with 20 random SIGKILLs
    python tools/drill.py sigterm flipped_byte        only these (--list shows the names)

For each scenario, prints what was expected, what was seen, and the maximum number of steps that had
to be repeated: never more than since the last save. Exit codes: 0 all as expected, 1 one was not,
2 an unknown scenario.
"""

import argparse
import os
import sys
import time
from pathlib import Path

# runs from a checkout, without installation
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import run  # noqa: E402
from mixtrain.errors import FAULT, FINISHED, REFUSED, print_problems  # noqa: E402
from mixtrain.proof.drill import arena, scenarios  # noqa: E402
from mixtrain.system import scratch  # noqa: E402


def main(arguments: list[str]) -> int:
    names = {scenario.__name__: scenario for scenario in scenarios.SCENARIOS}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", nargs="*")
    parser.add_argument("--list", action="store_true", help="show the scenarios")
    parser.add_argument(
        "--kills", type=int, default=arena.KILLS, help="number of kills in sigkill_at_random"
    )
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="seed of the random moments"
    )
    parser.add_argument(
        "--folder", help="folder to work in; it is not removed (default: a temporary folder)"
    )
    args = parser.parse_args(arguments)
    if args.list:
        for name, scenario in names.items():
            print(f"{name:<20} {scenario.__doc__}")
        return FINISHED
    if unknown := [name for name in args.scenario if name not in names]:
        print_problems([f"{name} is not a scenario; --list shows them" for name in unknown])
        return REFUSED
    with scratch.folder("drill-") as temporary:
        selected = [names[name] for name in args.scenario or names]
        return drill(selected, Path(args.folder or temporary), args.seed, args.kills)


def drill(selected: list, folder: Path, seed: int, kills: int) -> int:
    """Run the scenarios one after the other; return the exit code."""
    print(f"seed {seed}; training the undisturbed run ...", flush=True)
    reference = arena.reference(folder / "reference")
    failed = []
    for scenario in selected:
        started = time.monotonic()
        place = arena.Arena(folder / scenario.__name__, reference, seed, kills)
        try:
            outcome = scenario(place)
        except Exception as error:
            outcome = arena.Outcome(False, f"{type(error).__name__}: {error}")
        if not outcome.ok:
            failed.append(scenario.__name__)
        lost = "" if outcome.lost is None else f"   steps lost: {outcome.lost}"
        seconds = time.monotonic() - started
        print(f"{'pass' if outcome.ok else 'FAIL'}  {scenario.__name__} ({seconds:.0f} s){lost}")
        print(f"      expected  {scenario.__doc__}\n      seen      {outcome.message}", flush=True)
    not_as_expected = f"; not: {', '.join(failed)}" if failed else ""
    passed = len(selected) - len(failed)
    print(f"{passed} of {len(selected)} as expected{not_as_expected}")
    return FAULT if failed else FINISHED


if __name__ == "__main__":
    os.environ.pop("RANK", None)  # the runs start their own ranks
    sys.exit(run(main, sys.argv[1:]))
