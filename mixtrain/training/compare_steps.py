"""Compare the measured steps of a layout with those of one rank, against tolerances. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

# The largest differences that the order of additions explains in fp32: a sum of a few hundred terms
# in another order differs by about 1e-7, which two layers and a step turn into a few 1e-6.
# fmt: off
TOLERANCES = {
    "lm_loss": 1e-5,  # relative
    "balance": 1e-5,  # relative
    "grad_norm": 1e-5,  # relative
    "gradient": 1e-4,  # of the tensor's largest entry
    "parameter": 1e-5,  # absolute, after two steps
}
# fmt: on


@dataclass
class Verdict:
    """The largest difference of each kind, and everything outside the tolerances.

    The first step's figures and gradients come first, then what follows from them. Tensors are in
    the order of config/tensor_schema.py and then by layer.
    """

    differences: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TOLERANCES, 0.0))
    outside: list[str] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)  # whose gradient or value is outside

    def note(self, kind: str, difference: float, where: str) -> bool:
        """Record a difference of what `where` names; return whether it is outside."""
        if math.isnan(difference):
            difference = math.inf
        self.differences[kind] = max(self.differences[kind], difference)
        if difference <= TOLERANCES[kind]:
            return False
        self.outside.append(f"{where} differs by {difference:.1e}, limit {TOLERANCES[kind]:.0e}")
        return True

    def __str__(self) -> str:
        """Return the first line outside the limits and the first tensor."""
        tensor = f"; the first tensor is {self.tensors[0]}" if self.tensors else ""
        return f"{self.outside[0]}{tensor}" if self.outside else "within the limits"


def judge(reference: dict, results: list[dict], shapes: dict[str, tuple[int, ...]]) -> Verdict:
    """Return the verdict on a layout.

    `reference`, `results`: what measured_step.reference and measured_step.differences (of every
    rank) returned. `shapes`: the full shapes of config/tensor_schema.py.
    """
    verdict = Verdict()
    _compare_figures(verdict, reference, results, steps=slice(0, 1))
    order = {key: number for number, key in enumerate(shapes)}
    rows = [
        (order[row[0]], row[1] or 0, rank, row)
        for rank, result in enumerate(results)
        for row in result["parts"]
    ]
    rows.sort(key=lambda row: row[:3])
    for kind, column in (("gradient", 4), ("parameter", 5)):
        for _, layer, rank, row in rows:
            key = row[0]
            has_layer = row[1] is not None
            difference = row[column]
            name = key.replace("layers.", f"layers.{layer}.") if has_layer else key
            if kind == "gradient":
                difference /= reference["largest_gradients"][key][layer] or 1.0
            if verdict.note(kind, difference, f"{kind} of {name} on rank {rank}"):
                verdict.tensors.append(name)
    _compare_figures(verdict, reference, results, steps=slice(1, None))
    verdict.outside += _missing([row for *_, row in rows], shapes)
    return verdict


def _compare_figures(verdict: Verdict, reference: dict, results: list[dict], steps: slice) -> None:
    for step in range(len(reference["lm_loss"]))[steps]:
        for kind in ("lm_loss", "balance", "grad_norm"):
            for rank, result in enumerate(results):
                difference = _relative(result[kind][step], reference[kind][step])
                verdict.note(kind, difference, f"{kind} of step {step + 1} on rank {rank}")


def _relative(value: float | None, expected: float | None) -> float:
    if expected is None or value is None:
        return 0.0 if value == expected else math.inf
    return abs(value - expected) / max(abs(expected), 1e-30)


def _missing(rows: Iterable[list], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Return a line for each tensor of which the ranks together do not hold every element."""
    elements: dict[str, dict[str, int]] = {key: {} for key in shapes}
    for key, _, shard, count, _, _ in rows:
        elements[key][shard] = count
    held = {key: sum(counts.values()) for key, counts in elements.items()}
    return [
        f"{key}: the ranks hold {held[key]} of {math.prod(shape)} elements"
        for key, shape in shapes.items()
        if held[key] != math.prod(shape)
    ]
