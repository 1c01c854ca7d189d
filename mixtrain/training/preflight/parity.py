"""Compare two steps of the shrunk recipe, at the run's layout, with those of one CPU rank.

Rule: it is the parity certificate's measurement in the process groups of the run, and it removes
everything that it leaves in Megatron-Core.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from mixtrain.config import tensor_schema
from mixtrain.config.plan import Plan
from mixtrain.config.typed_config import to_yaml
from mixtrain.engine.moe_metrics import forget_model
from mixtrain.engine.process_groups import Ranks, seed_everything
from mixtrain.errors import Fault
from mixtrain.system import untrusted_json
from mixtrain.training import measured_step
from mixtrain.training.compare_steps import Verdict, judge
from mixtrain.training.preflight.node_info import ROOT, SEEN_WITHIN_S, source_digest, versions
from mixtrain.training.preflight.shrink import ShrunkPlans

PATIENCE_S = 180
RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class Reference:
    """The CPU's result: computed by a child process in the background and cached in `folder`."""

    def __init__(self, plan: Plan, folder: Path):
        text = to_yaml(plan.config)
        key = json.dumps([text, source_digest(), versions()]).encode()
        self.out = folder / f"reference_{hashlib.sha256(key).hexdigest()[:16]}"
        self.process = None
        if self.out.with_suffix(".json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        config = self.out.with_suffix(".yaml")
        config.write_text(text)
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in RANK_VARIABLES and "SLURM" not in name
        }
        environment |= {
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": path,
        }
        module = "mixtrain.training.preflight.reference"
        with open(self.out.with_suffix(".log"), "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(config), str(self.out)],
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def wait(self) -> str | None:
        """Wait for the result; return what went wrong, or None."""
        if self.process is None:
            return None
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.end()
            return (
                f"the CPU's result took more than {PATIENCE_S} s; the log is"
                f" {self.out.with_suffix('.log')}"
            )
        lines = self.out.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        return f"the CPU's result failed: {lines[-1] if lines else code}" if code else None

    def end(self) -> None:
        """Kill the child process if it still runs."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def differences(plan: Plan, plans: ShrunkPlans, ranks: Ranks, out: Path) -> dict:
    """Return how this rank's shards differ from the CPU's result in `out`. Every rank must call."""
    wait_for_file(out.with_suffix(".json"))
    figures = figures_in(out)
    reference = torch.load(out.with_suffix(".pt"), mmap=True, weights_only=True)
    seeded = replace(plans.layout, config=replace(plans.layout.config, seed=figures["seed"]))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers enable TF32
    try:
        return measured_step.differences(seeded, ranks, reference)
    finally:
        torch.set_float32_matmul_precision(precision)
        clean_up(plan)


def verdict(plans: ShrunkPlans, out: Path, results: list[dict]) -> tuple[Verdict, dict]:
    """Return (the verdict on all ranks' differences, the CPU's figures)."""
    figures = figures_in(out)
    return judge(figures, results, tensor_schema.shapes(plans.layout.config)), figures


def figures_in(out: Path) -> dict:
    return untrusted_json.read(out.with_suffix(".json"))


def first_outside(comparison: Verdict, nodes: list[str]) -> str:
    """Return the first line outside the limits, with its node.

    A gradient if there is one: an expert's gradient points to a rank, a norm concerns all ranks.
    """
    gradients = (line for line in comparison.outside if line.startswith("gradient of"))
    return re.sub(
        r"on rank (\d+)",
        lambda match: f"on rank {match[1]}, node {nodes[int(match[1])]},",
        next(gradients, comparison.outside[0]),
    )


def wait_for_file(path: Path) -> None:
    """Wait for a file that another node wrote; Fault if it does not appear in SEEN_WITHIN_S."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise Fault(f"{path}, which the first rank wrote, is not visible on this node")
        os.listdir(path.parent)  # refreshes a network file system
        time.sleep(0.1)


def clean_up(plan: Plan) -> None:
    """Undo what the small model left in Megatron-Core, the random generators and GPU memory."""
    forget_model()
    seed_everything(plan)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
