"""Mends of Megatron-Core's own faults, on any device. (What is only for want of CUDA is in engine/compat/cpu.py.)

Rule: a mend says which version needs it and does nothing where it is not needed.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any


class _NoFP8:
    """Stands in for Transformer Engine's FP8GlobalStateManager where there is no Transformer Engine: never fp8."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def apply() -> None:
    """Mend the installed Megatron-Core, in this process, and let it import in silence."""
    # on import Megatron-Core says once a module that Apex and Transformer Engine are absent: the
    # plan says what is used
    warnings.filterwarnings("ignore", message=".*not installed. Falling back")
    # torch 2.13 renames collectives that Megatron-Core calls in every step
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    # of its own shards, in every save
    warnings.filterwarnings("ignore", message="Please use DTensor")
    # of the distributed optimizer's shards, views of the model's parameters, in every step
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # of CUDA graphs, which nobody asked for
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter

    # 0.16: any MoE layer without Transformer Engine ends in NameError: te_general_gemm (router_gating_linear)
    _define(moe_utils, "te_general_gemm", None)
    # 0.16 and 0.19: selective recompute of layernorm and moe_act without Transformer Engine ends in NameError
    _define(random, "FP8GlobalStateManager", _NoFP8)
    _define(random, "activation_recompute_forward", lambda *_, **__: contextlib.nullcontext())
    _define(random, "fp8_autocast", lambda *_, **__: contextlib.nullcontext())
    # 0.19: the same recompute compiles a C++ extension in the first backward pass: it wants ninja and a compiler
    if hasattr(random, "_get_share_storage"):
        random._get_share_storage = lambda: _copy_storage
    # 0.16 and 0.19: the gradient of global_aux_loss is divided by the data-parallel size
    if "dp_size" not in TopKRouter._apply_global_aux_loss.__code__.co_varnames:
        _make_global_aux_loss_whole(TopKRouter)


def _copy_storage(output: Any, recomputed: Any) -> None:
    """Give a discarded output its numbers again, in its own storage, where all its views see them; 0.16's way."""
    storage = recomputed.untyped_storage()
    output.untyped_storage().resize_(storage.size())
    output.untyped_storage().copy_(storage)


def _make_global_aux_loss_whole(router_class: type) -> None:
    """Have global_aux_loss attached as what data parallelism averages.

    A data-parallel rank computes its own tokens' part of that loss, and the ranks' gradients are
    averaged: the mean of the parts is the whole divided by the number of ranks. Megatron-LM's pull
    request 3769 multiplies by it, too.
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
            # what is logged is the one divided by the other
            coeff = coeff * ranks
            loss = loss * ranks
        return attach(router, probs, coeff, loss, name, *args, **kwargs)

    router_class.attach_and_log_load_balancing_loss = attach_whole


def mark_tensor_parallel(model: Any) -> None:
    """Mark the weights that tensor ranks split, by which the gradient's norm tells them from copies.

    0.16 marks them only where it draws them itself; without, the norm (and so clipping) forgets all but the first rank.
    """
    from megatron.core.tensor_parallel import layers

    axes = {
        layers.VocabParallelEmbedding: 0,
        layers.ColumnParallelLinear: 0,
        layers.RowParallelLinear: 1,
    }
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if (
            type(module) in axes
            and weight is not None
            and not hasattr(weight, "tensor_model_parallel")
        ):
            layers.set_tensor_model_parallel_attributes(weight, True, axes[type(module)], 1)


def _define(module: Any, name: str, value: Any) -> None:
    if not hasattr(module, name):
        setattr(module, name, value)
