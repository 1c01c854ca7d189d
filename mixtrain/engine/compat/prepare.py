"""The patches that a process needs before it imports Megatron-Core's classes."""

from __future__ import annotations

from mixtrain.config.choices import Accelerator
from mixtrain.engine.compat import megatron_fixes


def prepare(accelerator: Accelerator) -> None:
    """Fix Megatron-Core, and patch it for the CPU if that is the accelerator; once per process.

    Call it before Megatron-Core's modules are imported: functions that they decorate on import
    keep what was there.
    """
    megatron_fixes.apply()
    if accelerator is Accelerator.cpu:
        from mixtrain.engine.compat import cpu  # a GPU run does not import it

        cpu.apply()
