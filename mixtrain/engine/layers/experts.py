"""The experts of a layer: one grouped matrix product each for fc1 and fc2, SwiGLU between.

Legend of shapes: T tokens routed to this rank, sorted by expert; E local experts; H hidden; F local
FFN size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from mixtrain.engine.layers.cpu.experts import ExpertByExpert


class Experts(MegatronModule):
    """E SwiGLU experts down(silu(gate(x)) * up(x)) (Shazeer 2020), over expert and tensor ranks.

    `weight1` [E, 2F, H] holds gate above up; `weight2` is [E, H, F]. `moe_grouped_gemm` does not
    change the result: it chooses one grouped_mm for all experts or a loop over them.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection=None, **_: object
    ):
        super().__init__(config=config)
        self.ep = pg_collection.ep
        self.etp = pg_collection.expt_tp
        self.edp = pg_collection.expt_dp
        ffn = config.moe_ffn_hidden_size // self.etp.size()
        self.weight1 = self._weight(num_local_experts, 2 * ffn, config.hidden_size, split=1)
        self.weight2 = self._weight(num_local_experts, config.hidden_size, ffn, split=2)
        selective = config.recompute_granularity == "selective"
        self.recompute_act = selective and "moe_act" in config.recompute_modules

    def _weight(self, *shape: int, split: int) -> torch.nn.Parameter:
        """Create a weight with Megatron-Core's attributes for gradient reduction and norm."""
        weight = torch.nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype))
        weight.tensor_model_parallel = True
        weight.partition_dim = split
        weight.partition_stride = 1
        # True: reduced like dense weights; False: over the ranks that share these experts.
        # Upstream's experts (0.16) check only EP == 1, so their gradients are not reduced over TP
        # if ETP < TP
        is_like_dense = self.etp.size() == self.config.tensor_model_parallel_size
        weight.allreduce = self.config.expert_model_parallel_size == 1 and is_like_dense
        return weight

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Tokens [T, H], rows per expert [E], router weights [T] -> ([T, H], no bias)."""
        counts = tokens_per_expert
        if self.config.moe_grouped_gemm and self._is_cpu(tokens):
            output = ExpertByExpert.apply(
                tokens, probs, self.weight1, self.weight2, counts.tolist()
            )
            return output, None
        if self.config.moe_grouped_gemm:
            multiply = self._grouped(counts, tokens.device)
        else:
            multiply = self._loop(counts)
        hidden = multiply(tokens, self.weight1)
        if not self.recompute_act:
            return multiply(_swiglu(hidden, probs), self.weight2), None
        checkpoint = CheckpointWithoutOutput()
        output = multiply(checkpoint.checkpoint(_swiglu, hidden, probs), self.weight2)
        checkpoint.discard_output_and_register_recompute(output)
        return output, None

    @staticmethod
    def _is_cpu(tokens: torch.Tensor) -> bool:
        """Whether to use ExpertByExpert: on the CPU grouped_mm is a slower loop over experts."""
        return tokens.device.type == "cpu"

    @staticmethod
    def _grouped(tokens_per_expert: torch.Tensor, device: torch.device):
        """Return a function that multiplies each expert's rows by its matrix, with grouped_mm.

        The matrices are [E, out, in]; an expert may have no rows.
        """
        # the dispatcher counts on the host, which does not wait for the copy
        ends = tokens_per_expert.cumsum(0).to(torch.int32).to(device, non_blocking=True)

        def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            product = F.grouped_mm(rows.contiguous(), weight.transpose(1, 2), offs=ends)
            if product.requires_grad:
                product.register_hook(_contiguous)
            return product

        return multiply

    @staticmethod
    def _loop(tokens_per_expert: torch.Tensor):
        """Return the same function, as a loop over experts."""
        counts = tokens_per_expert.tolist()

        def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            pairs = zip(rows.split(counts), weight, strict=True)
            return torch.cat([F.linear(expert_rows, matrix) for expert_rows, matrix in pairs])

        return multiply

    def backward_dw(self) -> None:
        """Do nothing: Megatron-Core calls this for delayed weight gradients, and there are none."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Return the keys and shapes of Megatron-LM with Transformer Engine.

        [..., expert, 2F, H] for weight1 and [..., expert, H, F] for weight2.
        """
        axes = len(sharded_offsets)  # the axes before the expert's: the layer
        rank = self.etp.rank()
        ranks = self.etp.size()
        replica = (0, 0, self.edp.rank())
        first = self.ep.rank() * len(self.weight1)
        total = self.ep.size() * len(self.weight1)

        def sharded(
            key: str, weight: torch.Tensor, replica_id: tuple, split
        ) -> list[ShardedTensor]:
            """Return every expert's shards; `split` yields (shard, axis, index, shards on it)."""
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    shard,
                    *sharded_offsets,
                    (axes, first + number, total),
                    (axes + 1 + axis, index, count),
                    replica_id=replica_id,
                    prepend_axis_num=axes + 1,
                )
                for number, expert in enumerate(weight)
                for shard, axis, index, count in split(expert)
            ]

        def gate_and_up(expert: torch.Tensor):
            gate, up = expert.chunk(2)
            return (gate, 0, rank, 2 * ranks), (up, 0, ranks + rank, 2 * ranks)

        def down(expert: torch.Tensor):
            return ((expert, 1, rank, ranks),)

        def factory(name: str, weight: torch.Tensor, split) -> ShardedTensorFactory:
            def build(
                key: str,
                data: torch.Tensor,
                replica_id: tuple,
                flattened_range: slice | None = None,
            ):
                return sharded(key, data, replica_id, split)

            def merge(shards: list[torch.Tensor]) -> torch.Tensor:
                return torch.cat(shards).view(weight.shape)

            return ShardedTensorFactory(
                f"{prefix}experts.{name}.weight", weight, build, merge, replica
            )

        return {
            f"{prefix}weight1": factory("linear_fc1", self.weight1, gate_and_up),
            f"{prefix}weight2": factory("linear_fc2", self.weight2, down),
        }


def _contiguous(gradient: torch.Tensor) -> torch.Tensor:
    """Copy an expanded gradient, as of a sum: grouped_mm's backward refuses it, even if empty."""
    return gradient.contiguous() if gradient.numel() else gradient.new_empty(gradient.shape)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight that saves only its inputs for backward.

    PyTorch would also save silu(gate), its product with up and more: twice the memory in every
    layer and microbatch.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, probs)
        gate, up = hidden.chunk(2, dim=-1)
        return (F.silu(gate) * up * probs.unsqueeze(-1)).to(hidden.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, probs = ctx.saved_tensors
        gate, up = hidden.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        weighted = gradient * probs.unsqueeze(-1).to(gradient.dtype)
        to_gate = weighted * up * (sigmoid + silu * (1 - sigmoid))
        to_probs = (gradient * silu * up).sum(dim=-1, dtype=probs.dtype)
        return torch.cat([to_gate, weighted * silu], dim=-1), to_probs


def _swiglu(hidden: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up times the token's router weight: [T, 2F], [T] -> [T, F].

    The weight is applied before the second matrix, in a pass that is needed anyway, in the router's
    precision.
    """
    return _SwiGLU.apply(hidden, probs)
