"""Generation on all ranks: prompts are dealt to the data-parallel replicas, each token is one forward pass.

Rule: one rank of a replica chooses a token and all of the replica take it; every rank takes part in every pass, with
tokens that belong to nobody if it has none of its own, because experts are shared with the other replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from mixtrain.engine.shards import unwrap
from mixtrain.interop.generate.cache import Cache, Row
from mixtrain.interop.generate.request import Sampling
from mixtrain.interop.generate.sample import choose, stream

REASONS = ("", "eod", "stop", "length", "interrupted")  # why a continuation ended; "": it has not


@dataclass
class Sequence:
    """A prompt and what it has been continued with."""

    number: int  # of all prompts: its random stream follows from it
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)  # new ones
    reason: str = ""


@dataclass(frozen=True)
class Limits:
    """When a continuation ends."""

    max_new_tokens: int
    eod: set[int]  # the tokens that end a document
    stops: Callable[[list[int]], bool]  # whether new tokens have come to a stop text

    def reason(self, tokens: list[int]) -> str:
        """Why a continuation ends with the latest of its tokens, or ""."""
        if tokens[-1] in self.eod:
            return "eod"
        if self.stops(tokens):
            return "stop"
        return "length" if len(tokens) >= self.max_new_tokens else ""


@dataclass(frozen=True)
class Watch:
    """Whoever looks on: both are called on every rank after each pass."""

    asked_to_stop: Callable[[], bool] = lambda: False
    # of all replicas: in this pass; sequences
    progress: Callable[[int, int], None] = lambda tokens, unfinished: None


class Generator:
    """The model of this rank, with a cache, and its part in choosing tokens."""

    def __init__(
        self,
        chunk: torch.nn.Module,
        device: torch.device,
        sampling: Sampling,
        limits: Limits,
        watch: Watch,
    ):
        self.chunk = chunk.eval()
        self.device = device
        self.sampling = sampling
        self.limits = limits
        self.watch = watch
        self.cache = Cache(unwrap(chunk))
        # sequence parallelism cuts a row in so many
        self.multiple = chunk.config.tensor_model_parallel_size

    def continue_all(self, batch: list[Sequence]) -> bool:
        """Continue a batch, dealt out to the replicas, and bring what came of it to every rank; `run` for the rest."""
        replica = parallel_state.get_data_parallel_rank()
        replicas = parallel_state.get_data_parallel_world_size()
        stopping = self.run(batch[replica::replicas])
        mine = [(each.tokens, each.reason) for each in batch[replica::replicas]]
        if replicas > 1:
            found: list = [None] * replicas
            torch.distributed.all_gather_object(
                found, mine, group=parallel_state.get_data_parallel_group()
            )
            for place, sequence in enumerate(batch):
                sequence.tokens, sequence.reason = found[place % replicas][place // replicas]
        return stopping

    @torch.no_grad()
    def run(self, sequences: list[Sequence]) -> bool:
        """Continue the sequences of this replica to their ends; whether any rank was asked to stop before.

        All ranks must call, whether they have sequences or not.
        """
        longest = (
            max((len(sequence.prompt) for sequence in sequences), default=0)
            + self.limits.max_new_tokens
        )
        self.cache.begin(len(sequences), longest)
        streams = {each.number: stream(self.sampling.seed, each.number) for each in sequences}
        going = sequences
        latest = [each.prompt for each in sequences]
        starts = [0] * len(sequences)
        while True:
            logits = self.forward(Row.of(latest, starts, self.multiple, self.device))
            self.share(
                going, [self.choice(*pair, streams) for pair in zip(going, logits, strict=False)]
            )
            kept = [place for place, sequence in enumerate(going) if not sequence.reason]
            if (stopping := self.stopping(len(going), len(kept))) is not None:
                break
            if len(kept) < len(going):
                self.cache.keep(kept)
            going = [going[place] for place in kept]
            latest = [each.tokens[-1:] for each in going]
            starts = [len(each.prompt) + len(each.tokens) - 1 for each in going]
        for sequence in sequences:
            sequence.reason = sequence.reason or "interrupted"
        return stopping

    def forward(self, row: Row) -> torch.Tensor:
        """The logits [b, vocabulary] after the row, on the ranks of the last stage; nothing on the others."""
        self.cache.row = row

        def step(_, model: torch.nn.Module):
            output = model(row.tokens[None], row.positions[None], attention_mask=None)
            return output, lambda output, non_loss_data: output

        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=self.chunk,
            num_microbatches=1,
            seq_length=len(row.tokens),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not parallel_state.is_pipeline_last_stage():
            return torch.empty(0)
        return gather_from_tensor_model_parallel_region(results[0])[0, : len(row.lengths)]

    def choice(
        self, sequence: Sequence, logits: torch.Tensor, streams: dict[int, torch.Generator]
    ) -> tuple[int, int]:
        """(the next token, the number of the reason to end with it), decided on one rank of the replica."""
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            return 0, 0
        token = choose(logits, self.sampling, streams[sequence.number])
        return token, REASONS.index(self.limits.reason([*sequence.tokens, token]))

    def share(self, going: list[Sequence], choices: list[tuple[int, int]]) -> None:
        """Every rank of the replica takes what its first rank of the last stage has chosen."""
        if not going:
            return
        chosen = torch.tensor(choices or [(0, 0)] * len(going), device=self.device)
        if parallel_state.is_pipeline_last_stage():
            source = parallel_state.get_tensor_model_parallel_src_rank()
            torch.distributed.broadcast(
                chosen, source, group=parallel_state.get_tensor_model_parallel_group()
            )
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(
            chosen, source, group=parallel_state.get_pipeline_model_parallel_group()
        )
        for sequence, (token, reason) in zip(going, chosen.tolist(), strict=True):
            sequence.tokens.append(token)
            sequence.reason = REASONS[reason]

    def stopping(self, produced: int, left: int) -> bool | None:
        """None: go on. False: no sequence of any replica is left. True: somebody has asked to stop.

        `produced` tokens in this pass and `left` sequences, of this replica.
        """
        first = parallel_state.get_model_parallel_group().rank() == 0  # speaks for its replica
        facts = torch.tensor(
            [produced * first, left * first, self.watch.asked_to_stop()], device=self.device
        )
        torch.distributed.all_reduce(facts)
        produced, left, asked = facts.tolist()
        self.watch.progress(produced, left)
        return bool(asked) if asked or not left else None
