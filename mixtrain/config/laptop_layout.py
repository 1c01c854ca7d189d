"""Find the nearest layout that a laptop's CPU can run. No torch."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

from mixtrain.config.plan import ranks_needed
from mixtrain.config.schema import Config

LAPTOP_RANKS = 8  # the most CPU ranks on one machine
# sizes that may shrink -> cost of shrinking to 1, which loses a code path of the recipe
SIZES = {
    "context_parallel_size": 1,
    "pipeline_model_parallel_size": 2,
    "tensor_model_parallel_size": 3,
    "expert_tensor_parallel_size": 4,
    "expert_model_parallel_size": 5,
}


def nearest_layout(config: Config) -> str:
    """Return the overrides for a layout of at most LAPTOP_RANKS ranks, as one line.

    Each size is a divisor of the configured one. The best layout has the fewest sizes reduced to 1,
    by their cost, then the smallest total reduction. The overrides set the number of ranks, too,
    because the configuration may fix it.
    """
    parallel = config.parallel
    sizes = {key: getattr(parallel, key) for key in SIZES}
    divisors = [[n for n in range(1, size + 1) if size % n == 0] for size in sizes.values()]
    candidates = []
    for combination in product(*divisors):
        smaller = dict(zip(SIZES, combination, strict=True))
        ranks = ranks_needed(replace(config, parallel=replace(parallel, **smaller)))
        if ranks > LAPTOP_RANKS:
            continue
        lost = sum(SIZES[key] for key in SIZES if smaller[key] == 1 and sizes[key] > 1)
        reduction = math.prod(sizes.values()) / math.prod(combination)
        candidates.append((lost, reduction, [-size for size in combination], smaller, ranks))
    *_, best, ranks = min(candidates, key=lambda candidate: candidate[:3])
    changed = [f"parallel.{key}={best[key]}" for key in SIZES if best[key] != sizes[key]]
    if parallel.sequence_parallel and best["tensor_model_parallel_size"] == 1:
        changed.append("parallel.sequence_parallel=false")
    if parallel.virtual_pipeline_model_parallel_size and best["pipeline_model_parallel_size"] == 1:
        changed.append("parallel.virtual_pipeline_model_parallel_size=null")
    return " ".join([*changed, f"trainer.devices={ranks} trainer.num_nodes=1"])
