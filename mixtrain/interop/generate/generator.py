"""Generate on all ranks: data-parallel replicas share the prompts; each token is a forward pass.

Rule: one rank of a replica chooses a token and broadcasts it to the replica. Every rank takes part
in every pass, with padding tokens if its replica has no sequence left, because the replicas share
experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from mixtrain.engine.shards import unwrap
from mixtrain.interop.generate.kv_cache import KVCache, PackedTokens
from mixtrain.interop.generate.request import Sampling
from mixtrain.interop.generate.sample import choose_token, random_stream
from mixtrain.system import collectives

# why a continuation ended; "": it has not
REASONS = ("", "eod", "stop", "length", "interrupted")


@dataclass
class Sequence:
    """A prompt and its continuation."""

    number: int  # among all prompts; selects the random stream
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)  # new ones
    reason: str = ""  # one of REASONS


@dataclass(frozen=True)
class StopConditions:
    """When a continuation ends."""

    max_new_tokens: int
    end_tokens: set[int]  # ids that end a document
    has_stop_text: Callable[[list[int]], bool]  # given the new tokens

    def reason(self, tokens: list[int]) -> str:
        """Return why a continuation ends after the last of its new tokens; empty if it does not."""
        if tokens[-1] in self.end_tokens:
            return "eod"
        if self.has_stop_text(tokens):
            return "stop"
        return "length" if len(tokens) >= self.max_new_tokens else ""


@dataclass(frozen=True)
class Callbacks:
    """Functions that every rank calls after each pass."""

    stop_requested: Callable[[], bool] = lambda: False
    # (tokens of this pass, unfinished sequences), of all replicas
    on_pass: Callable[[int, int], None] = lambda tokens, unfinished: None


class Generator:
    """This rank's part of a generation: its model chunk with a cache, and the choice of tokens."""

    def __init__(
        self,
        chunk: torch.nn.Module,
        device: torch.device,
        sampling: Sampling,
        stop_conditions: StopConditions,
        callbacks: Callbacks,
    ):
        self.chunk = chunk.eval()
        self.device = device
        self.sampling = sampling
        self.stop_conditions = stop_conditions
        self.callbacks = callbacks
        self.cache = KVCache(unwrap(chunk))
        # sequence parallelism splits the packed tokens evenly
        self.multiple = chunk.config.tensor_model_parallel_size

    def generate(self, batch: list[Sequence]) -> bool:
        """Continue a batch on all replicas and fill in its results on every rank.

        Returns whether any rank was asked to stop, as generate_replica does.
        """
        replica = parallel_state.get_data_parallel_rank()
        replicas = parallel_state.get_data_parallel_world_size()
        sequences = batch[replica::replicas]
        stopped = self.generate_replica(sequences)
        if replicas > 1:
            results = [(sequence.tokens, sequence.reason) for sequence in sequences]
            gathered = collectives.gather(results, parallel_state.get_data_parallel_group())
            for number, sequence in enumerate(batch):
                row, source = divmod(number, replicas)
                sequence.tokens, sequence.reason = gathered[source][row]
        return stopped

    @torch.no_grad()
    def generate_replica(self, sequences: list[Sequence]) -> bool:
        """Continue the sequences of this replica to their ends, in place.

        All ranks must call, even without sequences. Returns whether any rank was asked to stop,
        which ends all sequences early.
        """
        longest_prompt = max((len(sequence.prompt) for sequence in sequences), default=0)
        self.cache.reset(len(sequences), longest_prompt + self.stop_conditions.max_new_tokens)
        streams = {
            sequence.number: random_stream(self.sampling.seed, sequence.number)
            for sequence in sequences
        }
        active = sequences
        inputs = [sequence.prompt for sequence in sequences]
        starts = [0] * len(sequences)
        while True:
            logits = self.forward(PackedTokens.pack(inputs, starts, self.multiple, self.device))
            # no logits before the last pipeline stage
            choices = [
                self.choose(sequence, row, streams[sequence.number])
                for sequence, row in zip(active, logits, strict=False)
            ]
            self.broadcast_choices(active, choices)
            unfinished = [index for index, sequence in enumerate(active) if not sequence.reason]
            if (stopped := self.end_of_batch(len(active), len(unfinished))) is not None:
                break
            if len(unfinished) < len(active):
                self.cache.keep(unfinished)
            active = [active[index] for index in unfinished]
            inputs = [sequence.tokens[-1:] for sequence in active]
            starts = [len(sequence.prompt) + len(sequence.tokens) - 1 for sequence in active]
        for sequence in sequences:
            sequence.reason = sequence.reason or "interrupted"
        return stopped

    def forward(self, packed: PackedTokens) -> torch.Tensor:
        """Return each sequence's logits [b, vocabulary] on the last pipeline stage, else [0]."""
        self.cache.packed = packed

        def step(_, model: torch.nn.Module):
            output = model(packed.tokens[None], packed.positions[None], attention_mask=None)
            return output, lambda output, non_loss_data: output

        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=self.chunk,
            num_microbatches=1,
            seq_length=len(packed.tokens),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not parallel_state.is_pipeline_last_stage():
            return torch.empty(0)
        return gather_from_tensor_model_parallel_region(results[0])[0, : len(packed.lengths)]

    def choose(
        self, sequence: Sequence, logits: torch.Tensor, stream: torch.Generator
    ) -> tuple[int, int]:
        """Return (the next token, the index in REASONS), chosen on tensor-parallel rank 0."""
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            return 0, 0
        token = choose_token(logits, self.sampling, stream)
        reason = self.stop_conditions.reason([*sequence.tokens, token])
        return token, REASONS.index(reason)

    def broadcast_choices(self, active: list[Sequence], choices: list[tuple[int, int]]) -> None:
        """Broadcast the choices within the replica and append them to the sequences.

        The source is tensor-parallel rank 0 of the last pipeline stage.
        """
        if not active:
            return
        chosen = torch.tensor(choices or [(0, 0)] * len(active), device=self.device)
        if parallel_state.is_pipeline_last_stage():
            source = parallel_state.get_tensor_model_parallel_src_rank()
            group = parallel_state.get_tensor_model_parallel_group()
            torch.distributed.broadcast(chosen, source, group=group)
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.broadcast(chosen, source, group=group)
        for sequence, (token, reason) in zip(active, chosen.tolist(), strict=True):
            sequence.tokens.append(token)
            sequence.reason = REASONS[reason]

    def end_of_batch(self, new_tokens: int, unfinished: int) -> bool | None:
        """Return True if a rank was asked to stop, False if all sequences ended, None otherwise.

        `new_tokens` and `unfinished` count this replica's tokens and sequences of this pass.
        """
        # one rank per replica counts
        counts = parallel_state.get_model_parallel_group().rank() == 0
        totals = torch.tensor(
            [new_tokens * counts, unfinished * counts, self.callbacks.stop_requested()],
            device=self.device,
        )
        torch.distributed.all_reduce(totals)
        new_tokens, unfinished, stop_requests = totals.tolist()
        self.callbacks.on_pass(new_tokens, unfinished)
        return bool(stop_requests) if stop_requests or not unfinished else None
