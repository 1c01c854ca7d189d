"""Mends of Megatron-Core's own faults, on any device. (What is only for want of CUDA is in cpu.py.)

Rule: a mend says which version needs it and does nothing where it is not needed.
"""

from __future__ import annotations

import contextlib
from typing import Any


class _NoFP8:
    """Stands in for Transformer Engine's FP8GlobalStateManager where there is no Transformer Engine: never fp8."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def apply() -> None:
    """Mend the installed Megatron-Core, in this process."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    # 0.16: any MoE layer without Transformer Engine ends in NameError: te_general_gemm (router_gating_linear)
    _define(moe_utils, "te_general_gemm", None)
    # 0.16 and 0.19: selective recompute of layernorm and moe_act without Transformer Engine ends in NameError
    _define(random, "FP8GlobalStateManager", _NoFP8)
    _define(random, "activation_recompute_forward", lambda *_, **__: contextlib.nullcontext())
    _define(random, "fp8_autocast", lambda *_, **__: contextlib.nullcontext())


def _define(module: Any, name: str, value: Any) -> None:
    if not hasattr(module, name):
        setattr(module, name, value)
