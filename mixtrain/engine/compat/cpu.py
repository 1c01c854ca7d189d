"""Run Megatron-Core without CUDA: the one module that knows that Megatron-Core expects a GPU.

Rule: torch itself is not patched. A Megatron module that uses `torch.cuda` gets its own `torch`
whose `cuda` returns the CPU; a function with a CUDA literal gets the CPU's literal; a few functions
are replaced. Every patched site is in a table below and must exist: after an upgrade that moved
one, `apply` raises RuntimeError with its name. training/worker.py calls `apply` where
trainer.accelerator is cpu; a GPU run is not patched.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from mixtrain.engine.compat import gloo

# Modules that call torch.cuda functions in a training step (current_device, streams, RNG states).
# fmt: off
NAMESPACES = {
    "tensor_parallel.layers": "devices of weights and of gathered activations",
    "tensor_parallel.mappings": "devices of collectives' outputs",
    "tensor_parallel.random": "CUDA RNG states of the tracker",
    "tensor_parallel.utils": "devices of split and gathered tensors",
    "transformer.dot_product_attention": "device of the softmax offset",
    "transformer.moe.router": "device of the weight and the expert-bias buffers",
    "transformer.moe.token_dispatcher": "a stream for device-to-host copies",
    "transformer.moe.shared_experts": "a stream for the overlap",
    "models.common.embeddings.rotary_pos_embedding": "device of inv_freq",
    "distributed.distributed_data_parallel": "a communication stream",
    "distributed.param_and_grad_buffer": "devices of the buffers, streams",
    "optimizer.optimizer": "device of the loss scale",
    "optimizer.distrib_optimizer": "device of the sharded parameter buffers",
    "pipeline_parallel.p2p_communication": "devices of received activations, synchronize",
    "dist_checkpointing.strategies.filesystem_async": "synchronize before a save",
    "dist_checkpointing.strategies.state_dict_saver": "device of the verdict that ranks exchange",
    "utils": "device of the global memory buffer",
}

# Functions with a CUDA literal among their constants: device="cuda", param.type() ==
# "torch.cuda.FloatTensor".
LITERALS = [
    ("optimizer.optimizer", "MixedPrecisionOptimizer.__init__"),
    ("optimizer.optimizer", "FP32Optimizer.__init__"),
    ("optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__"),
    ("optimizer.distrib_optimizer", "DistributedOptimizer.__init__"),
    ("optimizer.distrib_optimizer", "DistributedOptimizer._build_model_and_main_param_groups"),
    ("optimizer.clip_grads", "get_grad_norm_fp32"),
    ("optimizer.clip_grads", "clip_grad_by_total_norm_fp32"),
    ("optimizer.clip_grads", "count_zeros_fp32"),
    ("pipeline_parallel.schedules", "forward_backward_no_pipelining"),
    ("pipeline_parallel.schedules", "forward_backward_pipelining_without_interleaving"),
    ("pipeline_parallel.schedules", "forward_backward_pipelining_with_interleaving"),
    ("transformer.utils", "get_default_causal_mask"),
    ("utils", "local_multi_tensor_l2_norm"),
]
# literals that only Megatron-Core 0.19 has
LITERALS_019 = [
    ("optimizer.optimizer", "MegatronOptimizer.has_grad_norm_group"),
]
CPU_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
# fmt: on


def apply() -> None:
    """Patch the installed Megatron-Core for the CPU, in this process; once."""
    from megatron.core import jit
    from megatron.core.transformer.moe import token_dispatcher

    if isinstance(vars(token_dispatcher).get("torch"), _Torch):
        return
    # Megatron's fuser is torch.compile, which needs a C++ compiler and up to minutes per small
    # kernel: disable it for functions decorated from now on, and run those decorated already
    # eagerly
    jit.disable_jit_fuser()
    torch.compiler.set_stance("force_eager")
    for name in NAMESPACES:
        _give_namespace(name)
    for module, function in LITERALS:
        _replace_literals(module, function)
    for module, function in LITERALS_019:
        if _version() >= (0, 19):
            _replace_literals(module, function)
    for module, name, function in REPLACEMENTS:
        _replace_function(module, name, function)


class _Stream:
    """A stream whose work is always done. All streams are equal: there is none to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, _: Any = None) -> _Stream:
        # also serves as an event that has happened: it can be synchronized with
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Cuda:
    """torch.cuda as a Megatron module sees it on the CPU; other names are torch.cuda's own."""

    Stream = _Stream
    current_device = staticmethod(lambda: torch.device("cpu"))
    current_stream = staticmethod(lambda *_: _Stream())
    default_stream = staticmethod(lambda *_: _Stream())
    stream = staticmethod(lambda _: contextlib.nullcontext())
    synchronize = staticmethod(lambda *_: None)
    manual_seed = staticmethod(torch.manual_seed)
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_: torch.set_rng_state(state))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Torch:
    """torch as a Megatron module sees it on the CPU: all of torch except `cuda`."""

    cuda = _Cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _get_rng_state(
    device: Any = "cpu", clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return split sizes as numpy for the dispatcher; upstream converts only tensors of a GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _positions_on_this_rank(pos_emb: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
    """Return the rotary positions of this rank's two chunks. Upstream uses pinned memory."""
    chunks = pos_emb.chunk(2 * cp_group.size(), dim=seq_dim)
    return torch.cat(
        [chunks[cp_group.rank()], chunks[2 * cp_group.size() - 1 - cp_group.rank()]], dim=seq_dim
    )


REPLACEMENTS = [
    ("distributed.param_and_grad_buffer", "dist_all_gather_func", gloo.all_gather),
    ("distributed.param_and_grad_buffer", "dist_reduce_scatter_func", gloo.reduce_scatter),
    ("tensor_parallel.mappings", "_gather_along_first_dim", gloo.gather_uneven),
    ("tensor_parallel.mappings", "_reduce_scatter_along_first_dim", gloo.reduce_scatter_uneven),
    ("models.common.embeddings.rope_utils", "get_pos_emb_on_this_cp_rank", _positions_on_this_rank),
    ("tensor_parallel.random", "_get_cuda_rng_state", _get_rng_state),
    ("tensor_parallel.random", "_set_cuda_rng_state", _set_rng_state),
    ("transformer.moe.moe_utils", "maybe_move_tensor_to_cpu", _to_host),
]


def _version() -> tuple[int, ...]:
    from megatron.core.package_info import MAJOR, MINOR

    return MAJOR, MINOR


def _module(name: str) -> types.ModuleType:
    return importlib.import_module(f"megatron.core.{name}")


def _give_namespace(name: str) -> None:
    module = _module(name)
    if "torch.cuda" not in inspect.getsource(module) or vars(module).get("torch") is not torch:
        raise RuntimeError(
            f"megatron.core.{name} no longer uses torch.cuda: update mixtrain/engine/compat/cpu.py,"
            " NAMESPACES"
        )
    module.torch = _Torch()


def _replace_literals(module_name: str, path: str) -> None:
    """Replace the CUDA literals among the constants of one function's code object.

    So every module that imported the function gets the change.
    """
    owner: Any = _module(module_name)
    for part in path.split("."):
        owner = getattr(owner, part, None)
    function = inspect.unwrap(getattr(owner, "__func__", owner)) if owner else None
    constants = function.__code__.co_consts if function else ()
    replaced = tuple(_cpu_literal(constant) for constant in constants)
    if replaced == constants:
        raise RuntimeError(
            f"megatron.core.{module_name}.{path} has no CUDA literal any more: update"
            " mixtrain/engine/compat/cpu.py, LITERALS"
        )
    function.__code__ = function.__code__.replace(co_consts=replaced)


def _cpu_literal(constant: Any) -> Any:
    if isinstance(constant, tuple):  # the compiler turns `in ["a", "b"]` into a tuple
        return tuple(_cpu_literal(part) for part in constant)
    return CPU_LITERALS.get(constant, constant) if isinstance(constant, str) else constant


def _replace_function(module_name: str, name: str, function: Callable) -> None:
    """Replace an upstream function, also in Megatron modules that imported it by name."""
    old = getattr(_module(module_name), name, None)
    if old is None:
        raise RuntimeError(
            f"megatron.core.{module_name}.{name} is gone: update mixtrain/engine/compat/cpu.py,"
            " REPLACEMENTS"
        )
    for module in list(sys.modules.values()):
        is_megatron = getattr(module, "__name__", "").startswith("megatron.core")
        if is_megatron and vars(module).get(name) is old:
            setattr(module, name, function)
