"""Compute the CPU's result of the shrunk recipe on one rank, as a command.

    python -m mixtrain.training.preflight.reference CONFIG.yaml OUT

Rule: runs in its own process. It patches Megatron-Core for the CPU (engine/compat/cpu.py), which a
rank with a GPU must not do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

from mixtrain.config.choices import Accelerator
from mixtrain.config.planner import make_plan
from mixtrain.config.typed_config import from_hydra
from mixtrain.system import scratch
from mixtrain.system.rank_identity import Identity


def main(config: Path, out: Path) -> None:
    """Write OUT.pt (full gradients and parameters), then OUT.json (the figures)."""
    plan = make_plan(from_hydra(OmegaConf.load(config)))
    from mixtrain.engine.compat.prepare import prepare  # imports torch

    prepare(Accelerator.cpu)
    from mixtrain.training import measured_step

    with scratch.folder() as folder:
        alone = Identity(0, 1, 0, 1, f"file://{folder}/rendezvous")
        figures = measured_step.reference(plan, alone, out.with_suffix(".pt"))
    temporary = out.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(figures))
    temporary.replace(out.with_suffix(".json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
