"""What of a layout's run differs from the one-rank run, and by how much too much. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

# The largest difference that the order of additions explains in fp32. A sum of a few hundred terms in another order is
# off by some 1e-7; two layers and a step later that has become a few 1e-6.
# fmt: off
LIMITS = {
    "lm_loss":    1e-5,  # relative
    "balance":    1e-5,  # relative
    "grad_norm":  1e-5,  # relative
    "gradient":   1e-4,  # of the tensor's largest entry
    "parameter":  1e-5,  # absolute, after two steps
}
# fmt: on


@dataclass
class Verdict:
    """The largest difference of each kind, and what is outside its limit, first the first in the model's order."""

    differences: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0.0))
    outside: list[str] = field(default_factory=list)

    def note(self, kind: str, difference: float, where: str) -> None:
        """Remember a difference; `where` says what of the run has it."""
        if math.isnan(difference):
            difference = math.inf
        self.differences[kind] = max(self.differences[kind], difference)
        if difference > LIMITS[kind]:
            self.outside.append(f"{where} differs by {difference:.1e}, limit {LIMITS[kind]:.0e}")


def judge(reference: dict, results: list[dict], shapes: dict[str, tuple[int, ...]]) -> Verdict:
    """The verdict on a layout's run: `results` are its ranks' (measure.measure), `shapes` the contract's."""
    verdict = Verdict()
    for kind in ("lm_loss", "balance", "grad_norm"):
        for step, expected in enumerate(reference[kind], start=1):
            for rank, result in enumerate(results):
                verdict.note(kind, _relative(result[kind][step - 1], expected), f"{kind} of step {step} on rank {rank}")
    order = {key: number for number, key in enumerate(shapes)}
    lines = [
        (order[line[0]], line[1] or 0, rank, line) for rank, result in enumerate(results) for line in result["parts"]
    ]
    for _, layer, rank, (key, numbered, _, _, gradient, parameter) in sorted(lines, key=lambda line: line[:3]):
        name = key if numbered is None else key.replace("layers.", f"layers.{layer}.")
        entry = reference["largest_gradients"][key][layer]
        verdict.note("gradient", gradient / entry if entry else gradient, f"gradient of {name} on rank {rank}")
        verdict.note("parameter", parameter, f"parameter {name} on rank {rank}, after two steps,")
    verdict.outside += _missing(lines, shapes)
    return verdict


def _relative(here: float | None, expected: float | None) -> float:
    if expected is None or here is None:
        return 0.0 if here == expected else math.inf
    return abs(here - expected) / max(abs(expected), 1e-30)


def _missing(lines: Iterable[tuple], shapes: dict[str, tuple]) -> list[str]:
    """Tensors of which the ranks together do not hold every element."""
    held: dict[str, dict[str, int]] = {key: {} for key in shapes}
    for *_, (key, _, part, elements, _, _) in lines:
        held[key][part] = elements
    return [
        f"{key}: the ranks hold {sum(parts.values())} of {math.prod(shapes[key])} elements"
        for key, parts in held.items()
        if sum(parts.values()) != math.prod(shapes[key])
    ]
