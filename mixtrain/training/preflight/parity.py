"""The shrunk recipe at the run's own layout, on its hardware, against one CPU rank: two steps, every gradient.

Rule: this is the parity certificate's measurement, in the groups that the run will use; what it leaves behind in
Megatron-Core is taken away again.
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
from mixtrain.config.schema import to_yaml
from mixtrain.engine.moe_metrics import forget_model
from mixtrain.engine.process_groups import Ranks, seed_everything
from mixtrain.errors import Fault
from mixtrain.system import untrusted_json
from mixtrain.training import measured_step
from mixtrain.training.compare_steps import Verdict, judge
from mixtrain.training.preflight.node_info import ROOT, source_digest, versions
from mixtrain.training.preflight.shrink import Shrunk

PATIENCE_S = 180
STARTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Reference:
    """The CPU's result, made by a process beside this one while the ranks do something else, and kept in `folder`."""

    def __init__(self, plan: Plan, folder: Path):
        text = to_yaml(plan.config)
        key = hashlib.sha256(json.dumps([text, source_digest(), versions()]).encode()).hexdigest()[
            :16
        ]
        self.out = folder / f"reference_{key}"
        self.process = None
        if self.out.with_suffix(".json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        config = self.out.with_suffix(".yaml")
        config.write_text(text)
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in STARTED and "SLURM" not in name
        }
        with open(self.out.with_suffix(".log"), "w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "mixtrain.training.preflight.reference",
                    str(config),
                    str(self.out),
                ],
                env=kept
                | {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def wait(self) -> str | None:
        """Until it is there; what went wrong, or None."""
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
        """Leave no process behind."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def differences(plan: Plan, plans: Shrunk, here: Ranks, out: Path) -> dict:
    """What this rank's parts differ by from the CPU's in `out`. Every rank must call."""
    seen_within(out.with_suffix(".json"))
    figures = figures_in(out)
    wholes = torch.load(out.with_suffix(".pt"), mmap=True, weights_only=True)
    seeded = replace(plans.here, config=replace(plans.here.config, seed=figures["seed"]))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers have TF32 on
    try:
        return measured_step.differences(seeded, here, wholes)
    finally:
        torch.set_float32_matmul_precision(precision)
        take_away(plan)


def verdict(plans: Shrunk, out: Path, results: list[dict]) -> tuple[Verdict, dict]:
    """(the verdict on what all ranks found, the CPU's figures)."""
    figures = figures_in(out)
    return judge(figures, results, tensor_schema.shapes(plans.here.config)), figures


def figures_in(out: Path) -> dict:
    return untrusted_json.read(out.with_suffix(".json"))


def first_outside(found: Verdict, nodes: list[str]) -> str:
    """What is outside first, with its node: a gradient, as that of an expert is a rank's own; a norm is everybody's."""
    words = next(
        (line for line in found.outside if line.startswith("gradient of")), found.outside[0]
    )
    return re.sub(
        r"on rank (\d+)", lambda found: f"on rank {found[1]}, node {nodes[int(found[1])]},", words
    )


def seen_within(path: Path, seconds: float = 20) -> None:
    """Wait for a file that another node has written. A Fault if it does not show."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise Fault(f"{path}, which the first rank has written, is not seen here")
        os.listdir(path.parent)  # has a network file system look again
        time.sleep(0.1)


def take_away(plan: Plan) -> None:
    """What the small model leaves in Megatron-Core, in the random generators and on the device."""
    forget_model()
    seed_everything(plan)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
