"""How a certificate reads: a line a layout in the terminal, a table by what is split in Markdown. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mixtrain.proof.parity.layouts import Layout
from mixtrain.training.compare_steps import TOLERANCES, Verdict

NAMES = 44  # columns for a layout's name
HEADER = f"{'layout':<{NAMES}} ranks " + " ".join(f"{kind:>9}" for kind in TOLERANCES)


def line(layout: Layout, verdict: Verdict) -> str:
    """A layout's largest differences under HEADER."""
    return f"{layout!s:<{NAMES}} {layout.ranks:>5} " + " ".join(
        f"{verdict.differences[kind]:>9.0e}" for kind in TOLERANCES
    )


def markdown(title: str, facts: Iterable[tuple[str, str]], verdicts: dict[Layout, Verdict]) -> str:
    """The certificate as a page: facts, then the largest differences for each set of axes that are split."""
    lines = [f"# {title}", "", *[f"* {name}: {value}" for name, value in facts], ""]
    lines += [
        "| split | layouts | " + " | ".join(TOLERANCES) + " |",
        "|---|---|" + "---|" * len(TOLERANCES),
    ]
    lines += [f"| limit | | {' | '.join(f'{limit:.0e}' for limit in TOLERANCES.values())} |"]
    lines += list(_rows(verdicts))
    outside = [
        f"* OUTSIDE at {layout}: {verdict}"
        for layout, verdict in verdicts.items()
        if verdict.outside
    ]
    lines += ["", *outside] if outside else []
    return "\n".join(lines) + "\n"


def _rows(verdicts: dict[Layout, Verdict]) -> Iterator[str]:
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for layout, verdict in verdicts.items():
        groups.setdefault(layout.axes, []).append(verdict)
    for axes, members in sorted(groups.items(), key=lambda group: (len(group[0]), group[0])):
        worst = [max(member.differences[kind] for member in members) for kind in TOLERANCES]
        yield (
            f"| {', '.join(axes) or 'nothing'} | {len(members)} |"
            f" {' | '.join(f'{value:.1e}' for value in worst)} |"
        )
