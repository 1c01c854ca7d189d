"""Fixes of Megatron-Core's own faults, on any device.

Patches for missing CUDA are in engine/compat/cpu.py.

Rule: each fix names the versions that need it and does nothing on others.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any


class _NoFP8:
    """Replaces Transformer Engine's FP8GlobalStateManager if that package is missing: never fp8."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def apply() -> None:
    """Fix the installed Megatron-Core in this process and silence warnings that do not apply."""
    # on import each module warns that Apex and Transformer Engine are missing; the plan page lists
    # what is used
    warnings.filterwarnings("ignore", message=".*not installed. Falling back")
    # torch 2.13 renames collectives that Megatron-Core calls in every step
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    # about Megatron-Core's own shards, in every save
    warnings.filterwarnings("ignore", message="Please use DTensor")
    # about the distributed optimizer's shards, which are views of the parameters, in every step
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # about CUDA graphs, which are not used
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter

    # 0.16: an MoE layer without Transformer Engine raises NameError: te_general_gemm
    # (router_gating_linear)
    _define(moe_utils, "te_general_gemm", None)
    # 0.16 and 0.19: selective recompute of layernorm and moe_act without Transformer Engine raises
    # NameError
    _define(random, "FP8GlobalStateManager", _NoFP8)
    _define(random, "activation_recompute_forward", lambda *_, **__: contextlib.nullcontext())
    _define(random, "fp8_autocast", lambda *_, **__: contextlib.nullcontext())
    # 0.19: the same recompute compiles a C++ extension in the first backward pass, which needs
    # ninja and a compiler
    if hasattr(random, "_get_share_storage"):
        random._get_share_storage = lambda: _copy_storage
    # 0.16 and 0.19: the gradient of global_aux_loss is divided by the data-parallel size
    if "dp_size" not in TopKRouter._apply_global_aux_loss.__code__.co_varnames:
        _make_global_aux_loss_whole(TopKRouter)


def _copy_storage(output: Any, recomputed: Any) -> None:
    """Copy a recomputed output into the discarded output's storage, as 0.16 does."""
    storage = recomputed.untyped_storage()
    output.untyped_storage().resize_(storage.size())
    output.untyped_storage().copy_(storage)


def _make_global_aux_loss_whole(router_class: type) -> None:
    """Multiply global_aux_loss by the data-parallel size before it is attached.

    A data-parallel rank computes its own tokens' share of that loss, and gradients are averaged
    over ranks: the mean of the shares is the loss divided by the number of ranks. Megatron-LM's
    pull request 3769 multiplies by it too.
    """
    attach = router_class.attach_and_log_load_balancing_loss
    if hasattr(attach, "__wrapped__"):
        return

    @functools.wraps(attach)
    def attach_whole(
        router: Any, probs: Any, coeff: float, loss: Any, name: str, *args: Any, **kwargs: Any
    ) -> Any:
        if name == "global_load_balancing_loss":
            ranks = router.tp_dp_cp_group.size() // router.tp_cp_group.size()
            # upstream logs loss / coeff, which stays the same
            coeff = coeff * ranks
            loss = loss * ranks
        return attach(router, probs, coeff, loss, name, *args, **kwargs)

    router_class.attach_and_log_load_balancing_loss = attach_whole


def mark_tensor_parallel(model: Any) -> None:
    """Mark the weights that tensor ranks split: the gradient norm must not take them for copies.

    0.16 marks them only if it draws them itself. Without the mark the norm, and so clipping, counts
    only the first tensor rank.
    """
    from megatron.core.tensor_parallel import layers

    axes = {
        layers.VocabParallelEmbedding: 0,
        layers.ColumnParallelLinear: 0,
        layers.RowParallelLinear: 1,
    }
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) not in axes or weight is None:
            continue
        if not hasattr(weight, "tensor_model_parallel"):
            layers.set_tensor_model_parallel_attributes(weight, True, axes[type(module)], 1)


def _define(module: Any, name: str, value: Any) -> None:
    if not hasattr(module, name):
        setattr(module, name, value)
