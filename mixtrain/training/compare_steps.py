"""What of a layout's run differs from the one-rank run, and by how much too much. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

# The largest difference that the order of additions explains in fp32. A sum of a few hundred terms
# in another order is off by some 1e-7; two layers and a step later that has become a few 1e-6. fmt:
# off
LIMITS = {
    "lm_loss": 1e-5,  # relative
    "balance": 1e-5,  # relative
    "grad_norm": 1e-5,  # relative
    "gradient": 1e-4,  # of the tensor's largest entry
    "parameter": 1e-5,  # absolute, after two steps
}
# fmt: on


@dataclass
class Verdict:
    """The largest difference of each kind, and all that is outside its limit.

    First the first step's figures and gradients, then what follows from them. Of tensors the order
    is the contract's, and layer by layer.
    """

    differences: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0.0))
    outside: list[str] = field(default_factory=list)
    # names of those whose gradient or value is outside
    tensors: list[str] = field(default_factory=list)

    def note(self, kind: str, difference: float, where: str) -> bool:
        """Remember a difference, `where` says of what; whether it is outside."""
        if math.isnan(difference):
            difference = math.inf
        self.differences[kind] = max(self.differences[kind], difference)
        if difference <= LIMITS[kind]:
            return False
        self.outside.append(f"{where} differs by {difference:.1e}, limit {LIMITS[kind]:.0e}")
        return True

    def __str__(self) -> str:
        """What is outside first, and the first tensor."""
        tensor = f"; the first tensor is {self.tensors[0]}" if self.tensors else ""
        return f"{self.outside[0]}{tensor}" if self.outside else "within the limits"


def judge(reference: dict, results: list[dict], shapes: dict[str, tuple[int, ...]]) -> Verdict:
    """The verdict on a layout's run: `results` are its ranks' (measure.measure), `shapes` the contract's."""
    verdict = Verdict()
    _compare_figures(verdict, reference, results, steps=slice(0, 1))
    order = {key: number for number, key in enumerate(shapes)}
    parts = [
        (order[part[0]], part[1] or 0, rank, part)
        for rank, result in enumerate(results)
        for part in result["parts"]
    ]
    parts.sort(key=lambda part: part[:3])
    for kind, column in (("gradient", 4), ("parameter", 5)):
        for _, layer, rank, part in parts:
            key = part[0]
            numbered = part[1] is not None
            difference = part[column]
            name = key.replace("layers.", f"layers.{layer}.") if numbered else key
            if kind == "gradient":
                difference /= reference["largest_gradients"][key][layer] or 1.0
            if verdict.note(kind, difference, f"{kind} of {name} on rank {rank}"):
                verdict.tensors.append(name)
    _compare_figures(verdict, reference, results, steps=slice(1, None))
    verdict.outside += _missing([part for *_, part in parts], shapes)
    return verdict


def _compare_figures(verdict: Verdict, reference: dict, results: list[dict], steps: slice) -> None:
    for step in range(len(reference["lm_loss"]))[steps]:
        for kind in ("lm_loss", "balance", "grad_norm"):
            for rank, result in enumerate(results):
                difference = _relative(result[kind][step], reference[kind][step])
                verdict.note(kind, difference, f"{kind} of step {step + 1} on rank {rank}")


def _relative(here: float | None, expected: float | None) -> float:
    if expected is None or here is None:
        return 0.0 if here == expected else math.inf
    return abs(here - expected) / max(abs(expected), 1e-30)


def _missing(parts: Iterable[list], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Tensors of which the ranks together do not hold every element."""
    held: dict[str, dict[str, int]] = {key: {} for key in shapes}
    for key, _, place, elements, _, _ in parts:
        held[key][place] = elements
    return [
        f"{key}: the ranks hold {sum(places.values())} of {math.prod(shapes[key])} elements"
        for key, places in held.items()
        if sum(places.values()) != math.prod(shapes[key])
    ]
