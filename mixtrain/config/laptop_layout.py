"""The nearest layout that a laptop's CPU can run. No torch."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

from mixtrain.config.plan import ranks_needed
from mixtrain.config.schema import Config

LAPTOP_RANKS = 8  # CPU ranks that one machine is asked to start
# what may shrink, by how much of the recipe's code path is lost with it: least lost first
SIZES = {
    "context_parallel_size": 1,
    "pipeline_model_parallel_size": 2,
    "tensor_model_parallel_size": 3,
    "expert_tensor_parallel_size": 4,
    "expert_model_parallel_size": 5,
}


def nearest_layout(config: Config) -> str:
    """The overrides that bring the layout to LAPTOP_RANKS: each size a divisor of the recipe's, none lost if it can be.

    A size that goes from above 1 to 1 loses a code path, so that counts first; then the fewest halvings.
    The number of ranks is among them: the configuration may have fixed it.
    """
    parallel = config.parallel
    sizes = {key: getattr(parallel, key) for key in SIZES}
    divisors = [
        [part for part in range(1, size + 1) if size % part == 0] for size in sizes.values()
    ]
    candidates = []
    for parts in product(*divisors):
        smaller = dict(zip(SIZES, parts, strict=True))
        ranks = ranks_needed(replace(config, parallel=replace(parallel, **smaller)))
        if ranks > LAPTOP_RANKS:
            continue
        lost = sum(SIZES[key] for key in SIZES if smaller[key] == 1 and sizes[key] > 1)
        halved = math.prod(sizes.values()) / math.prod(parts)
        candidates.append((lost, halved, [-part for part in parts], smaller, ranks))
    *_, best, ranks = min(candidates, key=lambda candidate: candidate[:3])
    changed = [f"parallel.{key}={best[key]}" for key in SIZES if best[key] != sizes[key]]
    if parallel.sequence_parallel and best["tensor_model_parallel_size"] == 1:
        changed.append("parallel.sequence_parallel=false")
    if parallel.virtual_pipeline_model_parallel_size and best["pipeline_model_parallel_size"] == 1:
        changed.append("parallel.virtual_pipeline_model_parallel_size=null")
    return " ".join([*changed, f"trainer.devices={ranks} trainer.num_nodes=1"])
