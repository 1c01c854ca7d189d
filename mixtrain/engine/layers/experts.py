"""The experts of a layer: one grouped matrix product each for fc1 and fc2, SwiGLU between.

Legend of shapes: T tokens sent to this rank, sorted by expert; E experts here; H hidden; F the part
of the FFN here.
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
    """E experts, each down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU), split over expert and tensor ranks.

    `weight1` [E, 2F, H] holds gate above up, `weight2` [E, H, F]. `moe_grouped_gemm` chooses how each is multiplied,
    not what: one grouped_mm for all experts, or a loop over them.
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
        """A weight with the marks by which Megatron-Core reduces its gradient and adds it to the norm."""
        weight = torch.nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype))
        weight.tensor_model_parallel = True
        weight.partition_dim = split
        weight.partition_stride = 1
        # false: reduced over the ranks that share these experts, not over those that share dense
        # weights. Upstream's experts (0.16) look at the first condition alone and are left
        # unreduced over TP where ETP is less
        dense = (
            self.config.expert_model_parallel_size == 1
            and self.etp.size() == self.config.tensor_model_parallel_size
        )
        weight.allreduce = dense
        return weight

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """[T, H], [E], the router's weights [T] -> ([T, H], no bias)."""
        counts = tokens_per_expert
        if self.config.moe_grouped_gemm and self._is_cpu(tokens):
            return ExpertByExpert.apply(
                tokens, probs, self.weight1, self.weight2, counts.tolist()
            ), None
        multiply = (
            self._grouped(counts, tokens.device)
            if self.config.moe_grouped_gemm
            else self._loop(counts)
        )
        hidden = multiply(tokens, self.weight1)
        if not self.recompute_act:
            return multiply(_swiglu(hidden, probs), self.weight2), None
        checkpoint = CheckpointWithoutOutput()
        output = multiply(checkpoint.checkpoint(_swiglu, hidden, probs), self.weight2)
        checkpoint.discard_output_and_register_recompute(output)
        return output, None

    @staticmethod
    def _is_cpu(tokens: torch.Tensor) -> bool:
        """There grouped_mm is a loop over experts too, and a slower one."""
        return tokens.device.type == "cpu"

    @staticmethod
    def _grouped(tokens_per_expert: torch.Tensor, device: torch.device):
        """Rows of each expert times its own matrix [E, out, in], all at once. Experts without rows are fine."""
        # the dispatcher counts on the host, and nobody there waits for the copy
        ends = tokens_per_expert.cumsum(0).to(torch.int32).to(device, non_blocking=True)

        def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            product = F.grouped_mm(rows.contiguous(), weight.transpose(1, 2), offs=ends)
            if product.requires_grad:
                product.register_hook(_contiguous)
            return product

        return multiply

    @staticmethod
    def _loop(tokens_per_expert: torch.Tensor):
        """The same, expert by expert."""
        counts = tokens_per_expert.tolist()

        def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.cat(
                [
                    F.linear(part, matrix)
                    for part, matrix in zip(rows.split(counts), weight, strict=True)
                ]
            )

        return multiply

    def backward_dw(self) -> None:
        """Nothing is left over: Megatron-Core asks for delayed weight gradients where it has delayed them."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """As Megatron-LM with Transformer Engine writes experts: [.., expert, 2F, H] and [.., expert, H, F]."""
        axes = len(sharded_offsets)  # before the expert's: the layer
        rank = self.etp.rank()
        ranks = self.etp.size()
        replica = (0, 0, self.edp.rank())
        first = self.ep.rank() * len(self.weight1)
        total = self.ep.size() * len(self.weight1)

        def pieces(key: str, weight: torch.Tensor, replica_id: tuple, cut) -> list[ShardedTensor]:
            """Expert by expert: `cut` gives its parts and their places along the axis that tensor ranks split."""
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    part,
                    *sharded_offsets,
                    (axes, first + number, total),
                    (axes + 1 + axis, at, of),
                    replica_id=replica_id,
                    prepend_axis_num=axes + 1,
                )
                for number, expert in enumerate(weight)
                for part, axis, at, of in cut(expert)
            ]

        def gate_and_up(expert: torch.Tensor):
            gate, up = expert.chunk(2)
            return (gate, 0, rank, 2 * ranks), (up, 0, ranks + rank, 2 * ranks)

        def down(expert: torch.Tensor):
            return ((expert, 1, rank, ranks),)

        def factory(name: str, weight: torch.Tensor, cut) -> ShardedTensorFactory:
            def build(
                key: str,
                data: torch.Tensor,
                replica_id: tuple,
                flattened_range: slice | None = None,
            ):
                return pieces(key, data, replica_id, cut)

            def merge(parts: list[torch.Tensor]) -> torch.Tensor:
                return torch.cat(parts).view(weight.shape)

            return ShardedTensorFactory(
                f"{prefix}experts.{name}.weight", weight, build, merge, replica
            )

        return {
            f"{prefix}weight1": factory("linear_fc1", self.weight1, gate_and_up),
            f"{prefix}weight2": factory("linear_fc2", self.weight2, down),
        }


def _contiguous(gradient: torch.Tensor) -> torch.Tensor:
    """grouped_mm's backward takes no expanded gradient, as that of a sum is, not even an empty one."""
    return gradient.contiguous() if gradient.numel() else gradient.new_empty(gradient.shape)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight, keeping nothing for the backward pass but what it was given.

    PyTorch would keep silu(gate), its product with up and more: as much again, in every layer and
    microbatch.
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
    """silu(gate) * up times the router's weight of the token: [T, 2F], [T] -> [T, F].

    The weight goes in before the second matrix, where a pass is made anyway, in the router's
    precision.
    """
    return _SwiGLU.apply(hidden, probs)
