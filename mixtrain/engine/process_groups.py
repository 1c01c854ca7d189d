"""Process groups, devices and seeds of one rank. Rule: nothing else in the project starts a process group."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlparse

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from mixtrain.config.choices import Accelerator
from mixtrain.config.plan import Plan
from mixtrain.errors import UserError
from mixtrain.system.rank_identity import INTERFACES, Identity, interface_problem

# fmt: off
DETERMINISTIC = {
    # PyTorch's notes on reproducibility: cuBLAS sums in one order
    "CUBLAS_WORKSPACE_CONFIG":           ":4096:8",
    # Transformer Engine's attention; Megatron-Core asks for it
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO":  "0",
    # a choice by message size and load would add in another order
    "NCCL_ALGO":                         "Ring",
}
# fmt: on


@dataclass(frozen=True)
class Ranks:
    """This rank and its device, once Megatron-Core's groups are up."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """The rank that speaks and writes for all."""
        return self.rank == 0


@contextlib.contextmanager
def start(plan: Plan, identity: Identity) -> Iterator[Ranks]:
    """torch.distributed and Megatron-Core's groups for the plan's layout, until the block ends."""
    if (names := os.environ.get(INTERFACES)) and (wrong := interface_problem(names)):
        raise UserError(wrong)  # gloo's own words for it come after 40 s, and are a traceback
    if plan.config.trainer.deterministic:
        be_deterministic()
    device = torch.device("cpu")
    if plan.config.trainer.accelerator is Accelerator.gpu:
        device = torch.device("cuda", identity.local_rank)
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=patience(plan))
    store = None
    if identity.rendezvous.startswith("tcp://"):
        store = meeting_store(identity, timeout)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=None if store else identity.rendezvous,
        store=store,
        rank=identity.rank,
        world_size=identity.world_size,
        timeout=timeout,
    )
    try:
        initialise_model_parallel(plan)
        seed_everything(plan)
        yield Ranks(identity.rank, identity.world_size, identity.local_rank, device)
        torch.distributed.barrier()  # nobody leaves while another still talks to it
    finally:
        # after a fault a peer may be gone for good: leave without asking anybody
        with contextlib.suppress(Exception):
            parallel_state.destroy_model_parallel()
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()


def meeting_store(identity: Identity, timeout: timedelta) -> torch.distributed.TCPStore:
    """The store that the ranks meet at; the first rank listens at that address alone: who reaches it may write to it.

    PyTorch's own tcp:// listens on every interface of the node.
    """
    address = urlparse(identity.rendezvous)
    listening = None
    if identity.rank == 0:
        found = socket.getaddrinfo(address.hostname, address.port, type=socket.SOCK_STREAM)
        family, kind, _, _, where = found[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listening = listener.detach()  # the store closes it
    return torch.distributed.TCPStore(
        address.hostname,
        address.port,
        identity.world_size,
        is_master=identity.rank == 0,
        timeout=timeout,
        master_listen_fd=listening,
    )


def initialise_model_parallel(plan: Plan) -> None:
    """Megatron-Core's groups. By name: the order of the arguments differs between its versions."""
    parallel = plan.config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
        distributed_timeout_minutes=patience(plan),
    )


def patience(plan: Plan) -> float:
    """Minutes that a collective waits: longer than the watchdog, which has more to say once training has begun."""
    return plan.config.trainer.timeout_minutes + 0.5


def seed_everything(plan: Plan) -> None:
    """The generators that dropout and jitter draw from; weights have their own (engine/weight_init.py)."""
    seed = plan.config.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def be_deterministic() -> None:
    """The same bits again on the same layout, at a price on a GPU. Before anything of CUDA has started."""
    for name, value in DETERMINISTIC.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
