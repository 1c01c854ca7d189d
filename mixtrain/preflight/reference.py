"""The CPU's result of the shrunk recipe on one rank: `python -m mixtrain.preflight.reference CONFIG.yaml OUT`.

Rule: a process of its own. It has Megatron-Core made to run on the CPU, which a rank with a GPU must not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

from mixtrain import scratch
from mixtrain.config import Config
from mixtrain.environment import Identity
from mixtrain.plan import make_plan


def main(config: Path, out: Path) -> None:
    """Write OUT.pt (gradients and parameters, whole) and then OUT.json (the figures)."""
    plan = make_plan(Config.from_hydra(OmegaConf.load(config)))
    from mixtrain import cpu, upstream  # the first import of torch

    upstream.apply()
    cpu.apply()
    from mixtrain.parity import measure

    with scratch.folder() as folder:
        alone = Identity(0, 1, 0, 1, f"file://{folder}/rendezvous")
        figures = measure.reference(plan, alone, out.with_suffix(".pt"))
    temporary = out.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(figures))
    temporary.replace(out.with_suffix(".json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
