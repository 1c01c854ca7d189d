"""Process groups, device and seeds of one rank.

Rule: all process groups of a run start here. (data/datasets.py starts a group of one for tools.)
"""

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
    # PyTorch's notes on reproducibility: a fixed order of cuBLAS's sums
    "CUBLAS_WORKSPACE_CONFIG":           ":4096:8",
    # Transformer Engine's attention; Megatron-Core requires it
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO":  "0",
    # NCCL's own choice, by message size and load, could change the order of sums
    "NCCL_ALGO":                         "Ring",
}
# fmt: on


@dataclass(frozen=True)
class Ranks:
    """This rank and its device, after Megatron-Core's groups are initialized."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints and writes for all."""
        return self.rank == 0


@contextlib.contextmanager
def start(plan: Plan, identity: Identity) -> Iterator[Ranks]:
    """Start torch.distributed and Megatron-Core's groups; destroy them after the block."""
    if (names := os.environ.get(INTERFACES)) and (problem := interface_problem(names)):
        raise UserError(problem)  # gloo itself fails after 40 s, with a traceback
    if plan.config.trainer.deterministic:
        be_deterministic()
    device = torch.device("cpu")
    if plan.config.trainer.accelerator is Accelerator.gpu:
        device = torch.device("cuda", identity.local_rank)
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes(plan))
    store = None
    if identity.rendezvous.startswith("tcp://"):
        store = rendezvous_store(identity, timeout)
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
        torch.distributed.barrier()  # no rank exits while another still communicates with it
    finally:
        # after a fault a peer may be gone: exit without communication
        with contextlib.suppress(Exception):
            parallel_state.destroy_model_parallel()
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()


def rendezvous_store(identity: Identity, timeout: timedelta) -> torch.distributed.TCPStore:
    """Return the ranks' TCPStore; the first rank listens only on the rendezvous address.

    Whoever reaches the store may write to it, and PyTorch's own tcp:// listens on every interface
    of the node.
    """
    address = urlparse(identity.rendezvous)
    listen_fd = None
    if identity.rank == 0:
        infos = socket.getaddrinfo(address.hostname, address.port, type=socket.SOCK_STREAM)
        family, kind, _, _, socket_address = infos[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(socket_address)
            listen_fd = listener.detach()  # the store closes it
    return torch.distributed.TCPStore(
        address.hostname,
        address.port,
        identity.world_size,
        is_master=identity.rank == 0,
        timeout=timeout,
        master_listen_fd=listen_fd,
    )


def initialise_model_parallel(plan: Plan) -> None:
    """Initialize Megatron-Core's groups."""
    # arguments by name: their order differs between versions
    parallel = plan.config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
        distributed_timeout_minutes=timeout_minutes(plan),
    )


def timeout_minutes(plan: Plan) -> float:
    """Return the timeout of collectives: longer than the watchdog's, whose message says more."""
    return plan.config.trainer.timeout_minutes + 0.5


def seed_everything(plan: Plan) -> None:
    """Seed the generators of dropout and jitter; weights have their own (engine/weight_init.py)."""
    seed = plan.config.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def be_deterministic() -> None:
    """Make a rerun at the same layout bitwise equal, slower on a GPU. Call before CUDA starts."""
    for name, value in DETERMINISTIC.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
