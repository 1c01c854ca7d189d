"""Formats a certificate: a terminal line per layout, a Markdown table per set of axes. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mixtrain.proof.parity.layouts import ParityLayout
from mixtrain.training.compare_steps import TOLERANCES, Verdict

NAME_WIDTH = 44  # columns for a layout's name
HEADER = f"{'layout':<{NAME_WIDTH}} ranks " + " ".join(f"{kind:>9}" for kind in TOLERANCES)


def line(layout: ParityLayout, verdict: Verdict) -> str:
    """Return the line of a layout's largest differences, under HEADER."""
    differences = " ".join(f"{verdict.differences[kind]:>9.0e}" for kind in TOLERANCES)
    return f"{layout!s:<{NAME_WIDTH}} {layout.ranks:>5} {differences}"


def markdown(
    title: str, info: Iterable[tuple[str, str]], verdicts: dict[ParityLayout, Verdict]
) -> str:
    """Return the certificate as a page: info, then the largest differences per set of axes."""
    lines = [f"# {title}", "", *[f"* {name}: {value}" for name, value in info], ""]
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


def _rows(verdicts: dict[ParityLayout, Verdict]) -> Iterator[str]:
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for layout, verdict in verdicts.items():
        groups.setdefault(layout.axes, []).append(verdict)
    for axes, members in sorted(groups.items(), key=lambda group: (len(group[0]), group[0])):
        worst = [max(member.differences[kind] for member in members) for kind in TOLERANCES]
        yield (
            f"| {', '.join(axes) or 'nothing'} | {len(members)} |"
            f" {' | '.join(f'{value:.1e}' for value in worst)} |"
        )
